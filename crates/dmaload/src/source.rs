//! Files to read from: opening, what they are, and whether they still are it at the end.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{
    AtFlags, CWD, FileType, FsWord, Mode, OFlags, RawMode, Stat, Statx, StatxFlags, fstat, fstatfs, makedev, open, stat, statx,
};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::model::TensorMap;
use crate::model::index::Index;
use crate::residency::cached_bytes;
use crate::route::Route;

/// A file of a load, and what an index says of it.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) path: Arc<PathBuf>,
    /// The index of a model of several files, and the name that this file has in it.
    pub(crate) index: Option<(Arc<Index>, String)>,
    /// The part of the file that is the model; all of it without.
    pub(crate) part: Option<Range<u64>>,
    /// Where the file was given open: the path is that of this descriptor, as long as it is.
    _file: Option<Arc<OwnedFd>>,
}

/// What a load is asked for.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    Path(PathBuf),
    Open { file: Arc<OwnedFd>, part: Option<Range<u64>> },
}

impl Source {
    pub(crate) fn file(path: PathBuf) -> Self {
        Source { path: Arc::new(path), index: None, part: None, _file: None }
    }

    pub(crate) fn of_index(path: PathBuf, index: Arc<Index>, name: String) -> Self {
        Source { index: Some((index, name)), ..Source::file(path) }
    }

    /// A file that is open. It is opened again, by its descriptor, so that direct reads have a description of their own.
    pub(crate) fn open(file: Arc<OwnedFd>, part: Option<Range<u64>>) -> Self {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        Source { part, _file: Some(file), ..Source::file(path.into()) }
    }

    /// # Errors
    /// [`Error::Model`] for a file that has not the tensors that the index says it has.
    pub(crate) fn check(&self, tensors: Option<&TensorMap>) -> Result<()> {
        let Some((index, name)) = &self.index else { return Ok(()) };
        index.check(name, tensors).map_err(|fault| Error::Model { path: self.path.as_ref().clone(), fault })
    }
}

/// What a file was when the load began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
    pub(crate) bytes: u64,
    modified: (i64, i64),
    /// Whether a longer file is as good. A model has the length that its header says, so one that has grown was
    /// rewritten; raw bytes may have been appended to.
    pub(crate) may_grow: bool,
}

impl Identity {
    fn of(stat: &Stat) -> Self {
        Identity {
            device: stat.st_dev,
            inode: stat.st_ino,
            bytes: u64::try_from(stat.st_size).unwrap_or(0),
            modified: (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0)),
            may_grow: true,
        }
    }

    fn of_statx(status: &Statx) -> Self {
        Identity {
            device: makedev(status.stx_dev_major, status.stx_dev_minor),
            inode: status.stx_ino,
            bytes: status.stx_size,
            modified: (status.stx_mtime.tv_sec, i64::from(status.stx_mtime.tv_nsec)),
            may_grow: true,
        }
    }

    /// Names the mounted file system.
    pub(crate) fn mount(&self) -> u64 {
        self.device
    }

    fn is_same_file(&self, other: &Identity) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// What has become of it, if that can have mixed its bytes. One that grew is taken to have kept the planned ones,
    /// where it may grow at all.
    fn change_to(&self, now: &Identity) -> Option<&'static str> {
        if now.bytes < self.bytes {
            Some("it shrank")
        } else if now.bytes > self.bytes && !self.may_grow {
            Some("it grew")
        } else if now.bytes == self.bytes && now.modified != self.modified {
            Some("it was modified")
        } else {
            None
        }
    }
}

/// An open file.
#[derive(Debug)]
pub(crate) struct OpenFile {
    /// Never used twice: file descriptors are.
    pub(crate) id: u64,
    pub(crate) path: PathBuf,
    pub(crate) identity: Identity,
    /// What direct reads must be aligned to; a power of two, at least a page.
    pub(crate) alignment_bytes: u64,
    /// Whether it is on FUSE, where a ring must not read it directly. After a short answer of the server, io_uring reads
    /// on from where the file position should be, but `fuse_direct_read_iter` (fs/fuse/file.c, seen on Linux 6.18) leaves
    /// the position of such a read at its beginning: the same bytes come twice, and are told as read. And `io_uring_enter`
    /// waits for the server, so that one that hangs would hold up every other load. A file system that can't be asked for
    /// its kind counts: a FUSE server may refuse that, too.
    pub(crate) is_on_fuse: bool,
    buffered: OwnedFd,
    direct: std::result::Result<OwnedFd, Errno>,
}

