//! What can go wrong, in words that a person can act on.
//!
//! Plain values: they hold paths, offsets and errnos, and neither files nor memory. An error makes
//! no system call, also when it is displayed.

mod kind;
mod size_limit;

use std::path::PathBuf;

pub use dmabuf::Errno;
use dmabuf::{DeviceError, Error as HeapError, printable};

use crate::model::ModelError;
use crate::route::{Attempt, Route};

pub use kind::ErrorKind;
pub use size_limit::SizeLimit;

/// Left to everybody else: without it the machine would be at its limit just after the load.
pub(crate) const MARGIN_BYTES: u64 = 32 << 20;

/// Why a load, or the making of a loader, failed.
///
/// The text says what was tried, on which file and where, and the errno by name; [`Error::hint`]
/// what can be done. Programs that react to errors match [`Error::kind`], and ask for
/// [`Error::errno`], [`Error::path`] and [`Error::offset`]; the variants have the details:
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
///         _ => println!("{error}{}", error.hint().map(|hint| format!("; {hint}")).unwrap_or_default()),
///     },
/// }
/// # }
/// ```
///
/// # Sources
/// [`source`](std::error::Error::source) is the [`crate::model::ModelError`] of [`Error::Model`],
/// the [`HeapError`](crate::heap::HeapError) of [`Error::Memory`] and the
/// [`DeviceError`](crate::heap::DeviceError) of [`Error::Device`], for programs that want their
/// fields. Each error's text includes that of its source, so show the error or the end of its
/// chain, not both.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting makes no sense. Nothing was started.
    #[error("{}", printable::text(.0))]
    Config(String),
    /// The loader's threads could not be started.
    #[error("cannot start a loader: {operation}: {}", .errno.describe())]
    Start {
        /// What could not be had.
        operation: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// A file could not be opened or looked at.
    #[error("{}: cannot {operation}: {}", printable::path(.path), .errno.describe())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// What the path names is no regular file.
    #[error("{}: is {kind}, not a regular file", printable::path(.path))]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// The file has bytes although its length is said to be 0.
    #[error("{}: has bytes, but its length is said to be 0", printable::path(.path))]
    NoLength {
        /// The file.
        path: PathBuf,
    },
    /// The file has bytes beyond its length, as its file system states it: what was read was not all of it.
    #[error("{}: has bytes beyond its length, which is said to be {stated_bytes}", printable::path(.path))]
    Longer {
        /// The file.
        path: PathBuf,
        /// Its length, as it was stated before and after.
        stated_bytes: u64,
    },
    /// A read failed for good.
    #[error("{}: reading {bytes} bytes at offset {offset} by {route} failed: {}", printable::path(.path), .errno.describe())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where in the file the read began.
        offset: u64,
        /// How much it asked for.
        bytes: u64,
        /// The route it took.
        route: Route,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The load's observer says that these bytes are wrong ([`crate::Observer`]).
    #[error("{}: {bytes} bytes at offset {offset} were rejected: {}", printable::path(.path), printable::text(.reason))]
    Rejected {
        /// The file.
        path: PathBuf,
        /// Where in the file the bytes began that it was looking at.
        offset: u64,
        /// How many they were.
        bytes: u64,
        /// What it says.
        reason: String,
    },
    /// Bytes of the file are not those that were expected ([`crate::LoadOptions::verify`]).
    #[error("{}: {bytes} bytes at offset {offset} are corrupt: {} instead of {}{}", printable::path(.path), printable::text(.found), printable::text(.expected), named(.tensors))]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where in the file the bytes begin that the checksum is of.
        offset: u64,
        /// How many they are.
        bytes: u64,
        /// The checksum that they should have.
        expected: String,
        /// The checksum that they have.
        found: String,
        /// The tensors that have bytes among them, where a chunk was verified; none where the file's header can't be read.
        tensors: Vec<String>,
    },
    /// The file has not the length that was expected ([`crate::LoadOptions::verify`]). Nothing was read.
    #[error("{}: has {bytes} bytes, but should have {expected_bytes}", printable::path(.path))]
    WrongLength {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The length that it should have.
        expected_bytes: u64,
    },
    /// The load was to be verified, and its manifest knows nothing of this file. Nothing was read.
    #[error("{}: is not in the manifest", printable::path(.path))]
    NotInManifest {
        /// The file.
        path: PathBuf,
    },
    /// The file ended before the end that it had when the load began.
    #[error("{}: has no bytes at offset {offset} (read by {route}), but had {planned_bytes} when the load began", printable::path(.path))]
    Ended {
        /// The file.
        path: PathBuf,
        /// Where nothing was left to read: its end, or an offset beyond.
        offset: u64,
        /// The length that was planned.
        planned_bytes: u64,
        /// The route of the read that met it.
        route: Route,
    },
    /// The file is not what it was when the load began: its bytes may be of different moments.
    #[error("{}: {change} during the load", printable::path(.path))]
    Changed {
        /// The file.
        path: PathBuf,
        /// What happened to it.
        change: &'static str,
    },
    /// A route was refused to a load that takes no other: a strict one.
    #[error("{}: route {route} was refused while {attempt} (offset {offset}): {}, and a strict load takes no other", printable::path(.path), .errno.describe())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        /// The route.
        route: Route,
        /// What was being tried.
        attempt: Attempt,
        /// The kernel's answer.
        errno: Errno,
    },
    /// Memory could not be had.
    #[error("{}: cannot {refusal}{}", printable::text(.heap), before(*.loaded_bytes, *.planned_bytes))]
    Memory {
        /// The heap that was asked.
        heap: String,
        /// The step that failed.
        #[source]
        refusal: HeapError,
        /// What the load had before.
        loaded_bytes: u64,
        /// What it needs in all; 0 when that was not known yet.
        planned_bytes: u64,
    },
    /// Code of the caller's panicked: a heap, a verifier, an observer, the waker of the load's task. Only the
    /// load that it belongs to fails. (Where `code` is a thread of dmaload, the defect is dmaload's.)
    #[error("{} panicked: {}", printable::text(.code), printable::text(.message))]
    Panicked {
        /// Which code: `heap NAME`, `the verifier`, `the observer`.
        code: String,
        /// The message of the panic.
        message: String,
    },
    /// Allocating would have taken the machine, or this process' memory cgroup, to its limit.
    #[error(
        "{}: {wanted_bytes} more bytes are needed, but only {available_bytes} are available ({}; {MARGIN_BYTES} of it are kept free)",
        printable::text(.heap), printable::text(.limit)
    )]
    OutOfMemory {
        /// The heap.
        heap: String,
        /// The next allocation.
        wanted_bytes: u64,
        /// What may be taken without waking the OOM killer.
        available_bytes: u64,
        /// What sets the limit.
        limit: String,
    },
    /// The load needs more memory at once than its loader may have ([`crate::LoaderBuilder::memory_limit_bytes`]).
    #[error("{wanted_bytes} bytes have to be in memory at once ({why}), but the loader's limit is {limit_bytes}: {} too many", .wanted_bytes - .limit_bytes)]
    OverLimit {
        /// What it would need.
        wanted_bytes: u64,
        /// What the loader may have.
        limit_bytes: u64,
        /// What needs it.
        why: &'static str,
    },
    /// A plan of the load would take too much memory itself: the files are very long (sparse ones can be), or its segments small.
    #[error(
        "{bytes} bytes in segments of {segment_bytes} bytes are {pieces} pieces, but a load has at most {most_pieces} of them"
    )]
    TooManyPieces {
        /// The length of all that is to be read.
        bytes: u64,
        /// The size of a segment.
        segment_bytes: u64,
        /// How many pieces that makes.
        pieces: u64,
        /// How many there may be.
        most_pieces: u64,
    },
    /// The model's header is wrong.
    #[error("{}: {}", printable::path(.path), printable::shown(.fault))]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        fault: ModelError,
    },
    /// A device could not be opened.
    #[error("{0}")]
    Device(#[from] DeviceError),
    /// A dma-buf would be larger than its heap allows.
    #[error("{}: a dma-buf of {wanted_bytes} bytes is more than {} allows: {}", printable::path(.path), printable::text(.heap), printable::shown(.limit))]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The heap.
        heap: String,
        /// What would be needed.
        wanted_bytes: u64,
        /// What it allows, and where that is set.
        limit: SizeLimit,
    },
    /// Dma-bufs were required, and no heap of this machine gives any.
    #[error("no heap here gives dma-bufs: {}", printable::text(&.tried.join("; ")))]
    NoDmaBuf {
        /// Each heap that was tried, with what it said.
        tried: Vec<String>,
    },
    /// The segment's dma-buf was handed out: others may write to it, so its bytes can't be lent any more.
    #[error(
        "the dma-buf of segment {segment} was handed out, and others may write to it: look at its bytes through `cpu_access`"
    )]
    HandedOut {
        /// The segment.
        segment: usize,
    },
    /// The segment's bytes are lent: handing out its dma-buf would let others write under them.
    #[error("{views} views of segment {segment} are alive: its dma-buf can be handed out when they are dropped")]
    Viewed {
        /// The segment.
        segment: usize,
        /// How many.
        views: usize,
    },
    /// The tensor lies in more than one segment, so no single dma-buf holds it.
    #[error("tensor {tensor:?} lies in {segments} segments: use its parts, or load with larger segments or Layout::Single")]
    Straddles {
        /// The tensor.
        tensor: String,
        /// How many.
        segments: usize,
    },
    /// What was asked for can't be had of this file.
    #[error("{}: {}", printable::path(.path), printable::text(.reason))]
    Selection {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The folder has no model in it that could be loaded.
    #[error("{}: {}", printable::path(.path), printable::text(.reason))]
    NoModel {
        /// The folder.
        path: PathBuf,
        /// What was looked for.
        reason: String,
    },
    /// Files of the model are missing, or hold nothing ([`crate::LoadOptions::allow_missing`]).
    #[error("{}: {}", printable::path(.path), printable::text(.reason))]
    Incomplete {
        /// The folder, the index or a part of the model.
        path: PathBuf,
        /// Which files are missing, and why.
        reason: String,
        /// How many of its files can be loaded.
        loadable: usize,
    },
    /// Two files of one model have a tensor of this name, and no index says which one counts.
    #[error(
        "tensor {tensor:?} is in two files of one model, and no index says which one counts: {} and {}",
        printable::path(.first), printable::path(.second)
    )]
    DuplicateTensor {
        /// The name.
        tensor: String,
        /// A file that has it.
        first: PathBuf,
        /// Another file that has it.
        second: PathBuf,
    },
    /// Several files that were loaded together have a tensor of this name: look it up in one of them
    /// ([`crate::ImageFile::tensor`]).
    #[error("tensor {tensor:?} is in {} files: {}", .paths.len(), listed(.paths))]
    AmbiguousTensor {
        /// The name.
        tensor: String,
        /// The files.
        paths: Vec<PathBuf>,
    },
    /// The tensor is in a file of the model that was not read: it has none of the tensors that were
    /// asked for, or it is missing, which was allowed.
    #[error("tensor {tensor:?} was not loaded: it is in {}, which was not read", printable::path(.path))]
    NotSelected {
        /// The name.
        tensor: String,
        /// The file that the index maps it to.
        path: PathBuf,
    },
    /// These bytes of the file were not loaded: only others were asked for.
    #[error("{}: bytes {}..{} were not loaded, only other parts of the file", printable::path(.path), .range.start, .range.end)]
    NotLoaded {
        /// The file.
        path: PathBuf,
        /// The bytes.
        range: std::ops::Range<u64>,
    },
    /// This part of a tensor has its bytes in rows that are apart, so there is no view of all of it.
    #[error("the part of tensor {tensor:?} lies in {rows} rows that are apart: use its parts, or copy it (to_vec)")]
    NotContiguous {
        /// The tensor.
        tensor: String,
        /// How many.
        rows: u64,
    },
    /// A tensor can't be where the importer wants it, without or even with a copy.
    #[error("tensor {tensor:?} is at byte {offset} of its file, no multiple of {alignment_bytes}: {why}")]
    Unaligned {
        /// The tensor.
        tensor: String,
        /// Where it begins in its file.
        offset: u64,
        /// What the importer wants.
        alignment_bytes: u64,
        /// Why it is not copied there.
        why: &'static str,
    },
    /// The importer can't map what the load would be.
    #[error(
        "{segments} segments of up to {segment_bytes} bytes would be needed; the importer takes {max_segments} of {max_segment_bytes}"
    )]
    Importer {
        /// How many there would be.
        segments: usize,
        /// How large the largest.
        segment_bytes: u64,
        /// How many it takes.
        max_segments: usize,
        /// How large.
        max_segment_bytes: u64,
    },
    /// No file of the image has a tensor of this name.
    #[error("no tensor named {0:?}")]
    NoSuchTensor(String),
    /// This memory has no file descriptor of the kind that was asked for.
    #[error("heap {} gives no {wanted}", printable::text(.heap))]
    NoDescriptor {
        /// The heap.
        heap: String,
        /// What was asked for.
        wanted: &'static str,
    },
    /// Sharing an image with other processes did not work ([`crate::share`]).
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
    /// The thread that runs the reads broke down. Other loaders are not concerned.
    #[error("the ring broke down: {}; what it was reading into is leaked on purpose", .errno.describe())]
    Ring {
        /// The kernel's answer.
        errno: Errno,
    },
}

