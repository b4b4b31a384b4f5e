//! Tests for file system servers that hang while a worker waits for them, in a lookup, an open, a
//! request for attributes, or a close. Loads from other file systems continue, even if the loader
//! has only one worker. Once the server answers again, loads of its files continue, too.
//!
//! Mounting needs root and `/dev/fuse`; without them, these tests report that they are skipped.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(clippy::print_stderr, reason = "skipped tests are reported")]

#[path = "common/fuse_attributes.rs"]
mod attributes;
mod common;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use attributes::attributes;
use common::{assert_same, folder, random_bytes};
use dmaload::heap::{HeapError, HeapHooks, Hooked, MemfdHeap};
use dmaload::{Error, Format, Image, Load, LoadOptions, Loader, LoaderBuilder};
use dmaload_testing::served::{ServedFolder, folder_to_serve};
use fuser::{
    Config, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr,
    ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, Request,
};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

const SEGMENT: usize = 2 << 20;
const LARGE: usize = 2 * SEGMENT + 777;
/// Files this small share memory, and are opened just before that memory is allocated.
const SMALL: usize = 9_000;
/// A deadline for work that must not wait for a server. Such work takes about 1 s, or a few
/// seconds on a busy machine; work that waits for the server never finishes.
const SOON: Duration = Duration::from_secs(20);

/// The requests that the server does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hangs {
    /// Lookups of file names.
    Lookup,
    Open,
    /// Requests for the attributes of a file that has been read from.
    Attributes,
    Close,
}

const ALL: [Hangs; 4] = [Hangs::Lookup, Hangs::Open, Hangs::Attributes, Hangs::Close];

/// A file system that contains every file named `large-N` or `small-N`.
struct Server {
    bytes: Vec<u8>,
    hangs: Hangs,
    was_read: AtomicBool,
    /// Answers held back so far; `None` once they are released.
    held: Arc<Mutex<Option<Vec<Answer>>>>,
}

type Answer = Box<dyn FnOnce() + Send>;

impl Server {
    /// Calls `answer`, or holds it back if `hangs` is set and answers have not been released yet.
    fn answer(&self, hangs: bool, answer: impl FnOnce() + Send + 'static) {
        match &mut *self.held.lock().unwrap() {
            Some(held) if hangs => held.push(Box::new(answer)),
            _ => answer(),
        }
    }
}

const ROOT: u64 = 1;

/// Files with even inode numbers are small.
fn file_length(inode: u64) -> usize {
    if inode.is_multiple_of(2) { SMALL } else { LARGE }
}

fn file_attributes(inode: u64) -> FileAttr {
    attributes(INodeNo(inode), (inode != ROOT).then(|| file_length(inode) as u64))
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Some((kind, number)) = name.to_str().and_then(|name| name.split_once('-')) else {
            return reply.error(fuser::Errno::ENOENT);
        };
        let inode = 2 * number.parse::<u64>().unwrap() + if kind == "small" { 100 } else { 101 };
        self.answer(self.hangs == Hangs::Lookup, move || reply.entry(&Duration::ZERO, &file_attributes(inode), Generation(0)));
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let hangs = self.hangs == Hangs::Attributes && inode.0 != ROOT && self.was_read.load(Ordering::SeqCst);
        self.answer(hangs, move || reply.attr(&Duration::ZERO, &file_attributes(inode.0)));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.answer(self.hangs == Hangs::Open, move || reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.answer(self.hangs == Hangs::Close, move || reply.ok());
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.was_read.store(true, Ordering::SeqCst);
        let file = &self.bytes[..file_length(inode.0)];
        let start = usize::try_from(offset).unwrap().min(file.len());
        reply.data(&file[start..file.len().min(start + size as usize)]);
    }
}

fn random_file_bytes() -> Vec<u8> {
    random_bytes(LARGE, 5)
}