/// `f_type` of FUSE (linux/magic.h).
const FUSE_SUPER_MAGIC: FsWord = 0x6573_5546;

/// Alignment of direct reads where the file system does not tell: no block device in use has larger blocks.
const DEFAULT_ALIGNMENT_BYTES: u64 = 4096;

impl OpenFile {
    /// Opens a regular file for reading, twice: with `O_DIRECT`, where that is allowed, and through the page cache.
    ///
    /// # Errors
    /// What `open(2)` or `fstat(2)` answered; [`Error::NotAFile`] for everything that is no regular file (opening
    /// does not wait for a writer of a FIFO).
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let failed = |operation| move |errno| Error::File { path: path.to_owned(), operation, errno };
        let buffered = open(path, flags, Mode::empty()).map_err(failed("open"))?;
        let status = fstat(&buffered).map_err(failed("stat"))?;
        if let Some(kind) = kind_of(FileType::from_raw_mode(status.st_mode)) {
            return Err(Error::NotAFile { path: path.to_owned(), kind });
        }
        let identity = Identity::of(&status);
        let direct = open_direct(&buffered, path, flags, &identity);
        if let Err(errno @ (Errno::MFILE | Errno::NFILE)) = direct {
            return Err(failed("open")(errno));
        }
        Ok(Arc::new(OpenFile {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            path: path.to_owned(),
            identity,
            alignment_bytes: alignment(&buffered),
            is_on_fuse: fstatfs(&buffered).map_or(true, |about| about.f_type == FUSE_SUPER_MAGIC),
            buffered,
            direct,
        }))
    }

    /// The descriptor that reads by this route use.
    pub(crate) fn descriptor(&self, route: Route) -> BorrowedFd<'_> {
        match &self.direct {
            Ok(direct) if route.is_direct() => direct.as_fd(),
            _ => self.buffered.as_fd(),
        }
    }

    /// Whether all of it is in the page cache; `false` where that can't be known.
    pub(crate) fn is_wholly_cached(&self) -> bool {
        self.identity.bytes > 0 && cached_bytes(&self.buffered).is_ok_and(|cached| cached >= self.identity.bytes)
    }

    /// Why the file has no direct route.
    pub(crate) fn direct_refused(&self) -> Option<Errno> {
        self.direct.as_ref().err().copied()
    }

    /// Reads exactly `buffer.len()` bytes through the page cache.
    pub(crate) fn read_exact(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
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
                    return Err(Error::Read { path: self.path.clone(), offset: at, bytes, route: Route::Buffered, errno });
                }
            }
        }
        Ok(())
    }

    /// Fails unless this file, and what its path names, are still what was planned.
    ///
    /// A file that was deleted meanwhile is fine: its bytes stay until it is closed.
    pub(crate) fn check_unchanged(&self, planned: &Identity) -> Result<()> {
        let changed = |change| Err(Error::Changed { path: self.path.clone(), change });
        let now = fstat(&self.buffered).map_err(|errno| Error::File { path: self.path.clone(), operation: "stat", errno })?;
        let now = Identity::of(&now);
        if !planned.is_same_file(&now) {
            return changed("it was replaced");
        }
        if let Some(change) = planned.change_to(&now) {
            return changed(change);
        }
        match stat(&self.path) {
            Ok(status) if !planned.is_same_file(&Identity::of(&status)) => changed("it was replaced"),
            _ => Ok(()),
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
        _ => Some("something else"),
    }
}

