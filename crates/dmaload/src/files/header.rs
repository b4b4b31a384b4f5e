//! Finds and reads the header of a model: in a file ([`read_header`]), or in its bytes if they are
//! already in memory ([`find_header`]).
//!
//! Headers are read through the page cache, and without readahead on local file systems. They are
//! not trusted: each length is checked against the length of the file before memory is allocated
//! for it.

use std::ops::Range;
use std::path::Path;

use super::source::OpenFile;
use crate::error::{Error, Result};
use crate::model::gguf::{self, Parsed};
use crate::model::safetensors::{Sniff, parse, sniff};
use crate::model::{ForeignFile, LOOKED_AT_BYTES, ModelError, TensorMap, recognize};
use crate::options::choices::Format;
use crate::support::convert::to_usize;

/// Refuses an empty file if its name or the requested format says that it is a model.
fn refuse_empty_model(path: &Path, format: Format) -> Result<()> {
    let is_model = match format {
        Format::Raw => false,
        Format::Auto => is_named(path, "safetensors") || is_named(path, "gguf"),
        _ => true,
    };
    if is_model { Err(Error::Model { path: path.to_owned(), fault: ModelError::Empty }) } else { Ok(()) }
}

/// Whether a file has this extension, ignoring case.
fn is_named(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|own| own.eq_ignore_ascii_case(extension))
}

/// Reads and checks the header of the model in this byte range of a file; `None` for raw bytes.
pub(crate) fn read_header(file: &OpenFile, part: Range<u64>, format: Format) -> Result<Option<TensorMap>> {
    parse_header(file, part, format).map_err(|error| file.blame_change(&file.identity, error))
}

fn parse_header(file: &OpenFile, part: Range<u64>, format: Format) -> Result<Option<TensorMap>> {
    let (bytes, base) = (part.end - part.start, part.start);
    let shifted = |map: TensorMap| map.shifted(base);
    if format == Format::Raw {
        return Ok(None);
    }
    // A file's name says nothing about a byte range of the file.
    let is_whole = part == (0..file.identity.bytes);
    let name = if is_whole { file.path.as_path() } else { Path::new("") };
    // An empty range is treated as raw bytes; requests for its tensors fail later.
    if bytes == 0 && !is_whole && format == Format::Auto {
        return Ok(None);
    }
    if bytes == 0 {
        return refuse_empty_model(&file.path, format).map(|()| None);
    }
    let mut start = [0; SNIFFED_BYTES];
    let start = start.get_mut(..to_usize(bytes.min(SNIFFED_BYTES as u64))).expect("`start` should have room for that many bytes");
    file.read_exact(start, base)?;
    let found = if is_gguf(name, start, format) {
        read_gguf(file, part)?.map(Some)
    } else {
        match header_bytes(name, start, bytes, format) {
            Ok(None) => return Ok(None),
            Ok(Some(header_bytes)) => {
                // `sniff` checked that this is at most `HEADER_LIMIT_BYTES`.
                let mut header = vec![0; to_usize(header_bytes)];
                file.read_exact(&mut header, base + 8)?;
                parse(&header, bytes).map(Some)
            }
            Err(fault) => Err(fault),
        }
    };
    match found {
        Ok(map) => Ok(map.and_then(shifted)),
        Err(fault) if fault.may_be_foreign() => {
            let mut start = vec![0; to_usize(bytes.min(LOOKED_AT_BYTES as u64))];
            file.read_exact(&mut start, base)?;
            Err(Error::Model { path: file.path.clone(), fault: identify_foreign(fault, &start, bytes) })
        }
        Err(fault) => Err(Error::Model { path: file.path.clone(), fault }),
    }
}