/// A server that runs in its own process. When the process exits, requests that are waiting for
/// the server fail.
struct Hanging {
    served: ServedFolder,
    /// The server answers once this file exists.
    answer: PathBuf,
    _folder: tempfile::TempDir,
}

const HANGS: &str = "DMALOAD_TEST_HANGS";
const ANSWER: &str = "DMALOAD_TEST_ANSWER";

impl Hanging {
    fn start(hangs: Hangs) -> Hanging {
        let other = folder();
        let answer = other.path().join("answer");
        let variables = [(HANGS, OsString::from(format!("{hangs:?}"))), (ANSWER, answer.clone().into())];
        let variables = variables.iter().map(|(name, value)| (*name, value.as_os_str()));
        Hanging { served: ServedFolder::start(folder(), "the_hanging_server", variables), answer, _folder: other }
    }

    fn files(&self, names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(|name| self.served.path().join(name)).collect()
    }

    fn resume(&self) {
        std::fs::write(&self.answer, "").unwrap();
    }
}

#[test]
#[ignore = "not a test: other tests run it as their server process"]
fn the_hanging_server() {
    let Some(folder) = folder_to_serve() else { return };
    let hangs = std::env::var(HANGS).unwrap();
    let hangs = ALL.into_iter().find(|kind| format!("{kind:?}") == hangs).unwrap();
    let answer = PathBuf::from(std::env::var_os(ANSWER).unwrap());
    let held = Arc::new(Mutex::new(Some(Vec::new())));
    let server = Server { bytes: random_file_bytes(), hangs, was_read: AtomicBool::new(false), held: Arc::clone(&held) };
    std::thread::spawn(move || {
        while !answer.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let answers: Option<Vec<Answer>> = held.lock().unwrap().take();
        answers.into_iter().flatten().for_each(|answer| answer());
    });
    let mut config = Config::default();
    config.mount_options = vec![MountOption::RO, MountOption::FSName("dmaload-test".to_owned())];
    fuser::mount(server, folder, &config).unwrap();
}

static REPLACED: AtomicUsize = AtomicUsize::new(0);

/// A subscriber that counts, in [`REPLACED`], the events that report a replaced worker.
struct Counts;

impl Subscriber for Counts {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event()
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Counts);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl Visit for Counts {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" && format!("{value:?}").ends_with("another worker takes over") {
            REPLACED.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Waits until no other test is running, because each test counts the threads of the process.
/// Returns `None` if this process cannot mount.
async fn run_alone() -> Option<tokio::sync::MutexGuard<'static, ()>> {
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: mounting needs root and /dev/fuse");
        return None;
    }
    let alone = ALONE.lock().await;
    // Only the first test installs the subscriber.
    let _ = tracing::subscriber::set_global_default(Counts);
    REPLACED.store(0, Ordering::SeqCst);
    // Threads that hung in an earlier test exit once that test's server has exited.
    wait_for_threads(0, "before a test");
    Some(alone)
}

/// Returns the names of the running threads that exit when their loader shuts down.
fn loader_threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    let of_loaders = ["dmaload-alloc", "dmaload-watch", "dmaload-ring", "dmaload-tell"];
    names.filter(|name| of_loaders.iter().any(|own| name.starts_with(own))).collect()
}

fn count_workers() -> usize {
    loader_threads().iter().filter(|name| name.starts_with("dmaload-alloc")).count()
}

fn wait_until(condition: impl Fn() -> bool, what: &str) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < SOON, "{what}: {:?}", loader_threads());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn wait_for_threads(expected: usize, what: &str) {
    wait_until(|| loader_threads().len() == expected, &format!("{what}: expected threads: {expected}"));
}

fn loader(workers: usize) -> LoaderBuilder {
    Loader::builder()
        .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
        .allocator_threads(workers)
        .shutdown_timeout(Duration::from_millis(300))
}

/// Files on a local file system, and their bytes.
struct Plain {
    _folder: tempfile::TempDir,
    files: Vec<PathBuf>,
    bytes: Vec<u8>,
}

