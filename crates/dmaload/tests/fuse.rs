//! A file system that misbehaves on request, under the real kernel: FUSE, served by the test itself,
//! also below a real overlayfs. It opens files with `O_DIRECT` and refuses the first read, answers
//! short, with nothing, or not at all, and fails; it lets attributes be cached and rewrites the file.
//!
//! Only root can mount; elsewhere these tests say that they are skipped.
#![allow(clippy::disallowed_methods, reason = "what is shown here has names of its own making only")]
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]
#![allow(clippy::print_stderr, reason = "what is skipped is told")]

mod common;

use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, UNIX_EPOCH};

use common::{ROUTES, assert_same, folder, random_bytes};
use dmaload::{Attempt, Error, Format, Loader, LoaderBuilder, Route};
use dmaload_testing::served::{ServedFolder, folder_to_serve};
use fuser::{
    BackgroundSession, Config, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, Request,
};
use rustix::io::Errno;

const SEGMENT: usize = 2 << 20;
const BYTES: usize = 4 * SEGMENT + 777;
/// The page cache would take a short answer for the end of the file, and fill up with zeros.
const DIRECT_ROUTES: [Route; 4] = [Route::UringFixedDirect, Route::UringDirect, Route::PreadDirect, Route::Bounce];
const MODEL: INodeNo = INodeNo(2);
/// The kernel asks for the length each time: a short answer makes it believe that the file ends there.
const ASK_AGAIN: Duration = Duration::ZERO;
/// As with sshfs and network file systems, the kernel does not ask for attributes for a minute.
const CACHED: Duration = Duration::from_mins(1);

/// What the file system does with a read.
#[derive(Debug, Clone, Copy)]
enum Manners {
    /// EINVAL for a read through a descriptor with `O_DIRECT`, which opened well.
    RefusesDirect,
    /// At most so many bytes at once.
    AnswersShort(usize),
    /// Nothing from here on, though the file is said to be longer.
    EndsAt(usize),
    /// EIO for a read that reaches this offset.
    FailsAt(usize),
    /// No answer at all to a direct read.
    NeverAnswers,
    /// `statfs`, which would identify the file system, fails.
    RefusesStatfs,
    /// At most so many bytes at once, always past the page cache: the file keeps its length.
    AnswersShortPastTheCache(usize),
    /// Attributes may be cached, and the file is rewritten when a read reaches this offset.
    IsRewrittenAt(usize),
    /// Attributes are not answered for once the file was read from.
    NeverTells,
    /// Each read takes 20 ms, and all others wait for it.
    AnswersLate,
    /// Each read takes so long, and others are answered meanwhile: a server that is far away.
    AnswersFromAfar(Duration),
    /// The length is given as 0, as of files that are made while they are read.
    HasNoLength,
    /// The length is given as this, and there are more bytes.
    StatesLength(usize),
}

struct Model {
    bytes: Arc<Vec<u8>>,
    /// Its bytes after it was rewritten.
    other_bytes: Arc<Vec<u8>>,
    rewritten: Arc<AtomicBool>,
    was_read: AtomicBool,
    manners: Manners,
    open_files: Arc<AtomicUsize>,
    /// The threads that have closed it.
    closers: Arc<Mutex<Vec<u32>>>,
    asked: Arc<Asked>,
}

/// Reads that are not answered yet: how many there are, and the most that there ever were.
#[derive(Debug, Default)]
struct Asked {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Model {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let is_model = inode == MODEL;
        let has_length = is_model && !matches!(self.manners, Manners::HasNoLength);
        let rewritten = self.rewritten.load(Ordering::SeqCst);
        FileAttr {
            ino: inode,
            size: match self.manners {
                Manners::StatesLength(bytes) if is_model => bytes as u64,
                _ if has_length => self.bytes.len() as u64,
                _ => 0,
            },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH + Duration::from_secs(rewritten.into()),
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_model { FileType::RegularFile } else { FileType::Directory },
            perm: 0o755,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        }
    }
}

impl Model {
    fn new(bytes: usize, manners: Manners) -> Model {
        Model::holding([5, 6].map(|seed| random_bytes(bytes, seed)), manners)
    }

