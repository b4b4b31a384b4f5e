//! Exit statuses, to which `lib.rs` maps errors. Once `load --exec` has started its program, the
//! exit status is that of the program instead.

pub(crate) const SUCCESS: u8 = 0;
pub(crate) const FAILURE: u8 = 1;
/// Wrong usage, or options that contradict each other.
pub(crate) const USAGE: u8 = 2;
