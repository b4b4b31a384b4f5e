//! Determines from sysfs whether a block device may stop responding.
//!
//! A direct read of a file on ext4 ends up in the queue of the underlying device. When all
//! requests of that queue are in flight, the kernel waits inside `io_uring_enter` until one of
//! them completes (`blk_mq_get_tag`), which blocks the ring thread. A local disk completes each
//! request or fails it, but a loop device over a file on FUSE waits for that file's server.
//!
//! Requires sysfs at `/sys`. A device that sysfs doesn't list is not trusted.
//!
//! Results are not cached, because a loop device's number can be reused for another file.
//!
//! Resolving a disk takes a few system calls that never wait for a device. A loop device's file,
//! however, can be on a server that hangs, so only threads that may block should resolve devices.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// Prefixes of the sysfs names of devices that are backed by a network or a process. For example,
/// a user-space process serves `ublkb` devices, and `etherd!` is ATA over Ethernet.
const REMOTE: [&str; 6] = ["nbd", "rbd", "rnbd", "drbd", "ublkb", "etherd!"];

/// Maximum depth of stacked devices. Real setups have fewer levels.
const MOST_LEVELS: usize = 8;

/// Maximum number of devices to visit for one file, over all levels. A device that is reached
/// through several paths counts each time, so the number of visits could grow exponentially with
/// the depth.
const MOST_DEVICES: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DeviceNumber {
    pub(super) major: u32,
    pub(super) minor: u32,
}

/// Finds the devices that a device is built on.
pub(super) struct BlockDevices<'a> {
    /// The mount point of sysfs.
    pub(super) sysfs: &'a Path,
    /// Returns the block device that holds a loop device's file; `None` if the file is local and
    /// not on a block device. Fails if the file's file system may hang or can't be identified.
    pub(super) device_of_file: &'a dyn Fn(&Path) -> Result<Option<DeviceNumber>, Errno>,
}

impl BlockDevices<'_> {
    /// Checks that neither the device nor any device below it may stop responding.
    ///
    /// # Errors
    /// EOPNOTSUPP if one of them may stop responding; another error if that can't be determined.
    pub(super) fn check(&self, device: DeviceNumber) -> Result<(), Errno> {
        self.check_below(device, MOST_LEVELS, &mut { MOST_DEVICES })
    }

    fn check_below(&self, device: DeviceNumber, levels: usize, devices: &mut usize) -> Result<(), Errno> {
        let levels = levels.checked_sub(1).ok_or(Errno::LOOP)?;
        *devices = devices.checked_sub(1).ok_or(Errno::LOOP)?;
        let folder = self.folder_of(device)?;
        let name = folder.file_name().and_then(|name| name.to_str()).ok_or(Errno::INVAL)?;
        if REMOTE.iter().any(|remote| name.starts_with(remote)) {
            return Err(Errno::OPNOTSUPP);
        }
        if name.starts_with("loop") {
            let file = read(&folder.join("loop/backing_file"))?;
            return match (self.device_of_file)(Path::new(&OsString::from_vec(file)))? {
                Some(below) => self.check_below(below, levels, devices),
                None => Ok(()),
            };
        }
        // Device-mapper and md devices list their components in `slaves`. For a disk, this folder
        // is empty or missing.
        let slaves = match std::fs::read_dir(folder.join("slaves")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !is_made_of_others(name) => return Ok(()),
            slaves => slaves.map_err(|error| errno(&error))?,
        };
        for slave in slaves {
            let slave = slave.map_err(|error| errno(&error))?;
            self.check_below(parse(&read(&slave.path().join("dev"))?).ok_or(Errno::INVAL)?, levels, devices)?;
        }
        Ok(())
    }

    /// Finds the device's folder in sysfs; for a partition, its disk's folder.
    fn folder_of(&self, DeviceNumber { major, minor }: DeviceNumber) -> Result<PathBuf, Errno> {
        let numbers = self.sysfs.join("dev/block");
        let target = std::fs::read_link(numbers.join(format!("{major}:{minor}"))).map_err(|error| errno(&error))?;
        let mut folder = numbers.join(target);
        if folder.join("partition").exists() {
            folder.pop();
        }
        Ok(folder)
    }
}

fn is_made_of_others(name: &str) -> bool {
    name.starts_with("dm-") || name.starts_with("md")
}

/// Reads an attribute, without the trailing newline.
fn read(path: &Path) -> Result<Vec<u8>, Errno> {
    let mut value = std::fs::read(path).map_err(|error| errno(&error))?;
    value.pop_if(|last| *last == b'\n');
    Ok(value)
}

