//! Finds the model files in a folder.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::index::read_generic_index;
use super::missing::{Missing, is_unfinished};
use super::names::{has_extension, is_pickle_name, is_safetensors_name, quoted};
use super::source::{OpenFile, file_error};
use crate::error::{Error, Result};
use crate::model::gguf;
use crate::model::index::{self, Named};
use crate::model::parts::PartName;
use crate::model::safetensors::{Sniff, sniff};
use crate::options::choices::Format;

/// The usual name of a single-file model in folders from model hubs.
const MODEL: &str = "model.safetensors";

/// Whether an entry is a folder or a link to one. An entry that can't be inspected is treated as a
/// file, so opening it reports the error.
fn is_folder(entry: &fs::DirEntry) -> bool {
    match entry.file_type() {
        Ok(kind) if kind.is_symlink() => fs::metadata(entry.path()).is_ok_and(|about| about.is_dir()),
        Ok(kind) => kind.is_dir(),
        Err(_) => false,
    }
}

/// The names of everything in a folder except subfolders and hidden files, sorted.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    /// Names that are not UTF-8 are converted lossily.
    names: Vec<String>,
    /// Maps each converted name to the original name.
    replaced: HashMap<String, OsString>,
}

impl Folder {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| file_error(path, "list", &error);
        let (mut names, mut replaced) = (Vec::new(), HashMap::new());
        for entry in fs::read_dir(path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let own = entry.file_name();
            let name = own.to_string_lossy().into_owned();
            // Files with a leading dot in their name are hidden on purpose, or were left behind by
            // other operating systems.
            if name.starts_with('.') {
                continue;
            }
            // A subfolder is never one of a model's files, whatever its extension.
            if is_folder(&entry) {
                continue;
            }
            if own.to_str().is_none() && replaced.insert(name.clone(), own).is_some() {
                let reason = "contains several names that are not UTF-8 and look alike: load the files by their paths".to_owned();
                return Err(Error::NoModel { path: path.to_owned(), reason });
            }
            names.push(name);
        }
        names.sort();
        Ok(Folder { path: path.to_owned(), names, replaced })
    }

    /// The path of the file with this name.
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.replaced.get(name).map_or_else(|| self.path.join(name), |own| self.path.join(own))
    }

    fn names_matching(&self, matches: impl Fn(&str) -> bool) -> Vec<&str> {
        self.names.iter().map(String::as_str).filter(|name| matches(name)).collect()
    }

    pub(super) fn gguf(&self) -> Vec<&str> {
        self.names_matching(|name| has_extension(name, "gguf"))
    }

    /// A note about GGUF files that are ignored; `None` if there are none, or if the caller chose
    /// the format.
    pub(super) fn note_gguf(&self, format: Format) -> Option<String> {
        let names = self.gguf();
        let is_noted = format == Format::Auto && !names.is_empty();
        is_noted.then(|| format!("not loaded, because the folder has safetensors files: {}", quoted(names.into_iter())))
    }

    /// The model's safetensors files: only `model.safetensors` if it exists, otherwise all.
    pub(super) fn safetensors(&self) -> Vec<&str> {
        let all = self.names_matching(is_safetensors_name);
        if all.contains(&MODEL) { vec![MODEL] } else { all }
    }

    /// Returns the name of the folder's index; `None` if the folder has none. If the folder has
    /// several, and all others are variants of one, returns that one and adds a note about the
    /// others.
    ///
    /// # Errors
    /// [`Error::NoModel`] if the folder has several indices that are not all variants of one. Also
    /// the errors of [`read_generic_index`].
    pub(super) fn index(&self, notes: &mut Vec<String>) -> Result<Option<&str>> {
        let mut all = self.names_matching(|name| index::named(name) == Some(Named::Safetensors));
        // An index with a generic name is considered only if the folder has no single-file model.
        if all.is_empty() && !self.names.iter().any(|name| name == MODEL) {
            for name in self.names_matching(|name| index::named(name) == Some(Named::Unsaid)) {
                let path = self.path_of(name);
                if fs::metadata(&path).is_ok_and(|about| about.is_file()) && read_generic_index(&path)?.is_some() {
                    all.push(name);
                }
            }
        }
        let plain: Vec<_> = all.iter().copied().filter(|name| is_plain_index_of(name, &all)).collect();
        match (all.as_slice(), plain.as_slice()) {
            ([], _) => Ok(None),
            ([only], _) => Ok(Some(only)),
            (_, [plain]) => {
                let others = all.iter().copied().filter(|name| name != plain);
                notes.push(format!("used {plain:?}; the folder also has variants: {}", quoted(others)));
                Ok(Some(plain))
            }
            _ => {
                let names = quoted(all.iter().copied());
                let reason = format!("contains {} models, each with an index: choose one of {names}", all.len());
                Err(Error::NoModel { path: self.path.clone(), reason })
            }
        }
    }

    /// Splits these files into those that can be loaded and those that can't. The latter include
    /// files that are missing from a numbered sequence, `NAME-00001-of-00003`. Adds a note about
    /// safetensors files in the folder that are not in `names`.
    pub(super) fn check<'a>(&'a self, names: &[&'a str], notes: &mut Vec<String>) -> (Vec<&'a str>, Vec<Missing>) {
        let (mut kept, mut missing) = (Vec::new(), Vec::new());
        for name in names {
            match Missing::check(&self.path_of(name), name) {
                None => kept.push(*name),
                Some(lacking) => missing.push(lacking),
            }
        }
        let parts: Vec<PartName<'_>> = names.iter().filter_map(|name| PartName::parse(name)).collect();
        for (at, part) in parts.iter().enumerate() {
            if parts.iter().take(at).any(|other| other.is_same_model(part)) {
                continue;
            }
            let present: HashSet<u32> =
                parts.iter().filter(|other| other.is_same_model(part)).map(|other| other.number).collect();
            // Some writers number the files from 0.
            let numbers = if present.contains(&0) { 0..=part.count - 1 } else { 1..=part.count };
            let absent = numbers.filter(|number| !present.contains(number));
            // The list is bounded, because the count in a name may be wrong.
            let absent = absent.take(MISSING_LISTED).map(|number| part.with_number(number));
            missing.extend(absent.filter_map(|name| Missing::check(&self.path.join(&name), &name)));
        }
        let others: Vec<_> = self.names_matching(is_safetensors_name).into_iter().filter(|name| !names.contains(name)).collect();
        if !others.is_empty() {
            notes.push(format!("not loaded, because the folder has {MODEL:?}: {}", quoted(others.into_iter())));
        }
        (kept, missing)
    }

    /// Returns the error for a folder without a model. Its message suggests where a model may be.
    pub(super) fn no_model(&self, format: Format) -> Error {
        let looked_for = match format {
            Format::Safetensors => "no *.safetensors or *.safetensors.index.json",
            Format::Gguf => "no *.gguf",
            _ => "no *.safetensors, *.safetensors.index.json or *.gguf",
        };
        let elsewhere = self.suggest().map(|elsewhere| format!("; {elsewhere}")).unwrap_or_default();
        let reason = format!("a directory without a model: {looked_for} in it{elsewhere}");
        Error::NoModel { path: self.path.clone(), reason }
    }

    fn suggest(&self) -> Option<String> {
        if let Some(snapshot) = self.main_snapshot() {
            return Some(format!("it is a model cache: load {snapshot:?} inside it"));
        }
        let folders = folders_with_models(&self.path);
        if !folders.is_empty() {
            return Some(format!("there are models in {}", quoted(folders.iter().map(String::as_str))));
        }
        let unfinished = self.names_matching(is_unfinished);
        if !unfinished.is_empty() {
            return Some(format!("unfinished downloads: {}", quoted(unfinished.into_iter())));
        }
        let like_models: Vec<_> = self.names.iter().take(SNIFFED).filter(|name| self.is_like_a_model(name)).collect();
        if !like_models.is_empty() {
            return Some(format!(
                "load one of the files that look like models: {}",
                quoted(like_models.into_iter().map(String::as_str))
            ));
        }
        let pickles = self.names_matching(is_pickle_name);
        if !pickles.is_empty() {
            let names = quoted(pickles.into_iter());
            return Some(format!("only pickled weights, which are not supported: {names}; convert them to safetensors"));
        }
        let others =
            self.names_matching(|name| has_extension(name, "onnx") || name.contains(".gguf") || name.contains("-split-"));
        (!others.is_empty()).then(|| format!("not supported: {}", quoted(others.into_iter())))
    }

    /// If the folder is a model hub's cache, returns the snapshot that `refs/main` names, or else
    /// the first snapshot by name.
    fn main_snapshot(&self) -> Option<String> {
        let revision = fs::read_to_string(self.path.join("refs/main")).ok().map(|text| text.trim().to_owned());
        let revisions = fs::read_dir(self.path.join("snapshots")).ok()?;
        let mut names: Vec<_> = revisions.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        let found = names.iter().find(|name| Some(*name) == revision.as_ref()).or_else(|| names.first())?;
        Some(format!("snapshots/{found}"))
    }

    /// Whether a file's first bytes are those of a model.
    fn is_like_a_model(&self, name: &str) -> bool {
        let Ok(file) = OpenFile::open(&self.path_of(name)) else { return false };
        let mut start = [0; 9];
        if file.identity.bytes < start.len() as u64 || file.read_exact(&mut start, 0).is_err() {
            return false;
        }
        gguf::is_gguf(&start) || matches!(sniff(&start, file.identity.bytes, false), Sniff::Safetensors { .. })
    }
}

