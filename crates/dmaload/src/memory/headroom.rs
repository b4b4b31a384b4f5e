//! Determines how much memory can be allocated before the OOM killer kills a process.
//!
//! On Linux, populating more memory than the machine has does not fail: instead, the OOM killer
//! kills a process, possibly this one. [`permits`] therefore checks the machine's `MemAvailable`
//! and the limits of this process's memory cgroups (v2 and v1) before memory is allocated.

pub(crate) mod permits;

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use dmabuf::printable;

use crate::error::MARGIN_BYTES;

/// The tightest memory limit, and how much memory it leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Headroom {
    pub(crate) available_bytes: u64,
    pub(crate) limit: String,
    /// The folder of the cgroup that sets the limit, or `/proc/meminfo`. It is the same for all
    /// processes that share the limit.
    pub(crate) place: PathBuf,
}

/// Returns the memory that is available now, minus [`MARGIN_BYTES`]. Returns `None` if no limit
/// can be read, for example without procfs. In that case, no allocation is refused.
pub(crate) fn headroom() -> Option<Headroom> {
    const MACHINE: &str = "/proc/meminfo";
    let machine = read_to_string(MACHINE).ok().as_deref().and_then(available_in_meminfo);
    let machine = machine.map(|available_bytes| {
        let limit = "MemAvailable of this machine".to_owned();
        Headroom { available_bytes, limit, place: PathBuf::from(MACHINE) }
    });
    let groups = own_cgroups().into_iter().filter_map(|folder| headroom_of_cgroup(&folder));
    let tightest = machine.into_iter().chain(groups).min_by_key(|headroom| headroom.available_bytes)?;
    Some(Headroom { available_bytes: tightest.available_bytes.saturating_sub(MARGIN_BYTES), ..tightest })
}

/// The folders of this process's memory cgroups and of their ancestors. Each folder follows its
/// ancestors.
pub(crate) fn own_cgroups() -> Vec<PathBuf> {
    let groups = read_to_string("/proc/self/cgroup").unwrap_or_default();
    cgroup_folders(&groups, Path::new("/sys/fs/cgroup"))
}

fn available_in_meminfo(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.saturating_mul(1024))
}

/// Returns the folders of the memory cgroups that are listed in `cgroups`, the text of
/// `/proc/self/cgroup`. The folders of all their ancestors are included, because each may set a
/// limit.
fn cgroup_folders(cgroups: &str, root: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(group)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let mounts: &[&str] = if controllers.is_empty() {
            &["", "unified"]
        } else if controllers.split(',').any(|controller| controller == "memory") {
            &["memory"]
        } else {
            &[]
        };
        for mount in mounts {
            let mount = root.join(mount);
            // In a container, the path may be relative to the host's root, while the mount shows
            // only the container's subtree. Folders that do not exist are skipped later, because
            // no limit can be read from them.
            let own = mount.join(group.trim_start_matches('/'));
            folders.extend(own.ancestors().take_while(|folder| folder.starts_with(&mount)).map(Path::to_owned));
        }
    }
    folders.sort();
    folders.dedup();
    folders
}

/// The files that hold a cgroup's limits, in v2 and v1. Above `memory.high`, the kernel does not
/// kill processes. Instead, it throttles allocations almost to a standstill, because loaded bytes
/// can't be reclaimed like page cache.
const LIMITS: [&str; 3] = ["memory.max", "memory.high", "memory.limit_in_bytes"];

