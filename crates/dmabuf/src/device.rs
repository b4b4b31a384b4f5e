//! The devices that make dma-bufs, and which one a descriptor is of.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, fstat, major, minor};

/// The device that makes dma-bufs of memory files.
pub(crate) const UDMABUF: &str = "/dev/udmabuf";
/// Where the kernel puts the devices of dma-heaps.
pub(crate) const HEAPS: &str = "/dev/dma_heap";

/// The names of the dma-heaps of this machine, in order.
pub(crate) fn heap_names() -> Vec<String> {
    let entries = std::fs::read_dir(HEAPS).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The device of the dma-heap of this name.
pub(crate) fn heap_path(name: &str) -> PathBuf {
    Path::new(HEAPS).join(name)
}

/// A device that makes dma-bufs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    /// `/dev/udmabuf`.
    Udmabuf,
    /// The dma-heap of this name.
    DmaHeap(String),
}

impl Device {
    /// Which of them a descriptor is of, by its device number: wherever its file was, and whoever opened it. `None` for anything else.
    pub fn of(fd: impl AsFd) -> Option<Self> {
        let found = fstat(fd).ok().filter(|found| FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice)?;
        let number = found.st_rdev;
        let entry = Path::new("/sys/dev/char").join(format!("{}:{}", major(number), minor(number)));
        match (name_of(&entry), name_of(&entry.join("subsystem"))) {
            (Some(name), Some(class)) => match class.as_str() {
                "dma_heap" => Some(Device::DmaHeap(name)),
                "misc" if name == "udmabuf" => Some(Device::Udmabuf),
                _ => None,
            },
            // Without sysfs: is it that of the devices where they usually are?
            _ => {
                let is_at = |path: &Path| std::fs::metadata(path).is_ok_and(|found| found.rdev() == number);
                let heaps = || heap_names().into_iter().find(|name| is_at(&heap_path(name)));
                if is_at(Path::new(UDMABUF)) { Some(Device::Udmabuf) } else { heaps().map(Device::DmaHeap) }
            }
        }
    }
}

/// The name of what a link of sysfs leads to.
fn name_of(link: &Path) -> Option<String> {
    std::fs::canonicalize(link).ok()?.file_name()?.to_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_files_and_devices_are_none_of_them() {
        for path in ["/dev/null", "/dev/zero", "/", "/proc/self/exe"] {
            assert_eq!(Device::of(std::fs::File::open(path).unwrap()), None, "{path}");
        }
    }
}
