//! A heap around an allocator that returns dma-buf descriptors.

use std::borrow::Cow;
use std::fmt;
use std::os::fd::OwnedFd;

use dmabuf::Errno;

use super::{DmaBuf, Heap, HeapError, Memory};
use crate::error::Result;

type AllocateFn = Box<dyn Fn(usize) -> Result<OwnedFd, Errno> + Send + Sync>;

/// A heap around an allocator, such as a vendor's, that returns dma-buf descriptors.
///
/// This heap checks that each descriptor refers to a dma-buf that is large enough. It can't check
/// that nothing else writes to the memory, so creating the heap is `unsafe`. The allocator is
/// assumed to allocate all pages at once. The memory is mapped by calling `mmap(2)` on the
/// descriptor.
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
    /// Creates a heap from `allocate`. That function takes a length in bytes, a multiple of the
    /// page size, and returns a dma-buf of at least that length. [`Errno::from_io_error`] converts
    /// an I/O error to an errno.
    ///
    /// # Safety
    /// The caller must guarantee the following for each descriptor that `allocate` returns, until
    /// its memory is freed:
    ///
    /// - It is a dma-buf of new memory, which shares no page with any other memory.
    /// - No duplicate, mapping or importer of it writes to that memory. The only exceptions are
    ///   holders that received the dma-buf from dmaload ([`crate::Segment::hand_out_dma_buf`]).
    /// - Its pages stay in place: none is removed, replaced, or moved while it is mapped.
    #[allow(unsafe_code, reason = "the contract above")]
    pub unsafe fn new(
        name: impl Into<String>,
        allocate: impl Fn(usize) -> Result<OwnedFd, Errno> + Send + Sync + 'static,
    ) -> Self {
        FromDescriptors { name: name.into(), allocate: Box::new(allocate), is_uncached: false }
    }

    /// Sets whether the CPU reads this memory uncached; see [`Heap::is_uncached`]. Default: false.
    #[must_use]
    pub fn uncached(mut self, is_uncached: bool) -> Self {
        self.is_uncached = is_uncached;
        self
    }
}

// SAFETY: the caller of `new` guarantees that `allocate` meets the trait's requirements for
// dma-bufs. This heap does not override `populate` or `export`, and `exports` returns true.
#[allow(unsafe_code)]
unsafe impl Heap for FromDescriptors {
    fn name(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        let fd = (self.allocate)(bytes).map_err(|errno| HeapError::new("allocate a dma-buf", bytes, errno))?;
        let dma_buf = DmaBuf::from_fd(fd).map_err(|error| HeapError::new(error.operation, bytes, error.errno))?;
        if dma_buf.bytes() < bytes {
            // `mmap(2)` returns the same errno for a length beyond the end of a dma-buf.
            return Err(HeapError::new("use a dma-buf that is too short", bytes, Errno::EINVAL));
        }
        Ok(Memory::DmaBuf(dma_buf))
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
