//! One mapped allocation, while it is being filled and afterwards.
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

/// Describes how a tensor's bytes are moved to an aligned address: from the offset `from` to the
/// start of `slot`, which is the memory of the tensor's segment. All offsets are relative to the
/// allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) slot: Range<usize>,
    pub(crate) from: usize,
    pub(crate) bytes: usize,
}

/// A mapped allocation. Dropping it passes it to the reaper, which pools or unmaps it.
#[derive(Debug)]
pub(crate) struct Backing {
    /// `None` only inside `drop`.
    holding: Option<Box<Holding>>,
    address: NonNull<u8>,
    bytes: usize,
    /// Whether the allocation was taken from the pool, so its pages were already populated.
    reused: bool,
    lent: ViewCount,
    reaper: Reaper,
}

// SAFETY: `address` points into the mapping that `holding` owns. A mapping is not bound to a
// thread.
unsafe impl Send for Backing {}
// SAFETY: as above; only unsafe methods access the bytes, and their callers rule out data races.
// The other fields synchronize their own changes.
unsafe impl Sync for Backing {}

impl Backing {
    pub(crate) fn new(mapping: Mapping, memory: Memory, reaper: Reaper) -> Self {
        let (address, bytes) = (mapping.address(), mapping.bytes());
        Backing { holding: Some(Holding::new(mapping, memory)), address, bytes, reused: false, lent: ViewCount::new(), reaper }
    }

    /// Reuses a pooled allocation by moving its mapping to offset `at` in `range`.
    ///
    /// # Errors
    /// The kernel's refusal of the move or of advice about it. The allocation is released. Memory
    /// can usually be mapped at `at` instead: see [`Mapping::move_to`].
    pub(crate) fn from_pool(
        holding: Holding,
        range: &Arc<AddressRange>,
        at: usize,
        reaper: &Reaper,
    ) -> Result<Self, dmabuf::Error> {
        holding.reusable.store(false, Ordering::Release);
        match holding.move_to(range, at) {
            // Devices may write to private memory only while forked processes can't inherit it.
            Ok(holding) => {
                if holding.memory.is_private()
                    && let Err(error) = holding.mapping.forbid_fork()
                {
                    reaper.release(holding);
                    return Err(error);
                }
                let (address, bytes) = (holding.mapping.address(), holding.mapping.bytes());
                let (lent, reaper) = (ViewCount::new(), reaper.clone());
                Ok(Backing { holding: Some(holding), address, bytes, reused: true, lent, reaper })
            }
            Err((holding, error)) => {
                reaper.release(holding);
                Err(error)
            }
        }
    }

    pub(crate) fn is_reused(&self) -> bool {
        self.reused
    }

    /// Allows the memory to be reused once it is dropped. Call this when the memory is complete.
    /// It has no effect on memory that is itself a dma-buf: `Mapping::move_to` can't move the
    /// mapping of a dma-heap's dma-buf, so the memory would only take up space in the pool.
    pub(crate) fn allow_reuse(&self) {
        let holding = self.holding();
        if holding.memory.dma_buf().is_none() {
            holding.reusable.store(true, Ordering::Release);
        }
    }

    /// Allows forked processes to inherit private memory, because devices no longer write to it.
    /// If the kernel refuses for lack of memory, forked processes still don't inherit it.
    pub(crate) fn allow_fork(&self) {
        let holding = self.holding();
        if holding.memory.is_private() {
            let _ = holding.mapping.allow_fork();
        }
    }

