//! The engine: the state that all loads of a loader share, and the threads that work for them.
//!
//! ```text
//!   workers (allocator threads)  open and plan ──► allocate and populate ──► check at the end
//!        │ jobs from the scheduler, permits from its window         ▲
//!        ▼                                                          │
//!   ring thread                  pieces in ──► reads ──► pieces full┘ ──► teller ──► segments
//! ```
//!
//! Lock order: a load's lock may be held while the schedule's is taken (dropped memory returns its
//! charge), but never the reverse.
//!
//! The caller's code (heaps, verifiers, observers, wakers, subscribers of `tracing`, and their
//! drops) runs while none of our locks is held, and never on the ring thread. Panics in it are
//! caught at the call (see [`crate::support::foreign`]).
//!
//! The engine decides which job is next, and runs it on one of its threads. It does no I/O itself:
//! [`crate::files`] opens files, [`crate::memory`] allocates, and [`crate::ring`] reads.
//!
//! It requires threads and one eventfd. The kernel may refuse io_uring, `O_DIRECT` or huge pages:
//! a load that does not require what was refused continues without it, and reports that.
//!
//! Shutdown: the engine closes when its [`Guard`] is dropped, on request, or after a panic of the
//! ring thread or of the teller. Running loads fail.
//! The ring thread drains its reads and ends, then the workers end. The teller ends last, after it
//! has informed the consumers. At the deadline, memory of reads still in flight is leaked, and
//! threads that hang are left behind ([`Leaked`]).

mod allocate;
mod allocation;
mod descriptors;
pub(crate) mod event;
mod filling;
mod guard;
mod heap_code;
mod jobs;
mod mailbox;
mod open;
pub(crate) mod outbox;
pub(crate) mod schedule;
pub(crate) mod settings;
pub(crate) mod state;
mod teller;
mod threads;
pub(crate) mod ways;
mod work;
mod workers;

pub(crate) use guard::Guard;
pub use threads::Leaked;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::engine::allocation::HeapFacts;
use jobs::{DropKey, Jobs};
use mailbox::{Mailbox, Message};
use schedule::Need;
use settings::Settings;
use state::{DeferredDrop, LoadShared};
use threads::Threads;
use ways::Choices;

use crate::error::Error;
use crate::memory::backing::{Backing, PieceBuffer};
use crate::memory::charge::Ledger;
use crate::memory::pressure;
use crate::memory::reaper::Reaper;
use crate::ring::RingThread;
use crate::support::foreign;
use crate::support::id::LoadId;
use crate::telemetry::metrics::LoadCounters;

/// The state that all loads of a loader share; see the module documentation.
#[derive(Debug)]
pub(crate) struct Engine {
    /// The settings without the default options' verifier and observer, which are the caller's
    /// code: any thread may drop the engine.
    settings: Settings,
    facts: HeapFacts,
    /// The origin of the ring thread's clock.
    epoch: Instant,
    reaper: Reaper,
    ring: RingThread<PieceBuffer<WindowPermit>>,
    mailbox: Arc<Mailbox<Engine>>,
    /// Why no more loads are accepted, if the ring thread or the teller has panicked.
    broken: OnceLock<Error>,
    jobs: Jobs<Arc<LoadShared>>,
    choices: Mutex<Choices>,
    threads: Arc<Threads>,
    leaked_bytes: AtomicU64,
    /// How many of the ring's threads were left behind.
    left_threads: AtomicUsize,
    counters: Arc<LoadCounters>,
    /// An eventfd that ends the thread that watches memory pressure; `None` without a pool, or if
    /// no eventfd could be created.
    stop_watch: Option<OwnedFd>,
}

/// A permit for bytes of the window and for open small files. Returned on drop.
#[derive(Debug)]
pub(crate) struct WindowPermit {
    engine: Arc<Engine>,
    load: LoadId,
    need: Need,
}

