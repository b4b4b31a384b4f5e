//! dmaload for C and C++. The functions are documented in `include/dmaload.h`, which is generated
//! from these sources.
//!
//! The layer is thin: it checks arguments ([`request`]), calls the library, and stores the results
//! in plain structs ([`outcome`]). Functions that can fail return a negative errno, and panics are
//! caught and returned as errors ([`failure`]).
#![allow(unsafe_code)]
#![allow(unreachable_pub, reason = "the header decides what is public")]

mod blocking;
mod failure;
mod nonblocking;
mod outcome;
mod request;
mod sized;
mod types;

use std::ffi::{c_char, c_int};

use rustix::fs::OFlags;
use rustix::io::Errno;

use blocking::Control;
use failure::{Failure, answer};
use nonblocking::{Fetched, dmaload_load};
use outcome::not_null;
use types::{
    DMALOAD_FINISHED, DMALOAD_PENDING, DMALOAD_SEGMENT, DMALOAD_SINGLE, dmaload_loader, dmaload_options, dmaload_progress,
    dmaload_report, dmaload_segment,
};

/// Returns the library's version: the major number in bits 16 and up, the minor number in bits 8
/// to 15, and the patch number in bits 0 to 7.
#[unsafe(no_mangle)]
pub extern "C" fn dmaload_version() -> u32 {
    const fn number(text: &str) -> u32 {
        let (bytes, mut at, mut number) = (text.as_bytes(), 0, 0);
        while at < bytes.len() {
            number = number * 10 + (bytes[at] - b'0') as u32;
            at += 1;
        }
        number
    }
    const MAJOR: u32 = number(env!("CARGO_PKG_VERSION_MAJOR"));
    const MINOR: u32 = number(env!("CARGO_PKG_VERSION_MINOR"));
    const PATCH: u32 = number(env!("CARGO_PKG_VERSION_PATCH"));
    MAJOR << 16 | MINOR << 8 | PATCH
}

/// Returns the message of this thread's last failed call. It says what failed and on what, names
/// the kernel's errno if there is one, and ends with a hint if there is one. The string is valid
/// until this thread's next failure. It is never NULL, and is empty before the first failure.
#[unsafe(no_mangle)]
pub extern "C" fn dmaload_last_error() -> *const c_char {
    failure::last_message()
}

