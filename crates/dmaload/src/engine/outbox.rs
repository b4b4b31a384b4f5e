//! Queues the events of a load for its consumers, in order, and keeps the wakers of the tasks that
//! are waiting for them.
//!
//! Any number of waiters may wait, each with one [`Interest`]. An event wakes only the waiters
//! that it can satisfy. Whichever waiter is polled takes the events on behalf of all waiters, so a
//! waiter that is alive but no longer polled does not hold up the others.
//!
//! Wakers are the caller's code: they are cloned, called and dropped without holding the lock. If
//! one panics, only its own waiter gets an error, and only once. No event is lost: the next wait
//! continues where the failed one ended.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use super::event::Event;
use crate::error::{Error, Result};
use crate::support::foreign::{self, Foreign};
use crate::support::sync::{Mutex, MutexGuard, lock};

/// What a waiter is waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Interest {
    /// The next event of any kind.
    AnyEvent,
    /// The segment that contains this byte of a file.
    Byte { file_index: usize, offset: u64 },
    /// The end of the load.
    End,
}

/// The waiters that an event wakes.
#[derive(Debug)]
enum Audience {
    /// The waiters that accept any event.
    AnyEvent,
    /// The waiters that accept any event, and those that need a byte in this range.
    Bytes {
        file_index: usize,
        range: Range<u64>,
    },
    Everyone,
}

impl Audience {
    fn for_event(event: &Event) -> Self {
        match event {
            Event::Planned(_) => Audience::AnyEvent,
            Event::Segment(segment) => Audience::Bytes { file_index: segment.file_index(), range: segment.file_range() },
            Event::Done(_) | Event::Failed(_) => Audience::Everyone,
        }
    }
}

/// The events that have not been taken yet, and the waiters for further events.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    state: Mutex<OutboxState>,
}

#[derive(Debug, Default)]
struct OutboxState {
    events: VecDeque<Event>,
    /// Whether the [`Announcer`] was dropped, so there will be no more events.
    closed: bool,
    /// Sorted by interest, so that the waiters for a range of bytes are adjacent, then by waiter
    /// number.
    waiting: BTreeMap<(Interest, u64), Registration>,
}

/// The registration of a pending waiter.
#[derive(Debug)]
struct Registration {
    waker: Foreign<Waker>,
    /// Shared with the waiter, which may be dropped while its waker is called.
    panic: Arc<OnceLock<String>>,
}

impl OutboxState {
    /// Removes the waiters that an event wakes, and returns their registrations.
    fn take_waiting(&mut self, audience: &Audience) -> Vec<Registration> {
        let mut woken: Vec<_> = match audience {
            Audience::Everyone => return std::mem::take(&mut self.waiting).into_values().collect(),
            Audience::AnyEvent => Vec::new(),
            &Audience::Bytes { file_index, range: Range { start, end } } => {
                let key = |offset| (Interest::Byte { file_index, offset }, 0);
                self.waiting.extract_if(key(start)..key(end), |_, _| true).collect()
            }
        };
        let any_event = (Interest::AnyEvent, 0)..=(Interest::AnyEvent, u64::MAX);
        woken.extend(self.waiting.extract_if(any_event, |_, _| true));
        woken.into_iter().map(|(_, registration)| registration).collect()
    }
}

impl Outbox {
    /// Takes the next event, if one is queued. Once the load has ended and its events were taken,
    /// every further call returns [`Event::Failed`] with [`Error::ShutDown`].
    pub(crate) fn take(&self) -> Option<Event> {
        let mut state = self.state();
        let closed = state.closed;
        state.events.pop_front().or_else(|| closed.then_some(Event::Failed(Error::ShutDown)))
    }

