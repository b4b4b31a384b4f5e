//! Infers from the errno and the circumstances what refuses io_uring.

use std::fmt;

use dmaload::Errno;

/// Settings of the process and the machine that can explain why io_uring was refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Circumstances {
    /// `kernel.io_uring_disabled`: 0 allows io_uring, 1 allows it for privileged users and a
    /// group, 2 forbids it; `None` before Linux 6.6, or without procfs.
    pub(crate) sysctl: Option<u32>,
    /// Whether `kernel.io_uring_disabled=1` still allows io_uring for this process, because it has
    /// CAP_SYS_ADMIN or is a member of `kernel.io_uring_group`.
    pub(crate) privileged: bool,
    /// Whether a seccomp filter applies to this process.
    pub(crate) seccomp: bool,
    /// The active security modules, if known.
    pub(crate) lsms: Vec<String>,
}

/// What refuses io_uring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The sysctl `kernel.io_uring_disabled`, with this value.
    Sysctl(u32),
    Seccomp,
    /// A security module, with its name if known.
    Lsm(Option<String>),
    /// The kernel does not support io_uring.
    Kernel,
    Memlock,
    Unknown,
}

/// Security modules that decide by policy and can therefore refuse io_uring.
const POLICIES: [&str; 5] = ["selinux", "apparmor", "smack", "tomoyo", "bpf"];

pub(crate) fn find(errno: Errno, around: &Circumstances) -> Cause {
    let policy = around.lsms.iter().find(|lsm| POLICIES.contains(&lsm.as_str())).cloned();
    match (errno, around.sysctl) {
        (Errno::EPERM, Some(value @ 2..)) => Cause::Sysctl(value),
        (Errno::EPERM, Some(1)) if !around.privileged => Cause::Sysctl(1),
        (Errno::EPERM | Errno::ENOSYS, _) if around.seccomp => Cause::Seccomp,
        // A filter can return any errno, but an active security module with a policy is the
        // likelier cause.
        (Errno::EACCES, _) if policy.is_none() && around.seccomp => Cause::Seccomp,
        (Errno::EACCES, _) => Cause::Lsm(policy),
        (Errno::ENOSYS, _) => Cause::Kernel,
        (Errno::ENOMEM, _) => Cause::Memlock,
        _ => Cause::Unknown,
    }
}

impl Cause {
    /// Returns the name used in JSON.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Cause::Sysctl(_) => "sysctl",
            Cause::Seccomp => "seccomp",
            Cause::Lsm(_) => "lsm",
            Cause::Kernel => "kernel",
            Cause::Memlock => "memlock",
            Cause::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::Sysctl(value) => write!(f, "the sysctl kernel.io_uring_disabled={value}"),
            Cause::Seccomp => f.write_str("a seccomp filter (a container's profile)"),
            Cause::Lsm(Some(name)) => write!(f, "the security module {name}"),
            Cause::Lsm(None) => f.write_str("a security module"),
            Cause::Kernel => f.write_str("the kernel, which does not support it (CONFIG_IO_URING)"),
            Cause::Memlock => f.write_str("the locked memory limit"),
            Cause::Unknown => f.write_str("an unknown cause"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cause_follows_from_errno_and_circumstances() {
        let free = Circumstances::default();
        let sysctl = |value, privileged| Circumstances { sysctl: Some(value), privileged, ..Circumstances::default() };
        let filtered = Circumstances { seccomp: true, ..sysctl(0, true) };
        let guarded = |seccomp| Circumstances {
            seccomp,
            lsms: ["lockdown", "capability", "landlock", "selinux"].map(str::to_owned).to_vec(),
            ..Circumstances::default()
        };
        let selinux = Cause::Lsm(Some("selinux".to_owned()));
        for (errno, around, expected) in [
            (Errno::EPERM, sysctl(2, true), Cause::Sysctl(2)),
            (Errno::EPERM, sysctl(2, false), Cause::Sysctl(2)),
            (Errno::EPERM, sysctl(1, false), Cause::Sysctl(1)),
            // The value 1 does not refuse a privileged process.
            (Errno::EPERM, sysctl(1, true), Cause::Unknown),
            (Errno::EPERM, Circumstances { seccomp: true, ..sysctl(1, true) }, Cause::Seccomp),
            (Errno::EPERM, filtered.clone(), Cause::Seccomp),
            (Errno::EPERM, sysctl(0, false), Cause::Unknown),
            (Errno::EPERM, free.clone(), Cause::Unknown),
            (Errno::ENOSYS, filtered.clone(), Cause::Seccomp),
            (Errno::ENOSYS, free.clone(), Cause::Kernel),
            (Errno::EACCES, guarded(false), selinux.clone()),
            (Errno::EACCES, guarded(true), selinux),
            (Errno::EACCES, free.clone(), Cause::Lsm(None)),
            (Errno::EACCES, filtered.clone(), Cause::Seccomp),
            (Errno::ENOMEM, filtered, Cause::Memlock),
            (Errno::EMFILE, free, Cause::Unknown),
        ] {
            assert_eq!(find(errno, &around), expected, "{errno:?} {around:?}");
        }
    }
}
