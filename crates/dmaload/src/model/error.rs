//! Why a model file was refused.

use std::fmt;

use dmabuf::printable;

use super::dtype::DType;
use super::foreign::ForeignFile;
use super::limits::{HEADER_LIMIT_BYTES, RANK_LIMIT};

/// Why a model file was refused: what is wrong, where, and what was expected.
///
/// The fields keep names from the file in full. Messages quote these names, escape control
/// characters and shorten long names, because the names may come from a hostile file and be
/// displayed on a terminal.
///
/// An `offset` in a safetensors header is relative to the JSON, which begins at byte 8 of the
/// file. An `offset` in a GGUF header or in an index is relative to the start of the file. Other
/// positions are relative to the start of the data, as in the header, unless their documentation
/// says that they are positions in the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The file is not a model, but was recognized as a file of another kind.
    #[error("the file is {kind} ({file_bytes} bytes), not a model")]
    Foreign {
        /// What the file is.
        kind: ForeignFile,
        /// The length of the file.
        file_bytes: u64,
    },

    /// The file is shorter than the smallest safetensors file.
    #[error(
        "the file's length in bytes is {file_bytes}, but even the smallest safetensors file (an 8-byte length and \"{{}}\") has 10"
    )]
    FileTooShort {
        /// The length of the file.
        file_bytes: u64,
    },

    /// The caller provided too little of the file to determine its format.
    #[error("{given} bytes of the file's beginning are too few to determine its format; 9 are needed")]
    StartTooShort {
        /// The number of bytes that the caller provided.
        given: usize,
    },

    /// The header is too short to contain a JSON object.
    #[error("the header's declared length in bytes is {header_bytes}, but even the shortest header (\"{{}}\") has 2")]
    HeaderTooSmall {
        /// The declared length of the JSON header.
        header_bytes: u64,
    },

    /// The declared length of the header exceeds the format's limit.
    #[error(
        "the header's declared length is {header_bytes} bytes, more than the {HEADER_LIMIT_BYTES} that the \
         format allows"
    )]
    HeaderTooLarge {
        /// The declared length of the JSON header.
        header_bytes: u64,
    },

    /// The declared header ends past the end of the file.
    #[error(
        "the header's declared length is {header_bytes} bytes (plus 8 for the length itself), but the file \
         has only {file_bytes}; the file is cut short, and at least {} bytes are missing",
        .header_bytes.saturating_add(8).saturating_sub(*.file_bytes)
    )]
    HeaderPastEnd {
        /// The declared length of the JSON header.
        header_bytes: u64,
        /// The length of the file.
        file_bytes: u64,
    },

    /// The first byte of the header that is not whitespace is not `{`.
    #[error("the header begins with byte {found:#04x}, expected '{{' (0x7b)")]
    NotAnObject {
        /// The byte found in place of the `{`. If the header is only whitespace, this is its first
        /// byte.
        found: u8,
    },

    /// The header is not UTF-8.
    #[error("the header is not UTF-8: invalid sequence at byte {offset}")]
    InvalidUtf8 {
        /// Where the first invalid sequence begins.
        offset: usize,
    },

    /// The header is not valid JSON.
    #[error("the header is not valid JSON near byte {offset}: {}", printable::text(.reason))]
    NotJson {
        /// How far the header had been read.
        offset: usize,
        /// The JSON parser's message.
        reason: String,
    },

    /// Something other than padding follows the JSON object.
    #[error(
        "byte {found:#04x} follows the header's JSON object at byte {offset} of the header; \
         only whitespace may pad it"
    )]
    BytesAfterJson {
        /// Offset of the byte in the header.
        offset: usize,
        /// The byte found.
        found: u8,
    },

    /// A tensor's entry, or a value in it, has the wrong JSON type.
    #[error("tensor {}{}, near byte {offset} of the header: {}", quote(.tensor), format_key(*.key), printable::text(.reason))]
    WrongType {
        /// The tensor's name.
        tensor: String,
        /// The key with the wrong value, or `None` for the entry as a whole.
        key: Option<&'static str>,
        /// How far the header had been read.
        offset: usize,
        /// What was found and what was expected.
        reason: String,
    },

    /// A tensor's entry lacks a key.
    #[error("tensor {} has no \"{key}\"", quote(.tensor))]
    MissingKey {
        /// The tensor's name.
        tensor: String,
        /// The key that is missing.
        key: &'static str,
    },

    /// A tensor's entry contains a key twice.
    #[error("tensor {} has \"{key}\" twice, which is ambiguous", quote(.tensor))]
    DuplicateKey {
        /// The tensor's name.
        tensor: String,
        /// The key.
        key: &'static str,
    },

    /// Two tensors have the same name.
    #[error("tensor {} is in the header twice, which is ambiguous", quote(.tensor))]
    DuplicateTensor {
        /// The tensor's name.
        tensor: String,
    },

    /// The header contains `__metadata__` twice.
    #[error("\"__metadata__\" is in the header twice, which is ambiguous")]
    DuplicateMetadata,

    /// `__metadata__` contains a key twice.
    #[error("\"__metadata__\" has the key {} twice, which is ambiguous", quote(.key))]
    DuplicateMetadataKey {
        /// The key.
        key: String,
    },

    /// `__metadata__` is not a JSON object.
    #[error("\"__metadata__\", near byte {offset} of the header: {}", printable::text(.reason))]
    MetadataNotObject {
        /// How far the header had been read.
        offset: usize,
        /// What was found and what was expected.
        reason: String,
    },

    /// A value in `__metadata__` is not a string.
    #[error("\"__metadata__\" key {}, near byte {offset} of the header: {}", quote(.key), printable::text(.reason))]
    MetadataNotString {
        /// The key.
        key: String,
        /// How far the header had been read.
        offset: usize,
        /// What was found and what was expected.
        reason: String,
    },

    /// A tensor's element type in a safetensors header is not one of [`DType::SAFETENSORS`].
    #[error("tensor {} has the unknown dtype {} (names must be spelled exactly, like \"BF16\" or \"F8_E4M3\")", quote(.tensor), quote(.found))]
    UnknownDType {
        /// The tensor's name.
        tensor: String,
        /// The type's name in the header.
        found: String,
    },

    /// A number in `shape` or `data_offsets` is negative, not an integer, or does not fit into 64
    /// bits (in a shape, into `usize`).
    #[error(
        "tensor {}, \"{key}\": found {}, expected an integer from 0 to {max} without a fraction or exponent",
        quote(.tensor), printable::text(.found), max = max_number(.key)
    )]
    BadNumber {
        /// The tensor's name.
        tensor: String,
        /// `shape` or `data_offsets`.
        key: &'static str,
        /// The number, as it was parsed.
        found: String,
    },

    /// A shape has more dimensions than [`RANK_LIMIT`].
    #[error("tensor {} has more than {RANK_LIMIT} dimensions", quote(.tensor))]
    RankTooLarge {
        /// The tensor's name.
        tensor: String,
    },

    /// `data_offsets` does not contain exactly two numbers.
    #[error("tensor {}: \"data_offsets\" must have 2 numbers (begin and end), not {found}{}",
        quote(.tensor), if *.found > 2 { " or more" } else { "" })]
    OffsetCount {
        /// The tensor's name.
        tensor: String,
        /// How many numbers were found; counting stops at 3.
        found: usize,
    },

    /// A tensor's size in bits does not fit into 64 bits.
    #[error("tensor {}: the size in bits of shape {shape:?} of {dtype} overflows 64 bits", quote(.tensor))]
    ShapeOverflow {
        /// The tensor's name.
        tensor: String,
        /// The tensor's element type.
        dtype: DType,
        /// The tensor's shape.
        shape: Vec<usize>,
    },

    /// A tensor of a sub-byte type ends within a byte.
    #[error(
        "tensor {}: shape {shape:?} of {dtype} has {bits} bits, which is not a whole number of bytes",
        quote(.tensor)
    )]
    PartialByte {
        /// The tensor's name.
        tensor: String,
        /// The tensor's element type.
        dtype: DType,
        /// The tensor's shape.
        shape: Vec<usize>,
        /// The tensor's size in bits.
        bits: u64,
    },

    /// A tensor begins after its end.
    #[error("tensor {}: \"data_offsets\" [{begin}, {end}] end before they begin", quote(.tensor))]
    OffsetsReversed {
        /// The tensor's name.
        tensor: String,
        /// Where the tensor begins, relative to the start of the data.
        begin: u64,
        /// Where it ends, relative to the start of the data.
        end: u64,
    },

    /// A tensor ends past the end of the file.
    #[error(
        "tensor {} ends at byte {end} of the data, but the file has only {data_bytes} bytes of data; \
         the file is cut short, and at least {missing_bytes} bytes are missing",
        quote(.tensor)
    )]
    PastEnd {
        /// The tensor's name.
        tensor: String,
        /// Where it ends, relative to the start of the data.
        end: u64,
        /// The number of bytes in the file after the header.
        data_bytes: u64,
        /// The number of bytes that are missing at the end of the file, up to the end of the last
        /// tensor.
        missing_bytes: u64,
    },

    /// A tensor's range does not have the length that its type and shape require.
    #[error(
        "tensor {}: \"data_offsets\" cover {found} bytes, but shape {shape:?} of {dtype} needs {expected}",
        quote(.tensor)
    )]
    WrongLength {
        /// The tensor's name.
        tensor: String,
        /// The tensor's element type.
        dtype: DType,
        /// The tensor's shape.
        shape: Vec<usize>,
        /// The length that type and shape require.
        expected: u64,
        /// The length that the offsets cover.
        found: u64,
    },

    /// Two tensors share bytes, or an empty one lies inside another.
    #[error(
        "tensor {} begins at byte {second_begin} of the file, before tensor {} ends at byte {first_end}",
        quote(.second), quote(.first)
    )]
    Overlap {
        /// The tensor that begins first.
        first: String,
        /// Where it ends in the file.
        first_end: u64,
        /// The tensor that begins inside it.
        second: String,
        /// Where that tensor begins in the file.
        second_begin: u64,
    },

    /// Bytes before a tensor belong to no tensor.
    #[error("bytes {begin}..{end} of the file, before tensor {}, belong to no tensor", quote(.before))]
    Hole {
        /// Where these bytes begin in the file.
        begin: u64,
        /// Where these bytes end in the file, which is where the next tensor begins.
        end: u64,
        /// The tensor that follows these bytes.
        before: String,
    },

    /// Bytes at the end of the file belong to no tensor.
    #[error(
        "the tensors end at byte {data_end} of the file, which has {file_bytes} bytes: \
         bytes {data_end}..{file_bytes} belong to no tensor"
    )]
    TrailingBytes {
        /// Where the last tensor ends in the file.
        data_end: u64,
        /// The length of the file.
        file_bytes: u64,
    },

    /// The file was expected to be GGUF but does not begin with GGUF's magic bytes.
    #[error("the file does not begin with \"GGUF\"")]
    NotGguf,

    /// A GGUF file ends within its header.
    #[error(
        "GGUF header, byte {offset}: {part} extends past the end of the file ({file_bytes} bytes); the file is cut short, \
         and at least {missing} bytes are missing"
    )]
    GgufCutShort {
        /// Where the incomplete item of the header begins.
        offset: u64,
        /// The name of that item.
        part: &'static str,
        /// How many bytes of that item are missing. Everything after that item is missing, too.
        missing: u64,
        /// The length of the file.
        file_bytes: u64,
    },

    /// A tensor in a GGUF file has an unsupported type.
    #[error("GGUF header, byte {offset}: tensor {} has type {found}, which is {}", quote(.tensor),
        if is_removed_gguf_type(*.found) { "no longer part of GGUF" } else { "newer than this version of dmaload" })]
    GgufType {
        /// Where the tensor's entry begins.
        offset: u64,
        /// The tensor's name.
        tensor: String,
        /// The type's number in the file.
        found: u32,
    },

    /// The header of a GGUF file exceeds the size limit.
    #[error("the GGUF header is longer than the limit of {limit_bytes} bytes")]
    GgufHeaderTooLarge {
        /// The limit in bytes.
        limit_bytes: u64,
    },

    /// A GGUF file has an unsupported version; 2 and 3 are supported.
    #[error("GGUF version {}{} is not supported; only versions 2 and 3 in little-endian byte order are", display_version(*.found),
        if is_big_endian(*.found) { " in big-endian byte order" } else { "" })]
    GgufVersion {
        /// The version number in the file.
        found: u32,
    },

    /// A GGUF file violates a rule of the format, or exceeds a limit of this library.
    #[error("GGUF header, byte {offset}: {}", printable::text(.reason))]
    Gguf {
        /// Where in the file the faulty item begins.
        offset: u64,
        /// What is wrong with it.
        reason: String,
    },

    /// A file that is named like a model is empty.
    #[error("the file is empty: the download has not started, or nothing could be written")]
    Empty,

    /// The parts of a split GGUF model contradict each other, or one contradicts its name.
    #[error("{}", printable::text(.reason))]
    Split {
        /// A description of the contradiction.
        reason: String,
    },

    /// The index of a multi-file model is invalid.
    #[error("invalid index near byte {offset}: {}", printable::text(.reason))]
    Index {
        /// How far the index had been read; 0 if a tensor is listed twice.
        offset: usize,
        /// What was found and what was expected.
        reason: String,
    },

    /// The index lists a file outside the index's folder, or a name that no file can have.
    #[error("the index lists the file {}, which is not within the index's folder or not a valid file name", quote(.name))]
    IndexLeavesFolder {
        /// The file's name.
        name: String,
    },

    /// The index lists a tensor for a file that does not contain it.
    #[error("the index lists tensor {} for this file, which does not contain it", quote(.tensor))]
    IndexDisagrees {
        /// The tensor's name.
        tensor: String,
    },
}

