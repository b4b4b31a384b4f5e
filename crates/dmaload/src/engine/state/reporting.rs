//! A load's reports: events while it runs, its error, and the final report with its notes.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Instant;

use dmabuf::{AddressRange, PageCount, printable};
use rustix::io::Errno;

use super::DeferredDrop;
use super::{LoadShared, LoadState};
use crate::engine::event::Progress;
use crate::error::Error;
use crate::options::choices::Layout;
use crate::options::choices::Shard;
use crate::options::observer::Rejection;
use crate::ring::watch::Verdict;
use crate::ring::{Failure, Retried, TimedSpan, Times};
use crate::route::{Fallback, Route};
use crate::support::convert::to_usize;
use crate::support::errno;
use crate::support::foreign;
use crate::telemetry::metrics::increment;
use crate::telemetry::report::{FileReport, Report};
use crate::telemetry::trace::{TraceEvent, TraceKind};

/// The log and the report mention reads through the page cache only if they add up to at least
/// this many bytes.
const PAGE_CACHE_NOTE_BYTES: u64 = 1 << 30;
/// How many retries are noted individually. A dying disk causes thousands, but the first few are
/// enough.
const RETRIES_NOTED_MAX: usize = 8;

impl LoadShared {
    /// Records a fallback to a lower route, and emits an event about it.
    pub(crate) fn record_fallback(&self, fallback: Fallback) {
        self.emit_fallback(&fallback);
        increment(&self.counters.fallbacks);
        self.state().fallbacks.push(fallback);
    }

    /// Emits an event about a fallback to a lower route.
    pub(crate) fn emit_fallback(&self, fallback: &Fallback) {
        let path = fallback.file_index.and_then(|index| self.path(index)).map(|path| printable::path(path.as_path()).to_string());
        foreign::emit(|| {
            let errno = fallback.errno.describe();
            tracing::warn!(load = self.id.0, path, from = %fallback.from, to = %fallback.to, errno, "{}", fallback.reason());
        });
    }

    /// Adds a note to the report.
    pub(crate) fn note(&self, note: Option<String>) {
        self.state().notes.extend(note);
    }

    /// Notes that there is less staging than the load may use.
    pub(crate) fn note_less_staging(&self, bytes: u64, errno: Errno) {
        let errno = errno::describe(errno);
        foreign::emit(|| {
            let errno = errno.as_str();
            tracing::warn!(
                load = self.id.0,
                bytes,
                errno,
                "no memory for more staging buffers: fewer reads are in flight at once"
            );
        });
        let note = format!("no memory for more than {bytes} bytes of staging ({errno}): fewer reads were in flight at once");
        self.state().notes.push(note);
    }

    /// Notes that no thread could be started for the load's copies.
    pub(crate) fn note_missing_thread(&self) {
        let note = "no thread could be started to copy data: the ring thread copied it, and reads had to wait";
        foreign::emit(|| tracing::warn!(load = self.id.0, "{note}"));
        self.state().notes.push(note.to_owned());
    }

    /// Records a read that failed and will be retried. If the retry succeeds, the load does not
    /// fail, so the log, the metrics and the report are the only signs that a storage medium is
    /// failing.
    pub(crate) fn record_retry(&self, retried: &Retried) {
        let Retried { file, offset, bytes, errno } = *retried;
        let path = self.path(file).map(|path| printable::path(path.as_path()).to_string()).unwrap_or_default();
        let errno = errno::describe(errno);
        foreign::emit(|| {
            let (path, errno) = (path.as_str(), errno.as_str());
            tracing::warn!(load = self.id.0, path, offset, bytes, errno, "a read failed and will be retried once");
        });
        increment(&self.counters.retried_reads);
        let mut state = self.state();
        state.retried += 1;
        if state.retried <= RETRIES_NOTED_MAX {
            state.notes.push(format!("{path}: reading {bytes} bytes at offset {offset} failed once: {errno}"));
        }
    }