impl Plain {
    fn new() -> Plain {
        let folder = folder();
        let bytes = random_bytes(LARGE, 6);
        let files = [("a", LARGE), ("b", SMALL), ("c", SMALL)].map(|(name, length)| {
            let path = folder.path().join(name);
            std::fs::write(&path, &bytes[..length]).unwrap();
            path
        });
        Plain { _folder: folder, files: files.to_vec(), bytes }
    }

    /// Loads the files several times. None of these loads may wait for a server.
    async fn load(&self, loader: &Loader, what: &str) {
        for round in 0..3 {
            let load = loader.load(&self.files).start();
            let image = tokio::time::timeout(SOON, load).await;
            let image =
                image.unwrap_or_else(|_| panic!("{what}: load {round} is waiting for a server: {:?}", loader_threads())).unwrap();
            assert_image(&image, &self.bytes, what);
        }
    }
}

fn assert_image(image: &Image, bytes: &[u8], what: &str) {
    for file in image.files() {
        let seen = file.bytes().unwrap();
        assert!(!seen.is_empty());
        assert_same(&seen, &bytes[..seen.len()], what);
    }
}

/// The kinds of hanging loads: which request hangs, and which files are loaded.
const KINDS: [(Hangs, &[&str]); 8] = [
    (Hangs::Lookup, &["large-0", "large-1"]),
    (Hangs::Lookup, &["small-0", "small-1"]),
    // Large files are opened during planning, and small ones just before their memory is
    // allocated.
    (Hangs::Open, &["large-0", "large-1"]),
    (Hangs::Open, &["small-0", "small-1", "small-2"]),
    (Hangs::Attributes, &["large-0", "large-1", "large-2"]),
    (Hangs::Attributes, &["small-0", "small-1", "small-2"]),
    (Hangs::Close, &["large-0", "large-1", "large-2"]),
    (Hangs::Close, &["small-0", "small-1", "small-2"]),
];

fn start_load(loader: &Loader, hanging: &Hanging, names: &[&str]) -> Load {
    loader.load(hanging.files(names)).start()
}

/// Receives segments until none arrives within 50 ms. Panics if the load finishes or fails.
async fn assert_waits(load: &mut Load, what: &str) {
    while let Ok(segment) = tokio::time::timeout(Duration::from_millis(50), load.next()).await {
        assert!(segment.is_some_and(|segment| segment.is_ok()), "{what}: the load is not waiting for the server");
    }
}

#[tokio::test]
async fn hanging_load_does_not_stop_others_and_finishes_later() {
    let Some(_alone) = run_alone().await else { return };
    let (plain, bytes) = (Plain::new(), random_file_bytes());
    for (workers_wanted, (hangs, names)) in [1, 2].into_iter().flat_map(|workers| KINDS.map(|kind| (workers, kind))) {
        let what = format!("{hangs:?} of {names:?}, workers: {workers_wanted}");
        let hanging = Hanging::start(hangs);
        let loader = loader(workers_wanted).build().unwrap();
        plain.load(&loader, &what).await;
        assert_eq!(count_workers(), workers_wanted, "{what}");
        let mut held_up = start_load(&loader, &hanging, names);
        assert_waits(&mut held_up, &what).await;
        let start = Instant::now();
        plain.load(&loader, &what).await;
        eprintln!("{what}: others took {:?}, workers: {}", start.elapsed(), count_workers());
        // Events arrive with a delay. On a busy machine, files of other loads can be slow enough
        // that their workers are replaced, too.
        let replaced = || REPLACED.load(Ordering::SeqCst);
        wait_until(|| replaced() + workers_wanted >= count_workers(), &format!("{what}: events: {}", replaced()));
        wait_until(
            || count_workers() <= 2 * workers_wanted,
            &format!("{what}: a hanging load must not occupy more workers than the loader started with"),
        );
        hanging.resume();
        let image =
            tokio::time::timeout(SOON, held_up).await.unwrap_or_else(|_| panic!("{what}: the load did not continue")).unwrap();
        assert_image(&image, &bytes, &what);
        // The workers, the ring thread, the teller and the watching thread.
        wait_for_threads(workers_wanted + 3, &what);
        plain.load(&loader, &what).await;
        loader.shutdown().await.unwrap();
        wait_for_threads(0, &what);
    }
}

