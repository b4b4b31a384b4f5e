//! What has shown of the heap's memory, and of file systems: later loads need not try again.

use std::collections::HashMap;
use std::time::Duration;

use rustix::io::Errno;

use crate::route::{Attempt, Route};

/// How long a refusal is taken for granted. It costs little to try again, and the first file may have been an odd one.
const KNOWN_FOR: Duration = Duration::from_secs(60);

/// What was found out about the heap's memory.
#[derive(Debug, Default)]
enum Pinnable {
    #[default]
    Unknown,
    /// Direct reads have gone into it: what is refused with EFAULT is not the memory's.
    Yes,
    No {
        attempt: Attempt,
        errno: Errno,
        until: Duration,
    },
}

/// What the first reads from a file system have shown.
#[derive(Debug)]
enum Mount {
    /// Direct reads work: a file that refuses them is one of its own kind.
    Direct,
    /// Reads by routes better than this one were refused; known until then.
    Refused { to: Route, errno: Errno, until: Duration },
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Known {
    memory: Pinnable,
    mounts: HashMap<u64, Mount>,
}

impl Known {
    /// A step down was taken.
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

    /// A piece of a file was filled by this route.
    pub(super) fn worked(&mut self, mount: u64, route: Route) {
        if route.is_direct() {
            self.mounts.insert(mount, Mount::Direct);
        }
        if route < Route::Bounce {
            self.memory = Pinnable::Yes;
        }
    }

    /// What is known to be refused to reads by this route, before trying: the lowest step that follows from it.
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
