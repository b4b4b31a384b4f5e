//! What a person reads: sizes, rates, times, aligned pairs and tables.
//!
//! Everything here makes strings. They go out through a `Write`, whose errors the command passes on, and
//! [`is_closed_pipe`] tells the one that is no error: the reader of `dmaload inspect … | head` has seen enough.

use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

use dmaload::dmabuf::printable;

/// A size in binary units with three digits: `512 B`, `1.50 MiB`, `23.4 GiB`.
#[must_use]
pub(crate) fn bytes(count: u64) -> String {
    scaled(count as f64, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// Bytes in a time, per second: `3.21 GiB/s`. Nothing in no time is `-`.
#[must_use]
pub(crate) fn rate(count: u64, time: Duration) -> String {
    if time.is_zero() {
        return "-".into();
    }
    scaled(count as f64 / time.as_secs_f64(), &["B/s", "KiB/s", "MiB/s", "GiB/s", "TiB/s"])
}

/// A time with three digits: `812 µs`, `45.6 ms`, `1.23 s`, `2 min 05 s`.
#[must_use]
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if time >= Duration::from_secs(100) {
        let whole = (time + Duration::from_millis(500)).as_secs();
        return format!("{} min {:02} s", whole / 60, whole % 60);
    }
    match seconds {
        0.0 => "0 s".into(),
        s if rounds_below(s * 1e6, 1000.0) => format!("{} µs", three_digits(s * 1e6)),
        s if rounds_below(s * 1e3, 1000.0) => format!("{} ms", three_digits(s * 1e3)),
        s => format!("{} s", three_digits(s)),
    }
}

/// A count with its thousands apart: `1_234_567` as `1 234 567`.
#[must_use]
pub(crate) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::with_capacity(digits.len() * 4 / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped
}

fn scaled(value: f64, units: &[&str]) -> String {
    let mut value = value;
    let mut units = units.iter().peekable();
    let mut whole = true;
    while let Some(unit) = units.next() {
        // 1023.9 KiB would be shown as "1024 KiB": it is 1.00 MiB.
        if rounds_below(value, 1024.0) || units.peek().is_none() {
            // There is no hundredth of a byte, unless it is one per second.
            let number = if whole && value.fract() == 0.0 { format!("{value}") } else { three_digits(value) };
            return format!("{number} {unit}");
        }
        value /= 1024.0;
        whole = false;
    }
    unreachable!("the last unit always returns")
}

fn rounds_below(value: f64, limit: f64) -> bool {
    value < limit - 0.5
}

fn three_digits(value: f64) -> String {
    match value {
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// Two columns: what, and how much. Rows are shown in the order in which they were added.
///
/// ```text
/// file      model.safetensors, 1.00 GiB
/// route     uring-fixed-direct
/// total     290 ms, 3.45 GiB/s
/// ```
#[derive(Debug, Default, Clone)]
pub(crate) struct Pairs(Vec<(String, String)>);

impl Pairs {
    /// No rows.
    #[must_use]
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a row.
    #[must_use]
    pub(crate) fn with(mut self, what: impl Into<String>, value: impl fmt::Display) -> Self {
        self.0.push((printable(&what.into()), printable(&value.to_string())));
        self
    }

    /// Adds a row if there is something to say.
    #[must_use]
    pub(crate) fn with_some(self, what: impl Into<String>, value: Option<impl fmt::Display>) -> Self {
        match value {
            Some(value) => self.with(what, value),
            None => self,
        }
    }
}

impl fmt::Display for Pairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|(what, _)| columns(what)).max().unwrap_or(0);
        self.0.iter().try_for_each(|(what, value)| {
            writeln!(f, "{}", format!("{what}{}  {value}", spaces(width - columns(what))).trim_end())
        })
    }
}

/// On which side the text of a column is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// A table with a header, and perhaps a line of totals. The first column gives way where there is too little room.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    header: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
    total: Option<Vec<String>>,
    width: Option<usize>,
}

