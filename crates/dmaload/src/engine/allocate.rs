//! The second job of a load, again and again: memory for a piece, ahead of its reads.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use dmabuf::{Access, Populated};

use super::{Engine, Permit};
use crate::error::{Error, Result};
use crate::headroom::{Headroom, headroom};
use crate::load::{Allocation, LoadShared};
use crate::memory::{Backing, PieceBuffer};
use crate::ring::FileSpec;
use crate::route::{Attempt, Fallback, Route};
use crate::source::OpenFile;

/// Memory that may be taken before the limits are looked at again: looking costs a dozen small files.
#[derive(Debug, Default)]
pub(super) struct Allowance {
    bytes: u64,
    until: Option<Instant>,
}

const ALLOWANCE_BYTES: u64 = 64 << 20;
const ALLOWANCE_TIME: Duration = Duration::from_millis(200);
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
        let backing = self.backing(load, allocation)?;
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

    /// The memory of the piece's segment: there already, from the pool, or allocated now. What has to be populated has been
    /// allowed by the limits.
    fn backing(&self, load: &LoadShared, allocation: &Allocation) -> Result<Arc<Backing>> {
        let refused = |error| load.memory_error(error);
        let (at, bytes) = (to_usize(allocation.range_offset), to_usize(allocation.segment_memory_bytes));
        let mut cell = allocation.segment.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(backing) = &*cell {
            let backing = Arc::clone(backing);
            drop(cell);
            if !backing.is_reused() {
                self.take_allowance(allocation.piece.memory_bytes)?;
            }
            return Ok(backing);
        }
        let kept = self.reaper.reuse(bytes);
        if let Some(backing) = kept.and_then(|kept| Backing::reused(*kept, &allocation.range, at, &self.reaper)) {
            return Ok(Arc::clone(cell.insert(Arc::new(backing))));
        }
        self.take_allowance(allocation.piece.memory_bytes)?;
        let memory = self.heap.allocate(bytes).map_err(refused)?;
        if let Some(dma_buf) = memory.dma_buf() {
            // Ended when the segment is exported. One that never is closes with the access open, which is allowed.
            dma_buf.begin_cpu_access(Access::ReadWrite).map_err(refused)?;
        }
        let mapping = allocation.range.map(&memory, at, bytes).map_err(refused)?;
        Ok(Arc::clone(cell.insert(Arc::new(Backing::new(mapping, memory, self.reaper.clone())))))
    }

    /// Refuses what would wake the OOM killer. What the pool keeps goes first, and memory of dropped segments that is still
    /// on its way to be freed is waited for.
    pub(super) fn check_headroom(&self, wanted_bytes: u64) -> Result<()> {
        let there_is_room = |seen: &Option<Headroom>| seen.as_ref().is_none_or(|seen| seen.available_bytes >= wanted_bytes);
        let mut seen = headroom();
        if !there_is_room(&seen) {
            let trimmed = self.reaper.trim_pool(0);
            if self.reaper.wait_until_idle(FREEING_TIME) || trimmed > 0 {
                seen = headroom();
            }
        }
        match seen {
            Some(Headroom { available_bytes, limit }) if available_bytes < wanted_bytes => {
                Err(Error::OutOfMemory { heap: self.heap.name().into_owned(), wanted_bytes, available_bytes, limit })
            }
            _ => Ok(()),
        }
    }

    /// The same for a piece, looking at the limits only now and then.
    fn take_allowance(&self, wanted_bytes: u64) -> Result<()> {
        let mut allowance = self.allowance.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if allowance.bytes < wanted_bytes || allowance.until.is_none_or(|until| until < now) {
            let bytes = ALLOWANCE_BYTES.max(wanted_bytes);
            // Near the limit it is looked at for each piece.
            let bytes = if self.check_headroom(bytes).is_ok() { bytes } else { wanted_bytes };
            self.check_headroom(bytes)?;
            *allowance = Allowance { bytes, until: Some(now + ALLOWANCE_TIME) };
        }
        allowance.bytes -= wanted_bytes;
        Ok(())
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
