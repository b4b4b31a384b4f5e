//! The error type for operations on memory.

use crate::Errno;

/// An operation on memory failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{operation}{}: {}", describe_length(*.bytes), .errno.describe())]
#[non_exhaustive]
pub struct Error {
    /// The operation as a verb phrase, such as "create a memfd" or "map memory".
    pub operation: &'static str,
    /// The length of the memory. It is 0 if the length is not known yet, for example when a
    /// descriptor is wrapped.
    pub bytes: usize,
    /// The kernel's errno, or the errno that describes why this crate refused the call.
    pub errno: Errno,
}

fn describe_length(bytes: usize) -> String {
    if bytes == 0 { String::new() } else { format!(" of {bytes} bytes") }
}

impl Error {
    /// Creates an error. Heaps outside this crate use this to report their own failures.
    pub fn new(operation: &'static str, bytes: usize, errno: Errno) -> Self {
        Error { operation, bytes, errno }
    }

    /// Creates an error from the errno of a system call.
    pub(crate) fn from_call(operation: &'static str, bytes: usize, errno: rustix::io::Errno) -> Self {
        Error::new(operation, bytes, Errno::from_rustix(errno))
    }
}
