//! What goes wrong, as C hears of it: a negative errno, and the words for it.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use dmaload::Error;
use rustix::io::Errno;

/// Why a call failed.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) errno: Errno,
    text: String,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn new(errno: Errno, text: impl Into<String>) -> Self {
        Failure { errno, text: text.into() }
    }

    /// Something in the arguments makes no sense.
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Failure::new(Errno::INVAL, text)
    }

    pub(crate) fn cancelled(text: &str) -> Self {
        Failure::new(Errno::CANCELED, text)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let errno = match &error {
            Error::Start { errno, .. }
            | Error::File { errno, .. }
            | Error::Read { errno, .. }
            | Error::Refused { errno, .. }
            | Error::Ring { errno } => *errno,
            Error::Memory { refusal, .. } => refusal.errno,
            Error::Device(device) => device.errno,
            Error::NotAFile { .. }
            | Error::NoLength { .. }
            | Error::Longer { .. }
            | Error::Config(_)
            | Error::Selection { .. } => Errno::INVAL,
            Error::Ended { .. } | Error::Changed { .. } => Errno::STALE,
            Error::OutOfMemory { .. } | Error::OverLimit { .. } => Errno::NOMEM,
            Error::TooLarge { .. } | Error::TooManyPieces { .. } => Errno::FBIG,
            Error::NoDmaBuf { .. } => Errno::NODEV,
            Error::NoDescriptor { .. } => Errno::OPNOTSUPP,
            Error::ShutDown => Errno::CANCELED,
            Error::Panicked { .. } => Errno::NOTRECOVERABLE,
            // What else there is has to do with models and views, which are not asked for here.
            _ => Errno::IO,
        };
        let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
        Failure { errno, text: format!("{error}{hint}") }
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// What a call answers. Nothing unwinds into C.
pub(crate) fn answer(body: impl FnOnce() -> Result<c_int>) -> c_int {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(answer)) => return answer,
        Ok(Err(failure)) => failure,
        Err(_) => Failure::new(Errno::NOTRECOVERABLE, "dmaload panicked: a defect of it, or of a heap"),
    };
    let text = CString::new(failure.text.replace('\0', " ")).unwrap_or_default();
    // A thread that ends, in its destructors, has no words any more.
    let _ = LAST.try_with(|last| last.replace(text));
    -failure.errno.raw_os_error()
}

/// The words of this thread's last failure, until its next one.
pub(crate) fn last() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    #[test]
    fn nothing_unwinds_into_c_and_words_have_no_end_in_them() {
        assert_eq!(answer(|| panic!("inside")), -Errno::NOTRECOVERABLE.raw_os_error());
        assert_eq!(answer(|| Err(Failure::invalid("a\0b"))), -Errno::INVAL.raw_os_error());
        // SAFETY: it is a C string until this thread's next failure.
        #[allow(unsafe_code)]
        let text = unsafe { CStr::from_ptr(last()) };
        assert_eq!(text, c"a b");
    }

    #[test]
    fn the_words_say_what_can_be_done() {
        let missing = Failure::from(Error::File { path: "x".into(), operation: "open", errno: Errno::NOENT });
        assert_eq!(missing.text, "x: cannot open: ENOENT (No such file or directory); check the path");
    }
}
