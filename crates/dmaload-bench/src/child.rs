//! The child process that measures one run ([`Load`]). When it receives the `prepare` command, the
//! process gets ready. On `go`, it performs the run and writes the result as a line of JSON.
//! [`fill_cache_on_request`] and [`hog`] are the child processes that create memory pressure.
//!
//! Each run has a separate process, so the CPU time, peak memory and leftovers of one mode do not
//! affect the results of another.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::curves::Curves;
use crate::engine::Engine;
use crate::mode::Mode;
use crate::results::{Apart, Failure, ReadInto, Run};
use crate::ways::{self, WrongBytes};

pub use crate::pressure::{fill_cache_on_request, hog};

/// The usual locked memory limit for ordinary users, which has been the kernel's default since
/// Linux 5.16.
const ORDINARY_MEMLOCK_BYTES: u64 = 8 << 20;
pub(crate) const PREPARE: &str = "prepare";
pub(crate) const GO: &str = "go";

/// A process that measures one run.
///
/// The process is started as `bench-child load --mode NAME [--scratch FILE]`, followed by
/// [`Settings::arguments`](crate::Settings::arguments).
#[derive(Debug)]
pub struct Load {
    /// The mode to measure.
    pub mode: Mode,
    /// The files to load.
    pub paths: Vec<PathBuf>,
    /// [`Settings::user`](crate::Settings::user): if set, all modes except `limit` may lock only 8
    /// MiB of memory.
    pub user: Option<u32>,
    /// Whether to record progress over time, for a chart.
    pub curves: bool,
}

impl Load {
    /// Reads commands from standard input, one per line, and writes the result to `output`, which
    /// must be standard output. `describe` formats the error of a run.
    ///
    /// # Errors
    /// If standard input can't be read, or `output` can't be written to. The error of a run is
    /// written to `output`, not returned.
    pub fn run(self, engine: &dyn Engine, describe: fn(&anyhow::Error) -> String, output: &mut dyn Write) -> Result<()> {
        let prepare = || {
            if self.user.is_some() && self.mode != Mode::Limit {
                lower_memlock()?;
            }
            ways::prepare(self.mode, engine, self.paths, self.curves)
        };
        measure(prepare, describe, output)
    }
}

/// Calls `prepare` on the first command, and starts the run on the second. Returns early if
/// standard input ends, because the parent has then exited or abandoned the run.
fn measure(
    prepare: impl FnOnce() -> Result<ways::Ready>,
    describe: fn(&anyhow::Error) -> String,
    output: &mut dyn Write,
) -> Result<()> {
    let mut lines = io::stdin().lines();
    let mut is_next = |word: &str| -> Result<bool> { Ok(lines.next().transpose()?.is_some_and(|line| line == word)) };
    if !is_next(PREPARE)? {
        return Ok(());
    }
    let failed = |error: &anyhow::Error| failure_to_json(&describe(error), error);
    let ready = prepare();
    write_line(output, &ready.as_ref().map_or_else(failed, |_| json!({ "ready": true })))?;
    let Ok(ready) = ready else { return Ok(()) };
    if is_next(GO)? {
        write_line(output, &ready().as_ref().map_or_else(failed, to_json))?;
    }
    Ok(())
}

/// Lowers the locked memory limit to that of ordinary users.
fn lower_memlock() -> Result<()> {
    let now = getrlimit(Resource::Memlock);
    let lower = |limit: Option<u64>| Some(limit.map_or(ORDINARY_MEMLOCK_BYTES, |limit| limit.min(ORDINARY_MEMLOCK_BYTES)));
    let limit = Rlimit { current: lower(now.current), maximum: lower(now.maximum) };
    setrlimit(Resource::Memlock, limit).context("cannot lower the locked memory limit")
}

fn write_line(output: &mut dyn Write, value: &Value) -> Result<()> {
    writeln!(output, "{value}")?;
    Ok(output.flush()?)
}

fn failure_to_json(text: &str, error: &anyhow::Error) -> Value {
    json!({ "error": text, "wrong_bytes": error.is::<WrongBytes>() })
}

