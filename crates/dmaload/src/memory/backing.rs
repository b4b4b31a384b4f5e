//! A segment's memory while it is being filled, and after.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use dmabuf::{Access, AddressRange, DmaBuf, Mapping, Memfd, Memory};

use crate::memory::buffer::{Buffer, Fault, Place, Sink, Write};
use crate::memory::charge::Ledger;
use crate::memory::lent::ViewCount;
use crate::memory::reaper::{Holding, Reaper};
use crate::support::id::LoadId;

/// Bytes that are to be elsewhere: at the beginning of their slot. All in bytes of the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) slot: Range<usize>,
    pub(crate) from: usize,
    pub(crate) bytes: usize,
}

/// Mapped memory with its owner. Dropping it leaves the unmapping to the reaper thread.
#[derive(Debug)]
pub(crate) struct Backing {
    /// Only `None` inside `drop`.
    holding: Option<Box<Holding>>,
    address: NonNull<u8>,
    bytes: usize,
    /// Whether its pages are there already.
    reused: bool,
    lent: ViewCount,
    reaper: Reaper,
}

// SAFETY: the pointer is into the mapping that `holding` owns, which is not bound to a thread.
unsafe impl Send for Backing {}
// SAFETY: as above; who may look at the bytes is decided by the owners of the Backing.
unsafe impl Sync for Backing {}

impl Backing {
    pub(crate) fn new(mapping: Mapping, memory: Memory, reaper: Reaper) -> Self {
        let (address, bytes) = (mapping.address(), mapping.bytes());
        Backing { holding: Some(Holding::new(mapping, memory)), address, bytes, reused: false, lent: ViewCount::new(), reaper }
    }

    /// Memory from the pool, moved to where it is needed now; `None` when it can't be moved: then it is freed.
    pub(crate) fn reused(holding: Holding, range: &Arc<AddressRange>, at: usize, reaper: &Reaper) -> Option<Self> {
        holding.reusable.store(false, Ordering::Release);
        match holding.moved_to(range, at) {
            // Where it can't be kept from forked processes it is no use.
            Ok(holding) if holding.memory.is_private() && holding.mapping.forbid_fork().is_err() => {
                reaper.bury(holding);
                None
            }
            Ok(holding) => {
                let (address, bytes) = (holding.mapping.address(), holding.mapping.bytes());
                let (lent, reaper) = (ViewCount::new(), reaper.clone());
                Some(Backing { holding: Some(holding), address, bytes, reused: true, lent, reaper })
            }
            Err(holding) => {
                reaper.bury(holding);
                None
            }
        }
    }

    pub(crate) fn is_reused(&self) -> bool {
        self.reused
    }

    /// It is complete: when it is dropped, it may be used again. A dma-heap's may not: its mapping can't be moved, so keeping
    /// it would take room in the pool for nothing.
    pub(crate) fn allow_reuse(&self) {
        let holding = self.holding();
        if holding.memory.dma_buf().is_none() {
            holding.reusable.store(true, Ordering::Release);
        }
    }

    /// No device writes to it any more: processes that are forked may have it. Where the kernel has no memory to note that,
    /// they don't.
    pub(crate) fn allow_fork(&self) {
        let holding = self.holding();
        if holding.memory.is_private() {
            let _ = holding.mapping.allow_fork();
        }
    }

    /// Moves bytes to the beginning of their slot, and zeroes the rest of it.
    ///
    /// # Safety
    /// The slot must be filled, and nobody may read or write it meanwhile.
    ///
    /// # Panics
    /// When the slot is not within the memory, or the bytes are not within the slot.
    pub(crate) unsafe fn move_down(&self, Move { slot, from, bytes }: &Move) {
        let within = slot.start <= *from && from.checked_add(*bytes).is_some_and(|end| end <= slot.end) && slot.end <= self.bytes;
        assert!(within, "{bytes} bytes from {from} on are not within {slot:?} of {}", self.bytes);
        // SAFETY: within the mapping, by the assertion.
        let to = unsafe { self.address.add(slot.start) };
        // SAFETY: as above.
        let from = unsafe { self.address.add(*from) };
        // SAFETY: both are within the slot, which is mapped and the caller's alone; they may overlap.
        unsafe { from.copy_to(to, *bytes) };
        // SAFETY: within the slot, by the assertion.
        let rest = unsafe { to.add(*bytes) };
        // SAFETY: the rest of the slot, as above.
        unsafe { rest.write_bytes(0, slot.end - slot.start - bytes) };
    }

    /// A load has taken so much of its loader's memory for a part of it.
    pub(crate) fn charge(&self, ledger: &Weak<dyn Ledger>, load: LoadId, bytes: u64) {
        self.holding().charge.add(ledger, load, bytes);
    }

    /// A descriptor of it was handed out: it is never used again.
    pub(crate) fn forbid_reuse(&self) {
        self.holding().reusable.store(false, Ordering::Release);
    }