    /// Moves bytes to the start of their slot, and zeroes the rest of the slot.
    ///
    /// # Safety
    /// The slot must be filled, and nothing else may read or write it during the call.
    ///
    /// # Panics
    /// If the slot is not within the allocation, or the bytes are not within the slot.
    pub(crate) unsafe fn move_down(&self, Move { slot, from, bytes }: &Move) {
        let within = slot.start <= *from && from.checked_add(*bytes).is_some_and(|end| end <= slot.end) && slot.end <= self.bytes;
        assert!(within, "{bytes} bytes at {from} are not within slot {slot:?} of {} bytes", self.bytes);
        // SAFETY: the slot is within the mapping, as asserted.
        let to = unsafe { self.address.add(slot.start) };
        // SAFETY: `from` is within the slot, as asserted.
        let from = unsafe { self.address.add(*from) };
        // SAFETY: source and destination are within the slot, which is mapped and exclusive to the
        // caller; `copy_to` allows them to overlap.
        unsafe { from.copy_to(to, *bytes) };
        // SAFETY: `bytes` is at most the slot's length, as asserted.
        let rest = unsafe { to.add(*bytes) };
        // SAFETY: the rest of the slot is mapped and exclusive to the caller, too.
        unsafe { rest.write_bytes(0, slot.end - slot.start - bytes) };
    }

    pub(crate) fn charge(&self, ledger: &Weak<dyn Ledger>, load: LoadId, bytes: u64) {
        self.holding().charge.add(ledger, load, bytes);
    }

    /// Prevents later loads from reusing the memory. Call this when the memory is handed out.
    pub(crate) fn forbid_reuse(&self) {
        self.holding().reusable.store(false, Ordering::Release);
    }

    pub(crate) fn address(&self) -> NonNull<u8> {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The memory's dma-buf. It is either the memory itself or a dma-buf that was exported from
    /// it.
    pub(crate) fn dma_buf(&self) -> Option<&DmaBuf> {
        let holding = self.holding();
        holding.memory.dma_buf().or_else(|| holding.exported.get())
    }

    /// Makes filled memory available to devices as a dma-buf, and makes its bytes visible to them.
    /// If the memory has no dma-buf yet, calls `export` to create one, and then seals the memfd if
    /// the memory has one.
    pub(crate) fn export<E: From<dmabuf::Error>>(&self, export: impl FnOnce(&Memory) -> Result<DmaBuf, E>) -> Result<(), E> {
        let holding = self.holding();
        if let Some(dma_buf) = holding.memory.dma_buf() {
            // The worker that allocated the memory began this CPU access.
            return Ok(dma_buf.end_cpu_access(Access::ReadWrite)?);
        }
        if let Some(dma_buf) = holding.exported.get() {
            // The memory was exported during an earlier use, and still has the same pages.
            return Ok(dma_buf.cpu_access(Access::ReadWrite)?.end()?);
        }
        let dma_buf = export(&holding.memory)?;
        // Before the dma-buf existed, the CPU zeroed the tail and may have copied bytes. Beginning
        // and ending a CPU access flushes those writes.
        dma_buf.cpu_access(Access::ReadWrite)?.end()?;
        if let Some(memfd) = holding.memory.memfd() {
            // Sealed only now, because neither `Udmabuf::create` nor newer kernels export a memfd
            // that has this seal.
            memfd.seal_against_writes()?;
        }
        holding.exported.set(dma_buf).expect("an allocation should be exported only once");
        Ok(())
    }

    /// Counts one more view. If the memory was handed out, returns `false` and counts nothing.
    pub(crate) fn lend(&self) -> bool {
        self.lent.lend()
    }

    /// Removes a view that [`Backing::lend`] added.
    pub(crate) fn take_back(&self) {
        self.lent.take_back();
    }

    /// Marks the memory as handed out, so no new view can be created. If views are still alive,
    /// nothing changes, and the error is their number.
    pub(crate) fn hand_out(&self) -> Result<(), usize> {
        self.lent.hand_out().inspect(|()| self.forbid_reuse())
    }

    /// Borrows filled bytes.
    ///
    /// # Safety
    /// The bytes must be filled, and nothing may write to them while the slice lives.
    ///
    /// # Panics
    /// If `range` is not within the allocation.
    pub(crate) unsafe fn filled(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} is not within {} bytes", self.bytes);
        // SAFETY: the memory stays mapped while this value lives, and the range is within it.
        let start = unsafe { self.address.add(range.start) };
        // SAFETY: as above; the caller guarantees that the bytes are filled and not written to.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), range.len()) }
    }

