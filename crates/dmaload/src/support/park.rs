//! Blocks a thread on a future.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

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

/// Polls a future on this thread, which sleeps between wakes.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let unpark = Arc::new(Unpark { thread: thread::current(), is_woken: AtomicBool::new(false) });
    let waker = Waker::from(Arc::clone(&unpark));
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        // Parking may also end spuriously, or because of an unrelated unpark.
        while !unpark.is_woken.swap(false, Ordering::Acquire) {
            thread::park();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

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
        // An unpark without a wake.
        thread::current().unpark();
        let begin = Instant::now();
        assert_eq!(block_on(future), 7);
        assert!(begin.elapsed() >= Duration::from_millis(20));
        assert_eq!(polls, 3);
    }
}
