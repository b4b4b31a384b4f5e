//! May this memory be taken? Asked before each allocation, since asking the kernel for too much wakes the OOM killer.
//!
//! What was granted and is still being allocated does not show in the kernel's figures yet, so it is counted here: for the whole
//! process, since all of its loaders take from the same memory.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::headroom::{Headroom, headroom};

/// Memory that may be taken before the limits are looked at again: looking costs a dozen small files.
const BUDGET_BYTES: u64 = 64 << 20;
const BUDGET_TIME: Duration = Duration::from_millis(200);
/// How long allocations under way are waited for when there is no room beside them. They take milliseconds; a heap of the
/// caller's may hang.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct State {
    /// Granted, and still being allocated.
    granted_bytes: u64,
    /// What was seen to be free beyond all that was granted, and may be taken without another look until then.
    budget_bytes: u64,
    until: Option<Instant>,
}

#[derive(Debug)]
struct Allowance {
    state: Mutex<State>,
    changed: Condvar,
}

static PROCESS: Allowance = Allowance::new();

/// The right to take some memory, to be held until it is taken.
#[derive(Debug)]
#[must_use = "what is not held is not counted"]
pub(super) struct Grant {
    of: &'static Allowance,
    bytes: u64,
}

impl Drop for Grant {
    fn drop(&mut self) {
        self.of.state().granted_bytes -= self.bytes;
        self.of.changed.notify_all();
    }
}

/// Asks for `bytes` bytes. `make_room` frees what can be freed, and is called once, when there is no room.
///
/// # Errors
/// What there is instead.
pub(super) fn grant(bytes: u64, make_room: impl FnOnce()) -> Result<Grant, Headroom> {
    PROCESS.grant(bytes, make_room, headroom)
}

impl Allowance {
    const fn new() -> Self {
        Allowance { state: Mutex::new(State { granted_bytes: 0, budget_bytes: 0, until: None }), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grant(
        &'static self,
        bytes: u64,
        make_room: impl FnOnce(),
        look: impl Fn() -> Option<Headroom>,
    ) -> Result<Grant, Headroom> {
        let mut make_room = Some(make_room);
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.state();
        loop {
            let now = Instant::now();
            if state.until.is_some_and(|until| now < until) && bytes <= state.budget_bytes {
                state.budget_bytes -= bytes;
                break;
            }
            let Some(seen) = look() else { break };
            let free = seen.available_bytes.saturating_sub(state.granted_bytes);
            if bytes <= free {
                state.budget_bytes = free.min(BUDGET_BYTES.max(bytes)) - bytes;
                state.until = Some(now + BUDGET_TIME);
                break;
            }
            if state.granted_bytes > 0 && now < deadline {
                // Part of what was granted may be counted twice by now: when it is taken, it shows.
                state = self.changed.wait_timeout(state, deadline - now).unwrap_or_else(PoisonError::into_inner).0;
            } else if let Some(make_room) = make_room.take() {
                drop(state);
                make_room();
                state = self.state();
            } else {
                return Err(seen);
            }
        }
        state.granted_bytes += bytes;
        Ok(Grant { of: self, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn have(bytes: u64) -> impl Fn() -> Option<Headroom> {
        move || Some(Headroom { available_bytes: bytes, limit: "a test".to_owned() })
    }

    #[test]
    fn what_was_granted_counts_until_it_is_taken() {
        const GIB: u64 = 1 << 30;
        let allowance: &'static Allowance = Box::leak(Box::new(Allowance::new()));
        let machine = 1000 * GIB;
        let first = allowance.grant(600 * GIB, || (), have(machine)).unwrap();
        let began = Instant::now();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| allowance.grant(600 * GIB, || (), have(machine)).is_ok());
            std::thread::sleep(Duration::from_millis(100));
            assert!(!other.is_finished(), "there is no room for both");
            drop(first);
            assert!(other.join().unwrap(), "it waits for its turn");
        });
        assert!(began.elapsed() < PATIENCE);
        let made = AtomicU64::new(0);
        let room = || made.fetch_add(1, Ordering::Relaxed);
        let refused = allowance
            .grant(
                2 * machine,
                || {
                    room();
                },
                have(machine),
            )
            .unwrap_err();
        assert_eq!((refused.available_bytes, made.load(Ordering::Relaxed)), (machine, 1), "room was made once");
        let free = AtomicU64::new(0);
        let look = || Some(Headroom { available_bytes: free.load(Ordering::Relaxed), limit: String::new() });
        let _granted = allowance.grant(500 * GIB, || free.store(machine, Ordering::Relaxed), look).unwrap();
        // Where nothing can be read, nothing is refused.
        let _granted = allowance.grant(u64::MAX / 4, || (), || None).unwrap();
    }
}