    /// The mapping, and the memory that backs it.
    pub(crate) fn parts(&self) -> (&Mapping, &Memory) {
        let holding = self.holding();
        (&holding.mapping, &holding.memory)
    }

    /// The memfd, if the memory is one.
    pub(crate) fn memfd(&self) -> Option<&Memfd> {
        self.holding().memory.memfd()
    }

    fn holding(&self) -> &Holding {
        self.holding.as_ref().expect("only `drop` takes the holding")
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
    /// Borrows `bytes` bytes at offset `start` mutably. They may be uninitialized.
    ///
    /// # Safety
    /// Nothing else may read or write them while the slice lives.
    ///
    /// # Panics
    /// If the bytes are not within the allocation.
    #[expect(clippy::mut_from_ref, reason = "the caller guarantees exclusive access to these bytes")]
    pub(crate) unsafe fn unfilled(&self, start: usize, bytes: usize) -> &mut [MaybeUninit<u8>] {
        let end = start.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "{bytes} bytes at {start} are not within {} bytes", self.bytes);
        // SAFETY: the memory stays mapped while this value lives, and the range is within it.
        let start = unsafe { self.address.add(start) };
        // SAFETY: as above; the caller guarantees exclusive access.
        unsafe { std::slice::from_raw_parts_mut(start.cast().as_ptr(), bytes) }
    }
}

/// Used if all pages of the memory are present, so nothing has to be populated.
impl Sink for Backing {
    unsafe fn fill_with(&self, offset: usize, bytes: usize, write: &mut Write<'_>) -> Result<usize, Fault> {
        // SAFETY: the caller guarantees exclusive access to this part.
        write(unsafe { self.unfilled(offset, bytes) }).map_err(Fault::Read)
    }

    fn populate(&self, _: usize, _: usize) -> Result<(), Fault> {
        Ok(())
    }

    fn runs_foreign_code(&self) -> bool {
        false
    }
}

/// The memory of a piece: a range of an allocation that the kernel may write to while the piece is
/// being filled. Dropping this value returns the piece's permit, `P`.
#[derive(Debug)]
pub(crate) struct PieceBuffer<P> {
    backing: Arc<Backing>,
    /// Populates the memory on demand; `None` if all its pages are present.
    filling: Option<Arc<dyn Sink>>,
    offset: usize,
    bytes: usize,
    _permit: P,
}

impl<P> PieceBuffer<P> {
    /// Creates a buffer for the `bytes` bytes of `backing` at `offset`. If `filling` is `None`,
    /// their pages must be present; otherwise `filling` populates them. Offsets in `filling` are
    /// offsets in the allocation.
    ///
    /// # Panics
    /// If the bytes reach past the end of the allocation.
    pub(crate) fn new(backing: Arc<Backing>, filling: Option<Arc<dyn Sink>>, offset: usize, bytes: usize, permit: P) -> Self {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= backing.bytes()), "a piece must lie within its allocation");
        PieceBuffer { backing, filling, offset, bytes, _permit: permit }
    }
}

// SAFETY: `new` checked that the bytes are within the mapping, which the Arc keeps alive. A
// segment becomes visible only after the driver has returned all of its pieces.
unsafe impl<P> Buffer for PieceBuffer<P> {
    fn address(&self) -> NonNull<u8> {
        // SAFETY: `new` checked that `offset` is within the mapping.
        unsafe { self.backing.address().add(self.offset) }
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn leak(self) {
        // The permit is not leaked but dropped, so later loads can use the whole window.
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
        // This reaper has no thread: only `run_once` unmaps.
        let reaper = Reaper::without_thread();
        drop(Backing::new(mapping, Memory::Anonymous, reaper.clone()));
        assert!(range.map(&Memory::Anonymous, 0, 4096).is_err(), "the memory should still be mapped");
        reaper.run_once();
        range.map(&Memory::Anonymous, 0, 4096).unwrap();
    }
}
