//! Aligned pairs and tables. Any characters that a terminal would interpret or hide are escaped.

use std::fmt;

use dmabuf::printable;

/// Two columns: labels and values. Rows are shown in the order in which they were added.
///
/// ```text
/// file      model.safetensors, 1.00 GiB
/// route     uring-fixed-direct
/// total     290 ms, 3.45 GiB/s
/// ```
#[derive(Debug, Default, Clone)]
pub struct Pairs(Vec<(String, String)>);

impl Pairs {
    /// Creates an empty list.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a row.
    #[must_use]
    pub fn with(mut self, what: impl Into<String>, value: impl fmt::Display) -> Self {
        self.0.push((printable(&what.into()), printable(&value.to_string())));
        self
    }

    /// Adds a row if there is a value.
    #[must_use]
    pub fn with_some(self, what: impl Into<String>, value: Option<impl fmt::Display>) -> Self {
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

/// The alignment of a column's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Left: for words.
    Left,
    /// Right: for numbers.
    Right,
}

/// A table with a header and an optional line of totals. [`Table::fit`] shortens the first column
/// if lines are too wide.
#[derive(Debug, Clone)]
pub struct Table {
    header: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
    total: Option<Vec<String>>,
    width: Option<usize>,
}

/// The gap between columns, in characters.
const GAP: usize = 2;
/// Minimum width of a shortened first column, in characters. Shorter names would lose their layer
/// numbers and look alike, which is worse than lines that are too wide.
const SHORTEST: usize = 32;

impl Table {
    /// Creates a table with these columns.
    #[must_use]
    pub fn new<'a>(header: impl IntoIterator<Item = (&'a str, Align)>) -> Self {
        let header = header.into_iter().map(|(name, align)| (name.to_owned(), align)).collect();
        Self { header, rows: Vec::new(), total: None, width: None }
    }

    /// Cuts out the middle of long names in the first column, so that lines fit into `width`
    /// characters. No name is shortened to fewer than 32 characters, so lines can still be wider.
    /// With `None`, nothing is shortened: a program that reads from a pipe needs whole names.
    #[must_use]
    pub fn fit(mut self, width: Option<usize>) -> Self {
        self.width = width;
        self
    }

    /// Adds a row; missing cells are empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        let row = self.cells(cells);
        self.rows.push(row);
    }

    /// Sets the last line, which is shown below a horizontal rule.
    pub fn total(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        self.total = Some(self.cells(cells));
    }

    fn cells(&self, cells: impl IntoIterator<Item = impl Into<String>>) -> Vec<String> {
        let mut cells: Vec<String> = cells.into_iter().map(|cell| printable(&cell.into())).collect();
        debug_assert!(cells.len() <= self.header.len(), "a row must not have more cells than there are columns");
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

    fn write_line(&self, f: &mut fmt::Formatter<'_>, cells: &[String], widths: &[usize]) -> fmt::Result {
        let mut line = String::new();
        for ((cell, (_, align)), &width) in cells.iter().zip(&self.header).zip(widths) {
            let cell = shorten(cell, width);
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
        self.write_line(f, &header, &widths)?;
        writeln!(f, "{rule}")?;
        self.rows.iter().try_for_each(|row| self.write_line(f, row, &widths))?;
        let Some(total) = &self.total else { return Ok(()) };
        writeln!(f, "{rule}")?;
        self.write_line(f, total, &widths)
    }
}

/// Escapes a cell's text, because names come from untrusted files.
fn printable(text: &str) -> String {
    printable::text(text).to_string()
}

/// Returns the width of `text` in characters. This is correct for tensor names and our own text,
/// but would misalign double-width characters.
fn columns(text: &str) -> usize {
    text.chars().count()
}

fn spaces(count: usize) -> String {
    " ".repeat(count)
}

/// Shortens `text` to `width` characters by replacing its middle with `…`. Both ends of a tensor's
/// name matter: the beginning says which part of the model the tensor belongs to, and the end says
/// which weight it is.
fn shorten(text: &str, width: usize) -> String {
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
    fn numbers_are_right_aligned() {
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
    fn names_are_shortened_for_a_narrow_terminal() {
        let table = tensors().fit(Some(40)).to_string();
        assert!(table.lines().all(|line| columns(line) <= 46), "{table}");
        assert_eq!(table.lines().nth(2), Some("model.layers.0.s…n.q_proj.weight  BF16    8192"));
        assert_eq!(table.lines().nth(3), Some("model.norm.weight                 F32       16"));
    }

    #[test]
    fn table_without_rows_shows_only_its_header() {
        let table = Table::new([("tensor", Align::Left)]);
        assert_eq!(table.to_string(), "tensor\n──────\n");
    }

    #[test]
    fn hostile_name_is_escaped_in_a_table() {
        let mut table = Table::new([("tensor", Align::Left)]);
        table.row(["\x1b]0;gone\x07\nnext\u{202E}"]);
        assert!(table.to_string().ends_with("\\u{1b}]0;gone\\u{7}\\nnext\\u{202e}\n"), "{table}");
    }
}
