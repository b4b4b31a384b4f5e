//! Turns C options into a loader and a load.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use dmabuf::Device;
use dmaload::heap::{DmaHeap, Heap, HeapChoice, Pages, UdmabufHeap};
use dmaload::{Cache, Format, Layout, LoadOptions, Loader, LoaderBuilder, Priority, Segments, Source};
use rustix::fs::{AtFlags, FileType, OFlags, RawMode, StatxFlags, fstat, statx};
use rustix::io::Errno;

use crate::failure::{Failure, Result};
use crate::outcome::cpu_time;
use crate::types::{DMALOAD_HEAP_FD, DMALOAD_SEGMENTED, DMALOAD_SINGLE, DMALOAD_STRICT, dmaload_options};

const MIB: u64 = 1 << 20;
const SEGMENT_STEP_BYTES: u64 = 2 * MIB;

/// Duplicates the caller's descriptor.
pub(crate) fn duplicate(fd: c_int, what: &str) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(duplicate_failure(Errno::BADF, fd, what));
    }
    // SAFETY: `fd` is not -1, and is used only for this call, which fails if it is not open.
    let open = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_dupfd_cloexec(open, 0).map_err(|errno| duplicate_failure(errno, fd, what))
}

fn duplicate_failure(errno: Errno, fd: c_int, what: &str) -> Failure {
    match errno {
        Errno::BADF => Failure::new(errno, format!("{what} {fd} is not an open descriptor")),
        errno => Failure::system(errno, &format!("cannot duplicate {what} {fd}")),
    }
}

/// Duplicates the descriptor of the file to read, and determines the file's length.
pub(crate) fn duplicate_file(fd: c_int) -> Result<(OwnedFd, u64)> {
    let file = duplicate(fd, "file_fd")?;
    let failed = |errno| Failure::system(errno, &format!("cannot stat file_fd {fd}"));
    let flags = rustix::fs::fcntl_getfl(&file).map_err(failed)?;
    if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE == OFlags::WRONLY {
        return Err(Failure::new(Errno::BADF, format!("file_fd {fd} is not open for reading")));
    }
    let (mode, bytes) = mode_and_length(&file).map_err(failed)?;
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => Ok((file, bytes)),
        FileType::Directory => Err(Failure::new(Errno::ISDIR, format!("file_fd {fd} is a directory"))),
        kind => Err(Failure::invalid(format!("file_fd {fd} is not a regular file, but {kind:?}"))),
    }
}

/// Returns the file's mode and length. Forces a network file system to ask its server: if its
/// cached length were outdated, the end of the file would not be loaded.
fn mode_and_length(file: &OwnedFd) -> rustix::io::Result<(RawMode, u64)> {
    match statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS) {
        Ok(found) => Ok((RawMode::from(found.stx_mode), found.stx_size)),
        // A sandbox may refuse statx.
        Err(Errno::NOSYS | Errno::PERM) => {
            let found = fstat(file)?;
            let bytes = u64::try_from(found.st_size).expect("the length of a file is not negative");
            Ok((found.st_mode, bytes))
        }
        Err(errno) => Err(errno),
    }
}

/// Returns the heap that this descriptor refers to.
pub(crate) fn heap_from_fd(fd: c_int, flags: u64) -> Result<Arc<dyn Heap>> {
    let device = duplicate(fd, "heap_fd")?;
    match Device::identify(&device) {
        Some(Device::DmaHeap(_)) => Ok(Arc::new(DmaHeap::from_fd(device)?.flags(flags))),
        Some(Device::Udmabuf) if flags != 0 => Err(Failure::invalid("heap_flags must be 0 for udmabuf")),
        Some(Device::Udmabuf) => Ok(Arc::new(UdmabufHeap::from_fd(device, Pages::Auto)?)),
        None => Err(Failure::new(Errno::NOTTY, format!("heap_fd {fd} is neither a dma-heap nor /dev/udmabuf"))),
    }
}