    fn holding([bytes, other_bytes]: [Vec<u8>; 2], manners: Manners) -> Model {
        Model {
            bytes: Arc::new(bytes),
            other_bytes: Arc::new(other_bytes),
            rewritten: Arc::default(),
            was_read: AtomicBool::new(false),
            manners,
            open_files: Arc::default(),
            closers: Arc::default(),
            asked: Arc::default(),
        }
    }

    /// How long the kernel need not ask for attributes.
    fn time_to_live(&self) -> &Duration {
        if matches!(self.manners, Manners::IsRewrittenAt(_) | Manners::NeverTells) { &CACHED } else { &ASK_AGAIN }
    }
}

impl Filesystem for Model {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "model.bin" {
            reply.entry(self.time_to_live(), &self.attributes(MODEL), Generation(0));
        } else {
            reply.error(fuser::Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if matches!(self.manners, Manners::NeverTells) && self.was_read.load(Ordering::SeqCst) {
            return std::mem::forget(reply);
        }
        reply.attr(self.time_to_live(), &self.attributes(inode));
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        if matches!(self.manners, Manners::RefusesStatfs) {
            // Servers without an implementation do this: the kernel then can't report FUSE.
            reply.error(fuser::Errno::ENOSYS);
        } else {
            reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
        }
    }

    fn open(&self, _: &Request, _: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.open_files.fetch_add(1, Ordering::SeqCst);
        // Past the page cache as the reader wishes, so that short answers reach it as they are.
        let always =
            matches!(self.manners, Manners::AnswersShortPastTheCache(_) | Manners::HasNoLength | Manners::StatesLength(_));
        let is_direct = always || flags.0 & libc::O_DIRECT != 0;
        reply.opened(FileHandle(0), if is_direct { FopenFlags::FOPEN_DIRECT_IO } else { FopenFlags::empty() });
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
            // To drop it would answer with EIO.
            Manners::NeverAnswers if flags.0 & libc::O_DIRECT != 0 => return std::mem::forget(reply),
            Manners::EndsAt(at) => end = end.min(at.max(start)),
            Manners::AnswersFromAfar(after) => {
                let (bytes, asked) = (Arc::clone(&self.bytes), Arc::clone(&self.asked));
                asked.most.fetch_max(1 + asked.now.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
                std::thread::spawn(move || {
                    std::thread::sleep(after);
                    asked.now.fetch_sub(1, Ordering::SeqCst);
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

fn may_mount() -> bool {
    let may = rustix::process::geteuid().is_root() && std::path::Path::new("/dev/fuse").exists();
    if !may {
        eprintln!("skipped: mounting needs root and /dev/fuse");
    }
    may
}

fn read_only() -> Config {
    let mut config = Config::default();
    config.mount_options = vec![MountOption::RO, MountOption::FSName("dmaload-test".to_owned())];
    config
}

/// The file system, mounted; unmounted at the end.
struct Mounted {
    path: PathBuf,
    bytes: Arc<Vec<u8>>,
    other_bytes: Arc<Vec<u8>>,
    rewritten: Arc<AtomicBool>,
    open_files: Arc<AtomicUsize>,
    closers: Arc<Mutex<Vec<u32>>>,
    asked: Arc<Asked>,
    session: Option<BackgroundSession>,
    _folder: tempfile::TempDir,
}

impl Mounted {
    /// `None` where only root may mount.
    fn new(manners: Manners) -> Option<Mounted> {
        Mounted::of(BYTES, manners)
    }

    fn of(bytes: usize, manners: Manners) -> Option<Mounted> {
        Mounted::serving(Model::new(bytes, manners))
    }

    fn serving(model: Model) -> Option<Mounted> {
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
            asked: Arc::clone(&model.asked),
            session: Some(fuser::spawn_mount(model, folder.path(), &read_only()).unwrap()),
            _folder: folder,
        })
    }

    fn folder(&self) -> &Path {
        self.path.parent().unwrap()
    }
}

/// A real overlayfs over another file system.
struct Overlay {
    path: PathBuf,
    folder: tempfile::TempDir,
}

impl Overlay {
    fn over(lower: &Path) -> Overlay {
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        for name in ["empty", "merged"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        let options = format!("ro,lowerdir={}:{}", lower.display(), at("empty").display());
        let mounted = Command::new("mount").args(["-t", "overlay", "-o", &options, "overlay"]).arg(at("merged")).status();
        assert!(mounted.is_ok_and(|status| status.success()), "an overlay over {}", lower.display());
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
        // A ring that is gone closes its files a little later.
        let start = Instant::now();
        while self.open_files.load(Ordering::SeqCst) > 0 && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(2));
        }
        let left = self.open_files.load(Ordering::SeqCst);
        if left > 0 {
            // By force, which ends the connection: else a read could wait for ever for the end of its own process.
            let _ = Command::new("umount").args(["-f", "-l"]).arg(self.folder()).status();
        }
        let ended = self.session.take().unwrap().umount_and_join();
        assert!(left == 0 && ended.is_ok() || std::thread::panicking(), "{left} files are still open; {ended:?}");
    }
}

fn loader() -> LoaderBuilder {
    Loader::builder().segment_bytes(SEGMENT as u64)
}

#[tokio::test]
async fn direct_reads_that_are_refused_only_when_they_come_are_stepped_down_from_and_told() {
    let Some(mounted) = Mounted::new(Manners::RefusesDirect) else { return };
    for route in ROUTES {
        let loader = loader().route(route).build().unwrap();
        let image = loader.load(&mounted.path).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes, &route.to_string());
        let report = image.report();
        assert_eq!(report.route, Route::Buffered, "{route}");
        let read_refused = report.fallbacks.iter().any(|step| step.attempt == Attempt::Read && step.errno == Errno::INVAL);
        assert_eq!(read_refused, route != Route::Buffered, "{route}: {:?}", report.fallbacks);
        let strict = loader.load_with([&mounted.path], loader.options().route(route).strict(true)).await;
        match strict {
            Ok(_) => assert_eq!(route, Route::Buffered, "nothing is refused to it"),
            Err(error) => {
                assert!(matches!(error, Error::Refused { errno: Errno::INVAL | Errno::OPNOTSUPP, .. }), "{route}: {error}");
            }
        }
        loader.shutdown().await.unwrap();
    }
}

/// A ring would get the same bytes twice, as if they were different ones (Linux 6.18), so it never
/// reads FUSE, nor what may be FUSE.
#[tokio::test]
async fn a_ring_never_reads_what_may_be_fuse() {
    for (manners, attempt, errno) in [
        (Manners::FailsAt(usize::MAX), Attempt::RingOnFuse, Errno::OPNOTSUPP),
        (Manners::RefusesStatfs, Attempt::RingOnUnknown, Errno::NOSYS),
    ] {
        let Some(mounted) = Mounted::new(manners) else { return };
        read_by_threads(&mounted.path, &mounted.bytes, attempt, errno).await;
        if errno == Errno::OPNOTSUPP {
            let overlay = Overlay::over(mounted.folder());
            read_by_threads(&overlay.path, &mounted.bytes, Attempt::RingOnStacked, errno).await;
            let nested = Overlay::over(overlay.path.parent().unwrap());
            read_by_threads(&nested.path, &mounted.bytes, Attempt::RingOnStacked, errno).await;
        }
    }
}

async fn read_by_threads(path: &Path, bytes: &[u8], attempt: Attempt, errno: Errno) {
    for (route, from, to) in [
        (Route::UringFixedDirect, Route::UringFixedDirect, Route::PreadDirect),
        (Route::UringDirect, Route::UringDirect, Route::PreadDirect),
        // What is bounced stays bounced, and its reads into staging are no ring's.
        (Route::Bounce, Route::UringFixedDirect, Route::Bounce),
    ] {
        let loader = loader().route(route).build().unwrap();
        let image = loader.load(path).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), bytes, &format!("{attempt}, {route}"));
        let report = image.report();
        let steps: Vec<_> = report.fallbacks.iter().map(|step| (step.from, step.to, step.attempt, step.errno)).collect();
        assert_eq!((report.route, steps), (to, vec![(from, Route::PreadDirect, attempt, errno)]), "{route}");
        assert!(report.fallbacks[0].reason().contains("wrong bytes"), "{}", report.fallbacks[0].reason());
        let strict = loader.load_with([path], loader.options().strict(true)).await.unwrap_err();
        let Error::Refused { attempt: refused, errno: told, .. } = strict else { panic!("{route}: {strict}") };
        assert_eq!((refused, told), (attempt, errno), "{route}");
        loader.shutdown().await.unwrap();
    }
}

/// Four threads, which are enough for a disk, would wait for such a server most of the time.
#[tokio::test]
async fn more_threads_read_from_a_server_that_is_far_away() {
    const CHUNK: u64 = 128 << 10;
    let bytes = 64 * SEGMENT + 777;
    let Some(mounted) = Mounted::of(bytes, Manners::AnswersFromAfar(Duration::from_millis(10))) else { return };
    let loader = loader().route(Route::PreadDirect).chunk_bytes(CHUNK).build().unwrap();
    let most = || mounted.asked.most.swap(0, Ordering::SeqCst);
    let small = Mounted::of(SEGMENT, Manners::AnswersFromAfar(Duration::from_millis(10))).unwrap();
    let image = loader.load(&small.path).await.unwrap();
    assert_same(&image.files()[0].bytes().unwrap(), &small.bytes, "small");
    assert_eq!(small.asked.most.load(Ordering::SeqCst), 4, "nothing is known of the server yet");
    for _ in 0..2 {
        let image = loader.load(&mounted.path).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes, "large");
        assert_eq!(image.report().route, Route::PreadDirect);
        let most = most();
        assert!((16..=32).contains(&most), "{most} reads at once");
    }
    // Of two loads each has a part.
    let (one, other) = tokio::join!(loader.load(&mounted.path), loader.load(&mounted.path));
    for image in [one, other] {
        assert_same(&image.unwrap().files()[0].bytes().unwrap(), &mounted.bytes, "beside another one");
    }
    let most = most();
    assert!(most <= 48, "{most} reads at once");
    loader.shutdown().await.unwrap();
}

