//! The FUSE file system that these tests mount, and overlays on top of it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, MountOption,
    OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, Request,
};

use crate::BYTES;
use crate::attributes::attributes;
use crate::common::{folder, random_bytes};

/// Looking up this name silences a server with [`Manners::NeverAnswersAfterSilence`].
pub(crate) const SILENCE: &str = "silence";
const MODEL: INodeNo = INodeNo(2);
/// With this lifetime, the kernel caches no attributes. Otherwise, it would keep the shortened
/// length after a short read.
const UNCACHED: Duration = Duration::ZERO;
/// With this lifetime, the kernel caches attributes for a minute. sshfs and network file systems
/// also allow it to cache attributes.
const CACHED: Duration = Duration::from_mins(1);

/// How the server misbehaves.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Manners {
    /// Accepts `O_DIRECT` when a file is opened, but fails direct reads with EINVAL.
    RefusesDirect,
    /// Returns at most this many bytes per read.
    AnswersShort(usize),
    /// Returns no bytes from this offset on, although the length it reports is larger.
    EndsAt(usize),
    /// Fails reads that extend past this offset with EIO.
    FailsAt(usize),
    /// Does not answer direct reads.
    NeverAnswers,
    /// Does not answer reads once [`SILENCE`] has been looked up in its folder.
    NeverAnswersAfterSilence,
    /// Fails `statfs`, which would identify the file system.
    RefusesStatfs,
    /// Returns at most this many bytes per read, and always bypasses the page cache, so the kernel
    /// does not shorten the file.
    AnswersShortPastTheCache(usize),
    /// Lets the kernel cache attributes, and rewrites the file when a read extends past this
    /// offset.
    IsRewrittenAt(usize),
    /// Does not answer requests for attributes once the file has been read from.
    NeverSendsAttributes,
    /// Takes 20 ms for each read, and handles one read at a time.
    AnswersLate,
    /// Takes this long for each read, but handles reads concurrently, as a distant server does.
    AnswersFromAfar(Duration),
    /// Lets the kernel keep the file's cached pages when the file is opened again. A rewrite does
    /// not change the modification time.
    KeepsCache,
    /// Reports a length of 0, as procfs does for files that it generates while they are read.
    HasNoLength,
    /// Reports this length, although the file has more bytes.
    StatesLength(usize),
}

pub(crate) struct Model {
    pub(crate) bytes: Arc<Vec<u8>>,
    /// The bytes after the rewrite.
    pub(crate) other_bytes: Arc<Vec<u8>>,
    pub(crate) rewritten: Arc<AtomicBool>,
    pub(crate) was_read: AtomicBool,
    pub(crate) is_silent: AtomicBool,
    pub(crate) manners: Manners,
    pub(crate) open_files: Arc<AtomicUsize>,
    /// The ids of the threads that closed the file.
    pub(crate) closers: Arc<Mutex<Vec<u32>>>,
    pub(crate) reads: Arc<PendingReads>,
}

/// The number of unanswered reads, and its maximum so far, for [`Manners::AnswersFromAfar`].
#[derive(Debug, Default)]
pub(crate) struct PendingReads {
    pub(crate) now: AtomicUsize,
    pub(crate) most: AtomicUsize,
}

impl Model {
    pub(crate) fn attributes(&self, inode: INodeNo) -> FileAttr {
        let file_bytes = match self.manners {
            _ if inode != MODEL => None,
            Manners::StatesLength(bytes) => Some(bytes as u64),
            Manners::HasNoLength => Some(0),
            _ => Some(self.bytes.len() as u64),
        };
        let rewritten = self.rewritten.load(Ordering::SeqCst) && !matches!(self.manners, Manners::KeepsCache);
        FileAttr { mtime: UNIX_EPOCH + Duration::from_secs(rewritten.into()), ..attributes(inode, file_bytes) }
    }
}

impl Model {
    pub(crate) fn new(bytes: usize, manners: Manners) -> Model {
        Model::holding([5, 6].map(|seed| random_bytes(bytes, seed)), manners)
    }

