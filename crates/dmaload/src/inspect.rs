//! Inspects files without loading them. Little more than their headers is read, through the page
//! cache.
//!
//! A file's server may never answer, so each call to one of the async functions here starts a
//! thread for its reads. The thread exits when the reads are done. No async runtime is needed.

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
use crate::options::load::LoadOptions;
use crate::plan::select::Selector;
use crate::support::foreign;

/// A file's header and length. Returned by [`inspect`], [`inspect_model`] and
/// [`inspect_load_blocking`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Inspected {
    /// The file's path, as given or as found in the given folder.
    pub path: PathBuf,
    /// The length of the file in bytes.
    pub file_bytes: u64,
    /// The file's tensors and metadata; `None` for a file of raw bytes. [`inspect_model`] and
    /// [`inspect_load_blocking`] omit tensors that the model's index maps to another file.
    pub tensors: Option<TensorMap>,
}

/// Reads only a file's header and, on file systems that may report a wrong length, the bytes that
/// show where the file ends.
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
/// Does not block the caller's thread: a new thread does the reading, on any runtime or none.
/// Synchronous callers use [`inspect_blocking`].
///
/// # Cancel safety
/// Reading begins when the future is first polled. Dropping the future only discards the result;
/// the thread exits when its read completes. Each call occupies one thread for as long as the
/// file's server does not answer.
///
/// # Errors
/// Fails if the file can't be opened or read, its header is invalid, its file system reports a
/// wrong length, or no thread can be started.
pub async fn inspect(path: impl AsRef<Path>, format: Format) -> Result<Inspected> {
    on_thread(path.as_ref(), move |path| inspect_blocking(path, format)).await
}

/// Blocking version of [`inspect`]. Blocks the caller's thread for as long as the read takes:
/// forever if the file's server never answers.
///
/// # Errors
/// The same as for [`inspect`].
pub fn inspect_blocking(path: impl AsRef<Path>, format: Format) -> Result<Inspected> {
    let path = path.as_ref();
    let file = OpenFile::open(path)?;
    let tensors = read_header(&file, 0..file.identity.bytes, format)?;
    file.check_length()?;
    Ok(Inspected { path: path.to_owned(), file_bytes: file.identity.bytes, tensors })
}

/// Inspects all files of a model as [`inspect`] does: the files in a folder, the files that an
/// index lists, or all parts of a split GGUF model. Any other file is a model by itself. A tensor
/// that exists in two files is listed only for the file that the index maps it to.
///
/// Like [`inspect`], does not block the caller and is cancel-safe. One thread reads all files.
/// Synchronous callers use [`inspect_model_blocking`].
///
/// # Errors
/// The same as for [`inspect`], for each file. Also fails if there is no model at the path, if
/// files are missing, if two files contain a tensor with the same name and no index decides
/// between them, or if the files contradict the index or each other.
pub async fn inspect_model(path: impl AsRef<Path>, format: Format) -> Result<Vec<Inspected>> {
    on_thread(path.as_ref(), move |path| inspect_model_blocking(path, format)).await
}

/// Blocking version of [`inspect_model`]. Blocks the caller's thread for as long as the reads
/// take: forever if a file's server never answers.
///
/// # Errors
/// The same as for [`inspect_model`].
pub fn inspect_model_blocking(path: impl AsRef<Path>, format: Format) -> Result<Vec<Inspected>> {
    let choice = Choice { format, allow_missing: false, as_one_file: false, selector: None };
    inspect_all(&[Input::Path(path.as_ref().to_owned())], choice)
}

/// Inspects the files that a load of these paths with these options would read. Adapters use this
/// function to find out which tensors a model has before its load delivers them.
///
/// Paths have the same meaning as for [`Loader::load`](crate::Loader::load). The following options
/// matter: [`LoadOptions::format`], [`LoadOptions::allow_missing`], [`LoadOptions::as_one_file`],
/// and [`LoadOptions::tensors`] or [`LoadOptions::tensor_names`], which limit the list to the
/// selected tensors. [`LoadOptions::range`] and [`LoadOptions::shard`] are checked for validity,
/// but whole tensors are listed. Files from different paths may contain tensors with the same
/// name.
///
/// Blocks the caller's thread until the reads complete, which is forever if a file's server never
/// answers.
///
/// ```no_run
/// # fn example(loader: &dmaload::Loader) -> dmaload::Result<()> {
/// let options = loader.load_options().allow_missing(true);
/// let files = dmaload::inspect_load_blocking(["model-folder"], &options)?;
/// let load = loader.load("model-folder").options(options).start();
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// The same as for [`inspect_model`], and [`Error::Config`] if the selection is invalid. A pattern
/// that matches no tensor is not an error here, unlike in a load.
pub fn inspect_load_blocking<P: Into<PathBuf>>(
    paths: impl IntoIterator<Item = P>,
    options: &LoadOptions,
) -> Result<Vec<Inspected>> {
    let inputs: Vec<_> = paths.into_iter().map(|path| Input::Path(path.into())).collect();
    let selector = options.select.is_partial().then(|| Selector::new(&options.select)).transpose()?;
    inspect_all(&inputs, Choice::new(options, selector.as_ref()))
}

fn inspect_all(inputs: &[Input], choice: Choice<'_>) -> Result<Vec<Inspected>> {
    let Found { sources, .. } = expand::find_files(inputs, choice)?;
    let mut files = Vec::new();
    for source in &sources {
        let inspected = inspect_blocking(&*source.path, choice.format)?;
        source.check(inspected.tensors.as_ref())?;
        files.push(inspected);
    }
    if !choice.as_one_file {
        let known: Vec<_> = sources.iter().zip(files.iter().map(|inspected| inspected.tensors.as_ref())).collect();
        check_whole(&known, choice.allow_missing)?;
    }
    for (source, inspected) in sources.iter().zip(&mut files) {
        let is_listed = |name: &str| source.owns(name) && choice.selector.is_none_or(|selector| selector.selects(name));
        inspected.tensors = inspected.tensors.take().map(|map| map.retain(is_listed));
    }
    Ok(files)
}

/// The name of the threads that read. It is 15 bytes long, the maximum length of a thread's name
/// on Linux.
const THREAD: &str = "dmaload-inspect";

/// Runs `read` on a new thread and waits for the result without blocking.
async fn on_thread<T: Send + 'static>(path: &Path, read: impl FnOnce(&Path) -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, receiver) = oneshot::channel();
    let own = path.to_owned();
    let panicked = |message: String| Error::Panicked { code: format!("the thread {THREAD}"), message };
    let body = move || {
        let result = foreign::call(|| read(&own)).unwrap_or_else(|message| Err(panicked(message)));
        // Sending wakes the caller's task. If the caller has dropped its future, the result is
        // discarded.
        foreign::emit(|| drop(sender.send(result)));
    };
    let no_thread = |error: io::Error| Error::File {
        path: path.to_owned(),
        operation: "start a thread to read its header",
        errno: Errno::from_io_error(&error).unwrap_or(Errno::EAGAIN),
    };
    thread::Builder::new().name(THREAD.to_owned()).spawn(body).map_err(no_thread)?;
    receiver.await.unwrap_or_else(|_| Err(panicked("it exited without a result".to_owned())))
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
