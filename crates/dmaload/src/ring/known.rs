//! Remembers which routes don't work with the heap's memory or with a file system, so later loads
//! need not try them again.

use std::collections::HashMap;
use std::time::Duration;

use rustix::io::Errno;

use crate::route::{Attempt, Route};

/// How long a refusal is remembered. After that, reads by the refused route are tried again: this
/// costs little, and the file whose read was refused may have been an exception.
const KNOWN_FOR: Duration = Duration::from_secs(60);

/// Whether the heap's memory can be pinned.
#[derive(Debug, Default)]
enum Pinnable {
    #[default]
    Unknown,
    /// Direct reads into the memory have worked, so it is not the cause of a later EFAULT.
    Yes,
    No {
        attempt: Attempt,
        errno: Errno,
        until: Duration,
    },
}

/// What is known about reads from a file system.
#[derive(Debug)]
enum Mount {
    /// Direct reads work; a file that refuses them is an exception.
    Direct,
    /// Direct reads by routes better than `to` were refused. This is remembered until `until`.
    Refused { to: Route, errno: Errno, until: Duration },
}

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct Known {
    memory: Pinnable,
    mounts: HashMap<u64, Mount>,
}

impl Known {
    /// Records a fallback. If it leads to `bounce`, remembers that the memory was the cause. If a
    /// direct read failed with EINVAL or EOPNOTSUPP, remembers that the file system was the cause.
    /// Other fallbacks are not remembered.
    pub(super) fn stepped_down(&mut self, mount: u64, (from, to): (Route, Route), attempt: Attempt, errno: Errno, now: Duration) {
        let until = now + KNOWN_FOR;
        if to == Route::Bounce {
            if !matches!(self.memory, Pinnable::Yes) {
                self.memory = Pinnable::No { attempt, errno, until };
            }
        } else if from.is_direct() && attempt == Attempt::Read && matches!(errno, Errno::INVAL | Errno::OPNOTSUPP) {
            let known = self.mounts.entry(mount).or_insert(Mount::Refused { to, errno, until });
            if let Mount::Refused { to: known, until: known_until, .. } = known {
                *known = to.max(*known);
                *known_until = until;
            }
        }
    }

    /// Records that a piece was filled from this file system. `route` is the least preferred of
    /// the routes that were used.
    pub(super) fn worked(&mut self, mount: u64, route: Route) {
        if route.is_direct() {
            self.mounts.insert(mount, Mount::Direct);
        }
        if route < Route::Bounce {
            self.memory = Pinnable::Yes;
        }
    }

    /// Returns a remembered refusal of this route: the route to fall back to, and the attempt and
    /// error to report. If several refusals apply, returns the one that leads to the least
    /// preferred route.
    pub(super) fn refusal(&self, mount: u64, route: Route, now: Duration) -> Option<(Route, Attempt, Errno)> {
        let memory = match self.memory {
            Pinnable::No { attempt, errno, until } if now < until => Some((Route::Bounce, attempt, errno)),
            _ => None,
        };
        let mount = match self.mounts.get(&mount) {
            Some(&Mount::Refused { to, errno, until }) if now < until && route.is_direct() => Some((to, Attempt::Read, errno)),
            _ => None,
        };
        memory.into_iter().chain(mount).filter(|&(to, ..)| route < to).max_by_key(|&(to, ..)| to)
    }
}
