//! Expands the requested paths into lists of files. A path may name a model folder, an index, or a
//! part of a split GGUF model.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::folder::Folder;
use super::index::{is_of_safetensors, read_generic_index, read_index};
use super::missing::{self, Missing};
use super::names::quoted;
use super::source::{Input, OpenFile, SourceFile};
use crate::error::{Error, Result};
use crate::model::index::{self, Index, Named};
use crate::model::parts::PartName;
use crate::options::choices::Format;
use crate::options::load::LoadOptions;
use crate::plan::select::Selector;

/// The files of a load, in load order.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) sources: Vec<SourceFile>,
    /// Notes for the report about how the files were chosen.
    pub(crate) notes: Vec<String>,
}

/// The options that determine which files are loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Choice<'a> {
    pub(crate) format: Format,
    /// Whether to skip missing files.
    pub(crate) allow_missing: bool,
    /// Whether to load only the file that each path names, even if it is an index or a part of a
    /// split model.
    pub(crate) as_one_file: bool,
    /// The selected tensors; `None` for all.
    pub(crate) selector: Option<&'a Selector>,
}

impl<'a> Choice<'a> {
    pub(crate) fn new(options: &LoadOptions, selector: Option<&'a Selector>) -> Self {
        let LoadOptions { format, allow_missing, as_one_file, .. } = *options;
        Choice { format, allow_missing, as_one_file, selector }
    }
}

/// Finds the files for all inputs.
///
/// # Errors
/// - [`Error::File`] if a folder can't be listed.
/// - If an index can't be read, the errors of [`OpenFile::open`] and [`OpenFile::read_exact`]. If
///   it is invalid, [`Error::Model`], or [`Error::Changed`] if it has changed in the meantime.
/// - [`Error::NoModel`] if a path leads to no model that can be loaded, or to several.
/// - [`Error::Incomplete`] if files of a model are missing, unless `choice` allows that and at
///   least one file is left.
pub(crate) fn find_files(inputs: &[Input], choice: Choice<'_>) -> Result<Found> {
    let mut found = Found::default();
    let splits: Vec<_> = inputs.iter().map(|input| split_key(input, choice)).collect();
    let mut named: HashMap<&SplitKey, usize> = HashMap::new();
    splits.iter().flatten().for_each(|split| *named.entry(split).or_default() += 1);
    for ((model, input), split) in inputs.iter().enumerate().zip(&splits) {
        let before = found.sources.len();
        // If the caller names several parts of a model, only those parts are loaded.
        let is_only_part = split.as_ref().is_some_and(|split| named.get(split) == Some(&1));
        match input {
            Input::Open { file, part } => found.sources.push(SourceFile::open(file, part.clone())),
            Input::Inside { path, part } => found.sources.push(SourceFile::part(path.clone(), part.clone())),
            Input::Path(path) => expand_path(path, inputs.len() == 1, is_only_part, choice, &mut found)?,
        }
        found.sources.iter_mut().skip(before).for_each(|source| source.model = model);
    }
    Ok(found)
}

/// The folder of a split GGUF model and the name of its first part.
type SplitKey = (PathBuf, String);

/// Returns the split GGUF model that a path belongs to, judging by its file name. Different
/// spellings of the same folder give the same key.
fn split_key(input: &Input, choice: Choice<'_>) -> Option<SplitKey> {
    let Input::Path(path) = input else { return None };
    if choice.format == Format::Raw || choice.as_one_file {
        return None;
    }
    let part = path.file_name()?.to_str().and_then(PartName::parse).filter(PartName::is_gguf_split)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Some((fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned()), part.with_number(1)))
}

