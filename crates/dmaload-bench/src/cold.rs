//! Makes sure that a file is read from storage: evicts the file from the page cache, and checks
//! that none of its bytes is still cached.
//!
//! `POSIX_FADV_DONTNEED` is only a hint: dirty pages, mapped pages and the pages of in-memory file
//! systems stay cached, and the call still returns 0. A measurement that relied on this call could
//! measure the page cache, so [`make_cold`] checks afterwards.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use dmabuf::printable;
use dmaload_text::bytes;
use dmaload_text::{FileError, ForPath};
use rustix::fs::Advice;

use crate::mapping;

/// Maximum number of evictions. Pages that are under writeback, or in another CPU's batch, cannot
/// be dropped until a moment later.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(20);

/// How the number of cached bytes was determined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// `cachestat(2)`, on Linux 6.5 or later.
    Cachestat,
    /// `mincore(2)` on a mapping. For a file that the caller neither owns nor can write to, the
    /// kernel always reports all pages as cached.
    Mincore,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Cachestat => "cachestat",
            Self::Mincore => "mincore",
        })
    }
}

/// How much of a file is in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Residency {
    /// The number of bytes that are cached, a multiple of the page size.
    pub resident: u64,
    /// The length of the file.
    pub total: u64,
    /// How `resident` was determined.
    pub method: Method,
}

impl Residency {
    /// Returns whether no byte is cached, which means that every byte must be read from storage.
    #[must_use]
    pub fn is_cold(&self) -> bool {
        self.resident == 0
    }
}

/// Why a file could not be made cold.
#[derive(Debug, thiserror::Error)]
pub enum ColdError {
    /// A call failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// Every call succeeded, but the file is still cached.
    #[error(
        "{} is still in the page cache: {} of {} according to {}; another process may map or read it, or \
         its file system may keep files in memory",
        printable::path(&path), bytes(found.resident), bytes(found.total), found.method
    )]
    StillCached {
        /// The file.
        path: PathBuf,
        /// How much was still cached after the last eviction.
        found: Residency,
    },
}

/// Writes dirty pages back, then advises the kernel to drop the file's pages. The kernel need not
/// comply: see [`make_cold`].
fn evict(file: &File, path: &Path) -> Result<(), FileError> {
    // The kernel does not drop dirty pages.
    file.sync_all().for_path("write back", path)?;
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed).for_path("drop the cached pages of", path)
}

/// Determines how much of the file is in the page cache, without reading the file.
fn residency(file: &File, path: &Path) -> Result<Residency, FileError> {
    let total = file.metadata().for_path("stat", path)?.len();
    let (resident, method) = match dmaload::probe::cached_bytes(file).map_err(io::Error::from) {
        Ok(resident) => (resident, Method::Cachestat),
        Err(error) if is_refusal(&error) => (count_by_mincore(file, path)?, Method::Mincore),
        Err(error) => return Err(error).for_path("count the cached pages of", path),
    };
    Ok(Residency { resident, total, method })
}

/// Returns whether the error means that `cachestat(2)` is unavailable. Older kernels lack the
/// call, sandboxes forbid it, newer kernels refuse it to users who neither own the file nor can
/// write to it, and some file systems do not support it.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::EOPNOTSUPP))
}

fn count_by_mincore(file: &File, path: &Path) -> Result<u64, FileError> {
    // An empty file can't be mapped, and has no pages to count.
    if file.metadata().for_path("stat", path)?.len() == 0 {
        return Ok(0);
    }
    let mapping = mapping::map_file(file).for_path("map", path)?;
    mapping::mincore(&mapping).for_path("count the cached pages of", path)
}

/// Evicts the file from the page cache and verifies that none of it is still cached.
///
/// # Errors
/// [`ColdError::StillCached`] if pages remain after several attempts, otherwise the error of the
/// failed call.
pub fn make_cold(path: &Path) -> Result<Residency, ColdError> {
    let file = File::open(path).for_path("open", path)?;
    let mut attempt = 1;
    loop {
        evict(&file, path)?;
        let found = residency(&file, path)?;
        match (found.is_cold(), attempt == ATTEMPTS) {
            (true, _) => return Ok(found),
            (false, true) => return Err(ColdError::StillCached { path: path.to_owned(), found }),
            (false, false) => thread::sleep(PAUSE),
        }
        attempt += 1;
    }
}

/// Reads the file into the page cache and verifies that all of it is cached.
///
/// # Errors
/// The error of the failed call, or ENOMEM if the page cache does not keep the file.
pub fn make_warm(path: &Path) -> Result<(), FileError> {
    let mut file = File::open(path).for_path("open", path)?;
    // Write dirty pages back first. Otherwise direct reads would have to wait for the writeback.
    file.sync_all().for_path("write back", path)?;
    io::copy(&mut file, &mut io::sink()).for_path("read", path)?;
    let found = residency(&file, path)?;
    if found.resident < found.total {
        return Err(io::Error::from_raw_os_error(libc::ENOMEM)).for_path("fully cache", path);
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test values are small")]
mod tests {
    use super::*;
    use std::io::Write as _;

    const LENGTH: u64 = 3 << 20;

    fn warm_file(folder: &Path) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new_in(folder).unwrap();
        file.write_all(&vec![0x5A; LENGTH as usize]).unwrap();
        file
    }

    /// Creates a cached file in the source folder, because the system's temporary folder may be in
    /// memory.
    fn warm_file_on_disk() -> tempfile::NamedTempFile {
        warm_file(Path::new(env!("CARGO_MANIFEST_DIR")))
    }

    fn residency_of(path: &Path) -> Residency {
        residency(&File::open(path).unwrap(), path).unwrap()
    }

    #[test]
    fn written_file_is_warm_until_made_cold() {
        let file = warm_file_on_disk();
        let before = residency_of(file.path());
        assert_eq!((before.resident, before.total), (LENGTH, LENGTH));
        let after = make_cold(file.path()).unwrap();
        assert!(after.is_cold());
        make_warm(file.path()).unwrap();
        assert_eq!(residency_of(file.path()), before);
        assert!(!residency_of(file.path()).is_cold());
    }

    #[test]
    fn mincore_agrees_with_cachestat() {
        let file = warm_file_on_disk();
        let open = file.as_file();
        assert_eq!(count_by_mincore(open, file.path()).unwrap(), LENGTH);
        make_cold(file.path()).unwrap();
        assert_eq!(count_by_mincore(open, file.path()).unwrap(), 0);
    }

    #[test]
    fn empty_file_is_cold() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        assert_eq!(make_cold(file.path()).unwrap().resident, 0);
        assert_eq!(count_by_mincore(file.as_file(), file.path()).unwrap(), 0);
    }

    #[test]
    fn file_in_memory_cannot_be_made_cold() {
        let shm = Path::new("/dev/shm");
        if !shm.is_dir() {
            return;
        }
        let file = warm_file(shm);
        let error = make_cold(file.path()).unwrap_err();
        assert!(matches!(error, ColdError::StillCached { found, .. } if found.resident == LENGTH), "{error}");
        assert!(error.to_string().contains("3.00 MiB of 3.00 MiB"), "{error}");
    }

    #[test]
    fn error_names_the_missing_file() {
        let error = make_cold(Path::new("/nonexistent/x")).unwrap_err();
        assert_eq!(error.to_string(), "cannot open /nonexistent/x: ENOENT (No such file or directory)");
    }
}
