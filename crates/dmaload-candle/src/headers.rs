//! Reads the headers of a model's files, so the model's tensors are known before they arrive.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dmaload::model::TensorInfo;
use dmaload::{Error, LoadOptions, Result, inspect_load_blocking};

/// The tensors of a model by name, as its headers describe them.
pub(crate) type Named = HashMap<String, TensorInfo>;

/// Reads only the headers of the files that a load of these paths would read.
///
/// # Errors
/// Returns the errors of [`inspect_load_blocking`], and [`Error::AmbiguousTensor`] if two files
/// have a tensor with the same name.
pub(crate) fn read(paths: &[PathBuf], options: &LoadOptions) -> Result<Named> {
    let files = inspect_load_blocking(paths, options)?;
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
