//! The first job of a load: opening its files, reading their headers, planning.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use dmabuf::AddressRange;

use super::Engine;
use crate::error::{Error, Result};
use crate::heap::Heap;
use crate::load::{FilePlan, LoadShared};
use crate::model::safetensors::{Sniff, parse, sniff};
use crate::model::{ModelError, TensorMap};
use crate::plan::{Layout, Plan, Shape};
use crate::ring::LoadSpec;
use crate::route::{Attempt, Fallback, Route};
use crate::settings::{Cache, Format, LoadOptions};
use crate::source::OpenFile;

/// Files of a load that stay open from planning on. Those beyond are opened again when their turn comes: a load of
/// thousands of files must fit into the limit of open files.
const KEPT_OPEN: usize = 8;

/// The unit of allocation. Small enough for the first reads to start early and for the window to be fine-grained; large
/// enough that registering and populating cost nothing per call.
const PIECE_BYTES: u64 = 16 << 20;

impl Engine {
    /// Opens and plans a load, and announces it to the ring thread.
    pub(super) fn open(&self, load: &Arc<LoadShared>) {
        let planned = plan_all(load, &*self.heap);
        let Some((files, fallbacks)) = planned.map_err(|error| self.fail(load, error)).ok().filter(|_| !load.is_over()) else {
            return self.end();
        };
        let memory_bytes: u64 = files.iter().map(|file| file.plan.memory_bytes()).sum();
        // What the pool has may serve again; where its sizes do not fit, each allocation looks for itself.
        let memory_bytes = memory_bytes.saturating_sub(self.reaper.pooled_bytes());
        // A stream whose consumer drops what it has used may be larger than memory; one segment may not.
        if let Some(error) =
            self.check_headroom(memory_bytes).err().filter(|_| load.keep || load.options.layout == Layout::Single)
        {
            self.fail(load, error);
            return self.end();
        }
        for fallback in &fallbacks {
            tracing::warn!(load = load.id.0, from = %fallback.from, to = %fallback.to, "{}", fallback.reason());
        }
        let pieces = load.planned(files, fallbacks);
        if pieces.is_empty() {
            self.forget(load.id);
            return self.end();
        }
        let LoadOptions { chunk_bytes, strict, trace, .. } = load.options;
        let observation = load.observation.clone();
        let spec = LoadSpec { id: load.id, pieces: pieces.len(), chunk_bytes, strict, trace, observation };
        self.ring.begin(spec, Arc::clone(&load.abandoned));
        let mut schedule = self.schedule();
        if schedule.loads.contains_key(&load.id) {
            schedule.scheduler.opened(load.id, pieces);
        }
        drop(schedule);
        self.changed.notify_all();
    }
}

fn plan_all(load: &LoadShared, heap: &dyn Heap) -> Result<(Vec<FilePlan>, Vec<Fallback>)> {
    let mut files = Vec::new();
    let mut fallbacks = Vec::new();
    for (index, path) in load.paths.iter().enumerate() {
        if load.is_over() {
            break;
        }
        let (mut planned, fallback) = plan_file(load, heap, index, path)?;
        if index >= KEPT_OPEN {
            planned.open = None;
        }
        files.push(planned);
        fallbacks.extend(fallback);
    }
    Ok((files, fallbacks))
}

