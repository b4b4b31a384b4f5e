//! A heap with code of the caller's around its calls, without `unsafe`.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::{DmaBuf, Heap, HeapError, Mapping, Memory, Pages, Populated, private};
use crate::error::{Result, SizeLimit};

/// Code of the caller's around the calls of a heap; see [`Hooked`]. Each method does nothing by default.
///
/// The calls come from the loader's worker threads, from several at once, so they may block. One that panics
/// fails its load with [`crate::Error::Panicked`].
pub trait HeapHooks: fmt::Debug + Send + Sync + 'static {
    /// The name used in reports and errors, in place of that of the heap.
    fn name(&self) -> Option<Cow<'_, str>> {
        None
    }

    /// Before [`Heap::allocate`].
    ///
    /// # Errors
    /// In place of the call: the allocation fails with it.
    fn before_allocate(&self, bytes: usize) -> Result<(), HeapError> {
        let _ = bytes;
        Ok(())
    }

    /// After [`Heap::allocate`], with what it answered.
    fn after_allocate(&self, bytes: usize, result: Result<(), &HeapError>) {
        let _ = (bytes, result);
    }

    /// Before [`Heap::populate`]: `mapped` are the addresses of the whole mapping, `part` the byte offsets in
    /// it that are to be populated.
    ///
    /// # Errors
    /// In place of the call: populating fails with it.
    fn before_populate(&self, mapped: Range<usize>, part: Range<usize>) -> Result<(), HeapError> {
        let _ = (mapped, part);
        Ok(())
    }

    /// After [`Heap::populate`], with what it answered.
    fn after_populate(&self, part: Range<usize>, result: Result<&Populated, &HeapError>) {
        let _ = (part, result);
    }

    /// Before [`Heap::export`] of memory of this length.
    ///
    /// # Errors
    /// In place of the call: the export fails with it.
    fn before_export(&self, bytes: usize) -> Result<(), HeapError> {
        let _ = bytes;
        Ok(())
    }

    /// In place of what [`Heap::is_uncached`] answers.
    fn is_uncached(&self, of_the_heap: bool) -> bool {
        of_the_heap
    }

    /// In place of what [`Heap::size_limit`] answers.
    fn size_limit(&self, of_the_heap: Option<SizeLimit>) -> Option<SizeLimit> {
        of_the_heap
    }

    /// In place of what [`Heap::notes`] answers.
    fn notes(&self, of_the_heap: Vec<String>) -> Vec<String> {
        of_the_heap
    }
}

/// A heap with code of the caller's around its calls: to count, delay or fail them.
///
/// The hooks get numbers and never the memory, so this needs no `unsafe`.
///
/// ```
/// use dmaload::heap::{HeapError, HeapHooks, Hooked, MemfdHeap};
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicUsize, Ordering};
///
/// #[derive(Debug, Default)]
/// struct Counting(AtomicUsize);
///
/// impl HeapHooks for Counting {
///     fn before_allocate(&self, bytes: usize) -> Result<(), HeapError> {
///         self.0.fetch_add(bytes, Ordering::Relaxed);
///         Ok(())
///     }
/// }
///
/// let hooks = Arc::new(Counting::default());
/// let loader = dmaload::Loader::builder().heap(Hooked::new(MemfdHeap::default(), Arc::clone(&hooks)));
/// # drop(loader);
/// ```
#[derive(Debug, Clone)]
pub struct Hooked<H, K> {
    heap: H,
    hooks: K,
}

impl<H: Heap, K: HeapHooks> Hooked<H, K> {
    /// Puts `hooks` around `heap`.
    pub fn new(heap: H, hooks: K) -> Self {
        Hooked { heap, hooks }
    }

    /// The hooks.
    pub fn hooks(&self) -> &K {
        &self.hooks
    }
}

// SAFETY: memory comes from the heap inside, whose implementer has promised all of it. The hooks see numbers only,
// and can't change what the heap answers about its memory.
#[allow(unsafe_code)]
unsafe impl<H: Heap, K: HeapHooks> Heap for Hooked<H, K> {
    fn name(&self) -> Cow<'_, str> {
        self.hooks.name().unwrap_or_else(|| self.heap.name())
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        self.hooks.before_allocate(bytes)?;
        let memory = self.heap.allocate(bytes);
        self.hooks.after_allocate(bytes, memory.as_ref().map(|_| ()));
        memory
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, HeapError> {
        let start = mapping.address().addr().get();
        self.hooks.before_populate(start..start + mapping.bytes(), part.clone())?;
        let populated = self.heap.populate(mapping, memory, part.clone());
        self.hooks.after_populate(part, populated.as_ref());
        populated
    }

    fn exports(&self) -> bool {
        self.heap.exports()
    }

    fn export(&self, memory: &Memory) -> Result<DmaBuf, HeapError> {
        self.hooks.before_export(memory.bytes().unwrap_or(0))?;
        self.heap.export(memory)
    }

    fn allocates_at_once(&self) -> bool {
        self.heap.allocates_at_once()
    }

    fn is_uncached(&self) -> bool {
        self.hooks.is_uncached(self.heap.is_uncached())
    }

    fn pages(&self) -> Pages {
        self.heap.pages()
    }

    fn size_limit(&self) -> Option<SizeLimit> {
        self.hooks.size_limit(self.heap.size_limit())
    }

    fn notes(&self) -> Vec<String> {
        self.hooks.notes(self.heap.notes())
    }

    fn is_own(&self, key: private::Key) -> bool {
        self.heap.is_own(key)
    }
}

impl<K: HeapHooks + ?Sized> HeapHooks for Arc<K> {
    fn name(&self) -> Option<Cow<'_, str>> {
        (**self).name()
    }

    fn before_allocate(&self, bytes: usize) -> Result<(), HeapError> {
        (**self).before_allocate(bytes)
    }

    fn after_allocate(&self, bytes: usize, result: Result<(), &HeapError>) {
        (**self).after_allocate(bytes, result);
    }

    fn before_populate(&self, mapped: Range<usize>, part: Range<usize>) -> Result<(), HeapError> {
        (**self).before_populate(mapped, part)
    }

    fn after_populate(&self, part: Range<usize>, result: Result<&Populated, &HeapError>) {
        (**self).after_populate(part, result);
    }

    fn before_export(&self, bytes: usize) -> Result<(), HeapError> {
        (**self).before_export(bytes)
    }

    fn is_uncached(&self, of_the_heap: bool) -> bool {
        (**self).is_uncached(of_the_heap)
    }

    fn size_limit(&self, of_the_heap: Option<SizeLimit>) -> Option<SizeLimit> {
        (**self).size_limit(of_the_heap)
    }

    fn notes(&self, of_the_heap: Vec<String>) -> Vec<String> {
        (**self).notes(of_the_heap)
    }
}
