//! Looks up a load's tensors by name, across all of its files.

use std::path::PathBuf;
use std::sync::Arc;

use crate::engine::event::LoadFile;
use crate::error::{Error, Result};
use crate::model::index::Index;
use crate::plan::tensors::FileTensors;

/// A model's index that was used to find its files, and the folder that contains the index.
pub(super) type FolderIndex = (PathBuf, Arc<Index>);

/// Returns the indices that were used to find these files, without duplicates.
pub(super) fn indices<'a>(files: impl Iterator<Item = &'a LoadFile>) -> Vec<FolderIndex> {
    let mut indices: Vec<FolderIndex> = Vec::new();
    for (folder, index) in files.filter_map(|file| file.index.as_ref()) {
        if !indices.iter().any(|(_, own)| Arc::ptr_eq(own, index)) {
            indices.push((folder.clone(), Arc::clone(index)));
        }
    }
    indices
}

/// The path of a file, and its tensors.
pub(super) type NamedFile = (Arc<PathBuf>, Option<Arc<FileTensors>>);

/// A load's tensors by name, across all of its files.
#[derive(Debug)]
pub(super) struct Names {
    files: Vec<NamedFile>,
    indices: Vec<FolderIndex>,
    /// The loaded tensors, sorted by name. Each entry is a file's number and a position in that
    /// file's map.
    sorted: Vec<(u32, u32)>,
}

impl Names {
    pub(super) fn new(files: Vec<NamedFile>, indices: Vec<FolderIndex>) -> Self {
        let mut sorted: Vec<(u32, u32)> = Vec::new();
        for ((_, tensors), number) in files.iter().zip(0..) {
            let Some(tensors) = tensors else { continue };
            let positions = (0..tensors.len()).filter_map(|number| tensors.position_of(number));
            sorted.extend(positions.map(|position| (number, u32::try_from(position).expect("tensor index overflow"))));
        }
        sorted.sort_by(|a, b| tensor_name(&files, *a).cmp(&tensor_name(&files, *b)));
        Names { files, indices, sorted }
    }

    /// Returns the number of the file that contains this tensor, and the tensor's position in that
    /// file's map.
    ///
    /// # Errors
    /// Those of [`crate::Image::tensor`].
    pub(super) fn find(&self, name: &str) -> Result<(usize, usize)> {
        match self.with_name(name) {
            &[(file, position)] => Ok((file as usize, position as usize)),
            [] => Err(self.not_loaded(name)),
            several => {
                let path = |&(file, _): &(u32, u32)| self.files.get(file as usize).map(|(path, _)| path.as_ref().clone());
                Err(Error::AmbiguousTensor { tensor: name.to_owned(), paths: several.iter().filter_map(path).collect() })
            }
        }
    }

    /// All tensors with this name, in the order of their files.
    fn with_name(&self, wanted: &str) -> &[(u32, u32)] {
        let before = self.sorted.partition_point(|&at| tensor_name(&self.files, at) < Some(wanted));
        let rest = &self.sorted[before..];
        &rest[..rest.partition_point(|&at| tensor_name(&self.files, at) == Some(wanted))]
    }

    /// Returns an error that explains why no loaded tensor has this name.
    fn not_loaded(&self, name: &str) -> Error {
        let info = |tensors: &Option<Arc<FileTensors>>| Some(tensors.as_ref()?.map.get(name)?.file_range.clone());
        let found = self.files.iter().find_map(|(path, tensors)| Some((path, info(tensors)?)));
        if let Some((path, range)) = found {
            return Error::NotLoaded { path: path.as_ref().clone(), range };
        }
        let known = self.indices.iter().find_map(|(folder, index)| Some(folder.join(index.file_of(name)?)));
        match known {
            Some(path) => Error::NotSelected { tensor: name.to_owned(), path },
            None => Error::NoSuchTensor(name.to_owned()),
        }
    }
}

fn tensor_name(files: &[NamedFile], (file, position): (u32, u32)) -> Option<&str> {
    let (_, tensors) = files.get(file as usize)?;
    Some(&tensors.as_ref()?.map.get_index(position as usize)?.name)
}
