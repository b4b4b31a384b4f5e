//! Helpers for the suites that run inside a guest, and definitions that the harness shares with
//! them.
//!
//! Most suites are integration tests of this package (`tests/`); `src/suites.rs` lists all of
//! them. The harness (`src/main.rs`) builds them statically, packs them into an initramfs and runs
//! them as root on a stock kernel. The guest provides:
//!
//! ```text
//! /bin/dmaload              the command                         [`run_dmaload`]
//! /bin/*                    busybox, and C programs
//! /disk                     ext4 on nvme, 3 GiB, empty at boot; CARGO_TARGET_TMPDIR links to
//!                           a folder on it
//! /bad-nvme, /bad-virtio    on some kernels: read-only ext4 with `bad.bin`, which has an
//!                           unreadable sector                   [`BadDisk`]
//! /vulkan                   for the suite `vulkan`: read-only ext4 with a Vulkan driver
//! /tmp, /dev/shm            tmpfs
//! /sys/fs/cgroup            cgroup2
//! /sys/kernel/debug         debugfs
//! ```
//!
//! [`record_row`] passes a fact about the guest's kernel to the harness. `test --check FILE`
//! compares all such facts with the tables of docs/kernels.md, and `test --write FILE` writes them
//! there.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]

use std::env;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The environment variable that holds the kernel's id, such as `6.12-full`. Set in guests only.
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

/// A kernel's line: `(6, 12)` for all releases of Linux 6.12.
pub type Line = (u32, u32);

/// Whether Debian's kernels of this line have devices that make dma-bufs: Linux 6.12 and later.
#[must_use]
pub const fn line_makes_dma_bufs(line: Line) -> bool {
    line.0 > 6 || (line.0 == 6 && line.1 >= 12)
}

/// Whether kernel drivers that map a udmabuf on huge pages see wrong bytes: Linux 6.11 to 6.15.
#[must_use]
pub const fn line_has_udmabuf_bug(line: Line) -> bool {
    line.0 == 6 && line.1 >= 11 && line.1 < 16
}

/// Returns the kernel's id: `LINE-FLAVOR`, such as `6.12-full`.
///
/// # Panics
///
/// Outside a guest, where the kernel has no id.
#[must_use]
pub fn kernel_id() -> String {
    env::var(KERNEL).unwrap_or_else(|_| {
        panic!("{KERNEL} is not set: this suite runs in a guest only; try `cargo run -p dmaload-guest -- test`")
    })
}

/// Returns the kernel's line, which determines the behavior that suites expect.
///
/// # Panics
///
/// Outside a guest, or if the kernel's id does not begin with a line.
#[must_use]
pub fn kernel_line() -> Line {
    parse_line(&kernel_id()).unwrap_or_else(|| panic!("the kernel's id is not LINE-FLAVOR: {}", kernel_id()))
}

fn parse_line(id: &str) -> Option<Line> {
    let (major, minor) = id.split('-').next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Whether this kernel has devices that make dma-bufs.
///
/// # Panics
///
/// Outside a guest.
#[must_use]
pub fn makes_dma_bufs() -> bool {
    line_makes_dma_bufs(kernel_line())
}

/// Whether this is one of Debian's full kernels, which have importers.
///
/// # Panics
///
/// Outside a guest.
#[must_use]
pub fn is_full() -> bool {
    kernel_id().ends_with("-full")
}

/// Whether drivers of this kernel that map a udmabuf on huge pages see wrong bytes.
///
/// # Panics
///
/// Outside a guest.
#[must_use]
pub fn has_udmabuf_bug() -> bool {
    line_has_udmabuf_bug(kernel_line())
}

/// Whether this guest has the disks with an unreadable sector.
#[must_use]
pub fn has_bad_disks() -> bool {
    env::var_os(BAD_OFFSET).is_some()
}

/// Records a row of `table` for docs/kernels.md. The harness adds the kernel's id as the first
/// cell.
///
/// # Panics
///
/// Outside a guest, if `table` or a cell contains `|` or a line end, or if the row cannot be
/// written.
#[track_caller]
pub fn record_row(table: &str, cells: &[&str]) {
    let path = env::var(ROWS).unwrap_or_else(|_| panic!("{ROWS} is not set: rows are collected in a guest only"));
    let row = format_row(table, cells);
    // A row is written by a single call, so that rows of concurrent processes do not mix.
    let written = OpenOptions::new().append(true).open(&path).and_then(|mut file| file.write_all(row.as_bytes()));
    written.unwrap_or_else(|error| panic!("cannot append a row to {path}: {error}"));
}

#[track_caller]
fn format_row(table: &str, cells: &[&str]) -> String {
    let parts = std::iter::once(&table).chain(cells).copied().collect::<Vec<_>>();
    for part in &parts {
        assert!(!part.contains(['|', '\n', '\r']), "a table's name and its cells cannot contain | or a line end: {part:?}");
    }
    parts.join(" | ") + "\n"
}

/// Runs the guest's `dmaload` with these arguments, and waits until it exits.
///
/// # Panics
///
/// If the program cannot be started.
#[track_caller]
#[must_use]
pub fn run_dmaload(arguments: &[&str]) -> Output {
    let program = "/bin/dmaload";
    Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("cannot run {program} {arguments:?}: {error}"))
}

/// A disk with one unreadable sector, which belongs to the file `bad.bin`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadDisk {
    /// The path of `bad.bin`, which has the contents [`bad_bytes`].
    pub file: PathBuf,
    /// The unreadable sector's offset in the file, in bytes.
    pub offset: u64,
    /// The errno of a direct read of the sector. A read through the page cache fails with `EIO`.
    pub errno: i32,
}

impl BadDisk {
    /// The disk on nvme, whose driver reports a medium error as `ENODATA`.
    ///
    /// # Panics
    ///
    /// In guests without the disk.
    #[must_use]
    pub fn nvme() -> Self {
        Self::mounted_at("/bad-nvme", libc::ENODATA)
    }

    /// The disk on virtio-blk, whose driver reports a medium error as `EIO`.
    ///
    /// # Panics
    ///
    /// In guests without the disk.
    #[must_use]
    pub fn virtio() -> Self {
        Self::mounted_at("/bad-virtio", libc::EIO)
    }

    fn mounted_at(folder: &str, errno: i32) -> Self {
        let offset = env::var(BAD_OFFSET).ok().and_then(|value| value.parse().ok());
        let offset = offset.unwrap_or_else(|| panic!("{BAD_OFFSET} is not set to a number: this guest has no bad disks"));
        Self { file: Path::new(folder).join("bad.bin"), offset, errno }
    }
}

/// The contents of `bad.bin`, including those of the unreadable sector.
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
