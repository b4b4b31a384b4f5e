//! The engine: what all loads of a loader share, and the threads that work for them.
//!
//! ```text
//!   workers (allocator threads)   open and plan ──► allocate and populate ──► check at the end
//!        │ jobs from the scheduler, permits from its window          ▲
//!        ▼                                                           │
//!   ring thread                   pieces in ──► reads ──► pieces full ┘ ──► teller ──► segments to the loads
//! ```
//!
//! Locks: a load's may be held when the schedule's is taken (memory that it drops gives its charge back), never the other way round.
//!
//! The caller's code (heaps, verifiers, observers, wakers, subscribers of `tracing`, and what drops these) runs
//! without any of our locks, on workers, on the observers' threads and on the teller, never on the ring thread.
//! A panic of it is caught where it is called (see [`crate::support::foreign`]).

mod allocate;
mod choice;
mod descriptors;
pub(crate) mod event;
mod filling;
mod jobs;
mod open;
pub(crate) mod schedule;
pub(crate) mod settings;
pub(crate) mod state;
mod teller;
mod workers;

use choice::Choices;
use jobs::{Jobs, Left, Noticed};
use teller::Message;
use workers::{MOST_SUBSTITUTES, WorkerId};

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use dmabuf::Memory;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::sync::oneshot;

use crate::engine::schedule::{Job, Need};
use crate::error::{Error, Result};
use crate::files::header::find_header;
use crate::files::source::Input;
use crate::files::source::OpenFile;
use crate::memory::backing::{Backing, PieceBuffer};
use crate::memory::charge::Ledger;
use crate::memory::heap::{self, Heap};
use crate::memory::pressure;
use crate::memory::reaper::Reaper;
use crate::options::load::LoadOptions;
use crate::ring::{Events, Output, RingThread};
use crate::support::foreign::{self, Foreign};
use crate::support::id::LoadId;
use crate::telemetry::metrics::{LoadCounters, Metrics};
use crate::telemetry::report::Measured;
use event::Event;
use settings::Settings;
use state::{Handover, HeapFacts, LoadShared, Remains};

/// See the module.
#[derive(Debug)]
pub(crate) struct Engine {
    /// Without the options of loads that choose none: what verifies or observes these is the caller's code, and an
    /// engine may be dropped by any thread.
    settings: Settings,
    facts: HeapFacts,
    /// When the ring thread's clock began.
    epoch: Instant,
    reaper: Reaper,
    ring: RingThread<PieceBuffer<Permit>>,
    mailbox: Arc<teller::Mailbox<Engine>>,
    /// Why there are no more loads, where a thread of ours has panicked.
    broken: OnceLock<Error>,
    jobs: Jobs<Arc<LoadShared>>,
    choices: Mutex<Choices>,
    threads: Arc<Threads>,
    leaked_bytes: AtomicU64,
    counters: Arc<LoadCounters>,
    /// Ends the watch over memory pressure, where there is one.
    unwatch: Option<OwnedFd>,
}

