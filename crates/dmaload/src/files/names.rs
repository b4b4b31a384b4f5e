//! Classifies file names, and formats lists of names for errors and notes.

use std::path::Path;

pub(super) fn is_safetensors_name(name: &str) -> bool {
    has_extension(name, "safetensors")
}

pub(super) fn has_extension(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|own| own.eq_ignore_ascii_case(extension))
}

/// Whether a file name has an extension that is used for pickled weights.
pub(super) fn is_pickle_name(name: &str) -> bool {
    let extension = Path::new(name).extension();
    let is = |end: &str| extension.is_some_and(|own| own.eq_ignore_ascii_case(end));
    ["bin", "pt", "pth", "ckpt", "pkl"].into_iter().any(is)
}

/// Maximum number of names in a message.
pub(super) const NAMED: usize = 8;

/// Quotes names for a message. Lists at most [`NAMED`] of them, and counts the others.
pub(super) fn quoted<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut names = names.map(|name| format!("{name:?}"));
    let shown = names.by_ref().take(NAMED).collect::<Vec<_>>().join(", ");
    match names.count() {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}
