//! The first job of a load: opening its large files and reading their headers, looking at its small ones, planning.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use dmabuf::AddressRange;

use rustix::io::Errno;

use super::Engine;
use crate::error::{Error, Result};
use crate::heap::Heap;
use crate::load::{FilePlan, LoadShared};
use crate::model::TensorMap;
use crate::model::safetensors::{Sniff, parse, sniff};
use crate::plan::{FileShape, Layout, Plan, Shape};
use crate::ring::LoadSpec;
use crate::route::{Attempt, Fallback, Route};
use crate::settings::{Cache, Format, LoadOptions};
use crate::source::{OpenFile, look_at};

/// Files of a load that stay open from planning on. Those beyond are opened again when their turn comes: a load of
/// thousands of files must fit into the limit of open files.
const KEPT_OPEN: usize = 8;

/// What is allocated and populated at once. Small enough for the first reads to start early and for the window to be fine-grained; large
/// enough that registering and populating cost nothing per call.
const BATCH_BYTES: u64 = 16 << 20;

impl Engine {
    /// Opens and plans a load, and announces it to the ring thread.
    pub(super) fn open(&self, load: &Arc<LoadShared>) {
        let planned = plan_all(load, &*self.heap);
        let Some(planned) = planned.map_err(|error| self.fail(load, error)).ok().filter(|_| !load.is_over()) else {
            return self.jobs.end();
        };
        let Planned { plan, range, files, fallbacks } = planned;
        let memory_bytes: u64 = plan.memories.iter().map(|memory| memory.bytes).sum();
        // What the pool has may serve again; where its sizes do not fit, each allocation looks for itself.
        let memory_bytes = memory_bytes.saturating_sub(self.reaper.pooled_bytes());
        // A stream whose consumer drops what it has used may be larger than memory; one segment may not.
        if let Some(error) =
            self.check_headroom(memory_bytes).err().filter(|_| load.keep || load.options.layout == Layout::Single)
        {
            self.fail(load, error);
            return self.jobs.end();
        }
        for fallback in &fallbacks {
            tracing::warn!(load = load.id.0, from = %fallback.from, to = %fallback.to, "{}", fallback.reason());
        }
        let (pieces, batches) = load.planned(plan, range, files, fallbacks);
        if pieces == 0 {
            self.jobs.forget(load.id);
            return self.jobs.end();
        }
        let LoadOptions { chunk_bytes, strict, trace, .. } = load.options;
        let observation = load.observation.clone();
        let spec = LoadSpec { id: load.id, pieces, chunk_bytes, strict, trace, observation };
        self.ring.begin(spec, Arc::clone(&load.abandoned));
        self.jobs.opened(load.id, batches);
    }
}

#[derive(Debug)]
struct Planned {
    plan: Plan,
    range: Option<Arc<AddressRange>>,
    files: Vec<FilePlan>,
    fallbacks: Vec<Fallback>,
}

fn plan_all(load: &LoadShared, heap: &dyn Heap) -> Result<Planned> {
    let options = &load.options;
    let limit = heap.size_limit();
    let segment_bytes = options.segment_bytes_within(limit.as_ref().map(|limit| limit.bytes));
    // Where a memory's pages come all at once, the window has to count all of it. (Not for a whole file: it may be larger
    // than the window, and nobody could load it.)
    let at_once = heap.allocates_at_once() && options.layout == Layout::Segmented;
    let batch_bytes = if at_once { segment_bytes } else { BATCH_BYTES.min(segment_bytes) };
    let shape = Shape { layout: options.layout, segment_bytes, batch_bytes, packed: options.packed };
    let (mut files, mut fallbacks, mut kept_open) = (Vec::new(), Vec::new(), 0);
    let route = starting_route(load)?;
    for (index, path) in load.paths.iter().enumerate() {
        if load.is_over() {
            break;
        }
        let (mut planned, fallback) = plan_file(load, &shape, index, path, route)?;
        kept_open += usize::from(planned.open.is_some());
        if kept_open > KEPT_OPEN {
            planned.open = None;
        }
        files.push(planned);
        fallbacks.extend(fallback);
    }
    let shapes: Vec<_> =
        files.iter().map(|file| FileShape { bytes: file.identity.bytes, alignment_bytes: file.alignment_bytes }).collect();
    let reserve = |bytes| match usize::try_from(bytes).unwrap_or(usize::MAX) {
        0 => Ok(None),
        bytes => AddressRange::reserve(bytes).map(Some).map_err(|error| load.memory_error(error)),
    };
    // Files too large for addresses (sparse ones can be) are not worth a plan of their size.
    reserve(shapes.iter().fold(0, |sum: u64, file| sum.saturating_add(file.bytes)))?;
    let plan = Plan::new(&shapes, shape);
    let range = reserve(plan.memory_bytes)?;
    if let Some(limit) = limit
        && let Some(segment) = plan.segments.iter().find(|segment| segment.memory_bytes > limit.bytes)
        && let Some(path) = load.paths.get(segment.file)
    {
        let (path, heap) = (path.as_ref().clone(), load.heap().to_owned());
        return Err(Error::TooLarge { path, heap, wanted_bytes: segment.memory_bytes, limit });
    }
    begin_verifying(load, &files)?;
    Ok(Planned { plan, range, files, fallbacks })
}

