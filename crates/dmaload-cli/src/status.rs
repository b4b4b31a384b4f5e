//! Exit statuses. `lib.rs` maps errors to them. Once `load --exec` has started its program, it
//! returns that program's status instead.

/// The command succeeded.
pub(crate) const SUCCESS: u8 = 0;
/// The command failed.
pub(crate) const FAILURE: u8 = 1;
/// Wrong usage, or options that contradict each other.
pub(crate) const USAGE: u8 = 2;