impl WindowPermit {
    /// Splits off a smaller permit, such as that for one piece of a batch.
    ///
    /// # Panics
    /// If `part` exceeds what this permit still holds.
    fn split(&mut self, part: Need) -> WindowPermit {
        let left = |all: u64, part: u64| all.checked_sub(part).expect("a batch has a permit for each of its pieces");
        let (bytes, files) = (left(self.need.bytes, part.bytes), left(self.need.files, part.files));
        self.need = Need { bytes, files, held_bytes: 0, ..self.need };
        let need = Need { file_system: self.need.file_system, ..part };
        WindowPermit { engine: Arc::clone(&self.engine), load: self.load, need }
    }
}

impl Drop for WindowPermit {
    fn drop(&mut self) {
        if (self.need.bytes, self.need.files) == (0, 0) {
            return;
        }
        self.engine.jobs.give_back(self.load, self.need);
    }
}

/// Bytes taken from the budget for a batch; returned on drop, unless they were charged to an
/// allocation.
#[derive(Debug)]
struct BudgetPermit {
    engine: Arc<Engine>,
    load: LoadId,
    bytes: u64,
}

impl BudgetPermit {
    /// Moves the charge to the allocation, which returns it when freed.
    fn charge(mut self, backing: &Backing) {
        let bytes = std::mem::take(&mut self.bytes);
        let engine = Arc::downgrade(&self.engine);
        let ledger: Weak<dyn Ledger> = engine;
        backing.charge(&ledger, self.load, bytes);
    }
}

impl Drop for BudgetPermit {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.engine.freed(self.load, self.bytes, 0);
        }
    }
}

impl Ledger for Engine {
    fn freed(&self, load: LoadId, held: u64, pooled: u64) {
        self.jobs.update_accounts(|scheduler| scheduler.freed(&load, held, pooled));
    }

    fn pooled(&self, load: LoadId, bytes: u64) {
        self.jobs.update_accounts(|scheduler| scheduler.pooled(&load, bytes));
    }

    fn unpooled(&self, bytes: u64) {
        self.jobs.update_accounts(|scheduler| scheduler.unpooled(bytes));
    }
}

impl Engine {
    fn start_counted(&self, start: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.threads.start();
        let started = start();
        if started.is_err() {
            self.thread_has_ended();
        }
        started
    }

    /// Starts a thread that empties the pool when memory is short, if the kernel reports memory
    /// pressure.
    fn watch_pressure(self: &Arc<Self>) {
        let Some(pressure) = pressure::open() else { return };
        let own = Arc::clone(self);
        let body = move || {
            if let Some(stop) = &own.stop_watch {
                pressure::watch(&pressure, stop, || {
                    let freed = own.reaper.trim_pool(0);
                    foreign::emit(|| tracing::info!(freed, "memory is short: emptied the pool"));
                });
            }
            own.thread_has_ended();
        };
        let started = self.start_counted(|| thread::Builder::new().name("dmaload-psi".to_owned()).spawn(body).map(|_| ()));
        if let Err(error) = started {
            foreign::emit(|| tracing::debug!(%error, "cannot start the thread that empties the pool when memory is short"));
        }
    }

    fn choices(&self) -> MutexGuard<'_, Choices> {
        self.choices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn thread_has_ended(&self) {
        self.threads.end(&self.mailbox);
    }

    /// Why no more loads are accepted.
    fn end_reason(&self) -> Error {
        self.broken.get().cloned().unwrap_or(Error::ShutDown)
    }

