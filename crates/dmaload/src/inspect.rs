//! Looking at a file without loading it.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::files::expand::{self, Choice, Found};
use crate::files::header::read_header;
use crate::files::source::{Input, OpenFile};
use crate::files::whole::check_whole;
use crate::model::TensorMap;
use crate::options::choices::Format;

/// What a file says about itself.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Inspected {
    /// Its length in bytes.
    pub bytes: u64,
    /// Its tensor map; `None` for a file of raw bytes.
    pub tensors: Option<TensorMap>,
}

/// Reads a file's header, and nothing else of it; of file systems whose lengths may be made up, the last byte, too. Blocks for as
/// long as that takes.
///
/// # Errors
/// When the file can't be opened or read, its header is wrong, or its file system states a length that it has not.
pub fn inspect(path: impl AsRef<Path>, format: Format) -> Result<Inspected> {
    let file = OpenFile::open(path.as_ref())?;
    let tensors = read_header(&file, 0..file.identity.bytes, format)?;
    file.check_length()?;
    Ok(Inspected { bytes: file.identity.bytes, tensors })
}

/// The same of every file of a model: of a folder, of an index, of a GGUF file with its other parts. A file alone is itself. Blocks
/// for as long as that takes. A tensor that an index maps to one of two files is in that one's map only.
///
/// # Errors
/// When files are missing, two have a tensor of one name and no index decides, a file can't be opened or read, a header is wrong, or the index says something else than the files do.
pub fn inspect_model(path: impl AsRef<Path>, format: Format) -> Result<Vec<(PathBuf, Inspected)>> {
    let choice = Choice { format, allow_missing: false, as_one_file: false, selector: None };
    let Found { sources, .. } = expand::files(&[Input::Path(path.as_ref().to_owned())], choice)?;
    let mut looked_at = Vec::new();
    for source in &sources {
        let inspected = inspect(&*source.path, format)?;
        source.check(inspected.tensors.as_ref())?;
        looked_at.push((source.path.as_ref().clone(), inspected));
    }
    let known: Vec<_> = sources.iter().zip(looked_at.iter().map(|(_, inspected)| inspected.tensors.as_ref())).collect();
    check_whole(&known, false)?;
    for (source, (_, inspected)) in sources.iter().zip(&mut looked_at) {
        inspected.tensors = inspected.tensors.take().map(|map| map.only(|name| source.owns(name)));
    }
    Ok(looked_at)
}