/// Finds and checks the header of a model in `bytes`, which must be all bytes of the file. Returns
/// `None` for raw bytes.
pub(crate) fn find_header(file: &OpenFile, bytes: &[u8], format: Format) -> Result<Option<TensorMap>> {
    if format == Format::Raw {
        return Ok(None);
    }
    let (start, file_bytes) = (bytes.get(..SNIFFED_BYTES).unwrap_or(bytes), bytes.len() as u64);
    let found = if is_gguf(&file.path, start, format) {
        gguf::parse(bytes, file_bytes).and_then(|parsed| match parsed {
            Parsed::Complete(map) => Ok(Some(map)),
            Parsed::More { bytes } => Err(cut_short(bytes, file_bytes)),
        })
    } else {
        header_bytes(&file.path, start, file_bytes, format).and_then(|header_bytes| {
            let Some(header_bytes) = header_bytes else { return Ok(None) };
            let header = bytes.get(8..).and_then(|rest| rest.get(..to_usize(header_bytes)));
            parse(header.expect("`sniff` should have checked that the header is within the file"), file_bytes).map(Some)
        })
    };
    let start = bytes.get(..LOOKED_AT_BYTES).unwrap_or(bytes);
    found.map_err(|fault| Error::Model { path: file.path.clone(), fault: identify_foreign(fault, start, file_bytes) })
}

/// If the first bytes identify another kind of file, replaces the fault with
/// [`ModelError::Foreign`], which names that kind.
pub(super) fn identify_foreign(fault: ModelError, start: &[u8], file_bytes: u64) -> ModelError {
    if !fault.may_be_foreign() {
        return fault;
    }
    match (recognize(start, file_bytes), &fault) {
        // If the file is JSON but not a valid index, the original fault is more specific.
        (Some(ForeignFile::Json { .. }), ModelError::Index { .. }) | (None, _) => fault,
        (Some(kind), _) => ModelError::Foreign { kind, file_bytes },
    }
}

/// Number of bytes that identify a safetensors header: its length and its first character.
const SNIFFED_BYTES: usize = 9;

/// How many bytes of a GGUF file to read first. Most headers without a vocabulary are shorter.
const GGUF_FIRST_BYTES: u64 = 256 << 10;

/// Whether to read a file as GGUF, based on its contents, its name and the requested format.
fn is_gguf(name: &Path, start: &[u8], format: Format) -> bool {
    let named = is_named(name, "gguf");
    format == Format::Gguf || format == Format::Auto && (gguf::is_gguf(start) || named)
}

/// Reads a GGUF header, whose length becomes known only by parsing it.
fn read_gguf(file: &OpenFile, part: Range<u64>) -> Result<std::result::Result<TensorMap, ModelError>> {
    let (file_bytes, mut wanted) = (part.end - part.start, GGUF_FIRST_BYTES);
    let mut start: Vec<u8> = Vec::new();
    loop {
        let have = start.len();
        start.resize(to_usize(wanted.min(file_bytes)), 0);
        file.read_exact(start.get_mut(have..).expect("the buffer should only grow"), part.start + have as u64)?;
        match gguf::parse(&start, file_bytes) {
            Ok(Parsed::Complete(map)) => return Ok(Ok(map)),
            // The buffer at least doubles each time, or grows to the whole file, so all attempts
            // together parse at most three times as many bytes as the last one.
            Ok(Parsed::More { bytes }) if bytes <= file_bytes && bytes > start.len() as u64 => wanted = bytes.max(2 * wanted),
            Ok(Parsed::More { bytes }) => return Ok(Err(cut_short(bytes, file_bytes))),
            Err(fault) => return Ok(Err(fault)),
        }
    }
}

fn cut_short(bytes: u64, file_bytes: u64) -> ModelError {
    let missing = bytes.saturating_sub(file_bytes);
    ModelError::GgufCutShort { offset: file_bytes, part: "the header", missing, file_bytes }
}

/// Returns the length of the safetensors header in a file of `file_bytes` bytes; `None` for a file
/// of raw bytes.
fn header_bytes(name: &Path, start: &[u8], file_bytes: u64, format: Format) -> std::result::Result<Option<u64>, ModelError> {
    let named = is_named(name, "safetensors");
    match sniff(start, file_bytes, named || format == Format::Safetensors) {
        Sniff::Safetensors { header_bytes } => Ok(Some(header_bytes)),
        Sniff::Broken { error } => Err(error),
        Sniff::Not { .. } => Ok(None),
    }
}
