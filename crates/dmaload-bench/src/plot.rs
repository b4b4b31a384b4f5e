//! Draws the results as a chart. The upper half shows one load over time. The lower half has a bar
//! for each mode, with whiskers from its fastest to its slowest run, and a line at the limit.

use std::fmt::Write as _;

use dmaload_text::bytes;

use crate::mode::Mode;
use crate::panel;
use crate::results::{ModeRuns, Results};
use crate::stats::Spread;
use crate::svg::{Scale, WIDTH, line, text};

const LEFT: f64 = 140.0;
const TOP: f64 = 64.0;
const ROW: f64 = 34.0;
const BAR: f64 = 20.0;
const BOTTOM: f64 = 46.0;

/// Draws the results as a complete SVG document.
pub(crate) fn svg(results: &Results) -> String {
    let height = TOP + ROW * results.modes.len() as f64 + BOTTOM;
    let most = results.modes.iter().filter_map(ModeRuns::seconds).map(|seconds| seconds.max).fold(0.0, f64::max);
    let scale = Scale { left: LEFT, most: if most > 0.0 { most } else { 1.0 } };
    let curves = results.runs_of(Mode::DirectIo).and_then(ModeRuns::median_run).and_then(|run| Some((run, run.curves.as_ref()?)));
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
    let rounds = format!("seconds (median of {} rounds, with the fastest and the slowest); lower is better", results.rounds);
    text(&mut svg, 16.0, 46.0, "fill=\"#666\"", &rounds);
    scale.draw_ticks(&mut svg, TOP, height - BOTTOM);
    let rows = || results.modes.iter().enumerate().map(|(row, runs)| (TOP + ROW * (row as f64 + 0.5), runs));
    for (middle, runs) in rows() {
        draw_bar(&mut svg, &scale, middle, runs);
    }
    if let Some(limit) = results.runs_of(Mode::Limit).and_then(ModeRuns::seconds) {
        draw_limit_line(&mut svg, scale.x(limit.median), height);
    }
    // Labels come last, so they are drawn on top of everything else.
    for (middle, runs) in rows() {
        draw_label(&mut svg, &scale, middle, results, runs);
    }
    svg.push_str("</g>\n</svg>\n");
    svg
}

fn draw_bar(svg: &mut String, scale: &Scale, middle: f64, runs: &ModeRuns) {
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

fn draw_limit_line(svg: &mut String, x: f64, height: f64) {
    let style = "stroke=\"#c0392b\" stroke-width=\"1.5\" stroke-dasharray=\"5 3\"";
    line(svg, (x, TOP - 4.0), (x, height - BOTTOM + 4.0), style);
    text(svg, x + 5.0, height - BOTTOM + 34.0, "fill=\"#c0392b\" font-size=\"12\"", "the device's limit");
}

fn draw_label(svg: &mut String, scale: &Scale, middle: f64, results: &Results, runs: &ModeRuns) {
    let Some(Spread { median, max, .. }) = runs.seconds() else {
        text(svg, LEFT + 6.0, middle + 4.5, "fill=\"#c0392b\"", "failed");
        return;
    };
    let ratio =
        results.ratio(Mode::Normal, runs.mode).map(|ratio| format!(" · {:.1} × normal", ratio.median)).unwrap_or_default();
    // A white outline keeps the text readable where it crosses lines.
    let style = "paint-order=\"stroke\" stroke=\"#fff\" stroke-width=\"4\"";
    text(svg, scale.x(max) + 9.0, middle + 4.5, style, &format!("{median:.2} s{ratio}"));
}

/// Returns the color of a mode's bar: blue for the engine, light blue for `no-overlap`, light red
/// for the limit, and gray for everything else.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::curves::Curves;
    use crate::results::Run;
    use crate::results::tests::{killed, results, run};

    #[test]
    fn every_mode_has_a_bar_or_is_reported_as_failed() {
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
    fn traced_load_is_drawn_over_time() {
        let curves = Curves { allocated: vec![(0.1, 1 << 30), (0.2, 2 << 30)], filled: vec![(0.3, 1 << 30), (0.5, 2 << 30)] };
        let traced = run(0.5).map(|run| Run { curves: Some(curves), ..run });
        let svg = svg(&results(vec![(Mode::DirectIo, vec![traced])]));
        assert_eq!((svg.matches("<polyline ").count(), svg.matches("<polygon ").count()), (2, 1));
        assert!(svg.contains("at most 2.00 GiB") && !svg.contains("NaN"), "{svg}");
    }

    #[test]
    fn results_without_a_successful_run_make_a_chart() {
        let svg = svg(&results(vec![(Mode::Normal, vec![killed()])]));
        assert!(svg.contains("failed") && !svg.contains("NaN"), "{svg}");
    }
}
