//! The safetensors format: an 8-byte little-endian length, a JSON header of that length, and the
//! tensors' bytes, which fill the rest of the file.
//!
//! Based on the *Format* section of the README of <https://github.com/huggingface/safetensors>.
//! Where the README is silent, this module follows version 0.8 of the `safetensors` crate. If this
//! module accepts a file, the crate accepts it too, and reads the same tensors.
//!
//! This module is stricter where leniency would let two readers see different tensors, or hide
//! damage. It refuses the following, which the crate accepts:
//!
//! - duplicate names of tensors, and duplicate keys in `__metadata__` (the README forbids both);
//! - an entry written as an array, or a dtype written as an object, which the crate accepts only
//!   because of how its deserializer is generated;
//! - more than [`RANK_LIMIT`] dimensions.
//!
//! Like the crate, it accepts `"__metadata__": null`, which MLX writes, and skips unknown keys in
//! a tensor's entry. It also allows any JSON whitespace around the header's object, although the
//! README requires the header to begin with `{` and to be padded only with spaces.
//!
//! Memory and time are bounded by the header's length: parsing needs at most a small multiple of
//! that length in memory, and `n log n` comparisons for `n` names. A value of the wrong type is
//! refused where it begins, before the rest of it is read. The value of an unknown key is skipped,
//! but a header whose nesting exceeds 127 levels within such a value is refused, because
//! `serde_json` limits nesting.

mod header;
mod values;

pub use super::limits::{HEADER_LIMIT_BYTES, RANK_LIMIT};
use super::{
    error::ModelError,
    map::{TensorInfo, TensorMap},
};

/// The size of the length prefix before the header, in bytes.
const PREFIX_BYTES: u64 = 8;

/// The shortest possible header: `{}`.
const HEADER_MIN_BYTES: u64 = 2;

/// The result of [`sniff`]: what the beginning of a file says about its format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sniff {
    /// Treat the file as safetensors. If [`parse`] then refuses the header, report that error
    /// instead of loading the file as raw bytes.
    Safetensors {
        /// The length of the JSON header, which begins at byte 8.
        header_bytes: u64,
    },
    /// Not a safetensors file, and neither its name nor its content claims that it is one.
    Not {
        /// How the file differs from safetensors.
        why: ModelError,
    },
    /// A file that claims to be safetensors, by name or content, but is not valid.
    Broken {
        /// What is wrong with the file.
        error: ModelError,
    },
}

/// Determines from the first 9 bytes of a file whether it is a safetensors file.
///
/// `first` is the beginning of the file: at least 9 bytes of it, unless the file is shorter.
/// `named_safetensors` says whether the file's name ends in `.safetensors`.
///
/// A file *looks* like safetensors if it has at least 10 bytes, its byte 8 is `{`, and its first 8
/// bytes are a length from 2 to [`HEADER_LIMIT_BYTES`]. In a file named `.safetensors`, byte 8 can
/// also be whitespace, which JSON allows before the `{`.
///
/// | looks like safetensors | header fits the file | named `.safetensors` | verdict |
/// |---|---|---|---|
/// | yes | yes | –   | [`Sniff::Safetensors`] |
/// | yes | no  | –   | [`Sniff::Broken`]: most likely cut short |
/// | no  | –   | yes | [`Sniff::Broken`] |
/// | no  | –   | no  | [`Sniff::Not`] |
///
/// If `first` has fewer than 9 bytes even though the file has 10 or more, the verdict is
/// [`Sniff::Broken`], because so few bytes do not determine the format.
///
/// A damaged model is therefore an error rather than a raw file. As a consequence, a raw file that
/// begins like safetensors is also an error until it is explicitly loaded as raw. Such files are
/// rare: five of their first nine bytes must have one particular value, and a sixth must have one
/// of six values. Their error is visible, whereas loading a damaged model as raw bytes would go
/// unnoticed.
#[must_use]
pub fn sniff(first: &[u8], file_bytes: u64, named_safetensors: bool) -> Sniff {
    match check_start(first, file_bytes, named_safetensors) {
        Ok(header_bytes) => Sniff::Safetensors { header_bytes },
        Err(error) if named_safetensors || indicates_safetensors(&error) => Sniff::Broken { error },
        Err(why) => Sniff::Not { why },
    }
}

/// Returns whether a fault found by [`check_start`] rules out loading the file as raw bytes,
/// whatever its name.
fn indicates_safetensors(error: &ModelError) -> bool {
    // A header that extends past the end of the file most likely belongs to a truncated model. If
    // the caller passed too few bytes to determine the format, treating the file as raw would be a
    // guess.
    matches!(error, ModelError::HeaderPastEnd { .. } | ModelError::StartTooShort { .. })
}