    /// Records an operation of the ring thread on a piece. The ring thread's clock started at
    /// `epoch`.
    pub(crate) fn record_trace(&self, number: usize, span: TimedSpan, epoch: Instant) {
        let mut state = self.state();
        if state.is_over() {
            return;
        }
        let (file_index, segment) = state.place_of(number).expect("the driver should fill only planned pieces");
        let (start, end) = (epoch + span.start, epoch + span.end);
        let event = self.event(span.kind, start, end, file_index, segment, span.bytes);
        state.trace.push(event);
    }

    pub(super) fn event(
        &self,
        kind: TraceKind,
        start: Instant,
        end: Instant,
        file_index: usize,
        segment: usize,
        bytes: u64,
    ) -> TraceEvent {
        let since = |moment: Instant| moment.saturating_duration_since(self.started);
        TraceEvent { kind, start: since(start), end: since(end), file_index, segment, bytes }
    }

    /// Fails the load for the reason that the driver reports.
    pub(crate) fn fail_for(&self, failure: Failure) -> DeferredDrop {
        let path = |file: usize| self.path(file).map(|path| path.as_ref().clone()).unwrap_or_default();
        let error = match failure {
            Failure::Read { file, offset, bytes, route, errno } => {
                Error::Read { path: path(file), offset, bytes, route, errno: errno::from_rustix(errno) }
            }
            Failure::Refused { file, offset, route, attempt, errno } => {
                Error::Refused { path: path(file), offset, route, attempt, errno: errno::from_rustix(errno) }
            }
            Failure::Rejected { file, offset, bytes } => {
                let observation = self.observation.as_ref().expect("only observers should reject bytes");
                match observation.watch.verdict() {
                    Verdict::Rejected(Rejection::Reason(reason)) => Error::Rejected { path: path(file), offset, bytes, reason },
                    Verdict::Rejected(Rejection::Corrupt { offset, bytes, expected, found, tensors }) => {
                        Error::Corrupt { path: path(file), offset, bytes, expected, found, tensors }
                    }
                    Verdict::Panicked { code, message } => {
                        let place = path(file);
                        let message = format!("{message} ({}: {bytes} bytes at offset {offset})", printable::path(&place));
                        Error::Panicked { code: code.to_owned(), message }
                    }
                    Verdict::NoThread => {
                        let reason = "no thread could be started to observe them".to_owned();
                        Error::Rejected { path: path(file), offset, bytes, reason }
                    }
                }
            }
            Failure::Kernel { errno } => Error::Ring { errno: errno::from_rustix(errno) },
            Failure::Staging { bytes, errno } => {
                let errno = errno::from_rustix(errno);
                self.memory_error(dmabuf::Error::new("allocate a staging buffer", to_usize(bytes), errno))
            }
            Failure::Memory { bytes, errno } => self.no_memory.get().cloned().unwrap_or_else(|| {
                let errno = errno::from_rustix(errno);
                self.memory_error(dmabuf::Error::new("start a thread that populates memory", to_usize(bytes), errno))
            }),
            Failure::Ended { file, offset, route } => {
                let planned_bytes = self.state().files.get(file).map_or(0, |file| file.planned.identity.bytes);
                Error::Ended { path: path(file), offset, planned_bytes, route }
            }
        };
        self.fail(error)
    }

