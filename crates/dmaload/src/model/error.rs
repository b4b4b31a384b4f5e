//! Why a model file was refused.

use std::fmt;

use dmabuf::printable;

use super::dtype::DType;
use super::foreign::ForeignFile;
use super::limits::{HEADER_LIMIT_BYTES, RANK_LIMIT};

/// Why a model file was refused: what is wrong, where, and what was expected.
///
/// Names that come from the file are kept whole in the fields; the messages
/// quote them with control characters escaped and long ones shortened, because
/// a hostile file chooses them and a terminal shows them.
///
/// Offsets named `offset` count bytes of the JSON header, which begins at byte
/// 8 of the file; they tell how far the header had been read when the fault
/// was seen. Tensor offsets are relative to the data, as the header has them;
/// ranges are absolute in the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Something else lies in the place of the model.
    #[error("the file is {kind} ({file_bytes} bytes), not the model that it should be")]
    Foreign {
        /// What it is.
        kind: ForeignFile,
        /// The length of the file.
        file_bytes: u64,
    },

    /// The file is shorter than the smallest safetensors file.
    #[error("the file has {file_bytes} bytes; the smallest safetensors file has 10 (an 8-byte length and \"{{}}\")")]
    FileTooShort {
        /// The length of the file.
        file_bytes: u64,
    },

    /// The caller showed too little of a file to tell what it is.
    #[error("{given} bytes of the file's start are too few to tell its format; 9 are needed")]
    StartTooShort {
        /// How many bytes the caller gave.
        given: usize,
    },

    /// The length prefix leaves no room for any JSON object.
    #[error("the header's declared length is {header_bytes} bytes; the shortest header, \"{{}}\", has 2")]
    HeaderTooSmall {
        /// The declared length of the JSON header.
        header_bytes: u64,
    },

    /// The length prefix is beyond what the format allows.
    #[error(
        "the header's declared length is {header_bytes} bytes, more than the {HEADER_LIMIT_BYTES} that the \
         format allows"
    )]
    HeaderTooLarge {
        /// The declared length of the JSON header.
        header_bytes: u64,
    },

    /// The header would end past the end of the file.
    #[error(
        "the header's declared length is {header_bytes} bytes (and 8 for the length itself), but the file \
         has only {file_bytes}; it is cut short, at least {} bytes are missing",
        .header_bytes.saturating_add(8).saturating_sub(*.file_bytes)
    )]
    HeaderPastEnd {
        /// The declared length of the JSON header.
        header_bytes: u64,
        /// The length of the file.
        file_bytes: u64,
    },

    /// The header's first byte that is not whitespace is not `{`.
    #[error("the header begins with byte {found:#04x}, expected '{{' (0x7b)")]
    NotAnObject {
        /// The byte found.
        found: u8,
    },

    /// The header is not UTF-8.
    #[error("the header is not UTF-8: byte {offset} of it is in no valid sequence")]
    InvalidUtf8 {
        /// Where the first invalid sequence begins.
        offset: usize,
    },

    /// The header is not JSON.
    #[error("the header is not valid JSON near byte {offset} of it: {}", printable::text(.reason))]
    NotJson {
        /// How far the header had been read.
        offset: usize,
        /// What the JSON reader objected to.
        reason: String,
    },

    /// Something other than padding follows the JSON object.
    #[error(
        "byte {found:#04x} follows the header's JSON object at byte {offset} of the header; \
         only whitespace may pad it"
    )]
    BytesAfterJson {
        /// Where it is.
        offset: usize,
        /// The byte found.
        found: u8,
    },

    /// A part of a tensor's entry has the wrong JSON type.
    #[error("tensor {}{}, near byte {offset} of the header: {}", quote(.tensor), under(*.key), printable::text(.reason))]
    WrongType {
        /// The tensor's name.
        tensor: String,
        /// The key whose value is wrong, or `None` for the entry as a whole.
        key: Option<&'static str>,
        /// How far the header had been read.
        offset: usize,
        /// What was found, and what was expected.
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

    /// A tensor's entry has a key twice.
    #[error("tensor {} has \"{key}\" twice; which one holds cannot be told", quote(.tensor))]
    DuplicateKey {
        /// The tensor's name.
        tensor: String,
        /// The key.
        key: &'static str,
    },

    /// Two tensors have the same name.
    #[error("tensor {} is in the header twice; which one holds cannot be told", quote(.tensor))]
    DuplicateTensor {
        /// The name.
        tensor: String,
    },

    /// The header has `__metadata__` twice.
    #[error("\"__metadata__\" is in the header twice; which one holds cannot be told")]
    DuplicateMetadata,

    /// `__metadata__` has a key twice.
    #[error("\"__metadata__\" has the key {} twice; which one holds cannot be told", quote(.key))]
    DuplicateMetadataKey {
        /// The key.
        key: String,
    },

    /// `__metadata__` is not a JSON object.
    #[error("\"__metadata__\", near byte {offset} of the header: {}", printable::text(.reason))]
    MetadataNotObject {
        /// How far the header had been read.
        offset: usize,
        /// What was found, and what was expected.
        reason: String,
    },

    /// A value in `__metadata__` is not a string.
    #[error("\"__metadata__\" key {}, near byte {offset} of the header: {}", quote(.key), printable::text(.reason))]
    MetadataNotString {
        /// The key.
        key: String,
        /// How far the header had been read.
        offset: usize,
        /// What was found, and what was expected.
        reason: String,
    },

    /// A tensor's element type is not one of [`DType::SAFETENSORS`].
    #[error("tensor {} has the unknown dtype {} (names are exact: \"BF16\", \"F8_E4M3\")", quote(.tensor), quote(.found))]
    UnknownDType {
        /// The tensor's name.
        tensor: String,
        /// The type's name in the header.
        found: String,
    },

    /// A number in `shape` or `data_offsets` is negative, not whole, or beyond 64 bits (in a shape
    /// beyond `usize`).
    #[error(
        "tensor {}, \"{key}\": {} found, expected an integer from 0 to {max} without fraction or exponent",
        quote(.tensor), printable::text(.found), max = largest(.key)
    )]
    BadNumber {
        /// The tensor's name.
        tensor: String,
        /// `shape` or `data_offsets`.
        key: &'static str,
        /// The number, as it was understood.
        found: String,
    },

    /// A shape has more dimensions than [`RANK_LIMIT`].
    #[error("tensor {} has more than {RANK_LIMIT} dimensions", quote(.tensor))]
    RankTooLarge {
        /// The tensor's name.
        tensor: String,
    },

    /// `data_offsets` does not have two numbers.
    #[error("tensor {}: \"data_offsets\" has {found} numbers{}, expected 2 (begin and end)",
        quote(.tensor), if *.found > 2 { " or more" } else { "" })]
    OffsetCount {
        /// The tensor's name.
        tensor: String,
        /// How many there are; counting stops at 3.
        found: usize,
    },

    /// The bits of a tensor do not fit 64 bits.
    #[error("tensor {}: shape {shape:?} of {dtype} has more bits than fit an unsigned 64-bit number", quote(.tensor))]
    ShapeOverflow {
        /// The tensor's name.
        tensor: String,
        /// Its element type.
        dtype: DType,
        /// Its shape.
        shape: Vec<usize>,
    },

    /// A tensor of a type smaller than a byte ends within a byte.
    #[error(
        "tensor {}: shape {shape:?} of {dtype} has {bits} bits, which is no whole number of bytes",
        quote(.tensor)
    )]
    PartialByte {
        /// The tensor's name.
        tensor: String,
        /// Its element type.
        dtype: DType,
        /// Its shape.
        shape: Vec<usize>,
        /// The bits that type and shape make.
        bits: u64,
    },

    /// A tensor begins after its end.
    #[error("tensor {}: \"data_offsets\" [{begin}, {end}] begin after their end", quote(.tensor))]
    OffsetsReversed {
        /// The tensor's name.
        tensor: String,
        /// Where it begins, relative to the data.
        begin: u64,
        /// Where it ends, relative to the data.
        end: u64,
    },

    /// A tensor ends past the end of the file.
    #[error(
        "tensor {} ends at byte {end} of the data, but the file has only {data_bytes} bytes of data; \
         it is cut short, at least {missing_bytes} bytes are missing",
        quote(.tensor)
    )]
    PastEnd {
        /// The tensor's name.
        tensor: String,
        /// Where it ends, relative to the data.
        end: u64,
        /// The bytes of the file that follow the header.
        data_bytes: u64,
        /// How many more the tensor that ends last needs.
        missing_bytes: u64,
    },

    /// A tensor's range has not the length that its type and shape need.
    #[error(
        "tensor {}: \"data_offsets\" cover {found} bytes, but shape {shape:?} of {dtype} needs {expected}",
        quote(.tensor)
    )]
    WrongLength {
        /// The tensor's name.
        tensor: String,
        /// Its element type.
        dtype: DType,
        /// Its shape.
        shape: Vec<usize>,
        /// The bytes that type and shape need.
        expected: u64,
        /// The bytes that the offsets cover.
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
        /// Where that one begins in the file.
        second_begin: u64,
    },

    /// Bytes before a tensor belong to no tensor.
    #[error("bytes {begin}..{end} of the file, before tensor {}, belong to no tensor", quote(.before))]
    Hole {
        /// The first such byte in the file.
        begin: u64,
        /// The end of them: where the next tensor begins.
        end: u64,
        /// The tensor that follows them.
        before: String,
    },

    /// Bytes at the end of the file belong to no tensor.
    #[error(
        "the tensors end at byte {data_end} of the file, but it has {file_bytes} bytes; \
         the last {} belong to no tensor",
        .file_bytes - .data_end
    )]
    TrailingBytes {
        /// Where the last tensor ends in the file.
        data_end: u64,
        /// The length of the file.
        file_bytes: u64,
    },

    /// The file was to be GGUF and does not begin like it.
    #[error("the file does not begin with \"GGUF\"")]
    NotGguf,

    /// A GGUF file ends within its header.
    #[error(
        "GGUF header, byte {offset}: {part} would end past the file's {file_bytes} bytes; it is cut short, at least {missing} bytes are missing"
    )]
    GgufCutShort {
        /// Where the part begins that is not all there.
        offset: u64,
        /// Which part it is.
        part: &'static str,
        /// How many bytes are missing for it.
        missing: u64,
        /// The length of the file.
        file_bytes: u64,
    },

    /// The type of a tensor in a GGUF file is not known.
    #[error("GGUF header, byte {offset}: tensor {} has type {found}, which is {}", quote(.tensor),
        if is_removed_gguf_type(*.found) { "no longer part of GGUF" } else { "newer than this dmaload knows" })]
    GgufType {
        /// Where the tensor's entry begins.
        offset: u64,
        /// The tensor's name.
        tensor: String,
        /// The number of its type.
        found: u32,
    },

    /// The header of a GGUF file is longer than any that is read.
    #[error("the GGUF header is longer than the {limit_bytes} bytes that are read of one")]
    GgufHeaderTooLarge {
        /// The most that is read.
        limit_bytes: u64,
    },

    /// A GGUF file is of a version that is not read: 2 and 3 are.
    #[error("GGUF version {} can't be read, only 2 and 3{}", shown_version(*.found),
        if is_big_endian(*.found) { ": the file is big-endian" } else { "" })]
    GgufVersion {
        /// The version that the file says it has.
        found: u32,
    },

    /// A GGUF file breaks a rule of the format.
    #[error("GGUF header, byte {offset}: {}", printable::text(.reason))]
    Gguf {
        /// Where in the file the part begins that is wrong.
        offset: u64,
        /// What is wrong with it.
        reason: String,
    },

    /// A file in the name of a model has no bytes at all.
    #[error("the file has 0 bytes: its download has not begun, or nothing could be written")]
    Empty,

    /// The parts of a split GGUF model contradict each other, or their names.
    #[error("{}", printable::text(.reason))]
    Split {
        /// What does not agree.
        reason: String,
    },

    /// The index of a model of several files is no such JSON.
    #[error("the index is wrong near byte {offset}: {}", printable::text(.reason))]
    Index {
        /// How far it had been read.
        offset: usize,
        /// What was found, and what was expected.
        reason: String,
    },

    /// The index names a file that could be anywhere: outside of its folder, or none at all.
    #[error("the index names the file {}, which is not within its folder", quote(.name))]
    IndexLeavesFolder {
        /// The name.
        name: String,
    },

    /// The index says that a file has a tensor which it has not.
    #[error("the index says that tensor {} is in this file, which has none of that name", quote(.tensor))]
    IndexDisagrees {
        /// The tensor's name.
        tensor: String,
    },
}

