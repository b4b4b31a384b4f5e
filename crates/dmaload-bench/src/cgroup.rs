//! A memory cgroup (v2 or v1) with a limit, created for one run and removed afterwards.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use dmabuf::printable;
use dmaload_text::{FileError, ForPath, Named};

use crate::leftovers;

/// The files in which the limit is set, for cgroup v2 and v1.
const LIMITS: [&str; 2] = ["memory.max", "memory.limit_in_bytes"];

/// A cgroup, which is removed on drop.
#[derive(Debug)]
pub(crate) struct Group {
    folder: PathBuf,
}

impl Group {
    /// Creates a group with this memory limit below this process's own group, or below the nearest
    /// ancestor where the kernel allows it.
    ///
    /// # Errors
    /// If no group can be created. The error lists every folder that was tried.
    pub(crate) fn new(limit_bytes: u64) -> Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let name = format!("dmaload-bench-{}", std::process::id());
        let mut reasons = String::new();
        for parent in candidate_parents(&own, Path::new("/sys/fs/cgroup")) {
            match Self::make(&parent.join(&name), limit_bytes) {
                Ok(group) => return Ok(group),
                Err(error) => reasons.push_str(&format!("\n  {}: {}", printable::path(&parent), Named(&error))),
            }
        }
        bail!("cannot create a memory cgroup, which requires root and the memory controller in the parent group:{reasons}")
    }

    fn make(folder: &Path, limit_bytes: u64) -> io::Result<Self> {
        leftovers::make_group(folder)?;
        let group = Group { folder: folder.to_owned() };
        // A cgroup file system provides these files. In any other folder they don't exist, and
        // creating them would limit nothing.
        let mut refusal = io::Error::from_raw_os_error(libc::ENOENT);
        for name in LIMITS {
            match write_number(&folder.join(name), limit_bytes) {
                Ok(()) => return Ok(group),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }

    /// Moves a process into the group.
    ///
    /// # Errors
    /// The kernel's error.
    pub(crate) fn add(&self, process: u32) -> Result<(), FileError> {
        let members = self.folder.join("cgroup.procs");
        write_number(&members, u64::from(process)).for_path("add a process to", &members)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        leftovers::remove_group(&self.folder);
    }
}

fn write_number(path: &Path, number: u64) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(number.to_string().as_bytes())
}

/// Lists the folders in which a group may be created. For each hierarchy, these are the folders
/// from this process's own group up to the mount point. v1's memory hierarchy comes before v2's,
/// because `/proc/self/cgroup` lists v2 last.
fn candidate_parents(own: &str, root: &Path) -> Vec<PathBuf> {
    let mut parents = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let mounts: &[&str] = match controllers {
            "" => &["", "unified"],
            controllers if controllers.split(',').any(|controller| controller == "memory") => &["memory"],
            _ => &[],
        };
        for mount in mounts.iter().map(|mount| root.join(mount)) {
            let own = mount.join(group.trim_start_matches('/'));
            let above: Vec<PathBuf> =
                own.ancestors().take_while(|folder| folder.starts_with(&mount)).map(Path::to_owned).collect();
            parents.extend(above.into_iter().filter(|folder| folder.join("cgroup.procs").exists()));
        }
    }
    parents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_group_comes_first_and_other_folders_are_skipped() {
        let root = tempfile::tempdir().unwrap();
        for group in ["memory", "memory/a", "memory/a/b", "unified"] {
            fs::create_dir(root.path().join(group)).unwrap();
            fs::write(root.path().join(group).join("cgroup.procs"), "").unwrap();
        }
        let found = candidate_parents("5:cpu,memory:/a/b\n3:cpu:/x\n0::/\n", root.path());
        assert_eq!(found, ["memory/a/b", "memory/a", "memory", "unified"].map(|group| root.path().join(group)));
    }

    #[test]
    fn folder_outside_cgroupfs_is_refused_and_unchanged() {
        let folder = tempfile::tempdir().unwrap();
        let group = folder.path().join("group");
        assert_eq!(Group::make(&group, 1 << 20).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!group.exists());
    }
}
