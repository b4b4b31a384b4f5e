//! Budget accounting for one allocation. A load is charged for the memory that it uses. While the
//! pool keeps the memory, the charge is booked to the pool. When the memory is freed, the charge
//! is returned to the loader's budget.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, Weak};

use crate::support::id::LoadId;

/// Keeps the accounts that charges are booked to.
pub(crate) trait Ledger: fmt::Debug + Send + Sync {
    /// Records that memory was freed, of which `held` bytes were charged to the load and `pooled`
    /// bytes to the pool.
    fn freed(&self, load: LoadId, held: u64, pooled: u64);
    /// Moves a charge of `bytes` bytes from the load that held the memory to the pool.
    fn pooled(&self, load: LoadId, bytes: u64);
    /// Reduces the pool's charge by `bytes` bytes, because a load reuses them and has already
    /// taken the same amount from the budget. If `bytes` is 0, this only makes waiting loads
    /// search the pool again.
    fn unpooled(&self, bytes: u64);
}

/// The charge for one allocation. If the allocation outlives the loader, the ledger is gone and
/// nothing more is booked.
#[derive(Debug, Default)]
pub(crate) struct Charge {
    ledger: OnceLock<Weak<dyn Ledger>>,
    load: AtomicU64,
    held: AtomicU64,
    pooled: AtomicU64,
}

impl Charge {
    /// Charges `bytes` of this allocation to a load.
    pub(crate) fn add(&self, ledger: &Weak<dyn Ledger>, load: LoadId, bytes: u64) {
        let ledger = self.ledger.get_or_init(|| Weak::clone(ledger));
        self.load.store(load.0, Ordering::Relaxed);
        self.held.fetch_add(bytes, Ordering::AcqRel);
        // The charge for reused memory moves from the pool to the load step by step, with each
        // call.
        let mut part = 0;
        let _ = self.pooled.fetch_update(Ordering::AcqRel, Ordering::Acquire, |pooled| {
            part = pooled.min(bytes);
            Some(pooled - part)
        });
        if let Some(ledger) = ledger.upgrade().filter(|_| part > 0) {
            ledger.unpooled(part);
        }
    }

    /// Books the memory to the pool. By now, no load holds the memory, and nothing is added to the
    /// charge until the memory is reused.
    pub(crate) fn pool(&self) {
        let held = self.held.swap(0, Ordering::AcqRel);
        self.pooled.fetch_add(held, Ordering::AcqRel);
        if let Some(ledger) = self.ledger.get().and_then(Weak::upgrade) {
            ledger.pooled(LoadId(self.load.load(Ordering::Relaxed)), held);
        }
    }

    /// Returns the ledger, so the caller can notify it once the memory is in the pool. By then,
    /// another load may already have taken the memory together with this charge.
    pub(crate) fn ledger(&self) -> Option<Weak<dyn Ledger>> {
        self.ledger.get().cloned()
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let (held, pooled) = (*self.held.get_mut(), *self.pooled.get_mut());
        if let Some(ledger) = self.ledger.get().and_then(Weak::upgrade).filter(|_| held + pooled > 0) {
            ledger.freed(LoadId(*self.load.get_mut()), held, pooled);
        }
    }
}