fn to_json(run: &Run) -> Value {
    json!({
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "page_bytes": run.page_bytes,
        "first_segment_seconds": run.first_segment_seconds,
        "peak_extra_bytes": run.peak_extra_bytes,
        "allocate_seconds": run.apart.map(|apart| apart.allocate_seconds),
        "read_seconds": run.apart.map(|apart| apart.read_seconds),
        "curves": run.curves.as_ref().map(Curves::to_json),
        "notes": run.notes,
        "destinations": run.destinations.iter().map(|read| json!({
            "bytes": read.bytes,
            "seconds": read.seconds,
            "cpu_seconds": read.cpu_seconds,
        })).collect::<Vec<_>>(),
    })
}

/// Parses a line with the result or the error of a run, in the format that [`Load::run`] and peers
/// write.
/// Returns `None` for any other line, such as `{"ready":true}`.
pub(crate) fn parse_line(line: &str) -> Option<Result<Run, Failure>> {
    let value: Value = serde_json::from_str(line).ok()?;
    if let Some(reason) = value.get("error").and_then(Value::as_str) {
        let wrong_bytes = value.get("wrong_bytes").and_then(Value::as_bool).unwrap_or(false);
        return Some(Err(Failure { reason: reason.to_owned(), wrong_bytes }));
    }
    let number = |key: &str| value.get(key).and_then(Value::as_f64);
    let apart = number("allocate_seconds").zip(number("read_seconds"));
    let notes = value.get("notes").and_then(Value::as_array);
    let notes = notes.into_iter().flatten().filter_map(|note| note.as_str().map(str::to_owned));
    // Peers do not report destinations.
    let destinations = value.get("destinations").and_then(Value::as_array).into_iter().flatten();
    let destination = |value: &Value| {
        let number = |key: &str| value.get(key).and_then(Value::as_f64);
        let bytes = value.get("bytes").and_then(Value::as_u64)?;
        Some(ReadInto { bytes, seconds: number("seconds")?, cpu_seconds: number("cpu_seconds")? })
    };
    let destinations = destinations.map(destination).collect::<Option<Vec<_>>>()?;
    Some(Ok(Run {
        seconds: number("seconds")?,
        cpu_seconds: number("cpu_seconds")?,
        page_bytes: value.get("page_bytes").and_then(Value::as_u64)?,
        first_segment_seconds: number("first_segment_seconds"),
        peak_extra_bytes: value.get("peak_extra_bytes").and_then(Value::as_u64),
        apart: apart.map(|(allocate_seconds, read_seconds)| Apart { allocate_seconds, read_seconds }),
        curves: value.get("curves").and_then(Curves::from_json),
        notes: notes.collect(),
        destinations,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_lines_are_parsed() {
        let run = Run {
            seconds: 0.25,
            cpu_seconds: 0.125,
            page_bytes: 4096,
            first_segment_seconds: Some(0.1),
            peak_extra_bytes: Some(7),
            apart: Some(Apart { allocate_seconds: 0.1, read_seconds: 0.15 }),
            curves: Some(Curves { allocated: vec![(0.25, 7)], filled: vec![(0.5, 7)] }),
            notes: vec!["by uring-direct".to_owned()],
            destinations: vec![ReadInto { bytes: 8 << 20, seconds: 0.5, cpu_seconds: 0.25 }],
        };
        assert_eq!(parse_line(&to_json(&run).to_string()), Some(Ok(run)));
        let bare = Run { seconds: 1.0, page_bytes: 4096, ..Run::default() };
        assert_eq!(parse_line(&to_json(&bare).to_string()), Some(Ok(bare)));
        let failure = parse_line(&failure_to_json("no memory", &anyhow::anyhow!("no memory")).to_string());
        assert_eq!(failure, Some(Err(Failure { reason: "no memory".to_owned(), wrong_bytes: false })));
        assert_eq!(parse_line("{\"ready\":true}"), None);
        assert_eq!(parse_line("Killed"), None);
    }
}
