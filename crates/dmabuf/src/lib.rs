//! The kernel's shareable memory objects, typed and safe.
//!
//! ```text
//!   AddressRange   one reserved (PROT_NONE) range of addresses, aligned to 2 MiB
//!    └─ Mapping    a part of it, backed by a Memory: a memfd or private pages
//!        └─ populate()   pages put under it, of 2 MiB where they can be had
//! ```
//!
//! This crate knows nothing of io_uring or of async code: it creates, maps, populates and seals. Who may
//! write into a [`Mapping`], and when its bytes may be looked at, is for the caller to know; that is why
//! everything that hands out bytes here is `unsafe`.
//!
//! Needs Linux 3.17 (`memfd_create`); each newer feature is tried, and done without where it is refused.

mod address;
pub mod errno;
mod error;
mod memfd;
mod pages;
mod populate;

pub use address::{AddressRange, Mapping};
pub use error::Error;
pub use memfd::Memfd;
pub use pages::{HUGE_PAGE_BYTES, PageCount, huge_bytes_in, page_bytes};
pub use populate::{Pages, Populated};

/// What stands behind a [`Mapping`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Memory {
    /// A sealed memory file: it has a file descriptor that other processes can map.
    Memfd(Memfd),
    /// Private memory of this process, without a file descriptor.
    Anonymous,
}

impl Memory {
    /// The memory file, if it is one.
    pub fn memfd(&self) -> Option<&Memfd> {
        match self {
            Memory::Memfd(memfd) => Some(memfd),
            Memory::Anonymous => None,
        }
    }
}