#[tokio::test]
async fn many_hanging_loads_do_not_stop_others() {
    let Some(_alone) = run_alone().await else { return };
    let (plain, bytes) = (Plain::new(), random_file_bytes());
    let servers = ALL.map(Hanging::start);
    for (workers_wanted, limited) in [(1, false), (2, false), (2, true)] {
        // With a limit, loads start in the order in which they arrive, and only a few can be open.
        let builder = loader(workers_wanted);
        let builder = if limited { builder.memory_limit_bytes(256 << 20).max_open_loads(6) } else { builder };
        let loader = builder.build().unwrap();
        let what = format!("workers: {workers_wanted}, limited: {limited}");
        let server = |hangs| &servers[ALL.iter().position(|&kind| kind == hangs).unwrap()];
        let mut held_up: Vec<_> = KINDS.iter().map(|&(hangs, names)| start_load(&loader, server(hangs), names)).collect();
        // The second half of these loads is dropped below.
        held_up.extend(KINDS.iter().map(|&(hangs, names)| start_load(&loader, server(hangs), names)));
        let start = Instant::now();
        plain.load(&loader, &what).await;
        held_up.truncate(KINDS.len());
        plain.load(&loader, &what).await;
        eprintln!("{what}: others took {:?}, workers: {}", start.elapsed(), count_workers());
        if workers_wanted == 1 {
            // The shutdown reports every hanging worker.
            let leaked = loader.shutdown().await.unwrap_err();
            wait_for_threads(leaked.threads, &what);
            assert!(leaked.threads >= ALL.len(), "{what}: {leaked}");
            for load in held_up {
                assert!(matches!(load.finish().await, Err(Error::ShutDown)), "{what}");
            }
        } else if limited {
            servers.iter().for_each(Hanging::resume);
            for load in held_up {
                let image = tokio::time::timeout(SOON, load).await.expect("the load did not continue").unwrap();
                assert_image(&image, &bytes, &what);
            }
            loader.shutdown().await.unwrap();
        } else {
            drop(held_up);
            loader.shutdown().await.unwrap_err();
        }
    }
}

#[tokio::test]
async fn sixty_hanging_loads_do_not_stop_others() {
    let Some(_alone) = run_alone().await else { return };
    let (plain, hanging) = (Plain::new(), Hanging::start(Hangs::Lookup));
    let loader = loader(2).max_open_loads(1).build().unwrap();
    let held_up: Vec<_> = (0..60).map(|number| start_load(&loader, &hanging, &[format!("large-{number}").as_str()])).collect();
    let start = Instant::now();
    plain.load(&loader, "sixty loads").await;
    eprintln!("sixty loads: others took {:?}, workers: {}", start.elapsed(), count_workers());
    // One of the two workers can hang without being replaced.
    wait_until(|| REPLACED.load(Ordering::SeqCst) >= 59, "too few events report a replaced worker");
    hanging.resume();
    for load in held_up {
        let image = tokio::time::timeout(SOON, load).await.expect("the load did not continue").unwrap();
        assert_image(&image, &random_file_bytes(), "one of sixty");
    }
    wait_for_threads(2 + 3, "sixty loads");
    loader.shutdown().await.unwrap();
}

