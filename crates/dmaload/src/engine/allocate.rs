//! The second job of a load, again and again: memory for a piece, ahead of its reads.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use dmabuf::{Access, Populated};

use super::allowance::{Grant, grant};
use super::{Engine, Permit};
use crate::error::{Error, Result};
use crate::headroom::{Headroom, headroom};
use crate::load::{Allocation, LoadShared};
use crate::memory::{Backing, PieceBuffer};
use crate::ring::FileSpec;
use crate::route::{Attempt, Fallback, Route};
use crate::source::OpenFile;

/// Freeing takes up to half a second per GiB.
const FREEING_TIME: Duration = Duration::from_secs(10);

impl Engine {
    /// Allocates and populates a piece, and hands it to the ring thread. The permit comes back by itself, whatever
    /// happens.
    pub(super) fn allocate(&self, load: &LoadShared, number: usize, permit: Permit) {
        let Some(allocation) = load.allocation(number) else { return };
        match self.fill_in(load, &allocation) {
            Ok((file, backing)) => {
                let piece = allocation.piece;
                let (offset, bytes) = (to_usize(piece.memory_offset), to_usize(piece.memory_bytes));
                let spec = FileSpec {
                    index: allocation.file_index,
                    route: if file.direct_refused().is_some() { Route::Buffered } else { allocation.route },
                    handle: file,
                    alignment_bytes: allocation.alignment_bytes,
                    staged_by: Some(load.options.route).filter(|&route| route < Route::Bounce).unwrap_or(Route::UringFixedDirect),
                    mount: allocation.identity.mount(),
                };
                self.ring.piece(load.id, number, piece, spec, PieceBuffer::new(backing, offset, bytes, permit));
            }
            Err(error) => self.fail(load, error),
        }
    }

    fn fill_in(&self, load: &LoadShared, allocation: &Allocation) -> Result<(Arc<OpenFile>, Arc<Backing>)> {
        let file = opened(load, allocation)?;
        let start = Instant::now();
        load.begin_allocating();
        let populated = self.populate(load, allocation);
        let told = populated.as_ref().ok().map(|(backing, populated)| (populated, backing.is_reused()));
        load.end_allocating(allocation, start, told);
        Ok((file, populated?.0))
    }

    fn populate(&self, load: &LoadShared, allocation: &Allocation) -> Result<(Arc<Backing>, Populated)> {
        let piece = &allocation.piece;
        let part = to_usize(piece.memory_offset)..to_usize(piece.memory_offset + piece.memory_bytes);
        // Held until the memory is there.
        let (backing, _grant) = self.backing(load, allocation)?;
        let populated = match backing.parts() {
            Some((mapping, _)) if backing.is_reused() => {
                let start = mapping.address().addr().get();
                Populated { pages: dmabuf::count_pages(start + part.start..start + part.end), refused: None }
            }
            Some((mapping, memory)) => self.heap.populate(mapping, memory, part).map_err(|error| load.memory_error(error))?,
            None => Populated::default(),
        };
        Ok((backing, populated))
    }

    /// The memory of the piece's segment: there already, from the pool, or allocated now; with the right to take what is to be
    /// taken for this piece.
    fn backing(&self, load: &LoadShared, allocation: &Allocation) -> Result<(Arc<Backing>, Option<Grant>)> {
        let refused = |error| load.memory_error(error);
        let (at, bytes) = (to_usize(allocation.range_offset), to_usize(allocation.segment_memory_bytes));
        let mut cell = allocation.segment.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(backing) = &*cell {
            let backing = Arc::clone(backing);
            drop(cell);
            let is_there = backing.is_reused() || self.facts.allocates_at_once;
            let grant = if is_there { None } else { Some(self.grant(allocation.piece.memory_bytes)?) };
            return Ok((backing, grant));
        }
        let kept = self.reaper.reuse(bytes);
        if let Some(backing) = kept.and_then(|kept| Backing::reused(*kept, &allocation.range, at, &self.reaper)) {
            return Ok((Arc::clone(cell.insert(Arc::new(backing))), None));
        }
        let taken = if self.facts.allocates_at_once { allocation.segment_memory_bytes } else { allocation.piece.memory_bytes };
        let grant = self.grant(taken)?;
        let memory = self.heap.allocate(bytes).map_err(refused)?;
        if let Some(dma_buf) = memory.dma_buf() {
            if !self.facts.exports {
                return Err(Error::Config(format!("the heap {} gives dma-bufs, and its `exports` denies it", self.heap.name())));
            }
            // Ended when the segment is exported. One that never is closes with the access open, which is allowed.
            dma_buf.begin_cpu_access(Access::ReadWrite).map_err(refused)?;
        }
        let mapping = allocation.range.map(&memory, at, bytes).map_err(refused)?;
        Ok((Arc::clone(cell.insert(Arc::new(Backing::new(mapping, memory, self.reaper.clone())))), Some(grant)))
    }

    /// Refuses a load that could not be held at once.
    pub(super) fn check_headroom(&self, wanted_bytes: u64) -> Result<()> {
        let short = || headroom().filter(|seen| seen.available_bytes < wanted_bytes);
        match short() {
            Some(_) if self.make_room() => short().map_or(Ok(()), |seen| Err(self.out_of_memory(wanted_bytes, seen))),
            Some(seen) => Err(self.out_of_memory(wanted_bytes, seen)),
            None => Ok(()),
        }
    }

    /// The right to take memory for a piece.
    fn grant(&self, wanted_bytes: u64) -> Result<Grant> {
        let make_room = || {
            self.make_room();
        };
        grant(wanted_bytes, make_room).map_err(|seen| self.out_of_memory(wanted_bytes, seen))
    }

    /// Frees what the pool keeps, and waits for memory of dropped segments that is still on its way to be freed; whether there
    /// was anything of either.
    fn make_room(&self) -> bool {
        let trimmed = self.reaper.trim_pool(0);
        self.reaper.wait_until_idle(FREEING_TIME) || trimmed > 0
    }

    fn out_of_memory(&self, wanted_bytes: u64, seen: Headroom) -> Error {
        let Headroom { available_bytes, limit } = seen;
        Error::OutOfMemory { heap: self.heap.name().into_owned(), wanted_bytes, available_bytes, limit }
    }
}

/// The file, opened if it is not; it must be what was planned.
fn opened(load: &LoadShared, allocation: &Allocation) -> Result<Arc<OpenFile>> {
    let mut cell = allocation.file.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(file) = &*cell {
        return Ok(Arc::clone(file));
    }
    let file = OpenFile::open(&allocation.path)?;
    file.check_unchanged(&allocation.identity)?;
    if let Some(errno) = file.direct_refused().filter(|_| allocation.route.is_direct()) {
        // It was allowed when the load was planned.
        let (from, attempt) = (allocation.route, Attempt::OpenDirect);
        if load.options.strict {
            let (path, offset) = (file.path.clone(), allocation.piece.file_offset);
            return Err(Error::Refused { path, offset, route: from, attempt, errno });
        }
        load.stepped_down(Fallback { file_index: Some(allocation.file_index), from, to: Route::Buffered, attempt, errno });
    }
    Ok(Arc::clone(cell.insert(file)))
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
