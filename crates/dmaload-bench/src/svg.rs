//! Drawing helpers for both halves of the chart: lines, text and the time scale.

use std::fmt::Write as _;

pub(crate) const WIDTH: f64 = 860.0;
const RIGHT: f64 = 230.0;
/// The approximate number of ticks.
const TICKS: f64 = 6.0;

/// Maps seconds to x coordinates.
pub(crate) struct Scale {
    pub(crate) left: f64,
    pub(crate) most: f64,
}

impl Scale {
    pub(crate) fn x(&self, seconds: f64) -> f64 {
        self.left + (WIDTH - self.left - RIGHT) * seconds / self.most
    }

    /// Returns the distance between ticks, in seconds: 1, 2 or 5 times a power of ten.
    fn step(&self) -> f64 {
        let rough = self.most / TICKS;
        let power = 10_f64.powf(rough.log10().floor());
        let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= rough).unwrap_or(10.0);
        factor * power
    }

    /// Draws vertical lines from `top` to `floor`, labeled in seconds.
    pub(crate) fn draw_ticks(&self, svg: &mut String, top: f64, floor: f64) {
        let step = self.step();
        let digits = if step < 0.01 {
            3
        } else if step < 0.1 {
            2
        } else if step < 1.0 {
            1
        } else {
            0
        };
        let mut tick = 0_u32;
        while f64::from(tick) * step <= self.most * 1.0001 {
            let seconds = f64::from(tick) * step;
            let x = self.x(seconds);
            line(svg, (x, top - 4.0), (x, floor + 4.0), "stroke=\"#ddd\"");
            let style = "text-anchor=\"middle\" fill=\"#666\" font-size=\"12\"";
            text(svg, x, floor + 18.0, style, &format!("{seconds:.digits$}"));
            tick += 1;
        }
    }
}

pub(crate) fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), style: &str) {
    let _ = writeln!(svg, "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {style}/>", from.0, from.1, to.0, to.1);
}

pub(crate) fn text(svg: &mut String, x: f64, y: f64, style: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{text}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        for (most, step) in [(0.29, 0.05), (3.0, 0.5), (3.1, 1.0), (9.0, 2.0), (60.0, 10.0)] {
            assert!((Scale { left: 0.0, most }.step() - step).abs() < 1e-9, "{most}");
        }
    }
}
