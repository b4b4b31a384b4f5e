//! What the suites use that run inside a guest.
//!
//! A suite is an integration test of this package (`tests/*.rs`, listed in `src/suites.rs`). The harness builds it
//! statically, packs it into an initramfs and runs it as root on a stock kernel, see `src/main.rs`. It finds there:
//!
//! ```text
//! /bin/dmaload              the command                         [`command`]
//! /bin/*                    busybox
//! /disk                     an empty ext4 on nvme, 3 GiB; CARGO_TARGET_TMPDIR leads there
//! /bad-nvme, /bad-virtio    read-only ext4 with `bad.bin`, of which one sector can't be read  [`BadDisk`]
//! /tmp, /dev/shm            tmpfs
//! /sys/fs/cgroup            cgroup2; /sys/kernel/debug
//! ```
//!
//! [`row`] hands a fact about this kernel to the harness, which writes it into a table of the documentation.
#![allow(clippy::disallowed_methods, reason = "what is shown here has names of its own making only")]

use std::env;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The kernel's id, e.g. `6.12-cloud`; set in guests only.
pub const KERNEL: &str = "DMALOAD_GUEST_KERNEL";
/// The file that [`row`] appends to.
pub const ROWS: &str = "DMALOAD_GUEST_ROWS";
/// Where in `bad.bin` the unreadable sector begins, in bytes.
pub const BAD_OFFSET: &str = "DMALOAD_BAD_OFFSET";

/// The length of `bad.bin`.
pub const BAD_LEN: usize = 16 << 20;
/// The part of `bad.bin` that can't be read begins at a multiple of this, and is as long.
pub const SECTOR: usize = 512;
const BAD_SEED: u64 = 7;

/// Which kernel this is: an id of the table in `src/kernels.rs`.
///
/// # Panics
///
/// Outside of a guest: what a suite asserts holds for known kernels only.
#[must_use]
pub fn kernel() -> String {
    env::var(KERNEL).unwrap_or_else(|_| {
        panic!("{KERNEL} is not set: this suite runs in a guest only; try `cargo run -p dmaload-guest -- test`")
    })
}

/// Hands one line of the table `table` to the harness. The table's first column, the kernel, is added there.
///
/// # Panics
///
/// When a cell has a `|` or a line feed, or the file can't be written.
#[track_caller]
pub fn row(table: &str, cells: &[&str]) {
    let path = env::var(ROWS).unwrap_or_else(|_| panic!("{ROWS} is not set: rows are collected in a guest only"));
    let line = row_line(table, cells);
    // One write: lines of processes that run at the same time don't mix.
    let written = OpenOptions::new().append(true).open(&path).and_then(|mut file| file.write_all(line.as_bytes()));
    written.unwrap_or_else(|error| panic!("can't append a row to {path}: {error}"));
}

#[track_caller]
fn row_line(table: &str, cells: &[&str]) -> String {
    let parts = std::iter::once(&table).chain(cells).copied().collect::<Vec<_>>();
    for part in &parts {
        assert!(!part.contains(['|', '\n', '\r']), "a cell can't have a | or a line end: {part:?}");
    }
    parts.join(" | ") + "\n"
}

/// Runs the guest's `dmaload` with these arguments and waits for it.
///
/// # Panics
///
/// When it can't be started.
#[track_caller]
#[must_use]
pub fn command(arguments: &[&str]) -> Output {
    let program = "/bin/dmaload";
    Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("can't run {program} {arguments:?}: {error}"))
}

/// A file with one sector that its disk fails to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadDisk {
    /// Its `bad.bin`: [`BAD_LEN`] bytes, which [`bad_bytes`] tells.
    pub file: PathBuf,
    /// Where the unreadable [`SECTOR`] begins.
    pub offset: u64,
    /// What a read of it fails with.
    pub errno: i32,
}

impl BadDisk {
    /// Under nvme, where the kernel tells a media error from others: `ENODATA`.
    ///
    /// # Panics
    ///
    /// On kernels without the disk.
    #[must_use]
    pub fn nvme() -> Self {
        Self::at("/bad-nvme", libc::ENODATA)
    }

    /// Under virtio-blk, which knows one error only: `EIO`.
    ///
    /// # Panics
    ///
    /// On kernels without the disk.
    #[must_use]
    pub fn virtio() -> Self {
        Self::at("/bad-virtio", libc::EIO)
    }

    fn at(folder: &str, errno: i32) -> Self {
        let offset = env::var(BAD_OFFSET).ok().and_then(|value| value.parse().ok());
        let offset = offset.unwrap_or_else(|| panic!("{BAD_OFFSET} is not set: this kernel has no bad disks"));
        Self { file: Path::new(folder).join("bad.bin"), offset, errno }
    }
}

/// What is in `bad.bin`, the unreadable sector included.
#[must_use]
pub fn bad_bytes() -> Vec<u8> {
    dmaload_testing::random_bytes(BAD_LEN, BAD_SEED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_one_line() {
        assert_eq!(row_line("heaps", &["system", "yes"]), "heaps | system | yes\n");
    }

    #[test]
    #[should_panic(expected = "can't have a |")]
    fn a_cell_that_would_be_two_is_refused() {
        let _ = row_line("heaps", &["a|b"]);
    }
}
