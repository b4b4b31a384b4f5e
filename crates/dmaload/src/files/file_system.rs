//! Decides, based on their file systems, which files a ring may read and which may be copied from
//! the page cache.
//!
//! Reading a file through io_uring can go wrong in two ways. After a FUSE server returns fewer
//! bytes than requested, the kernel may read the same bytes twice (see docs/kernels.md). And a
//! read that waits for a server blocks `io_uring_enter`, or one of the few kernel threads that
//! serve such reads, and so delays every other read of the loader.
//!
//! A ring may therefore read only from the file systems that are listed here. Threads read from
//! all others, which costs little.
//!
//! Buffered reads ([`crate::Route::UringBuffered`]) from network file systems are also allowed,
//! because neither problem occurs there. If a server returns fewer bytes than requested, the
//! kernel reports a short read. Each read goes straight to its own kernel thread (`IOSQE_ASYNC`),
//! and there are as many of these threads as reads in flight, so no read waits for another. FUSE,
//! and anything that may be FUSE, is never allowed.
//!
//! The `f_type` of `fstatfs(2)` alone proves nothing, because 9p reports whatever its server says.
//! Each allowed file system needs a second proof that only the kernel's own code can provide.
//!
//! A local file system may be on a device that hangs (nbd, a loop device over FUSE), which blocks
//! the ring thread as well: see [`super::block_device`].

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RawMode, StatFs, StatxAttributes, StatxFlags, fcntl_get_seals, fstatfs, open, statx,
};
use rustix::io::Errno;

use super::block_device::{BlockDevices, DeviceNumber};
use crate::route::Attempt;

const BTRFS: u32 = 0x9123_683E;
const EROFS: u32 = 0xE0F5_E1E2;
const EXT4: u32 = 0xEF53;
const CIFS: u32 = 0xFF53_4D42;
const FUSE: u32 = 0x6573_5546;
const ISO9660: u32 = 0x9660;
const NFS: u32 = 0x6969;
const OVERLAYFS: u32 = 0x794C_7630;
const ECRYPTFS: u32 = 0xF15F;
const SMB2: u32 = 0xFE53_4D42;
const SQUASHFS: u32 = 0x7371_7368;
const TMPFS: u32 = 0x0102_1994;
const XFS: u32 = 0x5846_5342;

/// Magic numbers of local file systems on block devices, from `linux/magic.h` and fs/*.
const ON_BLOCK_DEVICES: [u32; 12] = [
    EXT4, // and ext2, ext3
    XFS,
    0xF2F5_2010, // f2fs
    EROFS,
    SQUASHFS,
    0x4D44,      // vfat
    0x2011_BAB0, // exfat
    0x7366_746E, // ntfs3
    ISO9660,
    0x1501_3346, // udf
    0x3434,      // nilfs2
    0x3153_464A, // jfs
];

/// Attributes of a file that the kernel determines and no server can influence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Device {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    /// Whether the file system can report `STATX_ATTR_COMPRESSED`.
    pub(crate) reports_compression: bool,
    /// Whether the file system can report `STATX_ATTR_VERITY`.
    pub(crate) reports_verity: bool,
    /// `STATX_ATTR_DAX`: the file's pages are the storage itself, and are not cached.
    pub(crate) is_dax: bool,
}

/// How far a file system can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trust {
    /// Why a ring must not read this file directly: the attempt that is avoided, and an errno.
    /// `None` if it may.
    pub(crate) ring_refused: Option<(Attempt, Errno)>,
    /// Why a ring must not read the file through the page cache either; `None` if it may.
    pub(crate) buffered_ring_refused: Option<(Attempt, Errno)>,
    /// Whether the page cache is as trustworthy as storage.
    pub(crate) cache: bool,
    /// Whether the file's bytes are in memory; see [`is_in_memory`].
    pub(crate) in_memory: bool,
}

