//! A segment's memory, while it is being filled and afterwards.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use dmabuf::{Access, AddressRange, DmaBuf, Mapping, Memfd, Memory};

use crate::memory::buffer::{Buffer, Fault, PieceMemory, Place, Sink, Write};
use crate::memory::charge::Ledger;
use crate::memory::lent::ViewCount;
use crate::memory::reaper::{Holding, Reaper};
use crate::support::id::LoadId;

/// Bytes that belong at the start of their slot. All fields are byte offsets in the allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) slot: Range<usize>,
    pub(crate) from: usize,
    pub(crate) bytes: usize,
}

/// A mapped allocation. Dropping it hands the unmapping to the reaper thread.
#[derive(Debug)]
pub(crate) struct Backing {
    /// `None` only inside `drop`.
    holding: Option<Box<Holding>>,
    address: NonNull<u8>,
    bytes: usize,
    /// Whether it came from the pool, with its pages.
    reused: bool,
    lent: ViewCount,
    reaper: Reaper,
}

// SAFETY: the pointer is into the mapping that `holding` owns, which is not bound to a thread.
unsafe impl Send for Backing {}
// SAFETY: as above; the owners of the Backing decide who may access the bytes.
unsafe impl Sync for Backing {}

impl Backing {
    pub(crate) fn new(mapping: Mapping, memory: Memory, reaper: Reaper) -> Self {
        let (address, bytes) = (mapping.address(), mapping.bytes());
        Backing { holding: Some(Holding::new(mapping, memory)), address, bytes, reused: false, lent: ViewCount::new(), reaper }
    }

    /// Takes an allocation from the pool and moves it to its new place; frees it and returns
    /// `None` if it can't be moved.
    pub(crate) fn from_pool(holding: Holding, range: &Arc<AddressRange>, at: usize, reaper: &Reaper) -> Option<Self> {
        holding.reusable.store(false, Ordering::Release);
        match holding.move_to(range, at) {
            // Without protection from forks, private memory can't be reused.
            Ok(holding) if holding.memory.is_private() && holding.mapping.forbid_fork().is_err() => {
                reaper.release(holding);
                None
            }
            Ok(holding) => {
                let (address, bytes) = (holding.mapping.address(), holding.mapping.bytes());
                let (lent, reaper) = (ViewCount::new(), reaper.clone());
                Some(Backing { holding: Some(holding), address, bytes, reused: true, lent, reaper })
            }
            Err(holding) => {
                reaper.release(holding);
                None
            }
        }
    }

    pub(crate) fn is_reused(&self) -> bool {
        self.reused
    }

    /// Marks the memory as complete, so that it may be reused once dropped. Memory of dma-heaps
    /// may not: its mapping can't be moved, so keeping it would only take space in the pool.
    pub(crate) fn allow_reuse(&self) {
        let holding = self.holding();
        if holding.memory.dma_buf().is_none() {
            holding.reusable.store(true, Ordering::Release);
        }
    }

    /// Lets forked processes inherit the memory, since no device writes to it any more. If the
    /// kernel refuses for lack of memory, they don't inherit it.
    pub(crate) fn allow_fork(&self) {
        let holding = self.holding();
        if holding.memory.is_private() {
            let _ = holding.mapping.allow_fork();
        }
    }

    /// Moves bytes to the start of their slot, and zeroes the rest of it.
    ///
    /// # Safety
    /// The slot must be filled, and nothing else may read or write it during the call.
    ///
    /// # Panics
    /// When the slot is not within the allocation, or the bytes are not within the slot.
    pub(crate) unsafe fn move_down(&self, Move { slot, from, bytes }: &Move) {
        let within = slot.start <= *from && from.checked_add(*bytes).is_some_and(|end| end <= slot.end) && slot.end <= self.bytes;
        assert!(within, "{bytes} bytes from {from} on are not within {slot:?} of {}", self.bytes);
        // SAFETY: within the mapping, by the assertion.
        let to = unsafe { self.address.add(slot.start) };
        // SAFETY: as above.
        let from = unsafe { self.address.add(*from) };
        // SAFETY: both are within the slot, which is mapped and exclusive to the caller; they may
        // overlap.
        unsafe { from.copy_to(to, *bytes) };
        // SAFETY: within the slot, by the assertion.
        let rest = unsafe { to.add(*bytes) };
        // SAFETY: the rest of the slot, as above.
        unsafe { rest.write_bytes(0, slot.end - slot.start - bytes) };
    }

