//! Grants permits before memory is allocated, because allocating too much invokes the OOM killer.
//!
//! The kernel's figures do not include memory that was granted but is still being allocated. This
//! module therefore counts that memory itself, for all loaders in the process together. A forked
//! child starts a new count, because the threads that hold the permits and the lock exist only in
//! its parent.
//!
//! Other processes allocate memory, too. Each process that uses this library takes only a small
//! fraction of the free memory between two checks. For a single allocation that exceeds that
//! fraction, the processes take turns. A turn is an advisory lock on the folder of the cgroup with
//! the tightest limit, or on `/proc/meminfo`. It is held from the check until the memory shows up
//! in the kernel's figures. Processes that don't use this library can still take memory that a
//! check found free.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use dmabuf::printable;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;

use super::{Headroom, headroom};
use crate::support::errno;
use crate::support::foreign;

/// Maximum number of bytes that are granted based on one check of the limits. Several grants share
/// a check because each check reads about a dozen small files.
const BUDGET_BYTES: u64 = 64 << 20;
/// How long a check of the limits is valid.
const BUDGET_TIME: Duration = Duration::from_millis(200);
/// Between two checks, a process may take one sixteenth of the free memory without waiting for its
/// turn.
const PART_WITHOUT_TURN: u64 = 16;
/// How long to wait for a turn while no memory is being allocated. Other processes hold the lock
/// while they allocate, which takes milliseconds. The wait is limited because any process that can
/// open the folder could keep it locked forever.
const TURN_PATIENCE: Duration = Duration::from_secs(1);
/// How long to wait for a turn while memory is being allocated. On an overloaded machine, a few
/// processes can take seconds to finish their turns.
const TURN_PATIENCE_MAX: Duration = Duration::from_secs(10);
/// How often to check, while waiting for a turn, whether memory is being allocated.
const TURN_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// The change in free memory, in bytes, that indicates that memory is being allocated. It is
/// measured from the last change of at least this size, so small steps add up.
const TURN_CHECK_BYTES: u64 = 1 << 20;
/// How long to go without turns after failing to obtain one, so a lock that is never released does
/// not delay every allocation.
const WITHOUT_TURNS: Duration = Duration::from_secs(10);
/// When processes that share a limit run out of memory at the same time, the first one whose
/// allocation fails frees its memory for the others. To keep them from all failing at once, each
/// process first waits for 0 to [`GIVE_UP_STEPS`] - 1 of these steps, depending on its process ID.
const GIVE_UP_STEP: Duration = Duration::from_millis(150);
/// The number of distinct timeouts after which a waiting allocation fails.
const GIVE_UP_STEPS: u32 = 8;
/// How often to check for free memory while waiting before an allocation fails.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);
/// How long to wait for this process's other allocations to finish if there is not enough memory
/// for all. Allocations take milliseconds, but a caller's heap may hang.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct PermitsState {
    /// Bytes granted and still being allocated.
    granted_bytes: u64,
    /// Further bytes that may be granted before `until` without another check.
    budget_bytes: u64,
    until: Option<Instant>,
    /// When to wait for turns again, after failing to obtain one.
    no_turn_until: Option<Instant>,
}

#[derive(Debug)]
struct Permits {
    /// The ID of the process that these permits belong to; 0 before the first use.
    process: AtomicU32,
    state: Mutex<PermitsState>,
    changed: Condvar,
    /// The permits of a process forked from this one.
    forked: OnceLock<Box<Permits>>,
}

static PROCESS: Permits = Permits::new();

/// Permission to allocate some memory. Hold it until the memory's pages are allocated.
#[derive(Debug)]
#[must_use = "the memory counts as granted only while the permit is held"]
pub(crate) struct HeadroomPermit {
    permits: &'static Permits,
    bytes: u64,
    _turn: Option<ProcessTurn>,
}

/// This process's turn among the processes that share a limit. Dropping it ends the turn.
#[derive(Debug)]
struct ProcessTurn(#[expect(dead_code, reason = "closing the descriptor ends the turn")] OwnedFd);

impl ProcessTurn {
    /// Waits for a turn. The timeout is extended while `look` shows that the available memory
    /// keeps changing. Returns `None` after the timeout, or if `place` can't be opened or locked.
    fn wait(place: &Path, look: impl Fn() -> Option<Headroom>) -> Option<Self> {
        let descriptor = open(place, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let start = Instant::now();
        let (mut deadline, mut next_check, mut free) = (start + TURN_PATIENCE, start, u64::MAX);
        loop {
            match flock(&descriptor, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Some(ProcessTurn(descriptor)),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(1));
                    let now = Instant::now();
                    if next_check <= now {
                        let seen = look().map_or(free, |seen| seen.available_bytes);
                        if seen.abs_diff(free) >= TURN_CHECK_BYTES {
                            // Free memory changes: the process whose turn it is seems to be
                            // allocating.
                            deadline = (now + TURN_PATIENCE).min(start + TURN_PATIENCE_MAX);
                            free = seen;
                        }
                        next_check = now + TURN_CHECK_INTERVAL;
                    }
                }
                Err(errno) => {
                    let errno = errno::describe(errno);
                    foreign::emit(|| {
                        let errno = errno.as_str();
                        tracing::debug!(place = %printable::path(place), errno, "cannot take turns with other processes that share a memory limit");
                    });
                    return None;
                }
            }
        }
    }
}