const CUT_SHORT: &str = "the download or copy is incomplete: finish it, or download the file again";
const NEWER: &str = "the file is too new for this version of dmaload: update dmaload, or load it as raw bytes (format `raw`)";
const DAMAGED: &str = "the file is damaged, or its writer violates the format: download or write it again, \
                       or load it as raw bytes (format `raw`)";

impl ModelError {
    /// Returns what the user can do about the error.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            ModelError::Foreign { kind, .. } => kind.hint(),
            ModelError::FileTooShort { .. }
            | ModelError::HeaderPastEnd { .. }
            | ModelError::PastEnd { .. }
            | ModelError::GgufCutShort { .. } => CUT_SHORT,
            ModelError::Empty => "download it again, or load it as raw bytes (format `raw`)",
            ModelError::Split { .. } => {
                "the parts are from different models, or were renamed: download them again, or load each as raw bytes (format `raw`)"
            }
            ModelError::GgufType { found, .. } if is_removed_gguf_type(*found) => {
                "this type was removed from ggml: convert the model again from its source, or load it as raw bytes (format `raw`)"
            }
            ModelError::UnknownDType { .. } | ModelError::GgufType { .. } => NEWER,
            ModelError::GgufVersion { found } if is_big_endian(*found) => {
                "convert it to little-endian with gguf-convert-endian from the Python package gguf"
            }
            ModelError::GgufVersion { found: 0 | 1 } => {
                "the file is too old: convert it with llama.cpp's tools, or load it as raw bytes (format `raw`)"
            }
            ModelError::GgufVersion { .. } => NEWER,
            ModelError::HeaderTooLarge { .. } | ModelError::GgufHeaderTooLarge { .. } => {
                "the file is damaged, or not a model: download it again, or load it as raw bytes (format `raw`)"
            }
            ModelError::TrailingBytes { .. } => {
                "something was appended to the file, or two files were joined: download it again, \
                 or load it as raw bytes (format `raw`)"
            }
            ModelError::Index { .. } => "the index is damaged: download it again, or list the model's files one by one",
            ModelError::IndexLeavesFolder { .. } => {
                "fix the index so that it lists files in its folder, or list the files one by one"
            }
            ModelError::IndexDisagrees { .. } => {
                "the index and the file are from different versions of the model: download both again"
            }
            _ => DAMAGED,
        }
    }

    /// Returns whether the file may be something other than a model, in which case its beginning
    /// should be compared with known formats.
    pub(crate) fn may_be_foreign(&self) -> bool {
        match self {
            ModelError::FileTooShort { .. }
            | ModelError::HeaderTooSmall { .. }
            | ModelError::HeaderTooLarge { .. }
            | ModelError::HeaderPastEnd { .. }
            | ModelError::NotAnObject { .. }
            | ModelError::NotGguf
            | ModelError::Index { .. } => true,
            ModelError::GgufCutShort { offset, .. } => *offset == 0,
            _ => false,
        }
    }
}

