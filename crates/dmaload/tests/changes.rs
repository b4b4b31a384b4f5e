//! Tests for files that change and heaps that fail during a load. The load either succeeds with
//! correct bytes or fails with a clear error. Shutdowns during loads leave no file open.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::borrow::Cow;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::heap::{AnonHeap, HeapError, HeapHooks, Hooked, MemfdHeap};
use dmaload::{Error, Image, LoadOptions, Loader, LoaderBuilder, Route};
use dmaload_testing::seccomp::{self, Scope};

const SEGMENT: usize = 2 << 20;
const SEGMENTS: usize = 4;

/// Hooks that block the allocation of the last segment until the test opens the gate. By the time
/// they block, the load is planned and its other segments have memory. With one allocator thread,
/// allocation number `SEGMENTS` is the one for the last segment.
#[derive(Debug, Clone, Default)]
struct GatedHeap(Arc<Gate>);

#[derive(Debug, Default)]
struct Gate {
    calls: AtomicUsize,
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl HeapHooks for GatedHeap {
    fn before_allocate(&self, _bytes: usize) -> Result<(), HeapError> {
        if self.0.calls.fetch_add(1, Ordering::Relaxed) == SEGMENTS - 1 {
            let mut open = self.0.open.lock().unwrap();
            while !*open {
                open = self.0.changed.wait(open).unwrap();
            }
        }
        Ok(())
    }
}

impl GatedHeap {
    fn around_memfds(&self) -> Hooked<MemfdHeap, Self> {
        Hooked::new(MemfdHeap::default(), self.clone())
    }

    /// Configures a loader that allocates from this heap, with one allocator thread.
    fn builder(&self) -> LoaderBuilder {
        let options = LoadOptions::new().segment_bytes(SEGMENT as u64);
        Loader::builder().heap(self.around_memfds()).allocator_threads(1).load_options(options)
    }
}

/// Loads a file, and calls `change` with its path after the first segment has arrived and before
/// the last segment can be read.
async fn change_during_load(route: Route, bytes: &[u8], change: impl FnOnce(&Path)) -> Result<Image, Error> {
    change_during_range_load(route, bytes, None, change).await
}

async fn change_during_range_load(
    route: Route,
    bytes: &[u8],
    range: Option<Range<u64>>,
    change: impl FnOnce(&Path),
) -> Result<Image, Error> {
    let folder = folder();
    let path = file(folder.path(), "model.bin", bytes);
    // A change in the same clock tick as the initial write would not change the modification time.
    fs::File::open(&path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let heap = GatedHeap::default();
    let loader = heap.builder().build().unwrap();
    let mut options = loader.load_options().route(route);
    if let Some(range) = range {
        options = options.range(range);
    }
    let mut load = loader.load(&path).options(options).start();
    load.next().await.expect("the load should yield its first segment").unwrap();
    change(&path);
    heap.0.open();
    load.finish().await
}

fn model() -> Vec<u8> {
    random_bytes((SEGMENTS - 1) * SEGMENT + 70_000, 21)
}

/// The file does not end at a page boundary, so the memory of its last segment extends past the
/// end of the file.
#[tokio::test]
async fn memory_past_the_end_of_the_file_is_zero() {
    for route in ROUTES {
        let bytes = model();
        let image = change_during_load(route, &bytes, |_| ()).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &bytes, route.name());
        let last = image.segments().last().unwrap();
        let mut memory = vec![1; last.memory_bytes()];
        rustix::io::pread(last.hand_out_memfd().unwrap(), &mut memory, 0).unwrap();
        assert!(memory[last.len()..].iter().all(|&byte| byte == 0), "{route}");
    }
}

/// A loader cannot distinguish an append from a rewrite that also lengthens the file.
#[tokio::test]
async fn loading_a_growing_raw_file_fails() {
    use std::io::Write;
    let append = |path: &Path, bytes: usize| {
        fs::OpenOptions::new().append(true).open(path).unwrap().write_all(&vec![0xAB; bytes]).unwrap();
    };
    for route in ROUTES {
        for bytes in [1, 9000] {
            let error = change_during_load(route, &model(), |path| append(path, bytes)).await.unwrap_err();
            assert!(matches!(error, Error::Changed { change: "it grew", .. }), "{route}, {bytes} more: {error}");
            let longer = random_bytes(model().len() + bytes, 24);
            let error = change_during_load(route, &model(), |path| rewrite(path, &longer)).await.unwrap_err();
            assert!(matches!(error, Error::Changed { change: "it grew", .. }), "{route}, {bytes} longer: {error}");
        }
    }
}

/// Overwrites the file without truncating it first, because a read could notice the truncation.
fn rewrite(path: &Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, 0).unwrap();
}

