//! Tests that a load leaves no descriptor, mapping or thread behind, whether it finishes, fails,
//! is dropped at any moment, or is ended by a shutdown. The test counts what its process holds, so
//! this file has only one test.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::heap::AnonHeap;
use dmaload::{Error, Layout, LoadOptions, Loader, LoaderBuilder, Source};
use dmaload_testing::Random;

const SEGMENT: u64 = 2 << 20;

#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    threads: Vec<String>,
    mappings: BTreeMap<String, usize>,
}

fn holdings() -> Holdings {
    let names = fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
        let name = fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
        name.starts_with("dmaload").then(|| name.trim().to_owned())
    });
    let mut mappings = BTreeMap::new();
    for line in fs::read_to_string("/proc/self/maps").unwrap().lines() {
        let name = line.splitn(6, ' ').last().unwrap_or("").trim();
        // The address ranges that the library reserves have no name. Unlike the unused ends of the
        // C library's arenas, they start at a multiple of 2 MiB.
        let (start, bytes) = parse_range(line);
        let reserved = line.contains("---p") && name.is_empty() && start % SEGMENT == 0 && bytes >= SEGMENT;
        if name.contains("dmaload") || name.contains("io_uring") || reserved {
            *mappings.entry(if reserved { "reserved".to_owned() } else { name.to_owned() }).or_insert(0) += 1;
        }
    }
    Holdings { descriptors: fs::read_dir("/proc/self/fd").unwrap().count(), threads: names.collect(), mappings }
}

/// Returns the start address and the length in bytes of the mapping that a line of
/// `/proc/self/maps` describes.
fn parse_range(line: &str) -> (u64, u64) {
    let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
    let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
    (start, end - start)
}

struct Files {
    _folder: tempfile::TempDir,
    files: Vec<(PathBuf, Vec<u8>)>,
    large: PathBuf,
}

fn files() -> Files {
    let folder = folder();
    let sizes = (0..100u64).map(|index| (index * 137_777 + index % 3) % (5 * SEGMENT));
    let files = sizes.enumerate().map(|(index, size)| {
        let bytes = random_bytes(usize::try_from(size).unwrap(), index as u64);
        (file(folder.path(), &format!("{index}.bin"), &bytes), bytes)
    });
    let files = files.collect();
    let large = file(folder.path(), "large.bin", &random_bytes(96 << 20, 1000));
    Files { _folder: folder, files, large }
}

fn small_window() -> LoaderBuilder {
    Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT)).window_bytes(4 * SEGMENT)
}

async fn run_a_hundred_loads_at_once(files: &Files) {
    for builder in [
        small_window(),
        small_window().heap(AnonHeap::default()),
        Loader::builder().load_options(LoadOptions::new().layout(Layout::Single)),
    ] {
        let loader = builder.build().unwrap();
        let loads: Vec<_> = files.files.iter().map(|(path, _)| tokio::spawn(loader.load(path).into_future())).collect();
        for (load, (path, bytes)) in loads.into_iter().zip(&files.files) {
            let image = load.await.unwrap().unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), bytes, &path.display().to_string());
        }
        loader.shutdown().await.unwrap();
    }
}

async fn drop_loads_at_random_moments(files: &Files) {
    for route in ROUTES {
        let loader = small_window().load_options(LoadOptions::new().segment_bytes(SEGMENT).route(route)).build().unwrap();
        let mut random = Random::new(1);
        for round in 0..50 {
            let mut load = loader.load(&files.large).start();
            match random.below(4) {
                0 => {}
                1 => tokio::time::sleep(Duration::from_micros(random.below(20_000))).await,
                2 => drop(load.next().await),
                _ => {
                    let _ = tokio::time::timeout(Duration::from_micros(random.below(30_000)), load.next()).await;
                }
            }
            drop(load);
            // Dropping a load does not disturb other loads.
            let (path, bytes) = &files.files[round];
            let image = loader.load(path).await.unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), bytes, "a load among dropped ones");
        }
        // On a busy machine, a slow file can cause the loader to start an extra worker for a
        // while.
        let wanted = std::thread::available_parallelism().unwrap().get().min(2);
        let workers = |threads: &[String]| threads.iter().filter(|name| name.starts_with("dmaload-alloc")).count();
        let deadline = Instant::now() + Duration::from_secs(10);
        while workers(&holdings().threads) > wanted && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let threads = holdings().threads;
        assert_eq!(workers(&threads), wanted, "dropped loads must not change the number of workers: {threads:?}");
        loader.shutdown().await.unwrap();
    }
}

