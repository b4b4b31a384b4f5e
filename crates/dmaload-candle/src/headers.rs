//! The headers of a model's files: which tensors there will be, before any has arrived.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dmaload::model::TensorInfo;
use dmaload::{Error, LoadOptions, Result, inspect_load_blocking};

/// The tensors of a model by name, as its headers describe them.
pub(crate) type Named = HashMap<String, TensorInfo>;

/// Reads the headers of the files that a load of these paths reads, and nothing else of them.
///
/// # Errors
/// Those of [`inspect_load_blocking`]; [`Error::AmbiguousTensor`] where two files have a tensor
/// of one name.
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