/// Opens the heap with this name; null means the `memfd` heap.
///
/// # Safety
/// `name` is null, or a valid C string.
unsafe fn heap_named(name: *const c_char) -> Result<Arc<dyn Heap>> {
    let choice = if name.is_null() {
        HeapChoice::Memfd
    } else {
        // SAFETY: `name` is a valid C string, as the caller guarantees.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        match name.parse() {
            // The header offers neither `auto` nor `anon`: segments on the `anon` heap have no
            // descriptor.
            Err(_) | Ok(HeapChoice::Auto | HeapChoice::Anon) => {
                return Err(Failure::invalid(format!("unknown heap {name:?}: use memfd, udmabuf, dma-heap:NAME or dma-buf")));
            }
            Ok(choice) => choice,
        }
    };
    Ok(choice.open(Pages::Auto)?.0)
}

/// Opens the heap that the options specify, by name or by descriptor.
///
/// # Safety
/// `options.heap` is null, or a valid C string.
unsafe fn heap(options: &dmaload_options) -> Result<Arc<dyn Heap>> {
    match (options.flags & DMALOAD_HEAP_FD != 0, options.heap.is_null()) {
        (true, true) => heap_from_fd(options.heap_fd, 0),
        (true, false) => Err(Failure::invalid("heap and heap_fd can't both be set")),
        // SAFETY: `options.heap` is null or a valid C string, as the caller guarantees.
        (false, _) => unsafe { heap_named(options.heap) },
    }
}

/// Creates a loader with these options.
///
/// # Safety
/// `options.heap` is null, or a valid C string.
pub(crate) unsafe fn new_loader(options: &dmaload_options) -> Result<Loader> {
    check_flags(options)?;
    // SAFETY: `options.heap` is null or a valid C string, as the caller guarantees.
    let heap = unsafe { heap(options)? };
    let mut builder = Loader::builder().heap(heap).window_bytes(window_bytes(options.window_bytes)?);
    if options.queue_depth > 0 {
        builder = builder.queue_depth(options.queue_depth as usize);
    }
    Ok(builder.load_options(options_for_window(options.window_bytes)?).build()?)
}

/// Creates a loader for one call of `dmaload_alloc_and_read`, which always reads from storage,
/// even if the file is cached.
pub(crate) fn one_shot_loader(heap: Arc<dyn Heap>, batch_bytes: u64) -> Result<Loader> {
    let options = options_for_window(batch_bytes)?.cache(Cache::Bypass);
    Ok(Loader::builder().heap(heap).window_bytes(window_bytes(batch_bytes)?).load_options(options).build()?)
}

fn check_flags(options: &dmaload_options) -> Result<()> {
    let unknown = options.flags & !(DMALOAD_HEAP_FD | DMALOAD_STRICT);
    if unknown == 0 { Ok(()) } else { Err(Failure::invalid(format!("unknown flags {unknown:#x}"))) }
}

fn window_bytes(requested: u64) -> Result<u64> {
    match requested {
        0 => Ok(LoaderBuilder::WINDOW_BYTES),
        bytes if bytes < SEGMENT_STEP_BYTES => Err(Failure::invalid(format!(
            "too few bytes to allocate ahead ({bytes}): window_bytes and batch_bytes must be at least 2 MiB"
        ))),
        bytes => Ok(bytes),
    }
}

/// Returns the library's default options, with smaller segments if segments of the default size do
/// not fit into the window.
fn options_for_window(window: u64) -> Result<LoadOptions> {
    let (window, options) = (window_bytes(window)?, LoadOptions::default());
    let fits = window / SEGMENT_STEP_BYTES * SEGMENT_STEP_BYTES;
    Ok(if window < LoadOptions::SEGMENT_BYTES { options.segment_bytes(fits) } else { options })
}

/// Returns the loader for a load, and whether that loader was created for this load alone.
///
/// # Safety
/// The pointers in `options` are valid as the header requires.
pub(crate) unsafe fn loader_for(options: &dmaload_options) -> Result<(Loader, bool)> {
    // SAFETY: `options.loader` is null, or a loader that was not freed, as the caller guarantees.
    let Some(shared) = (unsafe { options.loader.as_ref() }) else {
        // SAFETY: `options.heap` is null or a valid C string, as the caller guarantees.
        return Ok((unsafe { new_loader(options)? }, true));
    };
    check_flags(options)?;
    let own = options.flags & DMALOAD_HEAP_FD != 0 || !options.heap.is_null();
    if own || options.window_bytes != 0 || options.queue_depth != 0 {
        return Err(Failure::invalid("heap, heap_fd, window_bytes and queue_depth must be 0 if a loader is set"));
    }
    Ok((shared.0.clone(), false))
}