/// What the files are to be is asked when their lengths are known.
fn begin_verifying(load: &LoadShared, files: &[FilePlan]) -> Result<()> {
    let (Some(verify), Some(observation)) = (&load.options.verify, &load.observation) else { return Ok(()) };
    let lengths: Vec<_> = load.paths.iter().zip(files).map(|(path, file)| (path.as_path(), file.identity.bytes)).collect();
    observation.watch.verify_by(verify.0.begin(&lengths, load.options.format)?);
    Ok(())
}

fn plan_file(load: &LoadShared, shape: &Shape, index: usize, path: &Path, route: Route) -> Result<(FilePlan, Option<Fallback>)> {
    let options = &load.options;
    // What can't be looked at can't be opened either, and that error is the better known.
    if let Ok((identity, alignment_bytes)) = look_at(path)
        && shape.packs(identity.bytes)
    {
        let (tensors, cached, small, open) = (None, false, true, None);
        return Ok((FilePlan { identity, alignment_bytes, tensors, route, cached, small, open }, None));
    }
    let file = OpenFile::open(path)?;
    let Chosen { route, cached, fallback } = route_for(&file, index, 0, load, route, options.cache)?;
    let tensors = read_header(&file, options.format)?.map(Arc::new);
    let mut identity = file.identity;
    identity.may_grow = tensors.is_none();
    let alignment_bytes = file.alignment_bytes;
    Ok((FilePlan { identity, alignment_bytes, tensors, route, cached, small: false, open: Some(file) }, fallback))
}

/// The route that reads of a load start at: what was asked for; bounce for what is observed in staging.
fn starting_route(load: &LoadShared) -> Result<Route> {
    let options = &load.options;
    if options.route >= Route::Bounce || !load.is_observed_in_staging() {
        return Ok(options.route);
    }
    if options.strict {
        let why = "is not cached by the CPU, so what is observed goes through staging";
        return Err(Error::Config(format!("the heap {} {why}: a strict load must ask for the route bounce", load.heap())));
    }
    tracing::info!(load = load.id.0, heap = load.heap(), "observed in staging: every read is bounced");
    Ok(Route::Bounce)
}

/// The best way for reads into staging, of loads that are bounced: by a ring, unless something lower was asked for.
pub(super) fn staged_by(options: &LoadOptions) -> Route {
    Some(options.route).filter(|&route| route < Route::Bounce).unwrap_or(Route::UringFixedDirect)
}

/// How a file is read.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) route: Route,
    /// It is wholly in the page cache, and copied from there by choice.
    pub(super) cached: bool,
    pub(super) fallback: Option<Fallback>,
}

