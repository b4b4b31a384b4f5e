//! The functions behind `dmaload.safe_open`. They read headers, and they read single tensors from
//! files whose headers are already known.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use dmaload::heap::HeapChoice;
use dmaload::model::DType;
use dmaload::{Errno, Error, Format, ImageFile, Load, LoadOptions, Route, Source, inspect_model};
use pyo3::prelude::*;

use crate::errors::{Failure, Raised, guarded};
use crate::loading::{Answer, Loading, Outcome};
use crate::memory::{Copied, Memory};
use crate::process::{Process, detached};
use crate::tensor::{Part, Tensor};

/// Starts reading the headers of a model's files.
#[pyfunction]
pub(crate) fn read_header(py: Python<'_>, path: PathBuf, format: Option<String>) -> PyResult<Loading> {
    guarded(py, || {
        let format = format.map_or(Ok(Format::Auto), |name| name.parse()).map_err(Failure::config)?;
        Ok::<_, Raised>(Loading::from_work(Box::pin(headers(path, format))))
    })
}

async fn headers(path: PathBuf, format: Format) -> Answer {
    Ok(Outcome::Headers(inspect_model(path, format).await?))
}

/// A tensor's name, type and shape, and its start and end offsets in the file, as given by the
/// file's header.
type Described = (String, String, Vec<usize>, u64, u64);

fn dtype(name: &str) -> Result<DType, Failure> {
    name.parse().map_err(|error: dmaload::model::ParseDTypeError| Failure::config(error.to_string()))
}

/// Raises the same error as a load that cannot open a file.
#[pyfunction]
pub(crate) fn raise_open_error(py: Python<'_>, path: PathBuf, errno: i32) -> PyResult<()> {
    guarded(py, || Err(Error::File { path, operation: "open", errno: Errno::from_raw_os_error(errno) }.into()))
}

/// Duplicates the descriptor of a file that Python has opened.
fn duplicate(fd: i32, path: &Path) -> Result<OwnedFd, Failure> {
    let failed = |errno| Error::File { path: path.to_owned(), operation: "duplicate its descriptor", errno };
    if fd < 0 {
        return Err(failed(Errno::EBADF).into());
    }
    let duplicated = borrowed(fd).try_clone_to_owned();
    duplicated.map_err(|error| failed(Errno::from_io_error(&error).unwrap_or(Errno::EIO)).into())
}

#[allow(unsafe_code)]
fn borrowed<'a>(fd: i32) -> BorrowedFd<'a> {
    // SAFETY: `fd` is not -1, because `duplicate` refuses negative numbers, and the package keeps
    // the file open during the call. If `fd` is not open, the system call that uses it fails.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Reads a small tensor from an open file, through the page cache, into newly allocated memory.
/// For such a tensor, a load would take longer, and would create a mapping.
#[pyfunction]
pub(crate) fn read_small(py: Python<'_>, path: PathBuf, fd: i32, described: Described) -> PyResult<Tensor> {
    guarded(py, || {
        let (name, dtype_name, shape, start, end) = described;
        let dtype = dtype(&dtype_name)?;
        let bytes = usize::try_from(end.saturating_sub(start)).map_err(|error| Failure::config(error.to_string()))?;
        let file = File::from(duplicate(fd, &path)?);
        let memory = detached(py, || Copied::filled(bytes, |buffer| read_exactly(&file, &path, buffer, start)))?;
        Ok(Tensor::of_memory(name, dtype, shape, Memory::Copied(memory)))
    })
}

/// Fills the buffer with the bytes at offset `start` of a file. Fails with errors of the library.
/// A file that ends too early has changed.
fn read_exactly(file: &File, path: &Path, buffer: &mut [u8], start: u64) -> Result<(), Failure> {
    use std::os::unix::fs::FileExt;
    let (path, bytes, route) = (path.to_owned(), buffer.len() as u64, Route::Buffered);
    let Err(error) = file.read_exact_at(buffer, start) else { return Ok(()) };
    Err(Failure::from(match Errno::from_io_error(&error) {
        Some(errno) => Error::Read { path, offset: start, bytes, route, errno },
        None => Error::Changed { path, change: "it shrank" },
    }))
}

/// Starts loading a tensor from an open file.
#[pyfunction]
pub(crate) fn start_read(py: Python<'_>, path: PathBuf, fd: i32, described: Described) -> PyResult<Loading> {
    guarded(py, || {
        let (name, dtype_name, shape, start, end) = described;
        let dtype = dtype(&dtype_name)?;
        let file = duplicate(fd, &path)?;
        let options = LoadOptions::new().format(Format::Raw).range(start..end);
        let load = detached(py, || {
            let loader = Process::current().loader(&HeapChoice::Anon)?;
            Ok::<_, Failure>(loader.load(Source::file(file)).options(options).start())
        })?;
        let part = move |file| Part { name, dtype, shape, file, range: start..end };
        Ok::<_, Raised>(Loading::from_work(Box::pin(part_of(load, part))))
    })
}

async fn part_of(load: Load, part: impl FnOnce(ImageFile) -> Part) -> Answer {
    let image = load.await?;
    let file = image.files().first().expect("the image of one file should contain that file").clone();
    Ok(Outcome::Part(part(file)))
}
