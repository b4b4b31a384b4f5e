//! The progress of a load over time: bytes allocated, and bytes filled. Their difference is
//! bounded by the window.

use std::collections::HashMap;
use std::time::Duration;

use dmaload::{Report, TraceEvent, TraceKind};
use serde_json::{Value, json};

/// The maximum resolution of a curve. Consecutive points are at least 1/256 of the total bytes
/// apart, except for the last point, because a chart can't show more detail.
const POINTS: u64 = 256;

/// A step of a curve: a time in seconds, and the total number of bytes from that time on.
pub(crate) type Point = (f64, u64);

/// The two curves of a load.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Curves {
    /// Bytes allocated and populated.
    pub(crate) allocated: Vec<Point>,
    /// Bytes in their final place: read directly, or copied from staging or from the page cache.
    pub(crate) filled: Vec<Point>,
}

impl Curves {
    /// Computes the curves of a traced load.
    pub(crate) fn from_report(report: &Report) -> Self {
        let events: Vec<_> = report.trace.iter().map(Event::from).collect();
        let allocated = events.iter().filter(|event| event.kind == TraceKind::Allocate);
        Curves { allocated: curve(allocated), filled: curve(filling_events(&events)) }
    }

    /// The maximum number of bytes that were allocated but not yet filled.
    pub(crate) fn most_ahead_bytes(&self) -> u64 {
        let filled_at = |second: f64| self.filled.iter().rev().find(|point| point.0 <= second).map_or(0, |point| point.1);
        self.allocated.iter().map(|&(second, bytes)| bytes.saturating_sub(filled_at(second))).max().unwrap_or(0)
    }

    /// Converts the curves to JSON, for the line that reports the result of a run.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "allocated": self.allocated, "filled": self.filled })
    }

    /// Parses the result of [`Self::to_json`]. Returns `None` for anything else.
    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        let curve = |name: &str| -> Option<Vec<Point>> {
            let points = value.get(name)?.as_array()?.iter();
            points.map(|point| Some((point.get(0)?.as_f64()?, point.get(1)?.as_u64()?))).collect()
        };
        Some(Curves { allocated: curve("allocated")?, filled: curve("filled")? })
    }
}

/// The fields of a [`TraceEvent`] that the curves need.
#[derive(Debug, Clone, Copy)]
struct Event {
    kind: TraceKind,
    start: Duration,
    end: Duration,
    segment: usize,
    bytes: u64,
}

impl From<&TraceEvent> for Event {
    fn from(&TraceEvent { kind, start, end, segment, bytes, .. }: &TraceEvent) -> Self {
        Event { kind, start, end, segment, bytes }
    }
}

/// Selects the events that put bytes into their final place: copies from staging or from the page
/// cache, and reads that are not followed by a copy. A load can contain both, because it may stage
/// only some of its reads.
fn filling_events(events: &[Event]) -> Vec<&Event> {
    let of_kind = |kind| events.iter().filter(move |event| event.kind == kind);
    let mut filling: Vec<_> = of_kind(TraceKind::Copy).chain(of_kind(TraceKind::FromCache)).collect();
    let mut reads: HashMap<_, Vec<&Event>> = HashMap::new();
    for read in of_kind(TraceKind::Read) {
        reads.entry((read.segment, read.bytes)).or_default().push(read);
    }
    reads.values_mut().for_each(|reads| reads.sort_by_key(|read| read.end));
    for copy in of_kind(TraceKind::Copy) {
        // A copy belongs to the last read with the same segment and size that completed before
        // the copy began.
        let same = reads.get_mut(&(copy.segment, copy.bytes));
        if let Some((reads, at)) = same.and_then(|reads| {
            let at = reads.partition_point(|read| read.end <= copy.start).checked_sub(1)?;
            Some((reads, at))
        }) {
            reads.remove(at);
        }
    }
    filling.extend(reads.into_values().flatten());
    filling
}

/// Adds up the bytes of the events in the order in which the events end, and drops points that are
/// too close together.
fn curve<'a>(events: impl IntoIterator<Item = &'a Event>) -> Vec<Point> {
    let mut ends: Vec<_> = events.into_iter().map(|event| (event.end, event.bytes)).collect();
    ends.sort_unstable();
    let total: u64 = ends.iter().map(|&(_, bytes)| bytes).sum();
    let (mut sum, mut shown) = (0, 0);
    let mut points = Vec::new();
    for (end, bytes) in ends {
        sum += bytes;
        if sum - shown >= total / POINTS || sum == total {
            points.push((end.as_secs_f64(), sum));
            shown = sum;
        }
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;
    use dmaload::{LoadOptions, Loader};

    #[test]
    fn both_curves_of_a_load_end_at_its_length() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("file");
        let bytes = 40 << 20;
        std::fs::write(&path, vec![1; bytes]).unwrap();
        for route in [dmaload::Route::UringFixedDirect, dmaload::Route::Bounce] {
            let loader =
                Loader::builder().load_options(LoadOptions::new().segment_bytes(8 << 20)).window_bytes(16 << 20).build().unwrap();
            let options = loader.load_options().route(route).cache(dmaload::Cache::Bypass).trace(true);
            let image = crate::engine::block_on(async { loader.load(&path).options(options).await }).unwrap().unwrap();
            let curves = Curves::from_report(image.report());
            for curve in [&curves.allocated, &curves.filled] {
                assert_eq!(curve.last().unwrap().1, bytes as u64, "{route}");
                assert!(curve.windows(2).all(|pair| pair[0].0 <= pair[1].0 && pair[0].1 < pair[1].1), "{curve:?}");
            }
            assert!(curves.filled.last().unwrap().0 >= curves.allocated.last().unwrap().0);
            assert!((1..=16 << 20).contains(&curves.most_ahead_bytes()), "{}", curves.most_ahead_bytes());
            assert_eq!(Curves::from_json(&curves.to_json()), Some(curves));
        }
    }

    #[test]
    fn bytes_of_mixed_direct_and_staged_reads_count_once() {
        let event = |kind, start, end, segment| Event {
            kind,
            start: Duration::from_millis(start),
            end: Duration::from_millis(end),
            segment,
            bytes: 10,
        };
        let (read, copy) = (TraceKind::Read, TraceKind::Copy);
        // Segment 0 has a direct read and a staged read. Segment 1 has a staged read and a cached
        // chunk.
        let trace = [
            event(read, 0, 1000, 0),
            event(read, 0, 2000, 0),
            event(copy, 2000, 3000, 0),
            event(read, 0, 4000, 1),
            event(copy, 4500, 5000, 1),
            event(TraceKind::FromCache, 5000, 6000, 1),
        ];
        assert_eq!(curve(filling_events(&trace)), [(1.0, 10), (3.0, 20), (5.0, 30), (6.0, 40)]);
    }

    #[test]
    fn most_ahead_is_the_largest_gap_between_the_curves() {
        let curves = Curves { allocated: vec![(0.1, 10), (0.2, 20)], filled: vec![(0.15, 4), (0.3, 20)] };
        assert_eq!(curves.most_ahead_bytes(), 16);
        assert_eq!(Curves::default().most_ahead_bytes(), 0);
        assert_eq!(Curves::from_json(&json!({ "allocated": 3 })), None);
    }
}
