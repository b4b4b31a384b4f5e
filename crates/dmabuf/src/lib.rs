//! The kernel's shareable memory objects, typed and safe.
//!
//! ```text
//!   AddressRange   one reserved (PROT_NONE) range of addresses, aligned to 2 MiB
//!    └─ Mapping    a part of it, backed by a Memory: a memfd, a dma-buf or private pages
//!        └─ populate()   puts pages under it, of 2 MiB where possible
//!   PrivateMapping  parts of memory files, writable and copied on write
//!
//!   Udmabuf ── create(memfd) ──┐
//!   DmaHeap ── allocate ───────┴─► DmaBuf   what drivers and other processes import
//! ```
//!
//! This crate creates, maps, populates and seals memory; it knows nothing about io_uring or async
//! code. Who may write to a [`Mapping`], and when its bytes may be read, is up to the caller, so
//! the crate hands out addresses rather than slices.
//!
//! Requires Linux 3.17 (`memfd_create`). Each newer feature is tried, and done without if the
//! kernel refuses it.

#[cfg(not(target_os = "linux"))]
compile_error!("dmabuf requires Linux: dma-heaps, udmabuf and memfds exist nowhere else");

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
    /// A sealed memfd, whose descriptor other processes can map.
    Memfd(Memfd),
    /// Private memory of this process, without a descriptor.
    Anonymous,
    /// A dma-buf of a dma-heap, whose pages are all present from the start.
    DmaBuf(DmaBuf),
}

impl Memory {
    /// The memfd, if it is one.
    pub fn memfd(&self) -> Option<&Memfd> {
        match self {
            Memory::Memfd(memfd) => Some(memfd),
            Memory::Anonymous | Memory::DmaBuf(_) => None,
        }
    }

    /// The dma-buf, if it is one.
    pub fn dma_buf(&self) -> Option<&DmaBuf> {
        match self {
            Memory::DmaBuf(dma_buf) => Some(dma_buf),
            Memory::Anonymous | Memory::Memfd(_) => None,
        }
    }

    /// Whether the memory is visible only to this process and its forks.
    pub fn is_private(&self) -> bool {
        matches!(self, Memory::Anonymous)
    }

    /// How many bytes can be mapped, in whole pages; `None` if unlimited.
    pub fn bytes(&self) -> Option<usize> {
        match self {
            Memory::Memfd(memfd) => Some(memfd.bytes().next_multiple_of(page_bytes())),
            Memory::DmaBuf(dma_buf) => Some(dma_buf.bytes()),
            Memory::Anonymous => None,
        }
    }
}
