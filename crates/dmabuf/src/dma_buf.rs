//! dma-bufs: memory that drivers can import through a file descriptor.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

use crate::Error;

/// `struct dma_buf_sync` from include/uapi/linux/dma-buf.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct Sync {
    flags: u64,
}

const DMA_BUF_IOCTL_SYNC: Opcode = opcode::write::<Sync>(b'b', 0);
const _: () = assert!(size_of::<Sync>() == 8 && DMA_BUF_IOCTL_SYNC == 0x4008_6200);

const SYNC_READ: u64 = 1;
const SYNC_WRITE: u64 = 2;
const SYNC_END: u64 = 1 << 2;

/// How the CPU accesses a dma-buf's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The CPU only reads.
    Read,
    /// The CPU only writes.
    Write,
    /// The CPU reads and writes.
    ReadWrite,
}

impl Access {
    fn flags(self) -> u64 {
        match self {
            Access::Read => SYNC_READ,
            Access::Write => SYNC_WRITE,
            Access::ReadWrite => SYNC_READ | SYNC_WRITE,
        }
    }
}

/// The descriptor of a dma-buf, together with its size.
///
/// The memory stays allocated until its last descriptor, mapping and importer are gone, even if
/// the device that created it is closed or the process that created it exits.
#[derive(Debug)]
pub struct DmaBuf {
    fd: OwnedFd,
    bytes: usize,
}

impl DmaBuf {
    pub(crate) fn new(fd: OwnedFd, bytes: usize) -> Self {
        DmaBuf { fd, bytes }
    }

    /// Wraps a dma-buf descriptor from another process or from a driver.
    ///
    /// # Errors
    /// An errno such as ENOTTY, EINVAL or ESPIPE when the descriptor is not a dma-buf; otherwise
    /// the errno of `DMA_BUF_IOCTL_SYNC`.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        let failed = |errno| Error::from_call("accept a dma-buf", 0, errno);
        // Seeking to the end is the documented way to get the size of a dma-buf (dma_buf_llseek
        // in drivers/dma-buf/dma-buf.c).
        let bytes = rustix::fs::seek(&fd, rustix::fs::SeekFrom::End(0)).map_err(failed)?;
        let dma_buf = DmaBuf { fd, bytes: usize::try_from(bytes).map_err(|_| failed(Errno::OVERFLOW))? };
        // Other files have a size, too, but only dma-bufs support this ioctl.
        dma_buf.cpu_access(Access::Read)?.end()?;
        Ok(dma_buf)
    }

    /// Returns the size in bytes, a multiple of the page size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Begins a CPU access to the bytes. This synchronizes caches that are not coherent with
    /// devices. The access ends when the guard is dropped.
    ///
    /// # Errors
    /// The errno of `DMA_BUF_IOCTL_SYNC`.
    pub fn cpu_access(&self, access: Access) -> Result<CpuAccess<'_>, Error> {
        self.begin_cpu_access(access)?;
        Ok(CpuAccess { dma_buf: self, access, ended: false })
    }

    /// Like [`DmaBuf::cpu_access`], but without a guard. The caller ends the access with
    /// [`DmaBuf::end_cpu_access`].
    ///
    /// # Errors
    /// The errno of `DMA_BUF_IOCTL_SYNC`.
    pub fn begin_cpu_access(&self, access: Access) -> Result<(), Error> {
        self.sync("begin CPU access to a dma-buf", access.flags())
    }

    /// Ends an access that [`DmaBuf::begin_cpu_access`] began.
    ///
    /// # Errors
    /// The errno of `DMA_BUF_IOCTL_SYNC`: EINVAL on a udmabuf when no access was ever begun.
    pub fn end_cpu_access(&self, access: Access) -> Result<(), Error> {
        self.sync("end CPU access to a dma-buf", access.flags() | SYNC_END)
    }

    fn sync(&self, operation: &'static str, flags: u64) -> Result<(), Error> {
        loop {
            // SAFETY: the opcode is DMA_BUF_IOCTL_SYNC (asserted above), which reads one `struct
            // dma_buf_sync`.
            let request = unsafe { Setter::<DMA_BUF_IOCTL_SYNC, Sync>::new(Sync { flags }) };
            // SAFETY: as above; the ioctl does not write to this process's memory.
            match unsafe { ioctl(&self.fd, request) } {
                // The ioctl's documentation requires callers to retry on these errors.
                Err(Errno::INTR | Errno::AGAIN) => {}
                other => return other.map_err(|errno| Error::from_call(operation, self.bytes, errno)),
            }
        }
    }
}

impl AsFd for DmaBuf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<DmaBuf> for OwnedFd {
    fn from(dma_buf: DmaBuf) -> Self {
        dma_buf.fd
    }
}

/// A CPU access to the bytes of a dma-buf, which ends when this guard is dropped.
#[derive(Debug)]
#[must_use = "the access ends when the guard is dropped"]
pub struct CpuAccess<'a> {
    dma_buf: &'a DmaBuf,
    access: Access,
    ended: bool,
}

impl CpuAccess<'_> {
    /// Ends the access and returns any error, which would be lost if the guard were dropped.
    ///
    /// # Errors
    /// The errno of `DMA_BUF_IOCTL_SYNC`.
    pub fn end(mut self) -> Result<(), Error> {
        self.ended = true;
        self.dma_buf.end_cpu_access(self.access)
    }
}

impl Drop for CpuAccess<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // `drop` cannot return an error. Callers that need it use `CpuAccess::end`.
            let _ = self.dma_buf.end_cpu_access(self.access);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptor_that_is_not_a_dma_buf_is_refused() {
        let memfd = crate::Memfd::create("test", 4096).unwrap();
        let refused = DmaBuf::from_fd(memfd.as_fd().try_clone_to_owned().unwrap()).unwrap_err();
        assert!(matches!(refused.errno, crate::Errno::ENOTTY | crate::Errno::EINVAL), "{refused}");
    }

    #[test]
    fn error_states_no_length_if_it_is_unknown() {
        let (pipe, _) = std::io::pipe().unwrap();
        let refused = DmaBuf::from_fd(pipe.into()).unwrap_err().to_string();
        assert!(refused.starts_with("accept a dma-buf: ESPIPE"), "{refused}");
        let refused = crate::AddressRange::reserve(usize::MAX).unwrap_err().to_string();
        assert!(refused.starts_with(&format!("reserve addresses of {} bytes: EINVAL", usize::MAX)), "{refused}");
    }
}
