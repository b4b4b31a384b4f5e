//! Safe, typed access to the Linux kernel's shareable memory.
//!
//! ```text
//!   AddressRange   one reserved (PROT_NONE) range of addresses, aligned to 2 MiB
//!    └─ Mapping    a part of the range, backed by a Memory: a memfd, a dma-buf or private pages
//!        └─ populate()   allocates and maps its pages, by default 2 MiB pages where possible
//!   PrivateMapping  parts of memfds, mapped copy-on-write
//!
//!   Udmabuf ── create(memfd) ──┐
//!   DmaHeap ── allocate ───────┴─► DmaBuf   what drivers and other processes import
//! ```
//!
//! This crate creates, maps, populates and seals memory. It uses neither io_uring nor async code.
//! The caller decides who may write to a [`Mapping`] and when its bytes may be read, so a
//! mapping provides its address rather than a slice.
//!
//! Requires Linux 3.17 or later (`memfd_create`). Newer features are tried at run time; without
//! them, a call falls back or returns the kernel's error.

#[cfg(not(target_os = "linux"))]
compile_error!("dmabuf requires Linux: other systems have no dma-heaps and no udmabuf");

mod address;
mod device;
mod dma_buf;
mod dma_heap;
mod errno;
mod error;
mod limits;
mod memfd;
mod open;
mod pages;
mod populate;
pub mod printable;
mod private;
mod udmabuf;

pub use address::{AddressRange, Mapping, NotMoved};
pub use device::Device;
pub use dma_buf::{Access, CpuAccess, DmaBuf};
pub use dma_heap::DmaHeap;
pub use errno::Errno;
pub use error::Error;
pub use limits::Limit;
pub use memfd::Memfd;
pub use open::DeviceError;
pub use pages::{HUGE_PAGE_BYTES, PageCount, count_pages, huge_bytes_in, page_bytes};
pub use populate::{Pages, Populated};
pub use private::PrivateMapping;
pub use udmabuf::{Part, Udmabuf, UdmabufLimits};

/// What backs a [`Mapping`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Memory {
    /// A memfd, sealed against shrinking. Other processes can map its descriptor.
    Memfd(Memfd),
    /// Private memory of this process, without a descriptor.
    Anonymous,
    /// A dma-buf. [`Mapping::populate`] does nothing for it: its exporter is expected to have
    /// allocated all pages, as udmabuf and the kernel's dma-heaps do when they create a dma-buf.
    DmaBuf(DmaBuf),
}

impl Memory {
    /// Returns the memfd if this memory is one.
    pub fn memfd(&self) -> Option<&Memfd> {
        match self {
            Memory::Memfd(memfd) => Some(memfd),
            Memory::Anonymous | Memory::DmaBuf(_) => None,
        }
    }

    /// Returns the dma-buf if this memory is one.
    pub fn dma_buf(&self) -> Option<&DmaBuf> {
        match self {
            Memory::DmaBuf(dma_buf) => Some(dma_buf),
            Memory::Anonymous | Memory::Memfd(_) => None,
        }
    }

    /// Returns whether the memory has no descriptor, which means that other processes cannot map
    /// it.
    pub fn is_private(&self) -> bool {
        matches!(self, Memory::Anonymous)
    }

    /// Returns how many bytes can be mapped, rounded up to whole pages. Returns `None` for private
    /// memory, whose size is not limited.
    pub fn bytes(&self) -> Option<usize> {
        match self {
            Memory::Memfd(memfd) => Some(memfd.bytes().next_multiple_of(page_bytes())),
            Memory::DmaBuf(dma_buf) => Some(dma_buf.bytes()),
            Memory::Anonymous => None,
        }
    }
}
