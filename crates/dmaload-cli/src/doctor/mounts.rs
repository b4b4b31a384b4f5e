//! Finds a path's file system in `/proc/self/mountinfo`, which contains the name of its type;
//! `statfs(2)` reports only a number.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) point: PathBuf,
    pub(crate) file_system: String,
}

/// Returns the mount that contains `path`, which must be absolute and without symbolic links.
/// `device` is the device number of the file at this path.
///
/// Of the mounts above the path, returns the one with the longest mount point. If several have the
/// same mount point, returns the last, which hides the others. A mount on the given device is
/// preferred over all others, because a mount can hide mounts with longer paths. A mount on
/// another device is accepted, too: on some file systems (btrfs), each subvolume has a device
/// number that no mount has.
pub(crate) fn find(mountinfo: &str, path: &Path, device: (u32, u32)) -> Option<Mount> {
    let device = format!("{}:{}", device.0, device.1);
    let mounts = mountinfo.lines().filter_map(parse).filter(|(_, mount)| path.starts_with(&mount.point));
    let best = mounts.max_by_key(|(number, mount)| (*number == device, mount.point.components().count()))?;
    Some(best.1)
}

/// Parses `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`.
fn parse(line: &str) -> Option<(&str, Mount)> {
    let (mount, kind) = line.split_once(" - ")?;
    let mut fields = mount.split(' ');
    let device = fields.nth(2)?;
    let point = unescape(fields.nth(1)?);
    Some((device, Mount { point, file_system: kind.split(' ').next()?.to_owned() }))
}

/// Decodes octal escapes: a space is encoded as `\040`.
fn unescape(field: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let [first, others @ ..] = rest {
        let octal = (*first == b'\\').then(|| others.get(..3).and_then(|digits| std::str::from_utf8(digits).ok())).flatten();
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &others[3..];
            }
            None => {
                bytes.push(*first);
                rest = others;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn parsing_mountinfo_never_panics(
            text in "(1 2 254:0 / /[a-z\\\\0-9]{0,6} rw - [a-z0-9]{0,4} x\n|[0-9]{1,9} |[0-9]{1,4}:[0-9]{1,4} |/|\\\\[0-9]{0,4}| - |ext4 |\n|\\PC){0,60}",
            path in "(/[a-z \\\\]{0,4}){0,4}",
        ) {
            let _ = find(&text, Path::new(&path), (254, 0));
        }
    }

    const MOUNTS: &str = "\
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 27 0:27 / /mnt rw - tmpfs tmpfs rw
31 30 8:1 / /mnt/a\\040b rw,noatime master:1 propagate_from:2 - xfs /dev/sda1 rw
32 30 8:2 / /mnt/a\\040b rw - btrfs /dev/sda2 rw
33 27 0:30 / /hidden/below rw - nfs4 server:/ rw
34 27 0:31 / /hidden rw - fuse.sshfs host: rw
";

    #[test]
    fn last_of_the_longest_mounts_wins_unless_its_device_differs() {
        for (path, device, point, kind) in [
            ("/home/x", (254, 0), "/", "ext4"),
            ("/mnt/x", (0, 27), "/mnt", "tmpfs"),
            // Compares whole components: /mntx is not below /mnt.
            ("/mntx", (254, 0), "/", "ext4"),
            ("/mnt/a b/c", (8, 2), "/mnt/a b", "btrfs"),
            ("/mnt/a b/c", (8, 1), "/mnt/a b", "xfs"),
            ("/mnt/a b/subvolume", (0, 99), "/mnt/a b", "btrfs"),
            ("/hidden/below/x", (0, 31), "/hidden", "fuse.sshfs"),
        ] {
            let expected = Mount { point: point.into(), file_system: kind.to_owned() };
            assert_eq!(find(MOUNTS, Path::new(path), device), Some(expected), "{path}");
        }
        assert_eq!(find("", Path::new("/"), (0, 0)), None);
        assert_eq!(find("nonsense\n", Path::new("/"), (0, 0)), None);
    }
}
