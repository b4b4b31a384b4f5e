//! Memory that is populated by the threads that fill it: copiers, and threads that read through
//! the page cache.
//!
//! Staged reads do not need their destination to be populated. A copier claims an extent and
//! populates it while the extent's bytes are being read, or after they have arrived. It then
//! copies the staged bytes to the extent while the zeroed pages and the staged bytes are still in
//! the processor's cache. If a whole batch is populated before it is read, its pages have left the
//! cache by the time the bytes arrive. On virtual disks, that makes loads a third slower.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use dmabuf::Pages;
use rustix::io::Errno;

use super::Engine;
use super::allocation::Allocated;
use super::heap_code::{HeapCode, WeakHeap};
use super::state::LoadShared;
use crate::error::Result;
use crate::memory::backing::Backing;
use crate::memory::buffer::{Fault, Sink, Write};
use crate::support::once_value::OnceValue;

/// Returns the size of an extent, the unit in which memory is populated: a huge page, or as many
/// small pages as fit into a processor's cache together with the staged bytes
/// ([`SMALL_EXTENT_BYTES`]).
pub(super) fn extent_bytes(pages: Pages) -> usize {
    if pages == Pages::Small { SMALL_EXTENT_BYTES } else { dmabuf::HUGE_PAGE_BYTES }
}

/// The size of an extent of 4 KiB pages. 512 KiB was measured to be faster than 256 KiB, 1 MiB and
/// 2 MiB: see docs/performance.md.
const SMALL_EXTENT_BYTES: usize = 512 << 10;

/// A batch whose memory is populated while its bytes are being read.
#[derive(Debug)]
pub(super) struct Filling {
    engine: Arc<Engine>,
    /// A weak reference, like `heap`, because the ring thread may drop this value but must not
    /// drop a load or a heap.
    load: Weak<LoadShared>,
    heap: WeakHeap,
    backing: Arc<Backing>,
    /// The batch's range in the allocation.
    batch: Range<usize>,
    extent_bytes: usize,
    /// One cell for each extent, set once the extent is populated. In the allocation, extents
    /// start at multiples of their size.
    extents: Vec<OnceValue<()>>,
    about: Allocated,
    /// How many of the batch's bytes are not yet counted as allocated.
    uncounted_bytes: AtomicU64,
}

impl Filling {
    pub(super) fn new(
        engine: &Arc<Engine>,
        load: &Arc<LoadShared>,
        heap: &HeapCode,
        backing: &Arc<Backing>,
        batch: Range<usize>,
        about: Allocated,
    ) -> Self {
        let extent_bytes = extent_bytes(engine.facts.pages);
        let first = batch.start / extent_bytes;
        let count = batch.end.div_ceil(extent_bytes) - first;
        Filling {
            engine: Arc::clone(engine),
            load: Arc::downgrade(load),
            heap: heap.downgrade(),
            backing: Arc::clone(backing),
            batch,
            extent_bytes,
            extents: std::iter::repeat_with(OnceValue::default).take(count).collect(),
            about,
            uncounted_bytes: AtomicU64::new(about.bytes),
        }
    }

    /// Returns the index of the extent that contains the offset `at`, and the part of the extent
    /// that belongs to the batch.
    fn extent_at(&self, at: usize) -> (usize, Range<usize>) {
        let number = at / self.extent_bytes;
        let start = number * self.extent_bytes;
        let first = self.batch.start / self.extent_bytes;
        (number - first, start.max(self.batch.start)..(start + self.extent_bytes).min(self.batch.end))
    }

    /// Populates an extent. On failure, records the error in the load.
    fn populate_extent(&self, extent: Range<usize>) -> std::result::Result<(), Errno> {
        // The load may be dropped once it has ended, and the heap once the engine has ended.
        let (Some(load), Some(heap)) = (self.load.upgrade(), self.heap.upgrade()) else { return Err(Errno::CANCELED) };
        let populated = self.populate(&load, &heap, extent);
        if let Err(error) = populated {
            // Only the first error is kept.
            let _ = load.no_memory.set(error);
            self.engine.release_load(load);
            return Err(Errno::NOMEM);
        }
        self.engine.release_load(load);
        Ok(())
    }

    fn populate(&self, load: &LoadShared, heap: &HeapCode, extent: Range<usize>) -> Result<()> {
        let memory_bytes = extent.len() as u64;
        // Hold the grant until the pages are present.
        let _grant = self.engine.grant(memory_bytes)?;
        let start = Instant::now();
        load.begin_allocating();
        let (mapping, memory) = self.backing.parts();
        let populated = heap
            .call(load.heap(), |heap| heap.populate(mapping, memory, extent))
            .and_then(|populated| populated.map_err(|error| self.engine.refused(load, error)));
        let before = self
            .uncounted_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(memory_bytes)));
        let bytes = before.expect("the closure should never return `None`").min(memory_bytes);
        let about = Allocated { bytes, memory_bytes, ..self.about };
        load.end_allocating(&about, start, populated.as_ref().ok().map(|populated| (populated, false)));
        populated.map(drop)
    }
}

#[allow(unsafe_code)]
impl Sink for Filling {
    unsafe fn fill_with(&self, offset: usize, bytes: usize, write: &mut Write<'_>) -> std::result::Result<usize, Fault> {
        assert!(self.batch.start <= offset && offset + bytes <= self.batch.end, "a piece must lie within its batch");
        let mut done = 0;
        while done < bytes {
            let (number, extent) = self.extent_at(offset + done);
            let here = extent.end.min(offset + bytes) - (offset + done);
            let slot = self.extents.get(number).expect("the extents should cover the whole batch");
            slot.get_or_make(|| self.populate_extent(extent)).map_err(Fault::Memory)?;
            // SAFETY: this part lies within `offset..offset + bytes`, to which the caller
            // guarantees exclusive access. The heap no longer writes to the extent either: it
            // populates each extent once, and has finished this one, because `get_or_make` has
            // returned.
            let part = unsafe { self.backing.unfilled(offset + done, here) };
            match write(part) {
                Ok(written) => {
                    done += written;
                    if written < here {
                        break;
                    }
                }
                Err(errno) if done == 0 => return Err(Fault::Read(errno)),
                // Report the bytes written so far; if the error persists, the caller's next
                // attempt returns it.
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn populate(&self, offset: usize, bytes: usize) -> std::result::Result<(), Fault> {
        let end = offset + bytes;
        assert!(self.batch.start <= offset && end <= self.batch.end, "a piece must lie within its batch");
        let mut at = offset;
        while at < end {
            let (number, extent) = self.extent_at(at);
            at = extent.end;
            let slot = self.extents.get(number).expect("the extents should cover the whole batch");
            // If another thread is populating the extent, there is nothing to wait for here. A
            // copy to the extent waits.
            slot.make_if_empty(|| self.populate_extent(extent)).map_err(Fault::Memory)?;
        }
        Ok(())
    }

    fn runs_foreign_code(&self) -> bool {
        true
    }
}