fn expand_path(path: &Path, alone: bool, is_only_part: bool, choice: Choice<'_>, found: &mut Found) -> Result<()> {
    let Choice { format, as_one_file, .. } = choice;
    let own = SourceFile::file(path.to_owned());
    if format == Format::Raw {
        found.sources.push(own);
        return Ok(());
    }
    // If the path is not accessible, opening it later reports why.
    let about = fs::metadata(path).ok();
    if about.as_ref().is_some_and(fs::Metadata::is_dir) {
        return expand_folder(path, choice, found);
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    if as_one_file {
        found.sources.push(own);
    } else if let Some(named) = index::named(name).filter(|_| format != Format::Gguf) {
        return expand_named_index(path, named, choice, found);
    } else if let Some(part) = PartName::parse(name).filter(|part| is_only_part && part.is_gguf_split()) {
        return expand_split(path, part, choice, found);
    } else {
        if alone && format == Format::Auto && about.is_some_and(|about| about.is_file()) {
            refuse_hidden_index(path)?;
        }
        found.sources.push(own);
    }
    Ok(())
}

/// Expands a file that has the name of an index.
fn expand_named_index(path: &Path, named: Named, choice: Choice<'_>, found: &mut Found) -> Result<()> {
    match named {
        Named::Safetensors => expand_index(path, &read_index(path)?, choice, found),
        Named::Other if choice.format == Format::Auto => {
            let reason =
                "this is the index of a model in pickled files, which are not supported: convert the model to safetensors";
            Err(Error::NoModel { path: path.to_owned(), reason: reason.to_owned() })
        }
        Named::Unsaid => match read_generic_index(path)? {
            Some(index) => expand_index(path, &index, choice, found),
            // The file is not an index of safetensors files, so load the file itself.
            None => {
                found.sources.push(SourceFile::file(path.to_owned()));
                Ok(())
            }
        },
        Named::Other => {
            found.sources.push(SourceFile::file(path.to_owned()));
            Ok(())
        }
    }
}

/// Refuses an index that is not named like one, such as a blob in a model cache. Otherwise, it
/// would be loaded as raw JSON text.
fn refuse_hidden_index(path: &Path) -> Result<()> {
    // A file with an extension other than `json` is not taken for an index.
    if path.extension().is_some_and(|extension| extension != "json") {
        return Ok(());
    }
    let Ok(file) = OpenFile::open(path) else { return Ok(()) };
    let mut first = [0; 1];
    let is_json =
        (1..=index::LIMIT_BYTES).contains(&file.identity.bytes) && file.read_exact(&mut first, 0).is_ok() && first == *b"{";
    if is_json && read_index(path).is_ok_and(|index| is_of_safetensors(&index)) {
        let reason = "this is the index of a model, but its name does not show that: load the folder with the model's \
                      files, or give it a name that ends in .safetensors.index.json";
        return Err(Error::NoModel { path: path.to_owned(), reason: reason.to_owned() });
    }
    Ok(())
}

/// Finds the model in a folder by its index or by its usual name. Otherwise, treats all files of
/// one format as the model.
fn expand_folder(path: &Path, choice: Choice<'_>, found: &mut Found) -> Result<()> {
    let folder = Folder::read(path)?;
    if choice.format != Format::Gguf {
        if let Some(name) = folder.index(&mut found.notes)? {
            found.notes.extend(folder.note_gguf(choice.format));
            let path = path.join(name);
            return expand_index(&path, &read_index(&path)?, choice, found);
        }
        let names = folder.safetensors();
        if !names.is_empty() {
            let (kept, missing) = folder.check(&names, &mut found.notes);
            // Without an index, only the files' names show what the model consists of.
            check_missing(&missing, kept.len(), choice, found, |why| {
                let reason = format!("{} of {} safetensors files can be loaded; {why}", kept.len(), kept.len() + missing.len());
                Error::Incomplete { path: path.to_owned(), reason, loadable: kept.len() }
            })?;
            found.sources.extend(kept.into_iter().map(|name| SourceFile::file(folder.path_of(name))));
            found.notes.extend(folder.note_gguf(choice.format));
            return Ok(());
        }
    }
    if choice.format != Format::Safetensors {
        let names = folder.gguf();
        if let Some(first) = names.first() {
            let part = PartName::parse(first).filter(PartName::is_gguf_split);
            let is_of_same_model =
                |name: &&str| part.zip(PartName::parse(name)).map_or(*name == *first, |(part, own)| part.is_same_model(&own));
            if !names.iter().all(is_of_same_model) {
                let all = names.len();
                let listed = quoted(names.iter().copied());
                let series = PartName::parse(first);
                let is_series = series.is_some_and(|part| {
                    names.iter().all(|name| PartName::parse(name).is_some_and(|own| part.is_same_model(&own)))
                });
                let reason = if is_series {
                    format!(
                        "contains {all} GGUF files that are not numbered like parts of one model \
                         (NAME-00001-of-{all:05}.gguf): rename them, or choose those that belong together from {listed}"
                    )
                } else {
                    format!("contains {all} GGUF files that are not parts of one model: choose one of {listed}")
                };
                return Err(Error::NoModel { path: path.to_owned(), reason });
            }
            return match part {
                Some(part) => expand_split(&path.join(first), part, choice, found),
                None => {
                    found.sources.push(SourceFile::file(folder.path_of(first)));
                    Ok(())
                }
            };
        }
    }
    Err(folder.no_model(choice.format))
}

/// Finds the files that an index lists, or only those that contain selected tensors.
fn expand_index(path: &Path, index: &Index, choice: Choice<'_>, found: &mut Found) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let all = index.files().count();
    if all == 0 {
        let reason = "lists no files: its \"weight_map\" is empty".to_owned();
        return Err(Error::NoModel { path: path.to_owned(), reason });
    }
    let needed = needed_files(index, choice.selector);
    let index = Arc::new(index.clone());
    let (mut kept, mut missing) = (Vec::new(), Vec::new());
    for name in index.files() {
        let is_needed = match &needed {
            Needed::All => true,
            Needed::Some(names) | Needed::First(names) => names.contains(name),
        };
        if !is_needed && matches!(needed, Needed::Some(_)) {
            continue;
        }
        match Missing::check(&folder.join(name), name) {
            None => kept.push(name),
            Some(lacking) if is_needed => missing.push(lacking),
            // The missing file may have contained a selected tensor that the index does not list.
            // That tensor is then reported as not found.
            Some(_) => {}
        }
    }
    check_missing(&missing, kept.len(), choice, found, |why| {
        let stale = missing::explain_missing(folder, &index, missing.len() == all);
        let reason = format!("the index lists {all} {}; {why}{stale}", if all == 1 { "file" } else { "files" });
        Error::Incomplete { path: path.to_owned(), reason, loadable: kept.len() }
    })?;
    if let Needed::Some(names) = &needed
        && names.len() < all
        && choice.selector.is_some_and(Selector::is_wild)
    {
        let looked_at = names.len();
        found.notes.push(format!(
            "according to the index, the matching tensors are in {looked_at} of its {all} files; the others were not read"
        ));
    }
    found.notes.extend(missing::note_unlisted(folder, &index));
    let of_shard = |name: &str| SourceFile::of_index(folder.join(name), Arc::clone(&index), name.to_owned());
    found.sources.extend(kept.into_iter().map(of_shard));
    Ok(())
}

/// The files in an index that a selection needs.
#[derive(Debug)]
enum Needed<'a> {
    All,
    /// Only these files are needed, because no other file contains a selected tensor.
    Some(HashSet<&'a str>),
    /// These files must exist. Others may contain tensors that the index does not list, so those
    /// that exist are read, too.
    First(HashSet<&'a str>),
}

fn needed_files<'a>(index: &'a Index, selector: Option<&Selector>) -> Needed<'a> {
    let Some(selector) = selector.filter(|selector| selector.has_patterns()) else { return Needed::All };
    let mut files = HashSet::new();
    let all_met = selector.select_names(index.tensors(), |file| _ = files.insert(file));
    if all_met { Needed::Some(files) } else { Needed::First(files) }
}

