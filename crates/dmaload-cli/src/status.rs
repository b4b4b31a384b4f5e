//! Exit statuses. `lib.rs` decides in which status an error results; `load --exec` returns the
//! status of its program.

/// The command succeeded.
pub(crate) const SUCCESS: u8 = 0;
/// The command failed.
pub(crate) const FAILURE: u8 = 1;
/// Wrong usage, or options that contradict each other.
pub(crate) const USAGE: u8 = 2;
