//! Formats the results for people: a table for the terminal or in Markdown, and conclusions.

use std::fmt::Write as _;

use dmaload_text::{Align, Table, bytes};

use crate::mode::Mode;
use crate::results::{ModeRuns, Results};
use crate::stats::Spread;

const HEADER: [&str; 8] =
    ["mode", "pages", "seconds (min–max)", "× normal", "share of limit", "CPU s/GiB", "first segment", "extra memory"];
/// The kernel's default readahead (`VM_READAHEAD_PAGES`).
const DEFAULT_READ_AHEAD_KIB: u64 = 128;
const NOTHING: &str = "–";

/// Formats the table and the remarks for a terminal.
pub(crate) fn plain(results: &Results) -> String {
    let align = |(column, name)| (name, if column < 2 { Align::Left } else { Align::Right });
    let mut table = Table::new(HEADER.into_iter().enumerate().map(align));
    for row in rows(results) {
        table.row(row);
    }
    let mut text = table.to_string();
    for line in verdicts(results).into_iter().chain(remarks(results)) {
        text.push('\n');
        text.push_str(&line);
    }
    text.push('\n');
    text
}

/// Formats the table and the remarks in Markdown.
pub(crate) fn markdown(results: &Results) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&HEADER.map(str::to_owned));
    text.push_str(&line(&std::array::from_fn::<_, 8, _>(|column| if column < 2 { "---" } else { "--:" }.to_owned())));
    for row in rows(results) {
        text.push_str(&line(&row));
    }
    for remark in verdicts(results).into_iter().chain(remarks(results)) {
        // An empty line makes each remark a separate paragraph.
        let _ = write!(text, "\n{}\n", remark.replace('|', "\\|"));
    }
    text
}

fn rows(results: &Results) -> Vec<[String; 8]> {
    results.modes.iter().map(|runs| row(results, runs)).collect()
}

fn row(results: &Results, runs: &ModeRuns) -> [String; 8] {
    let mode = runs.mode;
    let or_nothing = |text: Option<String>| text.unwrap_or_else(|| NOTHING.to_owned());
    [
        mode.name().to_owned(),
        or_nothing(runs.page_bytes().map(pages)),
        runs.seconds().map_or_else(|| "failed".to_owned(), |seconds| range(seconds, 3)),
        or_nothing(results.ratio(Mode::Normal, mode).map(|ratio| range(ratio, 1))),
        or_nothing(results.ratio(Mode::Limit, mode).map(|share| range(share, 2))),
        or_nothing(results.cpu_seconds_per_gib(mode).map(|seconds| format!("{seconds:.2}"))),
        or_nothing(runs.first_segment_share().map(|share| format!("{:.0} %", share * 100.0))),
        or_nothing(runs.peak_extra_bytes().map(bytes)),
    ]
}

fn range(Spread { median, min, max }: Spread, digits: usize) -> String {
    let [median, min, max] = [median, min, max].map(|value| format!("{value:.digits$}"));
    if min == max { median } else { format!("{median} ({min}–{max})") }
}

fn pages((smallest, largest): (u64, u64)) -> String {
    if smallest == largest {
        format_page_size(smallest)
    } else {
        format!("{} to {}", format_page_size(smallest), format_page_size(largest))
    }
}

/// Formats a page size without decimals, because it is exact: `4 KiB`, not `4.00 KiB`.
fn format_page_size(size: u64) -> String {
    if size < 1 << 20 { format!("{} KiB", size >> 10) } else { format!("{} MiB", size >> 20) }
}

/// Formats the total size of buffers without decimals: `8 MiB`, not `8.00 MiB`.
fn format_buffer_size(size: u64) -> String {
    format!("{} MiB", size >> 20)
}

/// Returns the main conclusions, one per line.
fn verdicts(results: &Results) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(ratio) = results.ratio(Mode::Normal, Mode::DirectIo) {
        lines.push(format!("direct_io is {} × normal", range(ratio, 1)));
    }
    if let (Some(share), Some(limit)) = (results.ratio(Mode::Limit, Mode::DirectIo), results.limit_bytes_per_second()) {
        let speed = format!("{:.2} GiB/s", limit / f64::from(1 << 30));
        lines.push(format!("direct_io reaches {} of the device's limit, which is {speed}", range(share, 2)));
    }
    for runs in &results.modes {
        if let (Mode::Peer(_), Some(ratio)) = (runs.mode, results.ratio(runs.mode, Mode::DirectIo)) {
            lines.push(format!("{} takes {} times as long as direct_io", runs.mode, range(ratio, 2)));
        }
    }
    if let Some(overlap) = results.overlap(Mode::DirectIo) {
        lines.push(format!("overlap: {}: max(allocate, read) of no-overlap ÷ direct_io, per round", range(overlap, 2)));
    }
    lines
}

