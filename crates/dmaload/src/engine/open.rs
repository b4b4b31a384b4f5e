//! The first job of a load: opens large files and reads their headers, inspects small files, and
//! makes the plan.

use std::sync::Arc;
use std::{fs, mem};

use dmabuf::{AddressRange, printable};

use super::allocation::FilePlan;
use super::heap_code::HeapCode;
use super::jobs::Jobs;
use super::state::LoadShared;
use super::ways::Choosing;
use super::{Engine, descriptors};
use crate::engine::schedule::LoadNeeds;
use crate::error::{Error, Result};
use crate::files::expand::{self, Choice, Found};
use crate::files::header::read_header;
use crate::files::source::{OpenFile, SourceFile, identify};
use crate::memory::headroom::headroom;
use crate::memory::heap::{AnonHeap, SizeLimit};
use crate::model::TensorMap;
use crate::options::choices::Layout;
use crate::options::choices::{ImporterLimits, Prefer};
use crate::options::load::{LARGEST_SEGMENT_BYTES, LoadOptions};
use crate::options::observer::VERIFIER;
use crate::plan::select::{ChosenTensors, Selected, Selector, tensor_spans};
use crate::plan::tensors::FileTensors;
use crate::plan::{MOST_PIECES, Plan, Shape, Span};
use crate::ring::{LoadSpec, can_read_buffered};
use crate::route::{Attempt, Fallback, Route};
use crate::support::errno;
use crate::support::foreign;
use crate::telemetry::report::Way;

/// The maximum number of files in a load that stay open after planning. The others are opened
/// again for their first batch, so a load of thousands of files stays within the open-file limit.
const KEPT_OPEN: usize = 8;

impl Engine {
    /// Opens and plans a load, and announces it to the ring thread.
    pub(super) fn open(&self, load: &Arc<LoadShared>, heap: &HeapCode) {
        let place = OpenPlace(&self.jobs);
        let limit = heap.call(load.heap(), |heap| heap.size_limit());
        let planned = limit.and_then(|limit| plan_all(self, load, limit));
        let Some(planned) = planned.map_err(|error| self.fail(load, error)).ok().filter(|_| !load.is_over()) else {
            return;
        };
        let Planned { plan, range, files, fallbacks } = planned;
        let memory_bytes: u64 = plan.memories.iter().map(|memory| memory.bytes).sum();
        let largest_bytes = plan.memories.iter().map(|memory| memory.bytes).max().unwrap_or(0);
        let reserved_bytes = if load.keep { memory_bytes } else { largest_bytes };
        let limit_bytes = self.settings.memory_limit_bytes;
        // A consumer that streams tensors holds all allocations that contain a tensor until the
        // tensor's last byte is read.
        let tensor_bytes = if load.keep { 0 } else { largest_tensor(&plan, &files) };
        let reserved_bytes = if tensor_bytes <= limit_bytes { reserved_bytes.max(tensor_bytes) } else { reserved_bytes };
        if tensor_bytes > limit_bytes {
            let error = Error::OverLimit { wanted_bytes: tensor_bytes, limit_bytes, why: "the memory of a tensor" };
            let _ = load.tensor_over_limit.set(error);
        }
        // Only a stream can exceed the limit here: `check_size` has refused any load that keeps
        // all its segments and would exceed it.
        if reserved_bytes > limit_bytes {
            return self.fail(load, Error::OverLimit { wanted_bytes: reserved_bytes, limit_bytes, why: "a segment" });
        }
        let ahead_bytes = (!load.keep).then(|| self.ahead_bytes(largest_bytes));
        fallbacks.iter().for_each(|fallback| load.emit_fallback(fallback));
        load.set_choosing(self.begin_choosing(load, &plan, &files));
        let (pieces, batches) = load.set_plan(plan, range, files, fallbacks);
        if pieces == 0 {
            // The load is already complete, or has ended in the meantime.
            return self.queue_delivery(load);
        }
        let LoadOptions { chunk_bytes, strict, trace, priority, .. } = load.options;
        let observation = load.observation.clone();
        let spec = LoadSpec { id: load.id, pieces, chunk_bytes, strict, trace, observation };
        self.ring.begin(spec, Arc::clone(&load.abandoned));
        // From now on, an event from the ring frees the place.
        mem::forget(place);
        self.jobs.opened(load.id, LoadNeeds { batches, reserved_bytes, ahead_bytes, priority });
        if load.keep {
            // Deliver the list of files, because a consumer may be waiting for their tensors.
            self.queue_delivery(load);
        }
    }

