//! The engine: what all loads of a loader share, and the threads that work for them.
//!
//! ```text
//!   workers (allocator threads)   open and plan ──► allocate and populate ──► check at the end
//!        │ jobs from the scheduler, permits from its window          ▲
//!        ▼                                                           │
//!   ring thread                   pieces in ──► reads ──► pieces full ┘ ──► segments to the loads
//! ```
//!
//! Locks: a load's may be held when the schedule's is taken (memory that it drops gives its charge back), never the other way round.

mod allocate;
mod allowance;
mod expand;
mod jobs;
mod open;

pub(crate) use expand::files as model_files;
use jobs::Jobs;
use open::find_header;
pub(crate) use open::read_header;

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use tokio::sync::{mpsc, oneshot};

use crate::charge::Ledger;
use crate::error::{Error, Result};
use crate::heap::Heap;
use crate::load::{HeapFacts, LoadShared, Segments};
use crate::memory::{Backing, PieceBuffer};
use crate::metrics::{LoadCounters, Metrics};
use crate::plan::BATCH_FILES;
use crate::pressure;
use crate::reaper::Reaper;
use crate::ring::{Events, Failure, LoadId, Retried, RingThread, Span, Times};
use crate::route::{Fallback, Route};
use crate::schedule::{Job, Need};
use crate::settings::{LoadOptions, Settings};
use crate::source::Input;
use crate::source::OpenFile;

/// See the module.
#[derive(Debug)]
pub(crate) struct Engine {
    settings: Settings,
    heap: Arc<dyn Heap>,
    facts: HeapFacts,
    /// When the ring thread's clock began.
    epoch: Instant,
    reaper: Reaper,
    ring: RingThread<PieceBuffer<Permit>>,
    jobs: Jobs<Arc<LoadShared>>,
    threads: Mutex<usize>,
    thread_ended: Condvar,
    leaked_bytes: AtomicU64,
    counters: Arc<LoadCounters>,
    /// Ends the watch over memory pressure, where there is one.
    unwatch: Option<OwnedFd>,
}

/// A permit of the window: gives what it is for back when it is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    engine: Arc<Engine>,
    load: LoadId,
    need: Need,
}

impl Permit {
    /// Takes the part of a permit that is for one piece of a batch.
    ///
    /// # Panics
    /// When that is more than there is.
    fn split(&mut self, part: Need) -> Permit {
        let left = |all: u64, part: u64| all.checked_sub(part).expect("a batch has a permit for each of its pieces");
        let (bytes, files) = (left(self.need.bytes, part.bytes), left(self.need.files, part.files));
        self.need = Need { bytes, files, held_bytes: 0 };
        Permit { engine: Arc::clone(&self.engine), load: self.load, need: part }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.need == Need::default() {
            return;
        }
        self.engine.jobs.give_back(self.load, self.need);
    }
}

/// Memory that was taken of the budget for a batch: given back when it is dropped, unless the memory has it.
#[derive(Debug)]
struct Advance {
    engine: Arc<Engine>,
    load: LoadId,
    bytes: u64,
}

impl Advance {
    /// From now on the memory gives it back, when it is freed.
    fn charge(mut self, backing: &Backing) {
        let bytes = std::mem::take(&mut self.bytes);
        let engine = Arc::downgrade(&self.engine);
        let ledger: Weak<dyn Ledger> = engine;
        backing.charge(&ledger, self.load, bytes);
    }
}

impl Drop for Advance {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.engine.freed(self.load, self.bytes, 0);
        }
    }
}

impl Ledger for Engine {
    fn freed(&self, load: LoadId, held: u64, pooled: u64) {
        self.jobs.account(|scheduler| scheduler.freed(&load, held, pooled));
    }

    fn pooled(&self, load: LoadId, bytes: u64) {
        self.jobs.account(|scheduler| scheduler.pooled(&load, bytes));
    }

