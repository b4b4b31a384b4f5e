//! The engine: the state that all loads of a loader share, and the threads that do their work.
//!
//! ```text
//!   workers (allocator threads)  open and plan ──► allocate and populate ──► check at the end
//!        │ jobs from the scheduler, permits from its window         ▲
//!        ▼                                                          │
//!   ring thread                  pieces in ──► reads ──► pieces full┘ ──► teller ──► segments
//! ```
//!
//! Lock order: a thread that holds a load's lock may take the job queue's lock, as happens when
//! dropped memory returns its charge to the budget. The reverse is not allowed.
//!
//! The caller's code (heaps, verifiers, observers, wakers, subscribers of `tracing`, and their
//! drops) runs only while none of our locks is held, and never on the ring thread. Panics in it
//! are caught at the call (see [`crate::support::foreign`]).
//!
//! The engine decides which job to run next, and runs it on one of its threads. It does no I/O
//! itself: [`crate::files`] opens files, [`crate::memory`] allocates, and [`crate::ring`] reads.
//!
//! The engine cannot start without its threads and one eventfd. The kernel may refuse io_uring,
//! `O_DIRECT` or huge pages. A load that does not require what was refused continues without it,
//! and says so in its report.
//!
//! Shutdown: the engine closes when its [`Guard`] is dropped, on request, or after the ring thread
//! or the teller has panicked. Loads that are still running fail. The ring thread finishes its
//! reads and exits, and then the workers exit. The teller exits last, once it has informed the
//! consumers. When the deadline passes, the memory of reads that are still in flight is leaked,
//! and threads that hang are left behind ([`Leaked`]).

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
    /// The settings, without the verifier and the observer of the default load options. Those are
    /// the caller's code, which some of our threads must not drop, whereas any of them may drop
    /// the engine.
    settings: Settings,
    facts: HeapFacts,
    /// The origin of the ring thread's clock.
    epoch: Instant,
    reaper: Reaper,
    ring: RingThread<PieceBuffer<WindowPermit>>,
    mailbox: Arc<Mailbox<Engine>>,
    /// The error with which all loads fail after the ring thread or the teller has panicked.
    broken: OnceLock<Error>,
    jobs: Jobs<Arc<LoadShared>>,
    choices: Mutex<Choices>,
    threads: Arc<Threads>,
    leaked_bytes: AtomicU64,
    /// How many threads the ring thread left behind when it exited.
    left_threads: AtomicUsize,
    counters: Arc<LoadCounters>,
    /// An eventfd that tells the thread that watches memory pressure to exit. `None` if there is
    /// no pool, or if the eventfd could not be created.
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
        let left = |all: u64, part: u64| all.checked_sub(part).expect("a batch's permit should cover all of its pieces");
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

/// Bytes that were taken from the memory budget for a batch. They are returned on drop, unless
/// they have been charged to an allocation.
#[derive(Debug)]
struct BudgetPermit {
    engine: Arc<Engine>,
    load: LoadId,
    bytes: u64,
}

impl BudgetPermit {
    /// Charges the bytes to the allocation, which returns them to the budget when it is freed.
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

    /// If the kernel reports memory pressure, starts a thread that empties the pool whenever
    /// memory is short.
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

    /// Returns the error for loads that fail because the engine is closed.
    fn end_reason(&self) -> Error {
        self.broken.get().cloned().unwrap_or(Error::ShutDown)
    }

    /// Refuses new loads and fails the running ones. The threads exit when the last read has
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
        // Free the memory in the pool, because no later load can use it.
        self.reaper.set_pool_bytes(0);
    }

    fn wait_for_threads(&self) -> Result<(), Leaked> {
        let mut threads = self.threads.wait(self.settings.shutdown_timeout);
        if threads > 0 {
            self.ring.give_up();
            // Give the ring thread a moment to exit. A worker that hangs in the kernel is left
            // behind.
            threads = self.threads.wait(Duration::from_secs(1));
        }
        let mut held_bytes = 0;
        if threads > 0 && self.jobs.finish() {
            // The ring thread hangs and keeps its pieces. The workers may exit before it does.
            held_bytes = self.jobs.window_taken_bytes();
            threads = self.threads.wait(Duration::from_millis(100));
        }
        self.mailbox.close();
        // The teller may be stuck in a waker, which is the caller's code.
        threads += usize::from(!self.mailbox.wait_until_ended(Duration::from_secs(1)));
        self.report_left(held_bytes, threads)
    }

    /// Returns what a shutdown leaves behind, without waiting for threads to exit. Used if the
    /// thread that would wait could not be started.
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

    /// Queues what is left of a load, for a worker to drop.
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

    /// Stops scheduling this load. A worker drops it, together with its files, addresses and
    /// observer.
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

    /// Makes the teller deliver segments that have become complete, or the error if the load has
    /// failed.
    fn queue_delivery(&self, load: &Arc<LoadShared>) {
        self.mailbox.push([Message::Deliver(Arc::clone(load))]);
    }
}

/// Returns the error for a panic on one of our threads, other than a panic that was caught at a
/// call to the caller's code.
fn bug_error(thread: &str, message: String) -> Error {
    Error::Panicked { code: format!("{thread} of dmaload (a bug in dmaload, or in a tracing subscriber)"), message }
}

#[cfg(test)]
mod tests;
