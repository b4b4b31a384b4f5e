//! What is told of a load at its end: the report, and its notes.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use dmabuf::{AddressRange, PageCount};

use super::{LoadShared, RETRIES_TOLD, State};
use crate::plan::Layout;
use crate::report::{FileReport, Report, cpu_time, peak_resident_bytes};
use crate::ring::Times;
use crate::route::{Fallback, Route};
use crate::select::Shard;

/// Loads through the page cache from this size on say that they fill it.
const PAGE_CACHE_BYTES_TOLD: u64 = 1 << 30;

impl LoadShared {
    fn notes(&self, state: &State) -> Vec<String> {
        let mut notes = self.notes.to_vec();
        notes.extend(state.notes.iter().cloned());
        if state.retried > RETRIES_TOLD {
            notes.push(format!("{} more reads failed once", state.retried - RETRIES_TOLD));
        }
        if self.is_observed_in_staging() {
            notes.push(
                "this heap is not cached by the CPU: bytes were observed in staging, so all of them were bounced".to_owned(),
            );
        }
        if let Some(shard) = self.options.select.shard {
            let Shard { rank, world_size, dim } = shard;
            let of = dim.map_or("the bytes of each file".to_owned(), |dim| format!("each tensor along dimension {dim}"));
            notes.push(format!("this is part {rank} of {world_size} of {of}"));
        }
        let there = state.files.iter().filter(|file| file.planned.cached);
        let there_bytes: u64 = there.map(|file| file.planned.read_bytes).sum();
        if there_bytes > 0 {
            notes.push(format!("{there_bytes} bytes were in the page cache already, and were copied from there"));
        }
        let cached = state.files.iter().filter(|file| file.route == Route::Buffered && !file.planned.cached);
        let cached_bytes: u64 = cached.map(|file| file.planned.read_bytes).sum();
        if cached_bytes >= PAGE_CACHE_BYTES_TOLD {
            tracing::warn!(load = self.id.0, cached_bytes, "the page cache was filled with what was loaded");
            notes.push(format!(
                "{cached_bytes} bytes were read through the page cache, which keeps a second copy of them for now"
            ));
        }
        if self.allocates_at_once && self.options.layout == Layout::Single {
            notes.push("the memory of a whole file was one allocation, so nothing was read while it was being made".to_owned());
        }
        notes
    }

    pub(super) fn report(&self, state: &mut State, times: Times) -> Report {
        let files = state.files.iter().zip(self.sources());
        let files = files.map(|(file, source)| FileReport {
            path: source.path.as_ref().clone(),
            bytes: file.planned.identity.bytes,
            route: file.route,
        });
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
            segments: state.plan.segments.len(),
            memories: state.plan.memories.len(),
            total: self.started.elapsed(),
            allocating: state.allocating.total(),
            reading: times.reading,
            copying: times.copying,
            first_segment: state.first_segment,
            cpu: cpu_time().saturating_sub(self.cpu_before),
            peak_resident_bytes: peak_resident_bytes(),
            pages: if state.pages.seen_bytes > 0 { state.pages } else { pages_by_smaps(state.range.as_deref()) },
            pages_refused: state.pages_refused,
            reused_bytes: state.reused_bytes,
            heap: self.heap.to_string(),
            notes: self.notes(state),
            layout: self.options.layout,
            route: state.files.iter().map(|file| file.route).max().unwrap_or(self.options.route),
            fallbacks: merged(&state.fallbacks),
            verified: self.options.verify.as_ref().map(|verify| verify.0.describe()),
            trace: std::mem::take(&mut state.trace),
            files: files.collect(),
        }
    }
}

/// Before Linux 6.7 looking is expensive: once a load, not once a piece. Segments that were dropped by then are not seen.
fn pages_by_smaps(range: Option<&AddressRange>) -> PageCount {
    let mut pages = PageCount::default();
    if let Some(range) = range {
        let start = range.base().addr().get();
        pages.add(dmabuf::huge_bytes_in(start..start + range.bytes()));
    }
    pages
}

/// The same step of many files is one line, without a file.
fn merged(fallbacks: &[Fallback]) -> Vec<Fallback> {
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
