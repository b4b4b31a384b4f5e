//! Probes which io_uring features are allowed here, on a ring like the engine's.

use dmabuf::{Errno, Pages};

use super::{Ring, StagingMemory, WAYS, build};
use crate::memory::buffer::Buffer;
use crate::ring::wake::Wake;
use crate::support::errno;

/// The largest registration that is tried. Each piece is registered separately, and by default no
/// piece is larger ([`BATCH_BYTES`](crate::plan::BATCH_BYTES)).
pub(crate) const REGISTER_BYTES_MAX: usize = 16 << 20;

/// The smallest registration that is tried. Larger ones are multiples of it.
pub(crate) const REGISTER_BYTES_MIN: usize = 64 << 10;

/// Which io_uring features this process is allowed to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoUring {
    /// Setting up a ring and entering it. If this is refused, so are all other features.
    pub setup: Result<(), Errno>,
    /// `SINGLE_ISSUER` with `DEFER_TASKRUN`: completions are processed on request, instead of
    /// interrupting the ring thread.
    pub deferred_task_run: Result<(), Errno>,
    /// A sparse table of registered buffers, required for
    /// [`Route::UringFixedDirect`](crate::Route::UringFixedDirect).
    pub buffer_table: Result<(), Errno>,
    /// A sparse table of registered files, which saves a lookup for each read.
    pub file_table: Result<(), Errno>,
    /// Registering 16 MiB, which is the most that a load registers at once by default. ENOMEM
    /// means that the locked-memory limit (`RLIMIT_MEMLOCK`) is too low.
    pub register: Result<(), Errno>,
    /// The largest multiple of 64 KiB, up to 16 MiB, that could be registered; 0 if none.
    pub registrable_bytes: u64,
}

impl IoUring {
    pub(crate) fn refused(errno: Errno) -> Self {
        let refused = Err(errno);
        IoUring {
            setup: refused,
            deferred_task_run: refused,
            buffer_table: refused,
            file_table: refused,
            register: refused,
            registrable_bytes: 0,
        }
    }
}

/// Tries the features that the engine would use, on a ring like the engine's.
pub(crate) fn probe() -> rustix::io::Result<IoUring> {
    let wake = Wake::new()?;
    let mut ring = Ring::new(1, &wake)?;
    let (registrable_bytes, register) = largest_registrable(&mut ring);
    Ok(IoUring {
        setup: Ok(()),
        deferred_task_run: build(WAYS[0], 8).map(drop).map_err(errno::from_rustix),
        buffer_table: ring.buffers.map_err(errno::from_rustix),
        file_table: ring.files.refused.map_or(Ok(()), |errno| Err(errno::from_rustix(errno))),
        register,
        registrable_bytes,
    })
}

/// Returns how many bytes can be registered at once, rounded down to a multiple of
/// [`REGISTER_BYTES_MIN`], and the result of registering [`REGISTER_BYTES_MAX`].
fn largest_registrable(ring: &mut Ring) -> (u64, Result<(), Errno>) {
    if let Err(errno) = ring.buffers {
        return (0, Err(errno::from_rustix(errno)));
    }
    // Use small pages, because a huge page counts in full towards the locked-memory limit even if
    // only a part of it is registered.
    let memory = match StagingMemory::new(REGISTER_BYTES_MAX, Pages::Small) {
        Ok(memory) => memory,
        Err(error) => return (0, Err(error.errno)),
    };
    let mut register = |bytes: usize| {
        ring.update_buffer(0, memory.address().as_ptr(), bytes).map_err(errno::from_rustix)?;
        // A failure is ignored, as in `unregister_buffer`: closing the ring also unregisters the
        // memory.
        let _ = ring.update_buffer(0, std::ptr::null_mut(), 0);
        Ok(())
    };
    let whole = register(REGISTER_BYTES_MAX);
    if whole.is_ok() {
        return (REGISTER_BYTES_MAX as u64, whole);
    }
    // The largest size known to succeed, and the smallest known to fail, in multiples of
    // `REGISTER_BYTES_MIN`.
    let (mut possible, mut impossible) = (0, REGISTER_BYTES_MAX / REGISTER_BYTES_MIN);
    while possible + 1 < impossible {
        let middle = possible.midpoint(impossible);
        if register(middle * REGISTER_BYTES_MIN).is_ok() { possible = middle } else { impossible = middle }
    }
    ((possible * REGISTER_BYTES_MIN) as u64, whole)
}
