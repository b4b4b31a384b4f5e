//! The second job of a load, run once per batch: opens the batch's files, gets its memory, and
//! passes its pieces to the ring thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dmabuf::{Access, Errno, Populated};

use super::allocation::{Allocation, BatchPart};
use super::filling::Filling;
use super::heap_code::HeapCode;
use super::open::{FileRoute, best_route, route_for, staged_by};
use super::state::LoadShared;
use super::workers::WorkerId;
use super::{BudgetPermit, Engine, WindowPermit};
use crate::engine::schedule::Need;
use crate::error::{Error, Result};
use crate::files::source::{CachedChunks, OpenFile};
use crate::memory::backing::{Backing, PieceBuffer};
use crate::memory::buffer::Sink;
use crate::memory::headroom::permits::{HeadroomPermit, grant};
use crate::memory::headroom::{Headroom, headroom};
use crate::ring::FileSpec;
use crate::route::Route;
use crate::support::convert::to_usize;
use crate::telemetry::report::Way;

/// A batch's allocation, and the sink that will populate it if its pages are not present yet.
type Prepared = (Arc<Backing>, Option<Arc<dyn Sink>>);

/// How long to wait for the reaper to free dropped memory. Freeing takes up to half a second per
/// GiB, so this is enough for 20 GiB.
const FREEING_TIME: Duration = Duration::from_secs(10);

impl Engine {
    /// Opens a batch's files, gets its memory, and passes its pieces to the ring thread. If one of
    /// these steps fails, the load fails. Whatever the batch does not use of `permit` and
    /// `advance` is returned when these are dropped.
    pub(super) fn allocate(
        self: &Arc<Self>,
        load: &Arc<LoadShared>,
        heap: &HeapCode,
        worker: WorkerId,
        number: usize,
        permit: WindowPermit,
        advance: BudgetPermit,
    ) {
        let Some(allocation) = load.allocation(number) else { return };
        if let Err(error) = self.prepare_batch(load, heap, worker, &allocation, permit, advance) {
            self.fail(load, error);
        }
    }

    fn prepare_batch(
        self: &Arc<Self>,
        load: &Arc<LoadShared>,
        heap: &HeapCode,
        worker: WorkerId,
        allocation: &Allocation,
        mut permit: WindowPermit,
        advance: BudgetPermit,
    ) -> Result<()> {
        let mut sources = Vec::with_capacity(allocation.parts.len());
        for part in &allocation.parts {
            // If the load has failed or was dropped, its remaining files need not be opened.
            if load.is_over() {
                return Ok(());
            }
            self.jobs.begin_file(worker);
            sources.push(open_part(load, part)?);
        }
        self.jobs.end_files(worker);
        let way = batch_way(load, allocation, &sources);
        let in_memory = load.options.route.is_none() && sources.iter().all(|source| source.file.in_memory);
        let populates_late = way == Way::Staged || in_memory;
        let (backing, filling) = self.memory_for(load, heap, allocation, populates_late)?;
        advance.charge(&backing);
        let staged_by = staged_by(&load.options);
        load.record_queued(allocation.batch.pieces.start);
        for (part, OpenPart { file, route, cached }) in allocation.parts.iter().zip(sources) {
            let piece = part.piece;
            let files = u64::from(part.small);
            let mut permit = permit.split(Need { bytes: piece.memory_bytes, files, ..Need::default() });
            if part.small && piece.file_offset + piece.bytes >= part.identity.bytes {
                // A file stays open until it is checked, possibly long after its last read.
                // Therefore, the file itself takes over the file permit of its last piece. Each
                // earlier piece returns its file permit when it is full. Otherwise, a batch with a
                // later piece of the same file might wait for that permit.
                file.hold(permit.split(Need { files, ..Need::default() }));
            }
            let (offset, bytes) = (to_usize(piece.memory_offset), to_usize(piece.memory_bytes));
            let staged_by = staged_by.max(best_route(&file, &load.options));
            let staged_by = staged_by.max(Some(route).filter(|&route| route < Route::Bounce).unwrap_or(staged_by));
            let route = match way {
                Way::Staged => route.max(Route::Bounce),
                Way::Buffered if file.ring_refused_to(Route::UringBuffered).is_none() => route.max(Route::UringBuffered),
                Way::Direct | Way::Buffered => route,
            };
            if route == Route::UringBuffered {
                // Settling may wait for a writer or for writeback, and the ring thread must not
                // block, so the ranges that it reads are settled here. (Threads settle a range
                // themselves before they read it.) A failure is ignored: the bytes are then read
                // without having been settled.
                self.jobs.begin_file(worker);
                let _ = file.settle(&(piece.file_offset..piece.file_offset + piece.bytes));
            }
            let spec = FileSpec {
                index: part.file_index,
                route,
                staged_by: if file.ring_refused.is_some() { staged_by.max(Route::PreadDirect) } else { staged_by },
                handle: file,
                alignment_bytes: part.alignment_bytes,
                mount: part.identity.mount(),
                in_memory,
                cached,
            };
            let buffer = PieceBuffer::new(Arc::clone(&backing), filling.clone(), offset, bytes, permit);
            self.ring.enqueue_piece(load.id, part.number, piece, spec, buffer);
        }
        Ok(())
    }

