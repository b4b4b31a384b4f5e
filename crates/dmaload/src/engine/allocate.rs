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
        self.take_allowance(allocation.piece.memory_bytes)?;
        load.begin_allocating();
        let populated = self.populate(load, allocation);
        load.end_allocating(&allocation.piece, populated.as_ref().ok().map(|(_, populated)| populated));
        Ok((file, populated?.0))
    }

    fn populate(&self, load: &LoadShared, allocation: &Allocation) -> Result<(Arc<Backing>, Populated)> {
        let refused = |error| load.memory_error(error);
        let backing = {
            let mut cell = allocation.segment.lock().unwrap_or_else(PoisonError::into_inner);
            match &*cell {
                Some(backing) => Arc::clone(backing),
                None => {
                    let bytes = to_usize(allocation.segment_memory_bytes);
                    let memory = self.heap.allocate(bytes).map_err(refused)?;
                    if let Some(dma_buf) = memory.dma_buf() {
                        // Ended when the segment is exported. One that never is closes with the access open, which is allowed.
                        dma_buf.begin_cpu_access(Access::ReadWrite).map_err(refused)?;
                    }
                    let mapping = allocation.range.map(&memory, to_usize(allocation.range_offset), bytes).map_err(refused)?;
                    Arc::clone(cell.insert(Arc::new(Backing::new(mapping, memory, self.reaper.clone()))))
                }
            }
        };
        let piece = &allocation.piece;
        let part = to_usize(piece.memory_offset)..to_usize(piece.memory_offset + piece.memory_bytes);
        let populated = match backing.parts() {
            Some((mapping, memory)) => self.heap.populate(mapping, memory, part).map_err(refused)?,
            None => Populated::default(),
        };
        Ok((backing, populated))
    }

    /// Refuses what would wake the OOM killer. Memory of dropped segments that is still on its way to be freed is waited for.
    pub(super) fn check_headroom(&self, wanted_bytes: u64) -> Result<()> {
        let there_is_room = |seen: &Option<Headroom>| seen.as_ref().is_none_or(|seen| seen.available_bytes >= wanted_bytes);
        let mut seen = headroom();
        if !there_is_room(&seen) && self.reaper.wait_until_idle(FREEING_TIME) {
            seen = headroom();
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
