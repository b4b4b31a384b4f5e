//! `load --trace`: a timeline for Perfetto (<https://ui.perfetto.dev>) and chrome://tracing.
//!
//! Uses the Trace Event Format: an object with `traceEvents`. Most events are complete events
//! (`"ph": "X"`) with times in microseconds; metadata events (`"ph": "M"`) name the rows. Events
//! of one kind that overlap are shown in different rows, so the number of rows for a kind is the
//! largest number of its events that were in progress at the same time.

use std::collections::BTreeMap;
use std::time::Duration;

use dmaload::{Report, TraceEvent, TraceKind};
use serde_json::{Value, json};

/// Converts a load's events to a timeline.
pub(crate) fn to_json(report: &Report) -> Value {
    let mut events = report.trace.clone();
    events.sort_by_key(|event| (event.kind, event.start, event.end));
    let mut rows = Rows::default();
    let mut out = Vec::new();
    for event in &events {
        out.push(complete_event(report, event, rows.assign(event)));
    }
    let names = rows.0.iter().flat_map(|(&kind, ends)| (0..ends.len()).map(move |row| (kind, row)));
    out.extend(names.map(|(kind, row)| {
        json!({ "ph": "M", "name": "thread_name", "pid": 1, "tid": thread_id(kind, row), "args": { "name": format!("{} {row}", kind.name()) } })
    }));
    out.push(json!({ "ph": "M", "name": "process_name", "pid": 1, "args": { "name": "dmaload" } }));
    json!({ "displayTimeUnit": "ms", "traceEvents": out })
}

fn complete_event(report: &Report, event: &TraceEvent, row: usize) -> Value {
    let file = report.files.get(event.file_index).map(|file| file.path.to_string_lossy());
    json!({
        "ph": "X",
        "name": format!("{} {}", event.kind.name(), event.segment),
        "cat": event.kind.name(),
        "pid": 1,
        "tid": thread_id(event.kind, row),
        "ts": microseconds(event.start),
        "dur": microseconds(event.end.saturating_sub(event.start)),
        "args": { "file": file, "segment": event.segment, "bytes": event.bytes },
    })
}

/// Returns the thread ID for a row, because the viewer shows one row per thread. All rows of one
/// kind have adjacent IDs.
fn thread_id(kind: TraceKind, row: usize) -> usize {
    let kind = [
        TraceKind::Allocate,
        TraceKind::Register,
        TraceKind::Read,
        TraceKind::Copy,
        TraceKind::Export,
        TraceKind::HandOver,
        TraceKind::FromCache,
    ]
    .iter()
    .position(|other| *other == kind)
    .unwrap_or(9);
    kind * 10_000 + row
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// For each kind, the end of the last event in each of its rows.
#[derive(Debug, Default)]
struct Rows(BTreeMap<TraceKind, Vec<Duration>>);

impl Rows {
    /// Assigns the event to the first row of its kind that is free when it begins. The events of
    /// one kind must be passed in order of their start times.
    fn assign(&mut self, event: &TraceEvent) -> usize {
        let ends = self.0.entry(event.kind).or_default();
        let free = ends.iter().position(|&end| end <= event.start);
        match free.and_then(|row| ends.get_mut(row).map(|end| (row, end))) {
            Some((row, end)) => {
                *end = event.end;
                row
            }
            None => {
                ends.push(event.end);
                ends.len() - 1
            }
        }
    }
}
