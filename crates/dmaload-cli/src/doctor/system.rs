//! Reads system files, to explain refusals and to find limits. Whether a feature works is never
//! inferred from them.

use std::fs::read_to_string;

use dmabuf::Limit;
use rustix::process::{Resource, getegid, getgroups, getrlimit};
use rustix::system::uname;

use super::cause::Circumstances;

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;

/// The locked memory limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memlock {
    /// The soft limit; `None` means no limit.
    pub(crate) soft_bytes: Option<u64>,
    /// The hard limit; `None` means no limit.
    pub(crate) hard_bytes: Option<u64>,
    /// Whether the process has CAP_IPC_LOCK, which lifts the limit.
    pub(crate) cap_ipc_lock: bool,
}

/// The system's huge page settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HugePages {
    /// The setting for memfds; `None` on kernels without transparent huge pages.
    pub(crate) shmem_enabled: Option<String>,
    /// The setting for private memory.
    pub(crate) enabled: Option<String>,
    /// Whether huge pages are disabled for this process (`PR_SET_THP_DISABLE`).
    pub(crate) denied_to_process: bool,
}

pub(crate) const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

pub(crate) fn kernel() -> String {
    let about = uname();
    format!("{} {}", about.sysname().to_string_lossy(), about.release().to_string_lossy())
}

/// Drivers that this kernel provides as modules, loaded or not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Modules {
    pub(crate) udmabuf: bool,
    pub(crate) system_heap: bool,
    /// Whether the list of modules could be read: containers usually lack the host's list.
    pub(crate) known: bool,
}

impl Modules {
    /// Reads the index of the running kernel's modules.
    pub(crate) fn read() -> Self {
        let release = uname().release().to_string_lossy().into_owned();
        read_to_string(format!("/lib/modules/{release}/modules.dep"))
            .map_or_else(|_| Modules::default(), |index| Self::parse(&index))
    }

    /// Parses lines of `PATH.ko[.xz]: PATHS`.
    fn parse(index: &str) -> Self {
        let has = |module: &str| {
            let mut files = index.lines().filter_map(|line| line.split(':').next()?.rsplit('/').next());
            files.any(|file| file.split('.').next().is_some_and(|name| name.replace('-', "_") == module))
        };
        Modules { udmabuf: has("udmabuf"), system_heap: has("system_heap"), known: true }
    }
}

/// The contents of `/proc/self/status` and, for use without procfs, the capabilities from
/// `capget(2)`.
pub(crate) struct Status {
    text: String,
    /// The effective capabilities that `capget(2)` returns. Used only without procfs.
    effective: Option<u64>,
}

impl Status {
    pub(crate) fn read() -> Self {
        let effective = rustix::thread::capabilities(None).ok().map(|sets| sets.effective.bits());
        Status { text: read_to_string("/proc/self/status").unwrap_or_default(), effective }
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    }

    fn has(&self, capability: u32) -> bool {
        match self.field("CapEff").and_then(|set| u64::from_str_radix(set, 16).ok()) {
            Some(set) => set >> capability & 1 == 1,
            // Without procfs, the text is empty.
            None => self.text.is_empty() && self.effective.is_some_and(|set| set >> capability & 1 == 1),
        }
    }

    pub(crate) fn memlock(&self) -> Memlock {
        let limit = getrlimit(Resource::Memlock);
        Memlock { soft_bytes: limit.current, hard_bytes: limit.maximum, cap_ipc_lock: self.has(CAP_IPC_LOCK) }
    }

    /// Returns how many bytes of address space the limit leaves; `None` without a limit, or if the
    /// current usage is unknown.
    pub(crate) fn address_room(&self) -> Option<u64> {
        let limit = Limit::AddressSpace.current()?;
        let used: u64 = self.field("VmSize")?.strip_suffix(" kB")?.trim().parse().ok()?;
        Some(limit.saturating_sub(used.saturating_mul(1024)))
    }

    pub(crate) fn huge_pages(&self) -> HugePages {
        let chosen = |path| read_to_string(path).ok().as_deref().and_then(chosen);
        HugePages {
            shmem_enabled: chosen(SHMEM_ENABLED),
            enabled: chosen(ENABLED),
            denied_to_process: self.field("THP_enabled") == Some("0"),
        }
    }

    pub(crate) fn circumstances(&self) -> Circumstances {
        let sysctl = |name: &str| read_to_string(format!("/proc/sys/kernel/{name}")).ok();
        // The value -1, which means no group, does not parse as a `u32`.
        let group = sysctl("io_uring_group").and_then(|group| group.trim().parse::<u32>().ok());
        let is_member =
            |group| getegid().as_raw() == group || getgroups().is_ok_and(|own| own.iter().any(|own| own.as_raw() == group));
        let lsms = read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
        Circumstances {
            sysctl: sysctl("io_uring_disabled").and_then(|value| value.trim().parse().ok()),
            privileged: self.has(CAP_SYS_ADMIN) || group.is_some_and(is_member),
            seccomp: self.field("Seccomp").is_some_and(|mode| mode != "0"),
            lsms: lsms.trim().split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect(),
        }
    }
}

/// Returns the choice in brackets, as in `always [madvise] never`.
fn chosen(choices: &str) -> Option<String> {
    let (_, rest) = choices.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn parsing_status_and_sysfs_never_panics(text in "(CapEff:|THP_enabled:|Seccomp:|\t|\n|\\[|\\]|[0-9a-f]{0,20}|\\PC){0,30}") {
            let _ = chosen(&text);
            let status = Status { text, effective: None };
            let _ = (status.has(CAP_IPC_LOCK), status.has(63), status.field("Seccomp"));
        }
    }

    #[test]
    fn modules_are_found_by_their_file_names() {
        let found = |index: &str| {
            let modules = Modules::parse(index);
            (modules.udmabuf, modules.system_heap)
        };
        assert_eq!(found("kernel/drivers/dma-buf/heaps/system_heap.ko.xz: kernel/udmabuf.ko\n"), (false, true));
        assert_eq!(found("kernel/drivers/dma-buf/udmabuf.ko:\n"), (true, false));
        assert_eq!(found("kernel/not_system_heap.ko:\n"), (false, false));
    }

    #[test]
    fn choice_is_the_one_in_brackets() {
        assert_eq!(chosen("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(chosen("always within_size advise [never] deny force").as_deref(), Some("never"));
        assert_eq!(chosen("none"), None);
    }

    #[test]
    fn status_reports_capabilities_and_filters() {
        let status = |text: &str| Status { text: text.to_owned(), effective: None };
        let nothing = status("");
        let without_procfs = Status { text: String::new(), effective: Some(1 << CAP_IPC_LOCK) };
        assert!(
            without_procfs.has(CAP_IPC_LOCK) && !without_procfs.has(CAP_SYS_ADMIN),
            "without procfs, the capabilities should be those of capget(2)"
        );
        let status = status("Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t0000000000004000\nSeccomp:\t2\nTHP_enabled:\t0\n");
        assert!(status.has(CAP_IPC_LOCK) && !status.has(CAP_SYS_ADMIN));
        assert!(status.circumstances().seccomp);
        assert!(status.huge_pages().denied_to_process);
        assert!(!nothing.has(CAP_IPC_LOCK) && !nothing.circumstances().seccomp && !nothing.huge_pages().denied_to_process);
    }
}
