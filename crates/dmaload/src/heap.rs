//! Where segments' memory comes from.

use std::borrow::Cow;
use std::fmt::Debug;
use std::ops::Range;

use dmabuf::{Mapping, Memfd, Memory, Pages, Populated};

/// A source of memory for segments.
///
/// The loader alone may write to the memory that it was given, and reads may go on writing to it after a load was dropped:
/// an implementation keeps no descriptor and no mapping of it that it writes through. (A memfd is sealed against writes
/// before any segment of it is shown.)
///
/// Implement it to add a vendor's allocator, or around another heap to count, slow or fail its calls. All calls come
/// from the loader's own threads, so they may block.
pub trait Heap: Debug + Send + Sync + 'static {
    /// The name used in reports and errors.
    fn name(&self) -> Cow<'_, str>;

    /// Memory of at least `bytes` bytes, a multiple of the page size. It is mapped, and populated, by the caller.
    ///
    /// # Errors
    /// The kernel's refusal, as it came.
    fn allocate(&self, bytes: usize) -> Result<Memory, dmabuf::Error>;

    /// Puts pages under a part of such memory.
    ///
    /// # Errors
    /// The kernel's refusal, as it came.
    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error>;
}

/// Memory files: each segment has a file descriptor that other processes can map. Needs no device and no
/// privilege, so it is what [`auto`] gives.
#[derive(Debug, Clone, Copy, Default)]
pub struct MemfdHeap {
    /// The page size to populate with.
    pub pages: Pages,
}

impl Heap for MemfdHeap {
    fn name(&self) -> Cow<'_, str> {
        "memfd".into()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, dmabuf::Error> {
        Memfd::create("dmaload", bytes).map(Memory::Memfd)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error> {
        mapping.populate(memory, part, self.pages)
    }
}

/// Private memory with transparent huge pages, for callers that need no file descriptor.
#[derive(Debug, Clone, Copy, Default)]
pub struct AnonHeap {
    /// The page size to populate with.
    pub pages: Pages,
}

impl Heap for AnonHeap {
    fn name(&self) -> Cow<'_, str> {
        "anon".into()
    }

    fn allocate(&self, _bytes: usize) -> Result<Memory, dmabuf::Error> {
        Ok(Memory::Anonymous)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error> {
        mapping.populate(memory, part, self.pages)
    }
}

/// The heap for callers that require nothing of it: memfd.
pub fn auto() -> MemfdHeap {
    MemfdHeap::default()
}