    /// Decides how the batches of a load are read: all in the same way, or the first ones in
    /// different ways, to measure which way is the fastest.
    fn begin_choosing(&self, load: &LoadShared, plan: &Plan, files: &[FilePlan]) -> Choosing {
        let LoadOptions { route, prefer, .. } = load.options;
        if route.is_some() || load.is_observed_in_staging() || prefer == Prefer::Cpu {
            let start = load.starting_route();
            // A ring can only read into populated memory, even when it reads through the page
            // cache.
            let direct = start < Route::Bounce || start == Route::UringBuffered && !load.is_observed_in_staging();
            return Choosing::fixed(if direct { Way::Direct } else { Way::Staged });
        }
        // This heap allocates memory together with its pages, so there is nothing for copiers to
        // populate. The memory may turn out not to be pinnable, but only the first read into it
        // shows that.
        if self.facts.allocates_at_once {
            return Choosing::fixed(Way::Direct);
        }
        let mut mounts = files.iter().map(|file| file.identity.mount());
        let Some(mount) = mounts.next() else { return Choosing::fixed(Way::Direct) };
        // Checking one open file is enough: restrictions apply to a whole file system, and loads
        // from several file systems are not measured (see below).
        let open = files.iter().find_map(|file| file.open.as_ref());
        if open.is_some_and(|file| file.in_memory) {
            return Choosing::fixed(Way::Direct);
        }
        let may_be_slow = open.is_some_and(|file| file.ring_refused.is_some());
        let buffered = may_be_slow
            && !load.options.strict
            && open.is_some_and(|file| file.ring_refused_to(Route::UringBuffered).is_none())
            && can_read_buffered();
        let mut choices = self.choices();
        let ways = choices.ways(may_be_slow, buffered);
        if mounts.any(|other| other != mount) {
            return Choosing::fixed(ways.expected);
        }
        let batches: Vec<_> = plan.batches.iter().map(|batch| batch.bytes).collect();
        choices.begin(load.id, mount, ways, &batches, |other| !self.jobs.is_scheduled(other))
    }

    /// Returns how much memory a stream may allocate ahead of its consumer: a full window plus a
    /// segment that is waiting for its last reads, or half of the available memory if that is
    /// less.
    fn ahead_bytes(&self, largest_bytes: u64) -> u64 {
        let usual = self.settings.window_bytes.saturating_add(largest_bytes);
        headroom().map_or(usual, |seen| usual.min(seen.available_bytes / 2))
    }