fn parse(number: &[u8]) -> Option<DeviceNumber> {
    let (major, minor) = std::str::from_utf8(number).ok()?.split_once(':')?;
    Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn new() -> Self {
            let sysfs = Sysfs(tempfile::tempdir().unwrap());
            fs::create_dir_all(sysfs.0.path().join("dev/block")).unwrap();
            sysfs
        }

        /// Adds a device below `devices/`. `slaves` are paths in that folder.
        fn add(&self, number: &str, path: &str, slaves: &[&str]) -> PathBuf {
            let folder = self.0.path().join("devices").join(path);
            fs::create_dir_all(folder.join("slaves")).unwrap();
            fs::write(folder.join("dev"), format!("{number}\n")).unwrap();
            symlink(Path::new("../../devices").join(path), self.0.path().join("dev/block").join(number)).unwrap();
            for slave in slaves {
                let slave = self.0.path().join("devices").join(slave);
                symlink(&slave, folder.join("slaves").join(slave.file_name().unwrap())).unwrap();
            }
            folder
        }

        fn add_partition(&self, number: &str, path: &str) {
            let folder = self.add(number, path, &[]);
            fs::remove_dir(folder.join("slaves")).unwrap();
            fs::write(folder.join("partition"), "1\n").unwrap();
        }

        fn add_loop(&self, number: &str, path: &str, file: &str) {
            let folder = self.add(number, path, &[]);
            fs::create_dir(folder.join("loop")).unwrap();
            fs::write(folder.join("loop/backing_file"), format!("{file}\n")).unwrap();
        }

        fn check(&self, number: &str) -> Result<(), Errno> {
            let device_of_file = |path: &Path| match path.to_str().unwrap() {
                "/tmpfs/image" => Ok(None),
                "/fuse/image" => Err(Errno::OPNOTSUPP),
                path => path.strip_prefix("/on/").map(|number| parse(number.as_bytes())).ok_or(Errno::NOENT),
            };
            let devices = BlockDevices { sysfs: self.0.path(), device_of_file: &device_of_file };
            devices.check(parse(number.as_bytes()).unwrap())
        }
    }

    #[test]
    fn local_disks_and_their_partitions_are_trusted() {
        let sysfs = Sysfs::new();
        sysfs.add("8:0", "pci/sda", &[]);
        sysfs.add_partition("8:1", "pci/sda/sda1");
        sysfs.add("259:0", "pci/nvme0n1", &[]);
        sysfs.add("254:0", "virtual/dm-0", &["pci/sda/sda1", "pci/nvme0n1"]);
        sysfs.add("9:0", "virtual/md0", &["virtual/dm-0"]);
        sysfs.add_loop("7:0", "virtual/loop0", "/on/9:0");
        sysfs.add_loop("7:1", "virtual/loop1", "/tmpfs/image");
        sysfs.add_partition("259:1", "virtual/loop0/loop0p1");
        for number in ["8:0", "8:1", "259:0", "254:0", "9:0", "7:0", "7:1", "259:1"] {
            assert_eq!(sysfs.check(number), Ok(()), "{number}");
        }
    }

    #[test]
    fn network_and_process_backed_devices_are_never_trusted() {
        for name in ["nbd0", "rbd1", "rnbd0", "drbd0", "ublkb0", "etherd!e0.0", "loop9"] {
            let sysfs = Sysfs::new();
            sysfs.add("8:0", "pci/sda", &[]);
            sysfs.add_loop("43:0", &format!("virtual/{name}"), "/fuse/image");
            sysfs.add_partition("43:1", &format!("virtual/{name}/p1"));
            sysfs.add("254:0", "virtual/dm-0", &["pci/sda", &format!("virtual/{name}/p1")]);
            sysfs.add("9:0", "virtual/md0", &["virtual/dm-0"]);
            sysfs.add_partition("259:0", "virtual/md0/md0p1");
            sysfs.add_loop("7:0", "virtual/loop0", "/on/259:0");
            for number in ["43:0", "43:1", "254:0", "9:0", "259:0", "7:0"] {
                assert_eq!(sysfs.check(number), Err(Errno::OPNOTSUPP), "{name}, {number}");
            }
            assert_eq!(sysfs.check("8:0"), Ok(()));
        }
    }

    #[test]
    fn unresolvable_device_is_not_trusted() {
        let sysfs = Sysfs::new();
        sysfs.add_loop("7:0", "virtual/loop0", "/in/another/namespace");
        sysfs.add("7:1", "virtual/loop1", &[]);
        let folder = sysfs.add("254:0", "virtual/dm-0", &[]);
        fs::remove_dir(folder.join("slaves")).unwrap();
        for number in ["7:0", "7:1", "254:0", "8:16"] {
            assert_eq!(sysfs.check(number), Err(Errno::NOENT), "{number}");
        }
        let folder = sysfs.add("8:0", "pci/sda", &[]);
        sysfs.add("9:0", "virtual/md0", &["pci/sda"]);
        fs::write(folder.join("dev"), "8-0").unwrap();
        assert_eq!(sysfs.check("9:0"), Err(Errno::INVAL));
    }

    #[test]
    fn resolving_stops_at_cycles_and_too_many_devices() {
        let sysfs = Sysfs::new();
        sysfs.add_loop("7:0", "virtual/loop0", "/on/7:0");
        sysfs.add("254:0", "virtual/dm-0", &["virtual/dm-1", "virtual/dm-2"]);
        sysfs.add("254:1", "virtual/dm-1", &["virtual/dm-2"]);
        sysfs.add("254:2", "virtual/dm-2", &["virtual/dm-0"]);
        for number in ["7:0", "254:0"] {
            assert_eq!(sysfs.check(number), Err(Errno::LOOP), "{number}");
        }
    }
}
