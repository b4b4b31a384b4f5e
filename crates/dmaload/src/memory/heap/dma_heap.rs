//! dma-heaps: memory from the devices in `/dev/dma_heap`.

use std::borrow::Cow;
use std::os::fd::OwnedFd;

use rustix::fs::OFlags;

use super::{Heap, HeapError, Memory, private};
use crate::error::Result;

/// A dma-heap on this machine: `system`, a CMA region, or one that the vendor provides.
///
/// The kernel can't pin mappings of its own system heap, so reads from storage go through staging
/// buffers ([`crate::Route::Bounce`]). If the mappings of another heap can be pinned, reads go
/// straight into them. The first load finds out by trying.
#[derive(Debug)]
pub struct DmaHeap {
    device: dmabuf::DmaHeap,
    name: String,
    flags: u64,
}

impl DmaHeap {
    /// Opens the heap called `name`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if the heap can't be opened.
    pub fn open(name: &str) -> Result<Self> {
        Ok(Self::with(dmabuf::DmaHeap::open(name)?))
    }

    /// Wraps an open heap device, for processes that may not open it themselves.
    ///
    /// # Errors
    /// Those of [`DmaHeap::open`].
    pub fn from_fd(device: OwnedFd) -> Result<Self> {
        Ok(Self::with(dmabuf::DmaHeap::from_fd(device)?))
    }

    fn with(device: dmabuf::DmaHeap) -> Self {
        let name = format!("dma-heap:{}", device.name());
        DmaHeap { device, name, flags: 0 }
    }

    /// Sets flags for allocations (`heap_flags` in `linux/dma-heap.h`). The kernel's own heaps
    /// refuse all flags; a vendor's heap may accept some.
    #[must_use]
    pub fn flags(mut self, flags: u64) -> Self {
        self.flags = flags;
        self
    }
}

// SAFETY: the kernel's heaps return new memory for each call, and that memory keeps its pages. The
// returned value holds its only descriptor. This heap does not override `populate` or `export`,
// and `exports` returns true. (A vendor's driver is trusted like the kernel.)
#[allow(unsafe_code)]
unsafe impl Heap for DmaHeap {
    fn name(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        let fd_flags = OFlags::RDWR | OFlags::CLOEXEC;
        self.device.allocate_with(bytes, fd_flags.bits(), self.flags).map(Memory::DmaBuf)
    }

    fn exports(&self) -> bool {
        true
    }

    fn allocates_at_once(&self) -> bool {
        true
    }

    /// Decides based on the heap's name, because user space has no other way to find out. Vendors
    /// give heaps of uncached memory names like `system-uncached` and `mtk_mm-uncached`.
    fn is_uncached(&self) -> bool {
        self.name.contains("uncached")
    }

    fn is_own(&self, _: private::Key) -> bool {
        true
    }
}
