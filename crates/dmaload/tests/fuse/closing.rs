//! Tests which threads close files.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dmaload::Loader;

use crate::common::ROUTES;
use crate::file_system::{Manners, Mounted};
use crate::{BYTES, SEGMENT, loader, options};

/// Closing a file can block until its server answers, which may be never.
#[tokio::test]
async fn caller_threads_never_close_files() {
    let Some(mounted) = Mounted::new(Manners::AnswersShort(BYTES)) else { return };
    // A load that stops at its memory limit keeps its files open, with no read in flight.
    let limited = || loader().memory_limit_bytes(2 * SEGMENT as u64).build().unwrap();
    let stopped = async |loader: &Loader| {
        let mut segments = loader.load(&mounted.path).segments();
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
    // This time, the load holds the last reference to the engine.
    let (segments, _first) = stopped(&dropped).await;
    drop(dropped);
    drop(segments);
    assert_closed_by_others(&mounted, 3);
}

#[tokio::test]
async fn files_are_closed_after_a_shutdown_amid_reads() {
    // The server is slow, so the ring thread still has the files open when the workers run out of
    // jobs.
    let Some(mounted) = Mounted::new(Manners::AnswersLate) else { return };
    for route in ROUTES {
        let loader = loader().load_options(options().route(route)).build().unwrap();
        let load = loader.load(&mounted.path).start();
        while loader.metrics().reads_in_flight == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        loader.shutdown().await.unwrap();
        // A descriptor that is closed during the scan has no target.
        let targets = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| entry.unwrap().path().read_link().ok());
        assert_eq!(targets.filter(|target| *target == mounted.path).count(), 0, "{route}");
        drop(load);
    }
    assert_closed_by_others(&mounted, ROUTES.len());
}

/// Waits until no file is open, and checks that at least `files` files were closed, all by threads
/// other than this one.
fn assert_closed_by_others(mounted: &Mounted, files: usize) {
    while mounted.open_files.load(Ordering::SeqCst) > 0 {
        std::thread::sleep(Duration::from_millis(2));
    }
    let own = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
    let closers = mounted.closers.lock().unwrap();
    assert!(closers.len() >= files && !closers.contains(&own), "this thread is {own}; files were closed by {closers:?}");
}

/// A slow close on the ring thread would delay all loads, so that thread closes no files, not even
/// those of a load that was dropped with reads in flight.
#[tokio::test]
async fn ring_thread_closes_no_files() {
    // Short reads make the load slow enough that it can be dropped while it is reading.
    let Some(mounted) = Mounted::new(Manners::AnswersShort(8 << 10)) else { return };
    let loader = loader().build().unwrap();
    for _ in 0..20 {
        let load = loader.load(&mounted.path).start();
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
    assert!(!closers.iter().any(|closer| rings.contains(closer)), "ring threads: {rings:?}; files were closed by {closers:?}");
}
