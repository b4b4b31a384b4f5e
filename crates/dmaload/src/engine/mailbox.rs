//! The teller's queue. Through it, events from the ring thread and the workers reach consumers and
//! `tracing` subscribers, so their code runs neither on the ring thread nor under a lock. Because
//! only the teller hands over segments, each load's segments stay in order.
//!
//! A slow waker delays the events of other loads, but not their reads and allocations.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use super::state::LoadShared;
use crate::ring::Output;
use crate::support::id::LoadId;

/// A message for the teller.
#[derive(Debug)]
pub(super) enum Message<E> {
    /// An output of the ring thread, whose buffer was already released.
    Ring(Output<()>),
    /// A load may have segments to hand over, or may have ended.
    Deliver(Arc<LoadShared>),
    /// The ring failed, and a new one replaces it.
    RingBroke { errno: Errno, leaked_bytes: u64 },
    /// Workers are waiting for files of these loads, whose servers are not answering.
    /// `is_exhausted` says whether all workers are stalled and no more may be started.
    Stalled { loads: Vec<LoadId>, is_exhausted: bool },
    /// No thread could be started to replace a stalled worker.
    NoSubstitute { error: io::Error },
    /// The ring thread has exited, either normally or because it panicked with the message
    /// `panic`. `engine` is the ring thread's reference to the engine, which the teller drops.
    RingEnded { engine: Arc<E>, panic: Option<String> },
    /// Makes the teller panic, as a broken invariant would.
    #[cfg(test)]
    Panic,
}

#[derive(Debug)]
struct MailboxState<E> {
    messages: VecDeque<Message<E>>,
    /// Whether new messages are refused. The teller exits once it has handled the messages that
    /// are already queued.
    closed: bool,
    ended: bool,
}

/// The messages that the teller has not handled yet. `E` is the type of the engine.
#[derive(Debug)]
pub(super) struct Mailbox<E> {
    queue: Mutex<MailboxState<E>>,
    changed: Condvar,
}

impl<E> Default for Mailbox<E> {
    fn default() -> Self {
        let queue = MailboxState { messages: VecDeque::new(), closed: false, ended: false };
        Mailbox { queue: Mutex::new(queue), changed: Condvar::new() }
    }
}

impl<E> Mailbox<E> {
    fn queue(&self) -> MutexGuard<'_, MailboxState<E>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues messages. If the queue is closed, drops them instead: by then, every load has ended.
    pub(super) fn push(&self, messages: impl IntoIterator<Item = Message<E>>) {
        let mut messages: VecDeque<_> = messages.into_iter().collect();
        let mut queue = self.queue();
        if !queue.closed {
            queue.messages.append(&mut messages);
        }
        drop(queue);
        self.changed.notify_all();
        // Drop rejected messages without holding the lock.
        drop(messages);
    }

    /// Waits for messages, and takes all of them. Returns `None` once the queue is closed and
    /// empty.
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

    /// Closes the queue: no more messages are accepted.
    pub(super) fn close(&self) {
        self.queue().closed = true;
        self.changed.notify_all();
    }

    /// Records that the teller has ended.
    pub(super) fn end(&self) {
        let mut queue = self.queue();
        (queue.closed, queue.ended) = (true, true);
        drop(queue);
        self.changed.notify_all();
    }

    /// Waits until the teller has ended or `timeout` has passed. Returns whether it has ended.
    pub(super) fn wait_until_ended(&self, timeout: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.queue(), timeout, |queue| !queue.ended);
        waited.unwrap_or_else(PoisonError::into_inner).0.ended
    }
}
