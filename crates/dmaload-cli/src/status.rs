//! Exit statuses. `lib.rs` decides which one an error has; `load --exec` passes on that of its
//! program.

/// It worked.
pub(crate) const SUCCESS: u8 = 0;
/// It failed.
pub(crate) const FAILURE: u8 = 1;
/// Wrong usage, or options that contradict each other.
pub(crate) const USAGE: u8 = 2;
