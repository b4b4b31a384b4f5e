//! Helpers for the suites that run inside a guest, and definitions that the harness shares with
//! them.
//!
//! Most suites are integration tests of this package (`tests/`); `src/suites.rs` lists all of
//! them. The harness (`src/main.rs`) builds them statically, packs them into an initramfs and runs
//! them as root on a stock kernel. The guest provides:
//!
//! ```text
//! /bin/dmaload              the command                         [`run_dmaload`]
//! /bin/*                    busybox's commands, and C programs
//! /disk                     ext4 on nvme, 3 GiB, empty at boot; CARGO_TARGET_TMPDIR links to
//!                           a folder on it
//! /bad-nvme, /bad-virtio    on some kernels: read-only ext4 with `bad.bin`, which has an
//!                           unreadable sector                   [`BadDisk`]
//! /python, /vulkan          for the suites with these names: read-only ext4 with a root file
//!                           system for programs that are linked dynamically
//! /tmp, /dev/shm            tmpfs
//! /sys/fs/cgroup            cgroup2
//! /sys/kernel/debug         debugfs
//! ```
//!
//! [`record_row`] passes a fact about the guest's kernel to the harness. With `--check FILE`, the
//! harness compares all recorded facts with the tables in docs/kernels.md. With `--write FILE`, it
//! updates these tables.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]

use std::env;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The environment variable that holds the kernel's id, such as `6.12-full`. It is set only in
/// guests.
pub const KERNEL: &str = "DMALOAD_GUEST_KERNEL";
/// The environment variable that names the file to which [`record_row`] appends.
pub const ROWS: &str = "DMALOAD_GUEST_ROWS";
/// The environment variable that holds the unreadable sector's offset in `bad.bin`, in bytes.
pub const BAD_OFFSET: &str = "DMALOAD_BAD_OFFSET";

/// The length of `bad.bin` in bytes.
pub const BAD_LEN: usize = 16 << 20;
/// The length in bytes of the unreadable sector of `bad.bin`. The sector's offset is a multiple of
/// this length.
pub const SECTOR: usize = 512;
const BAD_SEED: u64 = 7;

/// A kernel's release line. For example, all releases of Linux 6.12 are in the line `(6, 12)`.
pub type Line = (u32, u32);

/// Returns whether Debian's kernels of this release line have devices that create dma-bufs. They
/// have had such devices since Linux 6.12.
#[must_use]
pub const fn line_makes_dma_bufs(line: Line) -> bool {
    line.0 > 6 || (line.0 == 6 && line.1 >= 12)
}

/// Returns whether kernels of this release line have the udmabuf bug: drivers that map a udmabuf
/// backed by huge pages see wrong bytes. The bug exists in Linux 6.11 to 6.15.
#[must_use]
pub const fn line_has_udmabuf_bug(line: Line) -> bool {
    line.0 == 6 && line.1 >= 11 && line.1 < 16
}

/// Returns the kernel's id: `LINE-FLAVOR`, such as `6.12-full`.
///
/// # Panics
///
/// Panics if called outside a guest, where [`KERNEL`] is not set.
#[must_use]
pub fn kernel_id() -> String {
    env::var(KERNEL).unwrap_or_else(|_| {
        panic!("{KERNEL} is not set: this suite runs only in a guest; use `cargo run -p dmaload-guest -- test`")
    })
}

/// Returns the kernel's release line. Suites use it to decide what behavior to expect from the
/// kernel.
///
/// # Panics
///
/// Panics outside a guest, or if the kernel's id does not begin with a release line.
#[must_use]
pub fn kernel_line() -> Line {
    parse_line(&kernel_id()).unwrap_or_else(|| panic!("the kernel's id must have the form LINE-FLAVOR, but is {}", kernel_id()))
}

