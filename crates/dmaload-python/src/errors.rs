//! Errors as Python's exceptions, with the same words. Panics, too.
//!
//! The classes are Python's own (`dmaload/_errors.py`): several have two bases, which a class that
//! is made here cannot have.

use std::any::Any;
use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};

use dmaload::{Error, ErrorKind};
use pyo3::prelude::*;

/// Where the exceptions are defined.
const MODULE: &str = "dmaload._errors";

/// What an exception is made of.
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
    /// Without errno, file and hint.
    pub(crate) fn new(class: &'static str, message: impl Into<String>) -> Self {
        Failure { class, message: message.into(), errno: None, filename: None, hint: None, offset: None }
    }

    /// An option that makes no sense.
    pub(crate) fn config(message: impl Into<String>) -> Self {
        Failure::new("ConfigError", message)
    }

    /// Memory that arrays cannot have as they asked for it.
    pub(crate) fn export(message: impl Into<String>) -> Self {
        Failure::new("ExportError", message)
    }

    /// Something that Rust code does not expect, and that happened in it.
    pub(crate) fn panicked(payload: &(dyn Any + Send)) -> Self {
        let message = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let message = message.or_else(|| payload.downcast_ref::<String>().cloned());
        let message = message.unwrap_or_else(|| "without a message".to_owned());
        Failure::new("PanickedError", format!("dmaload panicked: {message}"))
    }

    /// The same with an errno and a file.
    pub(crate) fn about(self, errno: i32, filename: impl Into<OsString>) -> Self {
        Failure { errno: Some(errno), filename: Some(filename.into()), ..self }
    }

    /// Of memory that neither DLPack nor the buffer protocol may have.
    pub(crate) fn of_export(error: &Error) -> Self {
        let class = match error.kind() {
            ErrorKind::Unsupported | ErrorKind::InUse | ErrorKind::Placement => "ExportError",
            kind => class_of(kind),
        };
        Failure { class, ..Failure::from(error) }
    }

    /// The exception. Where that can't be made, the reason why is raised instead.
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

/// The name of a kind's class. A kind that is new here is an `Error`, as every one is.
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

/// Runs a function that Python has called: failures and panics become exceptions.
pub(crate) fn guarded<T>(py: Python<'_>, body: impl FnOnce() -> Result<T, Raised>) -> PyResult<T> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(Raised::Failure(failure))) => Err(failure.into_exception(py)),
        Ok(Err(Raised::Python(error))) => Err(error),
        Err(payload) => Err(Failure::panicked(&*payload).into_exception(py)),
    }
}

/// Why a function that Python has called did not work.
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
