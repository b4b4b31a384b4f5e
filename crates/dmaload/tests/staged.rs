//! Tests that copiers in staged loads populate each extent of memory once, before they write to
//! it.
#![allow(clippy::print_stderr, reason = "skipped tests are reported")]
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use common::{assert_same, file, folder, random_bytes};
use dmaload::heap::{AnonHeap, Heap, HeapError, HeapHooks, Hooked, MemfdHeap, Pages, Populated};
use dmaload::{Cache, Errno, Error, Image, Layout, LoadOptions, Loader, LoaderBuilder, Route, TraceKind};
use safetensors::tensor::{Dtype, TensorView, serialize};

const MIB: usize = 1 << 20;
const SEGMENT: usize = 8 * MIB;
const PAGE: usize = 4096;
const ANY: &str = "dmaload-";

/// Hooks that check and record every call to `populate`.
#[derive(Debug)]
struct Recorder {
    extent_bytes: usize,
    /// Only threads whose names start with this prefix may populate memory.
    thread_prefix: &'static str,
    /// How long each call is delayed, so that calls on other threads overlap with it.
    delay: Duration,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// The length in bytes and the populated ranges of each allocation, by the address of its
    /// mapping.
    allocations: BTreeMap<usize, (usize, Vec<Range<usize>>)>,
    running_calls: usize,
}

impl Recorder {
    fn new(pages: Pages) -> Arc<Self> {
        let extent_bytes = if pages == Pages::Small { 512 << 10 } else { 2 * MIB };
        Arc::new(Recorder {
            extent_bytes,
            thread_prefix: "dmaload-copy-",
            delay: Duration::from_millis(1),
            seen: Mutex::default(),
        })
    }

    /// Checks that the populated ranges cover all allocations exactly once, and clears the record.
    fn assert_all_was_populated(&self, image: &Image, what: &str) {
        let seen = std::mem::take(&mut *self.seen.lock().unwrap());
        let (mut memory_bytes, mut bytes) = (0, 0);
        for (mapped_bytes, mut parts) in seen.allocations.into_values() {
            parts.sort_by_key(|part| part.start);
            let mut end = 0;
            for part in parts {
                assert_eq!(
                    part.start, end,
                    "{what}: a gap or an overlap in the populated ranges of an allocation of {mapped_bytes} bytes"
                );
                end = part.end;
            }
            assert_eq!(end, mapped_bytes, "{what}: the end of an allocation was not populated");
            memory_bytes += mapped_bytes;
            bytes += end;
        }
        assert_eq!((memory_bytes, seen.running_calls), (bytes, 0), "{what}");
        let segment_bytes: usize = image.segments().iter().map(dmaload::Segment::memory_bytes).sum();
        assert!(segment_bytes <= memory_bytes, "{what}: segments of {segment_bytes} bytes, memory of {memory_bytes}");
        // Page sizes are looked up either for all populated ranges or for none.
        let counted = image.report().pages.seen_bytes;
        assert!(counted == 0 || counted == bytes as u64, "{what}: the page sizes of {counted} of {bytes} bytes were looked up");
    }
}

/// Counts the pages in an address range that are in memory, according to `/proc/self/pagemap`.
fn count_present_pages(addresses: Range<usize>) -> usize {
    let mut entries = vec![0; (addresses.end - addresses.start) / PAGE * 8];
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entries, (addresses.start / PAGE * 8) as u64).unwrap();
    entries.chunks_exact(8).filter(|entry| entry[7] & 0x80 != 0).count()
}

