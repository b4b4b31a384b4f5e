//! Memfds, which are anonymous files in memory. Creating one requires neither a device nor
//! privileges.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;

use crate::{Error, Limit};

/// A memfd. It is sealed against shrinking, because accessing mapped pages past the end of a
/// truncated file would raise SIGBUS.
#[derive(Debug)]
pub struct Memfd {
    fd: OwnedFd,
    bytes: usize,
    /// Whether the memfd came from another process, which makes it read-only here.
    foreign: bool,
}

impl Memfd {
    /// Creates a memfd of `bytes` bytes, sealed against shrinking. Allocates no pages yet.
    ///
    /// `name` appears in `/proc/PID/maps`. Sets `MFD_NOEXEC_SEAL`, which `vm.memfd_noexec=2`
    /// requires, and retries without it on kernels before Linux 6.3, which do not know the flag.
    ///
    /// # Errors
    /// EFBIG when `bytes` exceeds RLIMIT_FSIZE; otherwise the errno of `memfd_create(2)`,
    /// `ftruncate(2)` or `fcntl(F_ADD_SEALS)`, such as EMFILE when the process has too many open
    /// files.
    pub fn create(name: &str, bytes: usize) -> Result<Self, Error> {
        // The kernel would also return EFBIG, but it sends SIGXFSZ first, which by default
        // terminates the process.
        let limit = Limit::FileSize.current();
        if limit.is_some_and(|limit| bytes as u64 > limit) {
            return Err(Error::from_call("size a memfd", bytes, Errno::FBIG));
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => memfd_create(name, flags),
            other => other,
        }
        .map_err(|errno| Error::from_call("create a memfd", bytes, errno))?;
        ftruncate(&fd, bytes as u64).map_err(|errno| Error::from_call("size a memfd", bytes, errno))?;
        fcntl_add_seals(&fd, SealFlags::SHRINK).map_err(|errno| Error::from_call("seal a memfd", bytes, errno))?;
        Ok(Memfd { fd, bytes, foreign: false })
    }

    /// Wraps a memfd from another process, for reading. The memfd must be sealed against shrinking
    /// and against further writes. `F_SEAL_FUTURE_WRITE` does not affect existing mappings: a
    /// process that mapped the memfd writable before it was sealed can still write to it.
    ///
    /// # Errors
    /// EINVAL when the file does not support seals or is empty; EPERM when it lacks these seals.
    pub fn from_sealed(fd: OwnedFd) -> Result<Self, Error> {
        let failed = |errno| Error::from_call("accept a sealed memfd", 0, errno);
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(failed)?;
        if !seals.contains(SealFlags::SHRINK) || !seals.intersects(SealFlags::FUTURE_WRITE | SealFlags::WRITE) {
            return Err(failed(Errno::PERM));
        }
        let bytes = rustix::fs::fstat(&fd).map_err(failed)?.st_size;
        let bytes = usize::try_from(bytes).ok().filter(|&bytes| bytes > 0).ok_or(failed(Errno::INVAL))?;
        Ok(Memfd { fd, bytes, foreign: true })
    }

    pub(crate) fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// Returns the size in bytes that the memfd had when it was created or received.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Allocates pages for a range without mapping them. Returns `false` if the kernel refused.
    ///
    /// Callers can ignore a refusal: populating the mapping later allocates the pages, too, and
    /// returns an error if that fails.
    pub(crate) fn allocate(&self, offset: u64, bytes: u64) -> bool {
        fallocate(&self.fd, FallocateFlags::empty(), offset, bytes).is_ok()
    }

    /// Forbids new writable shared mappings, `write(2)`, growing, punching holes, and further
    /// seals. Existing mappings stay writable. Afterwards the descriptor can safely be passed to
    /// other processes.
    ///
    /// Requires Linux 5.1 or later (`F_SEAL_FUTURE_WRITE`). Sealing twice is not an error.
    ///
    /// # Errors
    /// EINVAL before Linux 5.1 ([`Memfd::kernel_seals_writes`]) and for a file that does not
    /// support seals; EPERM when a seal is missing and further seals are forbidden.
    pub fn seal_against_writes(&self) -> Result<(), Error> {
        let wanted = SealFlags::FUTURE_WRITE | SealFlags::GROW | SealFlags::SEAL;
        let has = rustix::fs::fcntl_get_seals(&self.fd)
            .map_err(|errno| Error::from_call("read the seals of a memfd", self.bytes, errno))?;
        if has.contains(wanted) {
            return Ok(());
        }
        fcntl_add_seals(&self.fd, wanted).map_err(|errno| Error::from_call("seal a memfd against writes", self.bytes, errno))
    }

    /// Returns whether the memfd can no longer be written to, except through existing mappings and
    /// udmabufs. Returns `false` for a file that does not support seals.
    pub fn is_sealed_against_writes(&self) -> bool {
        let against_writes = SealFlags::WRITE | SealFlags::FUTURE_WRITE;
        rustix::fs::fcntl_get_seals(&self.fd).is_ok_and(|seals| seals.intersects(against_writes))
    }

    /// Returns whether this kernel supports `F_SEAL_FUTURE_WRITE` (Linux 5.1 or later), by trying
    /// it on a scratch memfd. If that memfd cannot be created, the result is `true`.
    pub fn kernel_seals_writes() -> bool {
        static KNOWN: OnceLock<bool> = OnceLock::new();
        *KNOWN.get_or_init(|| {
            let scratch = memfd_create("dmabuf-seals", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
            !scratch.is_ok_and(|fd| fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE) == Err(Errno::INVAL))
        })
    }
}

impl AsFd for Memfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sealed_memory_is_mapped_and_only_for_reading() {
        let memfd = Memfd::create("test", 8192).unwrap();
        let duplicate = || memfd.fd.try_clone().unwrap();
        assert_eq!(Memfd::from_sealed(duplicate()).unwrap_err().errno, crate::Errno::EPERM);
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        // EPERM if the executable is on tmpfs, whose files support seals but lack the required
        // ones.
        assert!(matches!(Memfd::from_sealed(file.into()).unwrap_err().errno, crate::Errno::EINVAL | crate::Errno::EPERM));
        memfd.seal_against_writes().unwrap();
        let taken = crate::Memory::Memfd(Memfd::from_sealed(duplicate()).unwrap());
        let range = crate::AddressRange::reserve(8192).unwrap();
        let mapping = range.map(&taken, 0, 8192).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| line.starts_with(&format!("{:x}-", mapping.address().addr()))).unwrap();
        assert!(line.contains(" r--s "), "{line}");
    }

    #[test]
    fn memfd_cannot_shrink() {
        let memfd = Memfd::create("test", 8192).unwrap();
        assert_eq!(ftruncate(&memfd, 4096), Err(Errno::PERM));
    }

    #[test]
    fn sealed_memfd_refuses_writes_holes_and_growth() {
        let memfd = Memfd::create("test", 8192).unwrap();
        assert_eq!(rustix::io::pwrite(&memfd, b"before", 0), Ok(6));
        memfd.seal_against_writes().unwrap();
        memfd.seal_against_writes().unwrap();
        assert_eq!(rustix::io::pwrite(&memfd, b"after", 0), Err(Errno::PERM));
        assert_eq!(ftruncate(&memfd, 1 << 20), Err(Errno::PERM));
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert_eq!(fallocate(&memfd, hole, 0, 4096), Err(Errno::PERM));
    }
}