/// The threads that have not ended, but for the teller, which ends after them.
#[derive(Debug, Default)]
struct Threads {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Threads {
    fn count(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more.
    fn start(&self) {
        *self.count() += 1;
    }

    /// One has ended, or was not started: with the last one the teller tells what is left to tell, and ends.
    fn end(&self, mailbox: &teller::Mailbox<Engine>) {
        let left = {
            let mut count = self.count();
            *count = count.checked_sub(1).expect("each thread ends once");
            *count
        };
        self.changed.notify_all();
        if left == 0 {
            mailbox.close();
        }
    }

    /// Waits until all have ended, or the time is up; how many are left.
    fn wait(&self, timeout: Duration) -> usize {
        let waited = self.changed.wait_timeout_while(self.count(), timeout, |count| *count > 0);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
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
    heap: HeapCode,
    settings: Settings,
}

/// The heap, whose code may be the caller's. Held by workers and by what callers hold, so that no other thread drops it.
#[derive(Debug, Clone)]
pub(crate) struct HeapCode(Arc<Foreign<Arc<dyn Heap>>>);

/// The same for whoever must not drop it.
#[derive(Debug, Clone)]
struct WeakHeap(Weak<Foreign<Arc<dyn Heap>>>);

impl WeakHeap {
    /// `None` when the engine has ended.
    fn upgrade(&self) -> Option<HeapCode> {
        self.0.upgrade().map(HeapCode)
    }
}

impl HeapCode {
    fn downgrade(&self) -> WeakHeap {
        WeakHeap(Arc::downgrade(&self.0))
    }

    /// Calls it, without a lock.
    ///
    /// # Errors
    /// [`Error::Panicked`].
    pub(crate) fn call<T>(&self, name: &str, call: impl FnOnce(&dyn Heap) -> T) -> Result<T> {
        let code = || format!("heap {name}");
        foreign::call(|| call(&***self.0)).map_err(|message| Error::Panicked { code: code(), message })
    }
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
        let heap = HeapCode(Arc::new(Foreign::new(heap)));
        let name: Arc<str> = heap.call("of the loader", |heap| heap.name().into())?;
        let facts = heap.call(&name, |heap| HeapFacts {
            name: Arc::clone(&name),
            notes: notes.into(),
            exports: heap.exports(),
            allocates_at_once: heap.allocates_at_once(),
            uncached: heap.is_uncached(),
            pages: heap.pages(),
            own: heap::is_own(heap),
        })?;
        let all_settings = settings.clone();
        let settings = Settings { load: LoadOptions { verify: None, observer: None, ..settings.load }, ..settings };
        let choices = Mutex::new(Choices::new(facts.pages));
        let engine = Arc::new(Engine {
            facts,
            mailbox: Arc::default(),
            broken: OnceLock::new(),
            epoch: Instant::now(),
            reaper: Reaper::start().map_err(no_thread)?,
            ring: RingThread::new().map_err(|errno| Error::Start { operation: "no eventfd could be had", errno })?,
            choices,
            jobs: Jobs::new(
                settings.window_bytes,
                settings.memory_limit_bytes,
                descriptors::files(),
                settings.max_open_loads,
                settings.allocators(),
            ),
            threads: Arc::default(),
            leaked_bytes: AtomicU64::new(0),
            counters: Arc::default(),
            // The pool can do without it.
            unwatch: (settings.pool_bytes > 0).then(|| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()).flatten(),
            settings,
        });
        engine.reaper.set_pool_bytes(engine.settings.pool_bytes);
        // From here on whatever fails ends the threads that were started: the guard is dropped.
        let guard = Arc::new(Guard { engine: Arc::clone(&engine), heap: heap.clone(), settings: all_settings });
        let own = Arc::clone(&engine);
        thread::Builder::new().name("dmaload-tell".to_owned()).spawn(move || own.tell()).map_err(no_thread)?;
        engine
            .counted(|| engine.ring.start(engine.settings.ring_limits(), engine.epoch, Arc::clone(&engine)))
            .map_err(no_thread)?;
        if engine.unwatch.is_some() {
            engine.watch_pressure();
        }
        for _ in 0..engine.settings.allocators().threads() {
            engine.start_worker(engine.jobs.hire(), &heap).map_err(no_thread)?;
        }
        let own = Arc::clone(&engine);
        let builder = thread::Builder::new().name("dmaload-watch".to_owned());
        engine.counted(|| builder.spawn(move || own.watch(heap)).map(|_| ())).map_err(no_thread)?;
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
        &***self.heap.0
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Starts a load. `keep` tells whether all of it will be in memory at once.
    pub(crate) fn load(
        self: &Arc<Self>,
        asked: Vec<Input>,
        options: LoadOptions,
        keep: bool,
    ) -> (UnboundedReceiver<Event>, Arc<LoadShared>) {
        let engine = &self.engine;
        let (sender, receiver) = mpsc::unbounded_channel();
        let checked = engine.settings.check(&options);
        let id = engine.jobs.next_id();
        let shared = Arc::new(LoadShared::new(id, options, keep, asked, &engine.facts, Arc::clone(&engine.counters), sender));
        let submit = || engine.jobs.submit(id, Arc::clone(&shared));
        if let Err(error) = checked.and_then(|()| submit().then_some(()).ok_or_else(|| engine.end())) {
            // It holds nothing yet, and nothing else knows of it: its consumer is told here.
            let mut remains = vec![shared.fail(error)];
            assert_eq!(shared.deliver(&mut remains), Handover::Over, "a load that has failed is over");
        }
        (receiver, shared)
    }

    /// The consumer of a stream has taken a segment: its load may go on by as much memory.
    pub(crate) fn consumed(&self, load: LoadId, bytes: u64) {
        self.engine.jobs.account(|scheduler| scheduler.consumed(&load, bytes));
    }

    /// Nobody waits for this load any more.
    pub(crate) fn abandon(&self, load: Arc<LoadShared>) {
        load.dropped();
        self.engine.abandon(&load);
        // Its files and address ranges are closed and unmapped by a worker: the caller may be an async task.
        self.engine.bury(load.id, load.remains());
        self.engine.jobs.bury(Left::Files(load.id), load);
    }

    /// Ends all loads and all threads, leaking past the deadline; `done` hears of it.
    pub(crate) fn shut_down(self: &Arc<Self>, done: oneshot::Sender<Result<(), Leaked>>) {
        let engine = Arc::clone(&self.engine);
        engine.close();
        let body = move || {
            let left = engine.wait_for_threads();
            // Wakes the caller's task. A panic of its waker concerns nothing here.
            foreign::discard(foreign::call(|| done.send(left)));
        };
        if thread::Builder::new().name("dmaload-close".to_owned()).spawn(body).is_err() {
            // Without a thread to wait on, nobody would end what hangs; the receiver sees the sender dropped.
            self.engine.ring.give_up();
        }
    }
}

impl Engine {
    fn counted(&self, start: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.threads.start();
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
                    foreign::emit(|| tracing::info!(freed, "memory is short: the pool is freed"));
                });
            }
            own.thread_has_ended();
        };
        let started = self.counted(|| thread::Builder::new().name("dmaload-psi".to_owned()).spawn(body).map(|_| ()));
        if let Err(error) = started {
            foreign::emit(|| tracing::debug!(%error, "memory pressure is not watched for the pool: no thread"));
        }
    }

    fn start_worker(self: &Arc<Self>, worker: WorkerId, heap: &HeapCode) -> io::Result<()> {
        let (own, heap) = (Arc::clone(self), heap.clone());
        let builder = thread::Builder::new().name(format!("dmaload-alloc-{}", worker.number()));
        let started = self.counted(|| builder.spawn(move || own.work(worker, heap)).map(|_| ()));
        if started.is_err() {
            self.jobs.dismiss(worker);
        }
        started
    }

    /// The thread that starts workers in place of those that wait for a server which does not
    /// answer.
    fn watch(self: Arc<Self>, heap: HeapCode) {
        let mut refused = false;
        while let Some(Noticed { stalled, substitutes, is_exhausted }) = self.jobs.watch() {
            let mut error = None;
            for worker in substitutes {
                error = self.start_worker(worker, &heap).err().or(error);
            }
            if !stalled.is_empty() {
                let loads = stalled.into_iter().map(|task| task.load).collect();
                self.mailbox.push([Message::Stalled { loads, is_exhausted }]);
            }
            // Tried again each time, and told once.
            if let Some(error) = error.filter(|_| !refused) {
                refused = true;
                self.mailbox.push([Message::NoSubstitute { error }]);
            }
        }
        drop(heap);
        self.thread_has_ended();
    }

    fn choices(&self) -> MutexGuard<'_, Choices> {
        self.choices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn thread_has_ended(&self) {
        self.threads.end(&self.mailbox);
    }

    /// Why there are no more loads.
    fn end(&self) -> Error {
        self.broken.get().cloned().unwrap_or(Error::ShutDown)
    }

    /// No new loads; those that run fail; the threads end when the last read has come back.
    fn close(&self) {
        let loads = self.jobs.refuse();
        for load in &loads {
            self.bury(load.id, [load.fail(self.end())]);
        }
        // If the scheduler is what has panicked, it may do so again. The loads have failed, and the rest is done all the same.
        let _ = foreign::call(|| loads.iter().for_each(|load| self.abandon(load)));
        self.mailbox.push(loads.iter().cloned().map(Message::Deliver));
        for load in loads {
            self.jobs.bury(Left::Files(load.id), load);
        }
        self.jobs.close();
        self.ring.close();
        if let Some(unwatch) = &self.unwatch {
            let _ = rustix::io::write(unwatch, &1_u64.to_ne_bytes());
        }
        // No load comes any more that could use it.
        self.reaper.set_pool_bytes(0);
    }

    fn wait_for_threads(&self) -> Result<(), Leaked> {
        let mut threads = self.threads.wait(self.settings.shutdown_timeout);
        if threads > 0 {
            self.ring.give_up();
            // The ring thread needs a moment to leave; a worker that hangs in the kernel is left alone.
            threads = self.threads.wait(Duration::from_secs(1));
        }
        let mut held_bytes = 0;
        if threads > 0 && self.jobs.finish() {
            // The ring thread hangs and keeps its pieces. The workers need not wait for it.
            held_bytes = self.jobs.window_taken_bytes();
            threads = self.threads.wait(Duration::from_millis(100));
        }
        self.mailbox.close();
        // It may be in a waker, which is the caller's code.
        threads += usize::from(!self.mailbox.wait_until_ended(Duration::from_secs(1)));
        match (self.leaked_bytes.load(Ordering::Acquire) + held_bytes, threads) {
            (0, 0) => Ok(()),
            (bytes, threads) => Err(Leaked { bytes, threads }),
        }
    }

    /// A worker drops what a load has left.
    fn bury(&self, load: LoadId, remains: impl IntoIterator<Item = Remains>) {
        for (memory, files) in remains.into_iter().map(Remains::parts) {
            self.jobs.bury(Left::Memory(load), memory);
            self.jobs.bury(Left::Files(load), files);
        }
    }

    fn abandon(&self, load: &LoadShared) {
        load.abandoned.store(true, Ordering::Release);
        self.forget(load.id);
        self.ring.wake();
    }

    /// Nothing more is to be scheduled for this load. A worker drops it: its files and addresses, and what observes it.
    fn forget(&self, id: LoadId) {
        if let Some(load) = self.jobs.forget(id) {
            self.jobs.bury(Left::Files(id), load);
        }
    }

    /// Fails a load for good: its reads in flight are drained by the ring thread.
    fn fail(&self, load: &Arc<LoadShared>, error: Error) {
        self.bury(load.id, [load.fail(error)]);
        self.abandon(load);
        self.tell_of(load);
    }

    /// Something has become complete, or failed: the teller sees what follows for the load's consumer.
    fn tell_of(&self, load: &Arc<LoadShared>) {
        self.mailbox.push([Message::Deliver(Arc::clone(load))]);
    }

    /// A worker thread.
    fn work(self: Arc<Self>, worker: WorkerId, heap: HeapCode) {
        while let Some((job, load)) = self.jobs.next(worker) {
            if let Some(another) = self.jobs.hire_more()
                && let Err(error) = self.start_worker(another, &heap)
            {
                // The watch tries again.
                foreign::emit(|| tracing::debug!(%error, "no thread for one more worker"));
            }
            // Files that the caller gave open stay so until the job is done, also where the load ends meanwhile.
            let open = load.asked();
            let is_open = matches!(job, Job::Open(_));
            let done = foreign::call(|| match job {
                Job::Open(_) => self.open(&load, &heap),
                Job::Allocate(_, batch, need) => {
                    let advance = Advance { engine: Arc::clone(&self), load: load.id, bytes: need.held_bytes };
                    let need = Need { held_bytes: 0, ..need };
                    let permit = Permit { engine: Arc::clone(&self), load: load.id, need };
                    self.allocate(&load, &heap, worker, batch, permit, advance);
                }
                Job::MakeRoom(_, bytes) => {
                    self.reaper.trim_pool(self.reaper.pooled_bytes().saturating_sub(bytes));
                }
                Job::Check(_, file) => self.check(&load, file),
                Job::Finish(_, memory) => self.finish(&load, &heap, memory),
            });
            if let Err(message) = done {
                // Not a heap and not a verifier: these are caught where they are called. Whatever the job held was
                // released by unwinding.
                self.fail(&load, defect("a worker thread", message));
                if is_open {
                    // Before it was announced to the ring, which would have ended it: its place is free.
                    self.jobs.end();
                }
            }
            // These may be the last references to files.
            self.jobs.proceed(worker);
            foreign::discard(open);
            foreign::discard(load);
        }
        drop(heap);
        self.thread_has_ended();
    }

    /// The teller thread; see [`teller`].
    fn tell(self: Arc<Self>) {
        let mut broke = false;
        while let Some(messages) = self.mailbox.next() {
            for message in messages {
                let ring_ended = matches!(message, Message::RingEnded { .. });
                let Err(message) = foreign::call(|| self.handle(message)) else { continue };
                // A broken invariant: no load may wait for a thread that no longer knows what it does. It goes on, to tell
                // them their end. Once, since what has panicked may panic again at each load's end.
                if !std::mem::replace(&mut broke, true) {
                    let error = defect("the teller thread", message);
                    foreign::emit(|| tracing::error!(%error, "all loads fail"));
                    // Not if the ring thread has panicked before: the first reason counts.
                    let _ = self.broken.set(error);
                    let _ = foreign::call(|| self.close());
                }
                if ring_ended {
                    self.jobs.finish();
                }
            }
        }
        // Workers have ended, all or all that can.
        self.jobs.drop_buried();
        self.mailbox.end();
    }

    fn handle(&self, message: Message<Engine>) {
        match message {
            Message::Ring(output) => self.handle_output(output),
            Message::Deliver(load) => {
                self.deliver(&load);
                self.let_go(load);
            }
            Message::RingBroke { errno, leaked_bytes } => foreign::emit(|| {
                let errno = dmabuf::errno::describe(errno);
                tracing::error!(errno, leaked_bytes, "io_uring broke down: memory that reads may still write to is leaked");
            }),
            Message::Stalled { loads, is_exhausted } => foreign::emit(|| {
                for load in loads {
                    tracing::warn!(load = load.0, "a file keeps a worker waiting: its load waits, and another worker takes over");
                }
                if is_exhausted {
                    tracing::error!("{MOST_SUBSTITUTES} workers have been replaced, and wait for files: no load goes on");
                }
            }),
            Message::NoSubstitute { error } => {
                foreign::emit(|| tracing::warn!(%error, "no thread in place of a worker that waits for a file: fewer work"));
            }
            Message::RingEnded { engine, panic } => {
                if let Some(message) = panic {
                    let error = defect("the ring thread", message);
                    foreign::emit(|| tracing::error!(%error, "all loads fail"));
                    // Not if this thread has panicked before: the first reason counts.
                    let _ = self.broken.set(error);
                }
                // Reached with loads only after a panic or past a deadline: they must not wait for ever.
                self.close();
                // What was left to workers until now, they drop before they end.
                self.jobs.finish();
                // Not the last share of it: this thread has one.
                drop(engine);
            }
            #[cfg(test)]
            Message::Panic => panic!("a test wants it"),
        }
    }

    fn handle_output(&self, output: Output<()>) {
        let id = output.load();
        let is_gone = matches!(output, Output::Gone { .. });
        // A load that has failed or was dropped is forgotten while the driver drains its reads.
        if let Some(load) = self.jobs.load_of(id) {
            if let Err(message) = foreign::call(|| self.note(&load, output)) {
                self.fail(&load, defect("the teller thread", message));
            }
            self.deliver(&load);
            self.let_go(load);
        } else {
            // What observed it comes along, and its drop is the caller's code.
            foreign::discard(output);
        }
        if is_gone {
            self.jobs.end();
        }
    }

    /// Notes what the ring thread has done for a load.
    fn note(&self, load: &LoadShared, output: Output<()>) {
        match output {
            Output::PieceFull { load: id, piece, route, buffer: () } => {
                if let Some((mount, measured)) = load.measure(piece) {
                    self.choices().learned(id, mount, &measured);
                    foreign::emit(|| {
                        let Measured { direct_bytes_per_second, staged_bytes_per_second, buffered_bytes_per_second, chosen } =
                            measured;
                        tracing::info!(
                            load = id.0,
                            direct_bytes_per_second,
                            staged_bytes_per_second,
                            buffered_bytes_per_second,
                            %chosen,
                            "measured"
                        );
                    });
                }
                self.jobs.follow(id, load.piece_full(piece, route));
            }
            Output::SteppedDown { fallback, .. } => load.stepped_down(fallback),
            Output::LessStaging { bytes, errno, .. } => load.less_staging(bytes, errno),
            Output::NoThread { .. } => load.no_thread(),
            Output::Retried { retried, .. } => load.retried(&retried),
            Output::Traced { piece, span, .. } => load.traced(piece, span, self.epoch),
            Output::Failed { load: id, failure } => {
                self.bury(id, [load.fail_for(failure)]);
                self.forget(id);
            }
            Output::Gone { times, .. } => load.gone(times),
        }
    }

    /// Hands over what a load has; by the teller alone, which keeps the order.
    fn deliver(&self, load: &Arc<LoadShared>) {
        let mut remains = Vec::new();
        let delivered = foreign::call(|| load.deliver(&mut remains));
        let over = match delivered {
            Ok(handover) => handover == Handover::Over,
            Err(message) => {
                self.fail(load, defect("the teller thread", message));
                false
            }
        };
        if !remains.is_empty() {
            self.bury(load.id, remains);
            self.abandon(load);
        }
        if over {
            self.forget(load.id);
            // What it does not need any more goes, however long its consumer keeps it.
            self.bury(load.id, load.remains());
        }
    }

    /// The last one to hold a load leaves it to a worker.
    fn let_go(&self, load: Arc<LoadShared>) {
        if let Some(load) = Arc::into_inner(load) {
            self.jobs.bury(Left::Files(load.id), load);
        }
    }

    /// The file was read: it must be what it was, or its last segment is withheld.
    fn check(&self, load: &Arc<LoadShared>, file: usize) {
        // The load is over.
        let Some((open, identity)) = load.take_file(file) else { return };
        // Of a large one the header was read when it was planned.
        let checked = load.whole_file(file).map_or(Ok(None), |bytes| {
            let tensors = find_header(&open, bytes.as_ref(), load.options.format)?;
            let source = load.sources().get(file).expect("a planned file is checked");
            source.check(tensors.as_ref())?;
            Ok(tensors)
        });
        let checked = checked.map_err(|error| open.blame_change(&identity, error));
        let checked = checked.and_then(|tensors| open.check_unchanged(&identity).map(|()| tensors));
        let checked = checked.and_then(|tensors| open.check_end(&identity).map(|()| tensors));
        match checked {
            Ok(tensors) => {
                drop(open);
                match load.file_checked(file, tensors.map(Arc::new)) {
                    Ok(()) => self.tell_of(load),
                    Err(error) => self.fail(load, error),
                }
            }
            Err(error) => self.fail(load, error),
        }
    }
}