/// By FUSE's rules a short answer says that the file ends there, and the kernel shortens the file for everybody, in between
/// two reads of ours: whatever it then gives is the file's bytes, or an end that is told.
#[tokio::test]
async fn short_answers_give_the_same_bytes_or_a_clear_end() {
    // Whole blocks, and what no block size divides.
    for most in [4096, 12_288, 100_001, 65_535] {
        let Some(mounted) = Mounted::new(Manners::AnswersShort(most)) else { return };
        for route in DIRECT_ROUTES {
            let loader = loader().route(route).build().unwrap();
            match loader.load(&mounted.path).await {
                Ok(image) => {
                    assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes, &format!("{route}, {most} bytes at once"));
                }
                Err(Error::Ended { .. } | Error::Changed { .. }) => {}
                Err(error) => panic!("{route}, {most} bytes at once: {error}"),
            }
            loader.shutdown().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_file_that_ends_before_its_stated_length_is_an_error() {
    for at in [0, 4096, SEGMENT + 333, 4 * SEGMENT] {
        let Some(mounted) = Mounted::new(Manners::EndsAt(at)) else { return };
        for route in DIRECT_ROUTES {
            let loader = loader().route(route).build().unwrap();
            let error = loader.load(&mounted.path).await.unwrap_err();
            let Error::Ended { offset, planned_bytes, .. } = error else { panic!("{route}, {at}: {error}") };
            assert!(offset >= at as u64, "{route}: {error}");
            assert_eq!(planned_bytes, mounted.bytes.len() as u64);
            loader.shutdown().await.unwrap();
        }
        let inspected = dmaload::inspect(&mounted.path, Format::Raw).unwrap_err();
        let Error::Ended { offset, planned_bytes, .. } = inspected else { panic!("{at}: {inspected}") };
        assert_eq!((offset, planned_bytes), (at as u64, mounted.bytes.len() as u64));
    }
}

#[tokio::test]
async fn an_error_names_the_file_and_where() {
    let at = 2 * SEGMENT + 4096;
    let Some(mounted) = Mounted::new(Manners::FailsAt(at)) else { return };
    for route in ROUTES {
        let loader = loader().route(route).build().unwrap();
        let error = loader.load(&mounted.path).await.unwrap_err();
        let Error::Read { path, offset, bytes, errno, .. } = &error else { panic!("{route}: {error}") };
        assert_eq!((path, *errno), (&mounted.path, Errno::IO), "{route}");
        assert!(offset + bytes > at as u64, "{route}: {error}");
        loader.shutdown().await.unwrap();
    }
}

/// A read that its server has been sent can't be called off, and keeps the process that waits for it: a server in the process
/// of the reader would keep itself.
#[tokio::test]
async fn a_shutdown_ends_though_a_server_never_answers_and_tells_what_is_left_to_it() {
    if !may_mount() {
        return;
    }
    for (route, overlaid) in DIRECT_ROUTES.into_iter().flat_map(|route| [(route, false), (route, true)]) {
        let server = SilentServer::start(Manners::NeverAnswers);
        let overlay = overlaid.then(|| Overlay::over(server.served.path()));
        let path = overlay.as_ref().map_or(&server.path, |overlay| &overlay.path);
        // Enough staging for as many reads at once.
        let loader = loader().staging_bytes(32 << 20).route(route).shutdown_timeout(Duration::from_millis(300));
        let loader = loader.build().unwrap();
        let mut load = loader.load(path);
        // All of the file is being read: five reads, each into a slot of its own where they are staged.
        while loader.metrics().reads_in_flight < 5 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let seen = tokio::time::timeout(Duration::from_millis(300), load.next()).await;
        assert!(seen.is_err(), "{route}: nothing is shown of what was never read: {seen:?}");
        let start = Instant::now();
        let leaked = loader.shutdown().await.unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(5), "{route}: it took {:?}", start.elapsed());
        let staged = if route == Route::Bounce { 5 * (2 << 20) } else { 0 };
        let expected = BYTES.next_multiple_of(4096) + staged;
        assert_eq!((leaked.bytes, leaked.threads), (expected as u64, 0), "{route}: {leaked}");
        let ended = tokio::time::timeout(Duration::from_secs(5), load.finish()).await.expect("a load ends with its loader");
        assert!(matches!(ended, Err(Error::ShutDown)), "{route}: {ended:?}");
    }
}

/// Lazily pulled container images look like this. A ring gets the same bytes twice here if its
/// descriptor has `O_NONBLOCK`.
#[tokio::test]
async fn an_overlay_over_fuse_gives_the_same_bytes_by_every_route() {
    for most in [100_001, 65_535, 12_288] {
        let Some(mounted) = Mounted::new(Manners::AnswersShortPastTheCache(most)) else { return };
        let overlay = Overlay::over(mounted.folder());
        for route in ROUTES {
            let what = format!("{route}, {most} bytes at once");
            let loader = loader().route(route).build().unwrap();
            let image = loader.load(&overlay.path).await.unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes, &what);
            // A part inside an open file.
            let part = 5_000..(BYTES as u64 - 12_345);
            let file = std::fs::File::open(&overlay.path).unwrap();
            let image = loader.load_file(file, Some(part.clone()), loader.options()).await.unwrap();
            let part = usize::try_from(part.start).unwrap()..usize::try_from(part.end).unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes[part], &what);
            let open = std::fs::File::open(&overlay.path).unwrap();
            let image = loader.load(format!("/proc/self/fd/{}", open.as_raw_fd())).await.unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes, &what);
            loader.shutdown().await.unwrap();
        }
    }
}

