//! The routes through which bytes get from storage into a segment, and their order.

use std::fmt;
use std::str::FromStr;

use dmabuf::Errno;

use crate::support::names;

/// How bytes get into a segment. The variants are in order, best first; a *lower* route is one
/// that comes later. A load starts at the requested route (see [`crate::LoadOptions::route`] for
/// the default) and falls back to a lower one if the kernel refuses it. The report lists each
/// [`Fallback`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Route {
    /// io_uring with registered buffers and `O_DIRECT`: the device writes into pages that were
    /// pinned once.
    UringFixedDirect,
    /// io_uring with `O_DIRECT`: each read pins its own pages. Works within an ordinary user's
    /// memlock limit.
    UringDirect,
    /// `pread(2)` with `O_DIRECT` on threads, for kernels and containers that refuse io_uring, and
    /// for files that io_uring must not read (such as those on FUSE).
    PreadDirect,
    /// Direct reads into a few staging buffers, through the best of the routes above, followed by
    /// a copy. For memory that can't be pinned, such as the mappings of most dma-heaps, and for
    /// devices where staged reads are faster.
    Bounce,
    /// io_uring through the page cache, with many reads at once. For network file systems on which
    /// direct reads are slow, and for callers who request it; a load never falls back to it.
    /// Leaves nothing in the page cache if the kernel and the file system support that
    /// (`RWF_DONTCACHE`).
    UringBuffered,
    /// `pread(2)` through the page cache on threads, for file systems that refuse `O_DIRECT`.
    Buffered,
}

impl Route {
    /// All routes, best first.
    pub const ALL: [Route; 6] =
        [Route::UringFixedDirect, Route::UringDirect, Route::PreadDirect, Route::Bounce, Route::UringBuffered, Route::Buffered];

    /// Returns the route to fall back to after this one was refused with `errno`, or `None` if
    /// there is no lower route.
    ///
    /// EFAULT means that the memory can't be pinned, so no direct read can target it and the next
    /// route is [`Route::Bounce`]. Other refusals have nothing to do with the memory, so reading
    /// into staging would not help.
    pub fn lower(self, errno: Errno) -> Option<Route> {
        if errno == Errno::EFAULT && self < Route::Bounce {
            return Some(Route::Bounce);
        }
        // After a refusal, reads through the page cache are done by threads rather than a ring,
        // because the threads populate memory as they write to it.
        Route::ALL.into_iter().find(|&other| other > self && !matches!(other, Route::Bounce | Route::UringBuffered))
    }

    /// Returns whether reads bypass the page cache and therefore need aligned offsets, lengths and
    /// addresses.
    pub fn is_direct(self) -> bool {
        self < Route::UringBuffered
    }

    /// Returns whether io_uring reads into the segment itself. False for [`Route::Bounce`],
    /// although its reads into staging may go through io_uring.
    pub fn uses_ring(self) -> bool {
        matches!(self, Route::UringFixedDirect | Route::UringDirect | Route::UringBuffered)
    }

    /// Returns the equivalent route that uses threads instead of a ring.
    pub(crate) fn without_ring(self) -> Route {
        match self {
            Route::UringFixedDirect | Route::UringDirect => Route::PreadDirect,
            Route::UringBuffered => Route::Buffered,
            other => other,
        }
    }

    /// Returns the name used on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Route::UringFixedDirect => "uring-fixed-direct",
            Route::UringDirect => "uring-direct",
            Route::PreadDirect => "pread-direct",
            Route::Bounce => "bounce",
            Route::UringBuffered => "uring-buffered",
            Route::Buffered => "buffered",
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Route {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        names::parse(name, "route", &Route::ALL, Route::name)
    }
}

/// A fallback from one route to a lower one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fallback {
    /// The file whose reads fell back; `None` if those of several or all files in the load did.
    pub file_index: Option<usize>,
    /// The route that was refused.
    pub from: Route,
    /// The route taken instead.
    pub to: Route,
    /// What was being tried.
    pub attempt: Attempt,
    /// The kernel's error, or an equivalent one if the kernel was not asked or returned none.
    pub errno: Errno,
}