/// Determines how far the file's file system can be trusted. This may wait for a server: the one
/// that holds the file itself, or the one that holds the file behind its loop device.
pub(crate) fn trust(file: &OwnedFd, device: Device) -> Trust {
    // On FUSE, `fstatfs` asks the server, which may answer with an error.
    let f_type = match fstatfs(file) {
        Ok(about) => magic(&about),
        Err(errno) => {
            let refused = Some((Attempt::RingOnUnknown, errno));
            return Trust { ring_refused: refused, buffered_ring_refused: refused, cache: false, in_memory: false };
        }
    };
    #[cfg(test)]
    let (f_type, device) = tests::pretend(file, f_type, device);
    let refused = ring_refusal(f_type, device, || fcntl_get_seals(file.as_fd()).is_ok());
    let ring_refused = match refused {
        Some(attempt) => Some((attempt, Errno::OPNOTSUPP)),
        None => device_refused(f_type, device).map(|errno| (Attempt::RingOnDevice, errno)),
    };
    let buffered_ring_refused = ring_refused.filter(|_| !is_network(f_type));
    let is_local = ring_refused.is_none();
    Trust {
        ring_refused,
        buffered_ring_refused,
        cache: is_local && is_cache_witness(f_type, device),
        in_memory: is_local && is_in_memory(f_type, device),
    }
}

fn magic(about: &StatFs) -> u32 {
    // The field's width and sign differ between architectures; magic numbers have 32 bits.
    let [first, second, third, fourth, ..] = about.f_type.to_le_bytes();
    u32::from_le_bytes([first, second, third, fourth])
}

/// The error to report if a ring must not wait for the block device of a local file system; `None`
/// if it may.
///
/// Btrfs has anonymous device numbers, so its devices can't be looked up. They are trusted.
fn device_refused(f_type: u32, device: Device) -> Option<Errno> {
    if !ON_BLOCK_DEVICES.contains(&f_type) {
        return None;
    }
    let devices = BlockDevices { sysfs: Path::new("/sys"), device_of_file: &device_of_file };
    devices.check(DeviceNumber { major: device.major, minor: device.minor }).err()
}

/// The block device that holds a loop device's file, or the file itself if it is a block device.
/// `None` for tmpfs, and for btrfs, whose device numbers are anonymous.
///
/// The path is the one that the kernel shows to this process. It may be wrong for a file in
/// another mount namespace.
///
/// # Errors
/// EOPNOTSUPP if a ring must not read from the file's file system; otherwise the error of a system
/// call.
fn device_of_file(path: &Path) -> Result<Option<DeviceNumber>, Errno> {
    let found = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let seen = statx(&found, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
    if FileType::from_raw_mode(RawMode::from(seen.stx_mode)) == FileType::BlockDevice {
        return Ok(Some(DeviceNumber { major: seen.stx_rdev_major, minor: seen.stx_rdev_minor }));
    }
    let f_type = magic(&fstatfs(&found)?);
    let device = Device {
        major: seen.stx_dev_major,
        minor: seen.stx_dev_minor,
        reports_compression: seen.stx_attributes_mask.contains(StatxAttributes::COMPRESSED),
        reports_verity: false,
        is_dax: false,
    };
    // Seals can't be queried through a descriptor opened with `O_PATH`.
    let reopen = || open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty());
    match ring_refusal(f_type, device, || reopen().is_ok_and(|file| fcntl_get_seals(&file).is_ok())) {
        Some(_) => Err(Errno::OPNOTSUPP),
        None => Ok((device.major != 0).then_some(DeviceNumber { major: device.major, minor: device.minor })),
    }
}

