//! Tests for heaps that the caller implements: what they can do, and how a load fails if they
//! break their contract.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(unsafe_code, reason = "implements heaps, some of which break their contract on purpose")]

mod common;

use std::borrow::Cow;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::{assert_same, file, folder, random_bytes};
use dmaload::heap::{
    AnonHeap, FromDescriptors, Heap, HeapError, HeapHooks, Hooked, Mapping, Memfd, MemfdHeap, Memory, Populated,
};
use dmaload::{Errno, Error, LoadOptions, Loader};
use rustix::fs::SealFlags;

const SEGMENT: usize = 2 << 20;

fn model() -> Vec<u8> {
    random_bytes(3 * SEGMENT + 70_000, 21)
}

/// A heap that keeps a second descriptor for each memfd, and can seal the memfd before the loader
/// does.
#[derive(Debug, Clone)]
struct Keeping {
    seals: Option<SealFlags>,
    kept: Arc<Mutex<Vec<OwnedFd>>>,
}

impl Keeping {
    fn new(seals: Option<SealFlags>) -> Self {
        Keeping { seals, kept: Arc::default() }
    }
}

// SAFETY: the heap violates the contract by keeping writable descriptors. The tests check that the
// loader seals the memory, or fails, before it hands out bytes.
unsafe impl Heap for Keeping {
    fn name(&self) -> Cow<'_, str> {
        "keeping".into()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        let memory = MemfdHeap::default().allocate(bytes)?;
        let memfd = memory.memfd().unwrap();
        self.seals.into_iter().for_each(|seals| rustix::fs::fcntl_add_seals(memfd, seals).unwrap());
        self.kept.lock().unwrap().push(memfd.as_fd().try_clone_to_owned().unwrap());
        Ok(memory)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, HeapError> {
        MemfdHeap::default().populate(mapping, memory, part)
    }
}

#[tokio::test]
async fn kept_descriptor_cannot_write_to_a_segment() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &model());
    let small: Vec<_> = (0..3).map(|n| file(folder.path(), &format!("{n}.bin"), &random_bytes(5000, n))).collect();
    for paths in [vec![path], small] {
        let heap = Keeping::new(None);
        let loader =
            Loader::builder().heap(heap.clone()).load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).build().unwrap();
        let mut segments = loader.load(&paths).segments();
        while let Some(segment) = segments.next().await {
            let segment = segment.unwrap();
            let bytes = segment.bytes().unwrap();
            let before = bytes.to_vec();
            // This segment's memory is sealed by now; the memory of later segments may not be.
            for kept in heap.kept.lock().unwrap().iter() {
                let is_same = |fd: &OwnedFd| {
                    rustix::fs::fstat(fd).unwrap().st_ino == rustix::fs::fstat(segment.hand_out_memfd().unwrap()).unwrap().st_ino
                };
                if is_same(kept) {
                    assert_eq!(rustix::io::pwrite(kept, b"other weights", 0), Err(rustix::io::Errno::PERM));
                }
            }
            assert_same(&bytes, &before, "the view of the segment");
        }
        assert!(!heap.kept.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn memory_that_cannot_be_sealed_fails_its_load() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &model());
    for seals in [SealFlags::SEAL, SealFlags::SEAL | SealFlags::GROW] {
        let heap = Keeping::new(Some(seals));
        let loader =
            Loader::builder().heap(heap.clone()).load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).build().unwrap();
        for round in 0..2 {
            let mut segments = loader.load(&path).segments();
            let error = segments
                .next()
                .await
                .expect("the load should fail before yielding all segments")
                .expect_err("memory that others can write to must not be handed out");
            let text = error.to_string();
            assert!(text.contains("keeping: cannot seal a memfd against writes") && text.contains("EPERM"), "{round}: {text}");
            assert!(segments.next().await.is_none());
        }
        // The kept descriptor still allows writes, so handing out this memory would be unsound.
        assert_eq!(rustix::io::pwrite(&heap.kept.lock().unwrap()[0], b"other weights", 0), Ok(13));
        loader.shutdown().await.unwrap();
    }
    let image = Loader::builder().heap(Hooked::new(MemfdHeap::default(), Nothing)).build().unwrap().load(&path).await.unwrap();
    assert_same(&image.files()[0].bytes().unwrap(), &model(), "a hooked heap");
    // Memory that is already sealed against writes can no longer be mapped writable.
    let all = SealFlags::FUTURE_WRITE | SealFlags::GROW | SealFlags::SEAL;
    let error = Loader::builder().heap(Presealed(all)).build().unwrap().load(&path).await.unwrap_err();
    assert!(error.to_string().contains("presealed: cannot map memory"), "{error}");
}

#[derive(Debug)]
struct Nothing;

impl HeapHooks for Nothing {}

/// A heap that seals its memory against writes before the loader maps it.
#[derive(Debug)]
struct Presealed(SealFlags);

// SAFETY: the memory comes from `MemfdHeap`, and this heap keeps no descriptor of it.
unsafe impl Heap for Presealed {
    fn name(&self) -> Cow<'_, str> {
        "presealed".into()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        let memory = MemfdHeap::default().allocate(bytes)?;
        rustix::fs::fcntl_add_seals(memory.memfd().unwrap(), self.0).unwrap();
        Ok(memory)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, HeapError> {
        MemfdHeap::default().populate(mapping, memory, part)
    }
}

/// Hooks that add up the bytes that are allocated and populated.
#[derive(Debug, Default)]
struct Counting {
    allocated: AtomicUsize,
    answered: AtomicUsize,
    populated: AtomicUsize,
    failed: AtomicUsize,
}