    fn unpooled(&self, bytes: u64) {
        self.jobs.account(|scheduler| scheduler.unpooled(bytes));
    }
}

/// What a shutdown had to leave behind, past its deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes that reads in flight may still write to were leaked on purpose; {threads} threads have not ended")]
#[non_exhaustive]
pub struct Leaked {
    /// How much memory that is.
    pub bytes: u64,
    /// Threads that hang, in the kernel or in a heap's code, and end when that lets go of them.
    pub threads: usize,
}

impl Leaked {
    /// No thread could be had to wait for the others.
    pub(crate) const UNKNOWN: Leaked = Leaked { bytes: 0, threads: 1 };
}

/// Keeps an engine running: held by loaders and loads. With the last one the threads end by themselves.
#[derive(Debug)]
pub(crate) struct Guard {
    engine: Arc<Engine>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.engine.close();
    }
}

impl Guard {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`Error::Config`]; [`Error::Start`] when no thread or descriptor can be had.
    pub(crate) fn start(settings: Settings, heap: Arc<dyn Heap>, notes: Vec<String>) -> Result<Arc<Self>> {
        settings.check(&settings.load)?;
        let no_thread = |error: io::Error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
            Error::Start { operation: "no thread could be had", errno }
        };
        let facts = HeapFacts {
            name: heap.name().into(),
            notes: notes.into(),
            exports: heap.exports(),
            allocates_at_once: heap.allocates_at_once(),
            uncached: heap.is_uncached(),
        };
        let engine = Arc::new(Engine {
            heap,
            facts,
            epoch: Instant::now(),
            reaper: Reaper::start().map_err(no_thread)?,
            ring: RingThread::new().map_err(|errno| Error::Start { operation: "no eventfd could be had", errno })?,
            jobs: Jobs::new(settings.window_bytes, settings.memory_limit_bytes, open_files(), settings.max_open_loads),
            threads: Mutex::new(0),
            thread_ended: Condvar::new(),
            leaked_bytes: AtomicU64::new(0),
            counters: Arc::default(),
            // The pool can do without it.
            unwatch: (settings.pool_bytes > 0).then(|| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()).flatten(),
            settings,
        });
        engine.reaper.set_pool_bytes(engine.settings.pool_bytes);
        // From here on whatever fails ends the threads that were started: the guard is dropped.
        let guard = Arc::new(Guard { engine: Arc::clone(&engine) });
        engine
            .counted(|| {
                let Settings { queue_depth, .. } = engine.settings;
                engine.ring.start(queue_depth, engine.settings.staging(), engine.epoch, Arc::clone(&engine))
            })
            .map_err(no_thread)?;
        if engine.unwatch.is_some() {
            engine.watch_pressure();
        }
        for number in 0..engine.settings.allocator_threads.max(1) {
            let own = Arc::clone(&engine);
            let builder = thread::Builder::new().name(format!("dmaload-alloc-{number}"));
            engine.counted(|| builder.spawn(move || own.work()).map(|_| ())).map_err(no_thread)?;
        }
        Ok(guard)
    }

    pub(crate) fn trim_pool(&self, keep_bytes: u64) -> u64 {
        self.engine.reaper.trim_pool(keep_bytes)
    }

    pub(crate) fn metrics(&self) -> Metrics {
        let engine = &self.engine;
        Metrics {
            queue_depth: engine.settings.queue_depth as u64,
            memory_bytes: self.memory_bytes(),
            pooled_bytes: self.pooled_bytes(),
            ..engine.counters.seen(engine.ring.counters())
        }
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.engine.jobs.memory_bytes()
    }

    pub(crate) fn pooled_bytes(&self) -> u64 {
        self.engine.reaper.pooled_bytes()
    }

    pub(crate) fn heap(&self) -> &dyn Heap {
        &*self.engine.heap
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.engine.settings
    }

    /// Starts a load. `keep` tells whether all of it will be in memory at once.
    pub(crate) fn load(self: &Arc<Self>, asked: Vec<Input>, options: LoadOptions, keep: bool) -> Segments {
        let engine = &self.engine;
        let (sender, receiver) = mpsc::unbounded_channel();
        let checked = engine.settings.check(&options);
        let id = engine.jobs.next_id();
        let shared = Arc::new(LoadShared::new(id, options, keep, asked, &engine.facts, Arc::clone(&engine.counters), sender));
        let submit = || engine.jobs.submit(id, Arc::clone(&shared));
        if let Err(error) = checked.and_then(|()| submit().then_some(()).ok_or(Error::ShutDown)) {
            drop(shared.fail(error));
        }
        Segments::new(receiver, shared, Arc::clone(self))
    }

    /// Nobody waits for this load any more.
    pub(crate) fn abandon(&self, load: Arc<LoadShared>) {
        load.dropped();
        self.engine.abandon(&load);
        // Its files and address ranges are closed and unmapped by a worker: the caller may be an async task.
        self.engine.jobs.bury(load);
    }

    /// Ends all loads and all threads, leaking past the deadline; `done` hears of it.
    pub(crate) fn shut_down(self: &Arc<Self>, done: oneshot::Sender<Result<(), Leaked>>) {
        let engine = Arc::clone(&self.engine);
        engine.close();
        let body = move || {
            let _ = done.send(engine.wait_for_threads());
        };
        if thread::Builder::new().name("dmaload-close".to_owned()).spawn(body).is_err() {
            // Without a thread to wait on, nobody would end what hangs; the receiver sees the sender dropped.
            self.engine.ring.give_up();
        }
    }
}

