//! Tests what services rely on: a load never blocks an async thread, a runtime can be dropped
//! during a load, futures can be dropped as documented, and a loader reports metrics.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(clippy::print_stdout, reason = "measurements are printed")]

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{assert_same, block_on, file, folder, random_bytes};
use dmaload::{Latency, LoadOptions, Loader, Route};

fn write_large_file(folder: &Path, mib: u64) -> PathBuf {
    let path = folder.join("large.bin");
    let mut file = fs::File::create(&path).unwrap();
    let block = random_bytes(1 << 20, 1);
    (0..mib).for_each(|_| file.write_all(&block).unwrap());
    file.sync_all().unwrap();
    path
}

/// A ticker on a runtime's only thread keeps ticking while a 1 GiB file is loaded, a stream is
/// dropped after its first segment, and the loader shuts down.
#[test]
fn single_threaded_runtime_keeps_ticking_during_loads() {
    let folder = folder();
    let path = write_large_file(folder.path(), 1024);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    for route in [Route::UringFixedDirect, Route::PreadDirect, Route::Bounce, Route::Buffered] {
        let (worst, ticks, took) = runtime.block_on(async {
            let (stop, worst, ticks) =
                (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
            let ticker = {
                let (stop, worst, ticks) = (Arc::clone(&stop), Arc::clone(&worst), Arc::clone(&ticks));
                tokio::spawn(async move {
                    let mut before = Instant::now();
                    while !stop.load(Ordering::Relaxed) {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                        let late = before.elapsed().saturating_sub(Duration::from_millis(1));
                        worst.fetch_max(u64::try_from(late.as_micros()).unwrap(), Ordering::Relaxed);
                        ticks.fetch_add(1, Ordering::Relaxed);
                        before = Instant::now();
                    }
                })
            };
            let started = Instant::now();
            let loader = Loader::builder().load_options(LoadOptions::new().route(route)).build().unwrap();
            let image = loader.load(&path).await.unwrap();
            assert_eq!(image.report().bytes, 1 << 30);
            drop(image);
            let mut half = loader.load(&path).segments();
            half.next().await.unwrap().unwrap();
            drop(half);
            loader.shutdown().await.unwrap();
            let took = started.elapsed();
            stop.store(true, Ordering::Relaxed);
            ticker.await.unwrap();
            (Duration::from_micros(worst.load(Ordering::Relaxed)), ticks.load(Ordering::Relaxed), took)
        });
        println!("{route}: {ticks} ticks in {took:?}, at most {worst:?} late");
        // If the load blocked the thread, one tick would be late by most of the time measured.
        assert!(worst < took / 4, "{route}: a tick was {worst:?} late in {took:?}");
        assert!(u128::from(ticks) > took.as_millis() / 40, "{route}: {ticks} ticks in {took:?}");
    }
}

#[test]
fn loader_outlives_the_runtime_of_its_load() {
    let folder = folder();
    let bytes = random_bytes(40 << 20, 2);
    let path = file(folder.path(), "model.bin", &bytes);
    let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(2 << 20)).window_bytes(4 << 20).build().unwrap();
    for threads in [None, Some(2)] {
        let runtime = || match threads {
            None => tokio::runtime::Builder::new_current_thread().build().unwrap(),
            Some(threads) => tokio::runtime::Builder::new_multi_thread().worker_threads(threads).build().unwrap(),
        };
        let first = runtime();
        let (mut load, task) = first.block_on(async {
            let mut load = loader.load(&path).start();
            load.next().await.unwrap().unwrap();
            let other = loader.load(&path).start();
            // A load that a task awaits is dropped with the runtime.
            (load, tokio::spawn(async move { other.await.map(|image| image.report().bytes) }))
        });
        drop(first);
        assert!(
            runtime().block_on(task).is_err() || threads.is_some(),
            "the task must not have finished on a single-threaded runtime"
        );
        let image = runtime().block_on(async {
            load.next().await.unwrap().unwrap();
            load.finish().await.unwrap()
        });
        assert_same(&image.files()[0].bytes().unwrap(), &bytes, "on another runtime");
    }
    // A load needs no runtime.
    let image = block_on(loader.load(&path).into_future()).unwrap();
    assert_same(&image.files()[0].bytes().unwrap(), &bytes, "without a runtime");
    block_on(loader.shutdown()).unwrap();
}

/// Dropping a `next` future never loses a segment, and dropping a shutdown's future does not stop
/// the shutdown.
#[tokio::test]
async fn documented_cancel_safety_holds() {
    let folder = folder();
    let bytes = random_bytes(24 << 20, 3);
    let path = file(folder.path(), "model.bin", &bytes);
    let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(2 << 20)).window_bytes(2 << 20).build().unwrap();
    let mut segments = loader.load(&path).segments();
    let (mut seen, mut cancelled) = (Vec::new(), 0);
    loop {
        match tokio::time::timeout(Duration::from_micros(50), segments.next()).await {
            Err(_) => cancelled += 1,
            Ok(Some(segment)) => seen.extend_from_slice(&segment.unwrap().bytes().unwrap()),
            Ok(None) => break,
        }
    }
    assert!(cancelled > 0, "at least one `next` should be cancelled");
    assert_same(&seen, &bytes, &format!("after {cancelled} cancellations"));
    // A shutdown continues after its future is dropped.
    let other = loader.clone();
    drop(loader.shutdown());
    let ended = tokio::time::timeout(Duration::from_secs(10), other.load(&path).into_future()).await.unwrap();
    assert!(ended.is_err());
}

#[tokio::test]
async fn metrics_count_loads_reads_and_memory() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &random_bytes(10 << 20, 4));
    let loader = Loader::builder()
        .load_options(LoadOptions::new().segment_bytes(2 << 20))
        .pool_bytes(1 << 30)
        .queue_depth(7)
        .build()
        .unwrap();
    assert_eq!(loader.metrics().loads_started, 0);
    let image = loader.load(&path).await.unwrap();
    assert!(loader.load(folder.path().join("missing")).await.is_err());
    let mut dropped = loader.load(&path).segments();
    dropped.next().await.unwrap().unwrap();
    drop(dropped);
    let seen = loader.metrics();
    let loads = (seen.loads_started, seen.loads_finished, seen.loads_failed);
    assert!(loads == (3, 1, 1) && seen.loads_dropped <= 1 || loads == (3, 2, 1), "{seen:?}");
    assert!(seen.read_bytes >= 12 << 20 && seen.segments >= 6, "{seen:?}");
    assert_eq!(seen.queue_depth, 7);
    assert!(seen.memory_bytes >= 10 << 20);
    assert!(
        seen.in_kernel.count >= 5 && seen.before_kernel.count >= seen.in_kernel.count && seen.after_kernel.count == seen.segments
    );
    assert!(seen.in_kernel.mean() > Duration::ZERO && seen.in_kernel.sum < Duration::from_secs(60));
    let sum: u64 = seen.in_kernel.buckets.iter().sum();
    assert_eq!((sum, seen.in_kernel.buckets.len()), (seen.in_kernel.count, Latency::BUCKETS));
    drop(image);
    let deadline = Instant::now() + Duration::from_secs(20);
    while loader.metrics().reads_in_flight > 0 || loader.metrics().pooled_bytes < 10 << 20 {
        assert!(Instant::now() < deadline, "{:?}", loader.metrics());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    loader.shutdown().await.unwrap();
}
