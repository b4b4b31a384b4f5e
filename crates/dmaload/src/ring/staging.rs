//! Staging: the buffers that staged reads go into. These buffers are called slots. They all have
//! the same size, and are allocated on first use and then reused.
//!
//! The slots are small, so copies find their bytes in the processor's cache. Several slots let
//! reads and copies overlap.

use rustix::io::Errno;

use super::kernel::Kernel;
use crate::memory::buffer::Buffer;
use crate::memory::window::{Held, may_have_one};
use crate::route::{Attempt, Route};
use crate::support::id::LoadId;

/// The maximum size of staging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StagingBudget {
    pub(crate) slot_bytes: usize,
    pub(crate) slots: usize,
}

impl StagingBudget {
    /// How many slots may be read into at once: three quarters of all slots. A single load may
    /// read into three quarters of those, which is about half of all slots. A device finishes all
    /// of its reads at about the same time, so if all slots were read into at once, copies would
    /// wait for reads, and then reads for copies. With reads into half of the slots, a load
    /// reached 93% of a virtual disk's maximum speed. With reads into all slots, it reached 57%.
    fn reads(self) -> u64 {
        (self.slots as u64 * 3 / 4).max(1)
    }
}

const SLOT: &str = "a slot must exist until `clear` removes it";

/// Identifies a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StagingSlot(usize);

#[derive(Debug)]
struct StagingBuffer<S> {
    buffer: S,
    /// The buffer's entry in the kernel's table of registered buffers; `None` if it is not
    /// registered.
    buffer_slot: Option<u16>,
    /// The load that holds the slot, and the file system from which it is filled.
    taken_by: Option<(LoadId, u64)>,
    /// Whether a read into the slot is in flight.
    reading: bool,
}

/// A fallback from the best route for reads into staging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StagingStep {
    pub(crate) to: Route,
    pub(crate) attempt: Attempt,
    pub(crate) errno: Errno,
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Staging<S> {
    budget: StagingBudget,
    slots: Vec<StagingBuffer<S>>,
    free: Vec<StagingSlot>,
    /// The error of the last allocation, if it failed.
    short: Option<Errno>,
}

impl<S: Buffer> Staging<S> {
    pub(crate) fn new(budget: StagingBudget) -> Self {
        Staging { budget, slots: Vec::new(), free: Vec::new(), short: None }
    }

    pub(crate) fn slots(&self) -> usize {
        self.budget.slots
    }

    /// Changes the number of slots. Surplus slots stay allocated, but no slot is taken while
    /// `slots` or more are in use.
    pub(crate) fn set_slots(&mut self, slots: usize) {
        self.budget.slots = slots;
    }

    pub(crate) fn slot_bytes(&self) -> usize {
        self.budget.slot_bytes
    }

    /// Considers only slots for which `counts` returns true. Returns how many of them are taken,
    /// how many this load holds, and how many all loads together hold for this file system.
    fn held(&self, load: LoadId, file_system: u64, counts: impl Fn(&StagingBuffer<S>) -> bool) -> (u64, Held) {
        let (mut taken, mut held) = (0, Held::default());
        for slot in self.slots.iter().filter(|slot| counts(slot)) {
            let Some((holder, from)) = slot.taken_by else { continue };
            taken += 1;
            held.by_load += u64::from(holder == load);
            held.by_file_system += u64::from(from == file_system);
        }
        (taken, held)
    }

    /// Takes a slot for a read from this file system. Returns `None` if no slot is free, or if the
    /// load or the file system already holds its share. `waits` means that the load can't release
    /// any of its slots before it gets this one. In that case, the shares apply only if the load
    /// holds no slot.
    ///
    /// # Errors
    /// If not even one slot can be allocated.
    pub(crate) fn take<K: Kernel<Staging = S>>(
        &mut self,
        load: LoadId,
        file_system: u64,
        waits: bool,
        kernel: &mut K,
    ) -> Result<Option<StagingSlot>, Errno> {
        let (taken, held) = self.held(load, file_system, |_| true);
        let (reading, read_into) = self.held(load, file_system, |slot| slot.reading);
        // A load that holds no slot can wait for others to return theirs, so it must not exceed
        // its file system's share.
        let counted = |part: Held| if waits && held.by_load > 0 { Held::default() } else { part };
        let may_take = may_have_one(self.budget.slots as u64, taken, counted(held));
        let may_read = may_have_one(self.budget.reads(), reading, counted(read_into));
        if !may_take || !may_read {
            return Ok(None);
        }
        if self.free.is_empty() && self.slots.len() < self.budget.slots {
            match kernel.staging(self.budget.slot_bytes) {
                Ok(buffer) => {
                    self.short = None;
                    self.free.push(StagingSlot(self.slots.len()));
                    self.slots.push(StagingBuffer { buffer, buffer_slot: None, taken_by: None, reading: false });
                }
                Err(errno) if self.slots.is_empty() => return Err(errno),
                // Continue with the existing slots.
                Err(errno) => self.short = Some(errno),
            }
        }
        let slot = self.free.pop();
        if let Some(slot) = slot {
            let slot = self.slots.get_mut(slot.0).expect(SLOT);
            slot.taken_by = Some((load, file_system));
            slot.reading = true;
        }
        Ok(slot)
    }

