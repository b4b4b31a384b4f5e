//! The ring thread should never block on a file system. If the kernel blocks it anyway, a shutdown
//! still finishes, and reports how much memory that thread holds.
//!
//! A seccomp filter blocks `io_uring_enter`. The filter cannot be removed, so this file has one
//! test, which runs in its own process.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::time::{Duration, Instant};

use common::{file, folder, random_bytes};
use dmaload::{Error, LoadOptions, Loader};
use dmaload_testing::seccomp;

const SEGMENT: usize = 2 << 20;
const BYTES: usize = 4 * SEGMENT + 777;
const IO_URING_ENTER: u32 = 426;

#[tokio::test]
async fn shutdown_reports_the_memory_of_a_hanging_ring_thread() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &random_bytes(BYTES, 1));
    let loader = Loader::builder()
        .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
        .shutdown_timeout(Duration::from_millis(300))
        .build()
        .unwrap();
    // The first load sets up the ring.
    loader.load(&path).await.unwrap();
    let _listener = seccomp::hang(IO_URING_ENTER);
    let mut load = loader.load(&path).start();
    while load.progress().allocated_bytes < BYTES as u64 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let seen = tokio::time::timeout(Duration::from_millis(100), load.next()).await;
    assert!(seen.is_err(), "a segment arrived although no read completed: {seen:?}");
    let start = Instant::now();
    let leaked = loader.shutdown().await.unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(10), "the shutdown took {:?}", start.elapsed());
    // Only the ring thread hangs; the workers have exited.
    assert_eq!((leaked.bytes, leaked.threads), (BYTES.next_multiple_of(4096) as u64, 1), "{leaked}");
    assert!(matches!(load.finish().await, Err(Error::ShutDown)));
}
