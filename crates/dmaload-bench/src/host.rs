//! The machine: how much memory there is, that its host has really given it, and how far its disk reads ahead.
//!
//! A virtual machine gives free memory back to its host, and getting it again costs seconds for each GiB: a first run
//! after a pause would measure the host. So before each run as much memory as any mode takes is touched and freed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use memmap2::{Advice, MmapMut, MmapOptions};

/// Twice the file (page cache and memory, as `normal` needs), and some for the processes.
const EXTRA_BYTES: u64 = 128 << 20;

fn in_meminfo(key: &str) -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// What can be taken, page cache included.
pub(crate) fn available_bytes() -> u64 {
    in_meminfo("MemAvailable")
}

/// Touches as much memory as loading so many bytes takes by any mode, and gives it back. Where memory is to be short, only
/// what is free: page cache that was put there on purpose stays.
///
/// # Errors
/// When there is no such memory.
pub(crate) fn warm(file_bytes: u64, is_short: bool) -> io::Result<()> {
    let there = in_meminfo(if is_short { "MemFree" } else { "MemAvailable" });
    let bytes = (2 * file_bytes + EXTRA_BYTES).min(there / 10 * 8);
    drop(touched(usize::try_from(bytes).unwrap_or(0))?);
    Ok(())
}

/// How far the kernel reads ahead on the file's disk; `None` where no one disk is behind it.
pub(crate) fn read_ahead_kib(path: &Path) -> Option<u64> {
    let device = rustix::fs::stat(path).ok()?.st_dev;
    let device = PathBuf::from(format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device)));
    // The disk itself, or a partition of it.
    let settings = ["queue/read_ahead_kb", "../queue/read_ahead_kb"].into_iter().map(|setting| device.join(setting));
    settings.filter_map(|setting| fs::read_to_string(setting).ok()).find_map(|text| text.trim().parse().ok())
}

/// Private memory with all its pages, large ones where they can be had: that is quicker.
///
/// # Errors
/// When there is no such memory.
pub(crate) fn touched(bytes: usize) -> io::Result<MmapMut> {
    let mut memory = MmapOptions::new().len(bytes).map_anon()?;
    // Only quicker.
    let _ = memory.advise(Advice::HugePage);
    if memory.advise(Advice::PopulateWrite).is_err() {
        // Before Linux 5.14.
        memory.iter_mut().step_by(rustix::param::page_size()).for_each(|byte| *byte = 1);
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_memory_and_it_can_be_touched() {
        assert!(available_bytes() > 0);
        assert_eq!(in_meminfo("NoSuchThing"), 0);
        assert_eq!(touched(1 << 20).unwrap().len(), 1 << 20);
    }
}
