//! Tests for cached chunks: they are copied from the page cache if that is as reliable as reading
//! from storage, and are read from storage otherwise.
#![allow(unsafe_code, reason = "tests store through writable mappings")]
#![allow(clippy::print_stderr, reason = "skipped tests are reported")]
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(clippy::single_range_in_vec_init, reason = "the vectors are lists of ranges")]

mod common;

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::heap::{AnonHeap, HeapError, HeapHooks, Hooked, MemfdHeap};
use dmaload::{Attempt, Cache, Image, Layout, LoadOptions, Loader, Route, probe};
use dmaload_testing::mounted;
use rustix::fs::{Advice, fadvise};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const MIB: u64 = 1 << 20;

/// Reads exactly these ranges of a file into the page cache and evicts the rest of the file.
/// Returns the reason if that fails.
fn cache_only(path: &Path, ranges: &[Range<u64>]) -> Result<(), String> {
    let file = File::open(path).unwrap();
    let cached = || probe::cached_bytes(&file).map_err(|errno| format!("cachestat: {errno}"));
    // The kernel does not drop pages that are still being read, so try again.
    for _ in 0..1000 {
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        if cached()? == 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    fadvise(&file, 0, None, Advice::Random).unwrap();
    for range in ranges {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
        file.read_exact_at(&mut bytes, range.start).unwrap();
    }
    still_cached(path, ranges)
}

/// Compares the number of a file's cached bytes with the size of these ranges, each extended to
/// whole pages of 4 KiB. Returns an error if the numbers differ, which memory pressure from other
/// processes can cause.
fn still_cached(path: &Path, ranges: &[Range<u64>]) -> Result<(), String> {
    let cached = probe::cached_bytes(File::open(path).unwrap()).map_err(|errno| format!("cachestat: {errno}"))?;
    let expected: u64 = ranges.iter().map(|range| range.end.next_multiple_of(4096) - range.start / 4096 * 4096).sum();
    if cached == expected { Ok(()) } else { Err(format!("{cached} bytes are cached, not {expected}")) }
}

async fn load(loader: &Loader, path: &Path, options: LoadOptions) -> Image {
    loader.load(path).options(options).await.unwrap()
}

/// How many times a test tries a load until it copies all cached bytes from the page cache.
const TRIES: usize = 5;

/// Runs on mounted file systems of known types, because loads use the page cache only on some
/// types.
#[test]
fn cached_chunks_are_copied_and_the_rest_is_read() {
    let runtime = tokio::runtime::Builder::new_multi_thread().build().unwrap();
    let folder = folder();
    mounted::on_each(folder.path(), |what, at| runtime.block_on(check_partly_cached_file(what, at)));
}

async fn check_partly_cached_file(what: &str, at: &Path) {
    let end = 48 * MIB + 777;
    let expected = random_bytes(usize::try_from(end).unwrap(), 1);
    let path = file(at, "model.bin", &expected);
    let loaders = [
        Loader::builder().build().unwrap(),
        Loader::builder().heap(AnonHeap::default()).build().unwrap(),
        Loader::builder()
            .window_bytes(16 * MIB)
            .load_options(LoadOptions::new().segment_bytes(8 * MIB))
            .queue_depth(1)
            .pool_bytes(u64::MAX)
            .build()
            .unwrap(),
    ];
    let alternate: Vec<_> = (0..end).step_by(16 << 20).map(|start| start..(start + 8 * MIB).min(end)).collect();
    let ragged = vec![MIB..5 * MIB, 9 * MIB + 4096..30 * MIB, 40 * MIB..end];
    for ranges in [vec![0..end], vec![0..24 * MIB], alternate, ragged, vec![]] {
        let has = |chunk: &Range<u64>| ranges.iter().any(|range| range.start <= chunk.start && chunk.end <= range.end);
        let chunks = (0..end).step_by(2 << 20).map(|start| start..(start + 2 * MIB).min(end));
        let expected_cached: u64 = chunks.filter(has).map(|chunk| chunk.end - chunk.start).sum();
        let check = async |loader: &Loader, options: LoadOptions, expected_bytes: u64, how: &str| {
            let how = format!("{what}: {ranges:?}, {how}");
            // A non-blocking read stops early at a page that is briefly locked, so repeat the
            // load.
            let mut image = None;
            for attempt in 0..TRIES {
                if let Err(reason) = cache_only(&path, &ranges) {
                    return eprintln!("skipped: {how}: {reason}");
                }
                let loaded = load(loader, &path, options.clone()).await;
                let cached_bytes = loaded.report().cached_bytes;
                assert_same(&loaded.files()[0].bytes().unwrap(), &expected, &how);
                assert!(cached_bytes <= expected_bytes, "{how}: {cached_bytes}");
                if let Err(reason) = still_cached(&path, &ranges) {
                    return eprintln!("skipped: {how}: {reason}");
                }
                image = Some(loaded);
                if cached_bytes == expected_bytes {
                    break;
                }
                eprintln!("{how}: attempt {attempt} copied {cached_bytes} bytes from the cache, not {expected_bytes}");
            }
            let image = image.expect("the loop makes at least one attempt");
            let report = image.report();
            assert_eq!(report.cached_bytes, expected_bytes, "{how}");
            assert_eq!(report.cache_bytes_per_second().is_some(), expected_bytes > 0, "{how}");
            assert_eq!(report.storage_bytes_per_second().is_some(), expected_bytes < end, "{how}");
        };
        for (number, loader) in loaders.iter().enumerate() {
            for round in 0..2 {
                check(loader, loader.load_options(), expected_cached, &format!("loader {number}, round {round}")).await;
            }
        }
        let loader = &loaders[0];
        for route in ROUTES.into_iter().filter(|route| route.is_direct()) {
            check(loader, loader.load_options().route(route), expected_cached, route.name()).await;
        }
        check(loader, loader.load_options().layout(Layout::Single), expected_cached, "single").await;
        check(loader, loader.load_options().route(Route::PreadDirect).strict(true), 0, "strict").await;
        let strict = loader.load_options().route(Route::PreadDirect).strict(true).cache(Cache::Auto);
        check(loader, strict, expected_cached, "strict, auto").await;
        check(loader, loader.load_options().cache(Cache::Bypass), 0, "bypass").await;
    }
}

/// Small files are opened just before their memory is allocated, and the page cache is queried at
/// that time.
#[tokio::test]
async fn small_files_are_taken_from_the_cache() {
    let folder = folder();
    let contents: Vec<_> = (0..50).map(|seed| random_bytes(50_000 + seed, seed as u64)).collect();
    let paths: Vec<_> =
        contents.iter().enumerate().map(|(number, bytes)| file(folder.path(), &format!("{number:03}"), bytes)).collect();
    let loader = Loader::new().unwrap();
    for half in [false, true] {
        for (number, path) in paths.iter().enumerate() {
            let bytes = std::fs::metadata(path).unwrap().len();
            let ranges = if half && number % 2 == 0 { vec![] } else { vec![0..bytes] };
            if let Err(reason) = cache_only(path, &ranges) {
                return eprintln!("skipped: {reason}");
            }
        }
        let image = loader.load(&paths).await.unwrap();
        for (number, bytes) in contents.iter().enumerate() {
            assert_same(&image.files()[number].bytes().unwrap(), bytes, "a small file");
        }
        if paths.iter().zip(&contents).any(|(path, bytes)| still_cached(path, &[0..bytes.len() as u64]).is_err() && !half) {
            return eprintln!("skipped: some files were evicted from the page cache");
        }
        let cached = contents.iter().enumerate().filter(|(number, _)| !half || number % 2 == 1);
        let cached: usize = cached.map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(image.report().cached_bytes, cached as u64, "half: {half}");
    }
}

/// Hooks that block the allocation of the last segment until the test opens the gate.
#[derive(Debug, Clone, Default)]
struct GatedHeap(Arc<(AtomicUsize, Mutex<bool>, Condvar)>);

const SEGMENTS: usize = 4;

impl HeapHooks for GatedHeap {
    fn before_allocate(&self, _bytes: usize) -> Result<(), HeapError> {
        let (calls, open, changed) = &*self.0;
        if calls.fetch_add(1, Ordering::Relaxed) == SEGMENTS - 1 {
            drop(changed.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
        }
        Ok(())
    }
}

impl GatedHeap {
    fn loader(&self) -> Loader {
        let heap = Hooked::new(MemfdHeap::default(), self.clone());
        Loader::builder().heap(heap).allocator_threads(1).load_options(LoadOptions::new().segment_bytes(2 << 20)).build().unwrap()
    }

    fn open(&self) {
        *self.0.1.lock().unwrap() = true;
        self.0.2.notify_all();
    }
}

/// The last segment is cached when a worker prepares its batch, and evicted before its memory is
/// allocated.
#[tokio::test]
async fn evicted_chunks_are_read_from_storage() {
    let folder = folder();
    let expected = random_bytes(8 << 20, 5);
    let path = file(folder.path(), "model.bin", &expected);
    if let Err(reason) = cache_only(&path, &[0..8 * MIB]) {
        return eprintln!("skipped: {reason}");
    }
    let heap = GatedHeap::default();
    let loader = heap.loader();
    let mut load = loader.load(&path).start();
    load.next().await.unwrap().unwrap();
    while heap.0.0.load(Ordering::Relaxed) < SEGMENTS {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    fadvise(File::open(&path).unwrap(), 6 * MIB, NonZeroU64::new(2 * MIB), Advice::DontNeed).unwrap();
    heap.open();
    let image = load.finish().await.unwrap();
    assert_same(&image.files()[0].bytes().unwrap(), &expected, "from the cache and from storage");
    let cached = image.report().cached_bytes;
    assert!(cached <= 6 * MIB, "{cached}");
    if still_cached(&path, &[0..6 * MIB]).is_ok() {
        assert_eq!(cached, 6 * MIB);
    }
}

/// If a page is dirty and mapped writable before the load, the next store into it updates the
/// modification time only if the page was written back in between.
#[test]
fn store_into_an_already_dirty_page_fails_the_load() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let folder = folder();
    mounted::on_each(folder.path(), |what, at| runtime.block_on(check_store_during_load(what, at)));
}

async fn check_store_during_load(what: &str, at: &Path) {
    let path = file(at, "model.bin", &random_bytes(8 << 20, 6));
    for (how, cached) in [("from the cache", true), ("from storage", false), ("buffered", true), ("uring-buffered", true)] {
        if let Err(reason) = cache_only(&path, if cached { &[0..8 * MIB] } else { &[] }) {
            return eprintln!("skipped: {what}: {reason}");
        }
        let open = File::options().read(true).write(true).open(&path).unwrap();
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: this creates a new mapping at an address that the kernel chooses.
        let mapped = unsafe { mmap(std::ptr::null_mut(), 8 << 20, flags, MapFlags::SHARED, &open, 0) }.unwrap();
        // SAFETY: an offset of 1 MiB is within the 8 MiB mapping.
        let place = unsafe { mapped.cast::<u8>().add(1 << 20) };
        // SAFETY: `place` is mapped writable, and only this thread accesses it.
        let store = |byte: u8| unsafe { place.write_volatile(byte) };
        store(1);
        let heap = GatedHeap::default();
        let loader = heap.loader();
        let options = loader.load_options();
        let options = match how {
            "from storage" => options.cache(Cache::Bypass),
            "buffered" => options.route(Route::Buffered),
            "uring-buffered" => options.route(Route::UringBuffered),
            _ => options,
        };
        let mut load = loader.load(&path).options(options).start();
        load.next().await.unwrap().unwrap();
        store(2);
        heap.open();
        let error = load.finish().await.err().map(|error| error.to_string());
        let error = error.unwrap_or_else(|| panic!("{what}, {how}: the load did not notice the store"));
        assert!(error.contains("it was modified"), "{what}, {how}: {error}");
        // SAFETY: `store`, the only user of the mapping, is not called again.
        unsafe { munmap(mapped, 8 << 20) }.unwrap();
        open.sync_all().unwrap();
    }
}

/// Neither reading the header nor querying the page cache starts readahead.
#[tokio::test]
async fn cold_load_leaves_almost_nothing_in_the_page_cache() {
    const LEN: u64 = 256 << 20;
    let folder = folder();
    let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}}}}"#, LEN - 1000);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(usize::try_from(LEN).unwrap() - 1000 + bytes.len(), 7);
    let path = file(folder.path(), "model.safetensors", &bytes);
    if let Err(reason) = cache_only(&path, &[]) {
        return eprintln!("skipped: {reason}");
    }
    let image = Loader::new().unwrap().load(&path).await.unwrap();
    if image.report().route == Route::Buffered {
        return eprintln!("skipped: this file system does not support direct reads");
    }
    let cached = probe::cached_bytes(File::open(&path).unwrap()).unwrap();
    assert!(cached <= LEN / 100, "{cached} bytes of {LEN} are cached");
}