impl Fallback {
    /// Describes what was refused and, if known, why it was refused or how to avoid that.
    pub fn reason(&self) -> String {
        match self.attempt.hint(self.errno) {
            Some(hint) => format!("{} was refused; {hint}", self.attempt),
            None => format!("{} was refused", self.attempt),
        }
    }
}

/// Something that a route needs from the kernel, and that the kernel may refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Attempt {
    /// `io_uring_setup(2)`.
    SetUpRing,
    /// Opening the file with `O_DIRECT`.
    OpenDirect,
    /// Registering a segment's pages with the ring.
    RegisterBuffer,
    /// Registering a staging buffer of [`Route::Bounce`] with the ring.
    RegisterStaging,
    /// Reading a file on FUSE with io_uring. This is never tried, because such reads can return
    /// wrong bytes.
    RingOnFuse,
    /// Reading a file on overlayfs or eCryptfs with io_uring. This is never tried, because the
    /// lower file system may be FUSE and can't be identified.
    RingOnStacked,
    /// Reading with io_uring from a file system that is not known to be local. This is never
    /// tried, because a server that does not answer could delay every other read. The exception is
    /// [`Route::UringBuffered`], which reads from NFS and SMB.
    RingOnOther,
    /// Reading with io_uring from a block device that may stop answering, because it depends on a
    /// network or a process (nbd, rbd, drbd, ublk, a loop device whose file isn't on a local file
    /// system), or from one whose backing can't be determined. This is never tried, because such a
    /// read may block the ring thread and with it every other read.
    RingOnDevice,
    /// Reading with io_uring from a file system that can't be identified, because `fstatfs(2)`
    /// fails. This is never tried.
    RingOnUnknown,
    /// A read through the route.
    Read,
    /// Continuing after direct reads repeatedly returned less than a block.
    ReadOn,
}

impl Attempt {
    /// Returns what causes a refusal with this errno, and what the user can do about it.
    pub fn hint(self, errno: Errno) -> Option<&'static str> {
        match (self, errno) {
            (Attempt::SetUpRing, Errno::EPERM) => Some(
                "the sysctl kernel.io_uring_disabled or a container's seccomp profile forbids io_uring: allow io_uring_setup, io_uring_enter and io_uring_register",
            ),
            (Attempt::SetUpRing, Errno::EACCES) => {
                Some("a security module (SELinux, AppArmor) forbids io_uring: allow it in its policy")
            }
            (Attempt::SetUpRing, Errno::ENOSYS) => Some(
                "this kernel has no io_uring, or a seccomp profile hides it: use Linux 5.6 or later, and a profile that allows io_uring",
            ),
            (Attempt::SetUpRing, Errno::ENOMEM) => Some("the locked memory limit is too low for a ring: raise it (ulimit -l)"),
            (Attempt::OpenDirect | Attempt::Read, Errno::EINVAL | Errno::EOPNOTSUPP) => {
                Some("this file system does not support O_DIRECT for this file: keep models on one that does (ext4, xfs, btrfs)")
            }
            (Attempt::RegisterBuffer | Attempt::RegisterStaging, Errno::ENOMEM) => {
                Some("the locked memory limit is too low: raise it (ulimit -l, LimitMEMLOCK=), or grant CAP_IPC_LOCK")
            }
            (Attempt::RegisterBuffer | Attempt::Read, Errno::EFAULT) => Some(
                "the kernel can't pin this heap's mappings, so reads go through staging buffers: use memfd or udmabuf to avoid that",
            ),
            (Attempt::RingOnFuse, _) => Some(
                "the kernel returns wrong bytes when a FUSE server answers such a read with fewer bytes: keep models on a local file system (ext4, xfs, btrfs)",
            ),
            (Attempt::RingOnStacked, _) => Some(
                "its layers can't be identified and may be on FUSE, where the kernel returns wrong bytes: \
                 keep models on their own volume, outside of the overlay",
            ),
            (Attempt::RingOnOther, _) => Some(
                "a server that does not answer could delay every other read: \
                 keep models on a local file system (ext4, xfs, btrfs)",
            ),
            (Attempt::RingOnDevice, Errno::EOPNOTSUPP) => Some(
                "a network or a server is behind it and may stop answering, which could delay every other read: \
                 keep models on a local disk",
            ),
            (Attempt::RingOnDevice, _) => Some(
                "its backing can't be determined and may stop answering: \
                 mount sysfs at /sys, and keep the file of a loop device where its path can be reached",
            ),
            (Attempt::RingOnUnknown, _) => Some(
                "fstatfs failed, so it may be FUSE, where the kernel returns wrong bytes: \
                 keep models on a local file system (ext4, xfs, btrfs)",
            ),
            (Attempt::RegisterBuffer, Errno::EOPNOTSUPP) => Some("this memory can't be registered"),
            (Attempt::RegisterBuffer | Attempt::RegisterStaging, Errno::EINVAL) => {
                Some("sparse buffer tables need Linux 5.19 or later")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Attempt::SetUpRing => "setting up io_uring",
            Attempt::OpenDirect => "opening with O_DIRECT",
            Attempt::RegisterBuffer => "registering memory with io_uring",
            Attempt::RegisterStaging => "registering a staging buffer with io_uring",
            Attempt::RingOnFuse => "reading from FUSE with io_uring",
            Attempt::RingOnStacked => "reading with io_uring from a file system that stacks on others (overlayfs)",
            Attempt::RingOnOther => "reading with io_uring from a file system that is not known to be local",
            Attempt::RingOnDevice => "reading with io_uring from a block device that may stop answering",
            Attempt::RingOnUnknown => "reading with io_uring from a file system that can't be identified",
            Attempt::Read => "reading through this route",
            Attempt::ReadOn => "continuing a read within a block",
        })
    }
}