    /// Gets the batch's memory and populates it. If `populates_late` is set, memory that has no
    /// pages yet is not populated here, but returned with a sink that will populate it. Memory
    /// from the pool already has its pages, and so does memory from a heap that populates it on
    /// allocation.
    fn memory_for(
        self: &Arc<Self>,
        load: &Arc<LoadShared>,
        heap: &HeapCode,
        allocation: &Allocation,
        populates_late: bool,
    ) -> Result<Prepared> {
        let about = allocation.allocated();
        if populates_late && !self.facts.allocates_at_once {
            let (backing, grant) = self.get_backing(load, heap, allocation)?;
            // Each extent requests its own grant when it is populated.
            drop(grant);
            if !backing.is_reused() {
                let batch = &allocation.batch;
                let part = to_usize(batch.memory_offset)..to_usize(batch.memory_offset + batch.bytes);
                let filling = Filling::new(self, load, heap, &backing, part, about);
                return Ok((backing, Some(Arc::new(filling))));
            }
        }
        let start = Instant::now();
        load.begin_allocating();
        let populated = self.populate(load, heap, allocation);
        let result = populated.as_ref().ok().map(|(backing, populated)| (populated, backing.is_reused()));
        load.end_allocating(&about, start, result);
        Ok((populated?.0, None))
    }

    fn populate(&self, load: &LoadShared, heap: &HeapCode, allocation: &Allocation) -> Result<(Arc<Backing>, Populated)> {
        let batch = &allocation.batch;
        let part = to_usize(batch.memory_offset)..to_usize(batch.memory_offset + batch.bytes);
        // Hold the grant until the pages are present.
        let (backing, _grant) = self.get_backing(load, heap, allocation)?;
        let (mapping, memory) = backing.parts();
        let populated = if backing.is_reused() {
            let start = mapping.address().addr().get();
            Populated { pages: dmabuf::count_pages(start + part.start..start + part.end), refused: None }
        } else {
            let populated = heap.call(load.heap(), |heap| heap.populate(mapping, memory, part))?;
            populated.map_err(|error| self.refused(load, error))?
        };
        Ok((backing, populated))
    }

