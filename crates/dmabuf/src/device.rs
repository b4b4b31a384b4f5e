//! Opening the devices that make dma-bufs, saying why one can't be opened, and which one a descriptor is of.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fstat, major, minor, open};
use rustix::io::Errno;

use crate::{DmaHeap, Udmabuf, printable};

/// A device that could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot open {}: {}{}", printable::path(path), crate::errno::describe(*.errno), .about.iter().map(|about| format!("; {}", printable::text(about))).collect::<String>())]
#[non_exhaustive]
pub struct DeviceError {
    /// The device.
    pub path: PathBuf,
    /// The kernel's answer.
    pub errno: Errno,
    /// Whose it is, or which others there are.
    pub about: Option<String>,
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
                let heaps = || DmaHeap::names().into_iter().find(|name| is_at(&DmaHeap::path(name)));
                if is_at(Path::new(Udmabuf::PATH)) { Some(Device::Udmabuf) } else { heaps().map(Device::DmaHeap) }
            }
        }
    }
}

/// The name of what a link of sysfs leads to.
fn name_of(link: &Path) -> Option<String> {
    std::fs::canonicalize(link).ok()?.file_name()?.to_str().map(str::to_owned)
}

/// The path by which a descriptor is known here, for errors.
pub(crate) fn path_of(fd: &OwnedFd) -> PathBuf {
    use std::os::fd::AsRawFd;
    let link = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    std::fs::read_link(&link).unwrap_or(link)
}

pub(crate) fn open_device(path: &Path) -> Result<OwnedFd, DeviceError> {
    let failed = |errno| DeviceError { path: path.to_owned(), errno, about: about(path, errno) };
    let fd = open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let kind = FileType::from_raw_mode(fstat(&fd).map_err(failed)?.st_mode);
    if kind == FileType::CharacterDevice { Ok(fd) } else { Err(failed(Errno::NODEV)) }
}

fn about(path: &Path, errno: Errno) -> Option<String> {
    match errno {
        Errno::ACCESS | Errno::PERM => {
            let found = std::fs::metadata(path).ok()?;
            Some(format!("its mode is {:04o}, its owner {}, its group {}", found.mode() & 0o7777, found.uid(), found.gid()))
        }
        Errno::NODEV => Some("it is no character device".to_owned()),
        _ => None,
    }
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

    #[test]
    fn a_missing_device_and_a_plain_file_are_told_apart() {
        let missing = open_device(Path::new("/dev/no-such-device")).unwrap_err();
        assert_eq!(missing.to_string(), "cannot open /dev/no-such-device: ENOENT (No such file or directory)");
        let file = std::env::temp_dir().join(format!("dmabuf-device-{}", std::process::id()));
        std::fs::write(&file, "").unwrap();
        let refused = open_device(&file);
        std::fs::remove_file(&file).unwrap();
        assert!(refused.unwrap_err().to_string().ends_with("it is no character device"));
    }
}
