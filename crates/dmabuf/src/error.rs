//! The error of a step on memory: which step failed, for how much memory, and the errno.

use crate::Errno;

/// A step that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{operation} of {bytes} bytes: {}", .errno.describe())]
#[non_exhaustive]
pub struct Error {
    /// The step as a verb phrase: "create a memfd", "map memory".
    pub operation: &'static str,
    /// The length of the memory; 0 if it is not known yet, as when a descriptor is wrapped.
    pub bytes: usize,
    /// The kernel's errno, or the errno that describes why this crate refused the call.
    pub errno: Errno,
}

impl Error {
    /// Creates an error. Heaps outside this crate report their own failures with it.
    pub fn new(operation: &'static str, bytes: usize, errno: Errno) -> Self {
        Error { operation, bytes, errno }
    }

    /// Creates an error from the errno of a system call.
    pub(crate) fn from_call(operation: &'static str, bytes: usize, errno: rustix::io::Errno) -> Self {
        Error::new(operation, bytes, Errno::from_rustix(errno))
    }
}