/// Between columns.
const GAP: usize = 2;
/// No first column is cut shorter than this, which keeps the number of a layer: better a wide line than a dozen that
/// look the same.
const SHORTEST: usize = 32;

impl Table {
    /// A table with these columns.
    #[must_use]
    pub(crate) fn new<'a>(header: impl IntoIterator<Item = (&'a str, Align)>) -> Self {
        let header = header.into_iter().map(|(name, align)| (name.to_owned(), align)).collect();
        Self { header, rows: Vec::new(), total: None, width: None }
    }

    /// Shortens the names in the first column, in the middle, so that lines fit. Without it nothing is ever cut: a
    /// program on the other side of a pipe wants whole names.
    #[must_use]
    pub(crate) fn fit(mut self, width: Option<usize>) -> Self {
        self.width = width;
        self
    }

    /// Adds a row; missing cells are empty.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        let row = self.cells(cells);
        self.rows.push(row);
    }

    /// Sets the last line, which a rule sets apart.
    pub(crate) fn total(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        self.total = Some(self.cells(cells));
    }

    fn cells(&self, cells: impl IntoIterator<Item = impl Into<String>>) -> Vec<String> {
        let mut cells: Vec<String> = cells.into_iter().map(|cell| printable(&cell.into())).collect();
        debug_assert!(cells.len() <= self.header.len(), "more cells than columns");
        cells.resize(self.header.len(), String::new());
        cells
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths: Vec<usize> = self.header.iter().map(|(name, _)| columns(name)).collect();
        for row in self.rows.iter().chain(&self.total) {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = columns(cell).max(*width);
            }
        }
        if let (Some(most), Some((first, others))) = (self.width, widths.split_first_mut()) {
            let others: usize = others.iter().map(|width| width + GAP).sum();
            *first = (*first).min(most.saturating_sub(others).max(SHORTEST));
        }
        widths
    }

    fn line(&self, f: &mut fmt::Formatter<'_>, cells: &[String], widths: &[usize]) -> fmt::Result {
        let mut line = String::new();
        for ((cell, (_, align)), &width) in cells.iter().zip(&self.header).zip(widths) {
            let cell = shortened(cell, width);
            let padding = spaces(width - columns(&cell));
            let (before, after) = if *align == Align::Right { (padding.as_str(), "") } else { ("", padding.as_str()) };
            line.extend([before, &cell, after, &spaces(GAP)]);
        }
        writeln!(f, "{}", line.trim_end())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        let header: Vec<String> = self.header.iter().map(|(name, _)| name.clone()).collect();
        let rule = "─".repeat(widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1));
        self.line(f, &header, &widths)?;
        writeln!(f, "{rule}")?;
        self.rows.iter().try_for_each(|row| self.line(f, row, &widths))?;
        let Some(total) = &self.total else { return Ok(()) };
        writeln!(f, "{rule}")?;
        self.line(f, total, &widths)
    }
}

/// The width of the terminal that standard output is, or `None` when it is a file or a pipe.
#[must_use]
pub(crate) fn terminal_width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout()).ok()?;
    // Serial consoles and some CI runners have a terminal of no size.
    (size.ws_col > 0).then_some(usize::from(size.ws_col))
}

/// Whether an error says that whoever read our output has closed it, as `head` does: then leave quietly, with
/// success. Looks through the whole chain of causes.
#[must_use]
pub(crate) fn is_closed_pipe(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            return true;
        }
        next = error.source();
    }
    false
}

/// Names come from files that anyone may have written.
fn printable(text: &str) -> String {
    printable::text(text).to_string()
}

/// Characters, which is what names of tensors and our own words take; wide scripts would be off by their width.
fn columns(text: &str) -> usize {
    text.chars().count()
}

fn spaces(count: usize) -> String {
    " ".repeat(count)
}

