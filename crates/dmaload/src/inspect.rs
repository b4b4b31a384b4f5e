//! Looking at files without loading them: their headers are read, through the page cache, and no
//! data.
//!
//! A file's server may never answer, so the async functions read on a thread, one for each call,
//! which ends with its reading. They need no runtime.

use std::path::{Path, PathBuf};
use std::{io, thread};

use dmabuf::Errno;
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::files::expand::{self, Choice, Found};
use crate::files::header::read_header;
use crate::files::source::{Input, OpenFile};
use crate::files::whole::check_whole;
use crate::model::TensorMap;
use crate::options::choices::Format;
use crate::support::foreign;

/// What a file says about itself, made by [`inspect`] and [`inspect_model`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Inspected {
    /// The path of the file: as it was given, or as it was found in the folder that was given.
    pub path: PathBuf,
    /// The length of the file in bytes.
    pub file_bytes: u64,
    /// Its tensors, with its metadata; `None` for a file of raw bytes. Of a file of a model with
    /// an index, only the tensors that the index maps to this file.
    pub tensors: Option<TensorMap>,
}

/// Reads a file's header, and nothing else of it (from file systems whose lengths may be made up,
/// the last byte, too).
///
/// ```no_run
/// # async fn example() -> dmaload::Result<()> {
/// let inspected = dmaload::inspect("model.safetensors", dmaload::Format::Auto).await?;
/// for tensor in inspected.tensors.iter().flatten() {
///     println!("{} {} {:?}", tensor.name, tensor.dtype, tensor.shape);
/// }
/// # Ok(())
/// # }
/// ```
///
/// The caller's thread is not blocked: the reading is done by a thread of its own, on any runtime
/// or none. Synchronous callers use [`inspect_blocking`].
///
/// # Cancel safety
/// Reading begins when the future is polled first. Dropping the future loses nothing but the
/// result: the thread ends when its reading does. A server that does not answer keeps a thread for
/// each call until it does.
///
/// # Errors
/// When the file can't be opened or read, its header is wrong, or its file system states a length
/// that it has not; when no thread can be started.
pub async fn inspect(path: impl AsRef<Path>, format: Format) -> Result<Inspected> {
    on_thread(path.as_ref(), move |path| inspect_blocking(path, format)).await
}

/// Does the same as [`inspect`], and blocks the caller's thread as long as that takes: for ever
/// where the file's server does not answer.
///
/// # Errors
/// Those of [`inspect`].
pub fn inspect_blocking(path: impl AsRef<Path>, format: Format) -> Result<Inspected> {
    let path = path.as_ref();
    let file = OpenFile::open(path)?;
    let tensors = read_header(&file, 0..file.identity.bytes, format)?;
    file.check_length()?;
    Ok(Inspected { path: path.to_owned(), file_bytes: file.identity.bytes, tensors })
}

/// Reads the headers of all files of a model, and nothing else of them: of a folder, of an index,
/// of a GGUF file with its other parts. A file alone is itself. A tensor that an index maps to one
/// of two files is in that one's map only.
///
/// Blocks no caller, and is cancel-safe, as [`inspect`]; one thread reads all files. Synchronous
/// callers use [`inspect_model_blocking`].
///
/// # Errors
/// When files are missing, two have a tensor of one name and no index decides, a file can't be
/// opened or read, a header is wrong, or the index says something else than the files do; when no
/// thread can be started.
pub async fn inspect_model(path: impl AsRef<Path>, format: Format) -> Result<Vec<Inspected>> {
    on_thread(path.as_ref(), move |path| inspect_model_blocking(path, format)).await
}

/// Does the same as [`inspect_model`], and blocks the caller's thread as long as that takes: for
/// ever where a file's server does not answer.
///
/// # Errors
/// Those of [`inspect_model`].
pub fn inspect_model_blocking(path: impl AsRef<Path>, format: Format) -> Result<Vec<Inspected>> {
    let choice = Choice { format, allow_missing: false, as_one_file: false, selector: None };
    let Found { sources, .. } = expand::files(&[Input::Path(path.as_ref().to_owned())], choice)?;
    let mut files = Vec::new();
    for source in &sources {
        let inspected = inspect_blocking(&*source.path, format)?;
        source.check(inspected.tensors.as_ref())?;
        files.push(inspected);
    }
    let known: Vec<_> = sources.iter().zip(files.iter().map(|inspected| inspected.tensors.as_ref())).collect();
    check_whole(&known, false)?;
    for (source, inspected) in sources.iter().zip(&mut files) {
        inspected.tensors = inspected.tensors.take().map(|map| map.only(|name| source.owns(name)));
    }
    Ok(files)
}

/// The longest name that the kernel keeps of a thread.
const THREAD: &str = "dmaload-inspect";

/// Reads on a thread of its own, and waits for that without blocking.
async fn on_thread<T: Send + 'static>(path: &Path, read: impl FnOnce(&Path) -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, receiver) = oneshot::channel();
    let own = path.to_owned();
    let panicked = |message: String| Error::Panicked { code: format!("the thread {THREAD}"), message };
    let body = move || {
        let result = foreign::call(|| read(&own)).unwrap_or_else(|message| Err(panicked(message)));
        // Wakes the caller's task. When the caller has gone, so has its need of the result.
        foreign::emit(|| drop(sender.send(result)));
    };
    let no_thread = |error: io::Error| Error::File {
        path: path.to_owned(),
        operation: "start a thread that reads its header",
        errno: Errno::from_io_error(&error).unwrap_or(Errno::EAGAIN),
    };
    thread::Builder::new().name(THREAD.to_owned()).spawn(body).map_err(no_thread)?;
    receiver.await.unwrap_or_else(|_| Err(panicked("it ended without a result".to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn panic_of_the_reading_thread_is_an_error() {
        let mut future = pin!(on_thread(Path::new("a"), |_| -> Result<()> { panic!("here") }));
        let mut context = Context::from_waker(Waker::noop());
        let error = loop {
            match future.as_mut().poll(&mut context) {
                Poll::Ready(result) => break result.unwrap_err(),
                Poll::Pending => thread::yield_now(),
            }
        };
        assert_eq!(error.to_string(), "the thread dmaload-inspect panicked: here");
    }
}