/// Returns whether a read error means that the route was refused, rather than that the bytes can't
/// be read.
///
/// EINVAL and EOPNOTSUPP come from file systems that lack `O_DIRECT` or need a stricter alignment
/// than they report. EFAULT comes from memory that can't be pinned, and the other refusals come
/// from security modules and limits. Storage errors (EIO, ENODATA, ESTALE, ...) occur on every
/// route.
pub(crate) fn is_refusal(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EFAULT | Errno::ENOMEM | Errno::EPERM | Errno::EACCES
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ladder_goes_down_one_step_at_a_time_and_ends() {
        let ladder = |errno| {
            let mut seen = vec![Route::UringFixedDirect];
            while let Some(lower) = seen.last().and_then(|route| route.lower(errno)) {
                seen.push(lower);
            }
            seen
        };
        use Route::{Bounce, Buffered, PreadDirect, UringBuffered, UringDirect, UringFixedDirect};
        assert_eq!(ladder(Errno::EINVAL), [UringFixedDirect, UringDirect, PreadDirect, Buffered]);
        assert_eq!(ladder(Errno::EFAULT), [UringFixedDirect, Bounce, Buffered]);
        assert_eq!(Bounce.lower(Errno::EINVAL), Some(Buffered));
        for errno in [Errno::EINVAL, Errno::EFAULT] {
            assert_eq!(UringBuffered.lower(errno), Some(Buffered));
        }
    }

    #[test]
    fn routes_without_a_ring_stay_direct_or_buffered() {
        for route in Route::ALL {
            let threads = route.without_ring();
            assert!(!threads.uses_ring() && threads >= route, "{route}");
            assert_eq!(threads.is_direct(), route.is_direct(), "{route}");
        }
    }

    #[test]
    fn route_names_parse_back() {
        for route in Route::ALL {
            assert_eq!(route.to_string().parse(), Ok(route));
        }
        assert!("bounce-house".parse::<Route>().unwrap_err().contains("pread-direct"));
    }

    #[test]
    fn medium_error_is_not_a_refusal() {
        for errno in [Errno::EIO, Errno::ENODATA, Errno::ESTALE, Errno::ETIMEDOUT, Errno::EREMOTEIO, Errno::ENODEV] {
            assert!(!is_refusal(errno));
        }
    }
}
