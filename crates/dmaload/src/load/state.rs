//! A load from the engine's side: what is planned, what is full, what can be handed over.
//!
//! Segments are handed over in order, and those that share a memory together: whoever gets the memory sees all of it. The last
//! one of a file waits until the file was checked: a file that changed while it was read gives an error instead.
#![allow(unsafe_code)]

mod telling;

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

use super::{Event, FileTensors, Finished, FinishedFile, Progress};
use crate::busy::BusyTime;
use crate::error::Error;
use crate::memory::{Backing, Move};
use crate::metrics::{LoadCounters, count};
use crate::model::TensorMap;
use crate::observe::{Observation, Rejection, Watch};
use crate::plan::{Batch, Piece, Plan, SegmentPlan};
use crate::report::cpu_time;
use crate::ring::{Failure, LoadId, Retried, Times};
use crate::route::{Fallback, Route};
use crate::schedule::Need;
use crate::segment::{Place, Segment};
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

/// The bytes of a file that is in one segment, all of them.
#[derive(Debug)]
pub(crate) struct WholeFile {
    backing: Arc<Backing>,
    range: Range<usize>,
}

impl AsRef<[u8]> for WholeFile {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `LoadShared::whole_file` makes these of files whose pieces have all come back from the driver: their part of
        // the memory is filled, and nobody writes to it before it is handed over, which its file's check comes before.
        unsafe { self.backing.filled(self.range.clone()) }
    }
}

/// What follows from a piece that is full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Follows {
    /// All reads of this file are done; it is to be checked.
    pub(crate) check: Option<usize>,
    /// All bytes of this memory are there; its tensors are to be moved, or it is to be made a dma-buf.
    pub(crate) finish: Option<usize>,
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

/// What handing over has led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handover {
    /// There is more to come.
    Going,
    /// The load has given its end, or was over already.
    Over,
}