#[tokio::test]
async fn shutdown_counts_each_hanging_worker() {
    let Some(_alone) = run_alone().await else { return };
    let plain = Plain::new();
    for (number, (hangs, names)) in KINDS.into_iter().enumerate() {
        let workers_wanted = 1 + number % 2;
        let what = format!("{hangs:?} of {names:?}, workers: {workers_wanted}");
        let hanging = Hanging::start(hangs);
        let loader = loader(workers_wanted).build().unwrap();
        let mut held_up = start_load(&loader, &hanging, names);
        assert_waits(&mut held_up, &what).await;
        // On a busy machine, segments can be late for other reasons, so wait until a worker has
        // stalled and has been replaced.
        wait_until(|| REPLACED.swap(0, Ordering::SeqCst) > 0, &what);
        plain.load(&loader, &what).await;
        let leaked = loader.shutdown().await.unwrap_err();
        // The loader stops counting a thread just before the thread exits, so for a moment, more
        // threads can be running than the loader reported.
        wait_for_threads(leaked.threads, &what);
        assert_eq!((leaked.bytes, leaked.threads), (0, count_workers()), "{what}: {:?}", loader_threads());
        // The load occupies at most the workers that it used when it began to hang, and one more
        // that closes its files.
        assert!((1..=workers_wanted + 1).contains(&leaked.threads), "{what}: {:?}", loader_threads());
        assert!(matches!(held_up.finish().await, Err(Error::ShutDown)), "{what}");
        // The workers exit once the server answers.
        hanging.resume();
        wait_for_threads(0, &what);
    }
}

/// Hooks that delay every allocation by 1.5 s. A worker that waits for a file for more than 1 s is
/// stalled.
#[derive(Debug)]
struct SlowMemory;

impl HeapHooks for SlowMemory {
    fn before_allocate(&self, _: usize) -> Result<(), HeapError> {
        std::thread::sleep(Duration::from_millis(1500));
        Ok(())
    }
}

#[tokio::test]
async fn slow_memory_is_not_reported_as_a_silent_file() {
    let Some(_alone) = run_alone().await else { return };
    let plain = Plain::new();
    // Small files are opened just before their memory is allocated.
    let heap = Hooked::new(MemfdHeap::default(), SlowMemory);
    let loader = loader(1).heap(heap).build().unwrap();
    let image = loader.load(&plain.files[1..]).await.unwrap();
    assert_image(&image, &plain.bytes, "small files");
    assert_eq!(REPLACED.load(Ordering::SeqCst), 0);
    loader.shutdown().await.unwrap();
}

#[tokio::test]
async fn inspecting_a_silent_servers_file_does_not_block_the_runtime() {
    let Some(_alone) = run_alone().await else { return };
    for hangs in [Hangs::Lookup, Hangs::Open] {
        let hanging = Hanging::start(hangs);
        let path = hanging.served.path().join("large-0");
        // If the inspection blocks this thread, the watchdog makes the server answer, and the
        // assertions below fail.
        let (answer, is_over) = (hanging.answer.clone(), Arc::new(AtomicBool::new(false)));
        let watchdog = {
            let is_over = Arc::clone(&is_over);
            std::thread::spawn(move || {
                let start = Instant::now();
                while !is_over.load(Ordering::SeqCst) && start.elapsed() < SOON {
                    std::thread::sleep(Duration::from_millis(10));
                }
                std::fs::write(&answer, "").unwrap();
            })
        };
        let mut kept = std::pin::pin!(dmaload::inspect(&path, Format::Raw));
        for _ in 0..20 {
            let dropped = dmaload::inspect_model(&path, Format::Raw);
            let waited = tokio::time::timeout(Duration::from_millis(10), dropped).await;
            assert!(waited.is_err(), "{hangs:?}: {waited:?} before the server answers");
            let waited = tokio::time::timeout(Duration::from_millis(10), &mut kept).await;
            assert!(waited.is_err(), "{hangs:?}: {waited:?} before the server answers");
        }
        is_over.store(true, Ordering::SeqCst);
        let inspected = tokio::time::timeout(SOON, kept).await.expect("the server did not answer").unwrap();
        assert_eq!((inspected.path.as_path(), inspected.file_bytes), (path.as_path(), LARGE as u64), "{hangs:?}");
        watchdog.join().unwrap();
    }
}