    /// Charges `bytes` of this allocation to a load.
    pub(crate) fn charge(&self, ledger: &Weak<dyn Ledger>, load: LoadId, bytes: u64) {
        self.holding().charge.add(ledger, load, bytes);
    }

    /// Excludes the memory from reuse, since a descriptor of it was handed out.
    pub(crate) fn forbid_reuse(&self) {
        self.holding().reusable.store(false, Ordering::Release);
    }

    pub(crate) fn address(&self) -> NonNull<u8> {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The dma-buf: the memory itself, or the one that was exported from it.
    pub(crate) fn dma_buf(&self) -> Option<&DmaBuf> {
        let holding = self.holding();
        holding.memory.dma_buf().or_else(|| holding.exported.get())
    }

    /// Exports filled memory as a dma-buf, by calling `export`, and makes the bytes visible to
    /// devices.
    pub(crate) fn export<E: From<dmabuf::Error>>(&self, export: impl FnOnce(&Memory) -> Result<DmaBuf, E>) -> Result<(), E> {
        let holding = self.holding();
        if let Some(dma_buf) = holding.memory.dma_buf() {
            // The access was begun when the memory was allocated.
            return Ok(dma_buf.end_cpu_access(Access::ReadWrite)?);
        }
        if let Some(dma_buf) = holding.exported.get() {
            // The memory was exported in an earlier use, and its pages are the same.
            return Ok(dma_buf.cpu_access(Access::ReadWrite)?.end()?);
        }
        let dma_buf = export(&holding.memory)?;
        // The CPU zeroed the tail and may have copied more, before the dma-buf existed; this
        // flushes that, too.
        dma_buf.cpu_access(Access::ReadWrite)?.end()?;
        if let Some(memfd) = holding.memory.memfd() {
            // After the export, since newer kernels refuse to export a memfd with this seal.
            memfd.seal_against_writes()?;
        }
        holding.exported.set(dma_buf).expect("an allocation is exported once, by the worker that finishes it");
        Ok(())
    }

    /// Adds a view; returns `false` if the memory was handed out.
    pub(crate) fn lend(&self) -> bool {
        self.lent.lend()
    }

    /// Removes a view that [`Backing::lend`] added.
    pub(crate) fn take_back(&self) {
        self.lent.take_back();
    }

    /// Refuses views from now on. Fails with the number of live views if there are any.
    pub(crate) fn hand_out(&self) -> Result<(), usize> {
        self.lent.hand_out().inspect(|()| self.forbid_reuse())
    }

    /// Returns filled bytes.
    ///
    /// # Safety
    /// The bytes must be filled, and nothing may write to them while the slice lives.
    ///
    /// # Panics
    /// When `range` is not within the allocation.
    pub(crate) unsafe fn filled(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} is not within {} bytes", self.bytes);
        // SAFETY: the memory stays mapped while this value lives, and the range is within it.
        let start = unsafe { self.address.add(range.start) };
        // SAFETY: as above, and the caller's guarantee.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), range.len()) }
    }

    /// The mapping, and the memory that backs it.
    pub(crate) fn parts(&self) -> (&Mapping, &Memory) {
        let holding = self.holding();
        (&holding.mapping, &holding.memory)
    }

    /// The memfd, if it is one.
    pub(crate) fn memfd(&self) -> Option<&Memfd> {
        self.holding().memory.memfd()
    }

