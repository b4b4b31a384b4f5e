//! Fills Markdown tables with the facts that suites have recorded about their kernels.
//!
//! ```text
//! <!-- rows heaps: Kernel | Heap | Sealed -->
//! | Kernel | Heap | Sealed |
//! |---|---|---|
//! | 6.12-full, 7.2-full | system | no |
//! <!-- end heaps -->
//! ```
//!
//! Kernels with the same facts share a row. The lines between the two comments are replaced. It is
//! an error if the document has no table for a recorded row, because the document would then omit
//! a fact. It is also an error if no rows were recorded for a table.

use anyhow::{Context, Result, bail};

/// One row of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) table: String,
    /// The first cell is the kernel's id.
    pub(crate) cells: Vec<String>,
}

/// Parses the lines that `dmaload_guest::record_row` wrote in the guest with this kernel. Drops
/// duplicate lines.
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

/// Lists the names of all tables, in the order in which they first occur in `rows`.
pub(crate) fn list_tables(rows: &[Row]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for row in rows {
        if !names.contains(&row.table.as_str()) {
            names.push(&row.table);
        }
    }
    names
}

/// Formats a Markdown table. Rows that differ only in their kernel are merged.
pub(crate) fn format_table(head: &[&str], rows: &[&Row]) -> String {
    let mut text = format!("| {} |\n|{}\n", head.join(" | "), "---|".repeat(head.len()));
    let mut merged: Vec<(Vec<&str>, &[String])> = Vec::new();
    for row in rows {
        let Some((kernel, facts)) = row.cells.split_first() else { continue };
        match merged.iter_mut().find(|(_, known)| *known == facts) {
            Some((kernels, _)) => kernels.push(kernel),
            None => merged.push((vec![kernel], facts)),
        }
    }
    for (kernels, facts) in merged {
        text.push_str(&format!("| {} | {} |\n", kernels.join(", "), facts.join(" | ")));
    }
    text
}

/// Lists the lines that occur in only one of the two texts. Prefixes those in `old` with `-`, and
/// those in `new` with `+`.
pub(crate) fn list_differences(old: &str, new: &str) -> Vec<String> {
    let lacks = |text: &str, line: &str| !text.lines().any(|other| other == line);
    let removed = old.lines().filter(|line| lacks(new, line)).map(|line| format!("- {line}"));
    removed.chain(new.lines().filter(|line| lacks(old, line)).map(|line| format!("+ {line}"))).collect()
}

/// Returns `text` with its tables filled from `rows`.
pub(crate) fn fill_tables(text: &str, rows: &[Row]) -> Result<String> {
    let mut filled = String::with_capacity(text.len());
    let mut unused = list_tables(rows);
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        filled.push_str(line);
        filled.push('\n');
        let Some((table, head)) = parse_heading(line)? else { continue };
        let own = rows.iter().filter(|row| row.table == table).collect::<Vec<_>>();
        if own.is_empty() {
            bail!("cannot fill the table {table}: no suite called record_row(\"{table}\", …)");
        }
        for row in &own {
            if row.cells.len() != head.len() {
                bail!("cannot fill the table {table}: its columns are {head:?}, but a row has the cells {:?}", row.cells);
            }
        }
        unused.retain(|name| *name != table);
        filled.push_str(&format_table(&head, &own));
        let end = format!("<!-- end {table} -->");
        let end =
            lines.find(|line| line.trim() == end).with_context(|| format!("cannot fill the table {table}: it lacks `{end}`"))?;
        filled.push_str(end);
        filled.push('\n');
    }
    if !unused.is_empty() {
        bail!("cannot find `<!-- rows NAME: Kernel | … -->` for {}", unused.join(", "));
    }
    Ok(filled)
}

/// Parses the name and the columns in `<!-- rows NAME: Kernel | Column -->`.
fn parse_heading(line: &str) -> Result<Option<(&str, Vec<&str>)>> {
    let Some(rest) = line.trim().strip_prefix("<!-- rows ") else { return Ok(None) };
    let parts = rest.strip_suffix("-->").and_then(|rest| rest.split_once(':'));
    let (table, head) = parts.with_context(|| format!("a table heading must be `<!-- rows NAME: Kernel | … -->`: {line}"))?;
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
    fn table_is_replaced_and_other_text_stays() {
        let all = [rows("6.12", &["heaps | system", "heaps | system"]), rows("6.1", &["heaps | none"])].concat();
        let expected = "# Kernels\n<!-- rows heaps: Kernel | Heap -->\n| Kernel | Heap |\n|---|---|\n\
                        | 6.12 | system |\n| 6.1 | none |\n<!-- end heaps -->\nafter\n";
        assert_eq!(fill_tables(TEXT, &all).unwrap(), expected);
        assert_eq!(fill_tables(expected, &all).unwrap(), expected);
    }

    #[test]
    fn kernels_with_equal_facts_share_a_row() {
        let all = [rows("6.12", &["heaps | system", "heaps | cma"]), rows("7.2", &["heaps | system"])].concat();
        let expected = "| Kernel | Heap |\n|---|---|\n| 6.12, 7.2 | system |\n| 6.12 | cma |\n";
        assert_eq!(format_table(&["Kernel", "Heap"], &all.iter().collect::<Vec<_>>()), expected);
    }

    #[test]
    fn differences_are_the_lines_of_one_side() {
        assert_eq!(list_differences("same\nold\n", "same\nnew\n"), ["- old", "+ new"]);
        assert!(list_differences("same\n", "same\n").is_empty());
    }

    #[test]
    fn table_without_rows_is_an_error() {
        assert!(fill_tables(TEXT, &[]).unwrap_err().to_string().contains("record_row(\"heaps\", …)"));
    }

    #[test]
    fn rows_without_a_table_are_an_error() {
        let all = rows("6.12", &["heaps | system", "errors | EIO"]);
        assert!(fill_tables(TEXT, &all).unwrap_err().to_string().ends_with("for errors"));
    }

    #[test]
    fn row_of_another_width_is_an_error() {
        assert!(fill_tables(TEXT, &rows("6.12", &["heaps | system | yes"])).is_err());
    }

    #[test]
    fn table_without_an_end_is_an_error() {
        let text = "<!-- rows heaps: Kernel | Heap -->\n";
        assert!(fill_tables(text, &rows("6.12", &["heaps | system"])).unwrap_err().to_string().contains("<!-- end heaps -->"));
    }
}
