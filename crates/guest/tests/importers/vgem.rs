//! Attaches a dma-buf to a real DRM driver. vgem asks the exporter for the buffer's page list, as
//! any graphics driver does, but vgem's imports cannot be mapped. A successful import proves that
//! attaching works, but not which bytes the driver sees.

use std::{
    ffi::c_int,
    fs::{self, File, OpenOptions},
    io::{self, Error, ErrorKind},
    os::fd::{AsRawFd, BorrowedFd},
    path::PathBuf,
    ptr,
};

#[repr(C)]
struct Version {
    major: c_int,
    minor: c_int,
    patch: c_int,
    name_len: usize,
    name: *mut u8,
    date_len: usize,
    date: *mut u8,
    desc_len: usize,
    desc: *mut u8,
}
const _: () = assert!(size_of::<Version>() == 64);

#[repr(C)]
struct PrimeHandle {
    handle: u32,
    flags: u32,
    fd: i32,
}
const _: () = assert!(size_of::<PrimeHandle>() == 12);

#[repr(C)]
struct GemClose {
    handle: u32,
    pad: u32,
}
const _: () = assert!(size_of::<GemClose>() == 8);

/// Computes an ioctl number of type 'd', like the kernel's macros `_IOW` (direction 1) and `_IOWR`
/// (direction 3).
#[allow(clippy::cast_possible_truncation, reason = "the size is asserted to be small")]
const fn number<T>(direction: u32, command: u8) -> u32 {
    assert!(size_of::<T>() < 1 << 14);
    (direction << 30) | ((size_of::<T>() as u32) << 16) | ((b'd' as u32) << 8) | command as u32
}

const DRM_IOCTL_VERSION: u32 = 0xc040_6400;
const DRM_IOCTL_GEM_CLOSE: u32 = 0x4008_6409;
const DRM_IOCTL_PRIME_FD_TO_HANDLE: u32 = 0xc00c_642e;
const _: () = {
    assert!(DRM_IOCTL_VERSION == number::<Version>(3, 0x00));
    assert!(DRM_IOCTL_GEM_CLOSE == number::<GemClose>(1, 0x09));
    assert!(DRM_IOCTL_PRIME_FD_TO_HANDLE == number::<PrimeHandle>(3, 0x2e));
};

/// Imports the dma-buf into vgem and closes the import.
pub(crate) fn attach(dma_buf: BorrowedFd<'_>) -> io::Result<()> {
    let node = open_node()?;
    let mut import = PrimeHandle { handle: 0, flags: 0, fd: dma_buf.as_raw_fd() };
    retry("importing the dma-buf", || {
        // SAFETY: the ioctl's number is that of `PrimeHandle` (asserted above); the kernel reads
        // and writes those 12 bytes.
        unsafe { libc::ioctl(node.as_raw_fd(), DRM_IOCTL_PRIME_FD_TO_HANDLE as _, &raw mut import) }
    })?;
    let close = GemClose { handle: import.handle, pad: 0 };
    retry("closing the import", || {
        // SAFETY: the ioctl's number is that of `GemClose` (asserted above); the kernel only reads
        // those 8 bytes.
        unsafe { libc::ioctl(node.as_raw_fd(), DRM_IOCTL_GEM_CLOSE as _, &raw const close) }
    })
}

fn retry(step: &str, mut call: impl FnMut() -> c_int) -> io::Result<()> {
    loop {
        if call() >= 0 {
            return Ok(());
        }
        let error = Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted && error.kind() != ErrorKind::WouldBlock {
            return Err(Error::new(error.kind(), format!("vgem: {step}: {error}")));
        }
    }
}

/// Opens a device node of vgem. Tries the nodes in reverse order of their names, so that render
/// nodes come first. These require neither DRM master nor authentication.
fn open_node() -> io::Result<File> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir("/dev/dri")? {
        let path = entry?.path();
        if !path.is_dir() {
            paths.push(path);
        }
    }
    paths.sort();
    let mut refused = None;
    for path in paths.into_iter().rev() {
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(node) if is_vgem(&node) => return Ok(node),
            Ok(_) => {}
            Err(error) => refused = Some(Error::new(error.kind(), format!("vgem: {}: {error}", path.display()))),
        }
    }
    Err(refused.unwrap_or_else(|| Error::new(ErrorKind::NotFound, "vgem: no node under /dev/dri")))
}

fn is_vgem(node: &File) -> bool {
    let mut name = [0u8; 32];
    let mut version = Version {
        major: 0,
        minor: 0,
        patch: 0,
        name_len: name.len(),
        name: name.as_mut_ptr(),
        date_len: 0,
        date: ptr::null_mut(),
        desc_len: 0,
        desc: ptr::null_mut(),
    };
    let asked = retry("reading the driver's name", || {
        // SAFETY: the ioctl's number is that of `Version` (asserted above); the kernel writes at
        // most `name_len` bytes to `name`, which has that length and outlives the call, and writes
        // nothing through the pointers whose lengths are 0.
        unsafe { libc::ioctl(node.as_raw_fd(), DRM_IOCTL_VERSION as _, &raw mut version) }
    });
    // The kernel reports the name's full length, even if it copied only part of the name.
    asked.is_ok() && name.get(..version.name_len) == Some(b"vgem")
}