    /// Refuses new loads and fails the running ones; the threads end when the last read has
    /// completed.
    fn close(&self) {
        let loads = self.jobs.refuse_loads();
        for load in &loads {
            self.defer_drop(load.id, [load.fail(self.end_reason())]);
        }
        // If a panic in the scheduler led here, the scheduler may panic again. The loads have
        // already failed, and the remaining steps must still be done.
        let _ = foreign::call(|| loads.iter().for_each(|load| self.abandon(load)));
        self.mailbox.push(loads.iter().cloned().map(Message::Deliver));
        for load in loads {
            self.jobs.defer_drop(DropKey::Files(load.id), load);
        }
        self.jobs.close();
        self.ring.close();
        if let Some(stop_watch) = &self.stop_watch {
            let _ = rustix::io::write(stop_watch, &1_u64.to_ne_bytes());
        }
        // No later load could use the pool.
        self.reaper.set_pool_bytes(0);
    }

    fn wait_for_threads(&self) -> Result<(), Leaked> {
        let mut threads = self.threads.wait(self.settings.shutdown_timeout);
        if threads > 0 {
            self.ring.give_up();
            // The ring thread needs a moment to end. A worker that hangs in the kernel is left
            // behind.
            threads = self.threads.wait(Duration::from_secs(1));
        }
        let mut held_bytes = 0;
        if threads > 0 && self.jobs.finish() {
            // The ring thread hangs and keeps its pieces. The workers may end without it.
            held_bytes = self.jobs.window_taken_bytes();
            threads = self.threads.wait(Duration::from_millis(100));
        }
        self.mailbox.close();
        // The teller may be in a waker, which is the caller's code.
        threads += usize::from(!self.mailbox.wait_until_ended(Duration::from_secs(1)));
        self.report_left(held_bytes, threads)
    }

    /// Returns what a shutdown leaves behind, without waiting. Used if no thread could be started
    /// to wait.
    fn left_now(&self) -> Result<(), Leaked> {
        let threads = self.threads.wait(Duration::ZERO);
        // The ring thread may still hold pieces.
        let held_bytes = if self.jobs.is_finished() { 0 } else { self.jobs.window_taken_bytes() };
        self.report_left(held_bytes, threads + usize::from(!self.mailbox.wait_until_ended(Duration::ZERO)))
    }

    fn report_left(&self, held_bytes: u64, threads: usize) -> Result<(), Leaked> {
        let threads = threads + self.left_threads.load(Ordering::Acquire);
        match self.leaked_bytes.load(Ordering::Acquire) + held_bytes {
            0 if threads == 0 => Ok(()),
            bytes => Err(Leaked { bytes, threads }),
        }
    }

    /// Has a worker drop the remains of a load.
    fn defer_drop(&self, load: LoadId, remains: impl IntoIterator<Item = DeferredDrop>) {
        for (memory, files) in remains.into_iter().map(DeferredDrop::parts) {
            self.jobs.defer_drop(DropKey::Memory(load), memory);
            self.jobs.defer_drop(DropKey::Files(load), files);
        }
    }

    fn abandon(&self, load: &LoadShared) {
        load.abandoned.store(true, Ordering::Release);
        self.forget(load.id);
        self.ring.wake();
    }

    /// Stops scheduling this load. A worker drops it, with its files, addresses and observer.
    fn forget(&self, id: LoadId) {
        if let Some(load) = self.jobs.forget(id) {
            self.jobs.defer_drop(DropKey::Files(id), load);
        }
    }

    /// Fails a load; the ring thread drains its reads in flight.
    fn fail(&self, load: &Arc<LoadShared>, error: Error) {
        self.defer_drop(load.id, [load.fail(error)]);
        self.abandon(load);
        self.queue_delivery(load);
    }

    /// Has the teller deliver segments that have become complete, or the failure.
    fn queue_delivery(&self, load: &Arc<LoadShared>) {
        self.mailbox.push([Message::Deliver(Arc::clone(load))]);
    }
}

/// The error for a panic of one of our threads, in code that is not known to be the caller's.
fn bug_error(thread: &str, message: String) -> Error {
    Error::Panicked { code: format!("{thread} of dmaload (a bug in dmaload, or in a subscriber of tracing)"), message }
}

#[cfg(test)]
mod tests;