/// Returns whether buffered reads of this file can drop the pages that they cached
/// (`RWF_DONTCACHE`).
fn supports_dontcache(file: &File) -> bool {
    let mut byte = [0];
    let flags = rustix::io::ReadWriteFlags::from_bits_retain(0x80);
    rustix::io::preadv2(file, &mut [std::io::IoSliceMut::new(&mut byte)], 0, flags).is_ok()
}

/// If the kernel or the file system does not support `RWF_DONTCACHE`, the first reads are refused
/// and retried without that flag.
#[test]
fn ring_reads_through_the_cache_leave_no_pages_in_it() {
    let runtime = tokio::runtime::Builder::new_multi_thread().build().unwrap();
    let folder = folder();
    let tmpfs = mounted::tmpfs(&folder.path().join("tmpfs"), "96m");
    let check = |what: &str, at: &Path| {
        let expected = random_bytes((48 << 20) + 777, 1);
        let path = file(at, "model.bin", &expected);
        let cold = cache_only(&path, &[]);
        let loader = Loader::builder().load_options(LoadOptions::new().chunk_bytes(256 << 10)).build().unwrap();
        let options = loader.load_options().route(Route::UringBuffered);
        for strict in [false, true] {
            let image = runtime.block_on(load(&loader, &path, options.clone().strict(strict)));
            assert_same(&image.files()[0].bytes().unwrap(), &expected, what);
            let report = image.report();
            let refused: Vec<_> = report.fallbacks.iter().filter(|step| step.from == Route::UringBuffered).collect();
            // A container can forbid io_uring; no other refusal is expected.
            if let Some(step) = refused.first() {
                assert_eq!(step.attempt, Attempt::SetUpRing, "{what}: {step:?}");
                return eprintln!("skipped: {what}: {}", step.reason());
            }
            assert_eq!((report.route, report.cached_bytes), (Route::UringBuffered, 0), "{what}");
            let open = File::open(&path).unwrap();
            match &cold {
                Ok(()) if supports_dontcache(&open) => {
                    let cached = probe::cached_bytes(&open).unwrap();
                    assert!(cached <= expected.len() as u64 / 100, "{what}: {cached} bytes are cached");
                    eprintln!("{what}: the page cache stayed nearly empty");
                }
                cold => eprintln!("{what}: page cache not checked ({cold:?})"),
            }
        }
    };
    match &tmpfs {
        Ok(tmpfs) => check("tmpfs", &tmpfs.0),
        Err(reason) => eprintln!("skipped: tmpfs: {reason}"),
    }
    mounted::on_each(folder.path(), check);
}