    /// Gets the batch's allocation (an existing one, one from the pool, or a new one) and the
    /// grant for the memory that this batch is about to use. The grant is `None` if the batch
    /// needs no new memory.
    fn get_backing(
        &self,
        load: &LoadShared,
        heap: &HeapCode,
        allocation: &Allocation,
    ) -> Result<(Arc<Backing>, Option<HeadroomPermit>)> {
        let mut made = None;
        let backing = allocation.memory.get_or_make(|| {
            let (backing, grant) = self.new_backing(load, heap, allocation)?;
            made = Some(grant);
            Ok::<_, Error>(Arc::new(backing))
        })?;
        let grant = match made {
            Some(grant) => grant,
            // An earlier batch has already made the allocation.
            None if backing.is_reused() || self.facts.allocates_at_once => None,
            None => Some(self.grant(allocation.batch.bytes)?),
        };
        Ok((backing, grant))
    }

    fn new_backing(
        &self,
        load: &LoadShared,
        heap: &HeapCode,
        allocation: &Allocation,
    ) -> Result<(Backing, Option<HeadroomPermit>)> {
        let refused = |error| self.refused(load, error);
        let (at, bytes) = (to_usize(allocation.range_offset), to_usize(allocation.memory_bytes));
        let kept = self.reaper.reuse(bytes).map(|kept| Backing::from_pool(*kept, &allocation.range, at, &self.reaper));
        let not_reused = match kept {
            Some(Ok(backing)) => return Ok((backing, None)),
            Some(Err(error)) => Some(error),
            None => None,
        };
        let taken = if self.facts.allocates_at_once { allocation.memory_bytes } else { allocation.batch.bytes };
        let grant = self.grant(taken)?;
        let memory = heap.call(load.heap(), |heap| heap.allocate(bytes))?.map_err(refused)?;
        if let Some(dma_buf) = memory.dma_buf() {
            if !self.facts.exports {
                return Err(Error::Config(format!(
                    "the heap {} allocated a dma-buf, even though its `exports` returns false",
                    load.heap()
                )));
            }
            // `Backing::export` ends this access. If the load fails or is dropped, the dma-buf is
            // never exported, and is closed before the access has ended. That is allowed.
            dma_buf.begin_cpu_access(Access::ReadWrite).map_err(refused)?;
        }
        let mapping = allocation.range.map(&memory, at, bytes).map_err(|error| {
            // If the refused move made the addresses unusable, its error says why.
            refused(not_reused.filter(|_| error.errno == Errno::EEXIST).unwrap_or(error))
        })?;
        Ok((Backing::new(mapping, memory, self.reaper.clone()), Some(grant)))
    }

    /// Fails if `wanted_bytes` exceeds the available memory. Before failing, empties the pool,
    /// waits for dropped segments to be freed, and checks again.
    pub(super) fn check_headroom(&self, wanted_bytes: u64) -> Result<()> {
        let short = || headroom().filter(|seen| seen.available_bytes < wanted_bytes);
        match short() {
            Some(_) if self.make_room() => short().map_or(Ok(()), |seen| Err(self.out_of_memory(wanted_bytes, seen))),
            Some(seen) => Err(self.out_of_memory(wanted_bytes, seen)),
            None => Ok(()),
        }
    }

    /// Requests a grant for memory that is about to be allocated or populated.
    pub(super) fn grant(&self, wanted_bytes: u64) -> Result<HeadroomPermit> {
        let make_room = || {
            self.make_room();
        };
        grant(wanted_bytes, make_room).map_err(|seen| self.out_of_memory(wanted_bytes, seen))
    }

    /// Empties the pool, and waits for the reaper to free dropped segments; returns whether there
    /// was any memory to free.
    fn make_room(&self) -> bool {
        let trimmed = self.reaper.trim_pool(0);
        self.reaper.wait_until_idle(FREEING_TIME) || trimmed > 0
    }

    /// Returns the load's error for a failed operation on its memory. ENOMEM has several causes.
    /// If a limit caused it, the error names the limit and says how much memory was requested and
    /// how much is available.
    pub(super) fn refused(&self, load: &LoadShared, error: dmabuf::Error) -> Error {
        match at_limit(&error, headroom) {
            Some(seen) => self.out_of_memory(error.bytes as u64, seen),
            None => load.memory_error(error),
        }
    }

