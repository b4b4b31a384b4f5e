//! udmabuf: a dma-buf over the pages of a memfd.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use crate::device;
use crate::open::{open_device, path_of};
use crate::{Device, DeviceError, DmaBuf, Error, Memfd};

/// `struct udmabuf_create` of include/uapi/linux/udmabuf.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct Create {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
}

/// `struct udmabuf_create_item` of the same header.
#[repr(C)]
#[derive(Clone, Copy)]
struct CreateItem {
    memfd: u32,
    reserved: u32,
    offset: u64,
    size: u64,
}

/// `struct udmabuf_create_list`, without the items that follow it in memory.
#[repr(C)]
#[derive(Clone, Copy)]
struct CreateList {
    flags: u32,
    count: u32,
}

const UDMABUF_CREATE: Opcode = opcode::write::<Create>(b'u', 0x42);
const UDMABUF_CREATE_LIST: Opcode = opcode::write::<CreateList>(b'u', 0x43);
const _: () = assert!(size_of::<Create>() == 24 && UDMABUF_CREATE == 0x4018_7542);
const _: () = assert!(size_of::<CreateList>() == 8 && UDMABUF_CREATE_LIST == 0x4008_7543);
const _: () = assert!(size_of::<CreateItem>() == 24 && align_of::<CreateItem>() == align_of::<u64>());

const UDMABUF_FLAGS_CLOEXEC: u32 = 1;

/// Both requests answer with the new descriptor as the return value, not in a field.
struct Request {
    opcode: Opcode,
    /// `u64`s, so that the structures in it are aligned.
    words: Vec<u64>,
}

// SAFETY: the opcode is one of the two above, and the words hold the structure that it reads: see the two makers.
unsafe impl Ioctl for Request {
    type Output = RawFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.words.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<RawFd> {
        Ok(output)
    }
}

impl Request {
    fn create(part: &Part<'_>) -> Self {
        let memfd = descriptor(part);
        let words = vec![pair(memfd, UDMABUF_FLAGS_CLOEXEC), part.offset, part.bytes as u64];
        Request { opcode: UDMABUF_CREATE, words }
    }

    fn create_list(parts: &[Part<'_>]) -> Result<Self, Errno> {
        // As the kernel answers to more than its limit, which is far below.
        let count = u32::try_from(parts.len()).map_err(|_| Errno::INVAL)?;
        let mut words = vec![pair(UDMABUF_FLAGS_CLOEXEC, count)];
        for part in parts {
            words.extend([pair(descriptor(part), 0), part.offset, part.bytes as u64]);
        }
        Ok(Request { opcode: UDMABUF_CREATE_LIST, words })
    }
}

/// Two neighbouring u32 fields, as they lie in memory.
fn pair(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

fn descriptor(part: &Part<'_>) -> u32 {
    part.memfd.as_fd().as_raw_fd().cast_unsigned()
}

/// A range of a memfd.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// The memory file.
    pub memfd: &'a Memfd,
    /// Where in it, a multiple of the page size.
    pub offset: u64,
    /// How much of it, a multiple of the page size.
    pub bytes: usize,
}

/// What this kernel's udmabuf takes at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdmabufLimits {
    /// Bytes of one dma-buf (`size_limit_mb`); `None` without a limit.
    pub size_bytes: Option<u64>,
    /// Parts of one list (`list_limit`); `None` without a limit.
    pub list_entries: Option<u64>,
}

/// The open device.
#[derive(Debug)]
pub struct Udmabuf {
    fd: OwnedFd,
}

impl Udmabuf {
    /// The device.
    pub const PATH: &str = device::UDMABUF;
    /// Where its limits can be read, and raised by root.
    pub const PARAMETERS: &str = "/sys/module/udmabuf/parameters";

    /// Opens the device.
    ///
    /// # Errors
    /// ENOENT on kernels without it (CONFIG_UDMABUF), EACCES without the right to it (mode 0600).
    pub fn open() -> Result<Self, DeviceError> {
        Ok(Udmabuf { fd: open_device(Path::new(Self::PATH))? })
    }

