//! Exit statuses; 2 is wrong usage.

/// It worked.
pub(crate) const SUCCESS: u8 = 0;
/// It failed.
pub(crate) const FAILURE: u8 = 1;
