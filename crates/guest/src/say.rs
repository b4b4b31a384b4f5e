//! What the user sees, whole lines at a time, and how long each step took.

use std::io::{Write, stdout};
use std::time::Instant;

use anyhow::Result;

/// Prints one line. Lines of guests that run at the same time don't mix. A closed pipe is nobody's business.
pub(crate) fn line(text: &str) {
    let _ = writeln!(stdout().lock(), "{text}");
}

/// Does a step, and tells how long it took.
pub(crate) fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let done = work()?;
    line(&format!("guest: {name}: {:.1} s", begin.elapsed().as_secs_f64()));
    Ok(done)
}
