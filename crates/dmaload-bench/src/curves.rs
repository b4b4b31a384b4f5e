//! The progress of a load over time: bytes allocated, and bytes filled. The difference is bounded
//! by the window.

use std::collections::HashMap;
use std::time::Duration;

use dmaload::{Report, TraceEvent, TraceKind};
use serde_json::{Value, json};

/// Minimum distance between the points of a curve, as a fraction of the total: a chart shows no
/// more.
const POINTS: u64 = 256;

/// A step of a curve: the time in seconds, and the number of bytes from then on.
pub(crate) type Point = (f64, u64);

/// The two curves of a load.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Curves {
    /// Bytes allocated and populated.
    pub(crate) allocated: Vec<Point>,
    /// Bytes read; for staged reads, bytes copied.
    pub(crate) filled: Vec<Point>,
}

impl Curves {
    /// The curves of a traced load.
    pub(crate) fn from_report(report: &Report) -> Self {
        let events: Vec<_> = report.trace.iter().map(Event::from).collect();
        let allocated = events.iter().filter(|event| event.kind == TraceKind::Allocate);
        Curves { allocated: curve(allocated), filled: curve(filling(&events)) }
    }

    /// The maximum number of bytes that were allocated but not yet filled.
    pub(crate) fn most_ahead_bytes(&self) -> u64 {
        let filled_at = |second: f64| self.filled.iter().rev().find(|point| point.0 <= second).map_or(0, |point| point.1);
        self.allocated.iter().map(|&(second, bytes)| bytes.saturating_sub(filled_at(second))).max().unwrap_or(0)
    }

    /// The curves as JSON, for the line that a run reports.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "allocated": self.allocated, "filled": self.filled })
    }

    /// Parses the result of [`Self::to_json`]; `None` for anything else.
    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        let curve = |name: &str| -> Option<Vec<Point>> {
            let points = value.get(name)?.as_array()?.iter();
            points.map(|point| Some((point.get(0)?.as_f64()?, point.get(1)?.as_u64()?))).collect()
        };
        Some(Curves { allocated: curve("allocated")?, filled: curve("filled")? })
    }
}

/// A part of a curve.
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

/// The events that put bytes into their final place: copies, and reads without a subsequent copy.
/// A load may have staged only some of its reads.
fn filling(events: &[Event]) -> Vec<&Event> {
    let of = |kind| events.iter().filter(move |event| event.kind == kind);
    let mut filling: Vec<_> = of(TraceKind::Copy).chain(of(TraceKind::FromCache)).collect();
    let mut reads: HashMap<_, Vec<&Event>> = HashMap::new();
    for read in of(TraceKind::Read) {
        reads.entry((read.segment, read.bytes)).or_default().push(read);
    }
    reads.values_mut().for_each(|reads| reads.sort_by_key(|read| read.end));
    for copy in of(TraceKind::Copy) {
        // The last read before it, because a copy begins when its read has completed.
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

/// The cumulative bytes at the end of each event.
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
        let at = |kind, start, end, segment| Event {
            kind,
            start: Duration::from_millis(start),
            end: Duration::from_millis(end),
            segment,
            bytes: 10,
        };
        let (read, copy) = (TraceKind::Read, TraceKind::Copy);
        // Direct, staged, and staged in a segment that also has direct reads.
        let trace = [
            at(read, 0, 1000, 0),
            at(read, 0, 2000, 0),
            at(copy, 2000, 3000, 0),
            at(read, 0, 4000, 1),
            at(copy, 4500, 5000, 1),
            at(TraceKind::FromCache, 5000, 6000, 1),
        ];
        assert_eq!(curve(filling(&trace)), [(1.0, 10), (3.0, 20), (5.0, 30), (6.0, 40)]);
    }

    #[test]
    fn curve_of_many_events_has_at_most_a_pictures_points() {
        let curves = Curves { allocated: vec![(0.1, 10), (0.2, 20)], filled: vec![(0.15, 4), (0.3, 20)] };
        assert_eq!(curves.most_ahead_bytes(), 16);
        assert_eq!(Curves::default().most_ahead_bytes(), 0);
        assert_eq!(Curves::from_json(&json!({ "allocated": 3 })), None);
    }
}
