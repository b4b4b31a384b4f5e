//! Budget accounting for one allocation: its share of the loader's budget is booked to the pool
//! while the pool keeps the memory, and returned when the memory is freed.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, Weak};

use crate::support::id::LoadId;

/// Keeps the accounts that charges are booked to.
pub(crate) trait Ledger: fmt::Debug + Send + Sync {
    /// Books freed memory, of which `held` bytes were charged to the load and `pooled` bytes to
    /// the pool.
    fn freed(&self, load: LoadId, held: u64, pooled: u64);
    /// Moves a charge of `bytes` bytes from the load that held the memory to the pool.
    fn pooled(&self, load: LoadId, bytes: u64);
    /// Ends the pool's charge for `bytes` bytes, because a load reuses them and has already taken
    /// as much from the budget. With 0 bytes, only makes waiting loads search the pool again.
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
        // Reused memory moves from the pool to the load step by step, as the load charges it.
        let mut part = 0;
        let _ = self.pooled.fetch_update(Ordering::AcqRel, Ordering::Acquire, |pooled| {
            part = pooled.min(bytes);
            Some(pooled - part)
        });
        if let Some(ledger) = ledger.upgrade().filter(|_| part > 0) {
            ledger.unpooled(part);
        }
    }

    /// Books the memory to the pool: no load holds it, and nothing adds to the charge until it is
    /// reused.
    pub(crate) fn pool(&self) {
        let held = self.held.swap(0, Ordering::AcqRel);
        self.pooled.fetch_add(held, Ordering::AcqRel);
        if let Some(ledger) = self.ledger.get().and_then(Weak::upgrade) {
            ledger.pooled(LoadId(self.load.load(Ordering::Relaxed)), held);
        }
    }

    /// The ledger, so the caller can notify it once the memory is in the pool. By then, another
    /// load may already have taken the memory, and this charge with it.
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
