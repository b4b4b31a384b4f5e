//! Reads the headers of a model's files, to know its tensors before they arrive.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dmaload::model::TensorInfo;
use dmaload::{Error, Format, Inspected, Result, inspect_model_blocking};

/// The tensors of a model by name, as its headers describe them.
pub(crate) type Named = HashMap<String, TensorInfo>;

/// Reads only the headers of these files.
///
/// # Errors
/// Those of [`inspect_model_blocking`], and [`Error::AmbiguousTensor`] if two files have a tensor
/// of the same name.
pub(crate) fn read(paths: &[PathBuf]) -> Result<Named> {
    let mut files: Vec<Inspected> = Vec::new();
    for path in paths {
        for found in inspect_model_blocking(path, Format::Auto)? {
            // A part of a split model stands for all parts, so two parts would list each file
            // twice.
            if files.iter().all(|known| known.path != found.path) {
                files.push(found);
            }
        }
    }
    let mut named: HashMap<String, (TensorInfo, &Path)> = HashMap::new();
    for file in &files {
        for tensor in file.tensors.iter().flatten() {
            if let Some((_, first)) = named.insert(tensor.name.clone(), (tensor.clone(), &file.path)) {
                let paths = vec![first.to_owned(), file.path.clone()];
                return Err(Error::AmbiguousTensor { tensor: tensor.name.clone(), paths });
            }
        }
    }
    Ok(named.into_iter().map(|(name, (tensor, _))| (name, tensor)).collect())
}
