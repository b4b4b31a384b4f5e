//! Checks that the files in a load form complete models: no two files in a model contain tensors
//! with the same name, and no part of a split model is missing.
//!
//! The check needs the headers of all files. The headers of large files are known when a load is
//! planned. Those of small files, which share memory, are known only once the files have been
//! read.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use dmabuf::printable;

use super::source::SourceFile;
use crate::error::{Error, Result};
use crate::model::gguf::Value;
use crate::model::parts::PartName;
use crate::model::{ModelError, TensorMap};

/// A file in a load and its tensors; `None` for raw bytes.
pub(crate) type KnownFile<'a> = (&'a SourceFile, Option<&'a TensorMap>);

/// Checks that the files of each model form one complete model. Returns notes for the report about
/// parts that may be missing.
///
/// # Errors
/// [`Error::DuplicateTensor`], [`Error::Incomplete`], and [`Error::Model`] for parts that
/// contradict each other.
pub(crate) fn check_whole(files: &[KnownFile<'_>], allow_missing: bool) -> Result<Vec<String>> {
    let mut sizes: HashMap<usize, usize> = HashMap::new();
    files.iter().for_each(|(source, _)| *sizes.entry(source.model).or_default() += 1);
    // In a single-file model, no names need to be compared: a name that occurs twice in a file is
    // reported when the file's header is parsed.
    let has_several = |source: &SourceFile| sizes.get(&source.model).is_some_and(|&files| files > 1);
    let notes = check_splits(files, has_several, allow_missing)?;
    check_names(files, has_several)?;
    Ok(notes)
}

/// Checks that no two files in a model contain tensors with the same name. A tensor that the index
/// maps to another file is ignored.
fn check_names(files: &[KnownFile<'_>], has_several: impl Fn(&SourceFile) -> bool) -> Result<()> {
    let mut names: Vec<(usize, &str, &SourceFile)> = Vec::new();
    for &(source, map) in files {
        if has_several(source) {
            let own = map.into_iter().flatten().map(|info| info.name.as_str()).filter(|name| source.owns(name));
            names.extend(own.map(|name| (source.model, name, source)));
        }
    }
    names.sort_by_key(|&(model, name, _)| (model, name));
    match names.windows(2).find(|pair| (pair[0].0, pair[0].1) == (pair[1].0, pair[1].1)) {
        None => Ok(()),
        Some(pair) => Err(Error::DuplicateTensor {
            tensor: pair[0].1.to_owned(),
            first: pair[0].2.path.as_ref().clone(),
            second: pair[1].2.path.as_ref().clone(),
        }),
    }
}

/// The split metadata of one part of a split GGUF model.
#[derive(Debug, Clone, Copy)]
struct Split {
    number: u64,
    count: u64,
    /// Total number of tensors in all parts; `None` if the metadata has no such number.
    all_tensors: Option<u64>,
    tensors: u64,
}

impl Split {
    /// Reads the split metadata; `None` for a model that is not split.
    fn from_map(map: &TensorMap) -> std::result::Result<Option<Split>, String> {
        let Some(gguf) = map.gguf() else { return Ok(None) };
        let number = |key: &str| match gguf.get(key) {
            None => Ok(None),
            Some(value) => whole_number(&value).map(Some).ok_or_else(|| format!("{key} is {value}, not a count")),
        };
        let Some(count) = number("split.count")?.filter(|&count| count > 0) else { return Ok(None) };
        let Some(own) = number("split.no")? else { return Err("split.count is present, but split.no is not".to_owned()) };
        if own >= count {
            return Err(format!("it claims to be part {} of {count} (split.no {own}, split.count {count})", own + 1));
        }
        Ok(Some(Split { number: own, count, all_tensors: number("split.tensors.count")?, tensors: map.len() as u64 }))
    }
}

fn whole_number(value: &Value<'_>) -> Option<u64> {
    match *value {
        Value::U8(value) => Some(value.into()),
        Value::U16(value) => Some(value.into()),
        Value::U32(value) => Some(value.into()),
        Value::U64(value) => Some(value),
        Value::I8(value) => u64::try_from(value).ok(),
        Value::I16(value) => u64::try_from(value).ok(),
        Value::I32(value) => u64::try_from(value).ok(),
        Value::I64(value) => u64::try_from(value).ok(),
        _ => None,
    }
}

/// Identifies the parts that belong together.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Set {
    /// Parts that were found through the same input.
    Model(usize),
    /// Parts that the caller named one by one, identified by their folder and the first part's
    /// name.
    Named(Option<PathBuf>, String),
    /// Parts that the caller named one by one and whose file names don't follow the pattern for
    /// parts. They are identified by the number of parts in the model.
    Unnamed(u64),
}

/// Returns a file's folder, which is the same for `./m/part` and `m/part`.
fn folder_of(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    path.parent().map(Path::to_owned)
}

/// A file that may be a part of a split model.
#[derive(Debug, Clone, Copy)]
struct ModelPart<'a> {
    path: &'a Path,
    /// The part number and the number of parts in the file's name.
    name: Option<PartName<'a>>,
    split: Option<Split>,
}

