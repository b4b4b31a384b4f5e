//! Warms the machine's memory before each run, and looks up the readahead of a file's disk.
//!
//! A virtual machine may return free memory to its host. Getting it back takes seconds per GiB, so
//! the first run after a pause would measure the host. To prevent this, the bench touches and then
//! frees memory before each run: as much as any mode needs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use memmap2::{Advice, MmapMut, MmapOptions};

/// How much memory to warm for the processes themselves, in bytes. Twice the size of the files is
/// added, because `normal` holds the files both in the page cache and in its own memory.
const EXTRA_BYTES: u64 = 128 << 20;

fn meminfo_bytes(key: &str) -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Returns how much memory can be allocated, including reclaimable page cache.
pub(crate) fn available_bytes() -> u64 {
    meminfo_bytes("MemAvailable")
}

/// Touches as much memory as any mode needs to load `file_bytes` bytes, but at most 80 % of the
/// available memory, and frees it.
///
/// Under memory pressure (`is_short`), touches at most 80 % of the free memory instead, to keep
/// page cache that was created on purpose.
///
/// # Errors
/// If there is not enough memory.
pub(crate) fn warm(file_bytes: u64, is_short: bool) -> io::Result<()> {
    let available = meminfo_bytes(if is_short { "MemFree" } else { "MemAvailable" });
    let bytes = (2 * file_bytes + EXTRA_BYTES).min(available / 10 * 8);
    drop(allocate_touched(usize::try_from(bytes).unwrap_or(0))?);
    Ok(())
}

/// Returns how many KiB the file's disk reads ahead, or `None` if the file is not on a single
/// disk.
pub(crate) fn read_ahead_kib(path: &Path) -> Option<u64> {
    let device = rustix::fs::stat(path).ok()?.st_dev;
    let device = PathBuf::from(format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device)));
    // The device is either a disk or a partition of one.
    let settings = ["queue/read_ahead_kb", "../queue/read_ahead_kb"].into_iter().map(|setting| device.join(setting));
    settings.filter_map(|setting| fs::read_to_string(setting).ok()).find_map(|text| text.trim().parse().ok())
}

/// Allocates private memory and populates all of it, with huge pages if possible.
///
/// # Errors
/// If there is not enough memory.
pub(crate) fn allocate_touched(bytes: usize) -> io::Result<MmapMut> {
    let mut memory = MmapOptions::new().len(bytes).map_anon()?;
    // Populating huge pages is faster, but small pages will do.
    let _ = memory.advise(Advice::HugePage);
    if memory.advise(Advice::PopulateWrite).is_err() {
        // Kernels before Linux 5.14 lack MADV_POPULATE_WRITE.
        memory.iter_mut().step_by(rustix::param::page_size()).for_each(|byte| *byte = 1);
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_can_be_allocated() {
        assert!(available_bytes() > 0);
        assert_eq!(meminfo_bytes("NoSuchThing"), 0);
        assert_eq!(allocate_touched(1 << 20).unwrap().len(), 1 << 20);
    }
}
