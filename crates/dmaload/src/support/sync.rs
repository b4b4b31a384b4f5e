//! The standard library's locks and atomics, or loom's, which try different interleavings of a
//! model's threads. `--cfg dmaload_loom` selects loom's. The flag is not `--cfg loom`, because
//! tokio would react to that, too.

use std::time::Duration;

#[cfg(not(dmaload_loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};

#[cfg(dmaload_loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard, atomic};

/// Locks data that is never left in an inconsistent state, so poisoning by a panic can be ignored.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits until `changed` is notified. May return earlier (a spurious wakeup), so callers must
/// check their condition in a loop.
pub(crate) fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits until `changed` is notified, or until the timeout. (With loom, the timeout never
/// expires.)
pub(crate) fn wait_timeout<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>, timeout: Duration) -> MutexGuard<'a, T> {
    changed.wait_timeout(guard, timeout).unwrap_or_else(std::sync::PoisonError::into_inner).0
}

/// Runs models. With loom, tries every interleaving with at most three preemptions; without loom,
/// runs the model 300 times.
#[cfg(test)]
pub(crate) mod model {
    #[cfg(dmaload_loom)]
    pub(crate) use loom::{
        sync::Arc,
        thread::{spawn, yield_now},
    };
    #[cfg(not(dmaload_loom))]
    pub(crate) use std::{
        sync::Arc,
        thread::{spawn, yield_now},
    };

    #[cfg(dmaload_loom)]
    pub(crate) fn model(run: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        // With a higher bound, a model takes hours and is unlikely to find more bugs.
        builder.preemption_bound = Some(3);
        builder.check(run);
    }

    #[cfg(not(dmaload_loom))]
    pub(crate) fn model(run: impl Fn()) {
        for _ in 0..300 {
            run();
        }
    }
}
