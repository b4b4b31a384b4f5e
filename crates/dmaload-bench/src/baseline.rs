//! The baseline, which loads a file as a simple program would: it allocates memory, maps the file,
//! and copies the bytes.
//!
//! The 2024 kernel patch series for `DMA_HEAP_IOCTL_ALLOC_AND_READ` used the same baseline, but
//! with a dma-buf in place of the memfd. This one allocates shareable memory of the file's size,
//! maps the file through the page cache, and copies it with one `memcpy`, which faults in the
//! pages of the file mapping and of the new memory. It is neither tuned nor deliberately slowed
//! down, and leaves the page size to the kernel.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dmabuf::printable;
use dmaload_text::{FileError, ForPath};
use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::cold::{self, ColdError};
use crate::mapping;

/// A file that the baseline has loaded.
#[derive(Debug)]
pub struct Normal {
    /// Time from just before the file was opened until its last byte was copied.
    pub elapsed: Duration,
    /// The copy, so that it can be verified outside the measured time.
    pub memory: MmapMut,
}

/// Why the baseline could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum BaselineError {
    /// A call failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file could not be made cold, so the time would be meaningless.
    #[error(transparent)]
    NotCold(#[from] ColdError),
    /// The file is empty, so there is nothing to map.
    #[error("{} is empty", printable::path(.0))]
    Empty(PathBuf),
}

/// Makes the file cold, then loads it. [`Normal::elapsed`] does not include the time that making
/// the file cold takes.
///
/// # Errors
/// If the file can't be made cold or loaded.
pub fn load_cold(path: &Path) -> Result<Normal, BaselineError> {
    cold::make_cold(path)?;
    load(path)
}

/// Loads the file, whether or not it is cached.
///
/// # Errors
/// If the file is empty or a system call fails.
pub fn load(path: &Path) -> Result<Normal, BaselineError> {
    let started = Instant::now();
    let file = File::open(path).for_path("open", path)?;
    let length = file.metadata().for_path("stat", path)?.len();
    if length == 0 {
        return Err(BaselineError::Empty(path.to_owned()));
    }
    let mut memory = allocate(length).for_path("allocate memory for", path)?;
    let source = mapping::map_file(&file).for_path("map", path)?;
    memory.copy_from_slice(&source);
    Ok(Normal { elapsed: started.elapsed(), memory })
}

fn allocate(length: u64) -> std::io::Result<MmapMut> {
    let memory = File::from(memfd_create("dmaload-baseline", MemfdFlags::CLOEXEC)?);
    memory.set_len(length)?;
    mapping::map_memory(&memory)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test values are small")]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn whole_file_is_copied() {
        let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let content: Vec<u8> = (0..1_000_003_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        file.write_all(&content).unwrap();
        let normal = load_cold(file.path()).unwrap();
        assert!(*normal.memory == *content);
        assert!(normal.elapsed > Duration::ZERO);
    }

    #[test]
    fn empty_file_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(load(file.path()).unwrap_err().to_string().ends_with("is empty"));
    }
}
