//! The GGUF format, versions 2 and 3: key-value pairs, the list of tensors, and the bytes of each
//! tensor, which begin at a multiple of the file's alignment.
//!
//! Based on `docs/gguf.md` in <https://github.com/ggml-org/ggml>. Where that document is silent,
//! this module follows `gguf_init_from_file` in the same project. Like that function, this module
//! refuses duplicate keys and names, tensors that are not consecutive, and rows that are not a
//! whole number of blocks. Unlike `gguf_init_from_file`, this module accepts nested arrays, long
//! names, and tensors of up to eight dimensions.
//!
//! The length of the header is not known in advance, so [`parse`] takes the beginning of the file
//! and can request more of it. Memory and time are bounded by the header's length, which is at
//! most [`HEADER_LIMIT_BYTES`]. Counts in the file are not trusted: memory is allocated only for
//! entries that have been read.

mod cursor;
mod magic;
mod metadata;

use self::cursor::{Cursor, Stop};
pub use self::magic::{MAGIC, is_gguf};
pub use self::metadata::{Array, GgufMetadata, Value};
use super::dtype::DType;
use super::error::{ModelError, quote};
use super::map::{self, TensorInfo, TensorMap};

/// The maximum length of a header in bytes, the same as for safetensors. The largest vocabularies
/// take up about 10 MB.
pub const HEADER_LIMIT_BYTES: u64 = super::limits::HEADER_LIMIT_BYTES;

/// Maximum number of dimensions. ggml supports four (`GGML_MAX_DIMS`); the format allows more.
const RANK_LIMIT: u32 = 8;
const DEFAULT_ALIGNMENT: u64 = 32;

/// The result of parsing the beginning of a file.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "only one value exists at a time")]
pub enum Parsed {
    /// The tensors and the metadata.
    Complete(TensorMap),
    /// The header is longer than `start`, so more bytes of the file are needed.
    More {
        /// The minimum length of `start` for the next call. That call may request even more.
        bytes: u64,
    },
}

/// Parses and checks a header. `start` is the beginning of a file of `file_bytes` bytes.
///
/// # Errors
/// A [`ModelError`] that says what is wrong, and where.
pub fn parse(start: &[u8], file_bytes: u64) -> Result<Parsed, ModelError> {
    let mut cursor = Cursor::new(start, file_bytes);
    match read(&mut cursor, file_bytes) {
        Ok(map) => Ok(Parsed::Complete(map)),
        Err(Stop::More(bytes)) => Ok(Parsed::More { bytes }),
        Err(Stop::Fault(error)) => Err(error),
    }
}

fn read(cursor: &mut Cursor<'_>, file_bytes: u64) -> Result<TensorMap, Stop> {
    if cursor.bytes(4, "the magic")? != MAGIC {
        return Err(Stop::Fault(ModelError::NotGguf));
    }
    let version = cursor.u32("the version")?;
    if version != 2 && version != 3 {
        return Err(Stop::Fault(ModelError::GgufVersion { found: version }));
    }
    let (tensors, pairs) = (cursor.u64("the number of tensors")?, cursor.u64("the number of keys")?);
    let metadata = metadata::read(cursor, version, pairs)?;
    let alignment = read_alignment(cursor, &metadata)?;
    let mut found: Vec<(u64, TensorInfo)> = Vec::new();
    for _ in 0..tensors {
        let at = cursor.position();
        found.push((at, read_tensor(cursor, alignment)?));
    }
    let header_bytes = cursor.position();
    let data_begin = header_bytes.next_multiple_of(alignment);
    place_tensors(cursor, &mut found, data_begin, alignment, file_bytes)?;
    let infos = found.into_iter().map(|(_, info)| info).collect();
    let map = TensorMap::new(infos, map::SafetensorsMetadata::default(), data_begin.min(file_bytes))
        .map_err(|tensor| Stop::Fault(ModelError::DuplicateTensor { tensor }))?;
    Ok(map.with_gguf(metadata))
}

/// Reads `general.alignment`, or returns its default.
fn read_alignment(cursor: &Cursor<'_>, metadata: &GgufMetadata) -> Result<u64, Stop> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(Value::U32(alignment)) if alignment.is_power_of_two() && alignment >= 8 => Ok(u64::from(alignment)),
        Some(_) => Err(cursor.fault(cursor.position(), "general.alignment must be a U32, a power of two, and at least 8")),
    }
}