/// Returns a cgroup's lowest limit, and how much memory that limit leaves; `None` if the cgroup
/// has no limit. Page cache counts as free, because it is reclaimed first.
fn headroom_of_cgroup(folder: &Path) -> Option<Headroom> {
    let number = |name: &str| read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let limits = LIMITS.into_iter().filter_map(|name| Some((number(name)?, name)));
    let (limit, limit_file) = limits.min_by_key(|&(limit, _)| limit)?;
    let used = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    let stat = read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let stat = |key: &str| {
        let line = stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        line.and_then(|value| value.parse::<u64>().ok())
    };
    let cache = ["inactive_file", "active_file"].map(|key| stat(&format!("total_{key}")).or_else(|| stat(key)).unwrap_or(0));
    let kept = cache.into_iter().fold(used, u64::saturating_sub);
    // In a v1 cgroup without a limit, the file contains a number close to 2^63.
    (limit < 1 << 62).then(|| Headroom {
        available_bytes: limit.saturating_sub(kept),
        limit: format!("{} is {limit}", printable::path(&folder.join(limit_file))),
        place: folder.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};

    #[test]
    fn machine_has_some_memory_left() {
        assert!(headroom().unwrap().available_bytes > 0);
    }

    #[test]
    fn meminfo_is_in_kibibytes() {
        assert_eq!(available_in_meminfo("MemTotal: 9 kB\nMemAvailable:    3 kB\n"), Some(3072));
        assert_eq!(available_in_meminfo("MemTotal: 9 kB\n"), None);
    }

    proptest::proptest! {
        // Containers may replace the kernel's files with their own (lxcfs).
        #[test]
        fn procfs_text_never_panics_or_leaves_the_root(
            text in "(MemAvailable: {0,3}[0-9]{1,21} kB\n|MemAvailable:|[0-9]:memory:/[a-z./]{0,9}\n|memory:|[0-9]{1,3}:|0::|/|\\.\\.|,| kB|\n|[0-9]{1,25}|\\PC){0,40}",
        ) {
            let _ = available_in_meminfo(&text);
            for folder in cgroup_folders(&text, Path::new("/r")) {
                assert!(folder.starts_with("/r"), "{folder:?}");
            }
        }

        #[test]
        fn cgroup_files_never_panic(limit in "[0-9]{1,25}|max|-1|", used in "[0-9]{1,25}|", stat in "((total_)?(in)?active_file [0-9]{1,22}\n|\\PC){0,6}") {
            let folder = tempfile::tempdir().unwrap();
            for (name, text) in [("memory.max", &limit), ("memory.current", &used), ("memory.stat", &stat)] {
                write(folder.path().join(name), text).unwrap();
            }
            let seen = headroom_of_cgroup(folder.path());
            assert!(seen.is_none_or(|seen| seen.available_bytes <= limit.parse().unwrap()));
        }
    }

    #[test]
    fn all_ancestor_cgroups_count_in_v2_and_v1() {
        let folders = cgroup_folders("5:cpu,memory:/a/b\n3:cpu:/x\n0::/u\n", Path::new("/r"));
        let expected = ["/r", "/r/memory", "/r/memory/a", "/r/memory/a/b", "/r/u", "/r/unified", "/r/unified/u"];
        assert_eq!(folders, expected.map(PathBuf::from));
    }

    #[test]
    fn page_cache_counts_as_free_and_max_as_no_limit() {
        let folder = tempfile::tempdir().unwrap();
        let v2 = folder.path().join("v2");
        create_dir_all(&v2).unwrap();
        for (name, text) in [
            ("memory.max", "1000\n"),
            ("memory.current", "900\n"),
            ("memory.stat", "anon 5\ninactive_file 300\nactive_file 100\n"),
        ] {
            write(v2.join(name), text).unwrap();
        }
        assert_eq!(headroom_of_cgroup(&v2).unwrap().available_bytes, 500);
        for (max, high, expected) in [
            ("1000", "max", Some((500, "memory.max is 1000"))),
            ("1000", "700", Some((200, "memory.high is 700"))),
            ("1000", "300", Some((0, "memory.high is 300"))),
            ("700", "1000", Some((200, "memory.max is 700"))),
            ("max", "700", Some((200, "memory.high is 700"))),
            ("max", "max", None),
        ] {
            write(v2.join("memory.max"), format!("{max}\n")).unwrap();
            write(v2.join("memory.high"), format!("{high}\n")).unwrap();
            let seen = headroom_of_cgroup(&v2);
            assert_eq!(seen.as_ref().map(|seen| seen.available_bytes), expected.map(|expected| expected.0), "{max}, {high}");
            assert!(expected.is_none_or(|expected| seen.is_some_and(|seen| seen.limit.ends_with(expected.1))), "{max}, {high}");
        }

        let v1 = folder.path().join("v1");
        create_dir_all(&v1).unwrap();
        let texts = [
            ("memory.limit_in_bytes", "2000"),
            ("memory.usage_in_bytes", "1500"),
            ("memory.stat", "inactive_file 1\ntotal_inactive_file 700\n"),
        ];
        for (name, text) in texts {
            write(v1.join(name), text).unwrap();
        }
        assert_eq!(headroom_of_cgroup(&v1).unwrap().available_bytes, 1200);
        write(v1.join("memory.limit_in_bytes"), "9223372036854771712").unwrap();
        assert_eq!(headroom_of_cgroup(&v1), None);
    }
}