/// Returns whether a GGUF version was written in big-endian byte order. Such a number is too large
/// for a version, but becomes small when its bytes are swapped.
fn is_big_endian(version: u32) -> bool {
    version > 0xffff && version.swap_bytes() <= 0xffff
}

fn display_version(version: u32) -> u32 {
    if is_big_endian(version) { version.swap_bytes() } else { version }
}

/// Returns whether ggml has removed the type with this number.
fn is_removed_gguf_type(number: u32) -> bool {
    matches!(number, 4 | 5 | 31..=33 | 36..=38)
}

/// Maximum number of characters of a name to quote in a message.
const SHOWN_CHARS: usize = 120;

/// Quotes text from the file, so that it is safe to print on a terminal, and shortens long text.
pub(super) fn quote(text: &str) -> impl fmt::Display {
    fmt::from_fn(move |f| match text.char_indices().nth(SHOWN_CHARS) {
        None => write!(f, "{text:?}"),
        Some((cut, _)) => write!(f, "{:?}… ({} bytes)", &text[..cut], text.len()),
    })
}

/// Returns the largest number that is valid in the list under this key.
fn max_number(key: &str) -> u64 {
    if key == "shape" { usize::MAX as u64 } else { u64::MAX }
}

/// Formats the key that an error message refers to, if any.
fn format_key(key: Option<&'static str>) -> impl fmt::Display {
    fmt::from_fn(move |f| key.map_or(Ok(()), |key| write!(f, ", \"{key}\"")))
}