/// Returns remarks that explain the numbers, one per line.
fn remarks(results: &Results) -> Vec<String> {
    let plural = if results.rounds == 1 { "" } else { "s" };
    let mut lines = vec![format!(
        "{} loaded {} in {} round{plural}{}{}; times are medians (min–max), and ratios are computed within each round",
        bytes(results.file_bytes),
        if results.warm { "from the page cache (except `limit`, which reads from the device)" } else { "cold" },
        results.rounds,
        results.user.map(|user| format!(", as user {user}")).unwrap_or_default(),
        results.pressure.as_ref().map(|pressure| format!(", under pressure: {pressure}")).unwrap_or_default(),
    )];
    if let Some(kib) = results.read_ahead_kib.filter(|&kib| kib != DEFAULT_READ_AHEAD_KIB) {
        lines.push(format!(
            "readahead for this disk is {kib} KiB, not the usual {DEFAULT_READ_AHEAD_KIB} (queue/read_ahead_kb in sysfs), which affects \
             normal, normal_io, mmap and tokio-fs"
        ));
    }
    if let Some(((best, _), others)) = results.destinations.split_first() {
        let others = others.iter().map(|(size, seconds)| format!("{} {seconds:.3} s", format_buffer_size(*size)));
        lines.push(format!(
            "limit: the fastest reads were into {} of reused buffers; other sizes took longer ({})",
            format_buffer_size(*best),
            others.collect::<Vec<_>>().join(", "),
        ));
    }
    for runs in &results.modes {
        lines.extend(runs.notes().into_iter().map(|note| format!("{}: {note}", runs.mode)));
    }
    for runs in &results.modes {
        let failed = runs.failures().map(|(round, failure)| format!("{} FAILED in round {round}: {}", runs.mode, failure.reason));
        lines.extend(failed);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::{killed, results, run};
    use crate::results::{Apart, Run};

    fn sample_results() -> Results {
        results(vec![
            (Mode::Normal, vec![run(2.0), run(3.0), run(2.5)]),
            (Mode::DirectIo, vec![run(0.5), run(0.5), run(0.5)]),
            (Mode::Limit, vec![run(0.5), run(0.25), run(0.25)]),
            (Mode::Mmap, vec![killed(), killed(), killed()]),
        ])
    }

    #[test]
    fn text_has_a_table_conclusions_and_failures() {
        let text = plain(&sample_results());
        for words in [
            "normal     4 KiB  2.500 (2.000–3.000)",
            "direct_io is 5.0 (4.0–6.0) × normal",
            "direct_io reaches 0.50 (0.50–1.00) of the device's limit, which is 2.00 GiB/s",
            "512 MiB loaded cold in 3 rounds",
            "mmap FAILED in round 3: killed",
            "readahead for this disk is 8192 KiB",
        ] {
            assert!(text.contains(words), "{words:?} is missing in\n{text}");
        }
        assert!(!text.contains("overlap"), "the overlap should be omitted if no-overlap was not measured");
    }

    #[test]
    fn peers_are_compared_with_the_engine_within_each_round() {
        let peer = Mode::peer("other=program").unwrap();
        let text = plain(&results(vec![
            (Mode::DirectIo, vec![run(0.5), run(1.0), run(1.0)]),
            (peer, vec![run(1.0), run(1.1), run(1.2)]),
        ]));
        assert!(text.contains("other takes 1.20 (1.10–2.00) times as long as direct_io"), "{text}");
    }

    #[test]
    fn overlap_is_reported_as_a_ratio_per_round() {
        let apart = run(4.0).map(|run| Run { apart: Some(Apart { allocate_seconds: 1.0, read_seconds: 3.0 }), ..run });
        let text = plain(&results(vec![(Mode::DirectIo, vec![run(4.0)]), (Mode::NoOverlap, vec![apart])]));
        assert!(text.contains("\noverlap: 0.75: max(allocate, read) of no-overlap ÷ direct_io, per round\n"), "{text}");
    }

    #[test]
    fn table_names_the_destination_of_the_limit() {
        let mut measured = sample_results();
        measured.destinations = vec![(8 << 20, 0.25), (4 << 20, 0.3), (64 << 20, 0.5)];
        let expected = "limit: the fastest reads were into 8 MiB of reused buffers; other sizes took longer \
                        (4 MiB 0.300 s, 64 MiB 0.500 s)";
        assert!(plain(&measured).contains(expected), "{}", plain(&measured));
    }

    #[test]
    fn every_markdown_row_has_the_same_number_of_cells() {
        let text = markdown(&sample_results());
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
        assert_eq!(rows.len(), 2 + 4);
        assert!(rows.iter().all(|row| row.matches('|').count() == 9), "{text}");
        assert!(text.contains("| mmap | – | failed | – |"), "{text}");
    }
}