fn check_splits(files: &[KnownFile<'_>], has_several: impl Fn(&SourceFile) -> bool, allow_missing: bool) -> Result<Vec<String>> {
    let mut sets: BTreeMap<Set, Vec<ModelPart<'_>>> = BTreeMap::new();
    let mut notes = Vec::new();
    for &(source, map) in files {
        let Some(map) = map.filter(|map| map.gguf().is_some()) else { continue };
        let path = source.path.as_path();
        let split = Split::from_map(map).map_err(|reason| contradiction(path, reason))?;
        let name = path.file_name().and_then(|name| name.to_str()).and_then(PartName::parse);
        // A file's name says nothing about a byte range of the file.
        let name = name.filter(|_| source.part.is_none());
        if let Some(name) = name.filter(|name| split.is_none() && name.count > 1 && !name.is_gguf_split()) {
            let (number, count) = (name.number, name.count);
            notes.push(format!("{} is named like part {number} of {count}, but claims to be a whole model", file_name(path)));
        }
        let name = name.filter(PartName::is_gguf_split);
        let part = ModelPart { path, name, split };
        let set = match (has_several(source), name, split) {
            (true, ..) => Set::Model(source.model),
            (false, Some(name), _) => Set::Named(folder_of(path), name.with_number(1)),
            (false, None, Some(split)) => Set::Unnamed(split.count),
            (false, None, None) => continue,
        };
        sets.entry(set).or_default().push(part);
    }
    for parts in sets.values() {
        match check_split(parts) {
            Err(Error::Incomplete { path, reason, .. }) if allow_missing => {
                notes
                    .push(format!("loading an incomplete model, because this was allowed: {}: {reason}", printable::path(&path)));
            }
            checked => notes.extend(checked?),
        }
    }
    Ok(notes)
}

/// Checks parts that belong together. Returns a note for the report, if any.
fn check_split(parts: &[ModelPart<'_>]) -> Result<Option<String>> {
    let Some((first, split)) = parts.iter().find_map(|part| Some((part, part.split?))) else { return Ok(None) };
    let mut found: BTreeMap<u64, &ModelPart<'_>> = BTreeMap::new();
    for part in parts {
        let Some(own) = part.split else {
            let other = file_name(first.path);
            return Err(contradiction(part.path, format!("split.count is missing, but is {} in {other}", split.count)));
        };
        check_against_name(part, own)?;
        if own.count != split.count {
            let reason = format!("split.count is {}, but {} in {}", own.count, split.count, file_name(first.path));
            return Err(contradiction(part.path, reason));
        }
        if let Some(other) = found.insert(own.number, part) {
            let reason =
                format!("it claims to be part {} of {}, and so does {}", own.number + 1, own.count, file_name(other.path));
            return Err(contradiction(part.path, reason));
        }
    }
    let missing: Vec<u64> = (0..split.count).filter(|number| !found.contains_key(number)).take(MISSING_NAMED + 1).collect();
    if !missing.is_empty() {
        return Err(incomplete(first, split, parts.len() as u64, &missing));
    }
    check_tensor_counts(&found)
}

/// Compares the number of tensors in all parts with `split.tensors.count`. llama.cpp uses the
/// first part's count, loads nothing if that count is missing or wrong, and ignores the counts in
/// other parts. Some writers put no tensors into the first part and write a different count into
/// the others. That is not an error, but the report has a note about it.
fn check_tensor_counts(parts: &BTreeMap<u64, &ModelPart<'_>>) -> Result<Option<String>> {
    let splits: Vec<(&ModelPart<'_>, Split)> = parts.values().filter_map(|part| Some((*part, part.split?))).collect();
    let Some(&(first, split)) = splits.first() else { return Ok(None) };
    let said = |said: Option<u64>| said.map_or("missing".to_owned(), |said| said.to_string());
    let other = splits.iter().find(|(_, own)| own.all_tensors != split.all_tensors).filter(|_| split.tensors > 0);
    if let Some((part, own)) = other {
        let (own, all, first) = (said(own.all_tensors), said(split.all_tensors), file_name(first.path));
        return Err(contradiction(part.path, format!("split.tensors.count is {own}, but {all} in {first}")));
    }
    let mut stated = splits.iter().filter_map(|(part, own)| Some((*part, own.all_tensors?)));
    let Some((stating, all)) = stated.next() else {
        let first = file_name(first.path);
        return Ok(Some(format!("the number of tensors in all parts is unknown: {first} has no split.tensors.count")));
    };
    let tensors: u64 = splits.iter().map(|(_, split)| split.tensors).sum();
    if all != tensors {
        let reason = format!("split.tensors.count is {all}, but the number of tensors in all parts is {tensors}");
        return Err(contradiction(stating.path, reason));
    }
    let other = stated.find(|&(_, own)| own != all);
    Ok(other.map(|(part, own)| {
        let (part, stating) = (file_name(part.path), file_name(stating.path));
        format!("split.tensors.count is {own} in {part}, but {all} in {stating}; the actual number of tensors is {all}")
    }))
}

/// Maximum number of missing parts to list in a message.
const MISSING_NAMED: usize = 8;

fn check_against_name(part: &ModelPart<'_>, split: Split) -> Result<()> {
    let Some(name) = part.name else { return Ok(()) };
    let named = (u64::from(name.number), u64::from(name.count));
    if named == (split.number + 1, split.count) {
        return Ok(());
    }
    let Split { number, count, .. } = split;
    let reason = format!(
        "its name says part {} of {}, but its metadata says part {} of {count} (split.no {number})",
        named.0,
        named.1,
        number + 1
    );
    Err(contradiction(part.path, reason))
}

fn incomplete(part: &ModelPart<'_>, split: Split, have: u64, missing: &[u64]) -> Error {
    let numbers = missing.iter().take(MISSING_NAMED).map(|number| (number + 1).to_string()).collect::<Vec<_>>().join(", ");
    let more = if missing.len() > MISSING_NAMED { ", …" } else { "" };
    let Split { number, count, .. } = split;
    let reason = if have == 1 {
        format!(
            "part {} of {count} of a split model (split.no {number}); missing parts: {numbers}{more}; give this file \
             a name that ends in {:05}-of-{count:05}.gguf, and put the other parts next to it",
            number + 1,
            number + 1
        )
    } else {
        format!("{have} of {count} parts of a split model exist; missing parts: {numbers}{more}")
    };
    Error::Incomplete { path: part.path.to_owned(), reason, loadable: usize::try_from(have).unwrap_or(usize::MAX) }
}

fn contradiction(path: &Path, reason: String) -> Error {
    Error::Model { path: path.to_owned(), fault: ModelError::Split { reason } }
}

/// Quotes a path's file name for a message.
fn file_name(path: &Path) -> String {
    format!("{:?}", path.file_name().unwrap_or(path.as_os_str()).to_string_lossy())
}