/// Its pages may be older than what its server has, while attributes match.
#[tokio::test]
async fn nothing_is_taken_from_the_page_cache_of_fuse() {
    let Some(mounted) = Mounted::new(Manners::RefusesDirect) else { return };
    // By one description: the next one that is opened drops what is cached.
    let open = std::fs::File::open(&mounted.path).unwrap();
    let mut read = vec![0; mounted.bytes.len()];
    std::os::unix::fs::FileExt::read_exact_at(&open, &mut read, 0).unwrap();
    assert_same(&read, &mounted.bytes, "the file is cached");
    let cached = dmaload::probe::cached_bytes(&open);
    assert!(cached.is_err() || cached.is_ok_and(|bytes| bytes > 0), "{cached:?}");
    for options in [loader().build().unwrap().options(), loader().build().unwrap().options().cache(dmaload::Cache::Auto)] {
        let loader = loader().build().unwrap();
        let image = loader.load_with([&mounted.path], options).await.unwrap();
        assert_eq!(image.report().cached_bytes, 0);
        assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes, "from its server");
        loader.shutdown().await.unwrap();
    }
}

/// The kernel believes attributes for a minute; a load asks the server.
#[tokio::test]
async fn cached_attributes_hide_no_rewrite_during_a_load() {
    for route in ROUTES {
        for at in [0, SEGMENT + 1, 4 * SEGMENT] {
            let Some(mounted) = Mounted::new(Manners::IsRewrittenAt(at)) else { return };
            let loader = loader().route(route).build().unwrap();
            let error = loader.load(&mounted.path).await.unwrap_err();
            assert!(matches!(error, Error::Changed { change: "it was modified", .. }), "{route}, {at}: {error}");
            loader.shutdown().await.unwrap();
        }
    }
}

