//! Limits on headers.

/// The maximum length of a header in bytes; the limit of the `safetensors` crate.
pub const HEADER_LIMIT_BYTES: u64 = 100_000_000;

/// The maximum number of dimensions of a tensor. The format sets no limit; tensor libraries
/// support at most 254.
pub const RANK_LIMIT: usize = 255;
