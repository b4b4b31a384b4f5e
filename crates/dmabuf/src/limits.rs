//! Resource limits of this process.
//!
//! This module calls libc, because rustix assumes that `prlimit64(2)` cannot fail. If a sandbox
//! refuses that call, the limits are read from procfs instead.
#![allow(unsafe_code)]

use std::fs;

/// A resource limit of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// RLIMIT_FSIZE, in bytes.
    FileSize,
    /// RLIMIT_NOFILE, in descriptors.
    OpenFiles,
    /// RLIMIT_AS, in bytes.
    AddressSpace,
}

impl Limit {
    /// Returns the soft limit, or `None` if the resource is unlimited, or if neither the system
    /// call nor procfs reports the limit.
    #[must_use]
    pub fn current(self) -> Option<u64> {
        let resource = match self {
            Limit::FileSize => libc::RLIMIT_FSIZE,
            Limit::OpenFiles => libc::RLIMIT_NOFILE,
            Limit::AddressSpace => libc::RLIMIT_AS,
        };
        let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the call writes to `limit`, which is live and of the type that it expects.
        let status = unsafe { libc::getrlimit(resource, &raw mut limit) };
        if status == 0 {
            return (limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur);
        }
        self.parse_list(&fs::read_to_string("/proc/self/limits").ok()?)
    }

    /// Parses the soft limit from the text of `/proc/self/limits`.
    fn parse_list(self, list: &str) -> Option<u64> {
        let name = match self {
            Limit::FileSize => "Max file size",
            Limit::OpenFiles => "Max open files",
            Limit::AddressSpace => "Max address space",
        };
        list.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn procfs_and_the_kernel_report_the_same_limits() {
        let list = fs::read_to_string("/proc/self/limits").unwrap();
        for limit in [Limit::FileSize, Limit::OpenFiles, Limit::AddressSpace] {
            assert_eq!(limit.parse_list(&list), limit.current(), "{limit:?}: {list}");
        }
        assert!(Limit::OpenFiles.current().is_some(), "{list}");
    }
}
