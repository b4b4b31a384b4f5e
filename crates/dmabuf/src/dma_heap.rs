//! dma-heaps, the kernel's allocators for dma-bufs. Each heap is a device in `/dev/dma_heap`.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::io;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use crate::device;
use crate::open::{open_device, path_of};
use crate::{Device, DeviceError, DmaBuf, Errno, Error, page_bytes};

/// `struct dma_heap_allocation_data` from include/uapi/linux/dma-heap.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct Allocation {
    len: u64,
    fd: u32,
    fd_flags: u32,
    heap_flags: u64,
}

const DMA_HEAP_IOCTL_ALLOC: Opcode = opcode::read_write::<Allocation>(b'H', 0);
const _: () = assert!(size_of::<Allocation>() == 24 && DMA_HEAP_IOCTL_ALLOC == 0xC018_4800);

struct Allocate(Allocation);

// SAFETY: the opcode is DMA_HEAP_IOCTL_ALLOC, and the pointer points to the struct that this ioctl
// reads and writes.
unsafe impl Ioctl for Allocate {
    type Output = u32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        DMA_HEAP_IOCTL_ALLOC
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, pointer: *mut c_void) -> rustix::io::Result<u32> {
        // SAFETY: this is the pointer that `as_ptr` returned, to the struct that this value holds.
        Ok(unsafe { (*pointer.cast::<Allocation>()).fd })
    }
}

/// An open dma-heap.
#[derive(Debug)]
pub struct DmaHeap {
    fd: OwnedFd,
    name: String,
}

impl DmaHeap {
    /// The folder that contains the dma-heap devices.
    pub const FOLDER: &str = device::HEAPS;

    /// Returns the names of this machine's heaps in sorted order, or an empty list if their folder
    /// cannot be read.
    pub fn names() -> Vec<String> {
        device::heap_names()
    }

    /// Returns the device path of the heap called `name`.
    pub fn path(name: &str) -> PathBuf {
        device::heap_path(name)
    }

    /// Opens the heap called `name`: `system`, `reserved`, or a vendor's name.
    ///
    /// # Errors
    /// ENOENT when this machine has no such heap (the error lists those it has), EACCES without
    /// permission (by default, the devices have mode 0600), ENODEV when the file is not a
    /// character device, EINVAL when `name` is empty or a path.
    pub fn open(name: &str) -> Result<Self, DeviceError> {
        let path = Self::path(name);
        if name.is_empty() || name.contains('/') || name == "." || name == ".." {
            let about = Some("specify a heap by its name, not by a path".to_owned());
            return Err(DeviceError { path, errno: Errno::EINVAL, about });
        }
        let fd = open_device(&path).map_err(|error| match error.errno {
            Errno::ENOENT => DeviceError { about: Some(list_heaps()), ..error },
            _ => error,
        })?;
        Ok(DmaHeap { fd, name: name.to_owned() })
    }

    /// Wraps the descriptor of an open heap. A process without permission to open the heap can
    /// receive such a descriptor from another process.
    ///
    /// # Errors
    /// ENODEV when the descriptor is not a dma-heap.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, DeviceError> {
        match Device::identify(&fd) {
            Some(Device::DmaHeap(name)) => Ok(DmaHeap { fd, name }),
            _ => Err(DeviceError { path: path_of(&fd), errno: Errno::ENODEV, about: Some("it is not a dma-heap".to_owned()) }),
        }
    }

    /// Returns the name of the heap.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Allocates a dma-buf of `bytes` bytes, rounded up to whole pages. On return, all pages are
    /// present and zeroed.
    ///
    /// **A request for more memory than the machine has invokes the OOM killer instead of
    /// failing** (observed with the `system` heap on Linux 6.12). Check `MemAvailable` and the
    /// memory cgroup first; this method does not.
    ///
    /// # Errors
    /// EINVAL for 0 bytes, ENOMEM when memory runs out, EMFILE when the process has too many open
    /// files.
    pub fn allocate(&self, bytes: usize) -> Result<DmaBuf, Error> {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        self.allocate_with(bytes, flags.bits(), 0)
    }

    /// Like [`DmaHeap::allocate`], but takes flags for the descriptor and for the heap. Linux
    /// defines no heap flags yet.
    ///
    /// # Errors
    /// Those of [`DmaHeap::allocate`], and EINVAL for flags that the kernel does not know.
    pub fn allocate_with(&self, bytes: usize, fd_flags: u32, heap_flags: u64) -> Result<DmaBuf, Error> {
        let failed = |errno| Error::from_call("allocate a dma-buf", bytes, errno);
        let rounded = bytes.checked_next_multiple_of(page_bytes()).ok_or(failed(io::Errno::NOMEM))?;
        let request = Allocate(Allocation { len: bytes as u64, fd: 0, fd_flags, heap_flags });
        // SAFETY: the descriptor is that of a dma-heap, and `Allocate` implements `Ioctl` for the
        // struct that the heap's ioctl expects.
        let fd = unsafe { ioctl(&self.fd, request) }.map_err(failed)?;
        let fd = i32::try_from(fd).map_err(|_| failed(io::Errno::BADF))?;
        // SAFETY: the kernel just created this descriptor, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(DmaBuf::new(fd, rounded))
    }
}

fn list_heaps() -> String {
    match DmaHeap::names() {
        names if names.is_empty() => "this machine has no dma-heaps (CONFIG_DMABUF_HEAPS)".to_owned(),
        names => format!("available heaps: {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heap_name_that_is_a_path_is_refused() {
        for name in ["", ".", "..", "../null", "a/b", "/dev/null"] {
            assert_eq!(DmaHeap::open(name).unwrap_err().errno, Errno::EINVAL, "{name:?}");
        }
    }

    #[test]
    fn unknown_heap_error_lists_the_known_ones() {
        let error = DmaHeap::open("no-such-heap").unwrap_err();
        assert_eq!(error.errno, Errno::ENOENT);
        assert!(error.to_string().contains("heaps"), "{error}");
    }
}
