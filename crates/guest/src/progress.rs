//! Prints progress and the duration of each step.

use std::io::{Write, stdout};
use std::time::Instant;

use anyhow::Result;

/// Prints `text` while holding the stdout lock, so that lines from concurrent guests don't
/// interleave. Ignores errors such as a closed pipe, because the exit status also reports the
/// outcome.
pub(crate) fn print(text: &str) {
    let _ = writeln!(stdout().lock(), "{text}");
}

/// Runs a step, and prints how long it took if it succeeds.
pub(crate) fn time_step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let done = work()?;
    print(&format!("guest: {name}: {:.1} s", begin.elapsed().as_secs_f64()));
    Ok(done)
}
