//! The guard that keeps an engine running. It starts the engine's threads, starts and abandons
//! loads, and shuts the engine down.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::Instant;

use dmabuf::Errno;
use rustix::event::{EventfdFlags, eventfd};
use tokio::sync::oneshot;

use super::allocation::HeapFacts;
use super::heap_code::HeapCode;
use super::jobs::{DropKey, Jobs};
use super::outbox::{Announcer, Outbox};
use super::schedule::HeldUp;
use super::settings::Settings;
use super::state::{HandOverStatus, LoadShared};
use super::threads::Leaked;
use super::ways::Choices;
use super::{Engine, descriptors};
use crate::error::{Error, Result};
use crate::files::source::Input;
use crate::memory::heap::{self, Heap};
use crate::memory::reaper::Reaper;
use crate::options::load::LoadOptions;
use crate::ring::RingThread;
use crate::support::errno;
use crate::support::foreign;
use crate::support::id::LoadId;
use crate::telemetry::metrics::Metrics;

/// Keeps an engine running. Loaders and loads share one guard, and the engine's threads exit after
/// it is dropped.
#[derive(Debug)]
pub(crate) struct Guard {
    pub(super) engine: Arc<Engine>,
    heap: HeapCode,
    settings: Settings,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.engine.close();
    }
}