/// The route that reads of this file start at: the load's, buffered where `O_DIRECT` is refused, by threads on FUSE, or
/// buffered where it is in the page cache and that is to be used.
pub(super) fn route_for(
    file: &OpenFile,
    index: usize,
    offset: u64,
    load: &LoadShared,
    from: Route,
    cache: Cache,
) -> Result<Chosen> {
    let strict = load.options.strict;
    let staged_by = staged_by(&load.options);
    let step = |from, to, attempt, errno| Some(Fallback { file_index: Some(index), from, to, attempt, errno });
    let fallback = match file.direct_refused() {
        Some(errno) if from.is_direct() => step(from, Route::Buffered, Attempt::OpenDirect, errno),
        None if file.is_on_fuse && from < Route::PreadDirect => {
            step(from, Route::PreadDirect, Attempt::RingOnFuse, Errno::OPNOTSUPP)
        }
        // What is bounced is still bounced, but read into staging by threads.
        None if file.is_on_fuse && from == Route::Bounce && staged_by < Route::PreadDirect => {
            step(staged_by, Route::PreadDirect, Attempt::RingOnFuse, Errno::OPNOTSUPP)
        }
        _ => None,
    };
    if let Some(Fallback { to, attempt, errno, .. }) = fallback {
        if strict {
            return Err(Error::Refused { path: file.path.clone(), offset, route: from, attempt, errno });
        }
        return Ok(Chosen { route: from.max(to), cached: false, fallback });
    }
    let cached = cache == Cache::Auto && !strict && from.is_direct() && file.is_wholly_cached();
    if cached {
        tracing::info!(load = load.id.0, path = %file.path.display(), "wholly in the page cache: copied from there");
    }
    Ok(Chosen { route: if cached { Route::Buffered } else { from }, cached, fallback: None })
}

/// Reads and checks a safetensors header; `None` for a file of raw bytes.
pub(crate) fn read_header(file: &OpenFile, format: Format) -> Result<Option<TensorMap>> {
    let bytes = file.identity.bytes;
    // An empty file has nothing to be wrong; whoever asks it for a tensor is told.
    if format == Format::Raw || (format == Format::Auto && bytes == 0) {
        return Ok(None);
    }
    let mut start = [0; SNIFFED_BYTES];
    let start = start.get_mut(..SNIFFED_BYTES.min(usize::try_from(bytes).unwrap_or(usize::MAX))).unwrap_or_default();
    file.read_exact(start, 0)?;
    let Some(header_bytes) = header_bytes(file, start, bytes, format)? else { return Ok(None) };
    // At most [`crate::model::safetensors::HEADER_LIMIT_BYTES`]: `sniff` has checked.
    let mut header = vec![0; usize::try_from(header_bytes).unwrap_or(0)];
    file.read_exact(&mut header, 8)?;
    parse(&header, bytes).map(Some).map_err(|fault| Error::Model { path: file.path.clone(), fault })
}

/// Finds and checks a safetensors header in a file's bytes; `None` for a file of raw bytes.
pub(super) fn find_header(file: &OpenFile, bytes: &[u8], format: Format) -> Result<Option<TensorMap>> {
    if format == Format::Raw {
        return Ok(None);
    }
    let (start, file_bytes) = (bytes.get(..SNIFFED_BYTES).unwrap_or(bytes), bytes.len() as u64);
    let Some(header_bytes) = header_bytes(file, start, file_bytes, format)? else { return Ok(None) };
    let header = usize::try_from(header_bytes).ok().and_then(|header_bytes| bytes.get(8..)?.get(..header_bytes));
    let header = header.unwrap_or_default();
    parse(header, file_bytes).map(Some).map_err(|fault| Error::Model { path: file.path.clone(), fault })
}

/// What tells a header: its length and its first byte.
const SNIFFED_BYTES: usize = 9;

/// The length of the safetensors header of a file of `file_bytes` bytes; `None` for a file of raw bytes.
fn header_bytes(file: &OpenFile, start: &[u8], file_bytes: u64, format: Format) -> Result<Option<u64>> {
    let named = file.path.extension() == Some(OsStr::new("safetensors"));
    match sniff(start, file_bytes, named || format == Format::Safetensors) {
        Sniff::Safetensors { header_bytes } => Ok(Some(header_bytes)),
        Sniff::Broken { error } => Err(Error::Model { path: file.path.clone(), fault: error }),
        Sniff::Not { .. } => Ok(None),
    }
}
