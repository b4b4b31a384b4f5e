//! Formats a run's report, which is written to `target/guest/report.md`.

use crate::boot::Boot;
use crate::rows::{self, Row};

/// Formats all problems, tests and rows of a run.
pub(crate) fn format_report(boots: &[Boot<'_>], all: &[Row]) -> String {
    let mut text = String::from("# Guests\n");
    for boot in boots {
        text.push_str(&format!("\n## {}\n\n", boot.plan.id));
        for problem in &boot.problems {
            text.push_str(&format!("- **{problem}**\n"));
        }
        for suite in boot.suites() {
            for (name, verdict) in &suite.tests {
                text.push_str(&format!("- {} {name}: {}\n", suite.name, verdict.word()));
            }
        }
    }
    for table in rows::list_tables(all) {
        let own = all.iter().filter(|row| row.table == table).collect::<Vec<_>>();
        let width = own.iter().map(|row| row.cells.len()).max().unwrap_or(1);
        let mut head = vec![""; width];
        head[0] = "Kernel";
        text.push_str(&format!("\n## Table {table}\n\n{}", rows::format_table(&head, &own)));
    }
    text
}
