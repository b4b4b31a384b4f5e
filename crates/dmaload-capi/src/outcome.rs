//! Converts a load's results to C structs: segments, progress and the report.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int};
use std::ops::Range;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::time::Duration;

use dmaload::{Progress, Report, Segment};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use crate::failure::{Failure, Result};
use crate::sized;
use crate::types::{DMALOAD_DMA_BUF, DMALOAD_MEMFD, dmaload_progress, dmaload_report, dmaload_segment};

/// A segment whose descriptor has not been passed to C yet.
#[derive(Debug)]
pub(crate) struct OwnedSegment {
    fd: OwnedFd,
    plain: dmaload_segment,
}

impl OwnedSegment {
    /// Describes the requested bytes of a segment, and gets a descriptor of its memory. The
    /// segment can contain more bytes than requested, because whole blocks are read. The segment
    /// can be dropped afterwards: the descriptor keeps the memory alive.
    pub(crate) fn new(segment: &Segment, wanted: &Range<u64>) -> Result<Self> {
        let (fd, kind) = if segment.has_dma_buf() {
            (segment.hand_out_owned_dma_buf()?, DMALOAD_DMA_BUF)
        } else {
            let failed = |errno| Failure::system(errno, "cannot duplicate a segment's descriptor");
            (rustix::io::fcntl_dupfd_cloexec(segment.hand_out_memfd()?, 0).map_err(failed)?, DMALOAD_MEMFD)
        };
        let has = segment.file_range();
        let (start, end) = (has.start.max(wanted.start), has.end.min(wanted.end));
        let before = start - has.start;
        let plain = dmaload_segment {
            fd: -1,
            kind,
            index: segment.index() as u64,
            file_offset: start,
            bytes: end.saturating_sub(start),
            memory_offset: segment.memory_offset() as u64 + before,
            memory_bytes: segment.memory_bytes() as u64 - before,
        };
        Ok(OwnedSegment { fd, plain })
    }

    /// Passes ownership of the descriptor to C.
    pub(crate) fn into_c(self) -> dmaload_segment {
        dmaload_segment { fd: self.fd.into_raw_fd(), ..self.plain }
    }

    pub(crate) fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

/// The report of a load, and the CPU time, which the library's report does not contain.
#[derive(Debug, Clone)]
pub(crate) struct Finished {
    report: Report,
    /// CPU time of the process during the load.
    cpu: Duration,
}

impl Finished {
    /// Completes the report of a load that has just finished. `cpu_before` is the process's CPU
    /// time at the start of the load.
    pub(crate) fn new(report: Report, cpu_before: Duration) -> Self {
        Finished { report, cpu: cpu_time().saturating_sub(cpu_before) }
    }
}

/// Returns the CPU time that the process has used so far.
pub(crate) fn cpu_time() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap_or_default()
}

pub(crate) fn progress(progress: Progress) -> dmaload_progress {
    let Progress { planned_bytes, allocated_bytes, read_bytes, .. } = progress;
    dmaload_progress { planned_bytes, allocated_bytes, read_bytes }
}

/// Writes as much of a report as the caller's version of the struct has room for.
///
/// # Safety
/// As for [`sized::write`].
pub(crate) unsafe fn write_report(finished: &Finished, to: *mut dmaload_report) -> Result<()> {
    let Finished { report, cpu } = finished;
    let ns = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let mut all: dmaload_report = sized::zeroed();
    all.bytes = report.bytes;
    all.total_ns = ns(report.total);
    all.first_segment_ns = report.first_segment.map_or(0, ns);
    all.allocating_ns = ns(report.allocating);
    all.reading_ns = ns(report.reading);
    all.copying_ns = ns(report.copying);
    all.cpu_ns = ns(*cpu);
    all.huge_page_bytes = report.pages.huge_bytes;
    all.segments = report.segments as u64;
    all.fallbacks = report.fallbacks.len() as u64;
    let text = describe_report(report);
    // The last byte stays 0, to terminate the string.
    let room = all.text.len() - 1;
    for (to, byte) in all.text.iter_mut().take(room).zip(text.bytes().filter(|&byte| byte != 0)) {
        *to = c_char::from_ne_bytes([byte]);
    }
    // SAFETY: `to` is null or valid with its size set, as the caller guarantees.
    unsafe { sized::write(to, &all) }
}

fn describe_report(report: &Report) -> String {
    let mut lines = vec![format!("{} by {}", report.heap, report.route)];
    lines.extend(report.fallbacks.iter().map(|step| {
        let errno = step.errno.describe();
        format!("{} was refused while {}: {errno}; {} was used instead", step.from, step.attempt, step.to)
    }));
    lines.extend(report.notes.iter().cloned());
    lines.join("\n")
}

/// Stores the segments in an array and passes ownership of the array to C.
///
/// # Safety
/// Both pointers are valid for writes.
pub(crate) unsafe fn into_array(loaded: Vec<OwnedSegment>, segments: *mut *mut dmaload_segment, count: *mut usize) {
    let all: Box<[dmaload_segment]> = loaded.into_iter().map(OwnedSegment::into_c).collect();
    // SAFETY: `count` is valid for a write, as the caller guarantees.
    unsafe { count.write(all.len()) };
    // SAFETY: `segments` is valid for a write, as the caller guarantees.
    unsafe { segments.write(Box::into_raw(all).cast()) };
}

/// Closes the descriptors that the caller has not taken (those whose `fd` is not -1), and frees
/// the array.
///
/// # Safety
/// `segments` is null, or came from [`into_array`] with this count and has not been freed.
pub(crate) unsafe fn free_array(segments: *mut dmaload_segment, count: usize) {
    if segments.is_null() {
        return;
    }
    // SAFETY: the caller guarantees that `into_array` made the array from a box of this length.
    let all = unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(segments, count)) };
    for segment in all.iter().filter(|segment| segment.fd >= 0) {
        close(segment.fd);
    }
}

fn close(fd: c_int) {
    // SAFETY: `close` takes a number and touches no memory. The array owns the descriptor: a
    // caller that takes it sets the segment's `fd` to -1, as the header requires.
    unsafe { libc::close(fd) };
}

/// Fails if a required pointer is NULL.
pub(crate) fn not_null<T>(pointer: *const T, what: &str) -> Result<()> {
    if pointer.is_null() { Err(Failure::new(Errno::FAULT, format!("{what} is NULL"))) } else { Ok(()) }
}
