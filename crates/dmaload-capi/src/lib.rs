//! dmaload for C and C++. What it does is documented in `include/dmaload.h`, which is made of these sources.
//!
//! A thin layer: arguments are checked ([`request`]), the library does its work, and what comes of it is put into plain structs
//! ([`outcome`]). Every function catches panics, and answers with a negative errno ([`failure`]).
#![allow(unsafe_code)]
#![allow(unreachable_pub, reason = "what C sees is public in the header, not here")]

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

/// The version of the library: major in bits 16 and up, minor in bits 8 to 15, patch in bits 0 to 7.
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

/// Why the last call of this thread that failed did: what was tried, where, the errno by name, and what can be done. Valid until the
/// next one fails. Never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn dmaload_last_error() -> *const c_char {
    failure::last()
}

/// Allocates a dma-buf as large as a file, rounded up to a block of its file system, a page at least, and reads the file into it: what `DMA_HEAP_IOCTL_ALLOC_AND_READ` would
/// have done. Returns 0, and the dma-buf in `dmabuf_fd`, which is the caller's to close; or a negative errno, and leaves `dmabuf_fd`
/// as it is.
///
/// `heap_fd` is an open dma-heap or /dev/udmabuf, known by its device number. `file_fd` is a file opened for reading, with or without
/// O_DIRECT; it is read from its beginning, wherever its position is, which stays. It is opened again by /proc/self/fd, so procfs and the
/// right to open it are needed (-ENOENT, -EACCES). `fd_flags` is O_CLOEXEC or 0, together with any access
/// mode. `heap_flags` are for the dma-heap, which today knows none. At most `batch_bytes` are allocated and not yet
/// read; 0 is 128 MiB, and 2 MiB are the least.
///
/// Errors: -EINVAL for a file of 0 bytes, what is no regular file, unknown flags, too small a batch; -EISDIR; -EBADF for a descriptor that
/// is closed, or not open for reading; -ENOTTY for a `heap_fd` that is no heap; -EFAULT for NULL; -EFBIG where udmabuf's
/// size_limit_mb is too small (raise it in /sys/module/udmabuf/parameters); -ENOMEM rather than waking the OOM killer; -ESTALE for a
/// file that changed meanwhile; -EIO, and what else the kernel answers. `dmaload_last_error` has the words.
///
/// Where this differs from the ioctl of the 2024 kernel series: its batch is what triggers a read, here it bounds what is
/// allocated ahead. A dma-heap's memory comes in one allocation, which can't be overlapped with reading, and can't be pinned: there reads
/// go through staging, side by side with the copies. A udmabuf is read into directly while it is being allocated. The
/// dma-buf is always opened for reading and writing.
///
/// Thread-safe. Blocks. Starts threads, which end by themselves, soon after it returns; until then they may have the descriptors duplicated.
///
/// # Safety
/// `dmabuf_fd` is null, or valid for a write.
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
            return Err(Failure::invalid(format!("fd_flags {fd_flags:#x}: O_CLOEXEC and an access mode are known")));
        }
        let heap = request::heap_of(heap_fd, heap_flags)?;
        let (file, bytes) = request::file(file_fd)?;
        let loader = request::loader_with(heap, batch_bytes)?;
        let options = dmaload_options { layout: DMALOAD_SINGLE, ..sized::zeroed() };
        let started = request::start(&loader, file, bytes, &options)?;
        // SAFETY: nothing is asked to be told.
        let (given, _) = unsafe { blocking::all_of(started, Control::of(&options))? };
        let one = blocking::only(given)?;
        if fd_flags & OFlags::CLOEXEC.bits() == 0 {
            // SAFETY: it is open, and nobody else has it.
            let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(one) };
            // That can't be refused.
            let _ = rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::empty());
        }
        // SAFETY: it is not null, and valid as the header says.
        unsafe { dmabuf_fd.write(one) };
        blocking::end(loader);
        Ok(0)
    })
}

