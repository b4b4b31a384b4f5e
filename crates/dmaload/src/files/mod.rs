//! What is on disk: opening and identifying files ([`source`]), which file systems may be read by
//! a ring or from the page cache ([`file_system`], [`block_device`], [`residency`]), and which
//! files a path stands for: [`expand`] turns folders, indices and split files into files,
//! [`header`] reads the files' headers, and [`whole`] checks that they form complete models.
//!
//! The only folder that opens files by path. Each call may wait for a server that does not answer,
//! so only workers and the threads of [`inspect`](crate::inspect()) make them. Requires `O_DIRECT`
//! and `statx(2)` for direct reads, and procfs to reopen a file by its descriptor; without these,
//! it reports why and the load takes another route. A file is closed with the last clone of its
//! [`OpenFile`](source::OpenFile).

mod block_device;
pub(crate) mod expand;
pub(crate) mod file_system;
mod folder;
pub(crate) mod header;
mod index;
mod missing;
mod names;
pub(crate) mod residency;
pub(crate) mod source;
pub(crate) mod whole;