impl Drop for HeadroomPermit {
    fn drop(&mut self) {
        self.permits.state().granted_bytes -= self.bytes;
        self.permits.changed.notify_all();
    }
}

/// Grants `bytes` bytes. If they are not available, first waits for other allocations of this
/// process to finish. If that is not enough, calls `make_room` once, which should free as much as
/// it can. After that, waits for other processes that share the limit to free memory, for a time
/// that depends on the process ID ([`GIVE_UP_STEP`]).
///
/// # Errors
/// The available memory and the limit that determines it, if the bytes are still not available.
pub(crate) fn grant(bytes: u64, make_room: impl FnOnce()) -> Result<HeadroomPermit, Headroom> {
    let process = std::process::id();
    let patience = GIVE_UP_STEP * (process % GIVE_UP_STEPS);
    PROCESS.for_process(process).grant(bytes, make_room, headroom, patience)
}

impl Permits {
    const fn new() -> Self {
        Permits {
            state: Mutex::new(PermitsState { granted_bytes: 0, budget_bytes: 0, until: None, no_turn_until: None }),
            changed: Condvar::new(),
            process: AtomicU32::new(0),
            forked: OnceLock::new(),
        }
    }

    /// Returns the permits of the process with the ID `process`. It may have been forked from a
    /// process that holds permits.
    fn for_process(&'static self, process: u32) -> &'static Permits {
        let mut permits = self;
        loop {
            match permits.process.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed) {
                Err(other) if other != process => permits = permits.forked.get_or_init(|| Box::new(Permits::new())),
                Ok(_) | Err(_) => return permits,
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, PermitsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grant(
        &'static self,
        bytes: u64,
        make_room: impl FnOnce(),
        look: impl Fn() -> Option<Headroom>,
        patience: Duration,
    ) -> Result<HeadroomPermit, Headroom> {
        let mut make_room = Some(make_room);
        let (mut turn, mut give_up) = (None, None);
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
            let part = free / PART_WITHOUT_TURN;
            let waits = part < bytes && turn.is_none() && state.no_turn_until.is_none_or(|until| until <= now);
            if waits {
                // Wait even if there is not enough memory: another process may have failed
                // and be freeing its memory.
                drop(state);
                turn = ProcessTurn::wait(&seen.place, &look);
                state = self.state();
                if turn.is_none() {
                    state.no_turn_until = Some(Instant::now() + WITHOUT_TURNS);
                }
                continue;
            }
            if bytes <= free {
                state.budget_bytes = part.min(BUDGET_BYTES).saturating_sub(bytes);
                state.until = Some(now + BUDGET_TIME);
                break;
            }
            if state.granted_bytes > 0 && now < deadline {
                // Wait for permits to be dropped. Until then, granted memory that already shows up
                // in the kernel's figures is counted twice.
                state = self.changed.wait_timeout(state, deadline - now).unwrap_or_else(PoisonError::into_inner).0;
            } else if let Some(make_room) = make_room.take() {
                drop(state);
                make_room();
                state = self.state();
                give_up = Some(Instant::now() + patience);
            } else if give_up.is_some_and(|give_up| now < give_up) {
                // End the turn first, so other processes can check, too.
                drop((state, turn.take()));
                thread::sleep(CHECK_INTERVAL);
                state = self.state();
            } else {
                return Err(seen);
            }
        }
        state.granted_bytes += bytes;
        Ok(HeadroomPermit { permits: self, bytes, _turn: turn })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    const NOW: Duration = Duration::ZERO;

    fn seen(available_bytes: u64, place: &Path) -> Headroom {
        Headroom { available_bytes, limit: "a test".to_owned(), place: place.to_owned() }
    }

    fn with_available(bytes: u64) -> impl Fn() -> Option<Headroom> {
        move || Some(seen(bytes, Path::new("/nonexistent")))
    }

    #[test]
    fn granted_memory_counts_until_its_permit_is_dropped() {
        const GIB: u64 = 1 << 30;
        let permits: &'static Permits = Box::leak(Box::new(Permits::new()));
        let machine = 1000 * GIB;
        let first = permits.grant(600 * GIB, || (), with_available(machine), NOW).unwrap();
        let began = Instant::now();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| permits.grant(600 * GIB, || (), with_available(machine), NOW).is_ok());
            std::thread::sleep(Duration::from_millis(100));
            assert!(!other.is_finished(), "the second grant should wait until the first is dropped");
            drop(first);
            assert!(other.join().unwrap(), "the second permit should be granted once the first is dropped");
        });
        assert!(began.elapsed() < PATIENCE);
        let made = AtomicU64::new(0);
        let room = || made.fetch_add(1, Ordering::Relaxed);
        let refused = permits
            .grant(
                2 * machine,
                || {
                    room();
                },
                with_available(machine),
                NOW,
            )
            .unwrap_err();
        assert_eq!((refused.available_bytes, made.load(Ordering::Relaxed)), (machine, 1), "`make_room` should be called once");
        let free = AtomicU64::new(0);
        let look = || Some(seen(free.load(Ordering::Relaxed), Path::new("/nonexistent")));
        let _granted = permits.grant(500 * GIB, || free.store(machine, Ordering::Relaxed), look, NOW).unwrap();
        // If no limit can be read, nothing is refused.
        let _granted = permits.grant(u64::MAX / 4, || (), || None, NOW).unwrap();
    }

