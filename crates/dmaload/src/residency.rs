//! How much of a file is in the page cache.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// The same number on every architecture but alpha; the libc crate has it for a few of them only.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of `linux/mman.h`; a length of 0 is all of the file.
#[repr(C)]
struct Range {
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
    let whole_file = Range { offset: 0, length: 0 };
    let mut answer = Answer::default();
    // SAFETY: both pointers are to live values with the kernel's layout, the descriptor is open for the whole call, and flags
    // must be 0.
    let status = unsafe { libc::syscall(SYS_CACHESTAT, file.as_fd().as_raw_fd(), &raw const whole_file, &raw mut answer, 0_u32) };
    if status == -1 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::NOSYS));
    }
    Ok(answer.cached * dmabuf::page_bytes() as u64)
}