    pub(crate) fn holding([bytes, other_bytes]: [Vec<u8>; 2], manners: Manners) -> Model {
        Model {
            bytes: Arc::new(bytes),
            other_bytes: Arc::new(other_bytes),
            rewritten: Arc::default(),
            was_read: AtomicBool::new(false),
            is_silent: AtomicBool::new(false),
            manners,
            open_files: Arc::default(),
            closers: Arc::default(),
            reads: Arc::default(),
        }
    }

    /// Returns how long the kernel may cache attributes.
    pub(crate) fn time_to_live(&self) -> &Duration {
        if matches!(self.manners, Manners::IsRewrittenAt(_) | Manners::NeverSendsAttributes) { &CACHED } else { &UNCACHED }
    }
}

impl Filesystem for Model {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "model.bin" {
            reply.entry(self.time_to_live(), &self.attributes(MODEL), Generation(0));
        } else {
            if name == SILENCE {
                self.is_silent.store(true, Ordering::SeqCst);
            }
            reply.error(fuser::Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if matches!(self.manners, Manners::NeverSendsAttributes) && self.was_read.load(Ordering::SeqCst) {
            return std::mem::forget(reply);
        }
        reply.attr(self.time_to_live(), &self.attributes(inode));
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        if matches!(self.manners, Manners::RefusesStatfs) {
            // Servers that do not implement `statfs` return this error. The type of the file
            // system then cannot be determined.
            reply.error(fuser::Errno::ENOSYS);
        } else {
            reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
        }
    }

    fn open(&self, _: &Request, _: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.open_files.fetch_add(1, Ordering::SeqCst);
        // Bypass the page cache if the reader or `manners` requests that, so the reader sees short
        // reads.
        let always =
            matches!(self.manners, Manners::AnswersShortPastTheCache(_) | Manners::HasNoLength | Manners::StatesLength(_));
        let is_direct = always || flags.0 & libc::O_DIRECT != 0;
        let mut answer = if is_direct { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::empty() };
        if matches!(self.manners, Manners::KeepsCache) {
            answer |= FopenFlags::FOPEN_KEEP_CACHE;
        }
        reply.opened(FileHandle(0), answer);
    }

    fn flush(&self, request: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.closers.lock().unwrap().push(request.pid());
        reply.ok();
    }

    fn release(&self, _: &Request, _: INodeNo, _: FileHandle, _: OpenFlags, _: Option<LockOwner>, _: bool, reply: ReplyEmpty) {
        self.open_files.fetch_sub(1, Ordering::SeqCst);
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.was_read.store(true, Ordering::SeqCst);
        let start = usize::try_from(offset).unwrap().min(self.bytes.len());
        let mut end = (start + size as usize).min(self.bytes.len());
        match self.manners {
            Manners::RefusesDirect if flags.0 & libc::O_DIRECT != 0 => return reply.error(fuser::Errno::EINVAL),
            Manners::FailsAt(at) if end > at => return reply.error(fuser::Errno::EIO),
            Manners::AnswersLate => std::thread::sleep(Duration::from_millis(20)),
            Manners::AnswersShort(most) | Manners::AnswersShortPastTheCache(most) => end = end.min(start + most),
            Manners::IsRewrittenAt(at) if end > at => self.rewritten.store(true, Ordering::SeqCst),
            // Dropping the reply would answer with EIO.
            Manners::NeverAnswers if flags.0 & libc::O_DIRECT != 0 => return std::mem::forget(reply),
            Manners::NeverAnswersAfterSilence if self.is_silent.load(Ordering::SeqCst) => return std::mem::forget(reply),
            Manners::EndsAt(at) => end = end.min(at.max(start)),
            Manners::AnswersFromAfar(after) => {
                let (bytes, reads) = (Arc::clone(&self.bytes), Arc::clone(&self.reads));
                reads.most.fetch_max(1 + reads.now.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
                std::thread::spawn(move || {
                    std::thread::sleep(after);
                    reads.now.fetch_sub(1, Ordering::SeqCst);
                    reply.data(&bytes[start..end]);
                });
                return;
            }
            _ => {}
        }
        let bytes = if self.rewritten.load(Ordering::SeqCst) { &self.other_bytes } else { &self.bytes };
        reply.data(&bytes[start..end]);
    }
}

pub(crate) fn may_mount() -> bool {
    let may = rustix::process::geteuid().is_root() && std::path::Path::new("/dev/fuse").exists();
    if !may {
        eprintln!("skipped: mounting needs root and /dev/fuse");
    }
    may
}

pub(crate) fn read_only() -> Config {
    let mut config = Config::default();
    config.mount_options = vec![MountOption::RO, MountOption::FSName("dmaload-test".to_owned())];
    config
}

/// A mounted [`Model`], which is unmounted on drop.
pub(crate) struct Mounted {
    pub(crate) path: PathBuf,
    pub(crate) bytes: Arc<Vec<u8>>,
    pub(crate) other_bytes: Arc<Vec<u8>>,
    pub(crate) rewritten: Arc<AtomicBool>,
    pub(crate) open_files: Arc<AtomicUsize>,
    pub(crate) closers: Arc<Mutex<Vec<u32>>>,
    pub(crate) reads: Arc<PendingReads>,
    pub(crate) session: Option<BackgroundSession>,
    pub(crate) _folder: tempfile::TempDir,
}

impl Mounted {
    /// Mounts a model of [`BYTES`] random bytes. Returns `None` if this process cannot mount.
    pub(crate) fn new(manners: Manners) -> Option<Mounted> {
        Mounted::with_bytes(BYTES, manners)
    }

    pub(crate) fn with_bytes(bytes: usize, manners: Manners) -> Option<Mounted> {
        Mounted::serving(Model::new(bytes, manners))
    }

    pub(crate) fn serving(model: Model) -> Option<Mounted> {
        if !may_mount() {
            return None;
        }
        let folder = folder();
        Some(Mounted {
            path: folder.path().join("model.bin"),
            bytes: Arc::clone(&model.bytes),
            other_bytes: Arc::clone(&model.other_bytes),
            rewritten: Arc::clone(&model.rewritten),
            open_files: Arc::clone(&model.open_files),
            closers: Arc::clone(&model.closers),
            reads: Arc::clone(&model.reads),
            session: Some(fuser::spawn_mount(model, folder.path(), &read_only()).unwrap()),
            _folder: folder,
        })
    }

    pub(crate) fn folder(&self) -> &Path {
        self.path.parent().unwrap()
    }
}

/// An overlayfs on top of another file system.
pub(crate) struct Overlay {
    pub(crate) path: PathBuf,
    pub(crate) folder: tempfile::TempDir,
}

impl Overlay {
    pub(crate) fn over(lower: &Path) -> Overlay {
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        for name in ["empty", "merged"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        let options = format!("ro,lowerdir={}:{}", lower.display(), at("empty").display());
        let mounted = Command::new("mount").args(["-t", "overlay", "-o", &options, "overlay"]).arg(at("merged")).status();
        assert!(mounted.is_ok_and(|status| status.success()), "cannot mount an overlay over {}", lower.display());
        Overlay { path: at("merged").join("model.bin"), folder }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.folder.path().join("merged")).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The kernel closes the files of a closed ring asynchronously.
        let start = Instant::now();
        while self.open_files.load(Ordering::SeqCst) > 0 && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(2));
        }
        let left = self.open_files.load(Ordering::SeqCst);
        if left > 0 {
            // A forced unmount aborts the connection. Otherwise a hanging read could keep this
            // process, which is its own server, alive forever.
            let _ = Command::new("umount").args(["-f", "-l"]).arg(self.folder()).status();
        }
        let ended = self.session.take().unwrap().umount_and_join();
        assert!(left == 0 && ended.is_ok() || std::thread::panicking(), "files still open: {left}; unmounted: {ended:?}");
    }
}