/// Allocates a dma-buf and reads a file into it, like the proposed ioctl
/// `DMA_HEAP_IOCTL_ALLOC_AND_READ`. The dma-buf is as long as the file, rounded up to whole pages
/// and to whole blocks of the file system. Returns 0 and stores the dma-buf in `dmabuf_fd`; the
/// caller must close it. On failure, returns a negative errno and leaves `dmabuf_fd` unchanged.
///
/// `heap_fd` is an open dma-heap or /dev/udmabuf, identified by its device number. `file_fd` is a
/// file opened for reading, with or without O_DIRECT; it is read from its beginning, and its file
/// position is neither used nor changed. The file is opened again through /proc/self/fd, which
/// requires procfs and permission to open it (-ENOENT, -EACCES). `fd_flags` is O_CLOEXEC or 0,
/// combined with any access mode. `heap_flags` is passed to the dma-heap and must be 0 for
/// udmabuf; the kernel currently defines no flags. For a udmabuf, `batch_bytes` is the maximum
/// amount of memory that is allocated but not yet read into; 0 means 128 MiB, and the minimum is 2
/// MiB. A dma-heap allocates all memory at once.
///
/// Errors: -EINVAL for an empty file, a file that is not regular, flags that are not allowed, or a
/// batch that is too small; -EISDIR for a directory; -EBADF for a descriptor that is closed, or
/// not open for reading; -ENOTTY for a `heap_fd` that is not a heap; -EFAULT if `dmabuf_fd` is
/// NULL; -EFBIG if udmabuf's size_limit_mb is too small (raise it in
/// /sys/module/udmabuf/parameters); -ENOMEM if the memory would not fit (the OOM killer is not
/// invoked); -ESTALE if the file changed during the load; -EIO and other errors from the kernel.
/// `dmaload_last_error` returns the message.
///
/// This function differs from the ioctl in the 2024 kernel patch series. There, the batch size
/// triggers reads; here, it limits how much is allocated ahead of the reads. A dma-heap's memory
/// is a single allocation, which can't overlap with reading. It usually can't be pinned, so data
/// is read into staging buffers and copied from there; reading and copying overlap. A udmabuf can
/// be read into directly while the rest of it is being allocated. The dma-buf is always opened for
/// reading and writing.
///
/// Thread-safe. Blocks until the file is loaded or the load fails. Starts threads, which exit on
/// their own soon after the call returns; until then, they may hold duplicates of the descriptors.
///
/// # Safety
/// `dmabuf_fd` must be NULL or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_alloc_and_read(
    heap_fd: c_int,
    file_fd: c_int,
    fd_flags: u32,
    heap_flags: u64,
    batch_bytes: u64,
    dmabuf_fd: *mut c_int,
) -> c_int {
    answer(|| {
        not_null(dmabuf_fd, "dmabuf_fd")?;
        let known = OFlags::CLOEXEC | OFlags::RWMODE;
        if fd_flags & !known.bits() != 0 || fd_flags & OFlags::RWMODE.bits() == OFlags::RWMODE.bits() {
            return Err(Failure::invalid(format!(
                "invalid fd_flags {fd_flags:#x}: only O_CLOEXEC and an access mode are allowed"
            )));
        }
        let heap = request::heap_from_fd(heap_fd, heap_flags)?;
        let (file, bytes) = request::duplicate_file(file_fd)?;
        let loader = request::one_shot_loader(heap, batch_bytes)?;
        let options = dmaload_options { layout: DMALOAD_SINGLE, ..sized::zeroed() };
        let started = request::start(&loader, file, bytes, &options)?;
        // SAFETY: all pointers in the options are null.
        let (loaded, _) = unsafe { blocking::collect_segments(started, Control::new(&options))? };
        let one = blocking::single_descriptor(loaded)?;
        if fd_flags & OFlags::CLOEXEC.bits() == 0 {
            // SAFETY: `one` is an open descriptor that nothing else owns.
            let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(one) };
            // This can't fail on an open descriptor.
            let _ = rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::empty());
        }
        // SAFETY: `dmabuf_fd` is not null, and valid as the header requires.
        unsafe { dmabuf_fd.write(one) };
        blocking::shut_down(loader);
        Ok(0)
    })
}

/// Loads a file, or a range of its bytes. Stores an array of the segments in `segments`, and their
/// number in `count`. The array must be freed with `dmaload_segments_free`. `options` may be NULL.
/// Returns 0; on failure, returns a negative errno and stores nothing.
///
/// Errors: those of `dmaload_alloc_and_read`; -EFAULT if `segments` or `count` is NULL; -ECANCELED
/// if the progress function or the flag cancelled the load; -E2BIG if the options set fields that
/// this version does not know; -EINVAL for invalid options.
///
/// Thread-safe. Blocks until the load has finished or failed.
///
/// # Safety
/// Each pointer, including those in `options`, must be NULL or valid for the use described here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_load_file(
    file_fd: c_int,
    options: *const dmaload_options,
    segments: *mut *mut dmaload_segment,
    count: *mut usize,
) -> c_int {
    answer(|| {
        not_null(segments, "segments")?;
        not_null(count, "count")?;
        // SAFETY: `options` is null or valid, as the header requires.
        let options = unsafe { sized::read(options)? };
        let (file, bytes) = request::duplicate_file(file_fd)?;
        // SAFETY: the pointers in `options` are null or valid, as the header requires.
        let (loader, is_own) = unsafe { request::loader_for(&options)? };
        let started = request::start(&loader, file, bytes, &options)?;
        // SAFETY: the pointers in `options` are null or valid, as the header requires.
        let (loaded, report) = unsafe { blocking::collect_segments(started, Control::new(&options))? };
        // SAFETY: `options.report` is null or valid, as the header requires.
        unsafe { outcome::write_report(&report, options.report)? };
        if is_own {
            blocking::shut_down(loader);
        }
        // SAFETY: neither pointer is null, and both are valid, as the header requires.
        unsafe { outcome::into_array(loaded, segments, count) };
        Ok(0)
    })
}