impl HeapHooks for Counting {
    fn name(&self) -> Option<Cow<'_, str>> {
        Some("counted".into())
    }

    fn before_allocate(&self, bytes: usize) -> Result<(), HeapError> {
        self.allocated.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn after_allocate(&self, bytes: usize, result: Result<(), &HeapError>) {
        self.answered.fetch_add(if result.is_ok() { bytes } else { 0 }, Ordering::Relaxed);
    }

    fn before_populate(&self, mapped: Range<usize>, part: Range<usize>) -> Result<(), HeapError> {
        assert!(part.end <= mapped.len());
        Ok(())
    }

    fn after_populate(&self, part: Range<usize>, result: Result<&Populated, &HeapError>) {
        let counter = if result.is_ok() { &self.populated } else { &self.failed };
        counter.fetch_add(part.len(), Ordering::Relaxed);
    }

    fn notes(&self, of_the_heap: Vec<String>) -> Vec<String> {
        of_the_heap.into_iter().chain(["calls are counted".to_owned()]).collect()
    }
}

#[tokio::test]
async fn hooks_see_each_call_of_a_built_in_heap() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &model());
    let hooks = Arc::new(Counting::default());
    for loader in [
        Loader::builder().heap(Hooked::new(MemfdHeap::default(), Arc::clone(&hooks))),
        Loader::builder().heap(Hooked::new(AnonHeap::default(), Arc::clone(&hooks))),
    ] {
        let before = hooks.populated.load(Ordering::Relaxed);
        let loader = loader.load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).build().unwrap();
        let image = loader.load(&path).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &model(), "through hooks");
        assert_eq!(image.report().heap, "counted");
        assert!(image.report().notes.iter().any(|note| note == "calls are counted"), "{:?}", image.report().notes);
        let memory: usize = image.segments().iter().map(dmaload::Segment::memory_bytes).sum();
        assert_eq!(hooks.populated.load(Ordering::Relaxed) - before, memory);
    }
    let seen =
        [&hooks.allocated, &hooks.answered, &hooks.populated, &hooks.failed].map(|counter| counter.load(Ordering::Relaxed));
    assert_eq!(seen, [seen[0], seen[0], seen[0], 0]);
}

#[tokio::test]
async fn descriptor_that_is_not_a_dma_buf_fails_its_load() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &model());
    type Allocate = fn(usize) -> Result<OwnedFd, Errno>;
    let allocators: [(Allocate, &str); 4] = [
        (|_| Err(Errno::ENOMEM), "vendor: cannot allocate a dma-buf of"),
        (|bytes| Ok(Memfd::create("no dma-buf", bytes).unwrap().as_fd().try_clone_to_owned().unwrap()), "vendor: cannot "),
        (|_| Ok(std::fs::File::open("/dev/null").unwrap().into()), "vendor: cannot "),
        (|_| panic!("in the driver"), "heap vendor panicked: in the driver"),
    ];
    for (allocate, expected) in allocators {
        // SAFETY: none of the allocators returns a dma-buf, so no memory is ever mapped.
        let heap = unsafe { FromDescriptors::new("vendor", allocate) };
        let loader = Loader::builder().heap(heap).build().unwrap();
        for _ in 0..2 {
            let error = loader.load(&path).await.unwrap_err();
            assert!(error.to_string().starts_with(expected), "{error}");
        }
        loader.shutdown().await.unwrap();
    }
}

/// Hooks that panic in the first two calls to the named method.
#[derive(Debug, Clone)]
struct PanicsIn(&'static str, Arc<AtomicUsize>);

impl PanicsIn {
    fn call(&self, name: &str) {
        assert!(self.0 != name || self.1.fetch_add(1, Ordering::Relaxed) >= 2, "a mistake in {name}");
    }
}

impl HeapHooks for PanicsIn {
    fn name(&self) -> Option<Cow<'_, str>> {
        Some("panicking".into())
    }

    fn before_allocate(&self, _: usize) -> Result<(), HeapError> {
        self.call("before_allocate");
        Ok(())
    }

    fn after_allocate(&self, _: usize, _: Result<(), &HeapError>) {
        self.call("after_allocate");
    }

    fn before_populate(&self, _: Range<usize>, _: Range<usize>) -> Result<(), HeapError> {
        self.call("before_populate");
        Ok(())
    }

    fn after_populate(&self, _: Range<usize>, _: Result<&Populated, &HeapError>) {
        self.call("after_populate");
    }

    fn size_limit(&self, of_the_heap: Option<dmaload::heap::SizeLimit>) -> Option<dmaload::heap::SizeLimit> {
        self.call("size_limit");
        of_the_heap
    }
}

#[tokio::test]
async fn heap_that_panics_fails_its_load_by_name() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &model());
    for call in ["before_allocate", "after_allocate", "before_populate", "after_populate", "size_limit"] {
        let hooks = PanicsIn(call, Arc::default());
        let loader = Loader::builder().heap(Hooked::new(MemfdHeap::default(), hooks)).max_open_loads(1).allocator_threads(1);
        let loader = loader.build().unwrap();
        for _ in 0..2 {
            let error = loader.load(&path).await.unwrap_err();
            let expected = Error::Panicked { code: "heap panicking".to_owned(), message: format!("a mistake in {call}") };
            assert_eq!(error, expected);
        }
        let image = loader.load(&path).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &model(), call);
        loader.shutdown().await.unwrap();
    }
}
