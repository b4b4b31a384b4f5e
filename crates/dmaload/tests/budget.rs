//! Tests for memory limits: a loader never exceeds its limit, a consumer that stops delays only
//! its own load, and no load starves.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(clippy::print_stdout, reason = "measurements are printed")]

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{assert_same, file, folder, random_bytes};
use dmaload::heap::AnonHeap;
use dmaload::{Error, Layout, LoadOptions, Loader, Priority, Segment};
use sha2::{Digest, Sha256};

const MIB: u64 = 1 << 20;
/// Each test holds this lock. Tests measure the memory of the whole process, so they must run one
/// at a time.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Returns the resident shared memory of this process, in bytes. It includes segments on memfds.
fn resident_shared_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

/// A thread that samples memory usage every 2 ms and records the peaks that the kernel and the
/// loader report.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<(u64, u64)>>,
}

impl Watch {
    fn start(loader: &Loader) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (own, loader) = (Arc::clone(&stop), loader.clone());
        let thread = std::thread::spawn(move || {
            let mut most = (0, 0);
            while !own.load(Ordering::Relaxed) {
                most.0 = most.0.max(resident_shared_bytes());
                most.1 = most.1.max(loader.memory_bytes());
                std::thread::sleep(Duration::from_millis(2));
            }
            most
        });
        Watch { stop, thread: Some(thread) }
    }

    /// Stops sampling and returns the peaks in bytes: first the kernel's, then the loader's.
    fn peaks(mut self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

/// Writes a file of `mib` distinct blocks of 1 MiB. Returns its path and its SHA-256 digest.
fn write_large_file(folder: &Path, name: &str, mib: u64) -> (PathBuf, Vec<u8>) {
    let path = folder.join(name);
    let mut file = fs::File::create(&path).unwrap();
    let (block, mut digest) = (random_bytes(1 << 20, mib), Sha256::new());
    for number in 0..mib {
        for part in [&number.to_le_bytes()[..], &block[8..]] {
            file.write_all(part).unwrap();
            digest.update(part);
        }
    }
    file.sync_all().unwrap();
    (path, digest.finalize().to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_of_a_larger_model_stays_within_the_limit() {
    let _alone = ALONE.lock().await;
    // The default is as large as CI has time for. DMALOAD_STREAM_MIB=4096 streams 4 GiB within a
    // limit of 512 MiB.
    let mib = std::env::var("DMALOAD_STREAM_MIB").map_or(1024, |mib| mib.parse().unwrap());
    let limit = mib * MIB / 8;
    let folder = folder();
    let (path, expected) = write_large_file(folder.path(), "model.bin", mib);
    let loader = Loader::builder().memory_limit_bytes(limit).build().unwrap();
    let before = resident_shared_bytes();
    let watch = Watch::start(&loader);
    let mut segments = loader.load(&path).segments();
    let mut digest = Sha256::new();
    while let Some(segment) = segments.next().await {
        digest.update(segment.unwrap().bytes().unwrap());
    }
    assert_eq!(digest.finalize().to_vec(), expected);
    let (seen, counted) = watch.peaks();
    println!(
        "{mib} MiB streamed within {} MiB: at most {} MiB resident, {} MiB counted by the loader",
        limit / MIB,
        (seen - before) / MIB,
        counted / MIB
    );
    assert!(seen - before <= limit, "{seen} bytes were resident");
    assert!(counted <= limit && counted > 0);
    assert_eq!(segments.report().unwrap().bytes, mib * MIB);
    drop(segments);
    loader.shutdown().await.unwrap();
}

/// Without a memory limit, the window and the segment size bound the bytes that are loaded ahead
/// of the consumer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_consumer_delays_only_its_own_stream() {
    const WINDOW: u64 = 32 * MIB;
    const SEGMENT: u64 = 8 * MIB;
    let _alone = ALONE.lock().await;
    let folder = folder();
    let (path, expected) = write_large_file(folder.path(), "model.bin", 256);
    // Several of these small files share an allocation.
    let small: Vec<_> = (0..300).map(|n| file(folder.path(), &format!("{n}"), &random_bytes(900_000 + n, n as u64))).collect();
    for heap in ["memfd", "anon"] {
        let builder = Loader::builder().window_bytes(WINDOW).load_options(LoadOptions::new().segment_bytes(SEGMENT));
        let builder = if heap == "anon" { builder.heap(AnonHeap::default()) } else { builder };
        let loader = builder.build().unwrap();
        let mut stopped = Vec::new();
        for paths in [vec![path.clone()], small.clone()] {
            let mut segments = loader.load(&paths).segments();
            let first = segments.next().await.unwrap().unwrap();
            // Wait until the load makes no progress for 200 ms.
            let (mut before, mut same) = (0, 0);
            while same < 20 {
                tokio::time::sleep(Duration::from_millis(10)).await;
                let now = segments.progress().read_bytes;
                (before, same) = if now == before { (now, same + 1) } else { (now, 0) };
            }
            let most = WINDOW + 2 * SEGMENT;
            assert!(before <= most, "{heap}: {before} bytes were read for a consumer that received {} bytes", first.len());
            assert!(before >= WINDOW / 2, "{heap}: only {before} bytes were read ahead of the consumer");
            stopped.push((segments, first));
        }
        assert!(loader.memory_bytes() <= 2 * (WINDOW + 2 * SEGMENT), "{} bytes", loader.memory_bytes());
        // Other loads make progress: a stream with a fast consumer, and a load that keeps its
        // image.
        let mut segments = loader.load(&path).segments();
        let mut digest = Sha256::new();
        while let Some(segment) = tokio::time::timeout(Duration::from_secs(20), segments.next()).await.unwrap() {
            digest.update(segment.unwrap().bytes().unwrap());
        }
        assert_eq!(digest.finalize().to_vec(), expected);
        let image = tokio::time::timeout(Duration::from_secs(20), loader.load(&path).into_future()).await.unwrap().unwrap();
        assert_eq!(image.report().bytes, 256 * MIB);
        drop(image);
        // Kept segments do not count against the window, so a consumer can keep all of them
        // without stalling its stream.
        for ((mut segments, first), bytes) in stopped.into_iter().zip([256 * MIB, 300 * 900_000 + 299 * 150]) {
            let mut kept = vec![first];
            while let Some(segment) = tokio::time::timeout(Duration::from_secs(20), segments.next()).await.unwrap() {
                kept.push(segment.unwrap());
            }
            assert_eq!(kept.iter().map(|segment| segment.len() as u64).sum::<u64>(), bytes);
        }
        loader.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn load_that_cannot_fit_fails_at_once_with_sizes() {
    let _alone = ALONE.lock().await;
    let folder = folder();
    let path = file(folder.path(), "model.bin", &random_bytes(40 << 20, 1));
    let loader = Loader::builder().memory_limit_bytes(32 * MIB).build().unwrap();
    let error = loader.load(&path).await.unwrap_err();
    assert_eq!(error, Error::OverLimit { wanted_bytes: 40 * MIB, limit_bytes: 32 * MIB, why: "all of the load" });
    assert!(error.to_string().contains("8388608 more than the loader's limit"), "{error}");
    let single = loader.load_options().layout(Layout::Single);
    let mut stream = loader.load(&path).options(single).segments();
    assert!(matches!(stream.next().await, Some(Err(Error::OverLimit { why: "a segment", .. }))));
    let error = Loader::builder().memory_limit_bytes(MIB).build().unwrap_err();
    assert!(matches!(error, Error::Config(_)), "{error}");
}

#[tokio::test]
async fn kept_loads_wait_for_each_other_without_deadlock() {
    let _alone = ALONE.lock().await;
    let folder = folder();
    let bytes = random_bytes(20 << 20, 1);
    let path = file(folder.path(), "model.bin", &bytes);
    let loader = Loader::builder().memory_limit_bytes(32 * MIB).build().unwrap();
    let first = loader.load(&path).await.unwrap();
    // Only one of the two loads fits within the limit: the second waits until the first image is
    // dropped.
    let mut second = loader.load(&path).start();
    let waiting = tokio::time::timeout(Duration::from_millis(200), second.next()).await;
    assert!(waiting.is_err(), "{waiting:?}");
    assert!(loader.memory_bytes() <= 32 * MIB);
    drop(first);
    let image = tokio::time::timeout(Duration::from_secs(20), second.finish()).await.unwrap().unwrap();
    assert_same(&image.files()[0].bytes().unwrap(), &bytes, "the second load");
    drop(image);
    let loads = [(); 8].map(|()| tokio::spawn(loader.load(&path).into_future()));
    for load in loads {
        let image = tokio::time::timeout(Duration::from_secs(60), load).await.unwrap().unwrap().unwrap();
        assert_eq!(image.report().bytes, 20 * MIB);
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while loader.memory_bytes() > 0 {
        assert!(Instant::now() < deadline, "{} bytes were never freed", loader.memory_bytes());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Pooled memory counts against the limit, is freed for loads that need other sizes, and is reused
/// by loads of the same size.
#[tokio::test]
async fn pool_stays_within_the_limit_and_yields_to_loads() {
    let _alone = ALONE.lock().await;
    let folder = folder();
    let paths = [24, 28].map(|mib: usize| file(folder.path(), &format!("{mib}"), &random_bytes(mib << 20, mib as u64)));
    let loader = Loader::builder()
        .memory_limit_bytes(40 * MIB)
        .pool_bytes(u64::MAX)
        .load_options(LoadOptions::new().segment_bytes(8 << 20))
        .build()
        .unwrap();
    let mut reused = 0;
    for round in 0..6 {
        let path = &paths[(round / 2) % 2];
        let image = tokio::time::timeout(Duration::from_secs(20), loader.load(path).into_future()).await.unwrap().unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &fs::read(path).unwrap(), "the image");
        reused += image.report().reused_bytes;
        assert!(loader.memory_bytes() <= 40 * MIB, "{}", loader.memory_bytes());
    }
    assert!(reused >= 3 * 24 * MIB, "only {reused} bytes were reused");
    assert!(loader.pooled_bytes() > 0 && loader.memory_bytes() == loader.pooled_bytes());
    loader.trim_pool(0);
    let deadline = Instant::now() + Duration::from_secs(20);
    while loader.memory_bytes() > 0 {
        assert!(Instant::now() < deadline, "{} bytes were never freed", loader.memory_bytes());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_share_a_limit_with_ten_stopped_streams() {
    let _alone = ALONE.lock().await;
    let folder = folder();
    let limit = 256 * MIB;
    let (path, expected) = write_large_file(folder.path(), "model.bin", 24);
    for stalled in [0, 10] {
        let loader = Loader::builder().memory_limit_bytes(limit).build().unwrap();
        let before = resident_shared_bytes();
        let watch = Watch::start(&loader);
        let mut stopped: Vec<(dmaload::Segments, Segment)> = Vec::new();
        for _ in 0..stalled {
            let mut segments = loader.load(&path).segments();
            let segment = segments.next().await.unwrap().unwrap();
            stopped.push((segments, segment));
        }
        let started = Instant::now();
        let slowest = Arc::new(AtomicU64::new(0));
        let loads: Vec<_> = (0..64 - stalled)
            .map(|_| {
                let (loader, path, expected, slowest) = (loader.clone(), path.clone(), expected.clone(), Arc::clone(&slowest));
                tokio::spawn(async move {
                    let mut segments = loader.load(&path).segments();
                    let mut digest = Sha256::new();
                    while let Some(segment) = segments.next().await {
                        digest.update(segment.unwrap().bytes().unwrap());
                    }
                    assert_eq!(digest.finalize().to_vec(), expected);
                    let took = u64::try_from(started.elapsed().as_micros()).unwrap();
                    slowest.fetch_max(took, Ordering::Relaxed);
                    took
                })
            })
            .collect();
        let mut sum = 0;
        let count = loads.len() as u64;
        for load in loads {
            sum += tokio::time::timeout(Duration::from_secs(120), load).await.expect("a stream deadlocked").unwrap();
        }
        let (mean, slowest) = (sum / count, slowest.load(Ordering::Relaxed));
        let (seen, counted) = watch.peaks();
        println!(
            "{count} streams and {stalled} stopped ones: slowest {:.2} × mean, at most {} of {} MiB resident",
            slowest as f64 / mean as f64,
            (seen - before) / MIB,
            limit / MIB
        );
        assert!(slowest <= 3 * mean, "the slowest stream took {slowest} µs, the mean is {mean} µs");
        assert!(seen - before <= limit && counted <= limit, "{seen} bytes were resident, {counted} bytes counted");
        // The stopped streams resume after the segment that they have already yielded.
        for (mut segments, first) in stopped {
            let mut digest = Sha256::new();
            digest.update(first.bytes().unwrap());
            drop(first);
            while let Some(segment) = segments.next().await {
                digest.update(segment.unwrap().bytes().unwrap());
            }
            assert_eq!(digest.finalize().to_vec(), expected);
        }
        loader.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn high_priority_load_overtakes_low_priority_loads() {
    let _alone = ALONE.lock().await;
    let folder = folder();
    let (path, _) = write_large_file(folder.path(), "model.bin", 96);
    let loader = Loader::builder()
        .heap(AnonHeap::default())
        .allocator_threads(1)
        .load_options(LoadOptions::new().segment_bytes(4 << 20))
        .window_bytes(8 << 20)
        .build()
        .unwrap();
    let low = [(); 4].map(|()| loader.load(&path).options(loader.load_options().priority(Priority::Low)).start());
    let high = loader.load(&path).options(loader.load_options().priority(Priority::High)).await.unwrap();
    assert_eq!(high.report().bytes, 96 * MIB);
    let read: u64 = low.iter().map(|load| load.progress().read_bytes).sum();
    assert!(read < 2 * 96 * MIB, "the low-priority loads read {read} bytes before the high-priority load finished");
    for load in low {
        load.await.unwrap();
    }
}

/// Writes a model with `count` tensors of 2.5 MiB, each of which spans at least two 2 MiB
/// segments.
fn write_tensors(folder: &Path, count: usize) -> PathBuf {
    file(folder, "tensors.safetensors", &dmaload_testing::safetensors_of(count, 5 << 19, 9))
}

/// The library holds the segments of an incomplete tensor, so a stream's reservation must include
/// them.
#[tokio::test]
async fn tensor_streams_never_wait_for_their_own_memory() {
    let _alone = ALONE.lock().await;
    let folder = folder();
    let path = write_tensors(folder.path(), 12);
    let loader = Loader::builder()
        .memory_limit_bytes(32 * MIB)
        .load_options(LoadOptions::new().segment_bytes(2 << 20))
        .window_bytes(4 << 20)
        .build()
        .unwrap();
    let expected: Vec<_> = loader.load(&path).tensors().collect_names().await;
    assert_eq!(expected.len(), 12);
    let streams: Vec<_> = (0..40)
        .map(|number| {
            let options = loader.load_options();
            // Half of the streams request the tensors in a different order from the file's.
            let options = if number % 2 == 0 { options } else { options.tensors(["t11", "t3", "*"]) };
            tokio::spawn(loader.load(&path).options(options).tensors().collect_names())
        })
        .collect();
    for stream in streams {
        let mut names = tokio::time::timeout(Duration::from_secs(60), stream).await.expect("a stream deadlocked").unwrap();
        names.sort();
        let mut expected = expected.clone();
        expected.sort();
        assert_eq!(names, expected);
    }
    assert!(loader.memory_bytes() <= 32 * MIB);
    // With a limit below the size of a tensor, a stream of tensors fails, but a stream of segments
    // works.
    let small = Loader::builder()
        .memory_limit_bytes(2 * MIB)
        .load_options(LoadOptions::new().segment_bytes(2 << 20))
        .window_bytes(2 << 20)
        .build()
        .unwrap();
    let mut refused = small.load(&path).tensors();
    assert!(matches!(refused.next().await, Some(Err(Error::OverLimit { why: "the memory of a tensor", .. }))));
    drop(refused);
    let mut segments = small.load(&path).segments();
    while let Some(segment) = segments.next().await {
        segment.unwrap();
    }
}

/// A consumer that holds so many tensors that the load cannot continue gets an error if it waits
/// with `next_while_holding_blocking`. With `next`, it waits until another thread drops tensors.
#[test]
fn consumer_that_holds_the_limit_gets_an_error_or_waits() {
    let _alone = ALONE.blocking_lock();
    let folder = folder();
    let path = write_tensors(folder.path(), 24);
    let limit = 16 * MIB;
    let loader = Loader::builder()
        .memory_limit_bytes(limit)
        .load_options(LoadOptions::new().segment_bytes(2 << 20))
        .window_bytes(4 << 20)
        .build()
        .unwrap();
    let mut stream = loader.load(&path).tensors();
    let mut held = std::collections::VecDeque::new();
    let (mut names, mut refused) = (Vec::new(), 0);
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Some(next) = stream.next_while_holding_blocking() {
        assert!(Instant::now() < deadline, "the stream did not finish in time");
        match next {
            Ok(tensor) => {
                names.push(tensor.name().to_owned());
                held.push_back(tensor);
            }
            Err(error) => {
                let Error::HeldUp { held_bytes, wanted_bytes, limit_bytes } = error else { panic!("{error}") };
                assert_eq!(limit_bytes, limit);
                assert!(wanted_bytes > 0 && wanted_bytes <= 2 * MIB, "{wanted_bytes}");
                assert!(held_bytes > limit / 4 && held_bytes <= limit, "{held_bytes}");
                assert!(!held.is_empty(), "{error}");
                refused += 1;
                // The load continues once memory is free.
                held.drain(..held.len() / 2 + 1);
            }
        }
        assert!(loader.memory_bytes() <= limit);
    }
    assert_eq!(names, (0..24).map(|number| format!("t{number}")).collect::<Vec<_>>());
    assert!(refused > 1, "{refused}");
    assert_eq!(stream.report().unwrap().bytes, fs::metadata(&path).unwrap().len());
    drop((stream, held));
    // `next` waits until another thread drops the tensors.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let dropping = std::thread::spawn(move || {
        while let Ok(tensor) = receiver.recv() {
            std::thread::sleep(Duration::from_millis(30));
            drop::<dmaload::Tensor>(tensor);
        }
    });
    let count = runtime.block_on(async {
        let (mut stream, mut count) = (loader.load(&path).tensors(), 0);
        while let Some(tensor) = tokio::time::timeout(Duration::from_secs(60), stream.next()).await.unwrap() {
            sender.send(tensor.unwrap()).unwrap();
            count += 1;
        }
        count
    });
    assert_eq!(count, 24);
    drop(sender);
    dropping.join().unwrap();
    // A kept load needs memory for all of its segments at once, so it is refused before any memory
    // is allocated.
    let load = loader.load(&path).start();
    assert!(matches!(load.tensor_blocking("t23"), Err(Error::OverLimit { why: "all of the load", .. })));
}

/// A consumer that drops each tensor before it waits for the next never gets an error.
#[test]
fn consumer_that_drops_its_tensors_is_never_held_up() {
    let _alone = ALONE.blocking_lock();
    let folder = folder();
    let path = write_tensors(folder.path(), 24);
    let loader = Loader::builder()
        .memory_limit_bytes(12 * MIB)
        .load_options(LoadOptions::new().segment_bytes(2 << 20))
        .window_bytes(4 << 20)
        .build()
        .unwrap();
    let consume = || {
        let mut stream = loader.load(&path).tensors();
        while let Some(tensor) = stream.next_while_holding_blocking() {
            tensor.unwrap();
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| (0..10).for_each(|_| consume()));
        }
    });
}

trait CollectNames {
    fn collect_names(self) -> impl Future<Output = Vec<String>> + Send;
}

impl CollectNames for dmaload::Tensors {
    async fn collect_names(mut self) -> Vec<String> {
        let mut names = Vec::new();
        while let Some(tensor) = self.next().await {
            names.push(tensor.unwrap().name().to_owned());
        }
        names
    }
}

/// A load that reuses an allocation is charged for the whole allocation, so other loads cannot use
/// up the rest of its reservation.
#[tokio::test]
async fn reservation_holds_while_the_pool_is_reused() {
    let _alone = ALONE.lock().await;
    let folder = folder();
    let large = file(folder.path(), "large", &random_bytes(64 << 20, 1));
    let small = file(folder.path(), "small", &random_bytes(16 << 20, 2));
    for _ in 0..5 {
        let loader = Loader::builder()
            .memory_limit_bytes(80 * MIB)
            .load_options(LoadOptions::new().segment_bytes(64 << 20))
            .pool_bytes(u64::MAX);
        let loader = loader.allocator_threads(1).build().unwrap();
        drop(loader.load(&large).await.unwrap());
        let both = async { (loader.load(&large).into_future(), loader.load(&small).into_future()) }.await;
        let (large, small) = (tokio::spawn(both.0), tokio::spawn(both.1));
        let small = tokio::time::timeout(Duration::from_secs(20), small).await.expect("the small load starved").unwrap().unwrap();
        let large = tokio::time::timeout(Duration::from_secs(20), large).await.expect("the large load starved").unwrap().unwrap();
        assert_eq!((small.report().bytes, large.report().bytes), (16 * MIB, 64 * MIB));
        assert!(loader.memory_bytes() <= 80 * MIB);
    }
}
