//! What headers may have at most.

/// The longest JSON header that is read, in bytes; the limit of the
/// `safetensors` crate.
pub const HEADER_LIMIT_BYTES: u64 = 100_000_000;

/// The most dimensions a tensor may have. The format sets no limit; tensor
/// libraries stop at 254 or far below.
pub const RANK_LIMIT: usize = 255;
