//! The faults of the simulated kernel: operations that it refuses, cuts short, fails or never
//! completes. For faults of single files, see [`super::disk::FileFaults`].

use rustix::io::Errno;

/// The faults of one world. Each rate is per thousand operations of the kind that its comment
/// describes.
#[derive(Debug, Clone)]
pub(super) struct Faults {
    /// The error of setting up io_uring.
    pub(super) ring: Option<Errno>,
    /// The error of refused registrations.
    pub(super) register: Option<Errno>,
    /// Registrations refused with `register`.
    pub(super) register_per_mille: u64,
    /// Reads that return fewer bytes than the file has.
    pub(super) short_per_mille: u64,
    /// Reads that fail with `EINTR` or `EAGAIN`.
    pub(super) interrupted_per_mille: u64,
    /// Reads that fail as if another read of the same file, also in flight, had hit a bad block.
    pub(super) collateral_per_mille: u64,
    /// Submissions that fail after the kernel accepted none, some or all of the queue.
    pub(super) breaks_per_mille: u64,
    /// Reads that return no bytes although the file has not ended.
    pub(super) nothing_per_mille: u64,
    /// Reads that never complete.
    pub(super) hangs_per_mille: u64,
    /// How many buffers can be registered at once.
    pub(super) buffer_slots: u16,
    /// Whether the heap's memory can be pinned neither by registration nor by a direct read.
    pub(super) unpinnable: bool,
    /// Whether no thread can be started for copies. Nothing is copied from the page cache then.
    pub(super) no_threads: bool,
    /// How many staging buffers can be allocated.
    pub(super) staging: usize,
    /// Batches that can't be populated when they are filled. Has no effect on batches that are
    /// already populated.
    pub(super) no_memory_per_mille: u64,
    /// Copies from the page cache whose chunk was evicted in the meantime, completely or in part.
    pub(super) evicted_per_mille: u64,
}

impl Faults {
    pub(super) fn none() -> Self {
        Faults {
            ring: None,
            register: None,
            register_per_mille: 0,
            short_per_mille: 0,
            interrupted_per_mille: 0,
            collateral_per_mille: 0,
            breaks_per_mille: 0,
            nothing_per_mille: 0,
            hangs_per_mille: 0,
            buffer_slots: 16,
            unpinnable: false,
            no_threads: false,
            staging: usize::MAX,
            no_memory_per_mille: 0,
            evicted_per_mille: 0,
        }
    }
}
