//! Accesses a file's page cache: counts the cached bytes, reads them without waiting for storage,
//! and writes dirty pages back.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// The system call number of `cachestat(2)`, which is the same on every architecture but alpha.
/// The libc crate defines it for only a few architectures.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` from `linux/mman.h`; a length of 0 means the whole file.
#[repr(C)]
struct CachestatRange {
    offset: u64,
    length: u64,
}

/// `struct cachestat` from `linux/mman.h`, in pages.
#[repr(C)]
#[derive(Default)]
struct Answer {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Returns how many bytes of a file are in the page cache, according to `cachestat(2)`. Counts
/// whole pages.
///
/// # Errors
/// ENOSYS before Linux 6.5; EPERM, on newer kernels, for a file that the caller neither owns nor
/// may write to; EOPNOTSUPP on hugetlbfs.
pub(crate) fn cached_bytes(file: impl AsFd) -> Result<u64, Errno> {
    cachestat(file, &CachestatRange { offset: 0, length: 0 })
}

/// Like [`cached_bytes`], but counts only pages that overlap `range`, which must not be empty.
///
/// # Errors
/// Those of [`cached_bytes`].
pub(crate) fn cached_bytes_in(file: impl AsFd, range: &Range<u64>) -> Result<u64, Errno> {
    debug_assert!(!range.is_empty(), "the range must not be empty, because a length of 0 means the whole file");
    cachestat(file, &CachestatRange { offset: range.start, length: range.end - range.start })
}

fn cachestat(file: impl AsFd, range: &CachestatRange) -> Result<u64, Errno> {
    let mut answer = Answer::default();
    // SAFETY: both pointers refer to live values with the kernel's layout, the descriptor is open
    // during the call, and the flags are 0 as required.
    let status = unsafe { libc::syscall(SYS_CACHESTAT, file.as_fd().as_raw_fd(), &raw const *range, &raw mut answer, 0_u32) };
    if status == -1 { Err(last_errno()) } else { Ok(answer.cached * dmabuf::page_bytes() as u64) }
}

/// Reads what the page cache holds at this offset, without waiting for storage (`RWF_NOWAIT`).
/// Returns fewer bytes than requested if the rest is not cached. In that case, the kernel also
/// starts readahead unless [`rustix::fs::Advice::Random`] is set.
///
/// # Errors
/// EAGAIN if nothing is cached; EOPNOTSUPP if the file system can't read without waiting (tmpfs,
/// squashfs).
pub(crate) fn read_nowait(file: impl AsFd, buffer: &mut [MaybeUninit<u8>], offset: u64) -> Result<usize, Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::INVAL)?;
    let slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    loop {
        // SAFETY: the single slice is writable memory that outlives the call, and the descriptor
        // is open during the call.
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

/// Writes back the dirty pages of a range and waits for completion. Works on a descriptor without
/// write permission.
///
/// Mapped pages are write-protected first, so the next store through a mapping faults and updates
/// the file's modification time. Without write-protection, stores into pages that are already
/// dirty do not update the time.
///
/// # Errors
/// The error of a failed write, possibly an earlier one that was never reported; ENOSYS or EPERM
/// in a sandbox.
pub(crate) fn write_back(file: impl AsFd, range: &Range<u64>) -> Result<(), Errno> {
    let number = |number: u64| i64::try_from(number).map_err(|_| Errno::INVAL);
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let (offset, bytes) = (number(range.start)?, number(range.end - range.start)?);
    // SAFETY: no memory is passed, and the descriptor is open during the call.
    let status = unsafe { libc::sync_file_range(file.as_fd().as_raw_fd(), offset, bytes, flags) };
    if status == -1 { Err(last_errno()) } else { Ok(()) }
}

fn last_errno() -> Errno {
    let error = std::io::Error::last_os_error();
    Errno::from_io_error(&error).unwrap_or(Errno::NOSYS)
}
