//! A value that several threads need and that the first of them creates. No lock is held while it
//! is being created, because that may call a heap's code, or open a file on a server that never
//! answers.

use crate::support::sync::{Condvar, Mutex, MutexGuard, lock, wait};

#[derive(Debug)]
enum ValueState<T> {
    Empty,
    Making,
    Ready(T),
}

/// A value that is created by the first thread that needs it; see the module documentation.
#[derive(Debug)]
pub(crate) struct OnceValue<T> {
    state: Mutex<ValueState<T>>,
    changed: Condvar,
}

impl<T> Default for OnceValue<T> {
    fn default() -> Self {
        OnceValue::new(None)
    }
}

impl<T> OnceValue<T> {
    pub(crate) fn new(value: Option<T>) -> Self {
        OnceValue { state: Mutex::new(value.map_or(ValueState::Empty, ValueState::Ready)), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, ValueState<T>> {
        lock(&self.state)
    }

    /// Takes the value, if it is ready. Afterwards, it can be created again.
    pub(crate) fn take(&self) -> Option<T> {
        let mut state = self.state();
        match std::mem::replace(&mut *state, ValueState::Empty) {
            ValueState::Ready(value) => Some(value),
            other => {
                *state = other;
                None
            }
        }
    }
}

impl<T: Clone> OnceValue<T> {
    /// Returns a clone of the value, if it is ready.
    pub(crate) fn get(&self) -> Option<T> {
        match &*self.state() {
            ValueState::Ready(value) => Some(value.clone()),
            ValueState::Empty | ValueState::Making => None,
        }
    }

    /// Creates the value, unless it is ready or another thread is creating it. Does not wait for
    /// that thread.
    ///
    /// # Errors
    /// Those of `make`.
    pub(crate) fn make_if_empty<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<(), E> {
        let mut state = self.state();
        if !matches!(&*state, ValueState::Empty) {
            return Ok(());
        }
        *state = ValueState::Making;
        drop(state);
        self.make(make).map(drop)
    }

    /// Creates the value. The state must be `Making`, and this thread must have set it.
    fn make<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        // If `make` fails or panics, dropping `making` lets one of the waiting threads try.
        let mut making = Making { owner: self, value: None };
        let value = make()?;
        making.value = Some(value.clone());
        Ok(value)
    }

    /// Returns a clone of the value. If there is no value yet, this thread creates it while others
    /// wait. If that fails, one of the waiting threads tries next.
    ///
    /// # Errors
    /// Those of `make`.
    pub(crate) fn get_or_make<E>(&self, make: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let mut state = self.state();
        loop {
            match &*state {
                ValueState::Ready(value) => return Ok(value.clone()),
                ValueState::Making => state = wait(&self.changed, state),
                ValueState::Empty => break,
            }
        }
        *state = ValueState::Making;
        drop(state);
        self.make(make)
    }
}

struct Making<'a, T> {
    owner: &'a OnceValue<T>,
    value: Option<T>,
}

impl<T> Drop for Making<'_, T> {
    fn drop(&mut self) {
        let made = self.value.take().map_or(ValueState::Empty, ValueState::Ready);
        *self.owner.state() = made;
        self.owner.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::sync::atomic::{AtomicUsize, Ordering};
    use crate::support::sync::model::{Arc, model, spawn};

    #[test]
    fn value_is_made_once_and_again_only_after_a_failure() {
        for first_fails in [false, true] {
            model(move || {
                let shared = Arc::new((OnceValue::<usize>::default(), AtomicUsize::new(0)));
                let get = move |shared: &(OnceValue<usize>, AtomicUsize)| {
                    shared.0.get_or_make(|| {
                        let before = shared.1.fetch_add(1, Ordering::Relaxed);
                        if first_fails && before == 0 { Err(()) } else { Ok(before) }
                    })
                };
                let other = {
                    let shared = Arc::clone(&shared);
                    spawn(move || get(&shared))
                };
                let results = [get(&shared), other.join().unwrap()];
                let failures = usize::from(first_fails);
                assert_eq!(results.iter().filter(|result| result.is_err()).count(), failures);
                assert!(results.iter().flatten().all(|&value| value == failures), "{results:?}");
                assert_eq!(shared.0.take(), Some(failures));
                assert_eq!(shared.0.get(), None);
            });
        }
    }

    #[test]
    fn value_made_ahead_is_made_once() {
        model(move || {
            let shared = Arc::new((OnceValue::<usize>::default(), AtomicUsize::new(0)));
            let make = |shared: &(OnceValue<usize>, AtomicUsize)| Ok::<_, ()>(shared.1.fetch_add(1, Ordering::Relaxed));
            let other = {
                let shared = Arc::clone(&shared);
                spawn(move || shared.0.make_if_empty(|| make(&shared)))
            };
            assert_eq!(shared.0.get_or_make(|| make(&shared)), Ok(0));
            assert_eq!(other.join().unwrap(), Ok(()));
            assert_eq!(shared.1.load(Ordering::Relaxed), 1);
        });
    }

    #[test]
    #[cfg(not(dmaload_loom))]
    fn value_that_another_thread_makes_is_not_waited_for() {
        let shared = OnceValue::<usize>::default();
        let made = shared.get_or_make(|| {
            shared.make_if_empty(|| -> Result<usize, ()> { panic!("it should not be made twice") })?;
            Ok::<_, ()>(7)
        });
        assert_eq!(made, Ok(7));
    }

    #[test]
    #[cfg(not(dmaload_loom))]
    fn panic_while_making_lets_another_thread_try() {
        let shared = OnceValue::<usize>::default();
        let panicked = crate::support::foreign::call(|| shared.get_or_make(|| -> Result<usize, ()> { panic!("here") }));
        assert!(panicked.is_err());
        assert_eq!(shared.get_or_make(|| Ok::<_, ()>(7)), Ok(7));
    }
}
