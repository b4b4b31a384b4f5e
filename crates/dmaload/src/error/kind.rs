//! What programs can query about an error: its kind, errno, path and offset.

use std::path::Path;

use super::{Errno, Error};

/// The kind of an error, grouped by what a caller can do about it; see [`Error::kind`].
///
/// - Change the call: [`Config`](Self::Config), [`InvalidInput`](Self::InvalidInput),
///   [`Ambiguous`](Self::Ambiguous), [`NotLoaded`](Self::NotLoaded),
///   [`Placement`](Self::Placement), [`InUse`](Self::InUse), [`TooLarge`](Self::TooLarge),
///   [`Unsupported`](Self::Unsupported).
/// - Download the model, possibly again: [`NotFound`](Self::NotFound),
///   [`Incomplete`](Self::Incomplete), [`InvalidModel`](Self::InvalidModel),
///   [`Corrupt`](Self::Corrupt).
/// - Try again: [`Changed`](Self::Changed), and [`OutOfMemory`](Self::OutOfMemory) once memory is
///   free.
/// - Change a limit or a permission: [`OverLimit`](Self::OverLimit),
///   [`PermissionDenied`](Self::PermissionDenied), [`Device`](Self::Device).
/// - Report it: [`Io`](Self::Io), [`Share`](Self::Share), [`Panicked`](Self::Panicked),
///   [`ShutDown`](Self::ShutDown).
///
/// Later versions may add kinds, and use them for errors that are [`Io`](Self::Io) in this
/// version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting or option is invalid, conflicts with another, or can't be used with the heap.
    /// Change the call.
    Config,
    /// The input can't be loaded: it is not a regular file, its file system reports a wrong
    /// length, or the file does not contain the selection. Use another input, or copy the file to
    /// a disk first.
    InvalidInput,
    /// There is no such file, model, tensor or manifest entry. A tensor that is in the model but
    /// was not loaded is [`ErrorKind::NotLoaded`].
    NotFound,
    /// This user may not open the file or allocate the memory. Change the permissions
    /// ([`Error::errno`] is EACCES or EPERM).
    PermissionDenied,
    /// The kernel or the storage failed or reached one of its limits: [`Error::errno`] says which.
    Io,
    /// The file is not a model of its format, or violates the format's rules. Download the file
    /// again, or load it as raw bytes ([`crate::Format::Raw`]).
    InvalidModel,
    /// Files of the model are missing or empty. Finish the download, or allow missing files
    /// ([`crate::LoadOptions::allow_missing`]).
    Incomplete,
    /// Several files contain a tensor with this name. Say which file to use.
    Ambiguous,
    /// The tensor or the bytes exist, but were not requested when the files were loaded, or the
    /// bytes are not contiguous in memory. Load them, or use another [`crate::Layout`].
    NotLoaded,
    /// The file changed after the load began. Load it again when nothing is writing to it.
    Changed,
    /// The bytes differ from what was expected, or an observer rejected them. Don't use them;
    /// download the file again.
    Corrupt,
    /// The machine or the memory cgroup has too little free memory, or the process has too little
    /// address space. Free memory and try again, or stream the load.
    OutOfMemory,
    /// The load needs more memory at once than its loader may use
    /// ([`crate::LoaderBuilder::memory_limit_bytes`]), or its consumer holds too much of it
    /// ([`Error::HeldUp`]). Retrying does not help. Raise the limit, or stream the load and drop
    /// its segments after use.
    OverLimit,
    /// A segment would be larger than its heap allows, or the load would consist of too many
    /// pieces. Change the segment size, load only a part, or raise the limit.
    TooLarge,
    /// No dma-buf is available: a device is missing or can't be opened, for example for lack of
    /// permission. [`Error::hint`] says what is needed; memfds ([`crate::heap::MemfdHeap`]) need
    /// no device.
    Device,
    /// The kernel, the file system or the heap does not support what was required. Require less:
    /// drop [`crate::LoadOptions::strict`], or use another heap.
    Unsupported,
    /// A tensor is not placed in memory as requested: it spans several segments or rows, or is not
    /// where an importer can map it. Use its parts, copy it, or load with another
    /// [`crate::Layout`].
    Placement,
    /// The same bytes can't be viewed and handed out (as a dma-buf or as private memory) at the
    /// same time. Drop the views first, or read through [`crate::Segment::cpu_access`].
    InUse,
    /// Sharing an image with another process, or attaching to one, failed ([`crate::share`]).
    Share,
    /// The caller's own code panicked (a heap, a verifier, an observer or a waker), or dmaload
    /// did: [`Error::Panicked`].
    Panicked,
    /// The loader was shut down before the load finished.
    ShutDown,
}