/// Whether every change to bytes that were copied from the page cache shows up in the file's
/// modification time.
///
/// Two kinds of writers are easy to miss. The first kind stores bytes through a mapping. To detect
/// these stores, the kernel must notify the file system of the first store after each writeback.
/// The second kind is in the middle of a long `write(2)`, which sets the time only once, before it
/// writes its first byte. To detect such a writer, reads, or another call that readers can make,
/// must wait until the `write(2)` returns.
///
/// Only file systems on which both were tested are listed, plus those that can't be written to.
/// Tmpfs is not listed, because it notices only the first store through a mapping. FUSE and
/// stacked file systems never get here ([`ring_refusal`]).
fn is_cache_witness(f_type: u32, device: Device) -> bool {
    match f_type {
        _ if device.is_dax => false,
        // The ext4 driver serves ext2 and ext3, too. The separate ext2 driver has no verity, and
        // its SEEK_DATA does not wait for writers.
        EXT4 => device.reports_verity,
        XFS | BTRFS | EROFS | SQUASHFS | ISO9660 => true,
        _ => false,
    }
}

/// Whether an `O_DIRECT` read is a copy from memory that the submitting thread makes itself:
/// `shmem_file_read_iter` in mm/shmem.c and `dax_iomap_rw` in fs/dax.c never return -EIOCBQUEUED.
/// One ring makes such copies one after the other, so several threads are faster.
fn is_in_memory(f_type: u32, device: Device) -> bool {
    f_type == TMPFS || device.is_dax
}

/// Whether this is a network file system on which direct reads may be slower than buffered ones,
/// and on which the page cache of a newly opened file matches the server.
///
/// 9p is not listed: its `f_type` is whatever the server says, and its cache may be older than the
/// server's bytes. Virtiofs can't be told apart from FUSE. A 9p server that claims to be a listed
/// file system gains nothing, because buffered reads from 9p can't go wrong in the ring.
fn is_network(f_type: u32) -> bool {
    matches!(f_type, NFS | CIFS | SMB2)
}