/// A panic of a thread of ours, in code that is not known to be the caller's.
fn defect(thread: &str, message: String) -> Error {
    Error::Panicked { code: format!("{thread} of dmaload (a defect of dmaload, or of a subscriber of tracing)"), message }
}

impl Engine {
    /// Moves what is to be elsewhere in a full memory, and makes a dma-buf of it.
    #[allow(unsafe_code)]
    fn finish(&self, load: &Arc<LoadShared>, heap: &HeapCode, number: usize) {
        // The load is over.
        let Some((backing, moves)) = load.full_memory(number) else { return };
        let start = Instant::now();
        for slot in &moves {
            // SAFETY: all pieces of the memory have come back from the driver, so it is filled and nobody writes to it; its segments
            // are not made before `memory_finished`, so nobody reads it.
            unsafe { backing.move_down(slot) };
        }
        let export = |memory: &Memory| {
            let exported = heap.call(load.heap(), |heap| heap.export(memory)).map_err(Refused::Load)?;
            exported.map_err(Refused::Kernel)
        };
        match if self.facts.exports { backing.export(export) } else { Ok(()) } {
            Ok(()) => {
                drop(backing);
                load.memory_finished(number, start);
                self.tell_of(load);
            }
            Err(Refused::Kernel(refusal)) => self.fail(load, load.memory_error(refusal)),
            Err(Refused::Load(error)) => self.fail(load, error),
        }
    }
}

