//! Errors in the form that C programs receive: a negative errno, and a message.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};

use dmaload::{Error, ErrorKind};
use rustix::io::Errno;

/// Why a call failed.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) errno: Errno,
    pub(crate) text: String,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn new(errno: Errno, text: impl Into<String>) -> Self {
        Failure { errno, text: text.into() }
    }

    /// Describes a failed system call; `text` says what was tried, and on what.
    pub(crate) fn system(errno: Errno, text: &str) -> Self {
        let reason = dmaload::Errno::from_raw_os_error(errno.raw_os_error()).describe();
        Failure { errno, text: format!("{text}: {reason}") }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Failure::new(Errno::INVAL, text)
    }

    pub(crate) fn cancelled(text: &str) -> Self {
        Failure::new(Errno::CANCELED, text)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let hint = error.hint().map(|hint| format!("; {hint}")).unwrap_or_default();
        Failure { errno: errno_of(&error), text: format!("{error}{hint}") }
    }
}

/// Returns the kernel's errno or, for an error without one, the errno closest to its kind.
fn errno_of(error: &Error) -> Errno {
    if let Some(errno) = error.errno() {
        return Errno::from_io_error(&errno.into()).unwrap_or(Errno::IO);
    }
    match error.kind() {
        ErrorKind::Config | ErrorKind::InvalidInput => Errno::INVAL,
        ErrorKind::Changed => Errno::STALE,
        ErrorKind::OutOfMemory | ErrorKind::OverLimit => Errno::NOMEM,
        ErrorKind::TooLarge => Errno::FBIG,
        ErrorKind::Device => Errno::NODEV,
        ErrorKind::Unsupported => Errno::OPNOTSUPP,
        ErrorKind::ShutDown => Errno::CANCELED,
        ErrorKind::Panicked => Errno::NOTRECOVERABLE,
        // The remaining kinds are corrupt data, errors that always have an errno (handled above),
        // and errors about models, views and shared images, which the C interface does not use.
        _ => Errno::IO,
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Converts a result to a return value and stores the message of a failure. Catches panics, which
/// must not unwind into C.
pub(crate) fn answer(body: impl FnOnce() -> Result<c_int>) -> c_int {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(answer)) => return answer,
        Ok(Err(failure)) => failure,
        Err(_) => Failure::new(Errno::NOTRECOVERABLE, "dmaload panicked: this is a bug in dmaload"),
    };
    let text = CString::new(failure.text.replace('\0', " ")).unwrap_or_default();
    // A thread whose thread-local variables are being destroyed can't store a message.
    let _ = LAST.try_with(|last| last.replace(text));
    -failure.errno.raw_os_error()
}

