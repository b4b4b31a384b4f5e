//! `dmaload load --exec`: hands the loaded segments to another program.
//!
//! Modelled on systemd's socket activation (sd_listen_fds(3)): descriptors from 3 on, told by environment variables.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use dmaload::{Image, Segment};
use serde_json::{Value, json};

/// The first descriptor, after standard input, output and error.
const FIRST_FD: i32 = 3;

/// Runs a program that inherits the descriptors of all segments, waits for it, and gives its exit status; 128 and the
/// signal's number when a signal ended it.
pub(crate) fn run(image: &Image, program: &OsStr, arguments: &[impl AsRef<OsStr>]) -> Result<ExitCode> {
    let mut command = Command::new(program);
    command.args(arguments);
    let segments = image.segments();
    let described: Vec<_> = (FIRST_FD..).zip(segments).map(|(fd, segment)| describe(fd, segment)).collect();
    let files: Vec<_> = image.files().iter().map(|file| file.path().to_string_lossy()).collect();
    command
        .env("DMALOAD_FDS", segments.len().to_string())
        .env("DMALOAD_SEGMENTS", Value::from(described).to_string())
        .env("DMALOAD_FILES", json!(files).to_string());
    let mappings =
        (FIRST_FD..).zip(segments).map(|(child_fd, segment)| Ok(FdMapping { parent_fd: descriptor(segment)?, child_fd }));
    command.fd_mappings(mappings.collect::<Result<_>>()?)?;
    let status = command.status().with_context(|| format!("cannot run {}", program.display()))?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    Ok(ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

/// The dma-buf, or on the heap memfd the memory file.
fn descriptor(segment: &Segment) -> Result<OwnedFd> {
    if segment.has_dma_buf() {
        return Ok(segment.to_dma_buf()?);
    }
    segment.memfd()?.as_fd().try_clone_to_owned().context("cannot duplicate a descriptor")
}

fn describe(fd: i32, segment: &Segment) -> Value {
    json!({
        "fd": fd,
        "file": segment.file_index(),
        "file_offset": segment.file_range().start,
        "bytes": segment.len(),
        "dma_buf": segment.has_dma_buf(),
    })
}
