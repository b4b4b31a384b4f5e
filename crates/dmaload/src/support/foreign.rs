//! Runs the caller's code: heaps, observers, verifiers, wakers, `tracing` subscribers, and their
//! `Drop`s.
//!
//! Such code never runs while a lock of the library is held, and never on the ring thread. Panics
//! are caught at the call. If a heap, an observer or a verifier panics, the load that it belongs
//! to fails with a message that names the code; if a waker panics, only the wait that it was
//! passed to fails. Panics in subscribers and in drops are ignored. Other loads are not affected.

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs the caller's code.
///
/// # Errors
/// The panic message.
pub(crate) fn call<T>(code: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(code)).map_err(message)
}

/// Emits a `tracing` event. A panic in the subscriber affects no load, and the panic hook has
/// already reported it.
pub(crate) fn emit(event: impl FnOnce()) {
    let _ = call(event);
}

/// Drops a value that may contain the caller's code.
pub(crate) fn discard<T>(value: T) {
    // The panic hook has already reported the panic, and it can't affect anything else.
    let _ = call(|| drop(value));
}

/// Extracts the message from a panic's payload.
pub(crate) fn message(payload: Box<dyn Any + Send>) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        return (*text).to_owned();
    }
    match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => {
            // Dropping the payload would run the caller's code, too, and could panic again.
            std::mem::forget(payload);
            "with a payload that is not text".to_owned()
        }
    }
}

/// A value whose drop may run the caller's code; panics in it are caught.
pub(crate) struct Foreign<T>(
    /// `None` only inside `drop`.
    Option<T>,
);

impl<T> Foreign<T> {
    pub(crate) fn new(value: T) -> Self {
        Foreign(Some(value))
    }
}

impl<T> Deref for Foreign<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("only `drop` takes the value")
    }
}

impl<T: Clone> Clone for Foreign<T> {
    fn clone(&self) -> Self {
        Foreign::new(T::clone(self))
    }
}

impl<T: fmt::Debug> fmt::Debug for Foreign<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T> Drop for Foreign<T> {
    fn drop(&mut self) {
        discard(self.0.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::panic_any;

    struct PanicsInDrop;

    impl Drop for PanicsInDrop {
        fn drop(&mut self) {
            panic!("in a drop");
        }
    }

    #[test]
    fn each_kind_of_panic_becomes_a_message() {
        assert_eq!(call(|| 7), Ok(7));
        assert_eq!(call(|| panic!("plain")), Err::<(), _>("plain".to_owned()));
        assert_eq!(call(|| panic!("with {}", 7)), Err::<(), _>("with 7".to_owned()));
        let other = call(|| panic_any(PanicsInDrop)).unwrap_err();
        assert_eq!(other, "with a payload that is not text");
    }

    #[test]
    fn two_values_that_panic_on_drop_can_be_dropped_together() {
        // Both drops panic while the first panic unwinds. A second panic that is not caught would
        // abort the process.
        let unwound = call(|| {
            let _held = [Foreign::new(PanicsInDrop), Foreign::new(PanicsInDrop)];
            panic!("the first one");
        });
        assert_eq!(unwound, Err::<(), _>("the first one".to_owned()));
    }
}