impl Error {
    /// What can be done about it, if there is something to say that the text does not say already.
    ///
    /// It speaks of the library's options, and of what anybody can do at a shell; programs add the names that
    /// these options have in their own user interface.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::Start { errno: Errno::EAGAIN | Errno::ENOMEM, .. } => {
                "the limit of processes or of the address space is reached: see ulimit -u and ulimit -v"
            }
            Error::Start { errno: Errno::EMFILE, .. } => OPEN_FILES,
            Error::Start { errno: Errno::ENFILE, .. } => ALL_OPEN_FILES,
            Error::File { errno: Errno::ENOENT, path, .. } if path.as_os_str() == "-" => {
                "standard input can't be loaded, since reads are by offset: save it to a file first"
            }
            Error::NotAFile { kind: "a block device", path } => {
                return Some(format!(
                    "copy it to a file first, since its changes could not be noticed: dd if={} of=COPY bs=1M",
                    printable::shell(path)
                ));
            }
            Error::NoLength { path } | Error::Longer { path, .. } => {
                return Some(format!(
                    "its file system learns the length by reading (procfs, some FUSE servers): copy it to a disk first: cat {} > COPY",
                    printable::shell(path)
                ));
            }
            Error::File { errno: Errno::ENOENT | Errno::ENOTDIR, path, .. } => {
                if let Ok(target) = std::fs::read_link(path) {
                    let target = printable::path(&target);
                    return Some(format!("it is a symbolic link to {target}, which is not there: fetch that, or mend the link"));
                }
                "check the path"
            }
            Error::File { errno: Errno::ELOOP, .. } => "a symbolic link leads to itself: mend the link",
            Error::File { errno: Errno::EACCES | Errno::EPERM, .. } => "check the file's permissions, and those of its folders",
            // A socket can't be opened by its path.
            Error::File { errno: Errno::ENXIO, .. } | Error::NotAFile { kind: "a socket", .. } => {
                "a socket is no file; if a server shares a model there, attach to it"
            }
            Error::NotAFile { kind: "a FIFO", .. } => {
                "a pipe can't be loaded, since reads are by offset: save it to a file first"
            }
            Error::NotAFile { kind: "a character device", .. } => "copy what it gives to a file first",
            Error::File { errno: Errno::EMFILE, .. } | Error::Memory { refusal: HeapError { errno: Errno::EMFILE, .. }, .. } => {
                OPEN_FILES
            }
            Error::File { errno: Errno::ENFILE, .. } | Error::Memory { refusal: HeapError { errno: Errno::ENFILE, .. }, .. } => {
                ALL_OPEN_FILES
            }
            Error::Read { errno: Errno::EIO | Errno::ENODATA | Errno::EREMOTEIO, .. } => {
                "the storage can't give these bytes: see the kernel's log (dmesg), and restore the file from a good copy"
            }
            Error::Corrupt { .. } | Error::WrongLength { .. } => {
                "fetch the file again from where the manifest or the checksum came from; if it is the right one elsewhere, \
                 suspect this machine's storage or memory"
            }
            Error::NotInManifest { .. } => {
                "a manifest names files by the ends of their paths: compare its \"path\"s, or make a new one"
            }
            Error::Ended { path, .. } => {
                return Some(format!(
                    "if it was cut meanwhile, load it again when that is over; if not, the length that its file system states is \
                     wrong (sysfs, some FUSE servers): copy it to a disk first: cat {} > COPY",
                    printable::shell(path)
                ));
            }
            Error::Changed { .. } => "load it again when nobody writes to it",
            Error::Refused { attempt, errno, .. } => return attempt.hint(*errno).map(str::to_owned),
            Error::Memory { heap, refusal, .. } => return memory_hint(heap, refusal).map(str::to_owned),
            Error::Device(DeviceError { errno: Errno::EACCES | Errno::EPERM, path, .. }) => {
                return Some(format!(
                    "give yourself the right to it: sudo setfacl -m u:$USER:rw {0}, or a udev rule; or have a process that has it hand you the dma-bufs",
                    printable::path(path)
                ));
            }
            Error::Device(DeviceError { errno: Errno::ENOENT, path, .. }) if path.ends_with("udmabuf") => {
                "load the module (sudo modprobe udmabuf); it needs a kernel with CONFIG_UDMABUF"
            }
            Error::TooLarge { wanted_bytes, limit, .. } => {
                let raise = limit.raise(*wanted_bytes);
                return Some(format!("raise it as root: {}; or load in smaller segments", printable::text(&raise)));
            }
            Error::NoDmaBuf { .. } => {
                "see what each heap needs; without a dma-buf, the heap memfd gives memory that other processes can map"
            }
            Error::OutOfMemory { .. } => "free memory, raise the limit, or stream the file and drop its segments as they come",
            Error::TooManyPieces { .. } => "use larger segments, or load a part of it",
            Error::OverLimit { .. } => "raise the limit, or stream the load and drop its segments as they come",
            Error::Incomplete { loadable: 0, .. } => "finish the download, or fetch the model again",
            Error::Incomplete { .. } => "finish the download, or load what is there (allow_missing)",
            Error::DuplicateTensor { .. } => "name the file to be loaded, or add an index that says which one counts",
            Error::AmbiguousTensor { .. } => "look it up in one of these files",
            Error::Model { fault, .. } => fault.hint(),
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

