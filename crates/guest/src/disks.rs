//! The disks that guests get: an empty one, and one of which one sector can't be read.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dmaload_guest::{SECTOR, bad_bytes};

use crate::run;

/// Sparse: it takes what is written, and what is written goes to a snapshot.
const DISK_LEN: u64 = 3 << 30;
const BAD_DISK_LEN: u64 = 64 << 20;
const BLOCK: u64 = 4096;
/// The block of `bad.bin` with the bad sector: in the middle.
const BAD_BLOCK: u64 = 2_049;
/// Neither the first nor the last sector of its block.
const BAD_SECTOR_IN_BLOCK: u64 = 3;

/// Image files, the same for all guests: these write to snapshots.
#[derive(Debug)]
pub(crate) struct Disks {
    pub(crate) empty: PathBuf,
    /// How QEMU is to open the empty disk: past the page cache, where the file system can do that.
    pub(crate) cache: &'static str,
    pub(crate) bad: PathBuf,
    /// The bad sector, counted from the disk's begin.
    pub(crate) bad_sector: u64,
    /// The bad sector's offset in `bad.bin`.
    pub(crate) bad_offset: u64,
}

/// Makes the images in `folder`.
pub(crate) fn make(folder: &Path) -> Result<Disks> {
    let empty = folder.join("disk.img");
    sparse(&empty, DISK_LEN)?;
    format(&empty, None)?;
    // QEMU would refuse to open it where the file system has no O_DIRECT.
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&empty).is_ok();
    let cache = if direct { "cache=none,aio=native" } else { "cache=writeback,aio=threads" };

    let contents = folder.join("bad");
    fs::create_dir_all(&contents)?;
    fs::write(contents.join("bad.bin"), bad_bytes())?;
    let bad = folder.join("bad.img");
    sparse(&bad, BAD_DISK_LEN)?;
    format(&bad, Some(&contents))?;
    let bmap = run::output(run::tool("debugfs").args(["-R", &format!("bmap bad.bin {BAD_BLOCK}")]).arg(&bad))?;
    let block = physical_block(&bmap).with_context(|| format!("debugfs printed no block of bad.bin: {bmap}"))?;

    let sector_len = SECTOR as u64;
    Ok(Disks {
        empty,
        cache,
        bad,
        bad_sector: block * (BLOCK / sector_len) + BAD_SECTOR_IN_BLOCK,
        bad_offset: BAD_BLOCK * BLOCK + BAD_SECTOR_IN_BLOCK * sector_len,
    })
}

fn sparse(path: &Path, len: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("can't make {}", path.display()))?;
    file.set_len(len).with_context(|| format!("can't make {} {len} bytes long", path.display()))
}

fn format(image: &Path, contents: Option<&Path>) -> Result<()> {
    let mut command = run::tool("mkfs.ext4");
    // All tables now: the guest's kernel is not to write to the disk behind the tests.
    command.args(["-q", "-F", "-b", &BLOCK.to_string(), "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"]);
    if let Some(contents) = contents {
        command.arg("-d").arg(contents);
    }
    run::output(command.arg(image)).map(drop)
}

/// The last number that debugfs printed; block 0 means a hole.
fn physical_block(bmap: &str) -> Option<u64> {
    bmap.split_whitespace().last()?.parse().ok().filter(|&block| block != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bad_sector_is_inside_the_file() {
        let len = dmaload_guest::BAD_LEN as u64;
        assert!((BAD_BLOCK + 1) * BLOCK < len && BAD_SECTOR_IN_BLOCK < BLOCK / SECTOR as u64);
    }

    #[test]
    fn a_hole_has_no_block() {
        assert_eq!(physical_block("10241\n"), Some(10_241));
        assert_eq!(physical_block("0\n"), None);
        assert_eq!(physical_block(""), None);
    }
}
