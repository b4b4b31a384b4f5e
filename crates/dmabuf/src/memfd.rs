//! Memory files: pages with a file descriptor, no device and no privilege needed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;

use crate::{Error, Limit};

/// A memory file of a fixed size that can't shrink: mapped pages never turn into SIGBUS.
#[derive(Debug)]
pub struct Memfd {
    fd: OwnedFd,
    bytes: usize,
    /// It came from somebody else: it can only be looked at.
    foreign: bool,
}

impl Memfd {
    /// Creates a memory file of `bytes` bytes, sealed against shrinking. No page is allocated yet.
    ///
    /// `name` shows in `/proc/PID/maps`. Asks for `MFD_NOEXEC_SEAL` (Linux 6.3), since `vm.memfd_noexec=2`
    /// refuses everything else, and goes without it on kernels that do not know the flag.
    ///
    /// # Errors
    /// What `memfd_create(2)`, `ftruncate(2)` or `fcntl(F_ADD_SEALS)` answered: EMFILE when the limit of open
    /// files is reached, EFBIG over RLIMIT_FSIZE.
    pub fn create(name: &str, bytes: usize) -> Result<Self, Error> {
        // The kernel says EFBIG too, but sends SIGXFSZ with it, which ends a process that is not prepared.
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

    /// Takes a memory file that came from another process, to be looked at: sealed so that nobody can write to it or shrink it any
    /// more. (Who had it mapped writable before it was sealed still can write.)
    ///
    /// # Errors
    /// EINVAL for what is no memory file, or of no size; EPERM for one without these seals.
    pub fn from_sealed(fd: OwnedFd) -> Result<Self, Error> {
        let failed = |errno| Error::from_call("take a sealed memfd", 0, errno);
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(failed)?;
        if !seals.contains(SealFlags::SHRINK) || !seals.intersects(SealFlags::FUTURE_WRITE | SealFlags::WRITE) {
            return Err(failed(Errno::PERM));
        }
        let bytes = rustix::fs::fstat(&fd).map_err(failed)?.st_size;
        let bytes = usize::try_from(bytes).ok().filter(|&bytes| bytes > 0).ok_or(failed(Errno::INVAL))?;
        Ok(Memfd { fd, bytes, foreign: true })
    }

    /// Whether it came from somebody else, and can't be written to.
    pub(crate) fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// The size in bytes, fixed at creation.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Allocates pages for a range without mapping them; `false` where the kernel refused.
    ///
    /// A refusal is no error: populating the mapping does the same work later, and reports what is wrong.
    pub(crate) fn allocate(&self, offset: u64, bytes: u64) -> bool {
        fallocate(&self.fd, FallocateFlags::empty(), offset, bytes).is_ok()
    }

    /// Forbids every later change through this file: new writable mappings, `write(2)`, growing, punching
    /// holes, and further seals. Mappings that exist stay as they are. After this the descriptor can be given
    /// to anybody.
    ///
    /// `F_SEAL_FUTURE_WRITE` needs Linux 5.1. Sealing twice is no error.
    ///
    /// # Errors
    /// EINVAL before Linux 5.1 ([`Memfd::kernel_seals_writes`]), and for what takes no seals; EPERM when the
    /// seals were sealed without this one.
    pub fn seal_against_writes(&self) -> Result<(), Error> {
        let wanted = SealFlags::FUTURE_WRITE | SealFlags::GROW | SealFlags::SEAL;
        let has = rustix::fs::fcntl_get_seals(&self.fd).map_err(|errno| Error::from_call("read the seals", self.bytes, errno))?;
        if has.contains(wanted) {
            return Ok(());
        }
        fcntl_add_seals(&self.fd, wanted).map_err(|errno| Error::from_call("seal a memfd against writes", self.bytes, errno))
    }

    /// Whether nobody can write to it any more but by what is mapped, or is a udmabuf, already. What
    /// takes no seals has none.
    pub fn is_sealed_against_writes(&self) -> bool {
        let against_writes = SealFlags::WRITE | SealFlags::FUTURE_WRITE;
        rustix::fs::fcntl_get_seals(&self.fd).is_ok_and(|seals| seals.intersects(against_writes))
    }

    /// Whether this kernel has the seal against writes (`F_SEAL_FUTURE_WRITE`, Linux 5.1), found by trying it on
    /// a memory file of its own. Where even that can't be made, it is taken to have it.
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
    fn what_is_not_sealed_is_not_taken_and_what_is_can_only_be_looked_at() {
        let memfd = Memfd::create("test", 8192).unwrap();
        let again = || memfd.fd.try_clone().unwrap();
        assert_eq!(Memfd::from_sealed(again()).unwrap_err().errno, crate::Errno::EPERM);
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        // Files on tmpfs have seals, too, but not these.
        assert!(matches!(Memfd::from_sealed(file.into()).unwrap_err().errno, crate::Errno::EINVAL | crate::Errno::EPERM));
        memfd.seal_against_writes().unwrap();
        let taken = crate::Memory::Memfd(Memfd::from_sealed(again()).unwrap());
        let range = crate::AddressRange::reserve(8192).unwrap();
        let mapping = range.map(&taken, 0, 8192).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| line.starts_with(&format!("{:x}-", mapping.address().addr()))).unwrap();
        assert!(line.contains(" r--s "), "{line}");
    }

    #[test]
    fn a_memfd_cannot_shrink() {
        let memfd = Memfd::create("test", 8192).unwrap();
        assert_eq!(ftruncate(&memfd, 4096), Err(Errno::PERM));
    }

    #[test]
    fn a_sealed_memfd_refuses_writes_holes_and_growth_and_may_be_sealed_twice() {
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