/// Checks that a file looks like safetensors, and returns the length of its header.
fn check_start(first: &[u8], file_bytes: u64, named: bool) -> Result<u64, ModelError> {
    if file_bytes < PREFIX_BYTES + HEADER_MIN_BYTES {
        return Err(ModelError::FileTooShort { file_bytes });
    }
    let Some((prefix, [brace, ..])) = first.split_first_chunk() else {
        return Err(ModelError::StartTooShort { given: first.len() });
    };
    // The brace is checked first: without it, a length beyond the end of the file suggests another
    // format rather than a truncated file.
    let is_blank = header::WHITESPACE.contains(&char::from(*brace));
    if *brace != b'{' && !(named && is_blank) {
        return Err(ModelError::NotAnObject { found: *brace });
    }
    parse_prefix(*prefix, file_bytes)
}

/// Reads the length of the JSON header in bytes from the first 8 bytes of a file.
///
/// `file_bytes` is the length of the file. It is safe to allocate a buffer of the returned size,
/// because the header is within the file and no longer than [`HEADER_LIMIT_BYTES`].
///
/// # Errors
///
/// [`ModelError::HeaderTooSmall`], [`ModelError::HeaderTooLarge`] or
/// [`ModelError::HeaderPastEnd`].
pub fn parse_prefix(first8: [u8; 8], file_bytes: u64) -> Result<u64, ModelError> {
    let header_bytes = u64::from_le_bytes(first8);
    data_bytes(header_bytes, file_bytes)?;
    Ok(header_bytes)
}

/// Checks that a header's length is valid and that the header is within the file. Returns the
/// number of bytes after the header.
fn data_bytes(header_bytes: u64, file_bytes: u64) -> Result<u64, ModelError> {
    if header_bytes < HEADER_MIN_BYTES {
        return Err(ModelError::HeaderTooSmall { header_bytes });
    }
    if header_bytes > HEADER_LIMIT_BYTES {
        return Err(ModelError::HeaderTooLarge { header_bytes });
    }
    file_bytes.checked_sub(PREFIX_BYTES + header_bytes).ok_or(ModelError::HeaderPastEnd { header_bytes, file_bytes })
}

/// Parses and checks a header, and computes its tensors' ranges in the file.
///
/// `header` is the JSON with its padding, without the 8 bytes before it; `file_bytes` is the
/// length of the whole file.
///
/// # Errors
///
/// A [`ModelError`] that says what is wrong with the header, and where. If there are several
/// faults, the error describes one of them.
pub fn parse(header: &[u8], file_bytes: u64) -> Result<TensorMap, ModelError> {
    let header_bytes = header.len() as u64;
    let data_bytes = data_bytes(header_bytes, file_bytes)?;
    let data_begin = PREFIX_BYTES + header_bytes;

    let contents = header::read(decode_header(header)?, data_begin, data_bytes)?;
    let map = TensorMap::new(contents.tensors, contents.metadata, header_bytes)
        .map_err(|tensor| ModelError::DuplicateTensor { tensor })?;
    check_cover(&map, data_begin, file_bytes)?;
    Ok(map)
}

/// Checks that a header begins like a JSON object, and decodes it as UTF-8.
fn decode_header(header: &[u8]) -> Result<&str, ModelError> {
    let is_blank = |byte: &u8| header::WHITESPACE.contains(&char::from(*byte));
    // If the header is only whitespace, the error contains its first byte.
    let found = header.iter().find(|byte| !is_blank(byte)).or(header.first()).expect("a header should have at least 2 bytes");
    if *found != b'{' {
        return Err(ModelError::NotAnObject { found: *found });
    }
    str::from_utf8(header).map_err(|error| ModelError::InvalidUtf8 { offset: error.valid_up_to() })
}

/// Checks that the tensors, in file order, cover every byte of the data exactly once.
fn check_cover(map: &TensorMap, data_begin: u64, file_bytes: u64) -> Result<(), ModelError> {
    let mut covered = data_begin;
    let mut before: Option<&TensorInfo> = None;
    for tensor in map {
        let begin = tensor.file_range.start;
        if begin > covered {
            return Err(ModelError::Hole { begin: covered, end: begin, before: tensor.name.clone() });
        }
        if let Some(first) = before.filter(|_| begin < covered) {
            return Err(overlap(first, tensor));
        }
        covered = tensor.file_range.end;
        before = Some(tensor);
    }
    if covered < file_bytes {
        return Err(ModelError::TrailingBytes { data_end: covered, file_bytes });
    }
    Ok(())
}

fn overlap(first: &TensorInfo, second: &TensorInfo) -> ModelError {
    ModelError::Overlap {
        first: first.name.clone(),
        first_end: first.file_range.end,
        second: second.name.clone(),
        second_begin: second.file_range.start,
    }
}

#[cfg(test)]
mod tests;
