//! The kernel's shareable memory objects, typed and safe.
//!
//! ```text
//!   AddressRange   one reserved (PROT_NONE) range of addresses, aligned to 2 MiB
//!    └─ Mapping    a part of it, backed by a Memory: a memfd or private pages
//!        └─ populate()   pages put under it, of 2 MiB where they can be had
//!
//!   Udmabuf ── create(memfd) ──┐
//!   DmaHeap ── allocate ───────┴─► DmaBuf   what drivers and other processes import
//! ```
//!
//! This crate knows nothing of io_uring or of async code: it creates, maps, populates and seals. Who may
//! write into a [`Mapping`], and when its bytes may be looked at, is for the caller to know; that is why
//! everything that hands out bytes here is `unsafe`.
//!
//! Needs Linux 3.17 (`memfd_create`); each newer feature is tried, and done without where it is refused.

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
pub use udmabuf::{Part, Udmabuf, UdmabufLimits};

/// What stands behind a [`Mapping`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Memory {
    /// A sealed memory file: it has a file descriptor that other processes can map.
    Memfd(Memfd),
    /// Private memory of this process, without a file descriptor.
    Anonymous,
    /// A dma-buf of a dma-heap, whose pages are all there from the start.
    DmaBuf(DmaBuf),
}

impl Memory {
    /// The memory file, if it is one.
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

    /// Whether nobody but this process, and those forked from it, can have it.
    pub fn is_private(&self) -> bool {
        matches!(self, Memory::Anonymous)
    }

    /// How much can be mapped of it: whole pages; `None` where there is no end.
    pub fn bytes(&self) -> Option<usize> {
        match self {
            Memory::Memfd(memfd) => Some(memfd.bytes().next_multiple_of(page_bytes())),
            Memory::DmaBuf(dma_buf) => Some(dma_buf.bytes()),
            Memory::Anonymous => None,
        }
    }
}