/// Closes the descriptors in an array of segments and frees the array. Descriptors that the caller
/// has taken over and replaced with -1 in the array are skipped. Does nothing for NULL.
///
/// # Safety
/// `segments` must be NULL, or have been returned by `dmaload_load_file` with this count and not
/// been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_segments_free(segments: *mut dmaload_segment, count: usize) {
    answer(|| {
        // SAFETY: `segments` is null or an array of this length that was not freed, as the header
        // requires.
        unsafe { outcome::free_array(segments, count) };
        Ok(0)
    });
}

/// Creates a loader, whose loads share memory, threads and limits. Uses only the heap,
/// `window_bytes` and `queue_depth` of `options`, which may be NULL. Returns 0 and stores the
/// loader in `loader`, or returns a negative errno. The loader must be freed with
/// `dmaload_loader_free`.
///
/// # Safety
/// Each pointer, including those in `options`, must be NULL or valid for the use described here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_loader_new(options: *const dmaload_options, loader: *mut *mut dmaload_loader) -> c_int {
    answer(|| {
        not_null(loader, "loader")?;
        // SAFETY: `options` is null or valid, as the header requires.
        let options = unsafe { sized::read(options)? };
        // SAFETY: the pointers in `options` are null or valid, as the header requires.
        let new = dmaload_loader(unsafe { request::new_loader(&options)? });
        // SAFETY: `loader` is not null, and valid as the header requires.
        unsafe { loader.write(Box::into_raw(Box::new(new))) };
        Ok(0)
    })
}

/// Frees a loader. Running loads continue, and the loader's threads exit after the last of these
/// loads has ended. Does nothing for NULL.
///
/// # Safety
/// `loader` must be NULL, or have been returned by `dmaload_loader_new` and not been freed. No
/// other call may be using it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_loader_free(loader: *mut dmaload_loader) {
    answer(|| {
        if !loader.is_null() {
            // SAFETY: `loader` came from `dmaload_loader_new` and was not freed, as the header
            // requires.
            drop(unsafe { Box::from_raw(loader) });
        }
        Ok(0)
    });
}

/// Starts a load and returns at once. Returns 0 and stores the load in `load`, or returns a
/// negative errno. The load must be freed with `dmaload_free`. `file_fd` may be closed after the
/// call. `options` may be NULL; its fields `progress`, `cancel` and `report` must be NULL.
///
/// # Safety
/// Each pointer, including those in `options`, must be NULL or valid for the use described here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_start(file_fd: c_int, options: *const dmaload_options, load: *mut *mut dmaload_load) -> c_int {
    answer(|| {
        not_null(load, "load")?;
        // SAFETY: `options` is null or valid, as the header requires.
        let options = unsafe { sized::read(options)? };
        if options.progress.is_some() || !options.cancel.is_null() || !options.report.is_null() {
            return Err(Failure::invalid(
                "progress, cancel and report must be NULL: see dmaload_load_progress, dmaload_cancel and dmaload_load_report",
            ));
        }
        let (file, bytes) = request::duplicate_file(file_fd)?;
        // SAFETY: the pointers in `options` are null or valid, as the header requires.
        let (loader, _) = unsafe { request::loader_for(&options)? };
        let new = dmaload_load::new(request::start(&loader, file, bytes, &options)?)?;
        // SAFETY: `load` is not null, and valid as the header requires.
        unsafe { load.write(Box::into_raw(Box::new(new))) };
        Ok(0)
    })
}

/// Returns the eventfd of a load, for poll(2) or epoll(7). It is readable while `dmaload_poll` can
/// return a segment, the end of the load or a failure. The load owns the eventfd: do not close it,
/// read from it or write to it. Returns -EFAULT for NULL.
///
/// # Safety
/// `load` must be NULL, or have been returned by `dmaload_start` and not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_event_fd(load: *const dmaload_load) -> c_int {
    with_load(load, |load| Ok(load.event_fd()))
}

