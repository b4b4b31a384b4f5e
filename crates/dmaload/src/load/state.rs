//! A load from the engine's side: what is planned and what is allocated; in [`handing`] what is full and can be handed over, in
//! [`telling`] what is told of it.

mod handing;
mod telling;

pub(crate) use handing::{Follows, Handover};

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use dmabuf::{AddressRange, PageCount, Populated};
use rustix::io::Errno;
use tokio::sync::mpsc::UnboundedSender;
use tracing::Span;
use tracing::field::Empty;

use super::{Event, FileTensors};
use crate::busy::BusyTime;
use crate::error::Error;
use crate::memory::Backing;
use crate::metrics::{LoadCounters, count};
use crate::observe::{Observation, Watch};
use crate::plan::{Batch, Piece, Plan};
use crate::report::cpu_time;
use crate::ring::{LoadId, Times};
use crate::route::{Fallback, Route};
use crate::schedule::Need;
use crate::settings::LoadOptions;
use crate::source::{Identity, Input, OpenFile, Source};
use crate::trace::{TraceEvent, TraceKind};

/// See the module.
#[derive(Debug)]
pub(crate) struct LoadShared {
    pub(crate) id: LoadId,
    pub(crate) options: LoadOptions,
    /// Whether all of it will be in memory at once.
    pub(crate) keep: bool,
    /// What was asked for: files, and folders of files.
    pub(crate) asked: Vec<Input>,
    /// The files, once they are known.
    sources: OnceLock<Vec<Source>>,
    /// Nobody waits for this load any more, or it has failed.
    pub(crate) abandoned: Arc<AtomicBool>,
    heap: Arc<str>,
    notes: Arc<[String]>,
    /// Whether its segments become dma-bufs.
    exports: bool,
    allocates_at_once: bool,
    pub(crate) observation: Option<Observation>,
    started: Instant,
    cpu_before: Duration,
    planned_bytes: AtomicU64,
    allocated_bytes: AtomicU64,
    read_bytes: AtomicU64,
    /// The largest tensor does not fit into the loader's limit of memory: its segments can be streamed, but not it.
    pub(crate) tensor_over_limit: OnceLock<Error>,
    counters: Arc<LoadCounters>,
    /// Of the load, from its call to its end: `dmaload::load`, with `id`, `paths` and, in the end, `bytes` and `error`.
    span: Span,
    state: Mutex<State>,
}

/// A file as it was when the load began, and what is to be done with it.
#[derive(Debug)]
pub(crate) struct FilePlan {
    pub(crate) identity: Identity,
    pub(crate) alignment_bytes: u64,
    /// The part of it that is the model.
    pub(crate) part: Range<u64>,
    pub(crate) tensors: Option<Arc<FileTensors>>,
    /// What is to be read of it, and how much of that was asked for.
    pub(crate) read_bytes: u64,
    pub(crate) wanted_bytes: u64,
    /// The route its reads start at; of a small file, the one that it is to be opened for.
    pub(crate) route: Route,
    /// It was wholly in the page cache, and is copied from there by choice.
    pub(crate) cached: bool,
    /// A small file: it is opened when its turn comes, and its header is taken from its memory.
    pub(crate) small: bool,
    /// Open already, or to be opened when its first piece is allocated.
    pub(crate) open: Option<Arc<OpenFile>>,
}

/// What it takes to allocate a batch. The cells are shared by the batches of a memory and the pieces of a file: whoever comes
/// first fills them.
#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) batch: Batch,
    pub(crate) memory: Arc<Mutex<Option<Arc<Backing>>>>,
    pub(crate) memory_bytes: u64,
    pub(crate) range: Arc<AddressRange>,
    pub(crate) range_offset: u64,
    pub(crate) parts: Vec<Part>,
}

/// A piece of a batch, and its file.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) number: usize,
    pub(crate) piece: Piece,
    pub(crate) file_index: usize,
    pub(crate) path: Arc<PathBuf>,
    pub(crate) identity: Identity,
    pub(crate) alignment_bytes: u64,
    pub(crate) route: Route,
    pub(crate) small: bool,
    pub(crate) file: Arc<Mutex<Option<Arc<OpenFile>>>>,
}

