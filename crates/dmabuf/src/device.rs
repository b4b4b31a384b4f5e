//! Finds and identifies the devices that create dma-bufs.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, fstat, major, minor};

/// The device that creates dma-bufs from memfds.
pub(crate) const UDMABUF: &str = "/dev/udmabuf";
/// The folder that contains the dma-heap devices.
pub(crate) const HEAPS: &str = "/dev/dma_heap";

/// Returns the names of this machine's dma-heaps in sorted order, or an empty list if their folder
/// cannot be read.
pub(crate) fn heap_names() -> Vec<String> {
    let entries = std::fs::read_dir(HEAPS).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Returns the device path of the dma-heap called `name`.
pub(crate) fn heap_path(name: &str) -> PathBuf {
    Path::new(HEAPS).join(name)
}

/// A device that creates dma-bufs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// `/dev/udmabuf`.
    Udmabuf,
    /// The dma-heap with this name.
    DmaHeap(String),
}

impl Device {
    /// Identifies the device behind a descriptor by its device number, regardless of the path.
    /// Returns `None` if the descriptor is neither `/dev/udmabuf` nor a dma-heap.
    pub fn identify(fd: impl AsFd) -> Option<Self> {
        let found = fstat(fd).ok().filter(|found| FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice)?;
        let number = found.st_rdev;
        let entry = Path::new("/sys/dev/char").join(format!("{}:{}", major(number), minor(number)));
        match (target_name(&entry), target_name(&entry.join("subsystem"))) {
            (Some(name), Some(class)) => match class.as_str() {
                "dma_heap" => Some(Device::DmaHeap(name)),
                "misc" if name == "udmabuf" => Some(Device::Udmabuf),
                _ => None,
            },
            // Without sysfs, compare the number with those of the devices at the usual paths.
            _ => {
                let is_at = |path: &Path| std::fs::metadata(path).is_ok_and(|found| found.rdev() == number);
                let heaps = || heap_names().into_iter().find(|name| is_at(&heap_path(name)));
                if is_at(Path::new(UDMABUF)) { Some(Device::Udmabuf) } else { heaps().map(Device::DmaHeap) }
            }
        }
    }
}

/// Returns the file name of a sysfs link's target.
fn target_name(link: &Path) -> Option<String> {
    std::fs::canonicalize(link).ok()?.file_name()?.to_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_and_devices_are_not_identified() {
        for path in ["/dev/null", "/dev/zero", "/", "/proc/self/exe"] {
            assert_eq!(Device::identify(std::fs::File::open(path).unwrap()), None, "{path}");
        }
    }
}