/// Finds all parts of a split GGUF model, which are named like `NAME-00001-of-00003.gguf`.
fn expand_split(path: &Path, part: PartName<'_>, choice: Choice<'_>, found: &mut Found) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let (mut kept, mut missing) = (Vec::new(), Vec::new());
    for number in 1..=part.count {
        let name = part.with_number(number);
        match Missing::check(&folder.join(&name), &name) {
            None => kept.push(name),
            Some(lacking) => missing.push(lacking),
        }
    }
    if kept.is_empty() && fs::symlink_metadata(path).is_err() {
        // No part can be loaded, and the path itself does not exist: opening it reports that.
        found.sources.push(SourceFile::file(path.to_owned()));
        return Ok(());
    }
    check_missing(&missing, kept.len(), choice, found, |why| Error::Incomplete {
        path: path.to_owned(),
        reason: format!("{} of {} parts of the model can be loaded; {why}", kept.len(), part.count),
        loadable: kept.len(),
    })?;
    found.sources.extend(kept.into_iter().map(|name| SourceFile::file(path.with_file_name(name))));
    Ok(())
}

/// Fails if files are missing. If the caller allows missing files and at least one file is left,
/// adds a note instead.
fn check_missing(
    missing: &[Missing],
    kept: usize,
    choice: Choice<'_>,
    found: &mut Found,
    error: impl FnOnce(String) -> Error,
) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let why = missing::describe(missing);
    if !choice.allow_missing || kept == 0 {
        return Err(error(why));
    }
    found.notes.push(format!("loading an incomplete model, because this was allowed: {why}"));
    Ok(())
}