/// Returns the next event of a load without blocking. `DMALOAD_PENDING` means that there is none
/// yet. `DMALOAD_SEGMENT` means that the next segment, in order, was stored in `segment`; the
/// caller must close its descriptor. `DMALOAD_FINISHED` follows the last segment. If the load
/// fails, this and all later calls return a negative errno, as from `dmaload_load_file`.
///
/// Segments returned before a failure contain the file's bytes at the time they were read. A
/// change to the file may be detected only at the end of the load.
///
/// Thread-safe: each segment is returned once.
///
/// # Safety
/// `load` must have been returned by `dmaload_start` and not been freed, and `segment` must be
/// valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_poll(load: *mut dmaload_load, segment: *mut dmaload_segment) -> c_int {
    with_load(load, |load| {
        not_null(segment, "segment")?;
        Ok(match load.poll()? {
            Fetched::Nothing => DMALOAD_PENDING,
            Fetched::Finished => DMALOAD_FINISHED,
            Fetched::Segment(fetched) => {
                // SAFETY: `segment` is not null, and valid as the header requires.
                unsafe { segment.write(fetched.into_c()) };
                DMALOAD_SEGMENT
            }
        })
    })
}

/// Stores the progress of a load. All fields are 0 once `dmaload_poll` has returned
/// `DMALOAD_FINISHED` or a failure, or once the load has been cancelled. Returns 0 or -EFAULT.
///
/// # Safety
/// `load` must have been returned by `dmaload_start` and not been freed, and `progress` must be
/// valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_load_progress(load: *const dmaload_load, progress: *mut dmaload_progress) -> c_int {
    with_load(load, |load| {
        not_null(progress, "progress")?;
        // SAFETY: `progress` is not null, and valid as the header requires.
        unsafe { progress.write(outcome::progress(load.progress())) };
        Ok(0)
    })
}

/// Stores the report of a finished load. Returns 0; -EINPROGRESS until `dmaload_poll` has returned
/// `DMALOAD_FINISHED`; the error of a failed load; -EFAULT for NULL; or -EINVAL if the `size` of
/// `report` is not set.
///
/// # Safety
/// `load` must have been returned by `dmaload_start` and not been freed. `report` must be valid
/// and have its size set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_load_report(load: *const dmaload_load, report: *mut dmaload_report) -> c_int {
    with_load(load, |load| {
        not_null(report, "report")?;
        // SAFETY: `report` is not null, and valid with its size set, as the header requires.
        unsafe { outcome::write_report(&load.report()?, report)? };
        Ok(0)
    })
}

/// Cancels a load without blocking. From then on, `dmaload_poll` returns -ECANCELED. No new reads
/// start; reads in flight are drained in the background, and then their memory is freed. Segments
/// already returned stay valid. Does nothing for NULL, or once `dmaload_poll` has returned
/// `DMALOAD_FINISHED` or a failure.
///
/// # Safety
/// `load` must be NULL, or have been returned by `dmaload_start` and not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_cancel(load: *mut dmaload_load) {
    answer(|| {
        // SAFETY: `load` is null, or a load that was not freed, as the header requires.
        if let Some(load) = unsafe { load.as_ref() } {
            load.cancel();
        }
        Ok(0)
    });
}

/// Frees a load, and cancels it if it is still running. Does nothing for NULL.
///
/// # Safety
/// `load` must be NULL, or have been returned by `dmaload_start` and not been freed. No other call
/// may be using it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_free(load: *mut dmaload_load) {
    answer(|| {
        if !load.is_null() {
            // SAFETY: `load` came from `dmaload_start` and was not freed, as the header requires.
            drop(unsafe { Box::from_raw(load) });
        }
        Ok(0)
    });
}

/// Calls `body` with the load that a C program passed, or fails if it passed NULL.
fn with_load(load: *const dmaload_load, body: impl FnOnce(&dmaload_load) -> failure::Result<c_int>) -> c_int {
    answer(|| {
        // SAFETY: `load` is null, or a load that was not freed, as the header requires.
        let load = unsafe { load.as_ref() }.ok_or_else(|| Failure::new(Errno::FAULT, "load is NULL"))?;
        body(load)
    })
}
