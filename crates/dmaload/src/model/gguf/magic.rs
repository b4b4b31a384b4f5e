//! What tells a GGUF file.

/// What a GGUF file begins with.
pub const MAGIC: [u8; 4] = *b"GGUF";

/// Whether a file is GGUF, by its first bytes.
#[must_use]
pub fn is_gguf(first: &[u8]) -> bool {
    first.starts_with(&MAGIC)
}