    /// Takes the device, open already, by whoever has the right to.
    ///
    /// # Errors
    /// ENODEV for what is not that device.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, DeviceError> {
        if Device::of(&fd) == Some(Device::Udmabuf) {
            return Ok(Udmabuf { fd });
        }
        Err(DeviceError { path: path_of(&fd), errno: Errno::NODEV, about: Some(format!("it is not {}", Self::PATH)) })
    }

    /// The limits now: root may change them at any time.
    pub fn limits() -> UdmabufLimits {
        let read = |name: &str| std::fs::read_to_string(Path::new(Self::PARAMETERS).join(name)).ok();
        UdmabufLimits {
            size_bytes: read("size_limit_mb").as_deref().and_then(limit).map(|mib| mib << 20),
            list_entries: read("list_limit").as_deref().and_then(limit),
        }
    }

    /// Makes a dma-buf of a range of a memfd. The pages are the same, and stay when the memfd is closed.
    ///
    /// # Errors
    /// EINVAL for an offset or size that is no multiple of the page size, a size of 0 or above
    /// [`UdmabufLimits::size_bytes`], or a memfd that is sealed against writes; EBADFD for what is no memfd.
    ///
    /// That a memfd is sealed by `F_SEAL_FUTURE_WRITE` is found here, since kernels from before 2025
    /// do not look for it: a udmabuf can be written to.
    pub fn create(&self, part: Part<'_>) -> Result<DmaBuf, Error> {
        refuse_sealed(&[part])?;
        self.request("make a udmabuf", Request::create(&part), part.bytes)
    }

    /// Makes one dma-buf of several ranges, in this order.
    ///
    /// # Errors
    /// As [`Udmabuf::create`], and EINVAL for no part or more than [`UdmabufLimits::list_entries`].
    pub fn create_list(&self, parts: &[Part<'_>]) -> Result<DmaBuf, Error> {
        let bytes = parts.iter().map(|part| part.bytes).sum();
        let operation = "make a udmabuf of several parts";
        refuse_sealed(parts)?;
        let request = Request::create_list(parts).map_err(|errno| Error::new(operation, bytes, errno))?;
        self.request(operation, request, bytes)
    }

    fn request(&self, operation: &'static str, request: Request, bytes: usize) -> Result<DmaBuf, Error> {
        // SAFETY: the request describes itself truly, see its `Ioctl` implementation.
        let fd = unsafe { ioctl(&self.fd, request) }.map_err(|errno| Error::new(operation, bytes, errno))?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(DmaBuf::new(fd, bytes))
    }

    /// Whether importers that map the dma-buf into the kernel see wrong bytes where its memfd has huge pages.
    ///
    /// Linux 6.11 made the driver hold folios, and its `vmap_udmabuf` gives every page of a folio as the first one; 6.16
    /// takes the right one (drivers/dma-buf/udmabuf.c). Seen on 6.12.117. It shows in no return value and in no file, so
    /// this is the one question that a version answers; a release that can't be read counts as affected.
    pub fn huge_pages_show_wrong_bytes() -> bool {
        is_affected(&rustix::system::uname().release().to_string_lossy())
    }
}

fn refuse_sealed(parts: &[Part<'_>]) -> Result<(), Error> {
    for part in parts {
        if part.memfd.is_sealed_against_writes() {
            return Err(Error::new("make a udmabuf of a memfd that is sealed against writes", part.bytes, Errno::INVAL));
        }
    }
    Ok(())
}

fn limit(parameter: &str) -> Option<u64> {
    // Signed, and no limit at all where it is not positive.
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
    fn the_requests_lie_in_memory_as_the_kernel_reads_them() {
        let memfd = Memfd::create("test", 8192).unwrap();
        let part = Part { memfd: &memfd, offset: 4096, bytes: 4096 };
        let fd = u64::from(descriptor(&part));
        let request = Request::create(&part);
        assert_eq!(request.words.len() * 8, size_of::<Create>());
        assert_eq!(request.words, [u64::from_ne_bytes((fd | 1 << 32).to_le_bytes()), 4096, 4096]);
        let request = Request::create_list(&[part, part]).unwrap();
        assert_eq!(request.words.len() * 8, size_of::<CreateList>() + 2 * size_of::<CreateItem>());
        assert_eq!(request.words[0], u64::from_ne_bytes((1u64 | 2 << 32).to_le_bytes()));
    }

    #[test]
    fn sealed_memory_is_refused_whatever_the_kernel_thinks_of_it() {
        let memfds = [false, true].map(|sealed| {
            let memfd = Memfd::create("test", 4096).unwrap();
            if sealed {
                memfd.seal_against_writes().unwrap();
            }
            memfd
        });
        let [open, sealed] = memfds.each_ref().map(|memfd| Part { memfd, offset: 0, bytes: 4096 });
        assert_eq!(refuse_sealed(&[open]), Ok(()));
        for parts in [&[sealed][..], &[open, sealed]] {
            assert_eq!(refuse_sealed(parts).unwrap_err().errno, Errno::INVAL);
        }
    }

    #[test]
    fn only_the_kernels_in_between_are_affected() {
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
    fn a_limit_that_is_not_positive_is_none() {
        assert_eq!(["64\n", "0", "-1\n", "x"].map(limit), [Some(64), None, None, None]);
    }
}
