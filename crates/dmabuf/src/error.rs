//! The one error of this crate: which step failed, on how much memory, and with what errno.

use rustix::io::Errno;

/// A step that the kernel refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{operation} of {bytes} bytes: {}", crate::errno::describe(*.errno))]
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
}
