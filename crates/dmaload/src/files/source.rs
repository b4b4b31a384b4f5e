//! Opens and identifies files, and checks at the end of a load that they are unchanged.

mod cached;

pub(crate) use cached::CachedChunks;

use std::any::Any;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use dmabuf::printable;
use rustix::fs::{
    Advice, AtFlags, CWD, FileType, Mode, OFlags, RawMode, Stat, Statx, StatxAttributes, StatxFlags, fadvise, fcntl_getfl,
    fcntl_setfl, fstat, major, makedev, minor, open, stat, statx,
};
use rustix::io::Errno;

use super::names::is_pickle_name;
use crate::error::{Error, Result};
use crate::files::file_system::{Device, Trust, trust};
use crate::model::TensorMap;
use crate::model::index::Index;
use crate::route::{Attempt, Route};
use crate::support::errno;
use crate::support::foreign;

/// A file in a load, and its entry in an index if it has one.
#[derive(Debug, Clone)]
pub(crate) struct SourceFile {
    pub(crate) path: Arc<PathBuf>,
    /// The number of the input through which the file was found, counted from 0. The files of one
    /// input form one model, so at most one of them provides the tensor with a given name.
    pub(crate) model: usize,
    /// The index of a multi-file model, and this file's name in that index; `None` if the model
    /// has no index.
    pub(crate) index: Option<(Arc<Index>, String)>,
    /// The byte range of the file that contains the model; `None` for the whole file.
    pub(crate) part: Option<Range<u64>>,
}

/// One of the caller's inputs: a path, a byte range of the file at a path, or an open file.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    Path(PathBuf),
    /// A model in a byte range of the file at this path.
    Inside {
        path: PathBuf,
        part: Range<u64>,
    },
    Open {
        file: Arc<OwnedFd>,
        part: Option<Range<u64>>,
    },
}

impl SourceFile {
    pub(crate) fn file(path: PathBuf) -> Self {
        SourceFile { path: Arc::new(path), model: 0, index: None, part: None }
    }

    pub(crate) fn of_index(path: PathBuf, index: Arc<Index>, name: String) -> Self {
        SourceFile { index: Some((index, name)), ..SourceFile::file(path) }
    }

    /// A model in a byte range of a file, regardless of the file's name.
    pub(crate) fn part(path: PathBuf, part: Range<u64>) -> Self {
        SourceFile { part: Some(part), ..SourceFile::file(path) }
    }

    /// A file that the caller passed as an open descriptor. It is opened again through this
    /// descriptor, because direct reads need their own open file description. Its path, below
    /// `/proc/self/fd`, is valid only while the descriptor is open.
    pub(crate) fn open(file: &OwnedFd, part: Option<Range<u64>>) -> Self {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        SourceFile { part, ..SourceFile::file(path.into()) }
    }

    /// The file's index, and the folder of that index.
    pub(crate) fn index_in_folder(&self) -> Option<(PathBuf, Arc<Index>)> {
        let (index, name) = self.index.as_ref()?;
        let folder = self.path.ancestors().nth(Path::new(name).components().count())?;
        Some((folder.to_owned(), Arc::clone(index)))
    }

    /// Whether a tensor with this name in this file belongs to the model. That is not the case if
    /// the index maps the name to another file.
    pub(crate) fn owns(&self, tensor: &str) -> bool {
        self.index.as_ref().is_none_or(|(index, name)| index.file_of(tensor).is_none_or(|file| file == name))
    }

    /// Checks the file's tensors against its index.
    ///
    /// # Errors
    /// [`Error::Model`] if the file lacks tensors that the index lists for it; [`Error::NoModel`]
    /// if it has pickled weights.
    pub(crate) fn check(&self, tensors: Option<&TensorMap>) -> Result<()> {
        let Some((index, name)) = &self.index else { return Ok(()) };
        if tensors.is_none() && is_pickle_name(name) {
            let reason =
                "the index lists this file of pickled weights, which are not supported: convert the model to safetensors";
            return Err(Error::NoModel { path: self.path.as_ref().clone(), reason: reason.to_owned() });
        }
        index.check(name, tensors).map_err(|fault| Error::Model { path: self.path.as_ref().clone(), fault })
    }
}

/// Converts an I/O error about a path to [`Error::File`].
pub(super) fn file_error(path: &Path, operation: &'static str, error: &io::Error) -> Error {
    let errno = dmabuf::Errno::from_io_error(error).unwrap_or(dmabuf::Errno::EIO);
    Error::File { path: path.to_owned(), operation, errno }
}

