//! Errors from failed operations on files. They name the action, the file and the errno, so that a
//! person can act on them.
//!
//! The name of an errno is shown because manuals, kernel sources and search engines use it. The
//! text next to it depends on the C library and its locale.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use dmabuf::{Errno, printable};

/// A failed system call on a file.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {}", printable::path(&path), Named(cause))]
pub struct FileError {
    action: &'static str,
    path: PathBuf,
    // The message includes the cause, so `source()` does not return it: a program that prints the
    // chain of sources would print it twice.
    cause: io::Error,
}

/// Adds the action and the file to the error of a failed call.
pub trait ForPath<T> {
    /// Adds `action` and `path` to an error. `action` completes the sentence "cannot … PATH":
    /// `"open"`, `"write to"`.
    ///
    /// # Errors
    /// Returns the original error, with the action and the file added.
    fn for_path(self, action: &'static str, path: &Path) -> Result<T, FileError>;
}

impl<T, E: Into<io::Error>> ForPath<T> for Result<T, E> {
    fn for_path(self, action: &'static str, path: &Path) -> Result<T, FileError> {
        self.map_err(|cause| FileError { action, path: path.to_owned(), cause: cause.into() })
    }
}

/// Displays an I/O error with the name of its errno: `ENOSPC (No space left on device)`.
#[derive(Debug)]
pub struct Named<'a>(pub &'a io::Error);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Errno::from_io_error(self.0) {
            Some(errno) => f.write_str(&errno.describe()),
            None => self.0.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_open_names_file_and_errno() {
        let path = Path::new("/nonexistent/model.safetensors");
        let error = std::fs::File::open(path).for_path("open", path).unwrap_err();
        assert_eq!(error.to_string(), "cannot open /nonexistent/model.safetensors: ENOENT (No such file or directory)");
    }

    #[test]
    fn error_without_an_errno_keeps_its_text() {
        assert_eq!(Named(&io::Error::other("torn")).to_string(), "torn");
    }

    #[test]
    fn unknown_errno_is_shown_by_its_number() {
        assert!(Named(&io::Error::from_raw_os_error(4095)).to_string().starts_with("errno 4095 ("));
    }
}