impl Error {
    /// The kind of this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Config(_) => ErrorKind::Config,
            Error::File { errno, .. } => match *errno {
                Errno::ENOENT | Errno::ENOTDIR => ErrorKind::NotFound,
                Errno::ESTALE => ErrorKind::Changed,
                errno => kind_of(errno),
            },
            Error::Start { errno, .. } => kind_of(*errno),
            Error::Memory { refusal, .. } => kind_of(refusal.errno),
            // ESTALE means that a network file was replaced, and ENOMEM that the kernel had no
            // memory for the read or that no thread could be started for it.
            Error::Read { errno: Errno::ESTALE, .. } => ErrorKind::Changed,
            Error::Read { errno: Errno::ENOMEM, .. } => ErrorKind::OutOfMemory,
            Error::Read { .. } | Error::Ring { .. } => ErrorKind::Io,
            Error::NotAFile { .. } | Error::NoLength { .. } | Error::Longer { .. } | Error::Selection { .. } => {
                ErrorKind::InvalidInput
            }
            Error::NotInManifest { .. } | Error::NoModel { .. } | Error::NoSuchTensor(_) => ErrorKind::NotFound,
            Error::Model { .. } => ErrorKind::InvalidModel,
            Error::Incomplete { .. } => ErrorKind::Incomplete,
            Error::DuplicateTensor { .. } | Error::AmbiguousTensor { .. } => ErrorKind::Ambiguous,
            Error::NotSelected { .. } | Error::NotLoaded { .. } => ErrorKind::NotLoaded,
            Error::Ended { .. } | Error::Changed { .. } => ErrorKind::Changed,
            Error::Rejected { .. } | Error::Corrupt { .. } | Error::WrongLength { .. } => ErrorKind::Corrupt,
            Error::OutOfMemory { .. } => ErrorKind::OutOfMemory,
            Error::OverLimit { .. } | Error::HeldUp { .. } => ErrorKind::OverLimit,
            Error::TooLarge { .. } | Error::TooManyPieces { .. } => ErrorKind::TooLarge,
            Error::Device(_) | Error::NoDmaBuf { .. } => ErrorKind::Device,
            Error::Refused { .. } | Error::NoDescriptor { .. } => ErrorKind::Unsupported,
            Error::Straddles { .. } | Error::NotContiguous { .. } | Error::Unaligned { .. } | Error::Importer { .. } => {
                ErrorKind::Placement
            }
            Error::HandedOut { .. } | Error::Viewed { .. } => ErrorKind::InUse,
            Error::Share { .. } => ErrorKind::Share,
            Error::Panicked { .. } => ErrorKind::Panicked,
            Error::ShutDown => ErrorKind::ShutDown,
        }
    }

    /// The kernel's error, or an equivalent one if the kernel returned none ([`Error::Refused`],
    /// [`Error::Device`]). `None` for all other errors.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Start { errno, .. }
            | Error::File { errno, .. }
            | Error::Read { errno, .. }
            | Error::Refused { errno, .. }
            | Error::Ring { errno } => Some(*errno),
            Error::Memory { refusal, .. } => Some(refusal.errno),
            Error::Device(device) => Some(device.errno),
            _ => None,
        }
    }

    /// The file, folder, device or socket that the error is about. If there are several, the first
    /// one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Error::File { path, .. }
            | Error::NotAFile { path, .. }
            | Error::NoLength { path }
            | Error::Longer { path, .. }
            | Error::Read { path, .. }
            | Error::Rejected { path, .. }
            | Error::Corrupt { path, .. }
            | Error::WrongLength { path, .. }
            | Error::NotInManifest { path }
            | Error::Ended { path, .. }
            | Error::Changed { path, .. }
            | Error::Refused { path, .. }
            | Error::Model { path, .. }
            | Error::TooLarge { path, .. }
            | Error::Selection { path, .. }
            | Error::NoModel { path, .. }
            | Error::Incomplete { path, .. }
            | Error::NotSelected { path, .. }
            | Error::NotLoaded { path, .. } => Some(path),
            Error::DuplicateTensor { first, .. } => Some(first),
            Error::AmbiguousTensor { paths, .. } => paths.first().map(AsRef::as_ref),
            Error::Device(device) => Some(&device.path),
            Error::Share { socket, .. } => Some(socket),
            _ => None,
        }
    }

    /// Offset in the file of the bytes that the error is about.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Error::Read { offset, .. }
            | Error::Rejected { offset, .. }
            | Error::Corrupt { offset, .. }
            | Error::Ended { offset, .. }
            | Error::Refused { offset, .. }
            | Error::Unaligned { offset, .. } => Some(*offset),
            Error::NotLoaded { range, .. } => Some(range.start),
            _ => None,
        }
    }
}

/// The kind of an error that is classified by its errno alone.
fn kind_of(errno: Errno) -> ErrorKind {
    match errno {
        Errno::EACCES | Errno::EPERM => ErrorKind::PermissionDenied,
        Errno::ENOMEM => ErrorKind::OutOfMemory,
        Errno::ENOSYS | Errno::EOPNOTSUPP => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    }
}
