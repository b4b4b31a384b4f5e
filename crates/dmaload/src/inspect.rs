//! Looking at a file without loading it.

use std::path::Path;

use crate::engine::read_header;
use crate::error::Result;
use crate::model::TensorMap;
use crate::settings::Format;
use crate::source::OpenFile;

/// What a file says about itself.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Inspected {
    /// Its length in bytes.
    pub bytes: u64,
    /// Its tensor map; `None` for a file of raw bytes.
    pub tensors: Option<TensorMap>,
}

/// Reads a file's header, and nothing else of it. Blocks for as long as that takes.
///
/// # Errors
/// When the file can't be opened or read, or its header is wrong.
pub fn inspect(path: impl AsRef<Path>, format: Format) -> Result<Inspected> {
    let file = OpenFile::open(path.as_ref())?;
    let tensors = read_header(&file, format)?;
    Ok(Inspected { bytes: file.identity.bytes, tensors })
}
