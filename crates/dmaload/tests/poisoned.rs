//! Tests that a ring that fails during loads is replaced: the running loads fail with the ring's
//! error, and later loads work.
//!
//! A seccomp filter makes `io_uring_enter` fail. The filter cannot be removed, so this file has
//! one test, which runs in its own process.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};

use common::{assert_same, file, folder, random_bytes};
use dmaload::heap::{HeapError, HeapHooks, Hooked, MemfdHeap};
use dmaload::{Attempt, Errno, Error, LoadOptions, Loader, Route};
use dmaload_testing::seccomp::{self, Scope};

const SEGMENT: usize = 2 << 20;
const IO_URING_ENTER: u32 = 426;

/// Hooks that allow three allocations, and block all others until the test opens the gate.
#[derive(Debug, Clone, Default)]
struct Gated(Arc<(Mutex<u32>, Condvar)>);

impl Gated {
    fn open(&self) {
        *self.0.0.lock().unwrap() = 1000;
        self.0.1.notify_all();
    }
}

impl HeapHooks for Gated {
    fn before_allocate(&self, _bytes: usize) -> Result<(), HeapError> {
        let mut allocated = self.0.1.wait_while(self.0.0.lock().unwrap(), |allocated| *allocated == 3).unwrap();
        *allocated += 1;
        Ok(())
    }
}

#[tokio::test]
async fn broken_ring_fails_its_loads_and_later_loads_work() {
    let folder = folder();
    let bytes = random_bytes(6 * SEGMENT + 777, 1);
    let path = file(folder.path(), "model.bin", &bytes);
    let heap = Gated::default();
    let loader = Loader::builder()
        .heap(Hooked::new(MemfdHeap::default(), heap.clone()))
        .allocator_threads(1)
        .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
        .build()
        .unwrap();
    let mut loads = [loader.load(&path).start(), loader.load(&path).start()];
    // Both loads have started once each has returned a segment.
    for load in &mut loads {
        load.next().await.unwrap().unwrap();
    }
    seccomp::refuse(Scope::Process, &[IO_URING_ENTER], libc::EIO);
    heap.open();
    for mut load in loads {
        let error = loop {
            match load.next().await.expect("the load should fail before yielding all segments") {
                Ok(segment) => assert_same(&segment.bytes().unwrap(), &bytes[..][to_usize(segment.file_range())], "a segment"),
                Err(error) => break error,
            }
        };
        assert_eq!(error, Error::Ring { errno: Errno::EIO });
        assert!(error.to_string().contains("EIO"), "{error}");
        assert_eq!(load.finish().await.unwrap_err(), error, "a load must keep reporting its first error");
    }
    // Setting up a new ring fails as well, so the load falls back as usual.
    let image = loader.load(&path).await.unwrap();
    assert_same(&image.files()[0].bytes().unwrap(), &bytes, "after the ring failed");
    let report = image.report();
    assert_eq!(report.route, Route::PreadDirect);
    let steps: Vec<_> = report.fallbacks.iter().map(|step| (step.attempt, step.errno)).collect();
    assert_eq!(steps, [(Attempt::SetUpRing, Errno::EIO)]);
    let strict = loader.load(&path).options(loader.load_options().strict(true)).await.unwrap_err();
    assert!(matches!(strict, Error::Refused { errno: Errno::EIO, .. }), "{strict}");
    // Memory of reads in flight when the ring failed is leaked on purpose, and reported.
    match loader.shutdown().await {
        Ok(()) => {}
        Err(leaked) => assert!(leaked.threads == 0 && leaked.bytes <= 12 * SEGMENT as u64, "{leaked}"),
    }
}

fn to_usize(range: Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}