fn stat_error(path: &Path, errno: Errno) -> Error {
    Error::File { path: path.to_owned(), operation: "stat", errno: errno::from_rustix(errno) }
}

/// Identifies the version of a file that a load began with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
    pub(crate) bytes: u64,
    modified: (i64, i64),
}

impl Identity {
    fn from_stat(stat: &Stat) -> Self {
        Identity {
            device: stat.st_dev,
            inode: stat.st_ino,
            bytes: u64::try_from(stat.st_size).expect("a file's length should not be negative"),
            modified: (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0)),
        }
    }

    fn from_statx(status: &Statx) -> Self {
        Identity {
            device: makedev(status.stx_dev_major, status.stx_dev_minor),
            inode: status.stx_ino,
            bytes: status.stx_size,
            modified: (status.stx_mtime.tv_sec, i64::from(status.stx_mtime.tv_nsec)),
        }
    }

    /// The device number of the file system, which identifies it while it is mounted.
    pub(crate) fn mount(&self) -> u64 {
        self.device
    }

    fn is_same_file(&self, other: &Identity) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Describes how the file changed, if its bytes may now be a mix of versions; `None` if it did
    /// not change. A file that grew was either appended to or rewritten. The two can't be told
    /// apart, so both count as a change.
    fn describe_change(&self, now: &Identity) -> Option<&'static str> {
        if now.bytes < self.bytes {
            Some("it shrank")
        } else if now.bytes > self.bytes {
            Some("it grew")
        } else if now.modified != self.modified {
            Some("it was modified")
        } else {
            None
        }
    }
}

/// A file's attributes.
#[derive(Debug, Clone, Copy)]
struct Attributes {
    identity: Identity,
    file_type: FileType,
    alignment_bytes: u64,
    device: Device,
    /// Whether `statx(2)` was refused. If so, these attributes may come from a cache.
    from_cache: bool,
}

/// Makes network and FUSE file systems query their servers. Otherwise they may answer from a cache
/// that is minutes old, and a file that is rewritten during its load may seem unchanged. The first
/// call needs the flag, too; otherwise a change before the load would seem to happen during it.
/// Local file systems ignore the flag.
const QUERY_SERVER: AtFlags = AtFlags::STATX_FORCE_SYNC;

impl Attributes {
    /// All attributes that a load needs, so one call for each file suffices: a load may inspect
    /// thousands of files before it can plan.
    const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::DIOALIGN);

    fn at_path(path: &Path) -> rustix::io::Result<Self> {
        Attributes::from_statx_or(statx(CWD, path, QUERY_SERVER, Self::WANTED), || stat(path))
    }

    fn at_file(file: &OwnedFd) -> rustix::io::Result<Self> {
        Attributes::from_statx_or(statx(file, c"", QUERY_SERVER | AtFlags::EMPTY_PATH, Self::WANTED), || fstat(file))
    }

    fn from_statx_or(
        seen: rustix::io::Result<Statx>,
        stat: impl FnOnce() -> rustix::io::Result<Stat>,
    ) -> rustix::io::Result<Self> {
        match seen {
            Ok(seen) => Ok(Attributes {
                identity: Identity::from_statx(&seen),
                file_type: FileType::from_raw_mode(RawMode::from(seen.stx_mode)),
                alignment_bytes: alignment(Some(&seen)),
                device: Device {
                    major: seen.stx_dev_major,
                    minor: seen.stx_dev_minor,
                    reports_compression: seen.stx_attributes_mask.contains(StatxAttributes::COMPRESSED),
                    reports_verity: seen.stx_attributes_mask.contains(StatxAttributes::VERITY),
                    is_dax: seen.stx_attributes.contains(StatxAttributes::DAX),
                },
                from_cache: false,
            }),
            // A sandbox may refuse statx.
            Err(Errno::NOSYS | Errno::PERM) => {
                let seen = stat()?;
                Ok(Attributes {
                    identity: Identity::from_stat(&seen),
                    file_type: FileType::from_raw_mode(seen.st_mode),
                    alignment_bytes: alignment(None),
                    device: Device {
                        major: major(seen.st_dev),
                        minor: minor(seen.st_dev),
                        reports_compression: false,
                        reports_verity: false,
                        is_dax: false,
                    },
                    from_cache: true,
                })
            }
            Err(errno) => Err(errno),
        }
    }
}