fn ring_refusal(f_type: u32, device: Device, has_seals: impl FnOnce() -> bool) -> Option<Attempt> {
    match f_type {
        FUSE => Some(Attempt::RingOnFuse),
        // Neither file system reports its lower layers. The paths of the layers in the mount
        // options prove nothing: they may belong to another mount namespace (in containers they
        // do), be mounted over, or be lazily unmounted and still in use.
        OVERLAYFS | ECRYPTFS => Some(Attempt::RingOnStacked),
        // 9p has no block device, nor does erofs when it reads from files or a daemon.
        local if ON_BLOCK_DEVICES.contains(&local) && device.major != 0 => None,
        // Btrfs has anonymous device numbers, but only its own `getattr` reports compression.
        BTRFS if device.reports_compression => None,
        // Only tmpfs and hugetlbfs support seals (`memfd_file_seals_ptr` in mm/memfd.c).
        TMPFS if has_seals() => None,
        _ => Some(Attempt::RingOnOther),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Inodes of files that pretend to be on an NFS server.
    pub(crate) static ON_NFS: Mutex<Vec<u64>> = Mutex::new(Vec::new());

    pub(super) fn pretend(file: &OwnedFd, f_type: u32, device: Device) -> (u32, Device) {
        let inode = rustix::fs::fstat(file).unwrap().st_ino;
        if ON_NFS.lock().unwrap().contains(&inode) { (NFS, ANONYMOUS) } else { (f_type, device) }
    }

    const ANONYMOUS: Device = Device { major: 0, minor: 0, reports_compression: false, reports_verity: false, is_dax: false };

    #[test]
    fn ring_may_read_local_file_systems() {
        let disk = Device { major: 259, ..ANONYMOUS };
        for f_type in ON_BLOCK_DEVICES {
            assert_eq!(ring_refusal(f_type, disk, || false), None, "{f_type:x}");
        }
        assert_eq!(ring_refusal(BTRFS, Device { reports_compression: true, ..ANONYMOUS }, || false), None);
        assert_eq!(ring_refusal(TMPFS, ANONYMOUS, || true), None);
    }

    #[test]
    fn cache_is_used_only_on_tested_file_systems() {
        let disk = Device { major: 259, minor: 0, reports_compression: true, reports_verity: true, is_dax: false };
        for f_type in [EXT4, XFS, BTRFS, EROFS, SQUASHFS, ISO9660] {
            assert!(is_cache_witness(f_type, disk), "{f_type:x}");
            assert!(!is_cache_witness(f_type, Device { is_dax: true, ..disk }), "{f_type:x}");
        }
        assert!(!is_cache_witness(EXT4, Device { reports_verity: false, ..disk }), "the ext2 driver");
        for f_type in [TMPFS, FUSE, OVERLAYFS, ECRYPTFS, 0x4D44, 0x2011_BAB0, 0x6969, 0] {
            assert!(!is_cache_witness(f_type, disk), "{f_type:x}");
        }
    }

    #[test]
    fn ring_also_reads_network_file_systems_through_the_cache() {
        for f_type in [NFS, CIFS, SMB2] {
            assert_eq!(ring_refusal(f_type, ANONYMOUS, || false), Some(Attempt::RingOnOther), "{f_type:x}");
            assert!(is_network(f_type), "{f_type:x}");
        }
        // The numbers are Ceph, 9p, AFS, ZFS and an unknown one.
        for f_type in [FUSE, OVERLAYFS, ECRYPTFS, 0x00C3_6400, 0x0102_1997, 0x5346_414F, 0x2FC1_2FC1, 0] {
            assert!(!is_network(f_type), "{f_type:x}");
        }
        let memfd =
            OwnedFd::from(std::fs::File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap()));
        let trusted = trust(&memfd, ANONYMOUS);
        assert_eq!((trusted.ring_refused, trusted.buffered_ring_refused), (None, None), "tmpfs");
        assert!(trusted.in_memory);
    }

    #[test]
    fn only_tmpfs_and_dax_files_are_in_memory() {
        let disk = Device { major: 259, ..ANONYMOUS };
        for f_type in ON_BLOCK_DEVICES.into_iter().chain([BTRFS]) {
            assert!(!is_in_memory(f_type, disk), "{f_type:x}");
        }
        for f_type in [EXT4, XFS] {
            assert!(is_in_memory(f_type, Device { is_dax: true, ..disk }), "{f_type:x}");
        }
        assert!(is_in_memory(TMPFS, ANONYMOUS));
    }

    #[test]
    fn server_claiming_to_be_local_is_not_trusted() {
        // QEMU's 9p server passes on the `f_type` of the folder that it shares.
        for f_type in ON_BLOCK_DEVICES.into_iter().chain([BTRFS, TMPFS]) {
            assert_eq!(ring_refusal(f_type, ANONYMOUS, || false), Some(Attempt::RingOnOther), "{f_type:x}");
        }
    }

    #[test]
    fn ring_refuses_stacked_and_unlisted_file_systems() {
        let any = Device { major: 8, minor: 0, reports_compression: true, reports_verity: true, is_dax: false };
        assert_eq!(ring_refusal(FUSE, any, || true), Some(Attempt::RingOnFuse));
        for f_type in [OVERLAYFS, ECRYPTFS] {
            assert_eq!(ring_refusal(f_type, any, || true), Some(Attempt::RingOnStacked), "{f_type:x}");
        }
        // NFS, 9p, Ceph, SMB2, AFS, GFS2, OCFS2, aufs, incfs, procfs, sysfs, ramfs, ZFS, unknown.
        for f_type in [
            0x6969,
            0x0102_1997,
            0x00C3_6400,
            0xFE53_4D42,
            0x5346_414F,
            0x0116_1970,
            0x7461_636F,
            0x6175_6673,
            0x4943_4E46,
            0x9FA0,
            0x6265_6572,
            0x8584_58F6,
            0x2FC1_2FC1,
            0,
        ] {
            assert_eq!(ring_refusal(f_type, any, || true), Some(Attempt::RingOnOther), "{f_type:x}");
        }
    }
}
