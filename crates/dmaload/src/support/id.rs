//! The identifier of a load.

/// Identifies a load. A loader never reuses an identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LoadId(pub(crate) u64);
