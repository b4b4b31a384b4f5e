//! Whose memory it is: what a piece of memory has taken of the loader's budget, given back when it is freed.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{OnceLock, Weak};

use crate::support::id::LoadId;

/// Keeps the accounts that charges are of.
pub(crate) trait Ledger: fmt::Debug + Send + Sync {
    /// Memory is freed: what the load held of it, and what counted as the pool's.
    fn freed(&self, load: LoadId, held: u64, pooled: u64);
    /// What a load held is in the pool now.
    fn pooled(&self, load: LoadId, bytes: u64);
    /// Memory of the pool is used again, by a load that has taken as much.
    fn unpooled(&self, bytes: u64);
}

/// See the module. The memory may outlive the loader: then nobody keeps accounts any more.
#[derive(Debug, Default)]
pub(crate) struct Charge {
    ledger: OnceLock<Weak<dyn Ledger>>,
    load: AtomicU64,
    held: AtomicU64,
    pooled: AtomicU64,
}

impl Charge {
    /// A load has taken so much for a part of this memory.
    pub(crate) fn add(&self, ledger: &Weak<dyn Ledger>, load: LoadId, bytes: u64) {
        let ledger = self.ledger.get_or_init(|| Weak::clone(ledger));
        self.load.store(load.0, Ordering::Relaxed);
        self.held.fetch_add(bytes, Ordering::AcqRel);
        // Memory from the pool is paid for part by part, as it is used.
        let mut part = 0;
        let _ = self.pooled.fetch_update(Ordering::AcqRel, Ordering::Acquire, |pooled| {
            part = pooled.min(bytes);
            Some(pooled - part)
        });
        if let Some(ledger) = ledger.upgrade().filter(|_| part > 0) {
            ledger.unpooled(part);
        }
    }

    /// It goes into the pool: nobody holds it, and nobody adds to it before it comes out again.
    pub(crate) fn pool(&self) {
        let held = self.held.swap(0, Ordering::AcqRel);
        self.pooled.fetch_add(held, Ordering::AcqRel);
        if let Some(ledger) = self.ledger.get().and_then(Weak::upgrade) {
            ledger.pooled(LoadId(self.load.load(Ordering::Relaxed)), held);
        }
    }

    /// Who to tell that it is in the pool, when it may be somebody else's already.
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
