//! The results as a picture: one load over time, then a bar for each mode, whiskers from its quickest to its slowest run, a line at the limit.

use std::fmt::Write as _;

use super::mode::Mode;
use super::panel;
use super::results::{ModeRuns, Results};
use super::stats::Spread;
use crate::summary::bytes;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 140.0;
const RIGHT: f64 = 230.0;
const TOP: f64 = 64.0;
const ROW: f64 = 34.0;
const BAR: f64 = 20.0;
const BOTTOM: f64 = 46.0;
/// About as many ticks as that.
const TICKS: f64 = 6.0;

/// An SVG of its own.
pub(crate) fn svg(results: &Results) -> String {
    let height = TOP + ROW * results.modes.len() as f64 + BOTTOM;
    let most = results.modes.iter().filter_map(ModeRuns::seconds).map(|seconds| seconds.max).fold(0.0, f64::max);
    let scale = Scale { left: LEFT, most: if most > 0.0 { most } else { 1.0 } };
    let curves = results.of(Mode::DirectIo).and_then(ModeRuns::median_run).and_then(|run| Some((run, run.curves.as_ref()?)));
    let above = if curves.is_some() { panel::HEIGHT } else { 0.0 };
    let whole = height + above;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {whole}\" width=\"{WIDTH}\" height=\"{whole}\" \
         font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    if let Some((run, curves)) = curves {
        panel::draw(&mut svg, curves, run.seconds, results.file_bytes);
    }
    let _ = writeln!(svg, "<g transform=\"translate(0 {above})\">");
    let size = bytes(results.file_bytes);
    let pressure = results.pressure.as_ref().map(|pressure| format!(", {pressure}")).unwrap_or_default();
    text(
        &mut svg,
        16.0,
        26.0,
        "font-size=\"16\" font-weight=\"bold\"",
        &format!("Loading {size} from a {} file{pressure}", if results.warm { "cached" } else { "cold" }),
    );
    let rounds = format!("seconds, median of {} rounds with the quickest and the slowest; less is better", results.rounds);
    text(&mut svg, 16.0, 46.0, "fill=\"#666\"", &rounds);
    scale.ticks(&mut svg, TOP, height - BOTTOM);
    let rows = || results.modes.iter().enumerate().map(|(row, runs)| (TOP + ROW * (row as f64 + 0.5), runs));
    for (middle, runs) in rows() {
        bar(&mut svg, &scale, middle, runs);
    }
    if let Some(limit) = results.of(Mode::Limit).and_then(ModeRuns::seconds) {
        limit_line(&mut svg, scale.x(limit.median), height);
    }
    // Above everything else.
    for (middle, runs) in rows() {
        label(&mut svg, &scale, middle, results, runs);
    }
    svg.push_str("</g>\n</svg>\n");
    svg
}

/// From seconds to places.
pub(super) struct Scale {
    pub(super) left: f64,
    pub(super) most: f64,
}

impl Scale {
    pub(super) fn x(&self, seconds: f64) -> f64 {
        self.left + (WIDTH - self.left - RIGHT) * seconds / self.most
    }