    /// Refuses loads that can't fit into memory, and returns the shape to plan with. Looks only at
    /// the lengths of the spans, and runs before a plan is made, because a file may claim any
    /// length and the cost of planning grows with the length.
    fn check_size(&self, load: &LoadShared, shape: Shape, spans: &[Span], alignments: &[u64]) -> Result<Shape> {
        let length = |span: &Span| span.range.end - span.range.start;
        let memory = |span: &Span| {
            let alignment = alignments.get(span.file).copied().unwrap_or(1);
            length(span).checked_next_multiple_of(alignment).unwrap_or(u64::MAX)
        };
        let memory_bytes = spans.iter().map(memory).fold(0, u64::saturating_add);
        let limit_bytes = self.settings.memory_limit_bytes;
        if load.keep && memory_bytes > limit_bytes {
            return Err(Error::OverLimit { wanted_bytes: memory_bytes, limit_bytes, why: "all of the load" });
        }
        // A stream whose consumer drops used segments may be larger than memory, but no single
        // segment may.
        let largest = |span: &Span| match load.options.layout {
            Layout::Segmented | Layout::Tensors if !span.single => memory(span).min(shape.segment_bytes),
            Layout::Segmented | Layout::Tensors | Layout::Single => memory(span),
        };
        let at_once = if load.keep { memory_bytes } else { spans.iter().map(largest).max().unwrap_or(0) };
        // Assume that all memory in the pool can be reused. If some of it has the wrong size, new
        // memory is allocated instead, and each allocation checks the headroom again.
        self.check_headroom(at_once.saturating_sub(self.reaper.pooled_bytes()))?;
        let mut shape = shape;
        // For very long files, use larger batches, up to the size of a segment.
        while shape.count_pieces(spans.iter().map(length)) > MOST_PIECES && shape.batch_bytes < shape.segment_bytes {
            shape.batch_bytes = shape.batch_bytes.saturating_mul(2).min(shape.segment_bytes);
        }
        let pieces = shape.count_pieces(spans.iter().map(length));
        if pieces > MOST_PIECES {
            let (bytes, segment_bytes) = (spans.iter().map(length).fold(0, u64::saturating_add), shape.segment_bytes);
            return Err(Error::TooManyPieces { bytes, segment_bytes, pieces, most_pieces: MOST_PIECES });
        }
        Ok(shape)
    }
}

/// A load's place among the open loads. Dropping it frees the place, even if a panic unwinds the
/// stack.
struct OpenPlace<'a>(&'a Jobs<Arc<LoadShared>>);

impl Drop for OpenPlace<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[derive(Debug)]
struct Planned {
    plan: Plan,
    range: Option<Arc<AddressRange>>,
    files: Vec<FilePlan>,
    fallbacks: Vec<Fallback>,
}