    /// Changes the state, and wakes the waiters in `audience`.
    fn change(&self, audience: &Audience, change: impl FnOnce(&mut OutboxState)) {
        let woken = {
            let mut state = self.state();
            change(&mut state);
            state.take_waiting(audience)
        };
        for Registration { waker, panic } in woken {
            if let Err(message) = foreign::call(|| waker.wake_by_ref()) {
                // Only the first panic is kept. The other waiters are woken nevertheless.
                let _ = panic.set(message);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, OutboxState> {
        lock(&self.state)
    }
}

/// The sending half of an [`Outbox`]. Dropping it closes the outbox.
#[derive(Debug)]
pub(crate) struct Announcer(Arc<Outbox>);

impl Announcer {
    pub(crate) fn new(outbox: &Arc<Outbox>) -> Self {
        Announcer(Arc::clone(outbox))
    }

    /// Queues an event, and wakes the waiters that it can satisfy.
    pub(crate) fn send(&self, event: Event) {
        self.0.change(&Audience::for_event(&event), |state| state.events.push_back(event));
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        self.0.change(&Audience::Everyone, |state| state.closed = true);
    }
}

/// A waiter for events. Stops waiting when dropped.
#[derive(Debug)]
pub(crate) struct Waiter {
    outbox: Arc<Outbox>,
    number: u64,
    /// The interest of the waiter's last registration; `None` after [`Self::unregister`].
    interest: Option<Interest>,
    /// The panic message, if a waker of the current wait has panicked.
    panic: Arc<OnceLock<String>>,
}

impl Waiter {
    pub(crate) fn new(outbox: &Arc<Outbox>) -> Self {
        static NEXT_NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NEXT_NUMBER.fetch_add(1, Ordering::Relaxed);
        Waiter { outbox: Arc::clone(outbox), number, interest: None, panic: Arc::default() }
    }

    /// Begins a new wait. Panics in earlier wakers belong to abandoned waits and are discarded.
    pub(crate) fn begin(&mut self) {
        self.unregister();
        self.panic = Arc::default();
    }

    /// Polls `look`, which takes the events that have arrived and returns either its result or the
    /// interest that it still has. In the latter case, the task is woken when a matching event
    /// arrives.
    ///
    /// # Errors
    /// [`Error::Panicked`] if the waker of an earlier poll has panicked. This ends the wait;
    /// the next poll begins a new one.
    pub(crate) fn poll<T>(
        &mut self,
        context: &mut Context<'_>,
        mut look: impl FnMut() -> Result<T, Interest>,
    ) -> Poll<Result<T>> {
        if let Some(message) = self.panic.get() {
            let (code, message) = ("the waker of a task".to_owned(), message.clone());
            self.begin();
            return Poll::Ready(Err(Error::Panicked { code, message }));
        }
        let mut registered = None;
        loop {
            match look() {
                Ok(found) => {
                    self.unregister();
                    return Poll::Ready(Ok(found));
                }
                // `look` runs again after registering, so an event that arrived in between is not
                // missed.
                Err(interest) if registered == Some(interest) => return Poll::Pending,
                Err(interest) => {
                    self.register(interest, context.waker());
                    registered = Some(interest);
                }
            }
        }
    }

    /// Registers the waiter, in place of its previous registration.
    fn register(&mut self, interest: Interest, waker: &Waker) {
        self.unregister();
        let registration = Registration { waker: Foreign::new(waker.clone()), panic: Arc::clone(&self.panic) };
        self.interest = Some(interest);
        let before = self.outbox.state().waiting.insert((interest, self.number), registration);
        debug_assert!(before.is_none(), "a waiter must have at most one registration");
    }

    fn unregister(&mut self) {
        let Some(interest) = self.interest.take() else { return };
        // This is a separate statement because the lock must be released before the waker is
        // dropped.
        let registration = self.outbox.state().waiting.remove(&(interest, self.number));
        drop(registration);
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.unregister();
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

    fn counting_waker() -> (Arc<Count>, Waker) {
        let count = Arc::new(Count::default());
        (Arc::clone(&count), Waker::from(count))
    }

    fn byte_interest(file_index: usize, offset: u64) -> Interest {
        Interest::Byte { file_index, offset }
    }

    /// Queues an event in place of a segment, and wakes the waiters that the segment would wake.
    fn announce(announcer: &Announcer, file_index: usize, range: Range<u64>) {
        let audience = Audience::Bytes { file_index, range };
        announcer.0.change(&audience, |state| state.events.push_back(Event::Planned(Vec::new())));
    }

    #[cfg(not(dmaload_loom))]
    fn sleep(waiter: &mut Waiter, interest: Interest, waker: &Waker) {
        let polled = waiter.poll(&mut Context::from_waker(waker), || Err::<(), _>(interest));
        assert!(polled.is_pending());
    }

    #[test]
    fn event_is_seen_or_wakes_a_waiter_that_checked_too_early() {
        model(|| {
            let outbox = Arc::default();
            let announcer = Announcer::new(&outbox);
            // The announcer is kept alive, because dropping it wakes everyone.
            let sender = spawn(move || {
                announce(&announcer, 0, 0..1);
                announcer
            });
            let (count, waker) = counting_waker();
            let mut waiter = Waiter::new(&outbox);
            let look = || outbox.take().map(drop).ok_or(byte_interest(0, 0));
            let polled = waiter.poll(&mut Context::from_waker(&waker), look);
            let _announcer = sender.join().unwrap();
            assert!(polled.is_ready() || count.get() > 0, "the waiter would sleep forever");
        });
    }

    /// The first event determines which event the waiter needs next.
    #[test]
    fn waiter_that_changes_its_interest_sees_all_events() {
        model(|| {
            let outbox = Arc::default();
            let announcer = Announcer::new(&outbox);
            let sender = spawn(move || {
                announcer.0.change(&Audience::AnyEvent, |state| state.events.push_back(Event::Planned(Vec::new())));
                announce(&announcer, 1, 5..9);
                announcer
            });
            let mut sender = Some(sender);
            let mut announcer = None;
            let (count, waker) = counting_waker();
            let mut waiter = Waiter::new(&outbox);
            let mut taken = 0;
            let mut look = || {
                while outbox.take().is_some() {
                    taken += 1;
                }
                match taken {
                    0 => Err(Interest::AnyEvent),
                    1 => Err(byte_interest(1, 7)),
                    _ => Ok(()),
                }
            };
            loop {
                let before = count.get();
                if waiter.poll(&mut Context::from_waker(&waker), &mut look).is_ready() {
                    break;
                }
                // A task that was woken during its poll is polled again; otherwise it sleeps.
                if count.get() == before {
                    announcer = Some(sender.take().expect("the waiter would sleep forever").join().unwrap());
                    assert_ne!(count.get(), before, "the waiter would sleep forever");
                }
            }
            if let Some(sender) = sender {
                announcer = Some(sender.join().unwrap());
            }
            drop(announcer);
        });
    }

    #[test]
    #[cfg(not(dmaload_loom))]
    fn event_wakes_only_waiters_that_it_can_satisfy() {
        let outbox = Arc::default();
        let announcer = Announcer::new(&outbox);
        let interests = [
            byte_interest(1, 9),
            byte_interest(1, 10),
            byte_interest(1, 19),
            byte_interest(1, 20),
            byte_interest(0, 15),
            Interest::AnyEvent,
            Interest::End,
        ];
        let mut waiters = interests.map(|interest| (interest, Waiter::new(&outbox), counting_waker()));
        for (interest, waiter, (_, waker)) in &mut waiters {
            sleep(waiter, *interest, waker);
        }
        let counts = |waiters: &[(_, _, (Arc<Count>, _)); 7]| waiters.each_ref().map(|(_, _, (count, _))| count.get());
        announce(&announcer, 1, 10..20);
        assert_eq!(counts(&waiters), [0, 1, 1, 0, 0, 1, 0]);
        // A woken waiter is no longer registered.
        announce(&announcer, 1, 10..20);
        assert_eq!(counts(&waiters), [0, 1, 1, 0, 0, 1, 0]);
        announcer.send(Event::Planned(Vec::new()));
        assert_eq!(counts(&waiters), [0, 1, 1, 0, 0, 1, 0]);
        announcer.send(Event::Failed(Error::ShutDown));
        assert_eq!(counts(&waiters), [1; 7], "the end of the load should wake all waiters");
    }

    #[test]
    #[cfg(not(dmaload_loom))]
    fn waiter_has_at_most_one_registration() {
        let outbox = Arc::default();
        let announcer = Announcer::new(&outbox);
        let ((first, first_waker), (second, second_waker)) = (counting_waker(), counting_waker());
        let (mut moved, mut found, mut dropped) = (Waiter::new(&outbox), Waiter::new(&outbox), Waiter::new(&outbox));
        sleep(&mut moved, byte_interest(0, 0), &second_waker);
        sleep(&mut moved, byte_interest(0, 1), &first_waker);
        sleep(&mut found, byte_interest(0, 0), &second_waker);
        assert!(found.poll(&mut Context::from_waker(&second_waker), || Ok(())).is_ready());
        sleep(&mut dropped, byte_interest(0, 0), &second_waker);
        drop(dropped);
        announce(&announcer, 0, 0..1);
        assert_eq!([first.get(), second.get()], [0, 0]);
        announce(&announcer, 0, 1..2);
        assert_eq!([first.get(), second.get()], [1, 0]);
        // Wakers that were called or replaced are dropped.
        assert_eq!([Arc::strong_count(&first), Arc::strong_count(&second)], [2, 2]);
    }

    #[test]
    #[cfg(not(dmaload_loom))]
    fn waker_that_panics_fails_only_its_own_waiter() {
        struct Panics;
        impl Wake for Panics {
            fn wake(self: Arc<Self>) {
                panic!("in a waker");
            }
        }
        let outbox = Arc::default();
        let announcer = Announcer::new(&outbox);
        let (count, waker) = counting_waker();
        let mut waiters = [Waiter::new(&outbox), Waiter::new(&outbox), Waiter::new(&outbox)];
        sleep(&mut waiters[0], byte_interest(0, 0), &waker);
        sleep(&mut waiters[1], byte_interest(0, 0), &Waker::from(Arc::new(Panics)));
        sleep(&mut waiters[2], byte_interest(0, 0), &waker);
        announce(&announcer, 0, 0..1);
        assert_eq!(count.get(), 2);
        let polled = waiters.map(|mut waiter| waiter.poll(&mut Context::from_waker(&waker), || Ok(())));
        let code = "the waker of a task".to_owned();
        let panicked = Err(Error::Panicked { code, message: "in a waker".to_owned() });
        assert_eq!(polled, [Poll::Ready(Ok(())), Poll::Ready(panicked), Poll::Ready(Ok(()))]);
    }

    #[test]
    #[cfg(not(dmaload_loom))]
    fn dropping_the_announcer_ends_every_wait() {
        let outbox = Arc::default();
        let announcer = Announcer::new(&outbox);
        let (count, waker) = counting_waker();
        let mut waiters = [Waiter::new(&outbox), Waiter::new(&outbox)];
        assert!(outbox.take().is_none());
        sleep(&mut waiters[0], byte_interest(0, 0), &waker);
        sleep(&mut waiters[1], Interest::End, &waker);
        drop(announcer);
        assert_eq!(count.get(), 2);
        assert!(matches!(outbox.take(), Some(Event::Failed(Error::ShutDown))));
    }
}
