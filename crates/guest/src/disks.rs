//! Makes the guests' disk images: an empty disk, and one with an unreadable sector.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dmaload_guest::{SECTOR, bad_bytes};

use crate::run;

/// The length of the empty disk in bytes. The image file stays sparse, because guests write to
/// snapshots of it.
const DISK_LEN: u64 = 3 << 30;
const BAD_DISK_LEN: u64 = 64 << 20;
const BLOCK: u64 = 4096;
/// The number of the block in `bad.bin` that contains the bad sector. It is near the middle of the
/// file.
const BAD_BLOCK: u64 = 2_049;
/// The bad sector's number within its block. A block has eight sectors, and this one is neither
/// the first nor the last.
const BAD_SECTOR_IN_BLOCK: u64 = 3;

/// The disks' image files, which all guests share. A guest writes to its own snapshot of the empty
/// disk, and the other disks are read-only.
#[derive(Debug)]
pub(crate) struct Disks {
    pub(crate) empty: PathBuf,
    /// QEMU's cache options for the empty disk. They enable `O_DIRECT` if the host's file system
    /// supports it.
    pub(crate) cache: &'static str,
    pub(crate) bad: PathBuf,
    /// The bad sector's number on the disk.
    pub(crate) bad_sector: u64,
    /// The bad sector's offset in `bad.bin`, in bytes.
    pub(crate) bad_offset: u64,
    /// The images of the root file systems that suites need, with the suites' names.
    pub(crate) roots: Vec<(&'static str, PathBuf)>,
}

/// Makes the images in `folder`.
pub(crate) fn make(folder: &Path) -> Result<Disks> {
    let empty = folder.join("disk.img");
    make_sparse_file(&empty, DISK_LEN)?;
    make_file_system(&empty, None)?;
    // QEMU refuses `cache=none` if the file system does not support `O_DIRECT`.
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&empty).is_ok();
    let cache = if direct { "cache=none,aio=native" } else { "cache=writeback,aio=threads" };

    let contents = folder.join("bad");
    fs::create_dir_all(&contents)?;
    fs::write(contents.join("bad.bin"), bad_bytes())?;
    let bad = folder.join("bad.img");
    make_sparse_file(&bad, BAD_DISK_LEN)?;
    make_file_system(&bad, Some(&contents))?;
    let bmap = run::output(run::tool("debugfs").args(["-R", &format!("bmap bad.bin {BAD_BLOCK}")]).arg(&bad))?;
    let block = parse_block(&bmap).with_context(|| format!("cannot find a block of bad.bin in debugfs's output: {bmap}"))?;

    let sector_len = SECTOR as u64;
    Ok(Disks {
        empty,
        cache,
        bad,
        bad_sector: block * (BLOCK / sector_len) + BAD_SECTOR_IN_BLOCK,
        bad_offset: BAD_BLOCK * BLOCK + BAD_SECTOR_IN_BLOCK * sector_len,
        roots: Vec::new(),
    })
}

fn make_sparse_file(path: &Path, len: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    file.set_len(len).with_context(|| format!("cannot set the length of {} to {len} bytes", path.display()))
}

fn make_file_system(image: &Path, contents: Option<&Path>) -> Result<()> {
    let mut command = run::tool("mkfs.ext4");
    // With lazy initialization, the guest's kernel would write to the disk during the tests.
    command.args(["-q", "-F", "-b", &BLOCK.to_string(), "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"]);
    if let Some(contents) = contents {
        command.arg("-d").arg(contents);
    }
    run::output(command.arg(image)).map(drop)
}

/// Parses a block's number, which is the last word of debugfs's output. Returns `None` for a hole,
/// for which debugfs prints 0.
fn parse_block(bmap: &str) -> Option<u64> {
    bmap.split_whitespace().last()?.parse().ok().filter(|&block| block != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_sector_is_inside_the_file() {
        let len = dmaload_guest::BAD_LEN as u64;
        assert!((BAD_BLOCK + 1) * BLOCK < len && BAD_SECTOR_IN_BLOCK < BLOCK / SECTOR as u64);
    }

    #[test]
    fn hole_has_no_block() {
        assert_eq!(parse_block("10241\n"), Some(10_241));
        assert_eq!(parse_block("0\n"), None);
        assert_eq!(parse_block(""), None);
    }
}