    /// A round distance between ticks: 1, 2 or 5 times a power of ten.
    fn step(&self) -> f64 {
        let rough = self.most / TICKS;
        let power = 10_f64.powf(rough.log10().floor());
        let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= rough).unwrap_or(10.0);
        factor * power
    }

    /// Lines from `top` to `floor`, and their seconds below.
    pub(super) fn ticks(&self, svg: &mut String, top: f64, floor: f64) {
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

fn bar(svg: &mut String, scale: &Scale, middle: f64, runs: &ModeRuns) {
    text(svg, LEFT - 10.0, middle + 4.5, "text-anchor=\"end\"", runs.mode.name());
    let Some(Spread { median, min, max }) = runs.seconds() else { return };
    let (top, width, color) = (middle - BAR / 2.0, scale.x(median) - LEFT, color(runs.mode));
    let _ = writeln!(svg, "<rect x=\"{LEFT}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"2\" fill=\"{color}\"/>");
    let (from, to) = (scale.x(min), scale.x(max));
    let end = |x| ((x, middle - 5.0), (x, middle + 5.0));
    for (start, end) in [((from, middle), (to, middle)), end(from), end(to)] {
        line(svg, start, end, "stroke=\"#222\" stroke-width=\"1.3\"");
    }
}

fn limit_line(svg: &mut String, x: f64, height: f64) {
    let style = "stroke=\"#c0392b\" stroke-width=\"1.5\" stroke-dasharray=\"5 3\"";
    line(svg, (x, TOP - 4.0), (x, height - BOTTOM + 4.0), style);
    text(svg, x + 5.0, height - BOTTOM + 34.0, "fill=\"#c0392b\" font-size=\"12\"", "the device's limit");
}

fn label(svg: &mut String, scale: &Scale, middle: f64, results: &Results, runs: &ModeRuns) {
    let Some(Spread { median, max, .. }) = runs.seconds() else {
        text(svg, LEFT + 6.0, middle + 4.5, "fill=\"#c0392b\"", "failed");
        return;
    };
    let ratio =
        results.ratio(Mode::Normal, runs.mode).map(|ratio| format!(" · {:.1} × normal", ratio.median)).unwrap_or_default();
    // A white edge keeps it readable over the lines.
    let style = "paint-order=\"stroke\" stroke=\"#fff\" stroke-width=\"4\"";
    text(svg, scale.x(max) + 9.0, middle + 4.5, style, &format!("{median:.2} s{ratio}"));
}

/// The engine stands out, the limit is what it is held against, everything else is background.
fn color(mode: Mode) -> &'static str {
    match mode {
        Mode::DirectIo | Mode::DirectIoCheck | Mode::PreadDirect | Mode::Reuse | Mode::Swap | Mode::AtOnce | Mode::Verify => {
            "#2471a3"
        }
        Mode::Limit => "#e6b0aa",
        Mode::NoOverlap => "#7fb3d5",
        Mode::Normal | Mode::NormalIo | Mode::Mmap | Mode::TokioFs | Mode::Peer(_) => "#aeb6bf",
    }
}

pub(super) fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), style: &str) {
    let _ = writeln!(svg, "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {style}/>", from.0, from.1, to.0, to.1);
}

pub(super) fn text(svg: &mut String, x: f64, y: f64, style: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{text}</text>");
}

#[cfg(test)]
mod tests {
    use super::super::curves::Curves;
    use super::super::results::Run;
    use super::super::results::tests::{killed, results, run};
    use super::*;

    #[test]
    fn every_mode_has_a_bar_or_is_said_to_have_failed() {
        let measured = results(vec![
            (Mode::Normal, vec![run(2.0), run(3.0), run(2.5)]),
            (Mode::DirectIo, vec![run(0.5), run(0.5), run(0.5)]),
            (Mode::Limit, vec![run(0.25), run(0.25), run(0.25)]),
            (Mode::Mmap, vec![killed(), killed(), killed()]),
        ]);
        let svg = svg(&measured);
        assert_eq!(svg.matches("<rect x=").count(), 3);
        assert!(svg.contains(">failed<") && svg.contains(">0.50 s · 5.0 × normal<"), "{svg}");
        assert!(svg.contains(">the device's limit<"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn a_load_that_was_traced_is_drawn_over_time() {
        let curves = Curves { allocated: vec![(0.1, 1 << 30), (0.2, 2 << 30)], filled: vec![(0.3, 1 << 30), (0.5, 2 << 30)] };
        let traced = run(0.5).map(|run| Run { curves: Some(curves), ..run });
        let svg = svg(&results(vec![(Mode::DirectIo, vec![traced])]));
        assert_eq!((svg.matches("<polyline ").count(), svg.matches("<polygon ").count()), (2, 1));
        assert!(svg.contains("at most 2.00 GiB") && !svg.contains("NaN"), "{svg}");
    }

    #[test]
    fn nothing_measured_makes_a_picture_too() {
        let svg = svg(&results(vec![(Mode::Normal, vec![killed()])]));
        assert!(svg.contains("failed") && !svg.contains("NaN"), "{svg}");
    }

    #[test]
    fn ticks_are_round() {
        for (most, step) in [(0.29, 0.05), (3.0, 0.5), (3.1, 1.0), (9.0, 2.0), (60.0, 10.0)] {
            assert!((Scale { left: 0.0, most }.step() - step).abs() < 1e-9, "{most}");
        }
    }
}