/// What was not all there.
const CUT_SHORT: &str = "the download or the copy is not finished: finish it, or fetch the file again";
const NEWER: &str =
    "the file is newer than this version of dmaload knows: get a newer one, or load it as plain bytes (the format raw)";
const DAMAGED: &str = "the file is damaged, or what wrote it breaks the rules of the format: fetch or write it again, \
                       or load it as plain bytes (the format raw)";

impl ModelError {
    /// What a person can do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            ModelError::Foreign { kind, .. } => kind.hint(),
            ModelError::FileTooShort { .. }
            | ModelError::HeaderPastEnd { .. }
            | ModelError::PastEnd { .. }
            | ModelError::GgufCutShort { .. } => CUT_SHORT,
            ModelError::Empty => "fetch it again, or load it as plain bytes (the format raw)",
            ModelError::Split { .. } => {
                "the parts are not of one model, or were renamed: fetch them again, or load each as plain bytes (the format raw)"
            }
            ModelError::GgufType { found, .. } if is_removed_gguf_type(*found) => {
                "this type was removed from ggml: convert the model again from its source, or load it as plain bytes (the format raw)"
            }
            ModelError::UnknownDType { .. } | ModelError::GgufType { .. } => NEWER,
            ModelError::GgufVersion { found } if is_big_endian(*found) => {
                "convert it to little-endian: gguf-convert-endian of the Python package gguf does that"
            }
            ModelError::GgufVersion { found: 0 | 1 } => {
                "the file is older than what is read: convert it with the tools of llama.cpp, or load it as plain bytes (the format raw)"
            }
            ModelError::GgufVersion { .. } => NEWER,
            ModelError::HeaderTooLarge { .. } | ModelError::GgufHeaderTooLarge { .. } => {
                "the file is damaged, or not a model: fetch it again, or load it as plain bytes (the format raw)"
            }
            ModelError::TrailingBytes { .. } => {
                "something was appended to the file, or two files were joined: fetch it again, \
                 or load it as plain bytes (the format raw)"
            }
            ModelError::Index { .. } => "the index is damaged: fetch it again, or name the model's files one by one",
            ModelError::IndexLeavesFolder { .. } => {
                "mend the index so that it names files beside it, or name the files one by one"
            }
            ModelError::IndexDisagrees { .. } => {
                "the index and the file are of different versions of the model: fetch both again"
            }
            _ => DAMAGED,
        }
    }

    /// Whether the file may be something else altogether: it does not even begin like a model.
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

