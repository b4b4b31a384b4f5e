//! Counts the engine's running threads, and reports what a shutdown leaves behind.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::mailbox::Mailbox;

/// Counts the threads that are still running: the ring thread, the workers, and the threads that
/// watch the workers and memory pressure. The teller is not counted, because it exits after all of
/// them.
#[derive(Debug, Default)]
pub(super) struct Threads {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Threads {
    fn count(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a thread that is about to start.
    pub(super) fn start(&self) {
        *self.count() += 1;
    }

    /// Records that a thread is about to exit or could not be started. After the last one, the
    /// teller delivers the remaining messages and exits.
    pub(super) fn end<E>(&self, mailbox: &Mailbox<E>) {
        let left = {
            let mut count = self.count();
            *count = count.checked_sub(1).expect("each thread should be subtracted only once");
            *count
        };
        self.changed.notify_all();
        if left == 0 {
            mailbox.close();
        }
    }

    /// Waits until all threads have ended or `timeout` has passed. Returns how many are still
    /// running.
    pub(super) fn wait(&self, timeout: Duration) -> usize {
        let waited = self.changed.wait_timeout_while(self.count(), timeout, |count| *count > 0);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// The memory and threads that a shutdown had to leave behind at its deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes that reads in flight may still write to were leaked on purpose; threads that have not ended: {threads}")]
#[non_exhaustive]
pub struct Leaked {
    /// How many bytes were leaked.
    pub bytes: u64,
    /// How many threads are stuck in the kernel or in the caller's code (such as a heap or a
    /// waker). Each exits once the call that it is stuck in returns.
    pub threads: usize,
}