/// Why memory is not exported.
enum Refused {
    Kernel(dmabuf::Error),
    Load(Error),
}

impl From<dmabuf::Error> for Refused {
    fn from(refusal: dmabuf::Error) -> Self {
        Refused::Kernel(refusal)
    }
}

impl Events<PieceBuffer<Permit>> for Engine {
    fn happened(&self, outputs: Vec<Output<PieceBuffer<Permit>>>) {
        // The permits go back first: the allocator may go on while the rest is done by the teller.
        let messages: Vec<_> = outputs.into_iter().map(|output| Message::Ring(output.map_buffer(drop))).collect();
        self.mailbox.push(messages);
    }

    fn released(&self, files: Vec<(LoadId, Arc<OpenFile>)>) {
        for (load, file) in files {
            // Whoever holds another reference closes the file.
            if let Some(file) = Arc::into_inner(file) {
                self.jobs.bury(Left::Files(load), file);
            }
        }
    }

    fn broke_down(&self, errno: Errno, leaked_bytes: u64) {
        self.mailbox.push([Message::RingBroke { errno, leaked_bytes }]);
    }

    fn ended(self: Arc<Self>, leaked_bytes: u64, panic: Option<String>) {
        self.leaked_bytes.fetch_add(leaked_bytes, Ordering::AcqRel);
        let (threads, mailbox) = (Arc::clone(&self.threads), Arc::clone(&self.mailbox));
        mailbox.push([Message::RingEnded { engine: self, panic }]);
        threads.end(&mailbox);
    }
}

#[cfg(test)]
mod tests;