impl HeapHooks for Recorder {
    fn name(&self) -> Option<Cow<'_, str>> {
        Some("recording".into())
    }

    fn before_populate(&self, mapped: Range<usize>, part: Range<usize>) -> Result<(), HeapError> {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        assert!(thread.starts_with(self.thread_prefix), "thread {thread} populated {part:?}");
        assert!(!part.is_empty() && part.end <= mapped.len(), "{part:?} of {} bytes", mapped.len());
        // Workers can populate more than an extent at once, before direct reads.
        if self.thread_prefix != ANY {
            assert!(part.len() <= self.extent_bytes, "{part:?} is larger than an extent");
            let (first, last) = (part.start / self.extent_bytes, (part.end - 1) / self.extent_bytes);
            assert_eq!(first, last, "{part:?} is in two extents");
        }
        let other = {
            let mut seen = self.seen.lock().unwrap();
            seen.running_calls += 1;
            let (_, parts) = seen.allocations.entry(mapped.start).or_insert_with(|| (mapped.len(), Vec::new()));
            let other = parts.iter().find(|other| other.start < part.end && part.start < other.end).cloned();
            parts.push(part.clone());
            other
        };
        assert!(other.is_none(), "{part:?} was populated before, as {other:?}");
        std::thread::sleep(self.delay);
        // Threads that want to write to this range wait until this call returns.
        let present = count_present_pages(mapped.start + part.start..mapped.start + part.end);
        assert_eq!(present, 0, "pages of {part:?} were written to before they were populated");
        Ok(())
    }

    fn after_populate(&self, part: Range<usize>, result: Result<&Populated, &HeapError>) {
        assert!(result.is_ok(), "{part:?}: {result:?}");
        self.seen.lock().unwrap().running_calls -= 1;
    }
}

/// Returns file contents of various lengths. Some lengths are close to the size of a page or an
/// extent, or to the limit for small files, and some files have several segments.
fn contents() -> Vec<Vec<u8>> {
    let mut lengths = vec![3, 0, 2 * MIB + 1, 4096, 21 * MIB + 4097, 2 * MIB, 512 << 10, (512 << 10) + 5, 17 * MIB];
    lengths.extend([700_000; 50]);
    lengths.iter().zip(1..).map(|(&bytes, seed)| random_bytes(bytes, seed)).collect()
}

fn write_files(folder: &Path, contents: &[Vec<u8>]) -> Vec<PathBuf> {
    contents.iter().enumerate().map(|(number, bytes)| file(folder, &format!("{number:03}.bin"), bytes)).collect()
}

fn assert_files(image: &Image, contents: &[Vec<u8>], what: &str) {
    for (number, bytes) in contents.iter().enumerate() {
        assert_same(&image.files()[number].bytes().unwrap(), bytes, &format!("{what}, file {number}"));
    }
}

fn builder(heap: impl Heap) -> LoaderBuilder {
    Loader::builder().heap(heap).load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
}

fn staged(loader: &Loader) -> LoadOptions {
    loader.load_options().route(Route::Bounce).cache(Cache::Bypass)
}

#[tokio::test]
async fn each_extent_is_populated_once_before_it_is_written() {
    let (folder, contents) = (folder(), contents());
    let paths = write_files(folder.path(), &contents);
    for pages in [Pages::Auto, Pages::Small] {
        let recorder = Recorder::new(pages);
        let loaders = [
            builder(Hooked::new(MemfdHeap { pages }, Arc::clone(&recorder))).build().unwrap(),
            builder(Hooked::new(AnonHeap { pages }, Arc::clone(&recorder))).build().unwrap(),
        ];
        for (loader, heap) in loaders.iter().zip(["memfd", "anon"]) {
            // With chunks smaller than an extent, several copies need the same extent at once.
            for chunk_bytes in [64 << 10, 2 << 20] {
                for layout in [Layout::Segmented, Layout::Single, Layout::Tensors] {
                    let what = format!("{heap}, {pages:?}, {layout}, chunks of {chunk_bytes}");
                    let options = staged(loader).layout(layout).chunk_bytes(chunk_bytes);
                    let image = loader.load(&paths).options(options).await.unwrap();
                    assert_files(&image, &contents, &what);
                    assert_eq!(image.report().route, Route::Bounce, "{what}");
                    recorder.assert_all_was_populated(&image, &what);
                }
            }
            let apart = loader.load(&paths).options(staged(loader).packed(false)).await.unwrap();
            assert_files(&apart, &contents, "apart");
            recorder.assert_all_was_populated(&apart, "apart");
        }
    }
}