fn parse_line(id: &str) -> Option<Line> {
    let (major, minor) = id.split('-').next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Returns whether this kernel has devices that create dma-bufs.
///
/// # Panics
///
/// Panics outside a guest.
#[must_use]
pub fn makes_dma_bufs() -> bool {
    line_makes_dma_bufs(kernel_line())
}

/// Returns whether this is one of Debian's full kernels. Only these have importers: drivers that
/// map dma-bufs.
///
/// # Panics
///
/// Panics outside a guest.
#[must_use]
pub fn is_full() -> bool {
    kernel_id().ends_with("-full")
}

/// Returns whether this kernel has the udmabuf bug (see [`line_has_udmabuf_bug`]).
///
/// # Panics
///
/// Panics outside a guest.
#[must_use]
pub fn has_udmabuf_bug() -> bool {
    line_has_udmabuf_bug(kernel_line())
}

/// Returns whether this guest has the disks with an unreadable sector.
#[must_use]
pub fn has_bad_disks() -> bool {
    env::var_os(BAD_OFFSET).is_some()
}

/// Records a row for the table named `table` in docs/kernels.md. The harness adds the kernel's id
/// as the first cell.
///
/// # Panics
///
/// Panics if called outside a guest, if `table` or a cell contains `|` or a line break, or if the
/// row cannot be written.
#[track_caller]
pub fn record_row(table: &str, cells: &[&str]) {
    let path = env::var(ROWS).unwrap_or_else(|_| panic!("{ROWS} is not set: rows can be recorded only in a guest"));
    let row = format_row(table, cells);
    // Write the row with a single call, so that rows from concurrent processes don't interleave.
    let written = OpenOptions::new().append(true).open(&path).and_then(|mut file| file.write_all(row.as_bytes()));
    written.unwrap_or_else(|error| panic!("cannot append a row to {path}: {error}"));
}

#[track_caller]
fn format_row(table: &str, cells: &[&str]) -> String {
    let parts = std::iter::once(&table).chain(cells).copied().collect::<Vec<_>>();
    for part in &parts {
        assert!(!part.contains(['|', '\n', '\r']), "a table's name and its cells cannot contain | or a line break: {part:?}");
    }
    parts.join(" | ") + "\n"
}

/// Runs the guest's `dmaload` with `arguments`, and returns its output after it has exited.
///
/// # Panics
///
/// Panics if the program cannot be started.
#[track_caller]
#[must_use]
pub fn run_dmaload(arguments: &[&str]) -> Output {
    let program = "/bin/dmaload";
    Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("cannot run {program} {arguments:?}: {error}"))
}

/// A disk with one unreadable sector, which is part of the file `bad.bin`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadDisk {
    /// The path of `bad.bin`. The file contains [`bad_bytes`].
    pub file: PathBuf,
    /// The unreadable sector's offset in the file, in bytes.
    pub offset: u64,
    /// The errno with which a direct read of the sector fails. A read through the page cache fails
    /// with `EIO` on both disks.
    pub errno: i32,
}

impl BadDisk {
    /// Returns the disk that uses the nvme driver. This driver reports a medium error as
    /// `ENODATA`.
    ///
    /// # Panics
    ///
    /// Panics if this guest does not have the disk.
    #[must_use]
    pub fn nvme() -> Self {
        Self::mounted_at("/bad-nvme", libc::ENODATA)
    }

    /// Returns the disk that uses the virtio-blk driver. This driver reports a medium error as
    /// `EIO`.
    ///
    /// # Panics
    ///
    /// Panics if this guest does not have the disk.
    #[must_use]
    pub fn virtio() -> Self {
        Self::mounted_at("/bad-virtio", libc::EIO)
    }

    fn mounted_at(folder: &str, errno: i32) -> Self {
        let offset = env::var(BAD_OFFSET).ok().and_then(|value| value.parse().ok());
        let offset =
            offset.unwrap_or_else(|| panic!("{BAD_OFFSET} is not set to a number: this guest has no disks with a bad sector"));
        Self { file: Path::new(folder).join("bad.bin"), offset, errno }
    }
}

/// Returns the contents of `bad.bin`, including the bytes in the unreadable sector.
#[must_use]
pub fn bad_bytes() -> Vec<u8> {
    dmaload_testing::random_bytes(BAD_LEN, BAD_SEED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_the_first_two_numbers_of_an_id() {
        assert_eq!([parse_line("6.1-cloud"), parse_line("7.2-full"), parse_line("next")], [Some((6, 1)), Some((7, 2)), None]);
    }

    #[test]
    fn lines_with_dma_bufs_and_with_the_bug_are_known() {
        let lines = [(6, 1), (6, 10), (6, 11), (6, 12), (6, 15), (6, 16), (6, 18), (7, 2)];
        assert_eq!(lines.map(line_makes_dma_bufs), [false, false, false, true, true, true, true, true]);
        assert_eq!(lines.map(line_has_udmabuf_bug), [false, false, true, true, true, false, false, false]);
    }

    #[test]
    fn row_is_one_line() {
        assert_eq!(format_row("heaps", &["system", "yes"]), "heaps | system | yes\n");
    }

    #[test]
    #[should_panic(expected = "cannot contain |")]
    fn cell_with_a_separator_is_refused() {
        let _ = format_row("heaps", &["a|b"]);
    }
}
