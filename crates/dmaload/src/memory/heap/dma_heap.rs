//! dma-heaps: memory of devices under `/dev/dma_heap`.

use std::borrow::Cow;
use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::fs::OFlags;

use super::{Heap, HeapError, Mapping, Memory, Pages, Populated, private};
use crate::error::Result;

/// A dma-heap of this machine: `system`, a CMA region, or what the vendor offers.
///
/// The kernel's own system heap gives mappings that can't be pinned, so reads are bounced ([`crate::Route::Bounce`]); where a
/// mapping can be pinned, they go straight into it. Which it is, the first load finds out.
#[derive(Debug)]
pub struct DmaHeap {
    device: dmabuf::DmaHeap,
    name: String,
    flags: u64,
}

impl DmaHeap {
    /// Opens the heap of this name.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub fn open(name: &str) -> Result<Self> {
        Ok(Self::with(dmabuf::DmaHeap::open(name)?))
    }

    /// Takes a heap that is open already: for a process that has no right to open it.
    ///
    /// # Errors
    /// As [`DmaHeap::open`].
    pub fn from_fd(device: OwnedFd) -> Result<Self> {
        Ok(Self::with(dmabuf::DmaHeap::from_fd(device)?))
    }

    fn with(device: dmabuf::DmaHeap) -> Self {
        let name = format!("dma-heap:{}", device.name());
        DmaHeap { device, name, flags: 0 }
    }

    /// Flags for its allocations (`heap_flags` of linux/dma-heap.h). The kernel's own heaps know none, and refuse them; a vendor's may.
    #[must_use]
    pub fn flags(mut self, flags: u64) -> Self {
        self.flags = flags;
        self
    }
}

// SAFETY: the kernel's heaps give new memory with each call, and its one descriptor is in the returned value.
// Nothing is populated or exported here. (A vendor's driver is trusted as the kernel is.)
#[allow(unsafe_code)]
unsafe impl Heap for DmaHeap {
    fn name(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        let fd_flags = OFlags::RDWR | OFlags::CLOEXEC;
        self.device.allocate_with(bytes, fd_flags.bits(), self.flags).map(Memory::DmaBuf)
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

    /// By its name, which is all that user space can see: vendors' heaps of such memory are called `system-uncached`,
    /// `mtk_mm-uncached`, and the like.
    fn is_uncached(&self) -> bool {
        self.name.contains("uncached")
    }

    fn is_own(&self, _: private::Key) -> bool {
        true
    }
}
