//! The functions behind `dmaload.safe_open`. They read headers, and single tensors from files
//! whose headers are already known.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

use dmaload::heap::HeapChoice;
use dmaload::model::DType;
use dmaload::{Format, ImageFile, Load, LoadOptions, Source, inspect_model};
use pyo3::prelude::*;

use crate::errors::{Failure, Raised, guarded};
use crate::loading::{Answer, Loading, Outcome};
use crate::memory::{Copied, Memory};
use crate::process::{Process, detached};
use crate::tensor::{Part, Tensor};

/// Starts to read the headers of a model's files.
#[pyfunction]
pub(crate) fn read_header(py: Python<'_>, path: PathBuf, format: Option<String>) -> PyResult<Loading> {
    guarded(py, || {
        let format = format.map_or(Ok(Format::Auto), |name| name.parse()).map_err(Failure::config)?;
        Ok::<_, Raised>(Loading::of(Box::pin(headers(path, format))))
    })
}

async fn headers(path: PathBuf, format: Format) -> Answer {
    Ok(Outcome::Headers(inspect_model(path, format).await?))
}

/// A tensor's name, type, shape, and start and end in the file, according to the file's header.
type Described = (String, String, Vec<usize>, u64, u64);

fn dtype(name: &str) -> Result<DType, Failure> {
    name.parse().map_err(|error: dmaload::model::ParseDTypeError| Failure::config(error.to_string()))
}

/// Duplicates the descriptor of a file that Python has opened.
fn duplicate(fd: i32) -> Result<OwnedFd, Failure> {
    let failed = |errno: i32, reason: String| {
        Failure::new("IoError", format!("cannot duplicate the descriptor of the file: {reason}")).about(errno, "")
    };
    if fd < 0 {
        let errno = rustix::io::Errno::BADF;
        return Err(failed(errno.raw_os_error(), errno.to_string()));
    }
    borrowed(fd).try_clone_to_owned().map_err(|error| failed(error.raw_os_error().unwrap_or(0), error.to_string()))
}

#[allow(unsafe_code)]
fn borrowed<'a>(fd: i32) -> BorrowedFd<'a> {
    // SAFETY: `fd` is not -1, because `duplicate` refuses negative numbers, and the package keeps
    // the file open during the call. If the number is not an open file, the system call that uses
    // it fails.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Reads a small tensor from an open file, through the page cache, into newly allocated memory.
/// For such a tensor, a load would take longer, and would create a mapping.
#[pyfunction]
pub(crate) fn read_small(py: Python<'_>, fd: i32, described: Described) -> PyResult<Tensor> {
    guarded(py, || {
        let (name, dtype_name, shape, start, end) = described;
        let dtype = dtype(&dtype_name)?;
        let bytes = usize::try_from(end.saturating_sub(start)).map_err(|error| Failure::config(error.to_string()))?;
        let file = File::from(duplicate(fd)?);
        let memory = detached(py, || Copied::filled(bytes, |buffer| read_exactly(&file, buffer, start, &name)))?;
        Ok(Tensor::of_memory(name, dtype, shape, Memory::Copied(memory)))
    })
}

fn read_exactly(file: &File, buffer: &mut [u8], start: u64, name: &str) -> Result<(), Failure> {
    use std::os::unix::fs::FileExt;
    file.read_exact_at(buffer, start).map_err(|error| match error.raw_os_error() {
        Some(errno) => {
            let message = format!("cannot read tensor {name:?} (bytes: {}) at offset {start}: {error}", buffer.len());
            Failure::new("IoError", message).about(errno, "")
        }
        None => Failure::new("ChangedError", format!("cannot read tensor {name:?}: the file ends before the tensor's last byte")),
    })
}

/// Starts to load a tensor from an open file.
#[pyfunction]
pub(crate) fn start_read(py: Python<'_>, fd: i32, described: Described) -> PyResult<Loading> {
    guarded(py, || {
        let (name, dtype_name, shape, start, end) = described;
        let dtype = dtype(&dtype_name)?;
        let file = duplicate(fd)?;
        let options = LoadOptions::new().format(Format::Raw).range(start..end);
        let load = detached(py, || {
            let loader = Process::current().loader(&HeapChoice::Anon)?;
            Ok::<_, Failure>(loader.load(Source::file(file)).options(options).start())
        })?;
        let part = move |file| Part { name, dtype, shape, file, range: start..end };
        Ok::<_, Raised>(Loading::of(Box::pin(part_of(load, part))))
    })
}

async fn part_of(load: Load, part: impl FnOnce(ImageFile) -> Part) -> Answer {
    let image = load.await?;
    let file = image.files().first().expect("the image of one file should contain that file").clone();
    Ok(Outcome::Part(part(file)))
}