    /// Registers a taken slot, unless it is registered already. If the kernel refuses, returns the
    /// fallback to report. A refused registration may be retried later: whether it exceeds the
    /// locked-memory limit depends on what else is locked.
    pub(crate) fn register<K: Kernel<Staging = S>>(
        &mut self,
        slot: StagingSlot,
        kernel: &mut K,
        buffer_slots: &mut Vec<u16>,
    ) -> Option<StagingStep> {
        if let Err(errno) = kernel.ring() {
            return Some(StagingStep { to: Route::PreadDirect, attempt: Attempt::SetUpRing, errno });
        }
        let registered = self.slots.iter().filter(|slot| slot.buffer_slot.is_some()).count();
        let slot = Some(self.slots.get_mut(slot.0).expect(SLOT)).filter(|slot| slot.buffer_slot.is_none())?;
        // One entry of the table is reserved for pieces. If no other entry is free, reads into
        // this slot use no registered buffer for now. That isn't a refusal.
        let place = if registered + 1 < usize::from(kernel.buffer_slots()) { buffer_slots.pop() } else { None }?;
        match kernel.register_buffer(place, slot.buffer.address(), slot.buffer.bytes()) {
            Ok(()) => {
                slot.buffer_slot = Some(place);
                None
            }
            Err(errno) => {
                buffer_slots.push(place);
                Some(StagingStep { to: Route::UringDirect, attempt: Attempt::RegisterStaging, errno })
            }
        }
    }

    /// Returns how many bytes of staging exist, and why no more could be allocated. Returns `None`
    /// unless the last allocation failed.
    pub(crate) fn shortage(&self) -> Option<(u64, Errno)> {
        let bytes = self.slots.iter().map(|slot| slot.buffer.bytes() as u64).sum();
        self.short.map(|errno| (bytes, errno))
    }

    /// Returns the memory of a taken slot, and its entry in the table of registered buffers.
    pub(crate) fn get(&self, slot: StagingSlot) -> (&S, Option<u16>) {
        let slot = self.slots.get(slot.0).expect(SLOT);
        (&slot.buffer, slot.buffer_slot)
    }

    /// Records that a read into this slot has completed.
    pub(crate) fn finish_read(&mut self, slot: StagingSlot) {
        self.slots.get_mut(slot.0).expect(SLOT).reading = false;
    }

    /// Gives back a slot that nothing reads into or copies from any more.
    pub(crate) fn give_back(&mut self, slot: StagingSlot) {
        self.finish_read(slot);
        let holder = self.slots.get_mut(slot.0).expect(SLOT).taken_by.take();
        assert!(holder.is_some(), "a slot must be given back exactly once");
        self.free.push(slot);
    }

    #[cfg(test)]
    pub(crate) fn taken(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Frees all slots except taken ones, which are leaked. Returns how many bytes were leaked.
    pub(crate) fn clear<K: Kernel<Staging = S>>(&mut self, kernel: &mut K, buffer_slots: &mut Vec<u16>) -> u64 {
        let mut leaked = 0;
        self.free.clear();
        for slot in self.slots.drain(..) {
            if slot.taken_by.is_some() {
                leaked += slot.buffer.bytes() as u64;
                slot.buffer.leak();
            } else if let Some(registered) = slot.buffer_slot {
                kernel.unregister_buffer(registered);
                buffer_slots.push(registered);
            }
        }
        leaked
    }
}