const OPEN_FILES: &str = "the limit of open files is reached: raise it (ulimit -n)";
const ALL_OPEN_FILES: &str = "the whole machine's limit of open files is reached: raise it (sysctl fs.file-max)";

/// More addresses than a process has on common machines: 2^47 bytes on x86-64, 2^48 on AArch64.
const ALL_ADDRESSES: usize = 1 << 47;

/// What can be done about memory that was refused. The step says what is short: ENOMEM of mapping is the address space,
/// ENOMEM of pages is memory.
fn memory_hint(heap: &str, refusal: &HeapError) -> Option<&'static str> {
    let maps = ["reserve", "map", "move", "allocate a staging"].iter().any(|step| refusal.operation.starts_with(step));
    Some(match refusal.errno {
        Errno::EINVAL if heap == "udmabuf" => "see the limit of its size: /sys/module/udmabuf/parameters/size_limit_mb",
        Errno::ENOMEM if refusal.operation.starts_with("reserve") && refusal.bytes >= ALL_ADDRESSES => {
            "no process has as many addresses: load a part of it"
        }
        Errno::ENOMEM if maps => "the address space or the number of mappings is used up: see ulimit -v and vm.max_map_count",
        Errno::ENOMEM => {
            "no memory could be had for its pages: see the limit of this process' memory cgroup (memory.max), and what is free"
        }
        Errno::EPERM | Errno::EACCES | Errno::ENOSYS if refusal.operation.contains("memfd") => {
            "memory files are refused here, by a container's seccomp profile for example: the heap anon needs none"
        }
        Errno::EFBIG => "the limit of file sizes counts for memory files, too: raise it (ulimit -f), or use the heap anon",
        Errno::EOPNOTSUPP => {
            "2 MiB pages can't be had here: see /sys/kernel/mm/transparent_hugepage/shmem_enabled, or let pages have any size"
        }
        _ => return None,
    })
}

/// How many files a message names.
const FILES_NAMED: usize = 8;

fn listed(paths: &[PathBuf]) -> String {
    let names: Vec<_> = paths.iter().take(FILES_NAMED).map(|path| printable::path(path).to_string()).collect();
    match paths.len().saturating_sub(FILES_NAMED) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

/// How many tensors a message names.
const TENSORS_NAMED: usize = 32;

fn named(tensors: &[String]) -> String {
    let names: Vec<_> = tensors.iter().take(TENSORS_NAMED).map(|name| format!("{name:?}")).collect();
    match (tensors.len(), tensors.len().saturating_sub(TENSORS_NAMED)) {
        (0, _) => String::new(),
        (1, _) => format!("; in tensor {}", names.join(", ")),
        (_, 0) => format!("; in tensors {}", names.join(", ")),
        (_, more) => format!("; in tensors {} and {more} more", names.join(", ")),
    }
}

fn before(loaded_bytes: u64, planned_bytes: u64) -> String {
    match planned_bytes {
        0 => String::new(),
        planned => format!(" ({loaded_bytes} of {planned} bytes of the load were allocated before)"),
    }
}

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests;
