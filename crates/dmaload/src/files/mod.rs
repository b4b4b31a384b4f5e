//! What is on disk: opening files and saying what they are ([`source`]), which file systems may be
//! read by a ring or from the page cache ([`file_system`], [`block_device`], [`residency`]), and
//! which files a path means: [`expand`] takes folders, indices and split files to files,
//! [`header`] reads what they say of themselves, and [`whole`] says whether they are whole
//! models.
//!
//! The only folder that opens files by their paths. Each call may wait for a server that does not
//! answer, so only workers make them, and the threads of [`inspect`](crate::inspect()). It needs
//! `O_DIRECT` and `statx(2)` for direct reads, and procfs to open a file again by its descriptor;
//! without these it says why, and the load takes another route. A file is closed with the last
//! clone of its [`OpenFile`](source::OpenFile).

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
