//! Adds callbacks around the calls to a heap, without `unsafe`.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::{DmaBuf, Heap, HeapError, Mapping, Memory, Pages, Populated, private};
use crate::error::{Result, SizeLimit};

/// Callbacks around the calls to a heap; see [`Hooked`]. By default, the callbacks do nothing and
/// leave the heap's results unchanged.
///
/// The callbacks run on the threads that call the [`Heap`], possibly on several at the same time,
/// and may block. If a callback panics, its load fails with [`crate::Error::Panicked`].
pub trait HeapHooks: fmt::Debug + Send + Sync + 'static {
    /// Replaces the heap's name in reports and errors.
    fn name(&self) -> Option<Cow<'_, str>> {
        None
    }

    /// Called before [`Heap::allocate`].
    ///
    /// # Errors
    /// If this returns an error, the allocation fails with that error, and the heap is not called.
    fn before_allocate(&self, bytes: usize) -> Result<(), HeapError> {
        let _ = bytes;
        Ok(())
    }

    /// Called after [`Heap::allocate`], with its result.
    fn after_allocate(&self, bytes: usize, result: Result<(), &HeapError>) {
        let _ = (bytes, result);
    }

    /// Called before [`Heap::populate`]. `mapped` is the address range of the whole mapping, and
    /// `part` is the range of byte offsets in it to populate.
    ///
    /// # Errors
    /// If this returns an error, populating fails with that error, and the heap is not called.
    fn before_populate(&self, mapped: Range<usize>, part: Range<usize>) -> Result<(), HeapError> {
        let _ = (mapped, part);
        Ok(())
    }

    /// Called after [`Heap::populate`], with its result.
    fn after_populate(&self, part: Range<usize>, result: Result<&Populated, &HeapError>) {
        let _ = (part, result);
    }

    /// Called before [`Heap::export`]. `bytes` is the length of the memory.
    ///
    /// # Errors
    /// If this returns an error, the export fails with that error, and the heap is not called.
    fn before_export(&self, bytes: usize) -> Result<(), HeapError> {
        let _ = bytes;
        Ok(())
    }

    /// Replaces the result of [`Heap::is_uncached`]. `inherited` is the wrapped heap's result.
    fn is_uncached(&self, inherited: bool) -> bool {
        inherited
    }

    /// Replaces the result of [`Heap::size_limit`]. `inherited` is the wrapped heap's result.
    fn size_limit(&self, inherited: Option<SizeLimit>) -> Option<SizeLimit> {
        inherited
    }

    /// Replaces the result of [`Heap::notes`]. `inherited` is the wrapped heap's result.
    fn notes(&self, inherited: Vec<String>) -> Vec<String> {
        inherited
    }
}

/// Wraps a heap with callbacks that can count, delay or fail the calls to it.
///
/// The hooks see addresses, sizes and offsets, but get no access to the memory, so implementing
/// them needs no `unsafe`.
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
/// let heap = Hooked::new(MemfdHeap::default(), Arc::clone(&hooks));
/// let loader = dmaload::Loader::builder().heap(heap);
/// # drop(loader);
/// ```
#[derive(Debug, Clone)]
pub struct Hooked<H, K> {
    heap: H,
    hooks: K,
}

impl<H: Heap, K: HeapHooks> Hooked<H, K> {
    /// Wraps `heap` with `hooks`.
    pub fn new(heap: H, hooks: K) -> Self {
        Hooked { heap, hooks }
    }

    /// Returns the hooks.
    pub fn hooks(&self) -> &K {
        &self.hooks
    }
}

// SAFETY: memory comes from the inner heap, whose implementer guarantees the contract. The hooks
// get addresses but no pointer or descriptor, so only `unsafe` code of their own could access the
// memory. They can't change any result that the contract covers, except to an error.
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

    fn is_uncached(&self, inherited: bool) -> bool {
        (**self).is_uncached(inherited)
    }

    fn size_limit(&self, inherited: Option<SizeLimit>) -> Option<SizeLimit> {
        (**self).size_limit(inherited)
    }

    fn notes(&self, inherited: Vec<String>) -> Vec<String> {
        (**self).notes(inherited)
    }
}