fn plan_file(load: &LoadShared, heap: &dyn Heap, index: usize, path: &Path) -> Result<(FilePlan, Option<Fallback>)> {
    let options = &load.options;
    let file = OpenFile::open(path)?;
    let (route, fallback) = starting_route(&file, index, load)?;
    let cached = options.cache == Cache::Auto && !options.strict && route.is_direct() && file.is_wholly_cached();
    if cached {
        tracing::info!(load = load.id.0, path = %path.display(), "wholly in the page cache: copied from there");
    }
    let route = if cached { Route::Buffered } else { route };
    let tensors = read_header(&file, options.format)?.map(Arc::new);
    let limit = heap.size_limit();
    let segment_bytes = options.segment_bytes_within(limit.as_ref().map(|limit| limit.bytes));
    // Where a segment's memory comes all at once, the window has to count all of it. (Not for a whole file: it may be larger
    // than the window, and nobody could load it.)
    let at_once = heap.allocates_at_once() && options.layout == Layout::Segmented;
    let shape = Shape {
        layout: options.layout,
        segment_bytes,
        piece_bytes: if at_once { segment_bytes } else { PIECE_BYTES.min(segment_bytes) },
        alignment_bytes: file.alignment_bytes,
    };
    // Addresses come first: a file too large for them (sparse ones can be) is not worth a plan of its size.
    let memory_bytes = usize::try_from(file.identity.bytes.next_multiple_of(file.alignment_bytes)).unwrap_or(usize::MAX);
    let range = match memory_bytes {
        0 => None,
        bytes => Some(AddressRange::reserve(bytes).map_err(|error| load.memory_error(error))?),
    };
    let plan = Plan::new(file.identity.bytes, shape);
    debug_assert_eq!(plan.memory_bytes(), memory_bytes as u64);
    if let (Some(limit), Some(wanted_bytes)) = (limit, plan.segments.iter().map(|segment| segment.memory_bytes).max())
        && wanted_bytes > limit.bytes
    {
        return Err(Error::TooLarge { path: path.to_owned(), heap: load.heap().to_owned(), wanted_bytes, limit });
    }
    let mut identity = file.identity;
    identity.may_grow = tensors.is_none();
    let alignment_bytes = file.alignment_bytes;
    Ok((FilePlan { identity, alignment_bytes, plan, tensors, range, route, cached, open: Some(file) }, fallback))
}

/// The route that reads of this file start at: what was asked for; bounce for what is observed in staging; buffered where
/// `O_DIRECT` is refused.
fn starting_route(file: &OpenFile, index: usize, load: &LoadShared) -> Result<(Route, Option<Fallback>)> {
    let options = &load.options;
    let mut route = options.route;
    if route < Route::Bounce && load.is_observed_in_staging() {
        if options.strict {
            let why = "is not cached by the CPU, so what is observed goes through staging";
            return Err(Error::Config(format!("the heap {} {why}: a strict load must ask for the route bounce", load.heap())));
        }
        tracing::info!(load = load.id.0, heap = load.heap(), "observed in staging: every read is bounced");
        route = Route::Bounce;
    }
    let refused = file.direct_refused().filter(|_| route.is_direct());
    let Some(errno) = refused else { return Ok((route, None)) };
    let (from, to, attempt) = (route, Route::Buffered, Attempt::OpenDirect);
    if options.strict {
        return Err(Error::Refused { path: file.path.clone(), offset: 0, route: from, attempt, errno });
    }
    Ok((to, Some(Fallback { file_index: Some(index), from, to, attempt, errno })))
}

/// Reads and checks a safetensors header; `None` for a file of raw bytes.
pub(crate) fn read_header(file: &OpenFile, format: Format) -> Result<Option<TensorMap>> {
    let bytes = file.identity.bytes;
    let wrong = |fault| Error::Model { path: file.path.clone(), fault };
    // An empty file has nothing to be wrong; whoever asks it for a tensor is told.
    if format == Format::Raw || (format == Format::Auto && bytes == 0) {
        return Ok(None);
    }
    let mut start = [0; 9];
    let start = start.get_mut(..usize::try_from(bytes.min(9)).unwrap_or(9)).unwrap_or_default();
    file.read_exact(start, 0)?;
    let named = file.path.extension() == Some(OsStr::new("safetensors"));
    match sniff(start, bytes, named || format == Format::Safetensors) {
        Sniff::Safetensors { header_bytes } => {
            let mut header = header_buffer(header_bytes).map_err(wrong)?;
            file.read_exact(&mut header, 8)?;
            parse(&header, bytes).map(Some).map_err(wrong)
        }
        Sniff::Broken { error } => Err(wrong(error)),
        Sniff::Not { .. } => Ok(None),
    }
}

/// At most [`crate::model::safetensors::HEADER_LIMIT_BYTES`]: `sniff` has checked.
fn header_buffer(header_bytes: u64) -> Result<Vec<u8>, ModelError> {
    Ok(vec![0; usize::try_from(header_bytes).unwrap_or(0)])
}