/// Whether a GGUF version is one in the wrong byte order: versions are small.
fn is_big_endian(version: u32) -> bool {
    version > 0xffff && version.swap_bytes() <= 0xffff
}

fn shown_version(version: u32) -> u32 {
    if is_big_endian(version) { version.swap_bytes() } else { version }
}

/// Whether ggml has had a type of this number, and has it no more.
fn is_removed_gguf_type(number: u32) -> bool {
    matches!(number, 4 | 5 | 31..=33 | 36..=38)
}

/// How many characters of a text from the file a message shows.
const SHOWN_CHARS: usize = 120;

/// Text from the file, quoted so that it can go to a terminal.
pub(super) fn quote(text: &str) -> impl fmt::Display {
    fmt::from_fn(move |f| match text.char_indices().nth(SHOWN_CHARS) {
        None => write!(f, "{text:?}"),
        Some((cut, _)) => write!(f, "{:?}… ({} bytes)", &text[..cut], text.len()),
    })
}

/// The largest number that a list under this key can have.
fn largest(key: &str) -> u64 {
    if key == "shape" { usize::MAX as u64 } else { u64::MAX }
}

/// The key of an entry that a message is about, if it is about one.
fn under(key: Option<&'static str>) -> impl fmt::Display {
    fmt::from_fn(move |f| key.map_or(Ok(()), |key| write!(f, ", \"{key}\"")))
}

/// Cuts a reason that quotes the file at length.
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
    fn messages_disarm_and_shorten_names_from_the_file() {
        let name = format!("\u{1b}[2J{}", "ä".repeat(10_000));
        let error = ModelError::DuplicateTensor { tensor: name.clone() };
        let message = error.to_string();
        assert!(!message.contains('\u{1b}'), "{message}");
        assert!(message.contains("(20004 bytes)"), "{message}");
        assert!(message.len() < 500, "{message}");
        assert_eq!(error, ModelError::DuplicateTensor { tensor: name });
    }

    #[test]
    fn a_message_says_what_was_found_and_what_was_expected() {
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
