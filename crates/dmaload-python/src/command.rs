//! Runs the command in this process, for `python -m dmaload`.

use std::ffi::OsString;

use pyo3::prelude::*;

use crate::errors::guarded;
use crate::process::detached;

/// Runs the command with these arguments, and returns its exit status. The first argument is the
/// program's name. `bench` starts its child processes with the command line `program`.
#[pyfunction]
pub(crate) fn run_command(py: Python<'_>, arguments: Vec<OsString>, program: Vec<OsString>) -> PyResult<u8> {
    guarded(py, || Ok(detached(py, || dmaload_cli::run(arguments, Some(program)))))
}