    #[test]
    fn forked_child_counts_permits_anew() {
        let first: &'static Permits = Box::leak(Box::new(Permits::new()));
        let permit = first.for_process(1).grant(1 << 30, || (), with_available(1 << 40), NOW).unwrap();
        assert_eq!(first.for_process(1).state().granted_bytes, 1 << 30);
        // A child and a grandchild are forked while a thread of the parent holds the lock.
        let held = first.for_process(1).state();
        for process in [2, 3, 2] {
            assert_eq!(first.for_process(process).state().granted_bytes, 0, "process {process}");
        }
        drop(held);
        drop(permit);
        assert_eq!(first.for_process(1).state().granted_bytes, 0);
    }

    /// Each `Permits` value simulates one process. The processes share the free memory, and each
    /// allocation takes a while to show up there.
    #[test]
    fn processes_sharing_a_limit_never_exceed_it() {
        const MIB: u64 = 1 << 20;
        let folder = tempfile::tempdir().unwrap();
        for (processes, batch) in [(4, 16 * MIB), (8, 16 * MIB), (4, 100 * MIB), (3, 500 * MIB)] {
            let taken = AtomicU64::new(0);
            let most = 900 * MIB;
            let failed = AtomicU64::new(0);
            std::thread::scope(|scope| {
                for _ in 0..processes {
                    scope.spawn(|| {
                        let permits: &'static Permits = Box::leak(Box::new(Permits::new()));
                        let look = || Some(seen(most.saturating_sub(taken.load(Ordering::SeqCst)), folder.path()));
                        for _ in 0..600 * MIB / batch {
                            let Ok(_granted) = permits.grant(batch, || (), look, NOW) else {
                                failed.fetch_add(1, Ordering::SeqCst);
                                return;
                            };
                            thread::sleep(Duration::from_millis(2));
                            let sum = taken.fetch_add(batch, Ordering::SeqCst) + batch;
                            assert!(sum <= most, "{sum} bytes of {most} were taken by {processes} processes");
                        }
                    });
                }
            });
            assert!(failed.load(Ordering::SeqCst) > 0, "the limit was never reached");
        }
    }

    /// Each of three processes holds its turn for 1.2 s, so the others wait for longer than
    /// [`TURN_PATIENCE`]. They keep waiting because memory is being allocated.
    #[test]
    fn long_turn_is_awaited_while_memory_is_being_allocated() {
        const MIB: u64 = 1 << 20;
        let folder = tempfile::tempdir().unwrap();
        let taken = AtomicU64::new(0);
        let without = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let permits: &'static Permits = Box::leak(Box::new(Permits::new()));
                    let look = || Some(seen((200 * MIB).saturating_sub(taken.load(Ordering::SeqCst)), folder.path()));
                    let granted = permits.grant(24 * MIB, || (), look, NOW).unwrap();
                    without.fetch_add(u64::from(granted._turn.is_none()), Ordering::SeqCst);
                    for _ in 0..12 {
                        thread::sleep(TURN_PATIENCE / 10);
                        taken.fetch_add(2 * MIB, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(without.load(Ordering::SeqCst), 0, "some processes allocated without a turn");
    }

    #[test]
    fn turn_that_never_ends_is_awaited_only_once() {
        let folder = tempfile::tempdir().unwrap();
        let kept = ProcessTurn::wait(folder.path(), || None).unwrap();
        let permits: &'static Permits = Box::leak(Box::new(Permits::new()));
        let look = || Some(seen(100, folder.path()));
        let start = Instant::now();
        for _ in 0..50 {
            let _granted = permits.grant(50, || (), look, NOW).unwrap();
        }
        assert!(start.elapsed() < TURN_PATIENCE + WITHOUT_TURNS / 4, "{:?}", start.elapsed());
        drop(kept);
    }
}