/// How many small files may be open at once: each takes two descriptors, and what else the process has open needs some, too.
fn open_files() -> u64 {
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    (descriptors / 4).clamp(BATCH_FILES as u64, 4 * BATCH_FILES as u64)
}

impl Engine {
    fn counted(&self, start: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        *self.threads.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let started = start();
        if started.is_err() {
            self.thread_has_ended();
        }
        started
    }

    /// Has the pool freed when memory is short, where the kernel tells.
    fn watch_pressure(self: &Arc<Self>) {
        let Some(pressure) = pressure::open() else { return };
        let own = Arc::clone(self);
        let body = move || {
            if let Some(stop) = &own.unwatch {
                pressure::watch(&pressure, stop, || {
                    let freed = own.reaper.trim_pool(0);
                    tracing::info!(freed, "memory is short: the pool is freed");
                });
            }
            own.thread_has_ended();
        };
        let started = self.counted(|| thread::Builder::new().name("dmaload-psi".to_owned()).spawn(body).map(|_| ()));
        if let Err(error) = started {
            tracing::debug!(%error, "nobody watches memory pressure for the pool");
        }
    }

    fn thread_has_ended(&self) {
        *self.threads.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.thread_ended.notify_all();
    }

    /// No new loads; those that run fail; the threads end when the last read has come back.
    fn close(&self) {
        let loads = self.jobs.refuse();
        let remains: Vec<_> = loads.iter().map(|load| load.fail(Error::ShutDown)).collect();
        loads.iter().for_each(|load| self.abandon(load));
        self.jobs.close((loads, remains));
        self.ring.close();
        if let Some(unwatch) = &self.unwatch {
            let _ = rustix::io::write(unwatch, &1_u64.to_ne_bytes());
        }
        // No load comes any more that could use it.
        self.reaper.set_pool_bytes(0);
    }

    fn wait_for_threads(&self) -> Result<(), Leaked> {
        let mut threads = self.wait_for(self.settings.shutdown_timeout);
        if threads > 0 {
            self.ring.give_up();
            // The ring thread needs a moment to leave; a worker that hangs in the kernel is left alone.
            threads = self.wait_for(Duration::from_secs(1));
        }
        let mut held_bytes = 0;
        if threads > 0 && self.jobs.finish() {
            // The ring thread hangs itself, and keeps all that it has. The workers need not wait for it.
            held_bytes = self.jobs.window_taken_bytes();
            threads = self.wait_for(Duration::from_millis(100));
        }
        match (self.leaked_bytes.load(Ordering::Acquire) + held_bytes, threads) {
            (0, 0) => Ok(()),
            (bytes, threads) => Err(Leaked { bytes, threads }),
        }
    }