/// Loads a file, or a part of one, and gives its segments: an array of `count`, in `segments`, to be freed by
/// `dmaload_segments_free`. `options` may be NULL. Returns 0, or a negative errno, and then gives nothing.
///
/// Errors are those of `dmaload_alloc_and_read`; -ECANCELED where the progress function or the flag said so; -E2BIG for options of a
/// newer version; -EINVAL for options that make no sense.
///
/// Thread-safe. Blocks.
///
/// # Safety
/// The pointers, and those in `options`, are null or valid as the header says.
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
        // SAFETY: as the header says.
        let options = unsafe { sized::read(options)? };
        let (file, bytes) = request::file(file_fd)?;
        // SAFETY: as the header says.
        let (loader, is_own) = unsafe { request::loader_of(&options)? };
        let started = request::start(&loader, file, bytes, &options)?;
        // SAFETY: as the header says.
        let (given, report) = unsafe { blocking::all_of(started, Control::of(&options))? };
        // SAFETY: as the header says.
        unsafe { outcome::write_report(&report, options.report)? };
        if is_own {
            blocking::end(loader);
        }
        // SAFETY: neither is null; they are valid as the header says.
        unsafe { outcome::into_array(given, segments, count) };
        Ok(0)
    })
}

/// Closes the descriptors of an array of segments, but those that were set to -1 since somebody has taken them, and frees the array.
/// NULL is nothing.
///
/// # Safety
/// It is null, or came from `dmaload_load_file` with this count, and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_segments_free(segments: *mut dmaload_segment, count: usize) {
    answer(|| {
        // SAFETY: as the header says.
        unsafe { outcome::free_array(segments, count) };
        Ok(0)
    });
}

/// Makes a loader, for loads that are to share memory, threads and limits. Of `options`, which may be NULL, the heap, `window_bytes` and
/// `queue_depth` count. Returns 0, or a negative errno.
///
/// # Safety
/// The pointers, and those in `options`, are null or valid as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_loader_new(options: *const dmaload_options, loader: *mut *mut dmaload_loader) -> c_int {
    answer(|| {
        not_null(loader, "loader")?;
        // SAFETY: as the header says.
        let options = unsafe { sized::read(options)? };
        // SAFETY: as the header says.
        let new = dmaload_loader(unsafe { request::new_loader(&options)? });
        // SAFETY: it is not null, and valid as the header says.
        unsafe { loader.write(Box::into_raw(Box::new(new))) };
        Ok(0)
    })
}

/// Frees a loader. Loads that run go on; its threads end with the last of them. NULL is nothing.
///
/// # Safety
/// It is null, or came from `dmaload_loader_new`, and was not freed. No other call has it now.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_loader_free(loader: *mut dmaload_loader) {
    answer(|| {
        if !loader.is_null() {
            // SAFETY: as the header says.
            drop(unsafe { Box::from_raw(loader) });
        }
        Ok(0)
    });
}

/// Starts a load and returns at once: 0, and the load in `load`, to be freed by `dmaload_free`; or a negative errno. `file_fd` may be
/// closed then. `options` may be NULL; its `progress`, `cancel` and `report` must be.
///
/// # Safety
/// The pointers, and those in `options`, are null or valid as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_start(file_fd: c_int, options: *const dmaload_options, load: *mut *mut dmaload_load) -> c_int {
    answer(|| {
        not_null(load, "load")?;
        // SAFETY: as the header says.
        let options = unsafe { sized::read(options)? };
        if options.progress.is_some() || !options.cancel.is_null() || !options.report.is_null() {
            return Err(Failure::invalid("progress, cancel and report are of loads that block: see dmaload_load_progress"));
        }
        let (file, bytes) = request::file(file_fd)?;
        // SAFETY: as the header says.
        let (loader, _) = unsafe { request::loader_of(&options)? };
        let new = dmaload_load::new(request::start(&loader, file, bytes, &options)?)?;
        // SAFETY: it is not null, and valid as the header says.
        unsafe { load.write(Box::into_raw(Box::new(new))) };
        Ok(0)
    })
}

