//! `dmaload load --exec`: passes the loaded segments to another program.
//!
//! Modeled on systemd's socket activation (sd_listen_fds(3)): the program inherits descriptors
//! that are numbered from 3, and environment variables describe them.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use command_fds::{CommandFdExt, FdMapping};
use dmaload::{Errno, Error, Image, Segment};
use dmaload_text::ForPath;
use serde_json::{Value, json};

/// The first descriptor after standard input, output and error.
const FIRST_FD: i32 = 3;
/// The kernel's MAX_ARG_STRLEN with 4 KiB pages: the maximum length of an environment string,
/// including its name and the terminating NUL.
const STRING_BYTES_MAX: usize = 128 << 10;

/// Runs a program that inherits the descriptors of all segments, waits for it, and returns its
/// exit status, or 128 plus the signal number if a signal killed it.
pub(crate) fn run(image: &Image, program: &OsStr, arguments: &[impl AsRef<OsStr>]) -> Result<u8> {
    let mut command = Command::new(program);
    command.args(arguments);
    let segments = image.segments();
    // Segments that share memory are adjacent.
    let memories: Vec<_> = segments.chunk_by(Segment::shares_memory_with).collect();
    let described =
        (FIRST_FD..).zip(&memories).flat_map(|(fd, sharing)| sharing.iter().map(move |segment| describe(fd, segment)));
    let described: Vec<_> = described.collect();
    let files: Vec<_> = image.files().iter().map(|file| file.path().to_string_lossy()).collect();
    let (described, files) = (Value::from(described).to_string(), json!(files).to_string());
    for (name, value) in [("DMALOAD_SEGMENTS", &described), ("DMALOAD_FILES", &files)] {
        ensure!(
            name.len() + value.len() + 2 <= STRING_BYTES_MAX,
            "--exec: the descriptions of {} segments and {} files do not fit into environment variables of at most \
             {STRING_BYTES_MAX} bytes: load with larger segments, --layout single, or fewer files",
            segments.len(),
            image.files().len(),
        );
    }
    command.env("DMALOAD_FDS", memories.len().to_string()).env("DMALOAD_SEGMENTS", described).env("DMALOAD_FILES", files);
    let firsts = memories.iter().filter_map(|sharing| sharing.first());
    let mappings =
        (FIRST_FD..).zip(firsts).map(|(child_fd, segment)| Ok(FdMapping { parent_fd: duplicate_descriptor(segment)?, child_fd }));
    command.fd_mappings(mappings.collect::<Result<_>>()?)?;
    let status = command.status().for_path("run", Path::new(program))?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(crate::status::FAILURE))
}

/// Duplicates the descriptor of the segment's dma-buf or, if it has none, of its memfd.
fn duplicate_descriptor(segment: &Segment) -> Result<OwnedFd> {
    if segment.has_dma_buf() {
        return Ok(segment.hand_out_owned_dma_buf()?);
    }
    let memfd = segment.hand_out_memfd()?;
    memfd.try_clone_to_owned().map_err(|error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::EMFILE);
        Error::File { path: segment.path().to_owned(), operation: "duplicate a descriptor of its memory", errno }.into()
    })
}

fn describe(fd: i32, segment: &Segment) -> Value {
    json!({
        "fd": fd,
        "offset": segment.memory_offset(),
        "file": segment.file_index(),
        "file_offset": segment.file_range().start,
        "bytes": segment.len(),
        "dma_buf": segment.has_dma_buf(),
    })
}