/// Maximum number of files to open in a folder without a model to see whether they look like
/// models. The result only improves an error message, so finding it must not take long.
const SNIFFED: usize = 64;
/// Maximum number of missing files to list for one numbered sequence.
const MISSING_LISTED: usize = 10_000;
/// Maximum depth to which subfolders are searched for models. Like the number of subfolders, it is
/// limited because the search only improves an error message and must not take long.
const DEPTH: usize = 5;
/// Maximum number of subfolders that are searched for models.
const FOLDERS: usize = 256;

/// Whether an index has no variant in its name, and all other indices are variants of it. For
/// example, `a.safetensors.index.json` is the plain index of `a.safetensors.index.fp16.json`,
/// `a.fp16.safetensors.index.json` and `a.safetensors.fp16.index.json`.
fn is_plain_index_of(name: &str, all: &[&str]) -> bool {
    let Some(stem) = name.strip_suffix(index::SUFFIX) else { return false };
    all.iter().all(|other| other.strip_prefix(stem).is_some_and(|rest| rest.starts_with('.')))
}

/// The folders below this one that contain models, nearest first.
fn folders_with_models(path: &Path) -> Vec<String> {
    let (mut found, mut looked_at) = (Vec::new(), 0);
    let mut level = vec![(path.to_owned(), String::new())];
    for _ in 0..DEPTH {
        let mut next = Vec::new();
        for (path, shown) in level {
            let mut entries: Vec<_> = fs::read_dir(&path).into_iter().flatten().filter_map(io::Result::ok).collect();
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                let Ok(name) = entry.file_name().into_string() else { continue };
                // Links are not followed, because they may lead back up.
                let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if is_folder && !name.starts_with('.') && looked_at < FOLDERS {
                    looked_at += 1;
                    next.push((entry.path(), format!("{shown}{name}/")));
                } else if !shown.is_empty()
                    && (is_safetensors_name(&name) || has_extension(&name, "gguf"))
                    && found.last() != Some(&shown)
                {
                    found.push(shown.clone());
                }
            }
        }
        level = next;
    }
    found
}
