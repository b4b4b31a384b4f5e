//! Draws the upper half of the chart, which shows one load over time.

use std::fmt::Write as _;

use dmaload_text::bytes;

use crate::curves::{Curves, Point};
use crate::svg::{Scale, line, text};

/// The height of the panel, including the title and the axis.
pub(crate) const HEIGHT: f64 = 320.0;
const LEFT: f64 = 90.0;
const TOP: f64 = 66.0;
const FLOOR: f64 = 260.0;

const ALLOCATED: &str = "#d68910";
const FILLED: &str = "#2471a3";

/// Draws the curves of a load of `file_bytes` bytes that took `seconds`.
pub(crate) fn draw(svg: &mut String, curves: &Curves, seconds: f64, file_bytes: u64) {
    // Memory is allocated in whole pages, so the allocated memory may be larger than the file.
    let most = curves.allocated.last().map_or(0, |point| point.1).max(file_bytes).max(1) as f64;
    let scale = Scale { left: LEFT, most: seconds };
    let place = |&(second, bytes): &Point| (scale.x(second.min(seconds)), FLOOR - (FLOOR - TOP) * bytes as f64 / most);
    let title = format!("One load of {} (direct_io, the median run)", bytes(file_bytes));
    text(svg, 16.0, 26.0, "font-size=\"16\" font-weight=\"bold\"", &title);
    let ahead = bytes(curves.most_ahead_bytes());
    let caption =
        format!("bytes over time (s); the band between the curves is memory allocated but not yet filled, at most {ahead}");
    text(svg, 16.0, 46.0, "fill=\"#666\"", &caption);
    for part in 0..=4_u32 {
        let share = f64::from(part) / 4.0;
        let y = FLOOR - (FLOOR - TOP) * share;
        line(svg, (LEFT, y), (scale.x(seconds), y), "stroke=\"#ddd\"");
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "labels show whole bytes")]
        let label = bytes((most * share) as u64);
        text(svg, LEFT - 8.0, y + 4.0, "text-anchor=\"end\" fill=\"#666\" font-size=\"12\"", &label);
    }
    scale.draw_ticks(svg, TOP, FLOOR);
    let steps = |points: &[Point]| -> Vec<(f64, f64)> {
        let mut path = vec![place(&(0.0, 0))];
        for point in points {
            let (x, y) = place(point);
            let before = path.last().map_or(FLOOR, |&(_, y)| y);
            path.extend([(x, before), (x, y)]);
        }
        let end = path.last().map_or(FLOOR, |&(_, y)| y);
        path.push((scale.x(seconds), end));
        path
    };
    let (allocated, filled) = (steps(&curves.allocated), steps(&curves.filled));
    let band = allocated.iter().chain(filled.iter().rev());
    draw_shape(svg, "polygon", band, &format!("fill=\"{ALLOCATED}\" fill-opacity=\"0.18\" stroke=\"none\""));
    for (path, color) in [(&allocated, ALLOCATED), (&filled, FILLED)] {
        draw_shape(svg, "polyline", path.iter(), &format!("fill=\"none\" stroke=\"{color}\" stroke-width=\"1.8\""));
    }
    for (row, (color, what)) in [(ALLOCATED, "allocated"), (FILLED, "read")].into_iter().enumerate() {
        let y = TOP + 14.0 + 20.0 * row as f64;
        line(svg, (LEFT + 14.0, y), (LEFT + 40.0, y), &format!("stroke=\"{color}\" stroke-width=\"3\""));
        text(svg, LEFT + 48.0, y + 4.5, "", what);
    }
}

fn draw_shape<'a>(svg: &mut String, kind: &str, points: impl Iterator<Item = &'a (f64, f64)>, style: &str) {
    let _ = write!(svg, "<{kind} points=\"");
    for (x, y) in points {
        let _ = write!(svg, "{x:.1},{y:.1} ");
    }
    let _ = writeln!(svg, "\" {style}/>");
}
