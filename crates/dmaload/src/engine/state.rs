//! A load as the engine sees it: its plan and allocations, the segments that are full and can be
//! handed over ([`hand_over`]), and its report and events ([`reporting`]).

mod hand_over;
mod reporting;

pub(crate) use hand_over::{FollowUpJobs, HandOverStatus};

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use dmabuf::{AddressRange, Errno, PageCount, Populated};
use tracing::Span;
use tracing::field::Empty;

use super::allocation::{Allocated, Allocation, BatchPart, FilePlan, HeapFacts};
use super::outbox::Announcer;
use super::ways::Choosing;
use crate::engine::schedule::Need;
use crate::error::{Error, Result};
use crate::files::source::{Input, OpenFile, SourceFile};
use crate::files::whole::check_whole;
use crate::memory::backing::Backing;
use crate::model::TensorMap;
use crate::options::load::LoadOptions;
use crate::plan::{Batch, Piece, Plan};
use crate::ring::Times;
use crate::ring::watch::{Observation, Watch};
use crate::route::{Fallback, Route};
use crate::support::foreign::{self, Foreign};
use crate::support::id::LoadId;
use crate::support::once_value::OnceValue;
use crate::telemetry::busy::BusyTime;
use crate::telemetry::metrics::{LoadCounters, increment};
use crate::telemetry::report::{Measured, Way};
use crate::telemetry::trace::{TraceEvent, TraceKind};

/// A load as the engine sees it; see the module documentation.
#[derive(Debug)]
pub(crate) struct LoadShared {
    pub(crate) id: LoadId,
    pub(crate) options: LoadOptions,
    /// Whether the load keeps all of its segments in memory at once.
    pub(crate) keep: bool,
    /// The requested files and folders. Emptied once the load has ended, because they may include
    /// open files.
    inputs: Mutex<Arc<[Input]>>,
    /// The files, once they are known.
    sources: OnceLock<Vec<SourceFile>>,
    /// Whether the load was dropped or has failed.
    pub(crate) abandoned: Arc<AtomicBool>,
    heap: Arc<str>,
    notes: Arc<[String]>,
    /// Whether the load's segments are exported as dma-bufs.
    exports: bool,
    allocates_at_once: bool,
    heap_is_own: bool,
    pub(crate) observation: Option<Observation>,
    /// The verifier's description of itself. It is requested during planning, because the report
    /// is made under the lock, where the caller's code must not run.
    pub(crate) verified: OnceLock<String>,
    started: Instant,
    planned_bytes: AtomicU64,
    allocated_bytes: AtomicU64,
    read_bytes: AtomicU64,
    /// The error for a consumer that takes tensors. Set if the largest tensor exceeds the loader's
    /// memory limit, even though the load's segments can still be streamed.
    pub(crate) tensor_over_limit: OnceLock<Error>,
    /// Why a copier, or another thread that fills memory, could not populate it.
    pub(crate) no_memory: OnceLock<Error>,
    /// How the batches of the load are read.
    choosing: Mutex<Choosing>,
    counters: Arc<LoadCounters>,
    /// The tracing span `load`, which lasts until this value is dropped. Its fields are `load`
    /// (the ID), `paths` (the number of inputs) and, at the end, `bytes` or `error`.
    span: Foreign<Span>,
    /// The caller's code never runs while this is locked: no waker, no subscriber, no drop of
    /// either.
    state: Mutex<LoadState>,
}

#[derive(Debug)]
struct LoadState {
    /// `None` once the load has delivered its final event or was dropped. Dropping the last
    /// reference wakes the consumers.
    events: Option<Arc<Announcer>>,
    /// Why the load failed, until the error is delivered to the consumer.
    failed: Option<Error>,
    /// Whether the consumer has yet to receive the list of files.
    files_unsent: bool,
    plan: Plan,
    /// The address range into which the load's allocations are mapped; `None` for a load without
    /// bytes.
    range: Option<Arc<AddressRange>>,
    files: Vec<FileState>,
    memories: Vec<MemoryState>,
    handed: usize,
    files_left: usize,
    /// Set once the driver has released the load.
    times: Option<Times>,
    allocating: BusyTime,
    first_segment: Option<Duration>,
    pages: PageCount,
    pages_refused: Option<Errno>,
    reused_bytes: u64,
    measured: Option<Measured>,
    notes: Vec<String>,
    retried: usize,
    fallbacks: Vec<Fallback>,
    trace: Vec<TraceEvent>,
}