/// The eventfd of a load, for poll(2) or epoll(7): readable while there is something for `dmaload_poll` to say, a segment, the end or a
/// failure. It is the load's: do not close, read or write it. -EFAULT for NULL.
///
/// # Safety
/// It is null, or came from `dmaload_start`, and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_event_fd(load: *const dmaload_load) -> c_int {
    // SAFETY: as the header says.
    with(load, |load| Ok(load.event_fd()))
}

/// Says what has become of a load, without waiting: `DMALOAD_PENDING`; `DMALOAD_SEGMENT`, the next segment in order, whose descriptor is
/// the caller's to close; `DMALOAD_FINISHED`, after the last one; or a negative errno, as of `dmaload_load_file`, for good.
///
/// Segments given before a failure were read from the file as it was then: one that changes is found out at its end.
///
/// Thread-safe: each segment is given once.
///
/// # Safety
/// `load` came from `dmaload_start`, and was not freed; `segment` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_poll(load: *mut dmaload_load, segment: *mut dmaload_segment) -> c_int {
    with(load, |load| {
        not_null(segment, "segment")?;
        Ok(match load.poll()? {
            Fetched::Nothing => DMALOAD_PENDING,
            Fetched::Finished => DMALOAD_FINISHED,
            Fetched::Segment(given) => {
                // SAFETY: it is not null, and valid as the header says.
                unsafe { segment.write(given.into_c()) };
                DMALOAD_SEGMENT
            }
        })
    })
}

/// How far a load is; all 0 when it is over. Returns 0 or -EFAULT.
///
/// # Safety
/// `load` came from `dmaload_start`, and was not freed; `progress` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_load_progress(load: *const dmaload_load, progress: *mut dmaload_progress) -> c_int {
    with(load, |load| {
        not_null(progress, "progress")?;
        // SAFETY: it is not null, and valid as the header says.
        unsafe { progress.write(outcome::progress(load.progress())) };
        Ok(0)
    })
}

/// How a load went, once it is finished: 0; -EINPROGRESS before that; of one that failed, what it failed with.
///
/// # Safety
/// `load` came from `dmaload_start`, and was not freed; `report` is valid, and has its size set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_load_report(load: *const dmaload_load, report: *mut dmaload_report) -> c_int {
    with(load, |load| {
        not_null(report, "report")?;
        // SAFETY: as the header says.
        unsafe { outcome::write_report(&load.report()?, report)? };
        Ok(0)
    })
}

/// Cancels a load: `dmaload_poll` answers -ECANCELED from now on. Nothing new is read; what is in flight is drained in the
/// background, then its memory is freed. Does not wait. Segments that were given stay. Nothing happens to a load that is over, or NULL.
///
/// # Safety
/// It is null, or came from `dmaload_start`, and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_cancel(load: *mut dmaload_load) {
    with(load, |load| {
        load.cancel();
        Ok(0)
    });
}

/// Frees a load, and cancels it where it is not over. NULL is nothing.
///
/// # Safety
/// It is null, or came from `dmaload_start`, and was not freed. No other call has it now.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmaload_free(load: *mut dmaload_load) {
    answer(|| {
        if !load.is_null() {
            // SAFETY: as the header says.
            drop(unsafe { Box::from_raw(load) });
        }
        Ok(0)
    });
}

/// Does something with a load that C names.
fn with(load: *const dmaload_load, body: impl FnOnce(&dmaload_load) -> failure::Result<c_int>) -> c_int {
    answer(|| {
        // SAFETY: C says that it is null, or a load that was not freed.
        let load = unsafe { load.as_ref() }.ok_or_else(|| Failure::new(Errno::FAULT, "load is NULL"))?;
        body(load)
    })
}