/// A copier populates memory in advance if it has time before the bytes arrive. On a busy machine,
/// it may not have time, so the test tries several loads.
#[tokio::test]
async fn memory_is_populated_while_its_bytes_are_read() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &random_bytes(2 * SEGMENT, 9));
    for pages in [Pages::Auto, Pages::Small] {
        let loader = builder(MemfdHeap { pages }).build().unwrap();
        let mut was_ahead = false;
        for _ in 0..50 {
            let image = loader.load(&path).options(staged(&loader).trace(true)).await.unwrap();
            let trace = &image.report().trace;
            let first_start = |kind: TraceKind| {
                let starts = trace.iter().filter(|span| span.kind == kind).map(|span| span.start);
                starts.min().unwrap_or_else(|| panic!("no {kind:?}"))
            };
            // Each staged read is followed by a copy, which starts once the bytes have arrived.
            was_ahead |= first_start(TraceKind::Allocate) < first_start(TraceKind::Copy);
        }
        assert!(was_ahead, "{pages:?}: no load populated memory before the first bytes had arrived");
    }
}

/// Reads through the page cache, and copies from it, populate memory like staged copies do.
#[tokio::test]
async fn buffered_and_cached_reads_populate_each_extent_once() {
    let (folder, contents) = (folder(), contents());
    let paths = write_files(folder.path(), &contents);
    for pages in [Pages::Auto, Pages::Small] {
        let reading = Arc::new(Recorder { thread_prefix: "dmaload-read-", ..Arc::into_inner(Recorder::new(pages)).unwrap() });
        let loader = builder(Hooked::new(MemfdHeap { pages }, Arc::clone(&reading))).build().unwrap();
        let options = loader.load_options().route(Route::Buffered).cache(Cache::Bypass);
        let image = loader.load(&paths).options(options).await.unwrap();
        assert_files(&image, &contents, "buffered");
        assert_eq!(image.report().route, Route::Buffered);
        reading.assert_all_was_populated(&image, "buffered");
        // Fill the page cache. Pages that are evicted before the load are read from storage.
        for path in &paths {
            std::fs::read(path).unwrap();
        }
        let any = Arc::new(Recorder { thread_prefix: ANY, ..Arc::into_inner(Recorder::new(pages)).unwrap() });
        let loader = builder(Hooked::new(MemfdHeap { pages }, Arc::clone(&any))).build().unwrap();
        let image = loader.load(&paths).options(loader.load_options().cache(Cache::Auto)).await.unwrap();
        assert_files(&image, &contents, "cached");
        if image.report().cached_bytes == 0 {
            eprintln!("skipped: nothing was copied from the page cache");
        }
        any.assert_all_was_populated(&image, "cached");
    }
}

#[tokio::test]
async fn any_selection_of_tensors_is_staged_and_populated_once() {
    const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
    let folder = folder();
    let lengths = [3 * MIB + 2, 40, 9 * MIB, 700_000, 6 * MIB + 4098];
    let data: Vec<_> = lengths.iter().zip(1..).map(|(&bytes, seed)| random_bytes(bytes, seed)).collect();
    let views =
        NAMES.iter().zip(&data).map(|(name, bytes)| (*name, TensorView::new(Dtype::U8, vec![bytes.len()], bytes).unwrap()));
    let path = file(folder.path(), "model.safetensors", &serialize(views.collect::<Vec<_>>(), None).unwrap());
    for pages in [Pages::Auto, Pages::Small] {
        let recorder = Recorder::new(pages);
        let loader = builder(Hooked::new(MemfdHeap { pages }, Arc::clone(&recorder))).build().unwrap();
        for (layout, names) in [
            (Layout::Tensors, vec!["*"]),
            (Layout::Segmented, vec!["*"]),
            (Layout::Single, vec!["b", "e"]),
            (Layout::Tensors, vec!["e", "a", "b"]),
        ] {
            let what = format!("{pages:?}, {layout}, {names:?}");
            let options = staged(&loader).layout(layout).tensors(names.clone());
            let image = loader.load(&path).options(options).await.unwrap();
            let mut seen = 0;
            for tensor in image.tensors() {
                let number = NAMES.iter().position(|name| *name == tensor.name()).unwrap();
                if names.contains(&"*") || names.contains(&tensor.name()) {
                    assert_same(&tensor.bytes().unwrap(), &data[number], &format!("{what}: {}", tensor.name()));
                    seen += 1;
                }
            }
            assert_eq!(seen, if names == ["*"] { 5 } else { names.len() }, "{what}");
            recorder.assert_all_was_populated(&image, &what);
        }
    }
}