/// Opens the same file again with `O_DIRECT`: by its descriptor, so that it is the same file even if its path
/// names another by now; by its path, and compared, where there is no procfs.
fn open_direct(buffered: &OwnedFd, path: &Path, flags: OFlags, identity: &Identity) -> std::result::Result<OwnedFd, Errno> {
    use std::os::fd::AsRawFd;
    let flags = flags | OFlags::DIRECT;
    match open(format!("/proc/self/fd/{}", buffered.as_raw_fd()), flags, Mode::empty()) {
        Err(Errno::NOENT) => {
            let direct = open(path, flags, Mode::empty())?;
            let same = identity.is_same_file(&Identity::of(&fstat(&direct)?));
            if same { Ok(direct) } else { Err(Errno::STALE) }
        }
        other => other,
    }
}

/// What a regular file is, without opening it, and the alignment of direct reads of it.
///
/// # Errors
/// What `stat(2)` answered; [`Error::NotAFile`].
pub(crate) fn look_at(path: &Path) -> Result<(Identity, u64)> {
    let failed = |errno| Error::File { path: path.to_owned(), operation: "stat", errno };
    // One call for both: a load of thousands of files looks at all of them before it can plan.
    let told = statx(CWD, path, AtFlags::empty(), StatxFlags::BASIC_STATS | StatxFlags::DIOALIGN);
    let (identity, mode) = match &told {
        Ok(status) => (Identity::of_statx(status), RawMode::from(status.stx_mode)),
        // A sandbox may refuse it.
        Err(Errno::NOSYS | Errno::PERM) => {
            let status = stat(path).map_err(failed)?;
            (Identity::of(&status), status.st_mode)
        }
        Err(errno) => return Err(failed(*errno)),
    };
    match kind_of(FileType::from_raw_mode(mode)) {
        Some(kind) => Err(Error::NotAFile { path: path.to_owned(), kind }),
        None => Ok((identity, alignment_told(told))),
    }
}

fn alignment(file: &OwnedFd) -> u64 {
    alignment_told(statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN))
}

/// `STATX_DIOALIGN` (Linux 6.1) tells the alignment; a first read proves it. Smaller ones are raised to a page.
fn alignment_told(told: rustix::io::Result<Statx>) -> u64 {
    let told = told.ok().filter(|status| status.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
    let told = told.map_or(0, |status| u64::from(status.stx_dio_offset_align.max(status.stx_dio_mem_align)));
    // Memory is mapped and populated in whole pages, which are larger than 4 KiB on some machines.
    let least = DEFAULT_ALIGNMENT_BYTES.max(dmabuf::page_bytes() as u64);
    if told.is_power_of_two() { told.max(least) } else { least }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_is_no_regular_file_is_told_by_its_kind() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        for (path, expected) in
            [(folder.path(), "a directory"), (&fifo, "a FIFO"), (Path::new("/dev/null"), "a character device")]
        {
            let Err(Error::NotAFile { kind, .. }) = OpenFile::open(path) else { panic!("{}", path.display()) };
            assert_eq!(kind, expected);
        }
    }

    #[test]
    fn a_file_is_the_same_when_looked_at_and_when_opened() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, [7; 4097]).unwrap();
        let (looked_at, alignment_bytes) = look_at(file.path()).unwrap();
        let opened = OpenFile::open(file.path()).unwrap();
        assert_eq!((looked_at, alignment_bytes), (opened.identity, opened.alignment_bytes));
    }

    #[test]
    fn growing_and_deleting_are_no_change_but_shrinking_replacing_and_writing_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let write = |bytes: &[u8]| fs::write(&path, bytes).unwrap();
        let opened = || {
            write(b"four");
            let file = fs::File::open(&path).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
            OpenFile::open(&path).unwrap()
        };
        let check = |file: &OpenFile| match file.check_unchanged(&file.identity) {
            Ok(()) => "unchanged",
            Err(Error::Changed { change, .. }) => change,
            Err(other) => panic!("{other}"),
        };
        let file = opened();
        assert_eq!(check(&file), "unchanged");
        write(b"fours");
        assert_eq!(check(&file), "unchanged");
        write(b"for");
        assert_eq!(check(&file), "it shrank");

        let file = opened();
        write(b"FOUR");
        assert_eq!(check(&file), "it was modified");

        let file = opened();
        fs::remove_file(&path).unwrap();
        assert_eq!(check(&file), "unchanged");
        write(b"four");
        assert_eq!(check(&file), "it was replaced");
    }
}