/// A load of a range does not read the header, so it does not learn the model's length.
#[tokio::test]
async fn loading_a_range_of_a_growing_model_fails() {
    let whole = 0..safetensors().len() as u64;
    for range in [whole.clone(), 0..whole.end - 1, 4096..whole.end - 100_000] {
        let mut longer = safetensors();
        longer.push(1);
        longer[100_000..].fill(7);
        let change = |path: &Path| rewrite(path, &longer);
        let error =
            change_during_range_load(Route::UringFixedDirect, &safetensors(), Some(range.clone()), change).await.unwrap_err();
        assert!(matches!(error, Error::Changed { change: "it grew", .. }), "{range:?}: {error}");
    }
}

fn safetensors() -> Vec<u8> {
    let data = SEGMENTS * SEGMENT - 4096;
    let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{data}],"data_offsets":[0,{data}]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend(random_bytes(data, 23));
    bytes
}

#[tokio::test]
async fn loading_a_growing_model_fails() {
    let bytes = safetensors();
    let longer = |path: &Path| rewrite(path, &random_bytes(bytes.len() + 1, 24));
    let error = change_during_load(Route::UringFixedDirect, &bytes, longer).await.unwrap_err();
    assert!(matches!(error, Error::Changed { change: "it grew", .. }), "{error}");
}

#[tokio::test]
async fn shrinking_file_fails_and_reports_where_it_ended() {
    for route in ROUTES {
        for left in [3 * SEGMENT + 4096, 3 * SEGMENT + 5000, 3 * SEGMENT, SEGMENT] {
            let shrink = |path: &Path| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(left as u64).unwrap();
            match change_during_load(route, &model(), shrink).await {
                Err(Error::Ended { offset, planned_bytes, .. }) => {
                    assert!(offset >= left as u64 && planned_bytes == model().len() as u64, "{offset} {planned_bytes}");
                }
                // If no read is short, the check at the end of the load reports the change.
                Err(Error::Changed { change, .. }) => assert_eq!(change, "it shrank"),
                other => panic!("{route}, {left} bytes left: {other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn replaced_or_rewritten_file_fails_and_a_deleted_one_loads() {
    let replace = |path: &Path| {
        let other = path.with_extension("new");
        fs::write(&other, random_bytes(model().len(), 22)).unwrap();
        fs::rename(other, path).unwrap();
    };
    let error = change_during_load(Route::UringFixedDirect, &model(), replace).await.unwrap_err();
    assert!(matches!(error, Error::Changed { change: "it was replaced", .. }), "{error}");

    let write = |path: &Path| {
        use std::os::unix::fs::FileExt;
        fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(b"other weights", 100).unwrap();
    };
    let error = change_during_load(Route::UringFixedDirect, &model(), write).await.unwrap_err();
    assert!(matches!(error, Error::Changed { change: "it was modified", .. }), "{error}");
    assert!(error.to_string().contains("model.bin"), "{error}");

    let image = change_during_load(Route::UringFixedDirect, &model(), |path| fs::remove_file(path).unwrap()).await.unwrap();
    assert_same(&image.files()[0].bytes().unwrap(), &model(), "a deleted file");
}

#[tokio::test]
async fn last_segment_of_a_changed_file_is_withheld() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &model());
    fs::File::open(&path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let heap = GatedHeap::default();
    let loader = heap.builder().build().unwrap();
    let mut segments = loader.load(&path).segments();
    segments.next().await.unwrap().unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
    heap.0.open();
    let mut received = 1;
    let error = loop {
        match segments.next().await.expect("the stream ended without an error") {
            Ok(_) => received += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Changed { .. }), "{error}");
    assert_eq!(received, SEGMENTS - 1);
    assert!(segments.next().await.is_none(), "an error must end the stream");
}

/// Hooks that fail one call to `allocate` and one call to `populate`, each after the given number
/// of successful calls.
#[derive(Debug)]
struct FailingHeap {
    allocations: AtomicUsize,
    populations: AtomicUsize,
}

impl FailingHeap {
    fn new(allocations: usize, populations: usize) -> Self {
        FailingHeap { allocations: AtomicUsize::new(allocations), populations: AtomicUsize::new(populations) }
    }

    fn fail_at_zero(left: &AtomicUsize, operation: &'static str, bytes: usize) -> Result<(), HeapError> {
        match left.fetch_sub(1, Ordering::Relaxed) {
            0 => Err(HeapError::new(operation, bytes, dmaload::Errno::ENOMEM)),
            _ => Ok(()),
        }
    }
}

impl HeapHooks for FailingHeap {
    fn name(&self) -> Option<Cow<'_, str>> {
        Some("failing".into())
    }

    fn before_allocate(&self, bytes: usize) -> Result<(), HeapError> {
        Self::fail_at_zero(&self.allocations, "allocate memory", bytes)
    }

    fn before_populate(&self, _mapped: Range<usize>, part: Range<usize>) -> Result<(), HeapError> {
        Self::fail_at_zero(&self.populations, "populate memory", part.len())
    }
}

#[tokio::test]
async fn heap_that_runs_out_fails_the_load_not_the_loader() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &model());
    for (allocations, populations, operation) in [(2, usize::MAX, "allocate memory"), (usize::MAX, 2, "populate memory")] {
        let heap = FailingHeap::new(allocations, populations);
        let loader = Loader::builder()
            .heap(Hooked::new(AnonHeap::default(), heap))
            .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
            .build()
            .unwrap();
        let error = loader.load(&path).await.unwrap_err();
        let reported = error.to_string();
        assert!(reported.contains("failing") && reported.contains(operation) && reported.contains("ENOMEM"), "{reported}");
        // Only one call fails, so the same loader can load the file now.
        let image = loader.load(&path).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &model(), "the load after the failure");
    }
}