async fn run_failing_loads(files: &Files, folder: &Path) {
    let lying = file(folder, "lying.safetensors", b"\xff\xff\xff\xff\0\0\0\0{\"a\":");
    let loader = small_window().build().unwrap();
    for path in [Path::new("/nonexistent"), Path::new("/dev/null"), folder, &lying] {
        loader.load(path).await.unwrap_err();
    }
    let shrinking = file(folder, "shrinking.bin", &random_bytes(64 << 20, 5));
    let mut load = loader.load(&shrinking).start();
    drop(load.next().await);
    fs::OpenOptions::new().write(true).open(&shrinking).unwrap().set_len(1000).unwrap();
    // The file may have been read and checked before it shrank, so the load may succeed.
    // tests/changes.rs shrinks a file at a known moment.
    drop(load.finish().await);
    drop(loader);

    let loader = small_window().build().unwrap();
    let mut load = loader.load(&files.large).start();
    drop(load.next().await);
    loader.shutdown().await.unwrap();
    // The load may have finished before the shutdown.
    match load.finish().await {
        Ok(_) | Err(Error::ShutDown) => {}
        Err(other) => panic!("{other}"),
    }
}

async fn drop_a_loader_during_a_load(files: &Files) {
    let loader = small_window().build().unwrap();
    let load = loader.load(&files.large).start();
    drop(loader);
    let image = load.await.unwrap();
    assert_eq!(image.report().bytes, 96 << 20, "the load must read all bytes, even after its loader is dropped");
}

/// Waits until the process holds the expected numbers of descriptors and mappings.
async fn assert_holds(what: &str, expected: &(usize, usize)) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let now = holdings();
        let seen = (now.descriptors, now.mappings.values().sum());
        if seen == *expected {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: expected descriptors and mappings {expected:?}, but found {now:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A load that has finished or failed releases what it no longer needs, even if its consumer does
/// not drop it.
async fn keep_ended_loads(files: &Files, folder: &Path) {
    let lying = file(folder, "lying_too.safetensors", b"\xff\xff\xff\xff\0\0\0\0{\"a\":");
    let paths: Vec<_> = files.files.iter().map(|(path, _)| path.clone()).collect();
    for builder in [small_window(), small_window().heap(AnonHeap::default())] {
        let loader = builder.build().unwrap();
        // The first load allocates resources that the loader's threads keep.
        drop(loader.load(&files.large).await.unwrap());
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = holdings();
        let before = (now.descriptors, now.mappings.values().sum());
        let open = |path: &Path| fs::File::open(path).unwrap();
        for what in ["a stream", "a stream of many files", "a stream of an open file", "an empty stream"] {
            let mut stream = match what {
                "a stream" => loader.load(&files.large).segments(),
                "a stream of many files" => loader.load(&paths).segments(),
                "a stream of an open file" => loader.load(open(&files.large)).segments(),
                _ => loader.load(Source::file(open(&paths[0])).range(0..0)).segments(),
            };
            while let Some(segment) = stream.next().await {
                drop(segment.unwrap());
            }
            assert_holds_before_and_after_drop(what, stream, &before).await;
        }
        let mut failed = loader.load(&lying).start();
        assert!(failed.next().await.unwrap().is_err());
        assert_holds("a load that failed", &before).await;
        let mut refused = loader.load(open(&lying)).options(loader.load_options().format(dmaload::Format::Safetensors)).start();
        assert!(refused.next().await.unwrap().is_err());
        assert_holds("a load of an open file that failed", &before).await;
        drop((failed, refused));
        let mut failed = loader.load(Path::new("/nonexistent")).segments();
        assert!(failed.next().await.unwrap().is_err());
        assert_holds_before_and_after_drop("a stream that failed", failed, &before).await;
        // A finished load keeps its segments for the image, but keeps no file open.
        let mut load = loader.load(open(&files.large)).start();
        let mut descriptors = 0;
        while let Some(segment) = load.next().await {
            descriptors += usize::from(segment.unwrap().hand_out_memfd().is_ok());
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while holdings().descriptors > before.0 + descriptors {
            assert!(Instant::now() < deadline, "{:?} with {descriptors} memfds; before: {before:?}", holdings());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(load);
        assert_holds("a load that was dropped", &before).await;
        loader.shutdown().await.unwrap();
    }
}

/// Checks that everything is released while the stream still exists, and also after it is dropped.
async fn assert_holds_before_and_after_drop(what: &str, stream: dmaload::Segments, expected: &(usize, usize)) {
    assert_holds(what, expected).await;
    drop(stream);
    assert_holds(what, expected).await;
}

#[test]
fn finished_and_failed_loads_leak_nothing() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let files = files();
    let scratch = folder();
    // The first load initializes per-process state, which is not a leak.
    runtime.block_on(drop_a_loader_during_a_load(&files));
    std::thread::sleep(Duration::from_millis(500));
    let before = holdings();
    assert!(before.threads.is_empty(), "{before:?}");
    assert!(before.mappings.keys().all(|name| name == "reserved"), "{before:?}");

    let started = Instant::now();
    runtime.block_on(async {
        run_a_hundred_loads_at_once(&files).await;
        drop_loads_at_random_moments(&files).await;
        run_failing_loads(&files, scratch.path()).await;
        keep_ended_loads(&files, scratch.path()).await;
        drop_a_loader_during_a_load(&files).await;
    });
    println!("loads took {:?}", started.elapsed());

    let deadline = Instant::now() + Duration::from_secs(10);
    while holdings() != before {
        assert!(Instant::now() < deadline, "leaked: {:?}\nbefore: {before:?}", holdings());
        std::thread::sleep(Duration::from_millis(10));
    }
}
