//! Finds out which of the features that loads use are available on this machine. This is for tools
//! that diagnose problems, such as `dmaload doctor`.
//!
//! Each function tries or measures something in the same way as a load would, and leaves nothing
//! behind. The functions don't compare versions or look for causes: that is left to the caller,
//! who knows about sysctls and containers.

use std::path::Path;

use std::os::fd::AsFd;

use dmabuf::Errno;
use rustix::io::pread;

use crate::engine::ways;
use crate::error::Result;
use crate::files::source::OpenFile;
use crate::memory::headroom::headroom;
use crate::plan::BATCH_BYTES;
use crate::ring::can_read_buffered;
pub use crate::ring::probe::IoUring;
#[cfg(test)]
use crate::ring::probe::{REGISTER_BYTES_MAX, REGISTER_BYTES_MIN};
use crate::route::{Attempt, Route, is_refusal};
use crate::support::convert::to_usize;
use crate::support::errno;

/// Tries the io_uring features that a load uses.
pub fn io_uring() -> IoUring {
    crate::ring::probe::probe().unwrap_or_else(|errno| IoUring::refused(errno::from_rustix(errno)))
}

/// What a load can do with a file. Returned by [`file()`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct File {
    /// The file's length.
    pub bytes: u64,
    /// The alignment that direct reads need.
    pub alignment_bytes: u64,
    /// The result of opening the file with `O_DIRECT`.
    pub open_direct: Result<(), Errno>,
    /// The result of reading the first block: the number of bytes read, or the error. The read
    /// uses `O_DIRECT` if opening the file that way succeeded, and otherwise the page cache.
    pub first_read: Result<u64, Errno>,
    /// Why a load reads the file with threads rather than directly with io_uring: an attempt such
    /// as [`Attempt::RingOnFuse`], and the errno that a load reports (see [`Attempt::hint`]).
    /// `None` if io_uring may read the file.
    pub ring_refused: Option<(Attempt, Errno)>,
    /// Whether io_uring may read the file through the page cache even though it must not read it
    /// directly. If so, a load that measures which way of reading is fastest also measures this
    /// one ([`crate::Way::Buffered`]), unless the load is strict.
    pub buffered_by_ring: bool,
    /// Whether direct reads are copies from memory (tmpfs, DAX). If so, a load reads with threads
    /// ([`Route::PreadDirect`]), which are faster than io_uring for such files.
    pub in_memory: bool,
}

/// The size in bytes of the smallest load that measures which way of reading is fastest. Loads
/// that set [`crate::LoadOptions::route`] or [`crate::Prefer::Cpu`] never measure.
pub const MEASURED_BYTES_MIN: u64 = ways::MEASURED_BYTES_MIN;

/// The usual maximum size in bytes of a piece, the unit in which a load registers and fills
/// memory. Pieces are larger if the heap allocates whole segments at once, and in loads of several
/// TiB.
pub const PIECE_BYTES_MAX: u64 = BATCH_BYTES;

impl File {
    /// Returns why a load would read the file through the page cache ([`Route::Buffered`]), or
    /// `None` if direct reads work.
    pub fn direct_refused(&self) -> Option<Errno> {
        self.open_direct.err().or(self.first_read.err().filter(|&errno| is_refusal(errno)))
    }

    /// Returns why a load of the file would fail on every route, or `None` if the file can be
    /// read.
    pub fn unreadable(&self) -> Option<Errno> {
        self.first_read.err().filter(|&errno| self.open_direct.is_err() || !is_refusal(errno))
    }
}