#[tokio::test]
async fn cached_attributes_make_no_change_of_an_earlier_rewrite() {
    for route in ROUTES {
        // A small file is looked at before it is opened, a large one after.
        for bytes in [BYTES, 70_000] {
            let Some(mounted) = Mounted::of(bytes, Manners::IsRewrittenAt(usize::MAX)) else { return };
            let cached = std::fs::metadata(&mounted.path).unwrap().modified().unwrap();
            mounted.rewritten.store(true, Ordering::SeqCst);
            let modified = std::fs::metadata(&mounted.path).unwrap().modified().unwrap();
            assert_eq!(modified, cached, "the kernel does not know yet");
            let loader = loader().route(route).build().unwrap();
            let image = loader.load(&mounted.path).await.unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &mounted.other_bytes, &format!("{route}, {bytes} bytes"));
            loader.shutdown().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_torn_header_is_a_change_not_damage() {
    // The header of a small file is taken from its memory, that of a large one read when planning.
    for data in [70_000, BYTES] {
        let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{data}],"data_offsets":[0,{data}]}}}}"#);
        let mut good = (header.len() as u64).to_le_bytes().to_vec();
        good.extend_from_slice(header.as_bytes());
        good.extend(random_bytes(data, 25));
        let mut half = good.clone();
        half[20..].fill(0);
        for torn in [half, vec![0; good.len()], random_bytes(good.len(), 26)] {
            for route in ROUTES {
                let model = Model::holding([good.clone(), torn.clone()], Manners::IsRewrittenAt(0));
                let Some(mounted) = Mounted::serving(model) else { return };
                let loader = loader().route(route).format(Format::Safetensors).build().unwrap();
                let error = loader.load(&mounted.path).await.unwrap_err();
                assert!(matches!(error, Error::Changed { change: "it was modified", .. }), "{route}, {data} bytes: {error}");
                // At rest it is damaged.
                let error = loader.load(&mounted.path).await.unwrap_err();
                assert!(matches!(error, Error::Model { .. }), "{route}, {data} bytes: {error}");
                loader.shutdown().await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn bytes_without_a_length_are_an_error_not_an_empty_file() {
    let Some(mounted) = Mounted::new(Manners::HasNoLength) else { return };
    let overlay = Overlay::over(mounted.folder());
    let loader = loader().build().unwrap();
    for path in [&mounted.path, &overlay.path, Path::new("/proc/self/status"), Path::new("/proc/self/mountinfo")] {
        let error = loader.load(path).await.unwrap_err();
        assert_eq!(error, Error::NoLength { path: path.to_owned() });
        let error = loader.load_file(std::fs::File::open(path).unwrap(), None, loader.options()).await.unwrap_err();
        assert!(matches!(error, Error::NoLength { .. }), "{error}");
    }
    loader.shutdown().await.unwrap();
}

#[tokio::test]
async fn bytes_beyond_the_stated_length_are_an_error() {
    for stated in [1, 100, 4096, SEGMENT + 333, BYTES - 1] {
        let Some(mounted) = Mounted::new(Manners::StatesLength(stated)) else { return };
        let overlay = Overlay::over(mounted.folder());
        for route in ROUTES {
            let loader = loader().route(route).build().unwrap();
            for path in [&mounted.path, &overlay.path] {
                let error = loader.load(path).await.unwrap_err();
                let expected = Error::Longer { path: path.clone(), stated_bytes: stated as u64 };
                assert_eq!(error, expected, "{route}, {stated}");
            }
            loader.shutdown().await.unwrap();
        }
        let expected = Error::Longer { path: mounted.path.clone(), stated_bytes: stated as u64 };
        assert_eq!(dmaload::inspect(&mounted.path, Format::Raw).unwrap_err(), expected);
    }
}

/// To close a file may take as long as its server likes.
#[tokio::test]
async fn no_thread_of_the_caller_closes_files() {
    let Some(mounted) = Mounted::new(Manners::AnswersShort(BYTES)) else { return };
    // What stops when its limit is reached keeps its files open, with no read in flight.
    let limited = || loader().memory_limit_bytes(2 * SEGMENT as u64).build().unwrap();
    let stopped = async |loader: &Loader| {
        let mut segments = loader.stream(&mounted.path);
        let first = segments.next().await.unwrap().unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        (segments, first)
    };
    let shut_down = limited();
    let kept = stopped(&shut_down).await;
    shut_down.shutdown().await.unwrap();
    drop(kept);
    let dropped = limited();
    let (segments, first) = stopped(&dropped).await;
    drop(segments);
    drop(first);
    // The last to hold the loader is the load.
    let (segments, _first) = stopped(&dropped).await;
    drop(dropped);
    drop(segments);
    closed_by_others(&mounted, 3);
}

#[tokio::test]
async fn after_a_shutdown_amid_reads_the_files_are_closed() {
    // Late answers: the ring's thread has the files when every worker has done its last job.
    let Some(mounted) = Mounted::new(Manners::AnswersLate) else { return };
    for route in ROUTES {
        let loader = loader().route(route).build().unwrap();
        let load = loader.load(&mounted.path);
        while loader.metrics().reads_in_flight == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        loader.shutdown().await.unwrap();
        // A descriptor that was closed meanwhile has no target.
        let targets = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| entry.unwrap().path().read_link().ok());
        assert_eq!(targets.filter(|target| *target == mounted.path).count(), 0, "{route}");
        drop(load);
    }
    closed_by_others(&mounted, ROUTES.len());
}

/// Waits until all files are closed, at least so many: by other threads than this one.
fn closed_by_others(mounted: &Mounted, files: usize) {
    while mounted.open_files.load(Ordering::SeqCst) > 0 {
        std::thread::sleep(Duration::from_millis(2));
    }
    let own = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
    let closers = mounted.closers.lock().unwrap();
    assert!(closers.len() >= files && !closers.contains(&own), "{own} closes: {closers:?}");
}

/// The thread that all loads need, least of all: also what a load leaves in it that was dropped with reads in flight.
#[tokio::test]
async fn the_ring_thread_closes_no_files() {
    // So short that it takes a while.
    let Some(mounted) = Mounted::new(Manners::AnswersShort(8 << 10)) else { return };
    let loader = loader().build().unwrap();
    for _ in 0..20 {
        let load = loader.load(&mounted.path);
        while loader.metrics().reads_in_flight == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(load);
        while mounted.open_files.load(Ordering::SeqCst) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let is_ring = |task: &PathBuf| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "dmaload-ring\n");
    let rings: Vec<u32> =
        tasks.filter(is_ring).map(|task| task.file_name().unwrap().to_str().unwrap().parse().unwrap()).collect();
    let closers = mounted.closers.lock().unwrap();
    assert!(!rings.is_empty() && closers.len() >= 40);
    assert!(!closers.iter().any(|closer| rings.contains(closer)), "{rings:?} close: {closers:?}");
}

/// What one file system holds up is its loads' part of the window, the queue, staging and threads; not the others'.
#[tokio::test]
async fn a_file_system_that_never_answers_stops_no_load_of_another_one() {
    let Some(answering) = Mounted::new(Manners::AnswersShort(BYTES)) else { return };
    let folder = folder();
    let plain = folder.path().join("plain.bin");
    std::fs::write(&plain, &*answering.bytes).unwrap();
    for (route, overlaid) in DIRECT_ROUTES.into_iter().flat_map(|route| [(route, false), (route, true)]) {
        let server = SilentServer::start(Manners::NeverAnswers);
        let overlay = overlaid.then(|| Overlay::over(server.served.path()));
        let silent = overlay.as_ref().map_or(&server.path, |overlay| &overlay.path);
        let loader = loader()
            .route(route)
            .window_bytes(8 * SEGMENT as u64)
            .staging_bytes(32 << 20)
            .chunk_bytes(256 << 10)
            .shutdown_timeout(Duration::from_millis(300))
            .build()
            .unwrap();
        let mut silent = [loader.load(silent), loader.load(silent)];
        for load in &mut silent {
            assert!(tokio::time::timeout(Duration::from_millis(200), load.next()).await.is_err(), "{route}");
        }
        for path in [&plain, &answering.path] {
            let ended = tokio::time::timeout(Duration::from_secs(20), loader.load(path)).await;
            let image = ended.unwrap_or_else(|_| panic!("{route}: {} waits for what is silent", path.display())).unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &answering.bytes, &route.to_string());
        }
        loader.shutdown().await.unwrap_err();
    }
}

