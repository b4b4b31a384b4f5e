//! Opens the devices that create dma-bufs, and explains failures.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fstat, open};

use crate::{Errno, printable};

/// A device could not be opened, or a descriptor does not refer to the expected device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot open {}: {}{}", printable::path(path), .errno.describe(), .about.iter().map(|about| format!("; {}", printable::text(about))).collect::<String>())]
#[non_exhaustive]
pub struct DeviceError {
    /// The device's path.
    pub path: PathBuf,
    /// The kernel's errno, or the errno that describes why this crate refused the device.
    pub errno: Errno,
    /// Further details, such as the device's mode and owner, or the names of the existing heaps.
    pub about: Option<String>,
}

/// Returns the path of the file behind a descriptor, for error messages. Without procfs, returns
/// `/proc/self/fd/N`.
pub(crate) fn path_of(fd: &OwnedFd) -> PathBuf {
    use std::os::fd::AsRawFd;
    let link = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    std::fs::read_link(&link).unwrap_or(link)
}

pub(crate) fn open_device(path: &Path) -> Result<OwnedFd, DeviceError> {
    let failed = |errno| DeviceError { path: path.to_owned(), errno, about: explain(path, errno) };
    let fd = open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let fd = fd.map_err(|errno| failed(Errno::from_rustix(errno)))?;
    let status = fstat(&fd).map_err(|errno| failed(Errno::from_rustix(errno)))?;
    let kind = FileType::from_raw_mode(status.st_mode);
    if kind == FileType::CharacterDevice { Ok(fd) } else { Err(failed(Errno::ENODEV)) }
}

fn explain(path: &Path, errno: Errno) -> Option<String> {
    match errno {
        Errno::EACCES | Errno::EPERM => {
            let found = std::fs::metadata(path).ok()?;
            Some(format!("its mode is {:04o}, its owner {}, its group {}", found.mode() & 0o7777, found.uid(), found.gid()))
        }
        Errno::ENODEV => Some("it is not a character device".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_device_and_plain_file_have_different_errors() {
        let missing = open_device(Path::new("/dev/no-such-device")).unwrap_err();
        assert_eq!(missing.to_string(), "cannot open /dev/no-such-device: ENOENT (No such file or directory)");
        let file = std::env::temp_dir().join(format!("dmabuf-device-{}", std::process::id()));
        std::fs::write(&file, "").unwrap();
        let refused = open_device(&file);
        std::fs::remove_file(&file).unwrap();
        assert!(refused.unwrap_err().to_string().ends_with("it is not a character device"));
    }
}