/// Shortens a reason to twice [`SHOWN_CHARS`] characters, because it may quote a long part of the
/// file.
pub(super) fn shorten(mut reason: String) -> String {
    if let Some((cut, _)) = reason.char_indices().nth(2 * SHOWN_CHARS) {
        reason.truncate(cut);
        reason.push('…');
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_escape_and_shorten_names_from_the_file() {
        let name = format!("\u{1b}[2J{}", "ä".repeat(10_000));
        let error = ModelError::DuplicateTensor { tensor: name.clone() };
        let message = error.to_string();
        assert!(!message.contains('\u{1b}'), "{message}");
        assert!(message.contains("(20004 bytes)"), "{message}");
        assert!(message.len() < 500, "{message}");
        assert_eq!(error, ModelError::DuplicateTensor { tensor: name });
    }

    #[test]
    fn message_says_what_was_found_and_expected() {
        let error =
            ModelError::WrongLength { tensor: "w".into(), dtype: DType::BF16, shape: vec![2, 3], expected: 12, found: 10 };
        assert_eq!(error.to_string(), r#"tensor "w": "data_offsets" cover 10 bytes, but shape [2, 3] of BF16 needs 12"#);
    }

    #[test]
    fn reasons_are_cut_between_characters() {
        assert_eq!(shorten("short".into()), "short");
        assert_eq!(shorten("ä".repeat(1000)).chars().count(), 2 * SHOWN_CHARS + 1);
    }
}