#[derive(Debug)]
struct FileState {
    planned: FilePlan,
    open: Arc<OnceValue<Arc<OpenFile>>>,
    pieces_left: usize,
    /// The initial route for reads of this file.
    start: Route,
    /// The lowest route through which any byte of this file was read.
    route: Route,
}

/// What is left of a load that has ended, to be dropped by a worker. Dropping it closes files,
/// which may wait for their servers.
#[derive(Debug)]
#[must_use]
pub(crate) struct DeferredDrop {
    memory: RemainingMemory,
    files: RemainingFiles,
}

impl DeferredDrop {
    /// Splits the remains into memory, whose drop never waits for a server, and files, whose drop
    /// may.
    pub(crate) fn parts(self) -> (RemainingMemory, RemainingFiles) {
        (self.memory, self.files)
    }
}

#[derive(Debug)]
pub(crate) struct RemainingMemory {
    _memories: Vec<MemoryState>,
    _plan: Box<Plan>,
    _range: Option<Arc<AddressRange>>,
}

#[derive(Debug)]
pub(crate) struct RemainingFiles {
    _files: Vec<FileState>,
    _inputs: Arc<[Input]>,
}

#[derive(Debug)]
struct MemoryState {
    cell: Arc<OnceValue<Arc<Backing>>>,
    pieces_left: usize,
    /// How many files that end in this allocation have not been checked yet.
    unchecked: usize,
    /// Whether the allocation still has to be finished: its tensors have to be moved, or it has to
    /// be exported as a dma-buf.
    unfinished: bool,
    /// When a piece of this allocation was last filled.
    full_at: Option<Instant>,
    /// The tracing span of the allocation's segments. It lasts from the allocation of the first
    /// batch until the last segment is handed over.
    span: Foreign<Span>,
}

/// Returns a disabled span, for the time before a tracing span begins and after it has ended.
fn no_span() -> Foreign<Span> {
    Foreign::new(Span::none())
}

impl LoadState {
    /// Whether the load has finished, has failed or was dropped.
    fn is_over(&self) -> bool {
        self.events.is_none() || self.failed.is_some()
    }

    /// The file and the segment that a piece belongs to.
    fn place_of(&self, number: usize) -> Option<(usize, usize)> {
        let segment = self.plan.pieces.get(number)?.segment;
        Some((self.plan.segments.get(segment)?.file, segment))
    }

    /// The batch that a piece belongs to.
    fn batch_of(&self, piece: usize) -> usize {
        self.plan.batches.partition_point(|batch| batch.pieces.end <= piece)
    }

    /// The allocation that a file ends in; `None` for an empty file.
    fn last_memory_of(&self, file: usize) -> Option<usize> {
        self.plan.files.get(file)?.last_memory
    }
}

impl MemoryState {
    fn is_ready(&self) -> bool {
        self.pieces_left == 0 && self.unchecked == 0 && !self.unfinished
    }
}

impl LoadShared {
    pub(crate) fn new(
        id: LoadId,
        options: LoadOptions,
        keep: bool,
        inputs: Vec<Input>,
        heap: &HeapFacts,
        counters: Arc<LoadCounters>,
        events: Announcer,
    ) -> Self {
        let observed = options.observer.is_some() || options.verify.is_some();
        let watch = observed.then(|| Arc::new(Watch::new(options.observer.clone())));
        increment(&counters.started);
        let span = tracing::info_span!("load", load = id.0, paths = inputs.len(), bytes = Empty, error = Empty);
        LoadShared {
            id,
            tensor_over_limit: OnceLock::new(),
            no_memory: OnceLock::new(),
            choosing: Mutex::new(Choosing::fixed(Way::Direct)),
            counters,
            span: Foreign::new(span),
            observation: watch.map(|watch| Observation { watch, staged: heap.uncached }),
            verified: OnceLock::new(),
            options,
            keep,
            inputs: Mutex::new(inputs.into()),
            sources: OnceLock::new(),
            abandoned: Arc::default(),
            heap: Arc::clone(&heap.name),
            notes: Arc::clone(&heap.notes),
            exports: heap.exports,
            allocates_at_once: heap.allocates_at_once,
            heap_is_own: heap.own,
            started: Instant::now(),
            planned_bytes: AtomicU64::new(0),
            allocated_bytes: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            state: Mutex::new(LoadState {
                events: Some(Arc::new(events)),
                failed: None,
                files_unsent: false,
                plan: Plan::default(),
                range: None,
                files: Vec::new(),
                memories: Vec::new(),
                handed: 0,
                files_left: 0,
                times: None,
                allocating: BusyTime::default(),
                first_segment: None,
                pages: PageCount::default(),
                pages_refused: None,
                reused_bytes: 0,
                measured: None,
                notes: Vec::new(),
                retried: 0,
                fallbacks: Vec::new(),
                trace: Vec::new(),
            }),
        }
    }