/// The last look at a file asks its server, which may keep a worker as long as it likes.
#[tokio::test]
async fn a_server_silent_about_attributes_holds_one_worker() {
    if !may_mount() {
        return;
    }
    let folder = folder();
    let (plain, bytes) = (folder.path().join("plain.bin"), random_bytes(BYTES, 5));
    std::fs::write(&plain, &bytes).unwrap();
    for overlaid in [false, true] {
        let server = SilentServer::start(Manners::NeverTells);
        let overlay = overlaid.then(|| Overlay::over(server.served.path()));
        let path = overlay.as_ref().map_or(&server.path, |overlay| &overlay.path);
        let loader = loader().allocator_threads(2).shutdown_timeout(Duration::from_millis(300)).build().unwrap();
        let mut load = loader.load(path);
        for _ in 0..4 {
            load.next().await.unwrap().unwrap();
        }
        let last = tokio::time::timeout(Duration::from_millis(300), load.next()).await;
        assert!(last.is_err(), "the last segment waits for the file's check: {last:?}");
        let ended = tokio::time::timeout(Duration::from_secs(20), loader.load(&plain)).await;
        let image = ended.expect("another load waits for what is silent").unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &bytes, "another load");
        let leaked = loader.shutdown().await.unwrap_err();
        assert_eq!((leaked.bytes, leaked.threads), (0, 1), "no read is in flight, and one worker hangs");
        assert!(matches!(load.finish().await, Err(Error::ShutDown)));
    }
}

/// A file system of a server in a process of its own, which never answers direct reads, or requests for attributes.
struct SilentServer {
    path: PathBuf,
    served: ServedFolder,
}

/// How the server is silent.
const MANNERS: &str = "DMALOAD_TEST_MANNERS";

impl SilentServer {
    fn start(manners: Manners) -> Self {
        let served = ServedFolder::start(folder(), "the_silent_server", [(MANNERS, format!("{manners:?}").as_ref())]);
        SilentServer { path: served.path().join("model.bin"), served }
    }
}

#[test]
#[ignore = "no test: the server of another one, in its own process"]
fn the_silent_server() {
    let Some(folder) = folder_to_serve() else { return };
    let asked = std::env::var(MANNERS).unwrap();
    let manners = [Manners::NeverAnswers, Manners::NeverTells].into_iter().find(|manners| format!("{manners:?}") == asked);
    fuser::mount(Model::new(BYTES, manners.unwrap()), folder, &read_only()).unwrap();
}