/// A regular file that is open for buffered reads and, if possible, for direct reads.
#[derive(Debug)]
pub(crate) struct OpenFile {
    /// A number that is never reused, unlike a file descriptor.
    pub(crate) id: u64,
    pub(crate) path: PathBuf,
    pub(crate) identity: Identity,
    /// The alignment of direct reads: a power of two, and at least a page.
    pub(crate) alignment_bytes: u64,
    /// Why a ring must not read the file; see [`crate::files::file_system`].
    pub(crate) ring_refused: Option<(Attempt, Errno)>,
    buffered_ring_refused: Option<(Attempt, Errno)>,
    /// Whether the page cache is as trustworthy as storage.
    cache_is_witness: bool,
    /// Whether direct reads are copies from memory, made by the thread that submits them.
    pub(crate) in_memory: bool,
    /// Whether readahead is off for `buffered`.
    is_quiet: AtomicBool,
    buffered: OwnedFd,
    direct: std::result::Result<OwnedFd, Errno>,
    /// The permit to keep the file open, if it needs one. Declared last, so it is dropped after
    /// the descriptors are closed.
    place: OnceLock<Box<dyn Any + Send + Sync>>,
}

/// Minimum alignment of direct reads, which is also assumed if the file system reports none: block
/// devices with larger blocks are rare.
const DEFAULT_ALIGNMENT_BYTES: u64 = 4096;

impl OpenFile {
    /// Keeps `place`, the permit to have the file open, until the file is closed. A file needs
    /// only one such permit, so `place` is dropped if the file already has one.
    pub(crate) fn hold(&self, place: impl Any + Send + Sync) {
        drop(self.place.set(Box::new(place)));
    }

