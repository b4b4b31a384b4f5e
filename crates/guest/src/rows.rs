//! Facts that suites found out about their kernels, as tables in Markdown.
//!
//! ```text
//! <!-- rows heaps: Kernel | Heap | Sealed -->
//! | Kernel | Heap | Sealed |
//! |---|---|---|
//! | 6.12-cloud | system | no |
//! <!-- end heaps -->
//! ```
//!
//! What lies between the two comments is replaced. Rows without a table are an error, and so are tables without rows:
//! the documentation says what was seen, all of it.

use anyhow::{Context, Result, bail};

/// One line of a table, as `dmaload_guest::row` wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) table: String,
    /// The kernel first.
    pub(crate) cells: Vec<String>,
}

/// Reads the lines that the guest of this kernel wrote. The same line again adds nothing.
pub(crate) fn parse(kernel: &str, lines: &[String]) -> Vec<Row> {
    let mut rows = Vec::new();
    for line in lines {
        let mut parts = line.split('|').map(|part| part.trim().to_owned());
        let table = parts.next().unwrap_or_default();
        let row = Row { table, cells: std::iter::once(kernel.to_owned()).chain(parts).collect() };
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    rows
}

/// The names of all tables, in the order they came.
pub(crate) fn tables(rows: &[Row]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for row in rows {
        if !names.contains(&row.table.as_str()) {
            names.push(&row.table);
        }
    }
    names
}

/// A Markdown table.
pub(crate) fn markdown(head: &[&str], rows: &[&Row]) -> String {
    let mut text = format!("| {} |\n|{}\n", head.join(" | "), "---|".repeat(head.len()));
    for row in rows {
        text.push_str(&format!("| {} |\n", row.cells.join(" | ")));
    }
    text
}

/// `text` with its tables filled from `rows`.
pub(crate) fn fill(text: &str, rows: &[Row]) -> Result<String> {
    let mut filled = String::with_capacity(text.len());
    let mut unused = tables(rows);
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        filled.push_str(line);
        filled.push('\n');
        let Some((table, head)) = heading(line)? else { continue };
        let own = rows.iter().filter(|row| row.table == table).collect::<Vec<_>>();
        if own.is_empty() {
            bail!("the table {table} has no rows: no suite calls row(\"{table}\", …), or the table is there twice");
        }
        for row in &own {
            if row.cells.len() != head.len() {
                bail!("the table {table} has the columns {head:?}, but a row has the cells {:?}", row.cells);
            }
        }
        unused.retain(|name| *name != table);
        filled.push_str(&markdown(&head, &own));
        let end = format!("<!-- end {table} -->");
        let end = lines.find(|line| line.trim() == end).with_context(|| format!("the table {table} lacks its `{end}`"))?;
        filled.push_str(end);
        filled.push('\n');
    }
    if !unused.is_empty() {
        bail!("there are rows, but no `<!-- rows NAME: Kernel | … -->`, for {}", unused.join(", "));
    }
    Ok(filled)
}

/// The name and the columns in `<!-- rows NAME: Kernel | Column -->`.
fn heading(line: &str) -> Result<Option<(&str, Vec<&str>)>> {
    let Some(rest) = line.trim().strip_prefix("<!-- rows ") else { return Ok(None) };
    let parts = rest.strip_suffix("-->").and_then(|rest| rest.split_once(':'));
    let (table, head) = parts.with_context(|| format!("not `<!-- rows NAME: Kernel | … -->`: {line}"))?;
    Ok(Some((table.trim(), head.split('|').map(str::trim).collect())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(kernel: &str, lines: &[&str]) -> Vec<Row> {
        parse(kernel, &lines.iter().map(|&line| line.to_owned()).collect::<Vec<_>>())
    }

    const TEXT: &str = "# Kernels\n<!-- rows heaps: Kernel | Heap -->\nold\n<!-- end heaps -->\nafter\n";

    #[test]
    fn a_table_is_replaced_and_the_rest_stays() {
        let all = [rows("6.12", &["heaps | system", "heaps | system"]), rows("6.1", &["heaps | none"])].concat();
        let expected = "# Kernels\n<!-- rows heaps: Kernel | Heap -->\n| Kernel | Heap |\n|---|---|\n\
                        | 6.12 | system |\n| 6.1 | none |\n<!-- end heaps -->\nafter\n";
        assert_eq!(fill(TEXT, &all).unwrap(), expected);
        assert_eq!(fill(expected, &all).unwrap(), expected);
    }

    #[test]
    fn a_table_without_rows_is_an_error() {
        assert!(fill(TEXT, &[]).unwrap_err().to_string().contains("heaps has no rows"));
    }

    #[test]
    fn rows_without_a_table_are_an_error() {
        let all = rows("6.12", &["heaps | system", "errors | EIO"]);
        assert!(fill(TEXT, &all).unwrap_err().to_string().ends_with("for errors"));
    }

    #[test]
    fn a_row_of_another_width_is_an_error() {
        assert!(fill(TEXT, &rows("6.12", &["heaps | system | yes"])).is_err());
    }

    #[test]
    fn a_table_without_an_end_is_an_error() {
        let text = "<!-- rows heaps: Kernel | Heap -->\n";
        assert!(fill(text, &rows("6.12", &["heaps | system"])).unwrap_err().to_string().contains("<!-- end heaps -->"));
    }
}
