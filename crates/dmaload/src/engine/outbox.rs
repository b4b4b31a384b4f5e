//! The events of a load for its consumers, in order, and the wakers of those that wait for them.
//!
//! Any number may wait. Each event wakes all of them, so a waiter that is alive but no longer
//! polled does not hold up the others. Wakers are the caller's code: they are cloned, called and
//! dropped without the lock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;

use super::event::Event;
use crate::error::Error;
use crate::support::foreign::{self, Foreign};
use crate::support::sync::{Mutex, MutexGuard, lock};

/// The events that were not taken yet, and the waiters for more.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    state: Mutex<OutboxState>,
}

#[derive(Debug, Default)]
struct OutboxState {
    events: VecDeque<Event>,
    /// No more events come.
    closed: bool,
    /// By the ID of the waiter: the first to come is woken first.
    waiting: BTreeMap<u64, Foreign<Waker>>,
}

impl Outbox {
    /// Takes the next event, if there is one. After the last one, [`Error::ShutDown`] if the load
    /// ended without giving a reason.
    pub(crate) fn take(&self) -> Option<Event> {
        let mut state = self.state();
        let closed = state.closed;
        state.events.pop_front().or_else(|| closed.then_some(Event::Failed(Error::ShutDown)))
    }

    fn change(&self, change: impl FnOnce(&mut OutboxState)) -> Result<(), String> {
        let waiting = {
            let mut state = self.state();
            change(&mut state);
            std::mem::take(&mut state.waiting)
        };
        let mut woken = Ok(());
        for waker in waiting.into_values() {
            // A panic of one waker must not leave the others waiting.
            woken = woken.and(foreign::call(|| waker.wake_by_ref()));
        }
        woken
    }

    fn state(&self) -> MutexGuard<'_, OutboxState> {
        lock(&self.state)
    }
}

/// The load's end of an [`Outbox`]. Dropping it ends the events.
#[derive(Debug)]
pub(crate) struct Announcer(Arc<Outbox>);

impl Announcer {
    pub(crate) fn new(outbox: &Arc<Outbox>) -> Self {
        Announcer(Arc::clone(outbox))
    }

    /// Queues an event, and wakes all waiters.
    ///
    /// # Errors
    /// The panic message of a waker; the others were called nevertheless.
    pub(crate) fn send(&self, event: Event) -> Result<(), String> {
        self.0.change(|state| state.events.push_back(event))
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        // The panic hook has reported the panic of a waker, and its load is over.
        let _ = self.0.change(|state| state.closed = true);
    }
}

/// A waiter for events. Stops waiting when dropped.
#[derive(Debug)]
pub(crate) struct Waiter {
    outbox: Arc<Outbox>,
    id: u64,
}

impl Waiter {
    pub(crate) fn new(outbox: &Arc<Outbox>) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        Waiter { outbox: Arc::clone(outbox), id: NEXT_ID.fetch_add(1, Ordering::Relaxed) }
    }

    /// Registers a waker to be called with the next event. Check for events after this, not
    /// before.
    pub(crate) fn wait(&self, waker: &Waker) {
        let own = Foreign::new(waker.clone());
        // A separate statement: the lock must be released before the previous waker is dropped.
        let before = self.outbox.state().waiting.insert(self.id, own);
        drop(before);
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let own = self.outbox.state().waiting.remove(&self.id);
        drop(own);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use super::*;
    use crate::support::sync::model::{model, spawn};

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Count {
        fn get(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn counting() -> (Arc<Count>, Waker) {
        let count = Arc::new(Count::default());
        (Arc::clone(&count), Waker::from(count))
    }

    fn announce(announcer: &Announcer) -> Result<(), String> {
        announcer.send(Event::Failed(Error::ShutDown))
    }

    #[test]
    fn event_is_seen_or_wakes_the_waiter() {
        model(|| {
            let outbox = Arc::default();
            let announcer = Announcer::new(&outbox);
            let sender = spawn(move || announce(&announcer).unwrap());
            let (count, waker) = counting();
            let waiter = Waiter::new(&outbox);
            waiter.wait(&waker);
            let saw = outbox.take().is_some();
            sender.join().unwrap();
            assert!(saw || count.get() > 0, "it would sleep forever");
        });
    }

    #[test]
    #[cfg(not(dmaload_loom))]
    fn event_wakes_every_waiter_once() {
        let outbox = Arc::default();
        let announcer = Announcer::new(&outbox);
        let ((first, first_waker), (second, second_waker)) = (counting(), counting());
        let (one, two, dropped) = (Waiter::new(&outbox), Waiter::new(&outbox), Waiter::new(&outbox));
        one.wait(&second_waker);
        // A waiter has one waker: its last.
        one.wait(&first_waker);
        two.wait(&second_waker);
        dropped.wait(&second_waker);
        drop(dropped);
        announce(&announcer).unwrap();
        announce(&announcer).unwrap();
        assert_eq!([first.get(), second.get()], [1, 1], "a dropped waiter and one that was woken are not called");
        // Nothing keeps a waker that was called, or one of a waiter that was dropped.
        assert_eq!([Arc::strong_count(&first), Arc::strong_count(&second)], [2, 2]);
    }

    #[test]
    #[cfg(not(dmaload_loom))]
    fn panicking_waker_does_not_keep_others_from_being_woken() {
        struct Panics;
        impl Wake for Panics {
            fn wake(self: Arc<Self>) {
                panic!("in a waker");
            }
        }
        let outbox = Arc::default();
        let announcer = Announcer::new(&outbox);
        let (count, waker) = counting();
        let waiters = [Waiter::new(&outbox), Waiter::new(&outbox), Waiter::new(&outbox)];
        waiters[0].wait(&waker);
        waiters[1].wait(&Waker::from(Arc::new(Panics)));
        waiters[2].wait(&waker);
        assert_eq!(announce(&announcer), Err("in a waker".to_owned()));
        assert_eq!(count.get(), 2);
    }

    #[test]
    #[cfg(not(dmaload_loom))]
    fn dropped_announcer_ends_the_wait() {
        let outbox = Arc::default();
        let announcer = Announcer::new(&outbox);
        let (count, waker) = counting();
        let waiter = Waiter::new(&outbox);
        assert!(outbox.take().is_none());
        waiter.wait(&waker);
        drop(announcer);
        assert_eq!(count.get(), 1);
        assert!(matches!(outbox.take(), Some(Event::Failed(Error::ShutDown))));
    }
}
