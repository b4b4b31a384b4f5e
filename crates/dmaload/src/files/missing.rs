//! Finds files that are missing from a model, and explains why they are missing.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::names::{NAMED, is_safetensors_name, quoted};
use crate::model::index::Index;

/// A file that belongs to a model and can't be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Missing {
    name: String,
    why: Option<String>,
}

/// Suffixes of unfinished downloads.
const UNFINISHED: [&str; 8] = [".incomplete", ".part", ".partial", "-partial", ".tmp", ".download", ".crdownload", ".aria2"];

pub(super) fn is_unfinished(name: &str) -> bool {
    UNFINISHED.iter().any(|end| name.len() > end.len() && name.ends_with(end))
}

impl Missing {
    /// Checks whether a file exists and is not empty; returns `None` if so. Other problems are
    /// reported when the file is opened.
    pub(super) fn check(path: &Path, name: &str) -> Option<Missing> {
        let why = match fs::metadata(path) {
            Ok(about) if about.is_file() && about.len() == 0 => Some("it has 0 bytes".to_owned()),
            Ok(_) => return None,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                describe_dangling_link(path).or_else(|| find_unfinished(path))
            }
            Err(_) => return None,
        };
        Some(Missing { name: name.to_owned(), why })
    }
}

/// Describes the target of a dangling symbolic link; `None` if `path` is not a link.
fn describe_dangling_link(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    let at = path.parent().unwrap_or(Path::new("")).join(&target);
    let why = find_unfinished(&at).map(|why| format!(", where {why}")).unwrap_or_default();
    Some(format!("a link to {:?}, which does not exist{why}", target.to_string_lossy()))
}

/// Describes an unfinished download of this file, if one exists.
fn find_unfinished(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let found = UNFINISHED.iter().map(|end| format!("{name}{end}")).find(|other| path.with_file_name(other).exists());
    let found = found.or_else(|| find_in_download_cache(path, name))?;
    Some(format!("{found:?} is an unfinished download"))
}

/// Finds an unfinished download of this file in the folder where a model hub's client keeps
/// downloads until they are complete.
fn find_in_download_cache(path: &Path, name: &str) -> Option<String> {
    let cache = path.parent()?.join(".cache/huggingface/download");
    let mut names = fs::read_dir(cache).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.find(|other| other.starts_with(name) && other.ends_with(".incomplete"))
}

/// Lists missing files in the form `1 is missing: "a" (it has 0 bytes)`.
pub(super) fn describe(missing: &[Missing]) -> String {
    let one = |Missing { name, why }: &Missing| match why {
        Some(why) => format!("{name:?} ({why})"),
        None => format!("{name:?}"),
    };
    let shown = missing.iter().take(NAMED).map(one).collect::<Vec<_>>().join(", ");
    let more = missing.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{} missing: {shown}{more}", if missing.len() == 1 { "1 is".to_owned() } else { format!("{} are", missing.len()) })
}

/// The names of a folder's safetensors files that are not in an index.
fn unlisted_files(folder: &Path, index: &Index) -> Vec<String> {
    let named: HashSet<&str> = index.files().collect();
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let entries = fs::read_dir(folder).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<_> =
        names.filter(|name| is_safetensors_name(name) && !name.starts_with('.') && !named.contains(name.as_str())).collect();
    names.sort();
    names
}

/// Explains why files that an index lists may be missing: the index may be left over from another
/// version of the model, or a download may be running.
pub(super) fn explain_missing(folder: &Path, index: &Index, all: bool) -> String {
    let others = unlisted_files(folder, index);
    if !others.is_empty() {
        let names = quoted(others.iter().map(String::as_str));
        return format!(
            "; the index may be left over from another version: it does not list {names}, which can be loaded by path"
        );
    }
    let blobs: PathBuf = folder.join("../../blobs");
    let names = fs::read_dir(blobs).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    match names.filter(|name| is_unfinished(name)).count() {
        0 if all => "; the index may be left over from another version".to_owned(),
        0 => String::new(),
        count => format!("; {count} unfinished download{} in the cache's blobs folder", if count == 1 { " is" } else { "s are" }),
    }
}

/// A note about a folder's safetensors files that are not in its index; `None` if there are none.
pub(super) fn note_unlisted(folder: &Path, index: &Index) -> Option<String> {
    let others = unlisted_files(folder, index);
    (!others.is_empty())
        .then(|| format!("not loaded, because the index does not list them: {}", quoted(others.iter().map(String::as_str))))
}