    /// Checks that the files form complete models, and returns notes for the report. Call this
    /// once the tensors of all files are known.
    pub(crate) fn check_whole<'a>(&self, maps: impl Iterator<Item = Option<&'a TensorMap>>) -> Result<Vec<String>> {
        let files: Vec<_> = self.sources().iter().zip(maps).collect();
        if self.options.as_one_file { Ok(Vec::new()) } else { check_whole(&files, self.options.allow_missing) }
    }

    pub(crate) fn set_sources(&self, sources: Vec<SourceFile>) {
        let set = self.sources.set(sources);
        debug_assert!(set.is_ok(), "a load must be planned only once");
    }

    /// The load's files; empty until they are known.
    pub(crate) fn sources(&self) -> &[SourceFile] {
        self.sources.get().map_or(&[], |sources| sources)
    }

    pub(crate) fn path(&self, file: usize) -> Option<&Arc<PathBuf>> {
        self.sources().get(file).map(|source| &source.path)
    }

    pub(crate) fn heap(&self) -> &str {
        &self.heap
    }

    /// Whether the load's bytes are observed in staging. If so, every read must go through
    /// staging.
    pub(crate) fn is_observed_in_staging(&self) -> bool {
        self.observation.as_ref().is_some_and(|observation| observation.staged)
    }

    /// Returns the initial route for reads of this load: the requested route or, by default, the
    /// best one. If bytes are observed in staging, the initial route is bounce or a lower one.
    pub(crate) fn starting_route(&self) -> Route {
        let requested = self.options.route.unwrap_or(Route::UringFixedDirect);
        if self.is_observed_in_staging() { requested.max(Route::Bounce) } else { requested }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.abandoned.load(Ordering::Acquire) || self.state().is_over()
    }

    /// Sets the plan and its address range. Returns the number of pieces and the needs of each
    /// batch. A load without pieces is already complete, and [`Self::deliver`] ends it. If the
    /// load has already failed or was dropped, this changes nothing and returns 0 pieces.
    pub(crate) fn set_plan(
        &self,
        plan: Plan,
        range: Option<Arc<AddressRange>>,
        files: Vec<FilePlan>,
        fallbacks: Vec<Fallback>,
    ) -> (usize, Vec<Need>) {
        let mut state = self.state();
        if state.is_over() {
            // The load has ended in the meantime, so it must no longer acquire files or addresses.
            return (0, Vec::new());
        }
        self.counters.fallbacks.fetch_add(fallbacks.len() as u64, Ordering::Relaxed);
        state.fallbacks = fallbacks;
        state.plan = plan;
        state.range = range;
        let state = &mut *state;
        for memory in &state.plan.memories {
            let (cell, pieces_left) = (Arc::default(), memory.pieces.len());
            let own = state.plan.segments.get(memory.segments.clone()).expect("an allocation should have planned segments");
            let unfinished = self.exports || own.iter().any(|segment| segment.moved.is_some());
            state.memories.push(MemoryState { cell, pieces_left, unchecked: 0, unfinished, full_at: None, span: no_span() });
        }
        for (index, planned) in files.into_iter().enumerate() {
            self.planned_bytes.fetch_add(planned.read_bytes, Ordering::Relaxed);
            let pieces_left = state.plan.files.get(index).map_or(0, |parts| parts.pieces);
            state.files_left += usize::from(pieces_left > 0);
            if let Some(memory) = state.last_memory_of(index).and_then(|memory| state.memories.get_mut(memory)) {
                memory.unchecked += 1;
            }
            let open = Arc::new(OnceValue::new(planned.open.clone().filter(|_| pieces_left > 0)));
            let route = planned.route;
            let planned = FilePlan { open: None, ..planned };
            state.files.push(FileState { planned, open, pieces_left, start: route, route });
        }
        let file_of = |piece: &Piece| {
            let segment = state.plan.segments.get(piece.segment).expect("a piece should belong to a planned segment");
            &state.files.get(segment.file).expect("a segment should belong to a planned file").planned
        };
        let need = |batch: &Batch| {
            let pieces = state.plan.pieces.get(batch.pieces.clone()).expect("a batch should have planned pieces");
            Need {
                bytes: batch.bytes,
                files: pieces.iter().filter(|piece| file_of(piece).small).count() as u64,
                held_bytes: state
                    .plan
                    .memories
                    .get(batch.memory)
                    .filter(|_| batch.memory_offset == 0)
                    .map_or(0, |memory| memory.bytes),
                file_system: pieces.first().map_or(0, |piece| file_of(piece).identity.mount()),
            }
        };
        let needs = state.plan.batches.iter().map(need).collect();
        state.files_unsent = self.keep;
        let pieces = state.plan.pieces.len();
        if pieces == 0 {
            state.times = Some(Times::default());
        }
        (pieces, needs)
    }

    pub(crate) fn set_choosing(&self, choosing: Choosing) {
        *self.choosing() = choosing;
    }

    /// Stops measuring which way of reading is the fastest. Called if some bytes come from the
    /// page cache, because the time that a batch takes then says nothing about storage.
    pub(crate) fn cannot_measure(&self) {
        self.choosing().stop_measuring();
    }

    /// How a batch is read.
    fn way(&self, batch: usize) -> Way {
        self.choosing().way(batch)
    }

    /// Records that the pieces of a batch are about to be read.
    pub(crate) fn record_queued(&self, first_piece: usize) {
        let batch = self.state().batch_of(first_piece);
        self.choosing().record_queued(batch, self.started.elapsed());
    }

    /// Records that a piece is full. If this piece completes the measurement, returns the mount of
    /// the measured file system, and the result.
    pub(crate) fn measure(&self, piece: usize) -> Option<(u64, Measured)> {
        let (batch, bytes, mount) = {
            let state = self.state();
            let planned = state.plan.pieces.get(piece)?;
            (state.batch_of(piece), planned.memory_bytes, state.files.first()?.planned.identity.mount())
        };
        let measured = self.choosing().record_full(batch, bytes, self.started.elapsed())?;
        self.state().measured = Some(measured);
        Some((mount, measured))
    }

    fn choosing(&self) -> MutexGuard<'_, Choosing> {
        self.choosing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the data needed to allocate this batch; `None` if the load has ended.
    pub(crate) fn allocation(&self, number: usize) -> Option<Allocation> {
        if self.is_over() {
            return None;
        }
        self.begin_memory(number);
        let state = self.state();
        if state.is_over() {
            return None;
        }
        let batch = state.plan.batches.get(number).expect("the scheduler should hand out only planned batches").clone();
        let memory = state.plan.memories.get(batch.memory).expect("a batch should belong to a planned allocation");
        let part = |number: usize| {
            let piece = *state.plan.pieces.get(number).expect("a batch should have planned pieces");
            let file_index = state.plan.segments.get(piece.segment).expect("a piece should belong to a planned segment").file;
            let file = state.files.get(file_index).expect("a segment should belong to a planned file");
            BatchPart {
                number,
                piece,
                file_index,
                path: Arc::clone(self.path(file_index).expect("a planned file should have a path")),
                identity: file.planned.identity,
                alignment_bytes: file.planned.alignment_bytes,
                route: file.start,
                small: file.planned.small,
                file: Arc::clone(&file.open),
            }
        };
        Some(Allocation {
            memory: Arc::clone(&state.memories.get(batch.memory).expect("every allocation should have been planned").cell),
            memory_bytes: memory.bytes,
            range: Arc::clone(state.range.as_ref().expect("a load with bytes should have an address range")),
            range_offset: memory.range_offset,
            parts: batch.pieces.clone().map(part).collect(),
            way: self.way(number),
            batch,
        })
    }

    /// Opens the tracing span for the segments of a batch's allocation, unless an earlier batch
    /// has opened it.
    fn begin_memory(&self, batch: usize) {
        let planned = {
            let state = self.state();
            let number = state.plan.batches.get(batch).map(|batch| batch.memory);
            number.filter(|&number| state.memories.get(number).is_some_and(|memory| memory.span.is_none())).map(|number| {
                let memory = state.plan.memories.get(number).expect("a batch should belong to a planned allocation");
                (number, memory.segments.clone(), memory.bytes)
            })
        };
        // There is nothing to do if the span is already open or the load has ended.
        let Some((number, segments, bytes)) = planned else { return };
        let (segment, segments) = (segments.start, segments.len());
        let parent = &*self.span;
        let span = foreign::call(|| tracing::debug_span!(parent: parent, "segment", load = self.id.0, segment, segments, bytes));
        // A panic in a subscriber must not affect the load.
        let mut span = span.map_or_else(|_| no_span(), Foreign::new);
        // If two workers race, the span of the second one is dropped here, after the lock has been
        // released.
        if let Some(memory) = self.state().memories.get_mut(number).filter(|memory| memory.span.is_none()) {
            std::mem::swap(&mut memory.span, &mut span);
        }
    }

    /// Records that a file was opened for its first batch, and the initial route of its reads.
    pub(crate) fn record_opened_file(&self, file_index: usize, route: Route) {
        if let Some(file) = self.state().files.get_mut(file_index) {
            file.start = file.start.max(route);
            file.route = file.route.max(route);
        }
    }

    /// Returns the initial route for reads of a file. It does not reflect later fallbacks, which
    /// the driver keeps track of.
    pub(crate) fn route_of(&self, file_index: usize) -> Route {
        self.state().files.get(file_index).map_or(self.starting_route(), |file| file.start)
    }

    pub(crate) fn begin_allocating(&self) {
        self.state().allocating.begin(self.started.elapsed());
    }

    /// Records that memory was populated, or that the attempt failed.
    pub(crate) fn end_allocating(&self, part: &Allocated, start: Instant, populated: Option<(&Populated, bool)>) {
        let mut state = self.state();
        state.allocating.end(self.started.elapsed());
        // If the attempt failed, there is nothing to count.
        let Some((populated, reused)) = populated else { return };
        self.allocated_bytes.fetch_add(part.bytes, Ordering::Relaxed);
        if self.options.trace {
            let event = self.event(TraceKind::Allocate, start, Instant::now(), part.file_index, part.segment, part.memory_bytes);
            state.trace.push(event);
        }
        if reused {
            state.reused_bytes += part.memory_bytes;
        }
        if let Some(pages) = populated.pages {
            state.pages.add(pages);
        }
        let refused = populated.refused.filter(|_| state.pages_refused.is_none());
        state.pages_refused = state.pages_refused.or(refused);
        drop(state);
        if let Some(errno) = refused.map(Errno::describe) {
            foreign::emit(|| {
                tracing::warn!(
                    load = self.id.0,
                    errno,
                    "some of the memory is on small pages, which are slower than 2 MiB pages"
                );
            });
        }
    }

    /// Fails the load with an error, which [`Self::deliver`] passes to its consumer. Only the
    /// first error is kept.
    pub(crate) fn fail(&self, error: Error) -> DeferredDrop {
        let mut state = self.state();
        self.abandoned.store(true, Ordering::Release);
        if !state.is_over() {
            increment(&self.counters.failed);
            state.failed = Some(error);
        }
        // The remains include segments that are full but were not delivered to the consumer. The
        // driver still holds the segments that are being filled.
        self.take_remains(&mut state)
    }

    /// Takes the remains of the load if it has delivered its final event or was dropped. Returns
    /// `None` before that.
    pub(crate) fn take_remains_if_over(&self) -> Option<DeferredDrop> {
        let mut state = self.state();
        state.events.is_none().then(|| self.take_remains(&mut state))
    }

    fn take_remains(&self, state: &mut LoadState) -> DeferredDrop {
        let mut inputs = self.inputs.lock().unwrap_or_else(PoisonError::into_inner);
        DeferredDrop {
            memory: RemainingMemory {
                _memories: std::mem::take(&mut state.memories),
                _plan: Box::new(std::mem::take(&mut state.plan)),
                _range: state.range.take(),
            },
            files: RemainingFiles {
                _files: std::mem::take(&mut state.files),
                _inputs: std::mem::replace(&mut *inputs, Arc::new([])),
            },
        }
    }

    /// The requested files and folders. As long as the caller holds the returned value, files that
    /// were passed as descriptors stay open, which matters because their paths refer to the
    /// descriptors.
    pub(crate) fn inputs(&self) -> Arc<[Input]> {
        Arc::clone(&self.inputs.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records that the load was dropped, before or after its end.
    pub(crate) fn record_drop(&self) {
        let (events, failed) = {
            let mut state = self.state();
            (state.events.take(), state.failed.take())
        };
        if events.is_some() && failed.is_none() {
            increment(&self.counters.dropped);
        }
    }

    fn state(&self) -> MutexGuard<'_, LoadState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
