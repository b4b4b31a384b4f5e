//! The one error of this crate: which step failed, on how much memory, and with what errno.

use crate::Errno;

/// A step that the kernel refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{operation} of {bytes} bytes: {}", .errno.describe())]
#[non_exhaustive]
pub struct Error {
    /// The step, as a person would say it: "create a memfd", "map memory".
    pub operation: &'static str,
    /// The length that was asked for.
    pub bytes: usize,
    /// The kernel's answer.
    pub errno: Errno,
}

impl Error {
    /// A new error. Heaps outside this crate report their own refusals with it.
    pub fn new(operation: &'static str, bytes: usize, errno: Errno) -> Self {
        Error { operation, bytes, errno }
    }

    /// The same with the answer of a system call.
    pub(crate) fn from_call(operation: &'static str, bytes: usize, errno: rustix::io::Errno) -> Self {
        Error::new(operation, bytes, Errno::from_rustix(errno))
    }
}
