//! Divides the process's file descriptors between open files and allocations.

use std::fs;

use dmabuf::Limit;

use crate::plan::BATCH_FILES;

/// The maximum number of small files open at once, across all loads.
pub(super) fn max_open_files() -> u64 {
    files_within(limit())
}

/// The maximum number of files in one batch.
pub(super) fn max_batch_files() -> usize {
    usize::try_from(max_open_files() / 4).unwrap_or(usize::MAX).clamp(1, BATCH_FILES)
}

/// The maximum number of allocations with a descriptor that one load may have.
pub(super) fn max_allocations() -> u64 {
    // Without procfs, assume more descriptors than a process usually has open.
    let open = fs::read_dir("/proc/self/fd").map_or(64, |entries| entries.count() as u64);
    memories_within(limit(), open)
}

fn limit() -> u64 {
    Limit::OpenFiles.current().unwrap_or(u64::MAX)
}

/// Returns how many files may be open under this descriptor limit. Each file needs two
/// descriptors: one for direct reads and one for buffered reads. If descriptors are scarce, files
/// get a quarter of them.
fn files_within(limit: u64) -> u64 {
    let most = 4 * BATCH_FILES as u64;
    if limit < 4 * most { (limit / 8).max(1) } else { most }
}

/// Returns how many allocations may hold a descriptor. They get three quarters of the descriptors
/// that are neither set aside for files nor already open. The remaining quarter is left for
/// descriptors that the process opens later.
fn memories_within(limit: u64, open: u64) -> u64 {
    limit.saturating_sub(2 * files_within(limit)).saturating_sub(open) / 4 * 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_allocations_fit_into_the_descriptor_limit() {
        for limit in [0, 1, 8, 16, 64, 128, 256, 1023, 1024, 4096, 1 << 20, u64::MAX] {
            for open in [0, 10, 500] {
                let (files, memories) = (files_within(limit), memories_within(limit, open));
                assert!(files >= 1 && files <= 4 * BATCH_FILES as u64);
                assert!(limit < 16 || memories == 0 || 2 * files + memories + open <= limit, "{limit}: {files}, {memories}");
            }
        }
        assert_eq!((files_within(128), memories_within(128, 10)), (16, 63));
        assert_eq!(files_within(1024), 256);
    }
}