fn plan_all(engine: &Engine, load: &LoadShared, limit: Option<SizeLimit>) -> Result<Planned> {
    let (settings, allocates_at_once) = (&engine.settings, engine.facts.allocates_at_once);
    let (share_bytes, memory_limit_bytes) = (settings.share_bytes(), settings.memory_limit_bytes);
    let options = &load.options;
    // If the heap populates a whole allocation at once, the window must count all of it. The
    // layout `single` is an exception: its allocation may be larger than the window, so it would
    // never get a permit.
    let at_once = allocates_at_once && options.layout != Layout::Single;
    // Limit segments to an eighth of the window, so several allocations can proceed at the same
    // time.
    let part_of_window = at_once.then_some(settings.window_bytes / 8);
    // Several segments of a stream must fit into the available memory.
    let part_of_room = if load.keep { None } else { headroom().map(|seen| seen.available_bytes / 8) };
    let limits = limit.as_ref().map(|limit| limit.bytes).into_iter().chain(share_bytes).chain(part_of_window);
    let limits = limits.chain(part_of_room).min();
    let mut selector = if options.select.is_partial() { Some(Selector::new(&options.select)?) } else { None };
    let Found { sources, notes } = expand::find_files(&load.inputs(), Choice::new(options, selector.as_ref()))?;
    notes.into_iter().for_each(|note| load.note(Some(note)));
    load.set_sources(sources);
    let mut segment_bytes = options.segment_bytes_within(limits);
    if load.keep && !at_once && options.segment_bytes.is_none() && options.layout != Layout::Single {
        segment_bytes = segments_for_descriptors(load, segment_bytes, limits, options.packed);
    }
    let batch_bytes = if at_once { segment_bytes } else { settings.batch_bytes().min(segment_bytes) };
    // If tensors must be aligned to more than a page, spans do not share allocations.
    let packed = options.packed && options.importer.alignment_bytes <= dmabuf::page_bytes() as u64;
    let batch_files = descriptors::max_batch_files();
    let shape = Shape { layout: options.layout, segment_bytes, batch_bytes, packed, batch_files };
    let heap_most = limit.as_ref().map_or(u64::MAX, |limit| limit.bytes);
    let single_bytes = options.importer.max_segment_bytes.min(heap_most).min(memory_limit_bytes);
    let (mut files, mut spans, mut fallbacks, mut kept_open) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let mut cuts: Vec<Option<TensorMap>> = Vec::new();
    let route = starting_route(load)?;
    for (index, source) in load.sources().iter().enumerate() {
        if load.is_over() {
            break;
        }
        let planned = plan_file(load, (&shape, single_bytes), selector.as_mut(), index, source, route)?;
        let PlannedFile { plan: mut planned, spans: own, fallback, cut } = planned;
        cuts.push(cut);
        kept_open += usize::from(planned.open.is_some());
        if kept_open > KEPT_OPEN.min(batch_files) {
            planned.open = None;
        }
        files.push(planned);
        spans.extend(own.into_iter().map(|span| Span { file: index, ..span }));
        fallbacks.extend(fallback);
    }
    if let Some(selector) = &selector {
        selector.check_all_matched()?;
        selector.notes().into_iter().for_each(|note| load.note(Some(note)));
    }
    // Check now only if all headers have been read. The headers of small files are read later, and
    // a load of a byte range reads no headers.
    let is_read = selector.as_ref().is_none_or(|selector| selector.needs_tensors() || selector.cuts_bytes());
    if is_read && !load.is_over() && !files.iter().any(|file| file.small) {
        let own = files.iter().map(|file| file.tensors.as_deref().map(|tensors| &*tensors.map));
        let maps = own.zip(&cuts).map(|(own, cut)| own.or(cut.as_ref()));
        load.check_whole(maps)?.into_iter().for_each(|note| load.note(Some(note)));
    }
    // Read spans in the order in which their classes were requested, regardless of which files
    // they are in.
    spans.sort_by_key(|span| span.class);
    let reserve = |bytes| match usize::try_from(bytes).unwrap_or(usize::MAX) {
        0 => Ok(None),
        bytes => AddressRange::reserve(bytes).map(Some).map_err(|error| load.memory_error(error)),
    };
    let alignments: Vec<_> = files.iter().map(|file| file.alignment_bytes).collect();
    // Check memory before reserving addresses: memory is the tighter limit, and its error contains
    // the numbers.
    let shape = engine.check_size(load, shape, &spans, &alignments)?;
    // Reserve the addresses before making the plan, so that files that exceed the address space,
    // as sparse ones can, fail without the cost of a plan.
    reserve(spans.iter().fold(0, |sum: u64, span| sum.saturating_add(span.range.end - span.range.start)))?;
    let plan = Plan::new(&alignments, &spans, shape);
    let range = reserve(plan.memory_bytes)?;
    if let Some(limit) = limit
        && let Some(segment) = plan.segments.iter().find(|segment| segment.memory_bytes > limit.bytes)
        && let Some(path) = load.path(segment.file)
    {
        let (path, heap) = (path.as_ref().clone(), load.heap().to_owned());
        return Err(Error::TooLarge { path, heap, wanted_bytes: segment.memory_bytes, limit });
    }
    check_importer(&plan, options.importer)?;
    begin_verifying(load, &files)?;
    Ok(Planned { plan, range, files, fallbacks })
}

/// Returns the segment size: `segment_bytes`, or a larger size if the load would otherwise need
/// more allocations than there are descriptors. Adds a note in that case.
fn segments_for_descriptors(load: &LoadShared, segment_bytes: u64, most: Option<u64>, packed: bool) -> u64 {
    // Anonymous memory needs no descriptors.
    if load.heap() == AnonHeap::NAME {
        return segment_bytes;
    }
    // Files that can't be inspected are reported when they are opened.
    let length = |source: &SourceFile| source.part.clone().map(|part| part.end.saturating_sub(part.start));
    let lengths: Vec<_> = load
        .sources()
        .iter()
        .filter_map(|source| length(source).or_else(|| fs::metadata(source.path.as_path()).ok().map(|about| about.len())))
        .collect();
    let available = descriptors::max_allocations();
    let most = most.unwrap_or(u64::MAX).min(LARGEST_SEGMENT_BYTES);
    let mut larger = segment_bytes;
    while count_allocations(&lengths, larger, packed) > available && larger.saturating_mul(2) <= most {
        larger *= 2;
    }
    if larger > segment_bytes {
        load.note(Some(format!(
            "segments of up to {larger} bytes instead of {segment_bytes}: the open-file limit (ulimit -n) allows only {available} allocations"
        )));
    }
    larger
}