/// What a load has to know of the heap.
#[derive(Debug)]
pub(crate) struct HeapFacts {
    pub(crate) name: Arc<str>,
    pub(crate) notes: Arc<[String]>,
    pub(crate) exports: bool,
    pub(crate) allocates_at_once: bool,
    pub(crate) uncached: bool,
}

#[derive(Debug)]
struct State {
    /// `None` when the load is over: finished, failed, or nobody listens.
    events: Option<UnboundedSender<Event>>,
    plan: Plan,
    /// Where its memories are mapped; `None` for no bytes at all.
    range: Option<Arc<AddressRange>>,
    files: Vec<FileState>,
    memories: Vec<MemoryState>,
    handed: usize,
    files_left: usize,
    /// Set when the driver has forgotten the load.
    times: Option<Times>,
    allocating: BusyTime,
    first_segment: Option<Duration>,
    pages: PageCount,
    pages_refused: Option<Errno>,
    reused_bytes: u64,
    /// What is to be told of this load, and how many reads were tried again.
    notes: Vec<String>,
    retried: usize,
    fallbacks: Vec<Fallback>,
    trace: Vec<TraceEvent>,
}

#[derive(Debug)]
struct FileState {
    planned: FilePlan,
    open: Arc<Mutex<Option<Arc<OpenFile>>>>,
    pieces_left: usize,
    route: Route,
}

/// What a load leaves that failed. To drop it closes files, which may take as long as their file system likes.
#[derive(Debug)]
#[must_use]
pub(crate) struct Remains {
    _memories: Vec<MemoryState>,
    _files: Vec<FileState>,
}

#[derive(Debug)]
struct MemoryState {
    cell: Arc<Mutex<Option<Arc<Backing>>>>,
    pieces_left: usize,
    /// Files that end in it and wait for their check.
    unchecked: usize,
    /// Its tensors are to be moved first, or it is to become a dma-buf.
    unfinished: bool,
    /// When its last bytes came, as far as they have.
    full_at: Option<Instant>,
    /// From its allocation until its last segment is handed over.
    span: Span,
}

impl State {
    /// The file and the segment that a piece belongs to.
    fn place_of(&self, number: usize) -> Option<(usize, usize)> {
        let segment = self.plan.pieces.get(number)?.segment;
        Some((self.plan.segments.get(segment)?.file, segment))
    }

