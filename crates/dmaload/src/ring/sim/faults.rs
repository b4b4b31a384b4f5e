//! The faults of the simulated kernel: operations that it refuses, cuts short, fails or never
//! completes. For the faults of individual files, see [`super::disk::FileFaults`].

use rustix::io::Errno;

/// The faults of one world. Operations with a fault are chosen at random.
#[derive(Debug, Clone)]
pub(super) struct Faults {
    /// The error with which setting up io_uring fails, if it does.
    pub(super) ring: Option<Errno>,
    /// The error with which registrations are refused, if any are.
    pub(super) register: Option<Errno>,
    /// How many registrations in a thousand are refused with `register`.
    pub(super) register_per_mille: u64,
    /// How many reads in a thousand return fewer bytes than the file has.
    pub(super) short_per_mille: u64,
    /// How many reads in a thousand fail with `EINTR` or `EAGAIN`.
    pub(super) interrupted_per_mille: u64,
    /// How many reads in a thousand fail as if another read of the same file, also in flight, had
    /// hit a bad block.
    pub(super) collateral_per_mille: u64,
    /// How many submissions in a thousand fail, after the kernel has accepted none, some or all of
    /// the queue.
    pub(super) breaks_per_mille: u64,
    /// How many reads in a thousand return no bytes even though the file has not ended.
    pub(super) nothing_per_mille: u64,
    /// How many reads in a thousand never complete.
    pub(super) hangs_per_mille: u64,
    /// How many buffers can be registered at once.
    pub(super) buffer_slots: u16,
    /// Whether the heap's memory can't be pinned, either by registration or by a direct read.
    pub(super) unpinnable: bool,
    /// Whether no thread can be started for copies. If so, nothing is copied from the page cache.
    pub(super) no_threads: bool,
    /// How many staging buffers can be allocated.
    pub(super) staging: usize,
    /// How many batches in a thousand can't be populated when they are filled. Has no effect on
    /// batches that are already populated.
    pub(super) no_memory_per_mille: u64,
    /// How many copies in a thousand from the page cache find that their chunk has been evicted,
    /// completely or in part.
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