impl Guard {
    /// Creates an engine and starts its threads.
    ///
    /// # Errors
    /// [`Error::Config`] for invalid settings; [`Error::Start`] if a thread or a descriptor could
    /// not be created; [`Error::Panicked`] if the heap panicked.
    pub(crate) fn start(settings: Settings, heap: Arc<dyn Heap>, notes: Vec<String>) -> Result<Arc<Self>> {
        settings.check(&settings.load)?;
        let no_thread = |error: io::Error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::EAGAIN);
            Error::Start { operation: "start a thread", errno }
        };
        let heap = HeapCode::new(heap);
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
            ring: RingThread::new()
                .map_err(|errno| Error::Start { operation: "create an eventfd", errno: errno::from_rustix(errno) })?,
            choices,
            jobs: Jobs::new(
                settings.window_bytes,
                settings.memory_limit_bytes,
                descriptors::max_open_files(),
                settings.max_open_loads,
                settings.allocators(),
            ),
            threads: Arc::default(),
            leaked_bytes: AtomicU64::new(0),
            left_threads: AtomicUsize::new(0),
            counters: Arc::default(),
            // A failure is ignored: the pool works without the thread that watches memory
            // pressure.
            stop_watch: (settings.pool_bytes > 0)
                .then(|| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok())
                .flatten(),
            settings,
        });
        engine.reaper.set_pool_bytes(engine.settings.pool_bytes);
        // From here on, dropping the guard stops the threads that were started.
        let guard = Arc::new(Guard { engine: Arc::clone(&engine), heap: heap.clone(), settings: all_settings });
        let own = Arc::clone(&engine);
        thread::Builder::new().name("dmaload-tell".to_owned()).spawn(move || own.run_teller()).map_err(no_thread)?;
        engine
            .start_counted(|| engine.ring.start(engine.settings.ring_limits(), engine.epoch, Arc::clone(&engine)))
            .map_err(no_thread)?;
        if engine.stop_watch.is_some() {
            engine.watch_pressure();
        }
        for _ in 0..engine.settings.allocators().threads() {
            engine.start_worker(engine.jobs.hire(), &heap).map_err(no_thread)?;
        }
        let own = Arc::clone(&engine);
        let builder = thread::Builder::new().name("dmaload-watch".to_owned());
        engine.start_counted(|| builder.spawn(move || own.watch(heap)).map(|_| ())).map_err(no_thread)?;
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
            ..engine.counters.snapshot(engine.ring.counters())
        }
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.engine.jobs.memory_bytes()
    }

    pub(crate) fn pooled_bytes(&self) -> u64 {
        self.engine.reaper.pooled_bytes()
    }

    pub(crate) fn heap(&self) -> &dyn Heap {
        self.heap.heap()
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Starts a load. If the request or the options are invalid, or the engine has been closed,
    /// the returned load has already failed.
    ///
    /// `keep` says whether the load keeps all of its segments in memory at once.
    pub(crate) fn load(
        self: &Arc<Self>,
        inputs: Result<Vec<Input>>,
        options: LoadOptions,
        keep: bool,
    ) -> (Arc<Outbox>, Arc<LoadShared>) {
        let engine = &self.engine;
        let outbox = Arc::default();
        let events = Announcer::new(&outbox);
        let checked = engine.settings.check(&options);
        let (inputs, checked) = inputs.map_or_else(|error| (Vec::new(), Err(error)), |inputs| (inputs, checked));
        let id = engine.jobs.next_id();
        let shared = Arc::new(LoadShared::new(id, options, keep, inputs, &engine.facts, Arc::clone(&engine.counters), events));
        let submit = || engine.jobs.submit(id, Arc::clone(&shared));
        if let Err(error) = checked.and_then(|()| submit().then_some(()).ok_or_else(|| engine.end_reason())) {
            // The scheduler does not know this load, so the teller will never deliver the error to
            // its consumer. This thread does so instead.
            let mut remains = vec![shared.fail(error)];
            assert_eq!(shared.deliver(&mut remains), HandOverStatus::Over, "a load must have ended once its error is delivered");
        }
        (outbox, shared)
    }

    /// Records that the consumer of a stream has taken a segment with `bytes` bytes of memory, so
    /// the load may allocate as much again.
    pub(crate) fn consumed(&self, load: LoadId, bytes: u64) {
        self.engine.jobs.update_accounts(|scheduler| scheduler.consumed(&load, bytes));
    }

    /// Returns [`Error::HeldUp`] if a stream can continue only after its consumer drops segments.
    /// The consumer must not drop any during this call.
    pub(crate) fn held_up(&self, load: LoadId) -> Option<Error> {
        let engine = &self.engine;
        // Check twice. After the first check, only the consumer and the reaper can hold memory of
        // the load. If the reaper is then idle, the consumer holds all memory that the second
        // check counts.
        engine.jobs.held_up(load)?;
        if !engine.reaper.is_idle() {
            return None;
        }
        let HeldUp { held_bytes, wanted_bytes } = engine.jobs.held_up(load)?;
        Some(Error::HeldUp { held_bytes, wanted_bytes, limit_bytes: engine.settings.memory_limit_bytes })
    }

    /// Releases a load whose consumer was dropped, and cancels it if it is still running.
    pub(crate) fn abandon(&self, load: Arc<LoadShared>) {
        load.record_drop();
        self.engine.abandon(&load);
        // Closing files and unmapping memory may block, and the caller may be an async task, so a
        // worker does both.
        self.engine.defer_drop(load.id, load.take_remains_if_over());
        self.engine.jobs.defer_drop(DropKey::Files(load.id), load);
    }

    /// Ends all loads and stops all threads. At the deadline, the memory of reads that are still
    /// in flight is leaked. The shutdown begins with the call, not when the future is first
    /// polled.
    pub(crate) fn shutdown(&self) -> impl Future<Output = Result<(), Leaked>> + Send + use<> {
        let engine = Arc::clone(&self.engine);
        engine.close();
        let (done, answer) = oneshot::channel();
        let waiting = Arc::clone(&engine);
        let body = move || {
            let left = waiting.wait_for_threads();
            // Sending wakes the caller's task. A panic in its waker is ignored.
            foreign::discard(foreign::call(|| done.send(left)));
        };
        if thread::Builder::new().name("dmaload-close".to_owned()).spawn(body).is_err() {
            // No thread could be started to wait for the deadline, so treat it as passed.
            engine.ring.give_up();
        }
        async move { answer.await.unwrap_or_else(|_| engine.left_now()) }
    }
}
