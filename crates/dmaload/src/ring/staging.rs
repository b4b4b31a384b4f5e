//! The staging buffers of [`Route::Bounce`]: a budget of equal slots, made when they are first needed and then reused.
//!
//! Small slots, so that a copy finds its bytes in the processor's cache; several, so that reads, copies and the waiting
//! for either go on side by side.

use rustix::io::Errno;

use super::kernel::Kernel;
use crate::memory::buffer::Buffer;
use crate::memory::window::{Held, may_have_one};
use crate::route::{Attempt, Route};
use crate::support::id::LoadId;

/// How much staging there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StagingBudget {
    pub(crate) slot_bytes: usize,
    pub(crate) slots: usize,
}

impl StagingBudget {
    /// How many slots may be read into at once: not all of them, or copies would wait for reads and reads
    /// for copies. A device works on all reads that it has, and finishes them at about the same time;
    /// there must be slots for the next ones while these are copied. (With half of a load's slots,
    /// 0.93 of a virtual disk's limit was reached, and 0.57 with all of them.)
    fn reads(self) -> u64 {
        (self.slots as u64 * 3 / 4).max(1)
    }
}

const SLOT: &str = "slots stay until all of them are cleared";

/// Names a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StagingSlot(usize);

#[derive(Debug)]
struct StagingBuffer<S> {
    buffer: S,
    /// Where it is registered.
    buffer_slot: Option<u16>,
    /// Who has it, and for a file of which file system.
    taken_by: Option<(LoadId, u64)>,
    /// A read into it is in flight.
    reading: bool,
}

/// Why reads into staging do not take the best way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StagingStep {
    pub(crate) to: Route,
    pub(crate) attempt: Attempt,
    pub(crate) errno: Errno,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Staging<S> {
    budget: StagingBudget,
    slots: Vec<StagingBuffer<S>>,
    free: Vec<StagingSlot>,
    /// Why there are fewer slots than the budget allows.
    short: Option<Errno>,
}

impl<S: Buffer> Staging<S> {
    pub(crate) fn new(budget: StagingBudget) -> Self {
        Staging { budget, slots: Vec::new(), free: Vec::new(), short: None }
    }

    pub(crate) fn slots(&self) -> usize {
        self.budget.slots
    }

    /// From now on there may be so many slots. Those that are there already stay, and are not taken beyond that number.
    pub(crate) fn set_slots(&mut self, slots: usize) {
        self.budget.slots = slots;
    }

    pub(crate) fn slot_bytes(&self) -> usize {
        self.budget.slot_bytes
    }

    /// How many of the slots that count are taken, and how many of these this load holds, and this
    /// file system.
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

    /// Takes a slot for a file of this file system; `None` when all of the budget is busy, or the
    /// load or the file system has its part of it. That is not asked of one that `waits` for this
    /// slot with all that it holds.
    ///
    /// # Errors
    /// When there is no memory for even one.
    pub(crate) fn take<K: Kernel<Staging = S>>(
        &mut self,
        load: LoadId,
        file_system: u64,
        waits: bool,
        kernel: &mut K,
    ) -> Result<Option<StagingSlot>, Errno> {
        let (taken, held) = self.held(load, file_system, |_| true);
        let (reading, read_into) = self.held(load, file_system, |slot| slot.reading);
        // One that holds no slot waits for others to give theirs back, and must not take more than
        // its file system's part.
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
                // The ones that exist have to do.
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

    /// Registers a slot that was taken, unless it is already: why it can't be read into the best way, if it can't. Asked for each
    /// load anew, since the limit of locked memory counts what others hold meanwhile.
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
        // One place of the table stays for pieces. Without any for staging it goes by unregistered reads for now: nothing was
        // refused.
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

    /// How much staging there is, and why it is not more, if more was wanted and could not be had.
    pub(crate) fn shortage(&self) -> Option<(u64, Errno)> {
        let bytes = self.slots.iter().map(|slot| slot.buffer.bytes() as u64).sum();
        self.short.map(|errno| (bytes, errno))
    }

    /// The memory of a slot that was taken, and where it is registered.
    pub(crate) fn get(&self, slot: StagingSlot) -> (&S, Option<u16>) {
        let slot = self.slots.get(slot.0).expect(SLOT);
        (&slot.buffer, slot.buffer_slot)
    }

    /// A read into this slot has come back.
    pub(crate) fn is_read(&mut self, slot: StagingSlot) {
        self.slots.get_mut(slot.0).expect(SLOT).reading = false;
    }

    /// Nothing reads into this slot, or copies from it, any more.
    pub(crate) fn give_back(&mut self, slot: StagingSlot) {
        self.is_read(slot);
        let holder = self.slots.get_mut(slot.0).expect(SLOT).taken_by.take();
        assert!(holder.is_some(), "a slot is given back once");
        self.free.push(slot);
    }

    #[cfg(test)]
    pub(crate) fn taken(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Frees all slots but those that are busy, which are leaked; how many bytes these have.
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
