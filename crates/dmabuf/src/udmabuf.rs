//! `/dev/udmabuf`, which creates dma-bufs from the pages of memfds.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::ptr;

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use crate::device;
use crate::open::{open_device, path_of};
use crate::{Device, DeviceError, DmaBuf, Error, Memfd};

/// `struct udmabuf_create` from include/uapi/linux/udmabuf.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct Create {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
}

const UDMABUF_CREATE: Opcode = opcode::write::<Create>(b'u', 0x42);
const _: () = assert!(size_of::<Create>() == 24 && UDMABUF_CREATE == 0x4018_7542);

const UDMABUF_FLAGS_CLOEXEC: u32 = 1;

// SAFETY: the opcode is UDMABUF_CREATE, and the pointer points to the struct that this ioctl
// reads. The ioctl does not write to this process's memory.
unsafe impl Ioctl for Create {
    /// The new descriptor, which the ioctl returns.
    type Output = RawFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        UDMABUF_CREATE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::from_mut(self).cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<RawFd> {
        Ok(output)
    }
}

/// A range of a memfd.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// The memfd that contains the range.
    pub memfd: &'a Memfd,
    /// The start, a multiple of the page size.
    pub offset: u64,
    /// The length, a multiple of the page size.
    pub bytes: usize,
}

/// The limits of this kernel's udmabuf driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdmabufLimits {
    /// Maximum size of one dma-buf in bytes, converted from the driver's parameter `size_limit_mb`
    /// (in MiB); `None` if unlimited or unknown.
    pub size_bytes: Option<u64>,
    /// Maximum number of ranges in one dma-buf, from the driver's parameter `list_limit`; `None`
    /// if unlimited or unknown. [`Udmabuf::create`] uses one range.
    pub list_entries: Option<u64>,
}

/// An open `/dev/udmabuf`.
#[derive(Debug)]
pub struct Udmabuf {
    fd: OwnedFd,
}

impl Udmabuf {
    /// The path of the device.
    pub const PATH: &str = device::UDMABUF;
    /// The folder with the driver's limits, which everyone can read and root can change.
    pub const PARAMETERS: &str = "/sys/module/udmabuf/parameters";

    /// Opens the device.
    ///
    /// # Errors
    /// ENOENT on kernels without the driver (CONFIG_UDMABUF), EACCES without permission (by
    /// default, the device has mode 0600), ENODEV when the file is not a character device.
    pub fn open() -> Result<Self, DeviceError> {
        Ok(Udmabuf { fd: open_device(Path::new(Self::PATH))? })
    }

    /// Wraps the descriptor of the open device. A process without permission to open the device
    /// can receive such a descriptor from another process.
    ///
    /// # Errors
    /// ENODEV when the descriptor is not `/dev/udmabuf`.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, DeviceError> {
        if Device::identify(&fd) == Some(Device::Udmabuf) {
            return Ok(Udmabuf { fd });
        }
        Err(DeviceError { path: path_of(&fd), errno: crate::Errno::ENODEV, about: Some(format!("it is not {}", Self::PATH)) })
    }

    /// Reads the current limits. Root can change them at any time.
    pub fn limits() -> UdmabufLimits {
        let read = |name: &str| std::fs::read_to_string(Path::new(Self::PARAMETERS).join(name)).ok();
        UdmabufLimits {
            size_bytes: read("size_limit_mb").as_deref().and_then(parse_limit).map(|mib| mib << 20),
            list_entries: read("list_limit").as_deref().and_then(parse_limit),
        }
    }

    /// Creates a dma-buf from a range of a memfd. The dma-buf shares the memfd's pages and keeps
    /// them after the memfd is closed.
    ///
    /// # Errors
    /// EINVAL when the offset or size is not a multiple of the page size, when the size is 0 or
    /// above [`UdmabufLimits::size_bytes`], when the range reaches past the memfd's end, or when
    /// the memfd is sealed against writes; EBADFD when the file is not a memfd.
    ///
    /// This method itself refuses memfds with `F_SEAL_FUTURE_WRITE`, because a udmabuf is
    /// writable, and kernels before Linux 6.13 ignore that seal unless the fix was backported.
    pub fn create(&self, part: Part<'_>) -> Result<DmaBuf, Error> {
        refuse_sealed(&part)?;
        let create = Create {
            memfd: part.memfd.as_fd().as_raw_fd().cast_unsigned(),
            flags: UDMABUF_FLAGS_CLOEXEC,
            offset: part.offset,
            size: part.bytes as u64,
        };
        // SAFETY: the descriptor is that of /dev/udmabuf, and `Create` implements `Ioctl` for the
        // struct that the driver's ioctl expects.
        let fd = unsafe { ioctl(&self.fd, create) }.map_err(|errno| Error::from_call("make a udmabuf", part.bytes, errno))?;
        // SAFETY: the kernel just created this descriptor, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(DmaBuf::new(fd, part.bytes))
    }

    /// Returns whether importers that map a dma-buf into the kernel would see wrong bytes if its
    /// memfd has huge pages.
    ///
    /// In Linux 6.11 to 6.15, `vmap_udmabuf` maps the first page of a folio in place of each of
    /// its pages (drivers/dma-buf/udmabuf.c; observed on 6.12.117). Programs cannot detect this
    /// bug, so the result is based on the kernel version. A version that cannot be parsed is
    /// treated as affected.
    pub fn huge_pages_show_wrong_bytes() -> bool {
        is_affected(&rustix::system::uname().release().to_string_lossy())
    }
}

fn refuse_sealed(part: &Part<'_>) -> Result<(), Error> {
    if part.memfd.is_sealed_against_writes() {
        return Err(Error::from_call("make a udmabuf from a write-sealed memfd", part.bytes, Errno::INVAL));
    }
    Ok(())
}

fn parse_limit(parameter: &str) -> Option<u64> {
    // The parameter is signed; zero and negative values mean unlimited.
    parameter.trim().parse::<i64>().ok().and_then(|value| u64::try_from(value).ok()).filter(|&value| value > 0)
}

fn is_affected(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => ((6, 11)..(6, 16)).contains(&(major, minor)),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_memory_is_refused_on_every_kernel() {
        let memfd = Memfd::create("test", 4096).unwrap();
        let part = Part { memfd: &memfd, offset: 0, bytes: 4096 };
        assert_eq!(refuse_sealed(&part), Ok(()));
        memfd.seal_against_writes().unwrap();
        assert_eq!(refuse_sealed(&part).unwrap_err().errno, crate::Errno::EINVAL);
    }

    #[test]
    fn kernels_6_11_to_6_15_and_unknown_ones_are_affected() {
        for (release, expected) in [
            ("5.15.0-1", false),
            ("6.1.0-56-cloud-amd64", false),
            ("6.10.9", false),
            ("6.11.0", true),
            ("6.12.117+deb12-amd64", true),
            ("6.15.2-arch1-1", true),
            ("6.16.0", false),
            ("7.3.0-rc1", false),
            ("unknown", true),
            ("", true),
        ] {
            assert_eq!(is_affected(release), expected, "{release}");
        }
    }

    #[test]
    fn nonpositive_limit_means_unlimited() {
        assert_eq!(["64\n", "0", "-1\n", "x"].map(parse_limit), [Some(64), None, None, None]);
    }
}