    /// The memory that a file ends in; `None` for one without bytes.
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
        asked: Vec<Input>,
        heap: &HeapFacts,
        counters: Arc<LoadCounters>,
        events: UnboundedSender<Event>,
    ) -> Self {
        let observed = options.observer.is_some() || options.verify.is_some();
        let watch = observed.then(|| Arc::new(Watch::new(options.observer.clone())));
        count(&counters.started);
        let span = tracing::info_span!("load", load = id.0, paths = asked.len(), bytes = Empty, error = Empty);
        LoadShared {
            id,
            tensor_over_limit: OnceLock::new(),
            counters,
            span,
            observation: watch.map(|watch| Observation { watch, staged: heap.uncached }),
            options,
            keep,
            asked,
            sources: OnceLock::new(),
            abandoned: Arc::default(),
            heap: Arc::clone(&heap.name),
            notes: Arc::clone(&heap.notes),
            exports: heap.exports,
            allocates_at_once: heap.allocates_at_once,
            started: Instant::now(),
            cpu_before: cpu_time(),
            planned_bytes: AtomicU64::new(0),
            allocated_bytes: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            state: Mutex::new(State {
                events: Some(events),
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
                notes: Vec::new(),
                retried: 0,
                fallbacks: Vec::new(),
                trace: Vec::new(),
            }),
        }
    }

    /// These are the files.
    pub(crate) fn found(&self, sources: Vec<Source>) {
        let set = self.sources.set(sources);
        debug_assert!(set.is_ok(), "a load is planned once");
    }

    /// The files; none before they are known.
    pub(crate) fn sources(&self) -> &[Source] {
        self.sources.get().map_or(&[], |sources| sources)
    }

    /// The path of a file.
    pub(crate) fn path(&self, file: usize) -> Option<&Arc<PathBuf>> {
        self.sources().get(file).map(|source| &source.path)
    }

    /// The heap's name.
    pub(crate) fn heap(&self) -> &str {
        &self.heap
    }

    /// Whether its bytes are looked at in staging, which each read goes into then.
    pub(crate) fn is_observed_in_staging(&self) -> bool {
        self.observation.as_ref().is_some_and(|observation| observation.staged)
    }

    /// Whether anything is still to be done for it.
    pub(crate) fn is_over(&self) -> bool {
        self.abandoned.load(Ordering::Acquire) || self.state().events.is_none()
    }

    /// Takes the plan, and the addresses for it; gives how many pieces it has, and what each batch takes. Without any piece the
    /// load ends here.
    pub(crate) fn planned(
        &self,
        plan: Plan,
        range: Option<Arc<AddressRange>>,
        files: Vec<FilePlan>,
        fallbacks: Vec<Fallback>,
    ) -> (usize, Vec<Need>) {
        let mut state = self.state();
        if state.events.is_none() {
            // It failed meanwhile, and holds nothing any more.
            return (0, Vec::new());
        }
        self.counters.fallbacks.fetch_add(fallbacks.len() as u64, Ordering::Relaxed);
        state.fallbacks = fallbacks;
        state.plan = plan;
        state.range = range;
        let state = &mut *state;
        for memory in &state.plan.memories {
            let (cell, pieces_left) = (Arc::default(), memory.pieces.len());
            let own = state.plan.segments.get(memory.segments.clone()).unwrap_or_default();
            let unfinished = self.exports || own.iter().any(|segment| segment.moved.is_some());
            state.memories.push(MemoryState { cell, pieces_left, unchecked: 0, unfinished, full_at: None, span: Span::none() });
        }
        for (index, planned) in files.into_iter().enumerate() {
            self.planned_bytes.fetch_add(planned.read_bytes, Ordering::Relaxed);
            let pieces_left = state.plan.files.get(index).map_or(0, |parts| parts.pieces);
            state.files_left += usize::from(pieces_left > 0);
            if let Some(memory) = state.last_memory_of(index).and_then(|memory| state.memories.get_mut(memory)) {
                memory.unchecked += 1;
            }
            let open = Arc::new(Mutex::new(planned.open.clone().filter(|_| pieces_left > 0)));
            let route = planned.route;
            let planned = FilePlan { open: None, ..planned };
            state.files.push(FileState { planned, open, pieces_left, route });
        }
        let is_small = |piece: &Piece| {
            let segment = state.plan.segments.get(piece.segment);
            segment.and_then(|segment| state.files.get(segment.file)).is_some_and(|file| file.planned.small)
        };
        let need = |batch: &Batch| {
            let pieces = state.plan.pieces.get(batch.pieces.clone()).unwrap_or_default();
            Need {
                bytes: batch.bytes,
                files: pieces.iter().filter(|piece| is_small(piece)).count() as u64,
                held_bytes: state
                    .plan
                    .memories
                    .get(batch.memory)
                    .filter(|_| batch.memory_offset == 0)
                    .map_or(0, |memory| memory.bytes),
            }
        };
        let needs = state.plan.batches.iter().map(need).collect();
        let pieces = state.plan.pieces.len();
        if pieces == 0 {
            state.times = Some(Times::default());
            self.hand_over(state);
        }
        (pieces, needs)
    }

    /// What it takes to allocate this batch; `None` when the load is over.
    pub(crate) fn allocation(&self, number: usize) -> Option<Allocation> {
        if self.is_over() {
            return None;
        }
        let mut state = self.state();
        let batch = state.plan.batches.get(number)?.clone();
        self.begin_memory(&mut state, batch.memory);
        let memory = state.plan.memories.get(batch.memory)?;
        let part = |number: usize| {
            let piece = *state.plan.pieces.get(number)?;
            let file_index = state.plan.segments.get(piece.segment)?.file;
            let file = state.files.get(file_index)?;
            Some(Part {
                number,
                piece,
                file_index,
                path: Arc::clone(self.path(file_index)?),
                identity: file.planned.identity,
                alignment_bytes: file.planned.alignment_bytes,
                route: file.route,
                small: file.planned.small,
                file: Arc::clone(&file.open),
            })
        };
        Some(Allocation {
            memory: Arc::clone(&state.memories.get(batch.memory)?.cell),
            memory_bytes: memory.bytes,
            range: Arc::clone(state.range.as_ref()?),
            range_offset: memory.range_offset,
            parts: batch.pieces.clone().map(part).collect::<Option<_>>()?,
            batch,
        })
    }

    /// The span of a memory's segments begins with its first batch.
    fn begin_memory(&self, state: &mut State, number: usize) {
        let State { plan, memories, .. } = state;
        let (Some(planned), Some(memory)) = (plan.memories.get(number), memories.get_mut(number)) else { return };
        if memory.span.is_none() {
            let (segment, segments, bytes) = (planned.segments.start, planned.segments.len(), planned.bytes);
            memory.span = tracing::debug_span!(parent: &self.span, "segment", load = self.id.0, segment, segments, bytes);
        }
    }

    /// A file was opened when its turn came, and this route chosen for it; whether it is copied from the page cache by choice.
    pub(crate) fn file_opened(&self, file_index: usize, route: Route, cached: bool) {
        if let Some(file) = self.state().files.get_mut(file_index) {
            file.route = file.route.max(route);
            file.planned.cached |= cached;
        }
    }

    /// The route that reads of a file take now.
    pub(crate) fn route_of(&self, file_index: usize) -> Route {
        self.state().files.get(file_index).map_or(self.options.route, |file| file.route)
    }

    pub(crate) fn begin_allocating(&self) {
        self.state().allocating.begin(self.started.elapsed());
    }

    /// A batch was populated, or the attempt has failed.
    pub(crate) fn end_allocating(&self, allocation: &Allocation, start: Instant, populated: Option<(&Populated, bool)>) {
        let mut state = self.state();
        state.allocating.end(self.started.elapsed());
        let Some((populated, reused)) = populated else { return };
        let bytes = allocation.parts.iter().map(|part| part.piece.bytes).sum();
        self.allocated_bytes.fetch_add(bytes, Ordering::Relaxed);
        if let Some(first) = allocation.parts.first().filter(|_| self.options.trace) {
            let (end, kind, bytes) = (Instant::now(), TraceKind::Allocate, allocation.batch.bytes);
            let event = self.event(kind, start, end, first.file_index, first.piece.segment, bytes);
            state.trace.push(event);
        }
        if reused {
            state.reused_bytes += allocation.batch.bytes;
        }
        if let Some(pages) = populated.pages {
            state.pages.add(pages);
        }
        if populated.refused.is_some() && state.pages_refused.is_none() {
            state.pages_refused = populated.refused;
            let errno = populated.refused.map(dmabuf::errno::describe);
            tracing::warn!(load = self.id.0, errno, "2 MiB pages could not be had for all of the memory: small pages are slower");
        }
    }

    /// Ends the load with an error. Only the first one is told.
    pub(crate) fn fail(&self, error: Error) -> Remains {
        let mut state = self.state();
        self.abandoned.store(true, Ordering::Release);
        if let Some(events) = state.events.take() {
            tracing::debug!(load = self.id.0, %error, "load failed");
            self.span.record("error", tracing::field::display(&error));
            count(&self.counters.failed);
            let _ = events.send(Event::Failed(error));
        }
        // What was full but not handed over goes now; what is being filled belongs to the driver.
        Remains { _memories: std::mem::take(&mut state.memories), _files: std::mem::take(&mut state.files) }
    }

    /// Nobody wants it any more: before its end, or after.
    pub(crate) fn dropped(&self) {
        let was_going = self.state().events.take().is_some();
        if was_going {
            count(&self.counters.dropped);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