/// Reads one entry of the tensor list. The tensor's range is relative to the start of the data;
/// [`place_tensors`] makes it absolute.
fn read_tensor(cursor: &mut Cursor<'_>, alignment: u64) -> Result<TensorInfo, Stop> {
    let at = cursor.position();
    let name = cursor.text("a tensor's name")?.to_owned();
    let rank = cursor.u32("a tensor's number of dimensions")?;
    if rank > RANK_LIMIT {
        return Err(
            cursor.fault(at, format!("tensor {} has {rank} dimensions, more than the limit of {RANK_LIMIT}", quote(&name)))
        );
    }
    let mut shape = Vec::new();
    for _ in 0..rank {
        let dim = cursor.u64("a tensor's dimension")?;
        // On a 32-bit machine, truncating the dimension would change the shape.
        let dim = usize::try_from(dim).map_err(|_| {
            cursor.fault(at, format!("tensor {} has a dimension of {dim}, more than the limit of {}", quote(&name), usize::MAX))
        })?;
        shape.push(dim);
    }
    let number = cursor.u32("a tensor's type")?;
    let offset = cursor.u64("a tensor's offset")?;
    let Some(dtype) = dtype_from_number(number) else {
        return Err(Stop::Fault(ModelError::GgufType { offset: at, tensor: name, found: number }));
    };
    let block_elements = dtype.block_elements();
    let row = shape.first().copied().unwrap_or(1);
    if !row.is_multiple_of(block_elements) {
        let why =
            format!("tensor {} has rows of {row} elements, but {dtype} is stored in blocks of {block_elements}", quote(&name));
        return Err(cursor.fault(at, why));
    }
    // Zeros are left out of the product, because they would hide an overflow in the other
    // dimensions.
    let others = shape.iter().filter(|&&dim| dim > 0).try_fold(1_u64, |product, &dim| product.checked_mul(dim as u64));
    let elements = others.map(|others| if shape.contains(&0) { 0 } else { others });
    let bytes = elements.and_then(|elements| dtype.bytes_of(elements));
    let end = bytes.and_then(|bytes| offset.checked_add(bytes));
    // The file lists the fastest-varying dimension first; `TensorInfo` lists it last.
    shape.reverse();
    let Some(end) = end else {
        return Err(cursor.fault(at, format!("tensor {} of shape {shape:?} is larger than any file", quote(&name))));
    };
    if !offset.is_multiple_of(alignment) {
        let why = format!("tensor {} begins at byte {offset} of the data, which is not a multiple of {alignment}", quote(&name));
        return Err(cursor.fault(at, why));
    }
    Ok(TensorInfo { name, dtype, shape, file_range: offset..end })
}

/// Checks that the tensors are consecutive and within the file, and makes their ranges absolute.
fn place_tensors(
    cursor: &Cursor<'_>,
    found: &mut [(u64, TensorInfo)],
    data_begin: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<(), Stop> {
    let mut expected = 0;
    found.sort_by_key(|(_, tensor)| (tensor.file_range.start, tensor.file_range.end));
    // The error for a truncated file counts all missing bytes, up to the end of the last tensor.
    let last = found.iter().map(|(_, tensor)| tensor.file_range.end).max().unwrap_or(0);
    for (at, tensor) in found {
        let range = tensor.file_range.clone();
        if range.start != expected {
            let why = format!(
                "tensor {} begins at byte {} of the data, but must begin at byte {expected}",
                quote(&tensor.name),
                range.start
            );
            return Err(cursor.fault(*at, why));
        }
        let end = data_begin.checked_add(range.end);
        let Some(end) = end.filter(|&end| end <= file_bytes) else {
            let (tensor, data_bytes) = (tensor.name.clone(), file_bytes.saturating_sub(data_begin));
            let missing_bytes = last.max(range.end) - data_bytes;
            return Err(Stop::Fault(ModelError::PastEnd { tensor, end: range.end, data_bytes, missing_bytes }));
        };
        tensor.file_range = data_begin + range.start..end;
        expected = range.end.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
    }
    Ok(())
}

/// Returns the type with this number in `enum ggml_type`. The numbers that are skipped here belong
/// to types that ggml has removed.
fn dtype_from_number(number: u32) -> Option<DType> {
    Some(match number {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        6 => DType::Q5_0,
        7 => DType::Q5_1,
        8 => DType::Q8_0,
        9 => DType::Q8_1,
        10 => DType::Q2_K,
        11 => DType::Q3_K,
        12 => DType::Q4_K,
        13 => DType::Q5_K,
        14 => DType::Q6_K,
        15 => DType::Q8_K,
        16 => DType::IQ2_XXS,
        17 => DType::IQ2_XS,
        18 => DType::IQ3_XXS,
        19 => DType::IQ1_S,
        20 => DType::IQ4_NL,
        21 => DType::IQ3_S,
        22 => DType::IQ2_S,
        23 => DType::IQ4_XS,
        24 => DType::I8,
        25 => DType::I16,
        26 => DType::I32,
        27 => DType::I64,
        28 => DType::F64,
        29 => DType::IQ1_M,
        30 => DType::BF16,
        34 => DType::TQ1_0,
        35 => DType::TQ2_0,
        39 => DType::MXFP4,
        40 => DType::NVFP4,
        41 => DType::Q1_0,
        42 => DType::Q2_0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