    fn holding(&self) -> &Holding {
        self.holding.as_ref().expect("only the drop takes the holding")
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Some(holding) = self.holding.take() {
            self.reaper.release(holding);
        }
    }
}

impl Backing {
    /// Returns bytes for writing.
    ///
    /// # Safety
    /// Nothing else may read or write them while the slice lives.
    ///
    /// # Panics
    /// When they are not within the allocation.
    #[expect(clippy::mut_from_ref, reason = "the caller guarantees exclusive access to these bytes")]
    pub(crate) unsafe fn unfilled(&self, start: usize, bytes: usize) -> &mut [MaybeUninit<u8>] {
        let end = start.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "{bytes} bytes from {start} on are not within {}", self.bytes);
        // SAFETY: the memory stays mapped while this value lives, and the range is within it.
        let start = unsafe { self.address.add(start) };
        // SAFETY: as above, and the caller's guarantee.
        unsafe { std::slice::from_raw_parts_mut(start.cast().as_ptr(), bytes) }
    }
}

/// Memory whose pages are all present.
impl Sink for Backing {
    unsafe fn fill_with(&self, offset: usize, bytes: usize, write: &mut Write<'_>) -> Result<usize, Fault> {
        // SAFETY: the caller guarantees exclusive access to this part.
        write(unsafe { self.unfilled(offset, bytes) }).map_err(Fault::Read)
    }

    fn runs_foreign_code(&self) -> bool {
        false
    }
}

/// A part of a segment's memory that the kernel may write to. Dropping it returns its permit, `P`.
#[derive(Debug)]
pub(crate) struct PieceBuffer<P> {
    backing: Arc<Backing>,
    /// Populates the memory on demand, unless its pages are already present.
    filling: Option<Arc<dyn Sink>>,
    offset: usize,
    bytes: usize,
    _permit: P,
}

impl<P> PieceBuffer<P> {
    /// The part of `backing` that starts at `offset`. If `filling` is `None`, its pages are
    /// present; otherwise `filling`, whose offsets are those of the allocation, populates them.
    ///
    /// # Panics
    /// When the part reaches past the end of the allocation.
    pub(crate) fn new(backing: Arc<Backing>, filling: Option<Arc<dyn Sink>>, offset: usize, bytes: usize, permit: P) -> Self {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= backing.bytes()), "a piece lies within its segment");
        PieceBuffer { backing, filling, offset, bytes, _permit: permit }
    }
}

// SAFETY: the address is inside the mapping, by the check in `new`, and the Arc keeps it mapped. A
// segment's bytes are not shown before all of its pieces have come back from the driver.
unsafe impl<P> Buffer for PieceBuffer<P> {
    fn address(&self) -> NonNull<u8> {
        // SAFETY: `offset` is within the mapping, by the check in `new`.
        unsafe { self.backing.address().add(self.offset) }
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn leak(self) {
        // The permit is returned, so that the window stays as large for later loads.
        std::mem::forget(self.backing);
    }
}

impl<P> PieceMemory for PieceBuffer<P> {
    fn is_populated(&self) -> bool {
        self.filling.is_none()
    }

    fn place(&self, offset: usize) -> Place {
        let mapped = || Arc::clone(&self.backing) as Arc<dyn Sink>;
        Place { sink: self.filling.clone().unwrap_or_else(mapped), offset: self.offset + offset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_a_backing_does_not_unmap() {
        let range = AddressRange::reserve(4096).unwrap();
        let mapping = range.map(&Memory::Anonymous, 0, 4096).unwrap();
        // The thread of this reaper does nothing.
        let reaper = Reaper::without_thread();
        drop(Backing::new(mapping, Memory::Anonymous, reaper.clone()));
        assert!(range.map(&Memory::Anonymous, 0, 4096).is_err(), "the mapping is still there");
        reaper.run_once();
        range.map(&Memory::Anonymous, 0, 4096).unwrap();
    }
}