    fn out_of_memory(&self, wanted_bytes: u64, seen: Headroom) -> Error {
        let Headroom { available_bytes, limit, .. } = seen;
        Error::OutOfMemory { heap: self.facts.name.to_string(), wanted_bytes, available_bytes, limit }
    }
}

/// Returns the headroom if a limit caused this refusal, that is, if less memory is available than
/// was requested. Returns `None` if the refusal has another cause.
fn at_limit(error: &dmabuf::Error, measure: impl Fn() -> Option<Headroom>) -> Option<Headroom> {
    if error.errno != Errno::ENOMEM {
        return None;
    }
    measure().filter(|seen| seen.available_bytes < error.bytes as u64)
}

/// The open file of a piece, and how to read the piece.
struct OpenPart {
    file: Arc<OpenFile>,
    /// The initial route for reads of the piece. The way chosen for the batch may require a lower
    /// route.
    route: Route,
    /// Which chunks of the piece are in the page cache.
    cached: CachedChunks,
}

/// Chooses how a batch is read. If any of the batch is in the page cache, also stops the load's
/// measurement of which way of reading is the fastest. A batch that is entirely in the page cache
/// is copied like a staged one, so its memory need not be populated in advance.
fn batch_way(load: &LoadShared, allocation: &Allocation, sources: &[OpenPart]) -> Way {
    if sources.iter().any(|source| !source.cached.is_empty()) {
        load.cannot_measure();
    }
    let chunk_bytes = load.options.chunk_bytes;
    let mut parts = allocation.parts.iter().zip(sources);
    let cached = parts.all(|(part, source)| source.cached.is_all_of(part.piece.bytes, chunk_bytes));
    if cached { Way::Staged } else { allocation.way }
}

/// Opens the piece's file unless it is already open. On opening, checks that the file has not
/// changed since the load was planned.
fn open_part(load: &LoadShared, part: &BatchPart) -> Result<OpenPart> {
    // No lock is held here, because opening may wait forever for a server, and recording a
    // fallback emits a tracing event.
    let file = part.file.get_or_make(|| {
        let file = OpenFile::open(&part.path)?;
        file.check_unchanged(&part.identity)?;
        let (index, offset) = (part.file_index, part.piece.file_offset);
        let FileRoute { route, fallback } = route_for(&file, index, offset, load, part.route)?;
        if let Some(fallback) = fallback {
            load.record_fallback(fallback);
        }
        load.record_opened_file(index, route);
        Ok::<_, Error>(file)
    })?;
    let start = load.route_of(part.file_index);
    let route = if file.direct_refused().is_some() && start.is_direct() { Route::Buffered } else { start };
    // If the load's bytes are observed in staging, all of them must pass through staging, so no
    // chunk is copied straight from the page cache. Buffered reads copy from the page cache
    // anyway.
    let takes_cached = load.options.takes_cached() && !load.is_observed_in_staging() && route.is_direct();
    let piece = &part.piece;
    let range = piece.file_offset..piece.file_offset + piece.bytes;
    let cached = if takes_cached { file.cached(&range, load.options.chunk_bytes) } else { CachedChunks::default() };
    Ok(OpenPart { file, route, cached })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn refusal_names_a_limit_only_if_it_was_reached() {
        let have = |available_bytes| {
            move || Some(Headroom { available_bytes, limit: "memory.max is 9".to_owned(), place: PathBuf::new() })
        };
        let refused = |errno| dmabuf::Error::new("populate memory", 1000, errno);
        assert_eq!(at_limit(&refused(Errno::ENOMEM), have(999)).map(|seen| seen.available_bytes), Some(999));
        assert_eq!(
            at_limit(&refused(Errno::ENOMEM), have(1000)),
            None,
            "enough memory was available, so the error must not name a limit"
        );
        assert_eq!(at_limit(&refused(Errno::ENOMEM), || None), None);
        assert_eq!(at_limit(&refused(Errno::EMFILE), have(0)), None);
    }
}