/// A disk that is dying makes thousands: the first ones say enough.
const RETRIES_TOLD: usize = 8;

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
            Need { bytes: batch.bytes, files: pieces.iter().filter(|piece| is_small(piece)).count() as u64 }
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

    /// A piece holds its bytes.
    pub(crate) fn piece_full(&self, number: usize, route: Route) -> Follows {
        let mut state = self.state();
        let follows = self.count_piece(&mut state, number, route).unwrap_or_default();
        self.hand_over(&mut state);
        follows
    }

    fn count_piece(&self, state: &mut State, number: usize, route: Route) -> Option<Follows> {
        let piece = *state.plan.pieces.get(number)?;
        let SegmentPlan { file: file_index, memory: memory_index, .. } = *state.plan.segments.get(piece.segment)?;
        let file = state.files.get_mut(file_index)?;
        self.read_bytes.fetch_add(piece.bytes, Ordering::Relaxed);
        self.counters.read_bytes.fetch_add(piece.bytes, Ordering::Relaxed);
        file.route = file.route.max(route);
        file.pieces_left -= 1;
        let read = file.pieces_left == 0;
        let memory = state.memories.get_mut(memory_index)?;
        memory.pieces_left -= 1;
        memory.full_at = Some(Instant::now());
        let finish = memory.pieces_left == 0 && memory.unfinished;
        Some(Follows { check: read.then_some(file_index), finish: finish.then_some(memory_index) })
    }

    /// A full memory that is to be finished, and what is to be moved in it; `None` when the load is over.
    pub(crate) fn full_memory(&self, number: usize) -> Option<(Arc<Backing>, Vec<Move>)> {
        let state = self.state();
        let cell = Arc::clone(&state.memories.get(number)?.cell);
        let own = state.plan.segments.get(state.plan.memories.get(number)?.segments.clone()).unwrap_or_default();
        let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        let moves = own.iter().filter_map(|segment| {
            let moved = segment.moved.as_ref()?;
            let from = segment.memory_offset + (moved.start - segment.file_range.start);
            let slot = at(segment.memory_offset)..at(segment.memory_offset + segment.memory_bytes);
            Some(Move { slot, from: at(from), bytes: at(moved.end - moved.start) })
        });
        let moves = moves.collect();
        drop(state);
        let backing = cell.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        Some((backing, moves))
    }

    /// A memory is what it should be.
    pub(crate) fn memory_finished(&self, number: usize, start: Instant) -> Handover {
        let mut state = self.state();
        if let Some(memory) = state.memories.get_mut(number) {
            memory.unfinished = false;
        }
        if self.options.trace {
            let segment = state.plan.memories.get(number).map_or(0, |memory| memory.segments.start);
            let file_index = state.plan.segments.get(segment).map_or(0, |segment| segment.file);
            let event = self.event(TraceKind::Export, start, Instant::now(), file_index, segment, 0);
            state.trace.push(event);
        }
        self.hand_over(&mut state)
    }

    /// The file to be checked, and what it was. Taken out: it is closed when the caller drops it.
    pub(crate) fn take_file(&self, index: usize) -> Option<(Arc<OpenFile>, Identity)> {
        let (cell, identity) = {
            let state = self.state();
            let file = state.files.get(index)?;
            (Arc::clone(&file.open), file.planned.identity)
        };
        let open = cell.lock().unwrap_or_else(PoisonError::into_inner).take();
        open.map(|open| (open, identity))
    }

    /// All bytes of a small file, which its header is taken from; `None` for any other file, while it is being read, and when the
    /// load is over.
    pub(crate) fn whole_file(&self, index: usize) -> Option<WholeFile> {
        let (cell, start, bytes) = {
            let state = self.state();
            state.files.get(index).filter(|file| file.planned.small && file.pieces_left == 0)?;
            let segment = state.plan.segments.get(state.plan.files.get(index)?.first_segment?)?;
            let cell = Arc::clone(&state.memories.get(segment.memory)?.cell);
            (cell, segment.memory_offset, segment.file_range.end)
        };
        let backing = cell.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let at = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        Some(WholeFile { backing, range: at(start)..at(start + bytes) })
    }

    /// A file has not changed; `tensors` are those that were found in its memory.
    pub(crate) fn file_checked(&self, index: usize, tensors: Option<Arc<TensorMap>>) -> Handover {
        let mut state = self.state();
        state.files_left = state.files_left.saturating_sub(1);
        if let (Some(map), Some(file)) = (tensors, state.files.get_mut(index)) {
            file.planned.tensors = Some(Arc::new(FileTensors { map, chosen: None }));
        }
        if let Some(memory) = state.last_memory_of(index).and_then(|memory| state.memories.get_mut(memory)) {
            memory.unchecked = memory.unchecked.saturating_sub(1);
        }
        self.hand_over(&mut state)
    }

    /// A step down the ladder was taken.
    pub(crate) fn stepped_down(&self, fallback: Fallback) {
        let path = fallback.file_index.and_then(|index| self.path(index)).map(|path| path.display().to_string());
        tracing::warn!(load = self.id.0, path, from = %fallback.from, to = %fallback.to, errno = dmabuf::errno::describe(fallback.errno), "{}", fallback.reason());
        count(&self.counters.fallbacks);
        self.state().fallbacks.push(fallback);
    }

    /// There is less staging than the load may use.
    pub(crate) fn less_staging(&self, bytes: u64, errno: Errno) {
        let errno = dmabuf::errno::describe(errno);
        tracing::warn!(load = self.id.0, bytes, errno, "no memory for more staging: fewer reads at once");
        let note = format!("no memory for more than {bytes} bytes of staging ({errno}): fewer reads were in flight at once");
        self.state().notes.push(note);
    }

    /// No thread could be had for its copies, or for its observer.
    pub(crate) fn no_thread(&self) {
        let note = "no thread could be had beside the ring's: reads waited for copies and observers";
        tracing::warn!(load = self.id.0, "{note}");
        self.state().notes.push(note.to_owned());
    }

    /// A read failed, and is tried once more. When that helps, the report is all that tells of a medium that is going bad.
    pub(crate) fn retried(&self, retried: &Retried) {
        let Retried { file, offset, bytes, errno } = *retried;
        let path = self.path(file).map(|path| path.display().to_string()).unwrap_or_default();
        let errno = dmabuf::errno::describe(errno);
        tracing::warn!(load = self.id.0, path, offset, bytes, errno, "a read failed, and is tried once more");
        count(&self.counters.retried_reads);
        let mut state = self.state();
        state.retried += 1;
        if state.retried <= RETRIES_TOLD {
            state.notes.push(format!("{path}: reading {bytes} bytes at offset {offset} failed once: {errno}"));
        }
    }

    /// The ring thread did something for a piece; its clock began at `epoch`.
    pub(crate) fn traced(&self, number: usize, span: crate::ring::Span, epoch: Instant) {
        let mut state = self.state();
        let Some((file_index, segment)) = state.place_of(number) else { return };
        let (start, end) = (epoch + span.start, epoch + span.end);
        let event = self.event(span.kind, start, end, file_index, segment, span.bytes);
        state.trace.push(event);
    }

    fn event(&self, kind: TraceKind, start: Instant, end: Instant, file_index: usize, segment: usize, bytes: u64) -> TraceEvent {
        let since = |moment: Instant| moment.saturating_duration_since(self.started);
        TraceEvent { kind, start: since(start), end: since(end), file_index, segment, bytes }
    }

    /// The driver has forgotten the load, which took this long to read.
    pub(crate) fn gone(&self, times: Times) -> Handover {
        let mut state = self.state();
        state.times = Some(times);
        self.hand_over(&mut state)
    }

    /// Ends the load with an error. Only the first one is told.
    pub(crate) fn fail(&self, error: Error) {
        let mut state = self.state();
        self.abandoned.store(true, Ordering::Release);
        if let Some(events) = state.events.take() {
            tracing::debug!(load = self.id.0, %error, "load failed");
            self.span.record("error", tracing::field::display(&error));
            count(&self.counters.failed);
            let _ = events.send(Event::Failed(error));
        }
        // What was full but not handed over goes now; what is being filled belongs to the driver.
        state.memories.clear();
        state.files.clear();
    }

    /// Nobody wants it any more: before its end, or after.
    pub(crate) fn dropped(&self) {
        let was_going = self.state().events.take().is_some();
        if was_going {
            count(&self.counters.dropped);
        }
    }

    /// The same, told by the driver.
    pub(crate) fn fail_for(&self, failure: Failure) {
        let path = |file: usize| self.path(file).map(|path| path.as_ref().clone()).unwrap_or_default();
        let error = match failure {
            Failure::Read { file, offset, bytes, route, errno } => Error::Read { path: path(file), offset, bytes, route, errno },
            Failure::Refused { file, offset, route, attempt, errno } => {
                Error::Refused { path: path(file), offset, route, attempt, errno }
            }
            Failure::Rejected { file, offset, bytes } => {
                let rejection = self.observation.as_ref().map(|observation| observation.watch.rejection());
                match rejection.unwrap_or_else(|| "".into()) {
                    Rejection::Reason(reason) => Error::Rejected { path: path(file), offset, bytes, reason },
                    Rejection::Corrupt { offset, bytes, expected, found, tensors } => {
                        Error::Corrupt { path: path(file), offset, bytes, expected, found, tensors }
                    }
                }
            }
            Failure::Kernel { errno } => Error::Ring { errno },
            Failure::Staging { bytes, errno } => {
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                self.memory_error(dmabuf::Error::new("allocate a staging buffer", bytes, errno))
            }
            Failure::Ended { file, offset, route } => {
                let planned_bytes = self.state().files.get(file).map_or(0, |file| file.planned.identity.bytes);
                Error::Ended { path: path(file), offset, planned_bytes, route }
            }
        };
        self.fail(error);
    }

    /// The error for memory that could not be had.
    pub(crate) fn memory_error(&self, refusal: dmabuf::Error) -> Error {
        Error::Memory {
            heap: self.heap.to_string(),
            refusal,
            loaded_bytes: self.allocated_bytes.load(Ordering::Relaxed),
            planned_bytes: self.planned_bytes.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn progress(&self) -> Progress {
        Progress {
            planned_bytes: self.planned_bytes.load(Ordering::Relaxed),
            allocated_bytes: self.allocated_bytes.load(Ordering::Relaxed),
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
        }
    }

    /// Hands over what is complete and next in order; after the last segment, the end.
    fn hand_over(&self, state: &mut State) -> Handover {
        let Some(events) = state.events.clone() else { return Handover::Over };
        while let Some(segment) = self.next_segment(state) {
            state.first_segment.get_or_insert_with(|| self.started.elapsed());
            state.handed += 1;
            count(&self.counters.segments);
            let memory = state.plan.segments.get(segment.index()).and_then(|planned| state.memories.get(planned.memory));
            let waited = memory.and_then(|memory| memory.full_at).map(|full_at| full_at.elapsed()).unwrap_or_default();
            self.counters.after_kernel.add(waited);
            let (index, file, bytes) = (segment.index(), segment.file_index(), segment.len());
            let waited_us = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
            tracing::debug!(parent: &self.span, load = self.id.0, segment = index, file, bytes, waited_us, "segment handed over");
            let place = state.plan.segments.get(index).map(|planned| planned.memory);
            let last =
                place.and_then(|place| state.plan.memories.get(place)).is_some_and(|memory| memory.segments.end == index + 1);
            if let Some(memory) = place.filter(|_| last).and_then(|place| state.memories.get_mut(place)) {
                memory.span = Span::none();
            }
            if self.options.trace {
                let (now, bytes) = (Instant::now(), segment.len() as u64);
                let event = self.event(TraceKind::HandOver, now, now, segment.file_index(), segment.index(), bytes);
                state.trace.push(event);
            }
            let _ = events.send(Event::Segment(segment));
        }
        let Some(times) = state.times.filter(|_| state.handed == state.plan.segments.len() && state.files_left == 0) else {
            return Handover::Going;
        };
        let report = self.report(state, times);
        tracing::debug!(load = self.id.0, bytes = report.bytes, route = %report.route, "load finished");
        let files = state.files.drain(..).zip(self.sources()).zip(&state.plan.files);
        let files = files.map(|((file, source), parts)| FinishedFile {
            path: Arc::clone(&source.path),
            bytes: file.planned.identity.bytes,
            part: file.planned.part,
            tensors: file.planned.tensors,
            has_segments: parts.first_segment.is_some(),
        });
        let files = files.collect();
        state.events = None;
        count(&self.counters.finished);
        self.span.record("bytes", report.bytes);
        let _ = events.send(Event::Done(Box::new(Finished { report, files })));
        Handover::Over
    }

    /// The segment whose turn it is, once its memory is ready.
    fn next_segment(&self, state: &State) -> Option<Segment> {
        let index = state.handed;
        let planned = state.plan.segments.get(index)?;
        let file = &state.files.get(planned.file)?.planned;
        let memory = state.memories.get(planned.memory).filter(|memory| memory.is_ready())?;
        let sharing = &state.plan.memories.get(planned.memory)?.segments;
        let mut cell = memory.cell.lock().unwrap_or_else(PoisonError::into_inner);
        // After the last one it belongs to the consumer alone.
        let backing = if index + 1 == sharing.end { cell.take()? } else { Arc::clone(cell.as_ref()?) };
        drop(cell);
        if index == sharing.start {
            if let Some(memfd) = backing.parts().and_then(|(_, memory)| memory.memfd()) {
                // Whoever else has its descriptor (a heap of the caller's may) can't write to it from now on. Before Linux 5.1
                // there is no such seal, and the promise is the heap's alone.
                let _ = memfd.seal_against_writes();
            }
            // Once: whoever gets the first segment may hand it out before the second one is made.
            backing.allow_reuse();
            backing.allow_fork();
        }
        let place = Place {
            index,
            file_index: planned.file,
            span: planned.span,
            tensors: file.tensors.clone(),
            path: Arc::clone(self.path(planned.file)?),
            file_bytes: file.identity.bytes,
            part: file.part.clone(),
            file_range: planned.moved.clone().unwrap_or_else(|| planned.file_range.clone()),
            memory_offset: usize::try_from(planned.memory_offset).ok()?,
            memory_bytes: usize::try_from(planned.memory_bytes).ok()?,
        };
        // SAFETY: `pieces_left` of its memory is 0, so the driver has given back every piece of it: all bytes were read, and
        // no read is in flight. Pieces drop their share of the backing unread, and the cell's is for segments like this one.
        Some(unsafe { Segment::new(place, Arc::clone(&self.heap), backing) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