    /// Waits until all threads have ended, or the time is up; how many are left.
    fn wait_for(&self, timeout: Duration) -> usize {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        *self.thread_ended.wait_timeout_while(threads, timeout, |threads| *threads > 0).unwrap_or_else(PoisonError::into_inner).0
    }

    fn abandon(&self, load: &LoadShared) {
        load.abandoned.store(true, Ordering::Release);
        self.jobs.forget(load.id);
        self.ring.wake();
    }

    /// Fails a load for good: its reads in flight are drained by the ring thread.
    fn fail(&self, load: &LoadShared, error: Error) {
        self.jobs.bury(load.fail(error));
        self.abandon(load);
    }

    /// A worker thread.
    fn work(self: &Arc<Self>) {
        while let Some((job, load)) = self.jobs.next() {
            let is_open = matches!(job, Job::Open(_));
            let done = catch_unwind(AssertUnwindSafe(|| match job {
                Job::Open(_) => self.open(&load),
                Job::Allocate(_, batch, need) => {
                    let advance = Advance { engine: Arc::clone(self), load: load.id, bytes: need.held_bytes };
                    let need = Need { held_bytes: 0, ..need };
                    self.allocate(&load, batch, Permit { engine: Arc::clone(self), load: load.id, need }, advance);
                }
                Job::MakeRoom(_, bytes) => {
                    self.reaper.trim_pool(self.reaper.pooled_bytes().saturating_sub(bytes));
                }
                Job::Check(_, file) => self.check(&load, file),
                Job::Finish(_, memory) => self.finish(&load, memory),
            }));
            if done.is_err() {
                // Only the heap's code is not ours. Whatever the job held was released by unwinding.
                self.fail(&load, Error::HeapPanicked { heap: load.heap().to_owned() });
                if is_open {
                    // Before it was announced to the ring, which would have ended it: its place is free.
                    self.jobs.end();
                }
            }
        }
        self.thread_has_ended();
    }

    /// The file was read: it must be what it was, or nobody gets its last segment.
    fn check(&self, load: &LoadShared, file: usize) {
        let Some((open, mut identity)) = load.take_file(file) else { return };
        // Of a large one the header was read when it was planned.
        let checked = load.whole_file(file).map_or(Ok(None), |bytes| {
            let tensors = find_header(&open, bytes.as_ref(), load.options.format)?;
            load.sources().get(file).map_or(Ok(()), |source| source.check(tensors.as_ref()))?;
            Ok(tensors)
        });
        let checked = checked.map_err(|error| open.blame_change(&identity, error));
        let checked = checked.and_then(|tensors| {
            identity.may_grow &= tensors.is_none();
            open.check_unchanged(&identity).map(|()| tensors)
        });
        match checked {
            Ok(tensors) => {
                drop(open);
                if load.file_checked(file, tensors.map(Arc::new)) == crate::load::Handover::Over {
                    self.jobs.forget(load.id);
                }
            }
            Err(error) => self.fail(load, error),
        }
    }
}

impl Engine {
    /// Moves what is to be elsewhere in a full memory, and makes a dma-buf of it.
    #[allow(unsafe_code)]
    fn finish(&self, load: &LoadShared, number: usize) {
        let Some((backing, moves)) = load.full_memory(number) else { return };
        let start = Instant::now();
        for slot in &moves {
            // SAFETY: all pieces of the memory have come back from the driver, so it is filled and nobody writes to it; its segments
            // are not made before `memory_finished`, so nobody reads it.
            unsafe { backing.move_down(slot) };
        }
        match if self.facts.exports { backing.export(&*self.heap) } else { Ok(()) } {
            Ok(()) => {
                drop(backing);
                if load.memory_finished(number, start) == crate::load::Handover::Over {
                    self.jobs.forget(load.id);
                }
            }
            Err(refusal) => self.fail(load, load.memory_error(refusal)),
        }
    }
}