    /// Opens a regular file for reading, twice: once for reads through the page cache and, unless
    /// the file system refuses it, once with `O_DIRECT`.
    ///
    /// # Errors
    /// The error of `open(2)` or `statx(2)`. If the file's reported length is 0, also the error of
    /// reading a byte.
    ///
    /// [`Error::NotAFile`] for anything but a regular file. Such a file is not opened for reading,
    /// because opening a FIFO would wait for a writer, and opening a device can have side effects.
    ///
    /// [`Error::NoLength`] for a file that has bytes although its reported length is 0.
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let failed = |operation| move |errno| Error::File { path: path.to_owned(), operation, errno: errno::from_rustix(errno) };
        let found = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed("open"))?;
        let status = fstat(&found).map_err(failed("stat"))?;
        if let Some(kind) = kind_of(FileType::from_raw_mode(status.st_mode)) {
            return Err(Error::NotAFile { path: path.to_owned(), kind });
        }
        let buffered = reopen(&found, path, OFlags::empty()).map_err(failed("open"))?;
        // Close this descriptor now, because the limits on open files assume two descriptors for
        // each file.
        drop(found);
        let look = Attributes::at_file(&buffered).map_err(failed("stat"))?;
        let direct = reopen(&buffered, path, OFlags::DIRECT);
        if let Err(errno @ (Errno::MFILE | Errno::NFILE)) = direct {
            return Err(failed("open")(errno));
        }
        let Trust { ring_refused, buffered_ring_refused, cache, in_memory } = trust(&buffered, look.device);
        // Reading a header or checking what is cached must not start readahead. A file that a ring
        // must not read may be on a server; for such a file, readahead is worthwhile.
        let is_quiet = ring_refused.is_none() && fadvise(&buffered, 0, None, Advice::Random).is_ok();
        if look.from_cache && ring_refused.is_some() {
            let path = printable::path(path);
            foreign::emit(|| {
                tracing::warn!(%path, "statx was refused: a change to the file may go unnoticed while its attributes are cached");
            });
        }
        let file = OpenFile {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            path: path.to_owned(),
            identity: look.identity,
            alignment_bytes: look.alignment_bytes,
            ring_refused,
            buffered_ring_refused,
            cache_is_witness: cache && !look.from_cache,
            in_memory,
            is_quiet: AtomicBool::new(is_quiet),
            buffered,
            direct,
            place: OnceLock::new(),
        };
        if file.identity.bytes == 0 && file.has_a_byte()? {
            return Err(Error::NoLength { path: path.to_owned() });
        }
        Ok(Arc::new(file))
    }

    /// Whether the file has any bytes, regardless of its reported length. If a read would block,
    /// as on `/proc/kmsg`, the file is assumed to have bytes.
    fn has_a_byte(&self) -> Result<bool> {
        let read = set_nonblocking(&self.buffered, true).and_then(|()| {
            loop {
                match rustix::io::pread(&self.buffered, &mut [0_u8], 0) {
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break Ok(true),
                    read => break read.map(|bytes| bytes > 0),
                }
            }
        });
        let failed = |errno| self.read_error(0, 1, errno);
        read.and_then(|has| set_nonblocking(&self.buffered, false).map(|()| has)).map_err(failed)
    }

    /// The error for a failed read through the page cache.
    fn read_error(&self, offset: u64, bytes: u64, errno: Errno) -> Error {
        let errno = errno::from_rustix(errno);
        Error::Read { path: self.path.clone(), offset, bytes, route: Route::Buffered, errno }
    }

    /// Why a ring must not read the file through this route; `None` if it may.
    pub(crate) fn ring_refused_to(&self, route: Route) -> Option<(Attempt, Errno)> {
        if route == Route::UringBuffered { self.buffered_ring_refused } else { self.ring_refused }
    }

    /// The descriptor for reads through this route.
    pub(crate) fn descriptor(&self, route: Route) -> BorrowedFd<'_> {
        match &self.direct {
            Ok(direct) if route.is_direct() => direct.as_fd(),
            // The ring reads ranges in any order, so readahead would not help.
            _ if route == Route::UringBuffered => self.buffered.as_fd(),
            _ => {
                self.read_ahead();
                self.buffered.as_fd()
            }
        }
    }

    /// Enables readahead, because the file's contents are read through the page cache from now on.
    fn read_ahead(&self) {
        if self.is_quiet.swap(false, Ordering::Relaxed) {
            // This is only a hint: if it fails, reads are slower but still correct.
            let _ = fadvise(&self.buffered, 0, None, Advice::Normal);
        }
    }

    /// The errno with which `O_DIRECT` was refused; `None` if it was not.
    pub(crate) fn direct_refused(&self) -> Option<Errno> {
        self.direct.as_ref().err().copied()
    }

    /// Reads exactly `buffer.len()` bytes through the page cache.
    pub(crate) fn read_exact(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        // If settling fails, these bytes are as reliable as those of any buffered read, and
        // `cached` copies nothing from the cache.
        let _ = self.settle(&(offset..offset + buffer.len() as u64));
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            match rustix::io::pread(&self.buffered, &mut buffer[done..], at) {
                Ok(0) => {
                    let planned_bytes = self.identity.bytes;
                    return Err(Error::Ended { path: self.path.clone(), offset: at, planned_bytes, route: Route::Buffered });
                }
                Ok(bytes) => done += bytes,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => {
                    let bytes = (buffer.len() - done) as u64;
                    return Err(self.read_error(at, bytes, errno));
                }
            }
        }
        Ok(())
    }

    /// Fails unless the open file is still the planned version and its path does not lead to
    /// another file.
    ///
    /// It is not an error if the path no longer exists or can't be inspected, because the file's
    /// bytes stay available until the file is closed.
    pub(crate) fn check_unchanged(&self, planned: &Identity) -> Result<()> {
        let changed = |change| Err(Error::Changed { path: self.path.clone(), change });
        let now = Attributes::at_file(&self.buffered);
        let now = now.map_err(|errno| stat_error(&self.path, errno))?.identity;
        if !planned.is_same_file(&now) {
            return changed("it was replaced");
        }
        if let Some(change) = planned.describe_change(&now) {
            return changed(change);
        }
        match stat(&self.path) {
            Ok(status) if !planned.is_same_file(&Identity::from_stat(&status)) => changed("it was replaced"),
            _ => Ok(()),
        }
    }

    /// Fails if the file continues beyond its planned end. This is checked only on file systems
    /// that may report a wrong length, such as network file systems. On local ones, reads end at
    /// the reported length.
    pub(crate) fn check_end(&self, planned: &Identity) -> Result<()> {
        // An empty file was checked when it was opened.
        if self.ring_refused.is_none() || planned.bytes == 0 {
            return Ok(());
        }
        let read = loop {
            match rustix::io::pread(&self.buffered, &mut [0_u8], planned.bytes) {
                Err(Errno::INTR | Errno::AGAIN) => {}
                read => break read,
            }
        };
        match read {
            Ok(0) => Ok(()),
            // The file may have grown in the meantime.
            Ok(_) => Err(self.blame_change(planned, Error::Longer { path: self.path.clone(), stated_bytes: planned.bytes })),
            Err(errno) => Err(self.read_error(planned.bytes, 1, errno)),
        }
    }

    /// Fails unless the file ends at its reported length. This is checked only on file systems
    /// that may report a wrong length. It is meant for callers that read only the header: a load
    /// notices a wrong length because it reads everything.
    pub(crate) fn check_length(&self) -> Result<()> {
        let planned_bytes = self.identity.bytes;
        if self.ring_refused.is_none() || planned_bytes == 0 {
            return Ok(());
        }
        let has_byte_at = |offset| match self.read_exact(&mut [0], offset) {
            Ok(()) => Ok(true),
            Err(Error::Ended { .. }) => Ok(false),
            Err(error) => Err(error),
        };
        if has_byte_at(planned_bytes - 1)? {
            return self.check_end(&self.identity);
        }
        // Find the real end by binary search: the first offset without a byte.
        let (mut start, mut end) = (0, planned_bytes - 1);
        while start < end {
            let middle = start.midpoint(end);
            if has_byte_at(middle)? {
                start = middle + 1;
            } else {
                end = middle;
            }
        }
        Err(Error::Ended { path: self.path.clone(), offset: end, planned_bytes, route: Route::Buffered })
    }

    /// Returns [`Error::Changed`] instead of `error` if the file has changed since `planned` was
    /// recorded, because a file that is being rewritten may look damaged.
    pub(crate) fn blame_change(&self, planned: &Identity, error: Error) -> Error {
        match self.check_unchanged(planned) {
            Err(changed @ Error::Changed { .. }) => changed,
            _ => error,
        }
    }
}