    pub(crate) fn address(&self) -> NonNull<u8> {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its dma-buf: the memory itself, or what was made of it.
    pub(crate) fn dma_buf(&self) -> Option<&DmaBuf> {
        let holding = self.holding();
        holding.memory.dma_buf().or_else(|| holding.exported.get())
    }

    /// Makes a dma-buf of memory that holds all its bytes, by `export`, and lets devices see them.
    pub(crate) fn export<E: From<dmabuf::Error>>(&self, export: impl FnOnce(&Memory) -> Result<DmaBuf, E>) -> Result<(), E> {
        let holding = self.holding();
        if let Some(dma_buf) = holding.memory.dma_buf() {
            // It was begun when the memory was allocated.
            return Ok(dma_buf.end_cpu_access(Access::ReadWrite)?);
        }
        if let Some(dma_buf) = holding.exported.get() {
            // It was used before, and its pages are the same.
            return Ok(dma_buf.cpu_access(Access::ReadWrite)?.end()?);
        }
        let dma_buf = export(&holding.memory)?;
        // The tail was zeroed, and maybe more was copied, by the CPU: what it wrote before the dma-buf existed is flushed, too.
        dma_buf.cpu_access(Access::ReadWrite)?.end()?;
        if let Some(memfd) = holding.memory.memfd() {
            // After the export: newer kernels refuse to export what is sealed like that.
            memfd.seal_against_writes()?;
        }
        holding.exported.set(dma_buf).expect("a memory is exported once, by the worker that finishes it");
        Ok(())
    }

    /// A view more; `false` once it was handed out.
    pub(crate) fn lend(&self) -> bool {
        self.lent.lend()
    }

    /// A view that [`Backing::lend`] has allowed is gone.
    pub(crate) fn take_back(&self) {
        self.lent.take_back();
    }

    /// From now on nobody gets a view. Where there are any, the error is their number.
    pub(crate) fn hand_out(&self) -> Result<(), usize> {
        self.lent.hand_out().inspect(|()| self.forbid_reuse())
    }

    /// Bytes of it.
    ///
    /// # Safety
    /// They must be filled, and nobody may write to them as long as the slice lives.
    ///
    /// # Panics
    /// When they reach past its end.
    pub(crate) unsafe fn filled(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} is within {} bytes", self.bytes);
        // SAFETY: the memory is mapped as long as this lives, and the range is within it.
        let start = unsafe { self.address.add(range.start) };
        // SAFETY: as above, and what the caller promises.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), range.len()) }
    }

    /// Its mapping, and what is mapped.
    pub(crate) fn parts(&self) -> (&Mapping, &Memory) {
        let holding = self.holding();
        (&holding.mapping, &holding.memory)
    }

    /// Its memory file, if it is one.
    pub(crate) fn memfd(&self) -> Option<&Memfd> {
        self.holding().memory.memfd()
    }

    fn holding(&self) -> &Holding {
        self.holding.as_ref().expect("the memory is taken out by the drop alone")
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Some(holding) = self.holding.take() {
            self.reaper.bury(holding);
        }
    }
}

impl Backing {
    /// Bytes of it, to be written to.
    ///
    /// # Safety
    /// Nobody else may read or write them as long as the slice lives.
    ///
    /// # Panics
    /// When they reach past its end.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that nobody else has these bytes")]
    pub(crate) unsafe fn unfilled(&self, start: usize, bytes: usize) -> &mut [MaybeUninit<u8>] {
        let end = start.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "{bytes} bytes from {start} on are within {}", self.bytes);
        // SAFETY: the memory is mapped as long as this lives, and the range is within it.
        let start = unsafe { self.address.add(start) };
        // SAFETY: as above, and what the caller promises.
        unsafe { std::slice::from_raw_parts_mut(start.cast().as_ptr(), bytes) }
    }
}

/// Memory whose pages are all there.
impl Sink for Backing {
    unsafe fn fill(&self, offset: usize, bytes: usize, write: &mut Write<'_>) -> Result<usize, Fault> {
        // SAFETY: nobody else has this part, as the caller promises.
        write(unsafe { self.unfilled(offset, bytes) }).map_err(Fault::Read)
    }

    fn runs_foreign_code(&self) -> bool {
        false
    }
}

/// A part of a segment's memory that the kernel may write into. `P` is its permit, which goes back with it.
#[derive(Debug)]
pub(crate) struct PieceBuffer<P> {
    backing: Arc<Backing>,
    /// What brings its pages into being, where they are not there.
    filling: Option<Arc<dyn Sink>>,
    offset: usize,
    bytes: usize,
    _permit: P,
}

impl<P> PieceBuffer<P> {
    /// The part of `backing` that begins at `offset`. Its pages are there, or `filling`, whose offsets
    /// are those of the memory, brings them into being.
    ///
    /// # Panics
    /// When it reaches past the memory.
    pub(crate) fn new(backing: Arc<Backing>, filling: Option<Arc<dyn Sink>>, offset: usize, bytes: usize, permit: P) -> Self {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= backing.bytes()), "a piece lies within its segment");
        PieceBuffer { backing, filling, offset, bytes, _permit: permit }
    }
}

// SAFETY: the address is inside the mapping, by the check in `new`, and the Arc keeps that mapped; a segment's bytes
// are shown to nobody before all of its pieces have come back from the driver.
unsafe impl<P> Buffer for PieceBuffer<P> {
    fn address(&self) -> NonNull<u8> {
        // SAFETY: `offset` is within the mapping, by the check in `new`.
        unsafe { self.backing.address().add(self.offset) }
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn is_populated(&self) -> bool {
        self.filling.is_none()
    }

    fn place(&self, offset: usize) -> Place {
        let mapped = || Arc::clone(&self.backing) as Arc<dyn Sink>;
        Place { sink: self.filling.clone().unwrap_or_else(mapped), offset: self.offset + offset }
    }

    fn leak(self) {
        // The permit goes back: the window must not be smaller for the loads to come.
        std::mem::forget(self.backing);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_a_backing_unmaps_nothing_by_itself() {
        let range = AddressRange::reserve(4096).unwrap();
        let mapping = range.map(&Memory::Anonymous, 0, 4096).unwrap();
        // A reaper whose thread does nothing.
        let reaper = Reaper::without_thread();
        drop(Backing::new(mapping, Memory::Anonymous, reaper.clone()));
        assert!(range.map(&Memory::Anonymous, 0, 4096).is_err(), "the mapping is still there");
        reaper.run_once();
        range.map(&Memory::Anonymous, 0, 4096).unwrap();
    }
}
