//! What to load: files given by their paths, or an open file.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::files::source::Input;

/// What to load: a path, several paths, or an open file.
///
/// A path names a file, a folder that contains a model, the index of a multi-file model, or one
/// part of a split GGUF model. Naming one part loads all parts (see
/// [`LoadOptions::as_one_file`](crate::LoadOptions::as_one_file)). Several paths form one load,
/// with the files in the given order.
///
/// Paths, lists of paths, and open files convert into a `Source`:
///
/// ```no_run
/// use dmaload::Source;
///
/// # async fn example(loader: dmaload::Loader) -> Result<(), Box<dyn std::error::Error>> {
/// loader.load("model.safetensors").await?;
/// loader.load(["a.safetensors", "b.safetensors"]).await?;
/// loader.load(std::fs::File::open("model.gguf")?).await?;
/// loader.load(Source::paths(std::env::args_os().skip(1))).await?;
/// // Loads the model from this byte range of an application's package.
/// loader.load(Source::from("app.pkg").range(4096..1 << 30)).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Source {
    inputs: Vec<Input>,
    range: Option<Range<u64>>,
}

impl Source {
    /// Loads the files at several paths as one load. If there are no paths, the load fails with
    /// [`Error::Config`].
    pub fn paths<P: Into<PathBuf>>(paths: impl IntoIterator<Item = P>) -> Self {
        let inputs = paths.into_iter().map(|path| Input::Path(path.into())).collect();
        Source { inputs, range: None }
    }

    /// Loads a file that is already open.
    ///
    /// The file is opened again by its descriptor, because direct reads need their own open file
    /// description. That requires procfs and permission to read the file. Reports and errors name
    /// the descriptor's path.
    pub fn file(file: impl Into<OwnedFd>) -> Self {
        Source { inputs: vec![Input::Open { file: Arc::new(file.into()), part: None }], range: None }
    }

    /// Selects the byte range of the file that contains the model, for weights that are stored
    /// uncompressed in an application's package or another container.
    ///
    /// The range need not begin or end at a block boundary: its first and last block are read in
    /// full. A load of a range can't be verified, and can't have an observer. The load fails with
    /// [`Error::Config`] if the source is not exactly one path or file, and with
    /// [`Error::Selection`] if the range reaches past the end of the file.
    #[must_use]
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Converts the source to inputs for the engine.
    ///
    /// # Errors
    /// [`Error::Config`] if there are no files, or if there is a range but more than one file.
    pub(crate) fn into_inputs(self) -> Result<Vec<Input>> {
        let Source { mut inputs, range } = self;
        if inputs.is_empty() {
            return Err(Error::Config("no file was given, so there is nothing to load".to_owned()));
        }
        let Some(range) = range else { return Ok(inputs) };
        let files = inputs.len();
        let input = inputs.pop().filter(|_| files == 1);
        let input = input.ok_or_else(|| Error::Config(format!("a range needs exactly one file, but {files} were given")))?;
        Ok(vec![match input {
            Input::Path(path) | Input::Inside { path, .. } => Input::Inside { path, part: range },
            Input::Open { file, .. } => Input::Open { file, part: Some(range) },
        }])
    }
}

macro_rules! from_path {
    ($($path:ty),*) => {
        $(impl From<$path> for Source {
            fn from(path: $path) -> Self {
                Source::paths([path])
            }
        })*
    };
}

from_path!(&str, String, &String, &OsStr, OsString, &OsString, &Path, PathBuf, &PathBuf);

impl<P: Into<PathBuf>> From<Vec<P>> for Source {
    fn from(paths: Vec<P>) -> Self {
        Source::paths(paths)
    }
}

impl<P: Into<PathBuf>, const N: usize> From<[P; N]> for Source {
    fn from(paths: [P; N]) -> Self {
        Source::paths(paths)
    }
}

impl<P: AsRef<Path>> From<&[P]> for Source {
    fn from(paths: &[P]) -> Self {
        Source::paths(paths.iter().map(AsRef::as_ref))
    }
}

impl<P: AsRef<Path>> From<&Vec<P>> for Source {
    fn from(paths: &Vec<P>) -> Self {
        Source::from(paths.as_slice())
    }
}

impl<P: AsRef<Path>, const N: usize> From<&[P; N]> for Source {
    fn from(paths: &[P; N]) -> Self {
        Source::from(paths.as_slice())
    }
}

impl From<File> for Source {
    fn from(file: File) -> Self {
        Source::file(file)
    }
}

impl From<OwnedFd> for Source {
    fn from(file: OwnedFd) -> Self {
        Source::file(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_files_and_lists_convert_to_a_source() {
        let paths = |source: Source| -> Vec<PathBuf> {
            let path = |input| match input {
                Input::Path(path) => path,
                other => panic!("{other:?} is not a path"),
            };
            source.into_inputs().unwrap().into_iter().map(path).collect()
        };
        let owned = "a".to_owned();
        let path = PathBuf::from("a");
        let sources: [Source; 6] =
            ["a".into(), (&owned).into(), owned.clone().into(), path.as_path().into(), (&path).into(), path.clone().into()];
        for source in sources {
            assert_eq!(paths(source), [Path::new("a")]);
        }
        let two = [Path::new("a"), Path::new("b")];
        assert_eq!(paths(["a", "b"].into()), two);
        assert_eq!(paths(vec!["a", "b"].into()), two);
        assert_eq!(paths(two.as_slice().into()), two);
        assert_eq!(paths((&two).into()), two);
        assert_eq!(paths((&two.to_vec()).into()), two);
        assert_eq!(paths(Source::paths(["a", "b"].iter())), two);
    }

    #[test]
    fn range_needs_exactly_one_file() {
        let inside = Source::from("a").range(1..3).into_inputs().unwrap();
        assert!(matches!(&*inside, [Input::Inside { path, part }] if path == Path::new("a") && *part == (1..3)), "{inside:?}");
        let open = Source::from(File::open("/dev/null").unwrap()).range(1..3).into_inputs().unwrap();
        assert!(matches!(&*open, [Input::Open { part: Some(part), .. }] if *part == (1..3)), "{open:?}");
        let refused = Source::from(["a", "b"]).range(1..3).into_inputs().unwrap_err();
        assert_eq!(refused.to_string(), "a range needs exactly one file, but 2 were given");
        for none in [Source::paths::<PathBuf>([]), Source::paths::<PathBuf>([]).range(1..3)] {
            let refused = none.into_inputs().unwrap_err();
            assert_eq!(refused.to_string(), "no file was given, so there is nothing to load");
        }
    }
}
