//! Blocks a thread on a future.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

struct Unpark {
    thread: Thread,
    is_woken: AtomicBool,
}

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Runs a future to completion on this thread. The thread sleeps while it waits for the future's
/// waker to be called.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    block_on_until(None, future).expect("without a deadline, the wait ends only when the future is ready")
}

/// Like [`block_on`], but returns `None` if the future is not ready within `timeout`.
pub(crate) fn block_on_for<T>(timeout: Duration, future: impl Future<Output = T>) -> Option<T> {
    block_on_until(Some(Instant::now() + timeout), future)
}

fn block_on_until<T>(deadline: Option<Instant>, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    let unpark = Arc::new(Unpark { thread: thread::current(), is_woken: AtomicBool::new(false) });
    let waker = Waker::from(Arc::clone(&unpark));
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(value);
        }
        // Parking may also end spuriously, or because of an unrelated unpark.
        while !unpark.is_woken.swap(false, Ordering::Acquire) {
            match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => thread::park(),
                Some(Duration::ZERO) => return None,
                Some(left) => thread::park_timeout(left),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_on_polls_once_per_wake() {
        let mut polls = 0;
        let future = std::future::poll_fn(|context| {
            polls += 1;
            let waker = context.waker().clone();
            match polls {
                1 => waker.wake(),
                2 => drop(thread::spawn(move || {
                    thread::sleep(Duration::from_millis(20));
                    waker.wake();
                })),
                _ => return Poll::Ready(7),
            }
            Poll::Pending
        });
        // Unpark the thread without waking the future.
        thread::current().unpark();
        let begin = Instant::now();
        assert_eq!(block_on(future), 7);
        assert!(begin.elapsed() >= Duration::from_millis(20));
        assert_eq!(polls, 3);
    }

    #[test]
    fn block_on_for_ends_at_its_deadline() {
        let begin = Instant::now();
        assert_eq!(block_on_for(Duration::from_millis(20), std::future::pending::<()>()), None);
        assert!(begin.elapsed() >= Duration::from_millis(20));
        assert_eq!(
            block_on_for(Duration::ZERO, std::future::ready(7)),
            Some(7),
            "the future should be polled once even if the timeout is zero"
        );
    }
}
