//! From what was asked for to files: folders and indices of models, GGUF files that were split.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;

use super::open::or_foreign;
use crate::error::{Error, Result};
use crate::model::index::{self, Index};
use crate::model::{LOOKED_AT_BYTES, ModelError};
use crate::settings::Format;
use crate::source::{Input, OpenFile, Source};

/// What a model of one file is called in a folder that model hubs have made.
const MODEL: &str = "model.safetensors";

/// The files of all paths, in the order in which they are loaded.
///
/// # Errors
/// [`Error::File`] and [`Error::Model`] for an index that can't be read; [`Error::NoModel`].
pub(crate) fn files(asked: &[Input], format: Format) -> Result<Vec<Source>> {
    let mut files = Vec::new();
    for input in asked {
        let path = match input {
            Input::Path(path) => path,
            Input::Open { file, part } => {
                files.push(Source::open(file, part.clone()));
                continue;
            }
        };
        // What can't be looked at is told by whoever opens it.
        if fs::metadata(path).is_ok_and(|about| about.is_dir()) && format != Format::Raw {
            of_folder(path, format, &mut files)?;
        } else if is_named(path, index::SUFFIX) && matches!(format, Format::Auto | Format::Safetensors) {
            of_index(path, &mut files)?;
        } else if let Some(parts) = split_parts(path).filter(|_| asked.len() == 1 && format != Format::Raw) {
            files.extend(parts.into_iter().map(Source::file));
        } else {
            files.push(Source::file(path.clone()));
        }
    }
    Ok(files)
}

fn is_named(path: &Path, end: &str) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().ends_with(end.as_bytes()))
}

/// The model in a folder: by its index, by the usual name, or all files of a format.
fn of_folder(folder: &Path, format: Format, files: &mut Vec<Source>) -> Result<()> {
    let failed = |error: io::Error| file_error(folder, "list", &error);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        // What begins with a dot is hidden on purpose, or left behind by other systems.
        if !path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
            names.push(path);
        }
    }
    names.sort();
    let of = |end: &str| names.iter().filter(|path| is_named(path, end)).cloned().collect::<Vec<_>>();
    let no_model = |reason: String| Error::NoModel { path: folder.to_owned(), reason };
    if format != Format::Gguf {
        match of(index::SUFFIX).as_slice() {
            [] => {}
            [only] => return of_index(only, files),
            several => return Err(no_model(format!("has {} models, each with an index: name one of these", several.len()))),
        }
        let found = of(".safetensors");
        let usual = found.iter().find(|path| is_named(path, MODEL) && path.file_name().is_some_and(|name| name == MODEL));
        if let Some(usual) = usual {
            files.push(Source::file(usual.clone()));
            return Ok(());
        }
        if !found.is_empty() {
            files.extend(found.into_iter().map(Source::file));
            return Ok(());
        }
    }
    if format != Format::Safetensors {
        let found = of(".gguf");
        if let Some(first) = found.first() {
            let parts = split_parts(first).unwrap_or_else(|| vec![first.clone()]);
            if !found.iter().all(|path| parts.contains(path)) {
                return Err(no_model(format!("has {} GGUF files that are no parts of one model: name one of them", found.len())));
            }
            files.extend(parts.into_iter().map(Source::file));
            return Ok(());
        }
    }
    Err(no_model("is a directory without a model: no *.safetensors.index.json, *.safetensors or *.gguf in it".to_owned()))
}