#[tokio::test]
async fn staged_small_files_get_as_many_huge_pages_as_direct_ones() {
    let folder = folder();
    let contents: Vec<_> = (0..50).map(|seed| random_bytes(700_000, seed)).collect();
    let paths = write_files(folder.path(), &contents);
    for (heap, loader) in
        [("memfd", builder(MemfdHeap::default()).build().unwrap()), ("anon", builder(AnonHeap::default()).build().unwrap())]
    {
        let direct = loader.load(&paths).options(staged(&loader).route(Route::UringFixedDirect)).await.unwrap();
        let direct = direct.report().pages;
        if direct.huge_bytes == 0 {
            eprintln!("skipped: {heap}: the kernel provides no huge pages ({direct:?})");
            continue;
        }
        let image = loader.load(&paths).options(staged(&loader)).await.unwrap();
        assert_files(&image, &contents, heap);
        assert_eq!(image.report().route, Route::Bounce);
        assert_eq!(image.report().pages, direct, "{heap}");
    }
}

/// Hooks that count populated bytes, which the test compares with the bytes read.
#[derive(Debug, Default)]
struct Counting(AtomicUsize);

impl HeapHooks for Counting {
    fn after_populate(&self, part: Range<usize>, _: Result<&Populated, &HeapError>) {
        self.0.fetch_add(part.len(), Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn populated_memory_stays_within_the_window() {
    const WINDOW: usize = 16 * MIB;
    let folder = folder();
    let bytes = random_bytes(96 * MIB, 3);
    let path = file(folder.path(), "model.bin", &bytes);
    let counting = Arc::new(Counting::default());
    let heap = Hooked::new(MemfdHeap::default(), Arc::clone(&counting));
    let loader = builder(heap).window_bytes(WINDOW as u64).build().unwrap();
    let mut segments = loader.load(&path).options(staged(&loader)).segments();
    let (mut at, mut most) = (0, 0);
    loop {
        let next = tokio::time::timeout(Duration::from_millis(1), segments.next()).await;
        // Read the counters in this order: reads that complete in between only reduce the
        // difference.
        let populated = counting.0.load(Ordering::SeqCst);
        let full = usize::try_from(segments.progress().read_bytes).unwrap();
        most = most.max(populated.saturating_sub(full));
        match next {
            Err(_) => {}
            Ok(None) => break,
            Ok(Some(segment)) => {
                let segment = segment.unwrap();
                assert_same(&segment.bytes().unwrap(), &bytes[at..at + segment.len()], "a segment");
                at += segment.len();
            }
        }
    }
    assert_eq!((at, counting.0.load(Ordering::SeqCst)), (bytes.len(), bytes.len()));
    assert!(most <= WINDOW, "{most} bytes were populated and not yet read");
}

/// Hooks that refuse the n-th call to `populate`, or panic in it.
#[derive(Debug, Default)]
struct Failing {
    left: AtomicUsize,
    panics: AtomicBool,
}

impl Failing {
    fn fail_at(&self, call: usize, panics: bool) {
        self.panics.store(panics, Ordering::SeqCst);
        self.left.store(call, Ordering::SeqCst);
    }
}

impl HeapHooks for Failing {
    fn name(&self) -> Option<Cow<'_, str>> {
        Some("failing".into())
    }

    fn before_populate(&self, _: Range<usize>, part: Range<usize>) -> Result<(), HeapError> {
        let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        // `left` was 1 only at the chosen call; at 0, no failure is pending.
        if left == Ok(1) {
            assert!(!self.panics.load(Ordering::SeqCst), "a mistake in populate");
            return Err(HeapError::new("find pages of a vendor heap", part.len(), Errno::ENXIO));
        }
        Ok(())
    }
}

#[tokio::test]
async fn heap_that_fails_amid_copies_fails_one_load() {
    let folder = folder();
    let contents = [random_bytes(40 * MIB, 1), random_bytes(40 * MIB, 2)];
    let paths = write_files(folder.path(), &contents);
    let failing = Arc::new(Failing::default());
    for pages in [Pages::Auto, Pages::Small] {
        let loader = builder(Hooked::new(MemfdHeap { pages }, Arc::clone(&failing))).build().unwrap();
        for panics in [false, true] {
            for calls in [1, 2, 7, 20] {
                let what = format!("{pages:?}, call {calls}, panics: {panics}");
                failing.fail_at(calls, panics);
                let loads = [0, 1].map(|number| loader.load(&paths[number]).options(staged(&loader)).start());
                let [first, second] = loads.map(|load| tokio::spawn(load.into_future()));
                let results = [first.await.unwrap(), second.await.unwrap()];
                let mut failed = 0;
                for (result, bytes) in results.iter().zip(&contents) {
                    match result {
                        Ok(image) => assert_same(&image.files()[0].bytes().unwrap(), bytes, &what),
                        Err(error) => {
                            failed += 1;
                            let text = error.to_string();
                            let expected = if panics {
                                "heap failing panicked: a mistake in populate"
                            } else {
                                "failing: cannot find pages of a vendor heap"
                            };
                            assert!(text.starts_with(expected), "{what}: {text}");
                            assert!(panics || text.contains("ENXIO"), "{what}: {text}");
                        }
                    }
                }
                assert_eq!(failed, 1, "{what}");
            }
        }
        // The failed loads leak nothing.
        loader.shutdown().await.unwrap();
    }
}

/// Hooks that block all calls to `populate` until the test opens the gate.
#[derive(Debug, Default)]
struct Gate {
    state: Mutex<(bool, usize)>,
    changed: Condvar,
}

impl HeapHooks for Gate {
    fn before_populate(&self, _: Range<usize>, _: Range<usize>) -> Result<(), HeapError> {
        let mut state = self.state.lock().unwrap();
        state.1 += 1;
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |(open, _)| !*open).unwrap());
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn load_dropped_while_populating_leaks_nothing() {
    let folder = folder();
    let bytes = random_bytes(40 * MIB, 1);
    let path = file(folder.path(), "model.bin", &bytes);
    for (held, pages) in [(1, Pages::Small), (2, Pages::Small), (1, Pages::Auto)] {
        let gate = Arc::new(Gate::default());
        let loader = builder(Hooked::new(MemfdHeap { pages }, Arc::clone(&gate))).build().unwrap();
        let load = tokio::spawn(loader.load(&path).options(staged(&loader)).into_future());
        // Wait until `held` copiers are inside the heap.
        let inside = Arc::clone(&gate);
        tokio::task::spawn_blocking(move || {
            drop(inside.changed.wait_while(inside.state.lock().unwrap(), |(_, calls)| *calls < held).unwrap());
        })
        .await
        .unwrap();
        load.abort();
        assert!(load.await.unwrap_err().is_cancelled());
        {
            let mut state = gate.state.lock().unwrap();
            state.0 = true;
            gate.changed.notify_all();
        }
        // The loader still works.
        let image = loader.load(&path).options(staged(&loader)).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &bytes, "the next load");
        drop(image);
        let memory = loader.clone();
        loader.shutdown().await.expect("no memory should be leaked");
        // Another thread frees the memory, so wait for up to 5 s.
        for _ in 0..500 {
            if memory.memory_bytes() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        assert_eq!(memory.memory_bytes(), 0, "held {held}, {pages:?}");
    }
}

#[tokio::test]
async fn errors_of_staged_loads_name_the_heap_and_the_request() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &random_bytes(5 * MIB, 1));
    let failing = Arc::new(Failing::default());
    failing.fail_at(2, false);
    let loader = builder(Hooked::new(MemfdHeap::default(), Arc::clone(&failing))).build().unwrap();
    let error = loader.load(&path).options(staged(&loader)).await.unwrap_err();
    let Error::Memory { heap, refusal, planned_bytes, .. } = &error else { panic!("{error:?}") };
    assert_eq!((heap.as_str(), refusal.errno), ("failing", Errno::ENXIO));
    assert_eq!(*planned_bytes, 5 * MIB as u64);
}