/// Estimates how many allocations are needed for files of these lengths.
fn count_allocations(lengths: &[u64], segment_bytes: u64, packed: bool) -> u64 {
    let shape = Shape { layout: Layout::Segmented, segment_bytes, batch_bytes: segment_bytes, packed, batch_files: 1 };
    let (small, large): (Vec<u64>, Vec<u64>) = lengths.iter().partition(|&&bytes| shape.shares_memory(bytes));
    let shared = small.into_iter().fold(0, u64::saturating_add);
    // Only files of up to a quarter of a segment share allocations, so at most a quarter of an
    // allocation stays empty because the next file does not fit.
    shared.div_ceil(segment_bytes / 4 * 3) + shape.count_pieces(large.into_iter())
}

/// Returns the largest amount of memory that any tensor needs: the total size of the allocations
/// that contain it.
fn largest_tensor(plan: &Plan, files: &[FilePlan]) -> u64 {
    let mut largest = 0;
    for (number, file) in files.iter().enumerate() {
        let Some(tensors) = &file.tensors else { continue };
        // The file's segments in file order. Where segments overlap, any of them will do.
        let mut own: Vec<_> = plan.segments.iter().filter(|segment| segment.file == number).collect();
        own.sort_by_key(|segment| segment.file_range.start);
        for position in (0..tensors.len()).filter_map(|number| tensors.position_of(number)) {
            let Some(hull) = tensors.part_at(position).map(|part| part.rows.hull()).filter(|hull| !hull.is_empty()) else {
                continue;
            };
            let first = own.partition_point(|segment| segment.file_range.end <= hull.start);
            let mut memories: Vec<_> = own
                .get(first..)
                .unwrap_or_default()
                .iter()
                .take_while(|segment| segment.file_range.start < hull.end)
                .map(|segment| segment.memory)
                .collect();
            memories.dedup();
            let bytes = memories.iter().filter_map(|&memory| plan.memories.get(memory)).map(|memory| memory.bytes).sum();
            largest = largest.max(bytes);
        }
    }
    largest
}

/// Refuses a plan that the importer could not map.
fn check_importer(plan: &Plan, limits: ImporterLimits) -> Result<()> {
    let ImporterLimits { max_segment_bytes, max_segments, .. } = limits;
    let (segments, segment_bytes) = (plan.memories.len(), plan.memories.iter().map(|memory| memory.bytes).max().unwrap_or(0));
    if segments > max_segments || segment_bytes > max_segment_bytes {
        return Err(Error::Importer { segments, segment_bytes, max_segments, max_segment_bytes });
    }
    Ok(())
}

/// Starts the verifier, now that the lengths of the files are known. Refuses to verify or observe
/// a model inside another file.
fn begin_verifying(load: &LoadShared, files: &[FilePlan]) -> Result<()> {
    if load.observation.is_some() && load.sources().iter().any(|source| source.part.is_some()) {
        return Err(Error::Config("a model inside another file can't be verified or observed".to_owned()));
    }
    let (Some(verify), Some(observation)) = (&load.options.verify, &load.observation) else { return Ok(()) };
    let lengths: Vec<_> =
        load.sources().iter().zip(files).map(|(source, file)| (source.path.as_path(), file.identity.bytes)).collect();
    let named = expand::named_among(&load.inputs(), load.sources());
    // The verifier is the caller's code.
    let begun = foreign::call(|| match named {
        Some(named) => {
            let observer = verify.0.begin_for(&lengths, named, load.options.format);
            (verify.0.describe(), observer, verify.0.is_of_one_file())
        }
        None => (verify.0.describe(), verify.0.begin(&lengths, load.options.format), false),
    });
    let (described, observer, is_of_one_file) =
        begun.map_err(|message| Error::Panicked { code: VERIFIER.to_owned(), message })?;
    if let Some((path, _)) = named.and_then(|named| lengths.get(named)).filter(|_| is_of_one_file) {
        load.note(Some(format!("of {} files, only {} was verified", lengths.len(), printable::path(path))));
    }
    assert!(load.verified.set(described).is_ok(), "a load must be planned only once");
    observation.watch.verify_by(observer?);
    Ok(())
}

