//! What the page cache has of a file: how much of a range, its bytes without waiting for storage, and writing it back.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// The same number on every architecture but alpha; the libc crate has it for a few of them only.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of `linux/mman.h`; a length of 0 is all of the file.
#[repr(C)]
struct CachestatRange {
    offset: u64,
    length: u64,
}

/// `struct cachestat` of `linux/mman.h`, in pages.
#[repr(C)]
#[derive(Default)]
struct Answer {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// How many bytes of a file are in the page cache, in whole pages, by `cachestat(2)`.
///
/// # Errors
/// ENOSYS before Linux 6.5; EPERM, on newer kernels, for a file that the caller neither owns nor may write; EOPNOTSUPP for files
/// without a page cache of that kind.
pub(crate) fn cached_bytes(file: impl AsFd) -> Result<u64, Errno> {
    cachestat(file, &CachestatRange { offset: 0, length: 0 })
}

/// How many bytes of the pages that a range touches are in the page cache. The range must not be empty.
///
/// # Errors
/// Those of [`cached_bytes`].
pub(crate) fn cached_bytes_in(file: impl AsFd, range: &Range<u64>) -> Result<u64, Errno> {
    debug_assert!(!range.is_empty(), "a length of 0 would mean all of the file");
    cachestat(file, &CachestatRange { offset: range.start, length: range.end - range.start })
}

fn cachestat(file: impl AsFd, range: &CachestatRange) -> Result<u64, Errno> {
    let mut answer = Answer::default();
    // SAFETY: both pointers are to live values with the kernel's layout, the descriptor is open for the whole call, and flags
    // must be 0.
    let status = unsafe { libc::syscall(SYS_CACHESTAT, file.as_fd().as_raw_fd(), &raw const *range, &raw mut answer, 0_u32) };
    if status == -1 { Err(last_errno()) } else { Ok(answer.cached * dmabuf::page_bytes() as u64) }
}

/// Reads what the page cache has at this offset, without waiting for storage (`RWF_NOWAIT`). Fewer bytes than asked for when the
/// rest isn't there, which starts to read it ahead unless [`rustix::fs::Advice::Random`] was given.
///
/// # Errors
/// EAGAIN when nothing is there; EOPNOTSUPP where the file system can't read without waiting (tmpfs, squashfs).
pub(crate) fn read_nowait(file: impl AsFd, buffer: &mut [MaybeUninit<u8>], offset: u64) -> Result<usize, Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::INVAL)?;
    let slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    loop {
        // SAFETY: the one slice is writable memory that outlives the call, and the descriptor is open for the whole call.
        let read = unsafe { libc::preadv2(file.as_fd().as_raw_fd(), &raw const slice, 1, offset, libc::RWF_NOWAIT) };
        match usize::try_from(read) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => match last_errno() {
                Errno::INTR => {}
                errno => return Err(errno),
            },
        }
    }
}

/// Writes the dirty pages of a range back, and waits for that. A descriptor without the right to write will do.
///
/// Pages that are mapped are write-protected first, so the next store through a mapping faults, and changes the file's time of
/// modification. Stores into pages that are dirty already do not.
///
/// # Errors
/// That of a write that failed, which may be an earlier one that nobody was told of; ENOSYS or EPERM in a sandbox.
pub(crate) fn write_back(file: impl AsFd, range: &Range<u64>) -> Result<(), Errno> {
    let number = |number: u64| i64::try_from(number).map_err(|_| Errno::INVAL);
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let (offset, bytes) = (number(range.start)?, number(range.end - range.start)?);
    // SAFETY: no memory is passed, and the descriptor is open for the whole call.
    let status = unsafe { libc::sync_file_range(file.as_fd().as_raw_fd(), offset, bytes, flags) };
    if status == -1 { Err(last_errno()) } else { Ok(()) }
}

fn last_errno() -> Errno {
    let error = std::io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::NOSYS)
}
