//! The thread that tells: what the ring thread and the workers have found out reaches the loads' consumers, and
//! the subscribers of `tracing`, from here. So the caller's code runs neither on the ring thread nor under a lock,
//! and each load's segments go out in order without one.
//!
//! A waker that takes its time holds up what other loads are told, but no read and no allocation.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use super::state::LoadShared;
use crate::ring::Output;
use crate::support::id::LoadId;

/// Something to tell.
#[derive(Debug)]
pub(super) enum Message<E> {
    /// The ring thread has done this. Buffers have gone back before.
    Ring(Output<()>),
    /// A load may have segments to hand over, or its end.
    Deliver(Arc<LoadShared>),
    /// The ring broke down, and another one takes its place.
    RingBroke { errno: Errno, leaked_bytes: u64 },
    /// Workers wait for files of these loads, whose servers do not answer. `is_exhausted` if all
    /// workers do that can be had.
    Stalled { loads: Vec<LoadId>, is_exhausted: bool },
    /// No thread could be started in place of one of these.
    NoSubstitute { error: io::Error },
    /// The ring thread has ended: by itself, or with this panic. Its share of the engine is dropped here.
    RingEnded { engine: Arc<E>, panic: Option<String> },
    /// The thread panics, as a broken invariant would make it.
    #[cfg(test)]
    Panic,
}

#[derive(Debug)]
struct Queue<E> {
    messages: VecDeque<Message<E>>,
    /// The thread ends when it has told what there is.
    closed: bool,
    ended: bool,
}

/// What is to be told, and not told yet. `E` is the engine.
#[derive(Debug)]
pub(super) struct Mailbox<E> {
    queue: Mutex<Queue<E>>,
    changed: Condvar,
}

impl<E> Default for Mailbox<E> {
    fn default() -> Self {
        let queue = Queue { messages: VecDeque::new(), closed: false, ended: false };
        Mailbox { queue: Mutex::new(queue), changed: Condvar::new() }
    }
}

impl<E> Mailbox<E> {
    fn queue(&self) -> MutexGuard<'_, Queue<E>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves messages to the thread. Once that was told to end, they are dropped: by then every load has ended.
    pub(super) fn push(&self, messages: impl IntoIterator<Item = Message<E>>) {
        let mut messages: VecDeque<_> = messages.into_iter().collect();
        let mut queue = self.queue();
        if !queue.closed {
            queue.messages.append(&mut messages);
        }
        drop(queue);
        self.changed.notify_all();
        // What is left is dropped here, without the lock.
        drop(messages);
    }

    /// Waits for messages, and takes all there are; `None` when no more come.
    pub(super) fn next(&self) -> Option<VecDeque<Message<E>>> {
        let mut queue = self.queue();
        loop {
            if !queue.messages.is_empty() {
                return Some(std::mem::take(&mut queue.messages));
            }
            if queue.closed {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No more messages come.
    pub(super) fn close(&self) {
        self.queue().closed = true;
        self.changed.notify_all();
    }

    /// The thread has ended.
    pub(super) fn end(&self) {
        let mut queue = self.queue();
        (queue.closed, queue.ended) = (true, true);
        drop(queue);
        self.changed.notify_all();
    }

    /// Waits for the thread to end, or the time to be up; whether it has ended.
    pub(super) fn wait_until_ended(&self, timeout: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.queue(), timeout, |queue| !queue.ended);
        waited.unwrap_or_else(PoisonError::into_inner).0.ended
    }
}
