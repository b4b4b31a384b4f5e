//! Files on disk. [`source`] opens and identifies them. [`file_system`] and [`block_device`]
//! decide which of them may be read by a ring or copied from the page cache, and [`residency`]
//! finds out what is cached. [`expand`] turns folders, indices and split models into lists of
//! files, [`header`] reads the files' headers, and [`whole`] checks that the files form complete
//! models.
//!
//! Only this module and its submodules open model files by path. Each attempt may wait for a
//! server that does not respond, so the ring thread never opens files. Only workers and the
//! threads that inspect, probe or observe files open them. A file is closed when the last
//! reference to its [`OpenFile`](source::OpenFile) is dropped.
//!
//! If `O_DIRECT` is refused, the load takes another route. If `statx(2)` is refused, attributes
//! may be stale, and nothing is copied from the page cache. Without procfs, a file is reopened by
//! its path rather than by its descriptor.

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