/// Returns the message of this thread's last failure, valid until the thread's next failure.
pub(crate) fn last_message() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    #[test]
    fn panics_become_errors_and_messages_have_no_nul() {
        assert_eq!(answer(|| panic!("inside")), -Errno::NOTRECOVERABLE.raw_os_error());
        assert_eq!(answer(|| Err(Failure::invalid("a\0b"))), -Errno::INVAL.raw_os_error());
        // SAFETY: `last_message` returns a C string, valid until this thread's next failure.
        #[allow(unsafe_code)]
        let text = unsafe { CStr::from_ptr(last_message()) };
        assert_eq!(text, c"a b");
    }

    /// One error of each variant, with the errno that C programs receive for it. These errnos are
    /// part of the C interface.
    fn pinned() -> Vec<(Error, c_int)> {
        use dmaload::heap::{HeapError, SizeLimit};
        use dmaload::{Attempt, Errno, Route, model::ModelError};
        let path = || "model".into();
        let text = || "text".to_owned();
        let (route, errno) = (Route::Buffered, Errno::EXDEV);
        let refusal = HeapError::new("map memory", 1, Errno::ENFILE);
        let device = dmaload::heap::DmaHeap::open("no/name").expect_err("a heap's name can't contain a slash");
        vec![
            (Error::Config(text()), libc::EINVAL),
            (Error::Start { operation: "start a thread", errno }, libc::EXDEV),
            (Error::File { path: path(), operation: "open", errno }, libc::EXDEV),
            (Error::NotAFile { path: path(), kind: "a FIFO" }, libc::EINVAL),
            (Error::NoLength { path: path() }, libc::EINVAL),
            (Error::Longer { path: path(), stated_bytes: 1 }, libc::EINVAL),
            (Error::Read { path: path(), offset: 0, bytes: 1, route, errno }, libc::EXDEV),
            (Error::Rejected { path: path(), offset: 0, bytes: 1, reason: text() }, libc::EIO),
            (Error::Corrupt { path: path(), offset: 0, bytes: 1, expected: text(), found: text(), tensors: vec![] }, libc::EIO),
            (Error::WrongLength { path: path(), bytes: 1, expected_bytes: 2 }, libc::EIO),
            (Error::NotInManifest { path: path() }, libc::EIO),
            (Error::Ended { path: path(), offset: 1, planned_bytes: 2, route }, libc::ESTALE),
            (Error::Changed { path: path(), change: "it grew" }, libc::ESTALE),
            (Error::Refused { path: path(), offset: 0, route, attempt: Attempt::Read, errno }, libc::EXDEV),
            (Error::Memory { heap: text(), refusal, loaded_bytes: 0, planned_bytes: 0 }, libc::ENFILE),
            (Error::Panicked { code: text(), message: text() }, libc::ENOTRECOVERABLE),
            (Error::OutOfMemory { heap: text(), wanted_bytes: 2, available_bytes: 1, limit: text() }, libc::ENOMEM),
            (Error::OverLimit { wanted_bytes: 2, limit_bytes: 1, why: "a segment" }, libc::ENOMEM),
            (Error::HeldUp { held_bytes: 3, wanted_bytes: 2, limit_bytes: 4 }, libc::ENOMEM),
            (Error::TooManyPieces { bytes: 9, segment_bytes: 1, pieces: 9, most_pieces: 8 }, libc::EFBIG),
            (Error::Model { path: path(), fault: ModelError::Empty }, libc::EIO),
            (device, libc::EINVAL),
            (Error::TooLarge { path: path(), heap: text(), wanted_bytes: 2, limit: SizeLimit::new(1, "", 1) }, libc::EFBIG),
            (Error::NoDmaBuf { tried: vec![] }, libc::ENODEV),
            (Error::HandedOut { segment: 0 }, libc::EIO),
            (Error::Viewed { segment: 0, views: 1 }, libc::EIO),
            (Error::Straddles { tensor: text(), segments: 2 }, libc::EIO),
            (Error::Selection { path: path(), reason: text() }, libc::EINVAL),
            (Error::NoModel { path: path(), reason: text() }, libc::EIO),
            (Error::Incomplete { path: path(), reason: text(), loadable: 0 }, libc::EIO),
            (Error::DuplicateTensor { tensor: text(), first: path(), second: path() }, libc::EIO),
            (Error::AmbiguousTensor { tensor: text(), paths: vec![path()] }, libc::EIO),
            (Error::NotSelected { tensor: text(), path: path() }, libc::EIO),
            (Error::NotLoaded { path: path(), range: 0..1 }, libc::EIO),
            (Error::NotContiguous { tensor: text(), rows: 2 }, libc::EIO),
            (Error::Unaligned { tensor: text(), offset: 1, alignment_bytes: 2, why: "" }, libc::EIO),
            (Error::Importer { segments: 2, segment_bytes: 1, max_segments: 1, max_segment_bytes: 1 }, libc::EIO),
            (Error::NoSuchTensor(text()), libc::EIO),
            (Error::NoDescriptor { heap: text(), wanted: "dma-buf" }, libc::EOPNOTSUPP),
            (Error::Share { socket: path(), reason: text() }, libc::EIO),
            (Error::ShutDown, libc::ECANCELED),
            (Error::Ring { errno }, libc::EXDEV),
        ]
    }

    #[test]
    fn every_error_keeps_its_errno() {
        for (error, expected) in pinned() {
            let shown = format!("{error:?}");
            assert_eq!(Failure::from(error).errno.raw_os_error(), expected, "{shown}");
        }
    }

    /// The compiler does not detect a variant that is missing from `pinned`, so this test reads
    /// the source code of the library's `Error`.
    #[test]
    fn errno_of_every_variant_is_pinned() {
        let source = include_str!("../../dmaload/src/error.rs");
        let body = source.split_once("pub enum Error {\n").expect("the source should define the enum").1;
        let body = body.split_once("\n}\n").expect("the enum should end with a brace").0;
        let variant_on = |line: &'static str| {
            let name = line.strip_prefix("    ")?.split(|c: char| !c.is_alphanumeric()).next()?;
            name.starts_with(|c: char| c.is_uppercase()).then_some(name)
        };
        let variants: Vec<_> = body.lines().filter_map(variant_on).collect();
        let name_of = |error: &Error| format!("{error:?}").split(|c: char| !c.is_alphanumeric()).next().map(str::to_owned);
        let pinned: Vec<_> = pinned().iter().filter_map(|(error, _)| name_of(error)).collect();
        assert_eq!(variants, pinned);
    }

    #[test]
    fn message_ends_with_the_hint() {
        let missing = Failure::from(Error::File { path: "x".into(), operation: "open", errno: dmaload::Errno::ENOENT });
        assert_eq!(missing.text, "x: cannot open: ENOENT (No such file or directory); check the path");
    }
}