/// A planned file. Its header was read if planning needed it.
#[derive(Debug)]
struct PlannedFile {
    plan: FilePlan,
    spans: Vec<Span>,
    fallback: Option<Fallback>,
    /// The tensors of a file that is cut at byte offsets. They are not part of the file's plan,
    /// but are needed to check that the model is complete.
    cut: Option<TensorMap>,
}

fn plan_file(
    load: &LoadShared,
    (shape, single_bytes): (&Shape, u64),
    mut selector: Option<&mut Selector>,
    index: usize,
    source: &SourceFile,
    route: Route,
) -> Result<PlannedFile> {
    let (options, path) = (&load.options, source.path.as_path());
    // A file that can't be inspected can't be opened either, and the error from opening is
    // clearer.
    if selector.is_none()
        && source.part.is_none()
        && shape.layout != Layout::Tensors
        && let Ok((identity, alignment_bytes)) = identify(path)
        && shape.shares_memory(identity.bytes)
        // A file whose length is reported as 0 may still have contents: opening it shows that.
        && identity.bytes > 0
    {
        let bytes = identity.bytes;
        let file = FilePlan {
            identity,
            alignment_bytes,
            part: 0..bytes,
            tensors: None,
            read_bytes: bytes,
            wanted_bytes: bytes,
            route,
            small: true,
            open: None,
        };
        return Ok(PlannedFile { plan: file, spans: vec![Span::whole(index, bytes)], fallback: None, cut: None });
    }
    let file = OpenFile::open(path)?;
    let (bytes, alignment_bytes) = (file.identity.bytes, file.alignment_bytes);
    let FileRoute { route, fallback } = route_for(&file, index, 0, load, route)?;
    // A selection by byte range works without knowing the tensors in the range.
    let wants_tensors = selector.as_ref().is_none_or(|selector| selector.needs_tensors());
    let part = source.part.clone().unwrap_or(0..bytes);
    if part.start > part.end || part.end > bytes {
        let reason = format!("the range {part:?} of the model is not within the file, which has {bytes} bytes");
        return Err(Error::Selection { path: path.to_owned(), reason });
    }
    let cuts_bytes = selector.as_ref().is_some_and(|selector| selector.cuts_bytes());
    let find_tensors = || {
        let map = read_header(&file, part.clone(), options.format)?;
        source.check(map.as_ref())?;
        Ok(map)
    };
    let header = if wants_tensors || cuts_bytes {
        find_tensors().map_err(|error| file.blame_change(&file.identity, error))?
    } else {
        None
    };
    let identity = file.identity;
    // If files are cut at byte offsets, the tensors are only used to note which of them are split,
    // and to check that the model is complete.
    let (map, cut) = if wants_tensors { (header.map(Arc::new), None) } else { (None, header) };
    let selected = match &mut selector {
        Some(selector) => selector.select_file(map.as_deref(), |name| source.owns(name), &part, bytes, alignment_bytes),
        None if source.part.is_some() => Ok(Selected::of_range(part.clone(), bytes, alignment_bytes)),
        None => {
            let tensors = map.as_deref().and_then(|map| ChosenTensors::owned(map, |name| source.owns(name)));
            Ok(Selected { tensors: tensors.map(Arc::new), ..Selected::whole(bytes) })
        }
    };
    let selected = selected.map_err(|reason| Error::Selection { path: path.to_owned(), reason })?;
    if let Some(selector) = selector.filter(|_| cuts_bytes) {
        selector.note_cut(cut.as_ref(), &selected, &part);
    }
    let mut spans = selected.spans.clone();
    if let Some(map) = map.as_ref().filter(|_| shape.layout == Layout::Tensors) {
        spans = tensor_spans(&selected, map, bytes, alignment_bytes, shape.segment_bytes, single_bytes, options.importer)?;
    }
    let planned = FilePlan {
        identity,
        alignment_bytes,
        part,
        read_bytes: spans.iter().map(|span| span.range.end - span.range.start).sum(),
        wanted_bytes: selected.wanted_bytes,
        tensors: map.map(|map| Arc::new(FileTensors { map, chosen: selected.tensors })),
        route,
        small: false,
        open: Some(file),
    };
    Ok(PlannedFile { plan: planned, spans, fallback, cut })
}