impl Events<PieceBuffer<Permit>> for Engine {
    fn piece_full(&self, load: LoadId, piece: usize, route: Route, buffer: PieceBuffer<Permit>) {
        // The permit goes back first: the allocator may go on while the rest is done here.
        drop(buffer);
        let Some(shared) = self.jobs.load_of(load) else { return };
        let follows = shared.piece_full(piece, route);
        self.jobs.follow(load, follows);
    }

    fn stepped_down(&self, load: LoadId, fallback: Fallback) {
        if let Some(shared) = self.jobs.load_of(load) {
            shared.stepped_down(fallback);
        }
    }

    fn less_staging(&self, load: LoadId, bytes: u64, errno: Errno) {
        if let Some(shared) = self.jobs.load_of(load) {
            shared.less_staging(bytes, errno);
        }
    }

    fn no_thread(&self, load: LoadId) {
        if let Some(shared) = self.jobs.load_of(load) {
            shared.no_thread();
        }
    }

    fn retried(&self, load: LoadId, retried: Retried) {
        if let Some(shared) = self.jobs.load_of(load) {
            shared.retried(&retried);
        }
    }

    fn traced(&self, load: LoadId, piece: usize, span: Span) {
        if let Some(shared) = self.jobs.load_of(load) {
            shared.traced(piece, span, self.epoch);
        }
    }

    fn failed(&self, load: LoadId, failure: Failure) {
        if let Some(shared) = self.jobs.load_of(load) {
            self.jobs.bury(shared.fail_for(failure));
            self.jobs.forget(load);
        }
    }

    fn gone(&self, load: LoadId, times: Times) {
        if let Some(shared) = self.jobs.load_of(load)
            && shared.gone(times) == crate::load::Handover::Over
        {
            self.jobs.forget(load);
        }
        self.jobs.end();
    }

    fn released(&self, files: Vec<Arc<OpenFile>>) {
        // Those that somebody else still holds are closed by that one.
        let files: Vec<_> = files.into_iter().filter_map(Arc::into_inner).collect();
        if !files.is_empty() {
            self.jobs.bury(files);
        }
    }

    fn ended(&self, leaked_bytes: u64) {
        self.leaked_bytes.fetch_add(leaked_bytes, Ordering::AcqRel);
        // Reached with loads only after a panic or past a deadline: they must not wait for ever.
        self.close();
        self.jobs.finish();
        self.thread_has_ended();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_of_a_forgotten_load_costs_no_worker_and_no_permit() {
        let guard = Guard::start(Settings::default(), Arc::new(crate::heap::AnonHeap::default()), Vec::new()).unwrap();
        let gone = LoadId(u64::MAX);
        let window_bytes = guard.settings().window_bytes;
        for _ in 0..8 {
            // What a load leaves in the scheduler when it is forgotten between two of its steps.
            guard.engine.jobs.leave_behind(gone, Need { bytes: window_bytes, files: 1, held_bytes: 0 });
        }
        let empty = tempfile::NamedTempFile::new().unwrap();
        let mut events = guard.load(vec![Input::Path(empty.path().to_owned())], LoadOptions::default(), true);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        // A good load without segments.
        let next = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), events.next()).await });
        assert!(next.expect("the workers are still there").is_none());
        // The worker tells the consumer of the end before it tells the scheduler.
        let taken = || guard.engine.jobs.taken();
        let deadline = Instant::now() + Duration::from_secs(20);
        while taken() != (0, 0) {
            assert!(Instant::now() < deadline, "permits and places that never come back: {:?}", taken());
            thread::sleep(Duration::from_millis(1));
        }
    }
}
