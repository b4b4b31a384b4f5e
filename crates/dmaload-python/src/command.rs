//! `python -m dmaload`: the command, in this process.

use std::ffi::OsString;

use pyo3::prelude::*;

use crate::errors::guarded;
use crate::process::detached;

/// Runs the command with these arguments, the first of which is its name; returns its exit status.
/// `program` is the command that runs it once more, for the processes that `bench` starts.
#[pyfunction]
pub(crate) fn run_command(py: Python<'_>, arguments: Vec<OsString>, program: Vec<OsString>) -> PyResult<u8> {
    guarded(py, || Ok(detached(py, || dmaload_cli::run(arguments, Some(program)))))
}
