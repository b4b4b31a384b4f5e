//! A heap of a vendor's allocator, which returns descriptors of dma-bufs.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;

use dmabuf::Errno;

use super::{DmaBuf, Heap, HeapError, Mapping, Memory, Pages, Populated};
use crate::error::Result;

type AllocateFn = Box<dyn Fn(usize) -> Result<OwnedFd, Errno> + Send + Sync>;

/// A vendor's allocator, or any other, that gives descriptors of dma-bufs.
///
/// Each descriptor is checked to be one of a dma-buf that is large enough; whether nothing else writes to it
/// can't be checked, so making one is `unsafe`. Its memory is taken to be allocated at once, and is mapped by
/// `mmap(2)` of the descriptor.
pub struct FromDescriptors {
    name: String,
    allocate: AllocateFn,
    is_uncached: bool,
}

impl fmt::Debug for FromDescriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FromDescriptors")
            .field("name", &self.name)
            .field("is_uncached", &self.is_uncached)
            .finish_non_exhaustive()
    }
}

impl FromDescriptors {
    /// A heap of what `allocate` gives: for a length, a multiple of the page size, a dma-buf of at least that
    /// many bytes. An I/O error becomes an errno by [`Errno::from_io_error`].
    ///
    /// # Safety
    /// For each descriptor that `allocate` returns, until its memory is freed:
    ///
    /// - It is a dma-buf of new memory, which shares no page with any other memory.
    /// - No duplicate of it, no mapping of it and no importer of it writes to that memory, except those that
    ///   got it from dmaload ([`crate::Segment::hand_out_dma_buf`]).
    /// - Its pages stay: none is taken away, replaced, or moved under a mapping.
    #[allow(unsafe_code, reason = "the contract above")]
    pub unsafe fn new(
        name: impl Into<String>,
        allocate: impl Fn(usize) -> Result<OwnedFd, Errno> + Send + Sync + 'static,
    ) -> Self {
        FromDescriptors { name: name.into(), allocate: Box::new(allocate), is_uncached: false }
    }

    /// Says that the CPU reads this memory without its caches; see [`Heap::is_uncached`]. Default: false.
    #[must_use]
    pub fn uncached(mut self, is_uncached: bool) -> Self {
        self.is_uncached = is_uncached;
        self
    }
}

// SAFETY: who made this has promised for `allocate` what the trait demands of memory that is a dma-buf. Nothing is
// populated or exported here, and `exports` says that there are dma-bufs.
#[allow(unsafe_code)]
unsafe impl Heap for FromDescriptors {
    fn name(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        let fd = (self.allocate)(bytes).map_err(|errno| HeapError::new("allocate a dma-buf", bytes, errno))?;
        let dma_buf = DmaBuf::from_fd(fd).map_err(|error| HeapError::new(error.operation, bytes, error.errno))?;
        if dma_buf.bytes() < bytes {
            // As the kernel answers where a dma-buf is too small for what is asked of it.
            return Err(HeapError::new("take a shorter dma-buf in place", bytes, Errno::EINVAL));
        }
        Ok(Memory::DmaBuf(dma_buf))
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, HeapError> {
        mapping.populate(memory, part, Pages::Auto)
    }

    fn exports(&self) -> bool {
        true
    }

    fn allocates_at_once(&self) -> bool {
        true
    }

    fn is_uncached(&self) -> bool {
        self.is_uncached
    }
}
