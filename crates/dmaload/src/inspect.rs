//! Looking at a file without loading it.

use std::path::{Path, PathBuf};

use crate::engine::{model_files, read_header};
use crate::error::Result;
use crate::model::TensorMap;
use crate::settings::Format;
use crate::source::{Input, OpenFile};

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
    let tensors = read_header(&file, 0..file.identity.bytes, format)?;
    Ok(Inspected { bytes: file.identity.bytes, tensors })
}

/// The same of every file of a model: of a folder, of an index, of a GGUF file with its other parts. A file alone is itself. Blocks
/// for as long as that takes.
///
/// # Errors
/// When a file can't be opened or read, a header is wrong, or the index says something else than the files do.
pub fn inspect_model(path: impl AsRef<Path>, format: Format) -> Result<Vec<(PathBuf, Inspected)>> {
    let files = model_files(&[Input::Path(path.as_ref().to_owned())], format)?;
    let looked_at = files.into_iter().map(|source| {
        let inspected = inspect(&*source.path, format)?;
        source.check(inspected.tensors.as_ref())?;
        Ok((source.path.as_ref().clone(), inspected))
    });
    looked_at.collect()
}