/// Opens a regular file as a load does, and reads its first block.
///
/// # Errors
/// [`crate::Error::File`] if it can't be opened; [`crate::Error::NotAFile`] if it is not a regular
/// file; [`crate::Error::NoLength`] if it has contents even though its reported length is 0;
/// [`crate::Error::Read`] if its reported length is 0 and it can't be read.
pub fn file(path: impl AsRef<Path>) -> Result<File> {
    let file = OpenFile::open(path.as_ref())?;
    let block = to_usize(file.alignment_bytes);
    let open_direct = file.direct_refused().map_or(Ok(()), |errno| Err(errno::from_rustix(errno)));
    // A buffer of two blocks always contains an aligned block.
    let mut memory = vec![0; 2 * block];
    let start = memory.as_ptr().align_offset(block);
    let block = &mut memory[start..start + block];
    let route = if open_direct.is_ok() { Route::PreadDirect } else { Route::Buffered };
    let first_read = loop {
        match pread(file.descriptor(route), &mut *block, 0) {
            Err(rustix::io::Errno::INTR) => {}
            read => break read.map(|bytes| bytes as u64).map_err(errno::from_rustix),
        }
    };
    Ok(File {
        bytes: file.identity.bytes,
        alignment_bytes: file.alignment_bytes,
        open_direct,
        first_read,
        ring_refused: file.ring_refused.map(|(attempt, errno)| (attempt, errno::from_rustix(errno))),
        buffered_by_ring: file.ring_refused.is_some()
            && file.ring_refused_to(Route::UringBuffered).is_none()
            && can_read_buffered(),
        in_memory: file.in_memory,
    })
}

/// Returns how many bytes of an open file are in the page cache, in whole pages, according to
/// `cachestat(2)`.
///
/// # Errors
/// ENOSYS before Linux 6.5. On newer kernels, EPERM if the caller neither owns the file nor may
/// write to it. EOPNOTSUPP for files that `cachestat(2)` does not support.
pub fn cached_bytes(file: impl AsFd) -> Result<u64, Errno> {
    crate::files::residency::cached_bytes(file).map_err(errno::from_rustix)
}

/// How much memory can be allocated before the OOM killer kills a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryAvailable {
    /// The number of bytes.
    pub bytes: u64,
    /// What sets the limit: the machine's memory, or one of this process's memory cgroups.
    pub limit: String,
}

/// Returns how much memory a load can allocate now, or `None` if that is unknown because there is
/// no procfs.
pub fn memory_available() -> Option<MemoryAvailable> {
    headroom().map(|headroom| MemoryAvailable { bytes: headroom.available_bytes, limit: headroom.limit })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn working_ring_registers_memory_or_reports_the_error() {
        let found = io_uring();
        if let Err(errno) = found.setup {
            assert_eq!(found, IoUring::refused(errno));
        } else {
            assert_eq!(found.register.is_ok(), found.registrable_bytes == REGISTER_BYTES_MAX as u64, "{found:?}");
            assert!(found.registrable_bytes.is_multiple_of(REGISTER_BYTES_MIN as u64), "{found:?}");
        }
        // Nothing stays registered, so a second probe has the same result.
        assert_eq!(io_uring(), found);
    }

    #[test]
    fn first_block_is_read_and_counted() {
        let folder = tempfile::tempdir().unwrap();
        for (bytes, expected) in [(0, 0), (777, 777), (4096, 4096), (100_000, 4096)] {
            let path = folder.path().join("file");
            std::fs::write(&path, vec![1; bytes]).unwrap();
            let found = file(&path).unwrap();
            assert_eq!(found.bytes, bytes as u64);
            if found.alignment_bytes == 4096 && found.direct_refused().is_none() {
                assert_eq!(found.first_read, Ok(expected), "{bytes} bytes");
            }
            assert_eq!(found.unreadable(), None);
        }
        assert!(matches!(file(folder.path()), Err(Error::NotAFile { .. })));
        assert!(matches!(file(folder.path().join("missing")), Err(Error::File { errno: Errno::ENOENT, .. })));
    }

    #[test]
    fn refusals_and_medium_errors_are_told_apart() {
        let file = |open_direct, first_read| File {
            bytes: 1,
            alignment_bytes: 4096,
            open_direct,
            first_read,
            ring_refused: None,
            buffered_by_ring: false,
            in_memory: false,
        };
        let verdict = |file: File| (file.direct_refused(), file.unreadable());
        assert_eq!(verdict(file(Ok(()), Ok(1))), (None, None));
        assert_eq!(verdict(file(Err(Errno::EINVAL), Ok(1))), (Some(Errno::EINVAL), None));
        assert_eq!(verdict(file(Ok(()), Err(Errno::EINVAL))), (Some(Errno::EINVAL), None));
        assert_eq!(verdict(file(Ok(()), Err(Errno::EIO))), (None, Some(Errno::EIO)));
        assert_eq!(verdict(file(Err(Errno::EINVAL), Err(Errno::EPERM))), (Some(Errno::EINVAL), Some(Errno::EPERM)));
    }
}