fn kind_of(file_type: FileType) -> Option<&'static str> {
    match file_type {
        FileType::RegularFile => None,
        FileType::Directory => Some("a directory"),
        FileType::Fifo => Some("a FIFO"),
        FileType::Socket => Some("a socket"),
        FileType::CharacterDevice => Some("a character device"),
        FileType::BlockDevice => Some("a block device"),
        _ => Some("a file of unknown type"),
    }
}

/// Opens a regular file again through its descriptor, so it is the same file even if its path now
/// names another. Without procfs, opens the file at the path and checks that it is the same one.
///
/// The new open file description must not have `O_NONBLOCK`. Otherwise io_uring calls file systems
/// without `FMODE_NOWAIT` on the ring thread, which then blocks. After a short read, io_uring may
/// then also return wrong bytes (see docs/kernels.md).
fn reopen(found: &OwnedFd, path: &Path, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    use std::os::fd::AsRawFd;
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
    match open(format!("/proc/self/fd/{}", found.as_raw_fd()), flags, Mode::empty()) {
        // Procfs is missing or inaccessible. If the file itself can't be opened, opening it by
        // path fails with the same error.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS | Errno::PERM) => reopen_by_path(found, path, flags),
        other => other,
    }
}

fn reopen_by_path(found: &OwnedFd, path: &Path, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    // The path may now name a FIFO without a writer, so the call must not block.
    let file = open(path, flags | OFlags::NONBLOCK, Mode::empty())?;
    if !Identity::from_stat(&fstat(found)?).is_same_file(&Identity::from_stat(&fstat(&file)?)) {
        return Err(Errno::STALE);
    }
    set_nonblocking(&file, false)?;
    Ok(file)
}

fn set_nonblocking(file: &OwnedFd, nonblocking: bool) -> rustix::io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::NONBLOCK, nonblocking);
    fcntl_setfl(file, flags)
}

/// Identifies a regular file without opening it, and returns the alignment of direct reads.
///
/// # Errors
/// The error of `statx(2)`; [`Error::NotAFile`].
pub(crate) fn identify(path: &Path) -> Result<(Identity, u64)> {
    let look = Attributes::at_path(path);
    let look = look.map_err(|errno| stat_error(path, errno))?;
    match kind_of(look.file_type) {
        Some(kind) => Err(Error::NotAFile { path: path.to_owned(), kind }),
        None => Ok((look.identity, look.alignment_bytes)),
    }
}

/// The alignment that `STATX_DIOALIGN` reports (Linux 6.1 or later), but at least
/// [`DEFAULT_ALIGNMENT_BYTES`] and a page. The first direct read shows whether it suffices.
fn alignment(seen: Option<&Statx>) -> u64 {
    let seen = seen.filter(|seen| seen.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let aligned = seen.map_or(0, |seen| u64::from(seen.stx_dio_offset_align.max(seen.stx_dio_mem_align)));
    // Memory is mapped and populated in whole pages, which are larger than 4 KiB on some machines.
    let least = DEFAULT_ALIGNMENT_BYTES.max(dmabuf::page_bytes() as u64);
    if aligned.is_power_of_two() { aligned.max(least) } else { least }
}

#[cfg(test)]
mod tests;
