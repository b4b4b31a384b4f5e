//! Errors, with messages that a person can act on.
//!
//! Errors are plain values: they hold paths, offsets and errnos, but no files or memory. Neither
//! creating nor displaying an error makes a system call. [`Error::hint`] may read a symbolic link.

mod hint;
mod kind;
mod size_limit;

use std::path::PathBuf;

pub use dmabuf::Errno;
use dmabuf::{DeviceError, Error as HeapError, printable};

use crate::model::ModelError;
use crate::route::{Attempt, Route};

pub use kind::ErrorKind;
pub use size_limit::SizeLimit;

/// The amount of memory that loads leave available. Without this reserve, a load could leave the
/// machine or the cgroup right at its limit.
pub(crate) const MARGIN_BYTES: u64 = 32 << 20;

/// An error from building a loader, from a load, or from using loaded memory.
///
/// The message says what was tried and why it failed, with the file, the offset and the errno if
/// there are any. [`Error::hint`] suggests what to do about it. Programs that react to errors can
/// match on [`Error::kind`] and use [`Error::errno`], [`Error::path`] and [`Error::offset`]. The
/// variants' fields hold the details. For example:
///
/// ```no_run
/// # async fn example(loader: dmaload::Loader) {
/// use dmaload::ErrorKind;
///
/// match loader.load("model.safetensors").await {
///     Ok(image) => println!("{} segments", image.segments().len()),
///     Err(error) => match error.kind() {
///         ErrorKind::NotFound | ErrorKind::Incomplete => println!("download it: {error}"),
///         ErrorKind::Corrupt | ErrorKind::InvalidModel => println!("download it again: {error}"),
///         ErrorKind::OutOfMemory => println!("try later: {error}"),
///         _ => println!("{error}; {}", error.hint().unwrap_or_default()),
///     },
/// }
/// # }
/// ```
///
/// # Sources
/// [`source`](std::error::Error::source) returns the [`crate::model::ModelError`] in
/// [`Error::Model`], the [`HeapError`](crate::heap::HeapError) in [`Error::Memory`] and the
/// [`DeviceError`](crate::heap::DeviceError) in [`Error::Device`], for programs that need their
/// fields. The message of an error already includes that of its source, so print only the error,
/// not its chain of sources.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting or option is invalid, conflicts with another, or can't be used with the heap.
    #[error("{}", printable::text(.0))]
    Config(String),
    /// A thread or a descriptor that the loader needs could not be created.
    #[error("cannot start a loader: cannot {operation}: {}", .errno.describe())]
    Start {
        /// What could not be done, such as `start a thread`.
        operation: &'static str,
        /// The kernel's error.
        errno: Errno,
    },
    /// An operation on a file failed. A failed read is reported as [`Error::Read`] instead.
    #[error("{}: cannot {operation}: {}", printable::path(.path), .errno.describe())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// The kernel's error.
        errno: Errno,
    },
    /// The path does not name a regular file.
    #[error("{}: {kind}, not a regular file", printable::path(.path))]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// The file is not empty, although its file system reports a length of 0.
    #[error("{}: not empty, although its reported length is 0", printable::path(.path))]
    NoLength {
        /// The file.
        path: PathBuf,
    },
    /// The file is longer than the length that its file system reports, so the load would have
    /// been incomplete.
    #[error("{}: longer than its reported length of {stated_bytes} bytes", printable::path(.path))]
    Longer {
        /// The file.
        path: PathBuf,
        /// The reported length, which did not change during the load.
        stated_bytes: u64,
    },
    /// A read failed. A read into a segment has already been retried; a read of a header or of the
    /// end of the file has not.
    #[error("{}: cannot read {bytes} bytes at offset {offset} (route {route}): {}", printable::path(.path), .errno.describe())]
    Read {
        /// The file.
        path: PathBuf,
        /// Offset of the read in the file.
        offset: u64,
        /// Length of the read in bytes.
        bytes: u64,
        /// The route of the read.
        route: Route,
        /// The kernel's error.
        errno: Errno,
    },
    /// The load's observer rejected these bytes ([`crate::Observer`]), or no thread could be
    /// started to run the observer.
    #[error("{}: {bytes} bytes at offset {offset} were rejected: {}", printable::path(.path), printable::text(.reason))]
    Rejected {
        /// The file.
        path: PathBuf,
        /// Where in the file the rejected bytes begin.
        offset: u64,
        /// Number of bytes.
        bytes: u64,
        /// The reason.
        reason: String,
    },
    /// Bytes of the file differ from what was expected ([`crate::LoadOptions::verify`]).
    #[error("{}: {bytes} bytes at offset {offset} are corrupt: {}, expected {}{}", printable::path(.path), printable::text(.found), printable::text(.expected), list_tensors(.tensors))]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where in the file the checked bytes begin.
        offset: u64,
        /// Number of bytes.
        bytes: u64,
        /// The expected checksum.
        expected: String,
        /// The computed checksum.
        found: String,
        /// The tensors that overlap these bytes. Empty if the whole file was verified with a
        /// single checksum, or if the file's header can't be read.
        tensors: Vec<String>,
    },
    /// The file's length differs from what was expected ([`crate::LoadOptions::verify`]). Nothing
    /// except headers has been read.
    #[error("{}: {bytes} bytes long, expected {expected_bytes}", printable::path(.path))]
    WrongLength {
        /// The file.
        path: PathBuf,
        /// The file's length.
        bytes: u64,
        /// The expected length.
        expected_bytes: u64,
    },
    /// The load was to be verified against a manifest that does not list this file. Nothing except
    /// headers has been read.
    #[error("{}: not in the manifest", printable::path(.path))]
    NotInManifest {
        /// The file.
        path: PathBuf,
    },
    /// The file is shorter than the length that its file system reported when the load began.
    #[error("{}: ends before offset {offset} (route {route}), but was {planned_bytes} bytes long when the load began", printable::path(.path))]
    Ended {
        /// Path of the file that ended early.
        path: PathBuf,
        /// Offset at which no more bytes could be read. This is the end of the file, or beyond it.
        offset: u64,
        /// The reported length when the load began.
        planned_bytes: u64,
        /// The route of the read that reached the end.
        route: Route,
    },
    /// The file changed after the load began, so its bytes may be from different versions.
    #[error("{}: {change} during the load", printable::path(.path))]
    Changed {
        /// The file.
        path: PathBuf,
        /// What changed.
        change: &'static str,
    },
    /// A route was refused, and the load is strict.
    #[error("{}: route {route} was refused while {attempt} (offset {offset}): {}; a strict load does not fall back to another route", printable::path(.path), .errno.describe())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Offset in the file.
        offset: u64,
        /// The route.
        route: Route,
        /// What was being tried.
        attempt: Attempt,
        /// The kernel's error, or an equivalent one if the kernel returned none.
        errno: Errno,
    },
    /// Memory could not be allocated, populated, mapped, sealed, exported or accessed.
    #[error("{}: cannot {refusal}{}", printable::text(.heap), format_progress(*.loaded_bytes, *.planned_bytes))]
    Memory {
        /// The heap.
        heap: String,
        /// The step that failed.
        #[source]
        refusal: HeapError,
        /// Number of bytes that the load had already allocated.
        loaded_bytes: u64,
        /// Bytes that the load needs in total; 0 if not known yet.
        planned_bytes: u64,
    },
    /// The caller's code panicked. If the code is a heap, a verifier or an observer, only the load
    /// that it belongs to fails. If it is a waker, the load continues: the future or stream that
    /// was polled with the waker returns this error once, and [`crate::Load::finish`] keeps
    /// waiting with its next waker. If `code` names a thread of dmaload, the panic was in dmaload
    /// itself or in a `tracing` subscriber.
    #[error("{} panicked: {}", printable::text(.code), printable::text(.message))]
    Panicked {
        /// Which code panicked: `heap NAME`, `the verifier`, `the observer`, `the waker of a
        /// task`, or a thread of dmaload.
        code: String,
        /// The message of the panic.
        message: String,
    },
    /// The allocation would have taken the machine or this process's memory cgroup to its limit.
    #[error(
        "{}: {wanted_bytes} more bytes are needed, but only {available_bytes} are available ({}, minus a reserve of {MARGIN_BYTES} bytes)",
        printable::text(.heap), printable::text(.limit)
    )]
    OutOfMemory {
        /// The heap.
        heap: String,
        /// Number of bytes needed: for the next allocation, or for everything that must be in
        /// memory at once.
        wanted_bytes: u64,
        /// Bytes that can be allocated without invoking the OOM killer, minus a reserve.
        available_bytes: u64,
        /// What sets the limit.
        limit: String,
    },
    /// The load needs more memory at once than its loader may use
    /// ([`crate::LoaderBuilder::memory_limit_bytes`]).
    #[error("{wanted_bytes} bytes must be in memory at once ({why}), {} more than the loader's limit of {limit_bytes} bytes", .wanted_bytes - .limit_bytes)]
    OverLimit {
        /// Bytes that the load needs at once.
        wanted_bytes: u64,
        /// The loader's limit.
        limit_bytes: u64,
        /// What needs this much memory.
        why: &'static str,
    },
    /// The consumer waits for the next tensor, but the tensors that it already holds use up the
    /// load's share of the loader's memory limit ([`crate::LoaderBuilder::memory_limit_bytes`]),
    /// so the load cannot continue. Returned by [`crate::Tensors::next_while_holding_blocking`].
    #[error(
        "cannot allocate {wanted_bytes} more bytes: the {held_bytes} bytes that the load's consumer holds use up the load's share of the loader's limit of {limit_bytes} bytes"
    )]
    HeldUp {
        /// Memory, in bytes, of the tensors that were returned and have not been dropped yet.
        held_bytes: u64,
        /// Size of the next allocation.
        wanted_bytes: u64,
        /// The loader's limit.
        limit_bytes: u64,
    },
    /// The load consists of so many pieces that planning it would use too much memory. This
    /// happens if its files are very long, as sparse files can be, or if its segments are small.
    #[error("{bytes} bytes in segments of {segment_bytes} bytes make {pieces} pieces, more than the limit of {most_pieces}")]
    TooManyPieces {
        /// The total number of bytes to read.
        bytes: u64,
        /// The size of a segment.
        segment_bytes: u64,
        /// The resulting number of pieces.
        pieces: u64,
        /// The maximum number of pieces.
        most_pieces: u64,
    },
    /// A model's header or index is invalid, or its files contradict each other.
    #[error("{}: {}", printable::path(.path), printable::shown(.fault))]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        fault: ModelError,
    },
    /// A device could not be opened.
    #[error("{0}")]
    Device(#[from] DeviceError),
    /// A dma-buf would be larger than its heap allows.
    #[error("{}: a dma-buf of {wanted_bytes} bytes exceeds the limit of {}: {}", printable::path(.path), printable::text(.heap), printable::shown(.limit))]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The heap.
        heap: String,
        /// The size of the dma-buf.
        wanted_bytes: u64,
        /// The heap's limit, and where it is set.
        limit: SizeLimit,
    },
    /// dma-bufs were required, but no heap on this machine provides them.
    #[error("no heap on this machine provides dma-bufs: {}", printable::text(&.tried.join("; ")))]
    NoDmaBuf {
        /// The heaps that were tried, each with its error.
        tried: Vec<String>,
    },
    /// The segment's dma-buf, or its memory ([`crate::PrivateMemory`]), was handed out. Others may
    /// write to it, so its bytes can't be viewed any more.
    #[error("segment {segment} was handed out, and others may write to it: read its bytes through `cpu_access`")]
    HandedOut {
        /// The segment.
        segment: usize,
    },
    /// The segment's bytes are being viewed. Handing it out would let others write to them.
    #[error("cannot hand out segment {segment} while its bytes are being viewed: drop the views ({views}) first")]
    Viewed {
        /// The segment.
        segment: usize,
        /// Number of views.
        views: usize,
    },
    /// The tensor spans several segments, or is empty and in no segment, so no single dma-buf
    /// holds it.
    #[error(
        "tensor {tensor:?} is in {segments} segments, not in one: use its parts, or load with larger segments or Layout::Single"
    )]
    Straddles {
        /// The tensor.
        tensor: String,
        /// Number of segments; 0 for an empty tensor.
        segments: usize,
    },
    /// The requested selection can't be applied to this file.
    #[error("{}: {}", printable::path(.path), printable::text(.reason))]
    Selection {
        /// The file.
        path: PathBuf,
        /// Why it can't be applied.
        reason: String,
    },
    /// The path does not lead to a model that can be loaded.
    #[error("{}: {}", printable::path(.path), printable::text(.reason))]
    NoModel {
        /// The folder or file.
        path: PathBuf,
        /// Why no model can be loaded from it.
        reason: String,
    },
    /// Files of the model are missing or empty ([`crate::LoadOptions::allow_missing`]).
    #[error("{}: {}", printable::path(.path), printable::text(.reason))]
    Incomplete {
        /// The folder, the index, or a file of the model.
        path: PathBuf,
        /// Which files are missing, and why they are expected.
        reason: String,
        /// How many of the model's files can be loaded.
        loadable: usize,
    },
    /// Two files of one model contain a tensor with this name, and no index says which one to use.
    #[error(
        "tensor {tensor:?} is in two files of one model, and no index says which one to use: {} and {}",
        printable::path(.first), printable::path(.second)
    )]
    DuplicateTensor {
        /// The tensor's name.
        tensor: String,
        /// A file that contains it.
        first: PathBuf,
        /// Another file that contains it.
        second: PathBuf,
    },
    /// Several files that were loaded together contain a tensor with this name. Use
    /// [`crate::ImageFile::tensor`] to look it up in one of them.
    #[error("tensor {tensor:?} is in {} files: {}", .paths.len(), list_paths(.paths))]
    AmbiguousTensor {
        /// The tensor's name.
        tensor: String,
        /// The files.
        paths: Vec<PathBuf>,
    },
    /// The tensor is in a file of the model that was not read, either because none of the
    /// requested tensors are in that file, or because the file is missing and missing files were
    /// allowed.
    #[error("tensor {tensor:?} was not loaded: its file {} was not read", printable::path(.path))]
    NotSelected {
        /// The tensor's name.
        tensor: String,
        /// The file that the index maps it to.
        path: PathBuf,
    },
    /// This range of the file cannot be viewed as one slice: not all of its bytes were requested,
    /// or they are not contiguous in memory ([`crate::Layout::Tensors`]).
    #[error("{}: bytes {}..{} were not loaded, or are not contiguous in memory", printable::path(.path), .range.start, .range.end)]
    NotLoaded {
        /// The file.
        path: PathBuf,
        /// The byte range.
        range: std::ops::Range<u64>,
    },
    /// The bytes of this part of a tensor are in separate rows, so they can't be viewed as one
    /// slice.
    #[error(
        "this part of tensor {tensor:?} is not contiguous, but consists of {rows} separate rows: use its parts, or copy it (to_vec)"
    )]
    NotContiguous {
        /// The tensor.
        tensor: String,
        /// Number of rows.
        rows: u64,
    },
    /// A tensor does not have the alignment that the importer requires, and was not copied to an
    /// aligned address.
    #[error("tensor {tensor:?} is at byte {offset} of its file, which is not a multiple of {alignment_bytes}: {why}")]
    Unaligned {
        /// The tensor.
        tensor: String,
        /// Where the tensor begins in its file.
        offset: u64,
        /// The importer's alignment.
        alignment_bytes: u64,
        /// Why the tensor is not copied.
        why: &'static str,
    },
    /// The load's segments exceed the importer's limits. Segments that share a dma-buf count as
    /// one.
    #[error(
        "the load needs {segments} segments of up to {segment_bytes} bytes, but the importer accepts {max_segments} of up to {max_segment_bytes} bytes"
    )]
    Importer {
        /// Number of segments that the load needs.
        segments: usize,
        /// Size of the largest of these segments.
        segment_bytes: u64,
        /// The importer's maximum number of segments.
        max_segments: usize,
        /// The importer's maximum segment size.
        max_segment_bytes: u64,
    },
    /// No file in the load contains a tensor with this name, or one that matches this pattern.
    #[error("there is no tensor named or matching {0:?}")]
    NoSuchTensor(String),
    /// The memory has no file descriptor of the requested kind. Also returned when
    /// [`crate::PrivateMemory`] is requested for a dma-buf, which cannot be private.
    #[error("heap {} does not provide a {wanted}", printable::text(.heap))]
    NoDescriptor {
        /// The heap.
        heap: String,
        /// The kind of descriptor.
        wanted: &'static str,
    },
    /// Sharing an image with other processes failed ([`crate::share`]).
    #[error("{}: {}", printable::path(.socket), printable::text(.reason))]
    Share {
        /// The socket.
        socket: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// The loader was shut down before the load was finished.
    #[error("the loader was shut down")]
    ShutDown,
    /// io_uring failed, and so did all of the loader's running loads. Later loads use a new ring.
    #[error("the ring failed: {}; memory that its reads may still write to is leaked on purpose", .errno.describe())]
    Ring {
        /// The kernel's error.
        errno: Errno,
    },
}

/// Maximum number of files to list in a message.
const FILES_NAMED: usize = 8;

fn list_paths(paths: &[PathBuf]) -> String {
    let names: Vec<_> = paths.iter().take(FILES_NAMED).map(|path| printable::path(path).to_string()).collect();
    match paths.len().saturating_sub(FILES_NAMED) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

/// Maximum number of tensors to list in a message.
const TENSORS_NAMED: usize = 32;

fn list_tensors(tensors: &[String]) -> String {
    let names: Vec<_> = tensors.iter().take(TENSORS_NAMED).map(|name| format!("{name:?}")).collect();
    match (tensors.len(), tensors.len().saturating_sub(TENSORS_NAMED)) {
        (0, _) => String::new(),
        (1, _) => format!("; in tensor {}", names.join(", ")),
        (_, 0) => format!("; in tensors {}", names.join(", ")),
        (_, more) => format!("; in tensors {} and {more} more", names.join(", ")),
    }
}

fn format_progress(loaded_bytes: u64, planned_bytes: u64) -> String {
    match planned_bytes {
        0 => String::new(),
        planned => format!(" (after {loaded_bytes} of the load's {planned} bytes)"),
    }
}

/// A [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests;