#[tokio::test]
async fn unloadable_file_among_many_is_named() {
    let folder = folder();
    let good: Vec<PathBuf> =
        (0..20).map(|index| file(folder.path(), &format!("{index}.bin"), &random_bytes(10_000, index))).collect();
    let mut paths = good.clone();
    paths.insert(13, folder.path().join("missing.bin"));
    let loader = Loader::new().unwrap();
    let error = loader.load(&paths).await.unwrap_err();
    assert!(error.to_string().contains("missing.bin") && error.to_string().contains("ENOENT"), "{error}");
}

#[tokio::test]
async fn shutdown_fails_running_loads_even_if_a_heap_hangs() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &model());
    let heap = GatedHeap::default();
    let loader = heap.builder().shutdown_timeout(std::time::Duration::from_millis(200)).build().unwrap();
    let mut load = loader.load(&path).start();
    let segment = load.next().await.expect("the load should yield its first segment").unwrap();
    while heap.0.calls.load(Ordering::Relaxed) < SEGMENTS {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let left = loader.shutdown().await.unwrap_err();
    assert_eq!(
        (left.bytes, left.threads),
        (0, 1),
        "no memory should be leaked, because no read is in flight; only the worker should hang, in the heap"
    );
    // Segments that were ready before the shutdown are yielded before the error.
    let error = loop {
        if let Err(error) = load.next().await.expect("the load should fail before yielding all segments") {
            break error;
        }
    };
    assert_eq!(error, Error::ShutDown);
    assert_eq!(load.finish().await.unwrap_err(), Error::ShutDown);
    assert_same(&segment.bytes().unwrap(), &model()[..SEGMENT], "a segment, after the shutdown");
    heap.0.open();
}