/// Returns [`LoadShared::starting_route`]. Emits an event if the load starts at a slower route
/// only because its bytes are observed in staging.
///
/// # Errors
/// [`Error::Config`] if the load is strict and starts at a slower route for that reason.
fn starting_route(load: &LoadShared) -> Result<Route> {
    let options = &load.options;
    let route = load.starting_route();
    if !load.is_observed_in_staging() || options.route.is_some_and(|route| route >= Route::Bounce) {
        return Ok(route);
    }
    if options.strict {
        let why = "is uncached, so bytes must be read into staging buffers to be observed";
        return Err(Error::Config(format!(
            "the heap {} {why}: with this heap, a strict load must request the bounce route",
            load.heap()
        )));
    }
    foreign::emit(|| {
        tracing::info!(
            load = load.id.0,
            heap = load.heap(),
            "this heap is uncached: bytes are observed in staging buffers, so all reads go through them"
        );
    });
    Ok(route)
}

/// Returns the best route for reads into staging: the requested route if it is better than bounce,
/// otherwise `uring-fixed-direct`.
pub(super) fn staged_by(options: &LoadOptions) -> Route {
    options.route.filter(|&route| route < Route::Bounce).unwrap_or(Route::UringFixedDirect)
}

/// Returns the best route for reads of this file. A file in memory is read directly by threads
/// unless the load requests a route, and any other file is read directly by a ring.
pub(super) fn best_route(file: &OpenFile, options: &LoadOptions) -> Route {
    if file.in_memory && options.route.is_none() { Route::PreadDirect } else { Route::UringFixedDirect }
}

/// The initial route for reads of a file, and the fallback that led to it.
#[derive(Debug)]
pub(super) struct FileRoute {
    pub(super) route: Route,
    pub(super) fallback: Option<Fallback>,
}

/// Returns the initial route for reads of this file: `from`, or a lower one if `O_DIRECT` was
/// refused, if a ring must not read the file, or if [`best_route`] is lower.
///
/// # Errors
/// [`Error::Refused`] if the load is strict and `from` was refused. If `from` is
/// [`Route::Bounce`], also if the load is strict and a ring must not do the reads into staging.
pub(super) fn route_for(file: &OpenFile, index: usize, offset: u64, load: &LoadShared, from: Route) -> Result<FileRoute> {
    let strict = load.options.strict;
    let staged_by = staged_by(&load.options);
    let step = |from, to, attempt, errno| {
        Some(Fallback { file_index: Some(index), from, to, attempt, errno: errno::from_rustix(errno) })
    };
    let fallback = match (file.direct_refused(), file.ring_refused_to(from)) {
        (_, Some((attempt, errno))) if from == Route::UringBuffered => step(from, Route::Buffered, attempt, errno),
        (Some(errno), _) if from.is_direct() => step(from, Route::Buffered, Attempt::OpenDirect, errno),
        (None, Some((attempt, errno))) if from < Route::PreadDirect => step(from, Route::PreadDirect, attempt, errno),
        // The route stays bounce, but threads read into staging.
        (None, Some((attempt, errno))) if from == Route::Bounce && staged_by < Route::PreadDirect => {
            step(staged_by, Route::PreadDirect, attempt, errno)
        }
        _ => None,
    };
    if let Some(Fallback { to, attempt, errno, .. }) = fallback {
        if strict {
            return Err(Error::Refused { path: file.path.clone(), offset, route: from, attempt, errno });
        }
        return Ok(FileRoute { route: from.max(to), fallback });
    }
    Ok(FileRoute { route: from.max(best_route(file, &load.options)), fallback: None })
}
