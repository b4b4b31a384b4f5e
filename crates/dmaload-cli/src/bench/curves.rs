//! How far a load was, over time: bytes that had memory, and bytes that were there. What lies between the two is the window.

use dmaload::{Report, TraceEvent, TraceKind};
use serde_json::{Value, json};

/// Points of a curve are no closer than the total by this number: a picture shows no more.
const POINTS: u64 = 256;

/// A step of a curve: from this second on, so many bytes.
pub(crate) type Point = (f64, u64);

/// Two curves of one load.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Curves {
    /// Allocated and populated.
    pub(crate) allocated: Vec<Point>,
    /// Read; where reads go through staging, copied.
    pub(crate) filled: Vec<Point>,
}

impl Curves {
    /// Those of a load that was traced.
    pub(crate) fn of(report: &Report) -> Self {
        let bounced = report.trace.iter().any(|event| event.kind == TraceKind::Copy);
        let fills = if bounced { TraceKind::Copy } else { TraceKind::Read };
        Curves { allocated: curve(&report.trace, TraceKind::Allocate), filled: curve(&report.trace, fills) }
    }

    /// The most bytes that had memory and were not there yet.
    pub(crate) fn most_ahead_bytes(&self) -> u64 {
        let filled_at = |second: f64| self.filled.iter().rev().find(|point| point.0 <= second).map_or(0, |point| point.1);
        self.allocated.iter().map(|&(second, bytes)| bytes.saturating_sub(filled_at(second))).max().unwrap_or(0)
    }

    /// For the line that a run tells.
    pub(crate) fn to_json(&self) -> Value {
        json!({ "allocated": self.allocated, "filled": self.filled })
    }

    /// What [`Self::to_json`] has made; `None` of anything else.
    pub(crate) fn from_json(value: &Value) -> Option<Self> {
        let curve = |name: &str| -> Option<Vec<Point>> {
            let points = value.get(name)?.as_array()?.iter();
            points.map(|point| Some((point.get(0)?.as_f64()?, point.get(1)?.as_u64()?))).collect()
        };
        Some(Curves { allocated: curve("allocated")?, filled: curve("filled")? })
    }
}

/// The sum of the bytes of these events, at the end of each.
fn curve(trace: &[TraceEvent], kind: TraceKind) -> Vec<Point> {
    let mut ends: Vec<_> = trace.iter().filter(|event| event.kind == kind).map(|event| (event.end, event.bytes)).collect();
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
    use dmaload::Loader;

    #[test]
    fn a_load_has_two_curves_that_end_with_all_its_bytes() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("file");
        let bytes = 40 << 20;
        std::fs::write(&path, vec![1; bytes]).unwrap();
        for route in [dmaload::Route::UringFixedDirect, dmaload::Route::Bounce] {
            let loader = Loader::builder().segment_bytes(8 << 20).window_bytes(16 << 20).build().unwrap();
            let options = loader.options().route(route).trace(true);
            let image = crate::block_on(async { loader.load_with([&path], options).await }).unwrap().unwrap();
            let curves = Curves::of(image.report());
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
    fn a_curve_of_many_events_has_no_more_points_than_a_picture_shows() {
        let curves = Curves { allocated: vec![(0.1, 10), (0.2, 20)], filled: vec![(0.15, 4), (0.3, 20)] };
        assert_eq!(curves.most_ahead_bytes(), 16);
        assert_eq!(Curves::default().most_ahead_bytes(), 0);
        assert_eq!(Curves::from_json(&json!({ "allocated": 3 })), None);
    }
}
