//! The staging buffers of [`Route::Bounce`]: a budget of equal slots, made when they are first needed and then reused.
//!
//! Small slots, so that a copy finds its bytes in the processor's cache; several, so that reads, copies and the waiting
//! for either go on side by side.

use rustix::io::Errno;

use super::kernel::{Buffer, Kernel};
use crate::route::{Attempt, Route};

/// How much staging there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StagingBudget {
    pub(crate) slot_bytes: usize,
    pub(crate) slots: usize,
}

/// Names a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StagingSlot(usize);

#[derive(Debug)]
struct Slot<S> {
    buffer: S,
    /// Where it is registered.
    buffer_slot: Option<u16>,
    busy: bool,
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
    slots: Vec<Slot<S>>,
    free: Vec<StagingSlot>,
    step: Option<StagingStep>,
}

impl<S: Buffer> Staging<S> {
    pub(crate) fn new(budget: StagingBudget) -> Self {
        Staging { budget, slots: Vec::new(), free: Vec::new(), step: None }
    }

    pub(crate) fn slot_bytes(&self) -> usize {
        self.budget.slot_bytes
    }

    pub(crate) fn step(&self) -> Option<StagingStep> {
        self.step
    }

    /// Takes a slot; `None` when all of the budget is busy.
    ///
    /// # Errors
    /// When there is no memory for even one.
    pub(crate) fn take<K: Kernel<Staging = S>>(
        &mut self,
        kernel: &mut K,
        buffer_slots: &mut Vec<u16>,
    ) -> Result<Option<StagingSlot>, Errno> {
        if self.free.is_empty() && self.slots.len() < self.budget.slots {
            match kernel.staging(self.budget.slot_bytes) {
                Ok(buffer) => {
                    let buffer_slot = self.register(kernel, buffer_slots, &buffer);
                    self.free.push(StagingSlot(self.slots.len()));
                    self.slots.push(Slot { buffer, buffer_slot, busy: false });
                }
                Err(errno) if self.slots.is_empty() => return Err(errno),
                // The ones that exist have to do.
                Err(_) => {}
            }
        }
        let slot = self.free.pop();
        if let Some(taken) = slot.and_then(|slot| self.slots.get_mut(slot.0)) {
            taken.busy = true;
        }
        Ok(slot)
    }

    /// Registers a new slot, unless an earlier one was refused: what is too much for the limit stays too much.
    fn register<K: Kernel<Staging = S>>(&mut self, kernel: &mut K, buffer_slots: &mut Vec<u16>, buffer: &S) -> Option<u16> {
        if self.step.is_some() {
            return None;
        }
        if let Err(errno) = kernel.ring() {
            self.step = Some(StagingStep { to: Route::PreadDirect, attempt: Attempt::SetUpRing, errno });
            return None;
        }
        // One place of the table stays for pieces. Without any for staging it goes by unregistered reads: nothing was refused.
        let registered = self.slots.iter().filter(|slot| slot.buffer_slot.is_some()).count();
        let slot = if registered + 1 < usize::from(kernel.buffer_slots()) { buffer_slots.pop() } else { None }?;
        match kernel.register_buffer(slot, buffer.address(), buffer.bytes()) {
            Ok(()) => Some(slot),
            Err(errno) => {
                buffer_slots.push(slot);
                self.step = Some(StagingStep { to: Route::UringDirect, attempt: Attempt::RegisterStaging, errno });
                None
            }
        }
    }

    /// The memory of a slot that was taken, and where it is registered.
    pub(crate) fn get(&self, slot: StagingSlot) -> Option<(&S, Option<u16>)> {
        self.slots.get(slot.0).map(|slot| (&slot.buffer, slot.buffer_slot))
    }

    /// Nothing reads into this slot, or copies from it, any more.
    pub(crate) fn give_back(&mut self, slot: StagingSlot) {
        if let Some(taken) = self.slots.get_mut(slot.0).filter(|slot| slot.busy) {
            taken.busy = false;
            self.free.push(slot);
        }
    }

    /// Frees all slots but those that are busy, which are leaked; how many bytes these have.
    pub(crate) fn clear<K: Kernel<Staging = S>>(&mut self, kernel: &mut K, buffer_slots: &mut Vec<u16>) -> u64 {
        let mut leaked = 0;
        self.free.clear();
        self.step = None;
        for slot in self.slots.drain(..) {
            if slot.busy {
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
