//! The name of a load.

/// Names a load. Never used twice by one loader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LoadId(pub(crate) u64);
