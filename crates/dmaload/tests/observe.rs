//! Tests that observers see every byte before any consumer does. If a heap's memory is uncached,
//! they see the bytes in staging, never in the segments.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::heap::{HeapError, HeapHooks, Hooked, MemfdHeap};
use dmaload::{Error, LoadOptions, Loader, Observer, Rejection, Route};

const SEGMENT: usize = 2 << 20;

/// Hooks that record which mappings are populated, and can claim that the heap's memory is
/// uncached.
#[derive(Debug, Default, Clone)]
struct SpiedHeap {
    uncached: bool,
    mapped: Arc<Mutex<Vec<Range<usize>>>>,
}

impl SpiedHeap {
    fn contains(&self, bytes: &[u8]) -> bool {
        self.mapped.lock().unwrap().iter().any(|mapped| mapped.contains(&bytes.as_ptr().addr()))
    }
}

impl HeapHooks for SpiedHeap {
    fn before_populate(&self, mapped: Range<usize>, _part: Range<usize>) -> Result<(), HeapError> {
        self.mapped.lock().unwrap().push(mapped);
        Ok(())
    }

    fn is_uncached(&self, _of_the_heap: bool) -> bool {
        self.uncached
    }
}

impl SpiedHeap {
    fn around_memfds(&self) -> Hooked<MemfdHeap, Self> {
        Hooked::new(MemfdHeap::default(), self.clone())
    }
}

/// An observer that records the bytes it is given, and whether they were in the heap's memory.
struct Recorder {
    heap: SpiedHeap,
    files: Mutex<Vec<Vec<u8>>>,
    in_segments: AtomicBool,
    elsewhere: AtomicBool,
    /// How long each call is delayed.
    delay: Duration,
}

impl Recorder {
    fn new(heap: &SpiedHeap, files: usize) -> Arc<Self> {
        let files = Mutex::new(vec![Vec::new(); files]);
        let (in_segments, elsewhere) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Recorder { heap: heap.clone(), files, in_segments, elsewhere, delay: Duration::ZERO })
    }
}

impl Observer for Recorder {
    fn bytes(&self, file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        if self.heap.contains(bytes) { &self.in_segments } else { &self.elsewhere }.store(true, Ordering::Relaxed);
        let mut files = self.files.lock().unwrap();
        if files[file_index].len() as u64 != offset {
            return Err(format!("expected offset {}, not {offset}", files[file_index].len()).into());
        }
        files[file_index].extend_from_slice(bytes);
        drop(files);
        std::thread::sleep(self.delay);
        Ok(())
    }
}

fn loader(heap: &SpiedHeap) -> Loader {
    Loader::builder()
        .heap(heap.around_memfds())
        .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
        .window_bytes(8 << 20)
        .build()
        .unwrap()
}

#[tokio::test]
async fn every_byte_is_observed_once_in_order_by_every_route() {
    let folder = folder();
    let contents = [random_bytes(7 * SEGMENT + 777, 1), Vec::new(), random_bytes(1, 2), random_bytes(SEGMENT, 3)];
    let paths: Vec<_> = contents.iter().enumerate().map(|(n, bytes)| file(folder.path(), &n.to_string(), bytes)).collect();
    for uncached in [false, true] {
        for route in ROUTES {
            let heap = SpiedHeap { uncached, ..SpiedHeap::default() };
            let loader = loader(&heap);
            let recorder = Recorder::new(&heap, paths.len());
            let options = loader.load_options().route(route).observer(recorder.clone());
            let image = loader.load(&paths).options(options).await.unwrap();
            let what = format!("{route}, uncached: {uncached}");
            for (index, expected) in contents.iter().enumerate() {
                assert_same(&recorder.files.lock().unwrap()[index], expected, &what);
                assert_same(&image.files()[index].bytes().unwrap(), expected, &what);
            }
            let seen = [&recorder.in_segments, &recorder.elsewhere].map(|seen| seen.load(Ordering::Relaxed));
            assert_eq!(seen, [!uncached, uncached], "{what}: whether bytes were observed in segments, and elsewhere");
            let report = image.report();
            assert_eq!(report.route, if uncached { route.max(Route::Bounce) } else { route }, "{what}");
            assert_eq!(report.notes.iter().any(|note| note.contains("uncached")), uncached, "{what}: {:?}", report.notes);
        }
    }
}

