//! Identifies the user at the other end of a socket.

use std::fs;

use rustix::net::sockopt;
use rustix::process::geteuid;
use std::os::fd::AsFd;

/// The kernel's default for `/proc/sys/kernel/overflowuid`.
const DEFAULT_OVERFLOW_USER: u32 = 65534;
/// The number of user ids: `u32::MAX` is not a valid one.
const ALL_USERS: u64 = u32::MAX as u64;

/// Records which user id, if any, several users share. In a user namespace that does not map every
/// user, all unmapped users share one id: the overflow id, often called `nobody`. A peer with that
/// id can be any of these users, even if this process has the id, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Users {
    /// The id that all unmapped users share; `None` if all users are mapped.
    overflow: Option<u32>,
}

impl Users {
    /// Reads the user mapping of this process. If procfs cannot be read, assumes that the overflow
    /// id is the kernel's default, and that not every user is mapped.
    pub(super) fn of_this_process() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Users::parse(&read("/proc/self/uid_map"), &read("/proc/sys/kernel/overflowuid"))
    }

    fn parse(uid_map: &str, overflow: &str) -> Self {
        // Ranges do not overlap, so the sum of their lengths shows whether all users are mapped. A
        // nested namespace can map only ids that its parent maps, so its map is complete only if
        // the parent's is.
        let length = |line: &str| line.split_ascii_whitespace().nth(2).and_then(|length| length.parse::<u64>().ok()).unwrap_or(0);
        let mapped = uid_map.lines().map(length).fold(0, u64::saturating_add);
        let overflow = overflow.trim().parse().unwrap_or(DEFAULT_OVERFLOW_USER);
        Users { overflow: (mapped < ALL_USERS).then_some(overflow) }
    }

    /// Whether a peer with this id might be any unmapped user.
    pub(super) fn is_ambiguous(self, user: u32) -> bool {
        self.overflow == Some(user)
    }

    /// Whether a peer with this id belongs to this process's own user.
    pub(super) fn is_own(self, user: u32) -> bool {
        user == geteuid().as_raw() && !self.is_ambiguous(user)
    }

    /// Whether a peer with this id is root in this process's user namespace.
    pub(super) fn is_root(self, user: u32) -> bool {
        user == 0 && !self.is_ambiguous(user)
    }
}

/// Returns the user id of the process at the other end of a connection.
pub(super) fn user_of(socket: impl AsFd) -> Result<u32, rustix::io::Errno> {
    sockopt::socket_peercred(socket).map(|peer| peer.uid.as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overflow_id_is_one_user_only_if_all_are_mapped() {
        for (map, overflow, ambiguous) in [
            ("         0          0 4294967295\n", "65534\n", None),
            ("0 0 65534\n65534 65534 4294901761\n", "65534\n", None),
            ("0 1000 1\n", "65534\n", Some(65534)),
            ("0 0 65536\n", "65534\n", Some(65534)),
            ("0 0 4294967294\n", "65534\n", Some(65534)),
            ("0 1000 1\n", "99\n", Some(99)),
            ("0 1000 1\n", "0\n", Some(0)),
            ("", "65534\n", Some(65534)),
            ("", "", Some(65534)),
            ("0 1000 1\n", "", Some(65534)),
            ("no map", "no number", Some(65534)),
        ] {
            let users = Users::parse(map, overflow);
            assert_eq!(users.overflow, ambiguous, "{map:?} {overflow:?}");
            let own = geteuid().as_raw();
            assert_eq!(users.is_own(own), ambiguous != Some(own), "{map:?} {overflow:?}");
            assert_eq!(users.is_root(0), ambiguous != Some(0), "{map:?} {overflow:?}");
            assert!(!users.is_own(own + 1) && !users.is_root(1));
        }
    }
}
