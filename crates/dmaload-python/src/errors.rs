//! Converts errors and panics to Python exceptions with the same message.
//!
//! The classes are defined in Python (`dmaload/_errors.py`), since several have two bases, which a
//! class defined in Rust cannot have.

use std::any::Any;
use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};

use dmaload::{Error, ErrorKind};
use pyo3::prelude::*;

/// The module that defines the exceptions.
const MODULE: &str = "dmaload._errors";

/// The class and the attributes of an exception.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    class: &'static str,
    message: String,
    errno: Option<i32>,
    filename: Option<OsString>,
    hint: Option<String>,
    offset: Option<u64>,
}

impl Failure {
    /// Creates a failure with only a class and a message.
    pub(crate) fn new(class: &'static str, message: impl Into<String>) -> Self {
        Failure { class, message: message.into(), errno: None, filename: None, hint: None, offset: None }
    }

    /// Creates a failure for an invalid option.
    pub(crate) fn config(message: impl Into<String>) -> Self {
        Failure::new("ConfigError", message)
    }

    /// Creates a failure for memory that cannot be exported as requested.
    pub(crate) fn export(message: impl Into<String>) -> Self {
        Failure::new("ExportError", message)
    }

    /// Creates a failure for a panic in Rust code.
    pub(crate) fn panicked(payload: &(dyn Any + Send)) -> Self {
        let message = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let message = message.or_else(|| payload.downcast_ref::<String>().cloned());
        let message = message.unwrap_or_else(|| "no message".to_owned());
        Failure::new("PanickedError", format!("dmaload panicked: {message}"))
    }

    /// Sets the errno and the file.
    pub(crate) fn about(self, errno: i32, filename: impl Into<OsString>) -> Self {
        Failure { errno: Some(errno), filename: Some(filename.into()), ..self }
    }

    /// Converts a library error that prevents an export through DLPack or the buffer protocol.
    pub(crate) fn of_export(error: &Error) -> Self {
        let class = match error.kind() {
            ErrorKind::Unsupported | ErrorKind::InUse | ErrorKind::Placement => "ExportError",
            kind => class_of(kind),
        };
        Failure { class, ..Failure::from(error) }
    }

    /// Creates the exception. If this fails, returns the error that was raised instead.
    pub(crate) fn into_exception(self, py: Python<'_>) -> PyErr {
        let make = || {
            let Failure { class, message, errno, filename, hint, offset } = self;
            py.import(MODULE)?.getattr(class)?.call1((message, errno, filename, hint, offset))
        };
        make().map_or_else(|error| error, PyErr::from_value)
    }
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let class = match error {
            Error::NoSuchTensor(_) => "TensorNotFoundError",
            Error::NotInManifest { .. } => "NotInManifestError",
            error => class_of(error.kind()),
        };
        Failure {
            class,
            message: error.to_string(),
            errno: error.errno().map(|errno| errno.raw_os_error()),
            filename: error.path().map(|path| path.as_os_str().to_owned()),
            hint: error.hint(),
            offset: error.offset(),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::from(&error)
    }
}

/// Returns the name of the class for errors of this kind. For unknown kinds, this is the base
/// class, `Error`.
fn class_of(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Config => "ConfigError",
        ErrorKind::InvalidInput => "InvalidInputError",
        ErrorKind::NotFound => "NotFoundError",
        ErrorKind::PermissionDenied => "PermissionDeniedError",
        ErrorKind::Io => "IoError",
        ErrorKind::InvalidModel => "InvalidModelError",
        ErrorKind::Incomplete => "IncompleteError",
        ErrorKind::Ambiguous => "AmbiguousError",
        ErrorKind::NotLoaded => "NotLoadedError",
        ErrorKind::Changed => "ChangedError",
        ErrorKind::Corrupt => "CorruptError",
        ErrorKind::OutOfMemory => "OutOfMemoryError",
        ErrorKind::OverLimit => "OverLimitError",
        ErrorKind::TooLarge => "TooLargeError",
        ErrorKind::Device => "DeviceError",
        ErrorKind::Unsupported => "UnsupportedError",
        ErrorKind::Placement => "PlacementError",
        ErrorKind::InUse => "InUseError",
        ErrorKind::Share => "ShareError",
        ErrorKind::Panicked => "PanickedError",
        ErrorKind::ShutDown => "ShutDownError",
        _ => "Error",
    }
}

/// Panics with this message. Exists only in builds with debug assertions, for a test.
#[cfg(debug_assertions)]
#[pyfunction(name = "_panic_on_purpose")]
pub(crate) fn panic_on_purpose(py: Python<'_>, message: String) -> PyResult<()> {
    guarded(py, || panic!("{message}"))
}

/// Runs the body of a function that Python calls, and converts failures and panics to exceptions.
pub(crate) fn guarded<T>(py: Python<'_>, body: impl FnOnce() -> Result<T, Raised>) -> PyResult<T> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(Raised::Failure(failure))) => Err(failure.into_exception(py)),
        Ok(Err(Raised::Python(error))) => Err(error),
        Err(payload) => Err(Failure::panicked(&*payload).into_exception(py)),
    }
}

/// Why a function that Python called has failed.
#[derive(Debug)]
pub(crate) enum Raised {
    Failure(Failure),
    Python(PyErr),
}

impl From<Failure> for Raised {
    fn from(failure: Failure) -> Self {
        Raised::Failure(failure)
    }
}

impl From<Error> for Raised {
    fn from(error: Error) -> Self {
        Raised::Failure(error.into())
    }
}

impl From<PyErr> for Raised {
    fn from(error: PyErr) -> Self {
        Raised::Python(error)
    }
}