    /// Returns the error for memory that could not be obtained.
    pub(crate) fn memory_error(&self, refusal: dmabuf::Error) -> Error {
        Error::Memory {
            heap: self.heap.to_string(),
            refusal,
            loaded_bytes: self.allocated_bytes.load(Ordering::Relaxed),
            planned_bytes: self.planned_bytes.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn progress(&self) -> Progress {
        Progress {
            planned_bytes: self.planned_bytes.load(Ordering::Relaxed),
            allocated_bytes: self.allocated_bytes.load(Ordering::Relaxed),
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
        }
    }

    fn notes(&self, state: &LoadState) -> Vec<String> {
        let mut notes = self.notes.to_vec();
        notes.extend(state.notes.iter().cloned());
        if state.retried > RETRIES_NOTED_MAX {
            notes.push(format!("further reads that failed once: {}", state.retried - RETRIES_NOTED_MAX));
        }
        if self.is_observed_in_staging() {
            notes.push(
                "this heap is uncached, so bytes were observed in staging buffers, and all reads went through them".to_owned(),
            );
        }
        if let Some(shard) = self.options.select.shard {
            let Shard { rank, world_size, dim } = shard;
            let whole = dim.map_or("the bytes of each file".to_owned(), |dim| format!("each tensor along dimension {dim}"));
            notes.push(format!("rank {rank} of {world_size} has read its share of {whole}"));
        }
        if let Some(cached_bytes) = filled_cache_bytes(state) {
            notes.push(format!(
                "up to {cached_bytes} bytes were read through the page cache, which keeps a second copy of them for now{}",
                if state.files.iter().any(|file| file.route == Route::UringBuffered) {
                    ", unless RWF_DONTCACHE works"
                } else {
                    ""
                }
            ));
        }
        if self.allocates_at_once && self.options.layout == Layout::Single {
            notes.push(
                "each file had a single allocation, so its reads began only after all of its memory was allocated".to_owned(),
            );
        }
        notes
    }

    pub(super) fn report(&self, state: &mut LoadState, times: Times) -> Report {
        let files = state.files.iter().zip(self.sources());
        let files = files.map(|(file, source)| FileReport {
            path: source.path.as_ref().clone(),
            bytes: file.planned.identity.bytes,
            route: file.route,
        });
        let mut trace = std::mem::take(&mut state.trace);
        trace.sort_by_key(|event| event.end);
        Report {
            bytes: self.planned_bytes.load(Ordering::Relaxed),
            wanted_bytes: state.files.iter().map(|file| file.planned.wanted_bytes).sum(),
            copied_bytes: state
                .plan
                .segments
                .iter()
                .filter_map(|segment| segment.moved.as_ref())
                .map(|moved| moved.end - moved.start)
                .sum(),
            cached_bytes: times.cached_bytes,
            segments: state.plan.segments.len(),
            memories: state.plan.memories.len(),
            total: self.started.elapsed(),
            allocating: state.allocating.total(),
            reading: times.reading,
            copying: times.copying,
            from_cache: times.from_cache,
            first_segment: state.first_segment,
            pages: if state.pages.seen_bytes > 0 { state.pages } else { pages_by_smaps(state.range.as_deref()) },
            pages_refused: state.pages_refused,
            reused_bytes: state.reused_bytes,
            heap: self.heap.to_string(),
            notes: self.notes(state),
            layout: self.options.layout,
            route: state.files.iter().map(|file| file.route).max().unwrap_or(self.starting_route()),
            fallbacks: merge_fallbacks(&state.fallbacks),
            measured: state.measured,
            verified: self.verified.get().cloned(),
            trace,
            files: files.collect(),
        }
    }
}

/// Returns how many bytes were read from files that were, at least in part, read through the page
/// cache; `None` if they are fewer than [`PAGE_CACHE_NOTE_BYTES`].
pub(super) fn filled_cache_bytes(state: &LoadState) -> Option<u64> {
    let cached = state.files.iter().filter(|file| !file.route.is_direct());
    let cached_bytes: u64 = cached.map(|file| file.planned.read_bytes).sum();
    (cached_bytes >= PAGE_CACHE_NOTE_BYTES).then_some(cached_bytes)
}

/// Counts huge pages in `/proc/self/smaps`, for kernels before Linux 6.7. This is expensive, so it
/// runs once, at the end of the load, rather than each time that memory is populated. Segments
/// that were dropped by then are not counted.
fn pages_by_smaps(range: Option<&AddressRange>) -> PageCount {
    let mut pages = PageCount::default();
    if let Some(range) = range {
        let start = range.base().addr().get();
        pages.add(dmabuf::huge_bytes_in(start..start + range.bytes()));
    }
    pages
}

/// Merges identical fallbacks for several files into one that names no file.
fn merge_fallbacks(fallbacks: &[Fallback]) -> Vec<Fallback> {
    let mut merged: Vec<Fallback> = Vec::new();
    let mut seen = HashMap::new();
    for fallback in fallbacks {
        let key = (fallback.from, fallback.to, fallback.attempt, fallback.errno.raw_os_error());
        match seen.get(&key).and_then(|&at: &usize| merged.get_mut(at)) {
            Some(first) => first.file_index = None,
            None => {
                seen.insert(key, merged.len());
                merged.push(fallback.clone());
            }
        }
    }
    merged
}