#[tokio::test]
async fn segments_wait_for_a_slow_observer_in_bounded_memory() {
    let folder = folder();
    let expected = random_bytes(12 * SEGMENT, 4);
    let path = file(folder.path(), "slow.bin", &expected);
    for uncached in [false, true] {
        let heap = SpiedHeap { uncached, ..SpiedHeap::default() };
        let loader = loader(&heap);
        let mut recorder = Arc::into_inner(Recorder::new(&heap, 1)).unwrap();
        recorder.delay = Duration::from_millis(10);
        let recorder = Arc::new(recorder);
        let mut load = loader.load(&path).options(loader.load_options().observer(recorder.clone())).start();
        while let Some(segment) = load.next().await {
            let (segment, seen) = (segment.unwrap(), recorder.files.lock().unwrap()[0].len() as u64);
            assert!(
                seen >= segment.file_range().end,
                "{:?} was handed out when only {seen} bytes had been observed",
                segment.file_range()
            );
            let progress = load.progress();
            let ahead = progress.allocated_bytes.saturating_sub(seen);
            assert!(ahead <= 8 << 20, "{ahead} bytes are allocated but not yet observed");
        }
        assert_same(&load.finish().await.unwrap().files()[0].bytes().unwrap(), &expected, "observed slowly");
    }
}

/// An observer that rejects the call whose bytes include offset `at`. If `panics` is set, it
/// panics in that call instead.
struct Judge {
    at: u64,
    panics: bool,
}

impl Observer for Judge {
    fn bytes(&self, _file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        if !(offset..offset + bytes.len() as u64).contains(&self.at) {
            return Ok(());
        }
        assert!(!self.panics, "a mistake in the observer");
        Err(format!("byte {} is wrong", self.at).into())
    }
}

#[tokio::test]
async fn rejected_bytes_fail_the_load_with_reason_and_place() {
    let folder = folder();
    let path = file(folder.path(), "rejected.bin", &random_bytes(5 * SEGMENT, 5));
    let at = 3 * SEGMENT as u64 + 5;
    for uncached in [false, true] {
        for panics in [false, true] {
            let heap = SpiedHeap { uncached, ..SpiedHeap::default() };
            let loader = loader(&heap);
            let mut load = loader.load(&path).options(loader.load_options().observer(Arc::new(Judge { at, panics }))).start();
            let error = loop {
                match load.next().await.unwrap() {
                    Ok(segment) => assert!(segment.file_range().end <= at, "a rejected segment was handed out"),
                    Err(error) => break error,
                }
            };
            if panics {
                let text = error.to_string();
                assert!(text.starts_with("the observer panicked: a mistake in the observer ("), "{text}");
                assert!(text.contains("rejected.bin") && text.contains("at offset"), "{text}");
            } else {
                let Error::Rejected { offset, bytes, reason, .. } = &error else { panic!("{error}") };
                assert!((*offset..offset + bytes).contains(&at), "{error}");
                assert_eq!(*reason, format!("byte {at} is wrong"));
            }
            // The loader still works.
            loader.load(&path).await.unwrap();
        }
    }
}

#[tokio::test]
async fn strict_observed_load_on_uncached_memory_needs_bounce() {
    let folder = folder();
    let path = file(folder.path(), "strict.bin", &random_bytes(SEGMENT, 6));
    let heap = SpiedHeap { uncached: true, ..SpiedHeap::default() };
    let loader = loader(&heap);
    let options = loader.load_options().strict(true).observer(Recorder::new(&heap, 1));
    let error = loader.load(&path).options(options.clone()).await.unwrap_err();
    assert!(matches!(&error, Error::Config(text) if text.contains("bounce")), "{error}");
    loader.load(&path).options(options.route(Route::Bounce)).await.unwrap();
}