/// If a shutdown cannot start the thread that waits for the other threads, it behaves as if its
/// deadline had passed.
#[tokio::test]
async fn shutdown_without_a_waiting_thread_reports_leaks() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &model());
    let heap = GatedHeap::default();
    let loader = heap.builder().build().unwrap();
    let load = loader.load(&path).start();
    // Wait until all segments but the last are read: the memory of a read in flight would be
    // reported as leaked.
    let all_but_one = ((SEGMENTS - 1) * SEGMENT) as u64;
    while heap.0.calls.load(Ordering::Relaxed) < SEGMENTS || loader.metrics().read_bytes < all_but_one {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    // The filter applies only to this thread, which the test harness started for this test.
    let [clone, clone3] = [libc::SYS_clone, libc::SYS_clone3].map(|call| u32::try_from(call).unwrap());
    seccomp::refuse(Scope::Thread, &[clone, clone3], libc::EAGAIN);
    assert!(std::thread::Builder::new().spawn(|| ()).is_err());
    let left = loader.shutdown();
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let left = left.await.unwrap_err();
    assert_eq!((left.bytes, left.threads), (0, 2), "the worker should hang in the heap, and the teller should wait for it");
    assert_eq!(load.finish().await.unwrap_err(), Error::ShutDown);
    heap.0.open();
}

/// Counts how many descriptors of this process refer to the file.
fn count_descriptors(path: &Path) -> usize {
    let path = fs::canonicalize(path).unwrap();
    // A descriptor that is closed during the scan has no target.
    let targets = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    targets.filter(|target| *target == path).count()
}

#[tokio::test]
async fn shutdown_closes_every_file() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &model());
    let small: Vec<_> =
        (0..20).map(|number| file(folder.path(), &format!("{number}.bin"), &random_bytes(9_000, number))).collect();
    for (round, route) in (0..12).flat_map(|round| ROUTES.map(|route| (round, route))) {
        let loader =
            Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT as u64).route(route)).build().unwrap();
        let mut large = loader.load(&path).start();
        let others = [loader.load(&path).start(), loader.load(&small).start()];
        // Shut down while files are being opened, after the first segment, or during reads.
        match round % 3 {
            0 => tokio::time::sleep(std::time::Duration::from_micros(300 * round)).await,
            1 => drop(large.next().await.unwrap().unwrap()),
            _ => {
                while loader.metrics().reads_in_flight == 0 && loader.metrics().read_bytes == 0 {
                    tokio::task::yield_now().await;
                }
            }
        }
        loader.shutdown().await.unwrap();
        let open: usize = small.iter().chain([&path]).map(|path| count_descriptors(path)).sum();
        assert_eq!(open, 0, "{route}, round {round}");
        drop((large, others));
    }
}

#[tokio::test]
async fn rewritten_small_model_is_reported_as_changed_not_damaged() {
    let data = 60_000;
    let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{data}],"data_offsets":[0,{data}]}}}}"#);
    let mut good = (header.len() as u64).to_le_bytes().to_vec();
    good.extend_from_slice(header.as_bytes());
    good.extend(random_bytes(data, 25));
    let (zeros, cut) = (vec![0; good.len()], good[..good.len() / 2].to_vec());
    let mut longer = good.clone();
    longer.extend([7; 100]);
    // The file is rewritten while the load waits for memory. The load has already been planned
    // with the file's length, but has not read the header.
    for torn in [&zeros, &cut, &longer, &Vec::new()] {
        let folder = folder();
        let path = file(folder.path(), "model.safetensors", &good);
        fs::File::open(&path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let heap = GatedHeap::default();
        heap.0.calls.store(SEGMENTS - 1, Ordering::Relaxed);
        let loader = Loader::builder().heap(heap.around_memfds()).allocator_threads(1).build().unwrap();
        let load = loader.load(&path).start();
        while heap.0.calls.load(Ordering::Relaxed) < SEGMENTS {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        fs::write(&path, torn).unwrap();
        heap.0.open();
        let error = load.finish().await.unwrap_err();
        assert!(matches!(error, Error::Changed { .. } | Error::Ended { .. }), "{} bytes: {error}", torn.len());
        if !torn.is_empty() {
            // Loaded without a concurrent writer, the same bytes are reported as a damaged model.
            let error = Loader::new().unwrap().load(&path).await.unwrap_err();
            assert!(matches!(error, Error::Model { .. }), "{error}");
        }
    }
}
