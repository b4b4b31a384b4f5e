//! Reads the index of a multi-file model.

use std::path::Path;
use std::sync::Arc;

use super::header::identify_foreign;
use super::names;
use super::source::OpenFile;
use crate::error::{Error, Result};
use crate::model::index::{self, Index};
use crate::model::{LOOKED_AT_BYTES, ModelError};

pub(super) fn read_index(path: &Path) -> Result<Index> {
    let (file, json) = read_json(path)?;
    parse_index(&file, &json)
}

/// Reads a file with a generic name that may be an index. Returns `None` if it lists no files,
/// lists a file that is not a safetensors file, or contains some other JSON.
///
/// # Errors
/// Those of [`OpenFile::open`] and [`OpenFile::read_exact`]. [`Error::Model`] if the file is too
/// long, invalid JSON, or an invalid index: if such a file were skipped, a model could be loaded
/// without its index. [`Error::Changed`] if such a file has changed since it was opened.
pub(super) fn read_generic_index(path: &Path) -> Result<Option<Index>> {
    let (file, json) = read_json(path)?;
    match parse_index(&file, &json) {
        Ok(index) => Ok(Some(index).filter(is_of_safetensors)),
        Err(Error::Model { .. }) if !Index::is_meant(&json) => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_json(path: &Path) -> Result<(Arc<OpenFile>, Vec<u8>)> {
    // `open` refuses everything that is not a regular file, such as a FIFO or a device.
    let file = OpenFile::open(path)?;
    let bytes = file.identity.bytes;
    if bytes > index::LIMIT_BYTES {
        let reason = format!("it is {bytes} bytes long, more than the limit of {}", index::LIMIT_BYTES);
        return Err(Error::Model { path: path.to_owned(), fault: ModelError::Index { offset: 0, reason } });
    }
    let mut json = vec![0; usize::try_from(bytes).expect("an index within the size limit should fit into memory")];
    file.read_exact(&mut json, 0)?;
    Ok((file, json))
}

fn parse_index(file: &OpenFile, json: &[u8]) -> Result<Index> {
    Index::parse(json).map_err(|fault| {
        let fault = identify_foreign(fault, json.get(..LOOKED_AT_BYTES).unwrap_or(json), json.len() as u64);
        file.blame_change(&file.identity, Error::Model { path: file.path.to_path_buf(), fault })
    })
}

pub(super) fn is_of_safetensors(index: &Index) -> bool {
    let mut files = index.files().peekable();
    files.peek().is_some() && files.all(names::is_safetensors_name)
}