/// Cuts out the middle: the names of tensors begin with the model's part and end with the weight's, and both matter.
fn shortened(text: &str, width: usize) -> String {
    let length = columns(text);
    if length <= width {
        return text.to_owned();
    }
    let Some(kept) = width.checked_sub(1) else { return String::new() };
    let tail = kept / 2;
    let head: String = text.chars().take(kept - tail).collect();
    let tail: String = text.chars().skip(length - tail).collect();
    format!("{head}…{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        let cases = [
            (0, "0 B"),
            (1, "1 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (10 * 1024, "10.0 KiB"),
            (128 << 20, "128 MiB"),
            ((1 << 20) - 1, "1.00 MiB"),
            (1_000_000_000, "954 MiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (count, shown) in cases {
            assert_eq!(bytes(count), shown);
        }
    }

    #[test]
    fn rates_are_per_second() {
        assert_eq!(rate(1 << 30, Duration::from_millis(500)), "2.00 GiB/s");
        assert_eq!(rate(1, Duration::from_secs(3)), "0.33 B/s");
        assert_eq!(rate(1, Duration::ZERO), "-");
    }

    #[test]
    fn times_have_three_digits() {
        let cases = [
            (0, "0 s"),
            (812, "812 µs"),
            (999_400, "999 ms"),
            (999_700, "1.00 s"),
            (45_600, "45.6 ms"),
            (1_234_000, "1.23 s"),
            (99_990_000, "100 s"),
            (125_000_000, "2 min 05 s"),
        ];
        for (micros, shown) in cases {
            assert_eq!(duration(Duration::from_micros(micros)), shown);
        }
    }

    #[test]
    fn thousands_are_apart() {
        let shown: Vec<_> = [0, 999, 1000, 1_234_567].map(grouped).into();
        assert_eq!(shown, ["0", "999", "1 000", "1 234 567"]);
    }

    #[test]
    fn pairs_are_aligned() {
        let pairs = Pairs::new().with("file", "a").with_some("fallback", None::<String>).with("first segment", "29 ms");
        assert_eq!(pairs.to_string(), "file           a\nfirst segment  29 ms\n");
    }

    fn tensors() -> Table {
        let columns = [("tensor", Align::Left), ("dtype", Align::Left), ("bytes", Align::Right)];
        let mut table = Table::new(columns);
        table.row(["model.layers.0.self_attn.q_proj.weight", "BF16", "8192"]);
        table.row(["model.norm.weight", "F32", "16"]);
        table.total(["2 tensors", "", "8208"]);
        table
    }

    #[test]
    fn numbers_stand_on_the_right() {
        let expected = "\
tensor                                  dtype  bytes
────────────────────────────────────────────────────
model.layers.0.self_attn.q_proj.weight  BF16    8192
model.norm.weight                       F32       16
────────────────────────────────────────────────────
2 tensors                                       8208
";
        assert_eq!(tensors().to_string(), expected);
    }

    #[test]
    fn names_give_way_to_a_narrow_terminal() {
        let table = tensors().fit(Some(40)).to_string();
        assert!(table.lines().all(|line| columns(line) <= 46), "{table}");
        assert_eq!(table.lines().nth(2), Some("model.layers.0.s…n.q_proj.weight  BF16    8192"));
        assert_eq!(table.lines().nth(3), Some("model.norm.weight                 F32       16"));
    }

    #[test]
    fn a_table_without_rows_is_its_header() {
        let table = Table::new([("tensor", Align::Left)]);
        assert_eq!(table.to_string(), "tensor\n──────\n");
    }

    #[test]
    fn a_hostile_name_reaches_no_terminal() {
        let mut table = Table::new([("tensor", Align::Left)]);
        table.row(["\x1b]0;gone\x07\nnext\u{202E}"]);
        assert!(table.to_string().ends_with("\\u{1b}]0;gone\\u{7}\\nnext\\u{202e}\n"), "{table}");
    }

    #[test]
    fn a_closed_pipe_is_found_below_other_errors() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] io::Error);
        assert!(is_closed_pipe(&Outer(io::ErrorKind::BrokenPipe.into())));
        assert!(!is_closed_pipe(&Outer(io::ErrorKind::NotFound.into())));
    }
}