/// If the caller named a single file, and other files were found along with it, returns the
/// position of the named file in `sources`.
pub(crate) fn named_among(inputs: &[Input], sources: &[SourceFile]) -> Option<usize> {
    let [Input::Path(path)] = inputs else { return None };
    let named: &PathBuf = path;
    sources.iter().position(|source| source.path.as_ref() == named).filter(|_| sources.len() > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHOICE: Choice<'static> = Choice { format: Format::Auto, allow_missing: false, as_one_file: false, selector: None };

    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let content = if name.ends_with(".json") { r#"{"weight_map":{"a":"b.safetensors"}}"# } else { "x" };
            fs::write(folder.path().join(name), if name.starts_with("empty") { "" } else { content }).unwrap();
        }
        folder
    }

    fn found(names: &[&str], choice: Choice<'_>) -> Result<Vec<String>> {
        let folder = folder(names);
        let files = find_files(&[Input::Path(folder.path().to_owned())], choice)?.sources;
        let name = |source: &SourceFile| source.path.strip_prefix(folder.path()).unwrap().to_str().unwrap().to_owned();
        Ok(files.iter().map(name).collect())
    }

    #[test]
    fn folder_stands_for_its_model() {
        let files = |names: &[&str]| found(names, CHOICE).unwrap();
        let index = "model.safetensors.index.json";
        assert_eq!(files(&[index, "a.safetensors", "b.safetensors", "x.gguf"]), ["b.safetensors"]);
        assert_eq!(files(&["model.safetensors.index.fp16.json", "a.safetensors", "b.safetensors"]), ["b.safetensors"]);
        assert_eq!(files(&["model.safetensors.fp16.index.json", index, "b.safetensors"]), ["b.safetensors"]);
        assert_eq!(files(&["model.safetensors", "adapter.safetensors"]), ["model.safetensors"]);
        assert_eq!(files(&["b.safetensors", "a.safetensors", "._a.safetensors", "c.txt"]), ["a.safetensors", "b.safetensors"]);
        assert_eq!(files(&["M.SAFETENSORS", "pytorch_model.bin.index.json"]), ["M.SAFETENSORS"]);
        assert_eq!(
            files(&["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"]),
            ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
        );
        assert_eq!(files(&["m-00000-of-00002.safetensors", "m-00001-of-00002.safetensors"]).len(), 2, "numbered from 0");
        let gguf = Choice { format: Format::Gguf, ..CHOICE };
        assert_eq!(found(&["model.safetensors", "x.gguf"], gguf).unwrap(), ["x.gguf"]);
    }

    #[test]
    fn folder_without_a_model_or_with_several_is_an_error() {
        let says = |names: &[&str]| found(names, CHOICE).unwrap_err().to_string();
        assert!(says(&["a.bin"]).contains("without a model"));
        assert!(
            says(&["a.gguf", "b.gguf"])
                .contains(r#"2 GGUF files that are not parts of one model: choose one of "a.gguf", "b.gguf""#)
        );
        let two = says(&["a.safetensors.index.json", "b.safetensors.index.json"]);
        assert!(two.contains(r#"choose one of "a.safetensors.index.json", "b.safetensors.index.json""#), "{two}");
        // With `Format::Raw`, a folder is refused only when it is opened.
        assert_eq!(found(&["a.bin"], Choice { format: Format::Raw, ..CHOICE }).unwrap(), [""]);
    }

    #[test]
    fn missing_files_are_listed_unless_allowed() {
        for (names, expected, kept) in [
            (&["m-00001-of-00003.safetensors", "m-00003-of-00003.safetensors"][..], "\"m-00002-of-00003.safetensors\"", 2),
            (&["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors.part"], "is an unfinished download", 1),
            (&["m-1-of-2.fp16.safetensors"], "\"m-2-of-2.fp16.safetensors\"", 1),
            (&["m-00001-of-000002.safetensors", "other.safetensors"], "\"m-00002-of-000002.safetensors\"", 2),
            (&["a.safetensors", "empty.safetensors"], "\"empty.safetensors\" (it has 0 bytes)", 1),
            (&["m-00002-of-00002.gguf"], "\"m-00001-of-00002.gguf\"", 1),
            (&["empty-00001-of-00002.gguf", "empty-00002-of-00002.gguf"], "2 are missing", 0),
            (&["empty.safetensors"], "1 is missing", 0),
            (&["model.safetensors.index.json"], "the index lists 1 file; 1 is missing: \"b.safetensors\"", 0),
        ] {
            let error = found(names, CHOICE).unwrap_err();
            assert!(matches!(error, Error::Incomplete { .. }), "{names:?}: {error}");
            assert!(error.to_string().contains(expected), "{names:?}: {error}");
            let allowed = found(names, Choice { allow_missing: true, ..CHOICE });
            assert_eq!(allowed.as_ref().map_or(0, Vec::len), kept, "{names:?}: {allowed:?}");
        }
    }

    #[test]
    fn part_of_a_split_model_stands_for_all_of_it() {
        let folder = folder(&["a-00001-of-00003.gguf", "a-00002-of-00003.gguf", "a-00003-of-00003.gguf"]);
        let names = |inputs: &[&str], choice| {
            let inputs: Vec<_> = inputs.iter().map(|name| Input::Path(folder.path().join(name))).collect();
            find_files(&inputs, choice).unwrap().sources.len()
        };
        assert_eq!(names(&["a-00002-of-00003.gguf"], CHOICE), 3);
        assert_eq!(names(&["a-00002-of-00003.gguf"], Choice { as_one_file: true, ..CHOICE }), 1);
        assert_eq!(names(&["a-00002-of-00003.gguf", "a-00001-of-00003.gguf"], CHOICE), 2);
        for other in
            ["b-00001-of-00002.gguf", "a-2-of-3.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "-of-.gguf", "a.gguf"]
        {
            assert_eq!(names(&[other], CHOICE), 1, "{other}");
        }
    }
}
