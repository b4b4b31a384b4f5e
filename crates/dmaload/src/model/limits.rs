//! Limits on headers.

/// The maximum length of a header in bytes. The `safetensors` crate has the same limit.
pub const HEADER_LIMIT_BYTES: u64 = 100_000_000;

/// The maximum number of dimensions of a tensor in a safetensors file. The format sets no limit;
/// this limit is far higher than any model needs.
pub const RANK_LIMIT: usize = 255;