fn of_index(path: &Path, files: &mut Vec<Source>) -> Result<()> {
    // Not a FIFO that nobody writes to, and not without end.
    let file = OpenFile::open(path)?;
    let bytes = file.identity.bytes;
    if bytes > index::LIMIT_BYTES {
        let reason = format!("it has {bytes} bytes, more than the {} allowed", index::LIMIT_BYTES);
        return Err(Error::Model { path: path.to_owned(), fault: ModelError::Index { offset: 0, reason } });
    }
    let mut json = vec![0; usize::try_from(bytes).unwrap_or(0)];
    file.read_exact(&mut json, 0)?;
    let index = Index::parse(&json).map_err(|fault| {
        let fault = or_foreign(fault, json.get(..LOOKED_AT_BYTES).unwrap_or(&json), bytes);
        file.blame_change(&file.identity, Error::Model { path: path.to_owned(), fault })
    });
    let index = Arc::new(index?);
    let folder = path.parent().unwrap_or(Path::new(""));
    let of_shard = |name: &str| Source::of_index(folder.join(name), Arc::clone(&index), name.to_owned());
    files.extend(index.files().map(of_shard));
    if index.files().next().is_none() {
        return Err(Error::NoModel { path: path.to_owned(), reason: "names no files".to_owned() });
    }
    Ok(())
}

/// All parts of a GGUF model that was split, if this is one of them: `NAME-00001-of-00003.gguf`.
fn split_parts(path: &Path) -> Option<Vec<PathBuf>> {
    let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (rest, count) = name.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let parsed = |digits: &str| digits.parse::<u32>().ok().filter(|_| digits.len() == 5);
    let (number, count) = (parsed(number)?, parsed(count)?);
    (1..=count)
        .contains(&number)
        .then(|| (1..=count).map(|number| path.with_file_name(format!("{name}-{number:05}-of-{count:05}.gguf"))).collect())
}

fn file_error(path: &Path, operation: &'static str, error: &io::Error) -> Error {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    Error::File { path: path.to_owned(), operation, errno }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(
                folder.path().join(name),
                if name.ends_with(".json") { r#"{"weight_map":{"a":"b.safetensors"}}"# } else { "" },
            )
            .unwrap();
        }
        folder
    }

    fn found(names: &[&str], format: Format) -> Result<Vec<String>> {
        let folder = folder(names);
        let files = files(&[Input::Path(folder.path().to_owned())], format)?;
        let name = |source: &Source| source.path.strip_prefix(folder.path()).unwrap().to_str().unwrap().to_owned();
        Ok(files.iter().map(name).collect())
    }

    #[test]
    fn a_folder_is_the_model_in_it() {
        let of = |names: &[&str]| found(names, Format::Auto).unwrap();
        assert_eq!(of(&["model.safetensors.index.json", "a.safetensors", "x.gguf"]), ["b.safetensors"]);
        assert_eq!(of(&["model.safetensors", "adapter.safetensors"]), ["model.safetensors"]);
        assert_eq!(of(&["b.safetensors", "a.safetensors", "._a.safetensors", "c.txt"]), ["a.safetensors", "b.safetensors"]);
        assert_eq!(of(&["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"]), ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]);
        assert_eq!(found(&["model.safetensors", "x.gguf"], Format::Gguf).unwrap(), ["x.gguf"]);
    }

    #[test]
    fn a_folder_without_a_model_or_with_several_says_so() {
        let says = |names: &[&str]| found(names, Format::Auto).unwrap_err().to_string();
        assert!(says(&["a.bin"]).contains("without a model"));
        assert!(says(&["a.gguf", "b.gguf"]).contains("2 GGUF files"));
        assert!(says(&["a.safetensors.index.json", "b.safetensors.index.json"]).contains("2 models"));
        // As raw bytes a folder is none: whoever opens it says that.
        assert_eq!(found(&["a.bin"], Format::Raw).unwrap(), [""]);
    }

    #[test]
    fn a_part_of_a_split_model_is_all_of_it_unless_several_were_named() {
        let path = |name: &str| PathBuf::from("/m").join(name);
        let names = |asked: &[&str]| {
            files(&asked.iter().map(|name| Input::Path(path(name))).collect::<Vec<_>>(), Format::Auto).unwrap().len()
        };
        assert_eq!(names(&["a-00002-of-00003.gguf"]), 3);
        assert_eq!(names(&["a-00002-of-00003.gguf", "a-00001-of-00003.gguf"]), 2);
        for other in ["a-2-of-3.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "-of-.gguf", "a.gguf"] {
            assert_eq!(names(&[other]), 1, "{other}");
        }
    }
}