/// A started load, and the range of the file's bytes that was requested.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) segments: Segments,
    pub(crate) wanted: Range<u64>,
    /// CPU time of the process at the start.
    pub(crate) cpu_before: Duration,
}

/// Starts a load with these options.
pub(crate) fn start(loader: &Loader, file: OwnedFd, file_bytes: u64, options: &dmaload_options) -> Result<Started> {
    let layout = match options.layout {
        DMALOAD_SEGMENTED => Layout::Segmented,
        DMALOAD_SINGLE => Layout::Single,
        other => return Err(Failure::invalid(format!("unknown layout {other}"))),
    };
    let priority = match options.priority {
        0 => Priority::Normal,
        1 => Priority::High,
        -1 => Priority::Low,
        other => return Err(Failure::invalid(format!("invalid priority {other}: use -1, 0 or 1"))),
    };
    let part = requested_range(file_bytes, options.file_offset, options.file_bytes)?;
    // If the whole file was requested, no range is set. If the file then grows before the load
    // opens it, the new bytes are loaded, too.
    let (part, wanted) = if part == (0..file_bytes) { (None, 0..u64::MAX) } else { (Some(part.clone()), part) };
    let strict = options.flags & DMALOAD_STRICT != 0;
    // Every file is loaded as raw bytes, regardless of its format.
    let mut load = loader.load_options().layout(layout).priority(priority).strict(strict).format(Format::Raw);
    if options.segment_bytes > 0 {
        load = load.segment_bytes(options.segment_bytes);
    }
    let source = part.into_iter().fold(Source::file(file), Source::range);
    let cpu_before = cpu_time();
    Ok(Started { segments: loader.load(source).options(load).segments(), wanted, cpu_before })
}

/// Returns the range of the file that was requested, if the file contains it. If `bytes` is 0, the
/// range extends from `offset` to the end of the file.
fn requested_range(file_bytes: u64, offset: u64, bytes: u64) -> Result<Range<u64>> {
    let left = file_bytes.checked_sub(offset).filter(|&left| left > 0 && bytes <= left).ok_or_else(|| {
        Failure::invalid(if bytes == 0 {
            format!("nothing to load from offset {offset} on: the file has {file_bytes} bytes")
        } else {
            format!("the file has {file_bytes} bytes, too few for {bytes} bytes at offset {offset}")
        })
    })?;
    Ok(offset..offset + if bytes == 0 { left } else { bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_closed_descriptor_is_reported_as_not_open() {
        let closed = duplicate_failure(Errno::BADF, 7, "file_fd");
        assert_eq!((closed.errno, closed.text.as_str()), (Errno::BADF, "file_fd 7 is not an open descriptor"));
        let refused = duplicate_failure(Errno::MFILE, 7, "heap_fd");
        assert_eq!(
            (refused.errno, refused.text.as_str()),
            (Errno::MFILE, "cannot duplicate heap_fd 7: EMFILE (Too many open files)")
        );
    }

    #[test]
    fn requested_range_is_within_the_file() {
        assert_eq!(requested_range(10, 0, 0).unwrap(), 0..10);
        assert_eq!(requested_range(10, 0, 10).unwrap(), 0..10);
        assert_eq!(requested_range(10, 3, 0).unwrap(), 3..10);
        assert_eq!(requested_range(10, 3, 4).unwrap(), 3..7);
        for (bytes, offset, wanted) in [(0, 0, 0), (10, 10, 0), (10, 11, 0), (10, 3, 8), (10, 0, 11), (10, u64::MAX, 1)] {
            assert_eq!(requested_range(bytes, offset, wanted).unwrap_err().errno, Errno::INVAL, "{bytes} {offset} {wanted}");
        }
    }

    #[test]
    fn segments_fit_into_their_window() {
        let options_of = |bytes| options_for_window(bytes).unwrap();
        assert_eq!(options_of(0), LoadOptions::default());
        assert_eq!(options_of(64 * MIB), LoadOptions::default());
        assert_eq!(options_of(MIB * 5), LoadOptions::default().segment_bytes(4 * MIB));
        assert_eq!(options_for_window(MIB).unwrap_err().errno, Errno::INVAL);
    }
}
