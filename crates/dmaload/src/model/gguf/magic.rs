//! The magic bytes of GGUF.

/// The first bytes of a GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";

/// Returns whether `first`, the beginning of a file, starts with [`MAGIC`].
#[must_use]
pub fn is_gguf(first: &[u8]) -> bool {
    first.starts_with(&MAGIC)
}
