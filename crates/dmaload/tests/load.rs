//! Loads files of many sizes by every route, and compares the memory with the file. Also tests
//! what a caller gets from a load: images, streams, views, and errors.

mod common;

use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::heap::{AnonHeap, HeapHooks, Hooked, MemfdHeap, SizeLimit};
use dmaload::{Error, Layout, LoadOptions, Loader, Route};

const SEGMENT: usize = 2 << 20;

fn sizes() -> Vec<usize> {
    vec![1, 511, 512, 4095, 4096, 4097, SEGMENT - 1, SEGMENT, SEGMENT + 1, 5 * SEGMENT + 1, 40 * SEGMENT + 777]
}

#[tokio::test]
async fn file_of_any_size_loads_by_every_route_and_layout() {
    let folder = folder();
    let loader = Loader::builder()
        .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
        .window_bytes(3 * SEGMENT as u64)
        .build()
        .unwrap();
    for (seed, len) in sizes().into_iter().enumerate() {
        let bytes = random_bytes(len, seed as u64);
        let path = file(folder.path(), "model.bin", &bytes);
        for route in ROUTES {
            for layout in [Layout::Segmented, Layout::Single, Layout::Tensors] {
                let what = format!("length {len}, {route}, {layout}");
                let options = loader.load_options().route(route).layout(layout).strict(true);
                let image = loader.load(&path).options(options).await.unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_same(&image.files()[0].bytes().unwrap(), &bytes, &what);
                assert_eq!(image.report().route, route, "{what}");
                // If a file has no tensors, the `Tensors` layout divides it like `Segmented`.
                let expected = if layout == Layout::Single { 1 } else { len.div_ceil(SEGMENT) };
                assert_eq!(image.segments().len(), expected, "{what}");
                let sum: usize = image.segments().iter().map(dmaload::Segment::len).sum();
                assert_eq!(sum, len, "{what}");
            }
        }
    }
    loader.shutdown().await.unwrap();
}

#[tokio::test]
async fn memfd_is_zero_past_the_end_of_the_file() {
    let folder = folder();
    let bytes = random_bytes(SEGMENT + 5000, 7);
    let path = file(folder.path(), "model.bin", &bytes);
    for route in ROUTES {
        let loader = Loader::builder()
            .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64).route(route).strict(true))
            .build()
            .unwrap();
        let image = loader.load(&path).await.unwrap();
        let last = &image.segments()[1];
        let mut memory = vec![0xEE; last.memory_bytes()];
        rustix::io::pread(last.hand_out_memfd().unwrap(), &mut memory, 0).unwrap();
        assert_same(&memory[..5000], &bytes[SEGMENT..], "the memfd");
        assert!(memory.len() > 5000 && memory[5000..].iter().all(|&byte| byte == 0), "{route}: the tail is not zero");
    }
}

#[tokio::test]
async fn both_heaps_load_the_bytes_and_anon_has_no_descriptor() {
    let folder = folder();
    let bytes = random_bytes(9 << 20, 3);
    let path = file(folder.path(), "model.bin", &bytes);
    for (name, builder) in
        [("memfd", Loader::builder().heap(MemfdHeap::default())), ("anon", Loader::builder().heap(AnonHeap::default()))]
    {
        let image = builder.build().unwrap().load(&path).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &bytes, name);
        assert_eq!(image.report().heap, name);
        match image.segments()[0].hand_out_memfd() {
            Ok(_) => assert_eq!(name, "memfd"),
            Err(Error::NoDescriptor { .. }) => assert_eq!(name, "anon"),
            Err(other) => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn empty_file_loads_without_segments() {
    let folder = folder();
    let empty = file(folder.path(), "empty.bin", b"");
    let other = file(folder.path(), "other.bin", b"something");
    let loader = Loader::new().unwrap();
    let mut load = loader.load(&empty).start();
    assert!(load.next().await.is_none());
    let image = load.finish().await.unwrap();
    assert_eq!((image.segments().len(), image.files()[0].bytes().unwrap().len()), (0, 0));

    let image = loader.load([&empty, &other, &empty]).await.unwrap();
    assert_eq!(image.files().iter().map(dmaload::ImageFile::len).collect::<Vec<_>>(), [0, 9, 0]);
    assert_same(&image.files()[1].bytes().unwrap(), b"something", "the file between two empty ones");
}

#[tokio::test]
async fn segments_arrive_in_order_and_make_up_the_image() {
    let folder = folder();
    let bytes = random_bytes(20 * SEGMENT + 1, 11);
    let path = file(folder.path(), "model.bin", &bytes);
    let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).build().unwrap();
    let mut load = loader.load(&path).start();
    let mut at = 0;
    while let Some(segment) = load.next().await {
        let segment = segment.unwrap();
        assert_eq!(segment.file_range().start, at as u64);
        assert_same(&segment.bytes().unwrap(), &bytes[at..at + segment.len()], "a segment");
        at += segment.len();
    }
    assert_eq!(at, bytes.len());
    let image = load.finish().await.unwrap();
    assert_eq!(image.segments().len(), 21);
    assert_same(&image.files()[0].bytes().unwrap(), &bytes, "the image");
}

#[tokio::test]
async fn stream_yields_each_segment_once_and_then_a_report() {
    let folder = folder();
    let bytes = random_bytes(6 * SEGMENT + 9, 12);
    let path = file(folder.path(), "model.bin", &bytes);
    let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).build().unwrap();
    let mut segments = loader.load(&path).segments();
    let mut seen = Vec::new();
    while let Some(segment) = segments.next().await {
        seen.extend_from_slice(&segment.unwrap().bytes().unwrap());
    }
    assert_same(&seen, &bytes, "the stream");
    assert_eq!(segments.report().unwrap().bytes, bytes.len() as u64);
}

#[tokio::test]
async fn segments_and_views_outlive_the_loader() {
    let folder = folder();
    let bytes = random_bytes(3 * SEGMENT, 13);
    let path = file(folder.path(), "model.bin", &bytes);
    let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).build().unwrap();
    let image = loader.load(&path).await.unwrap();
    loader.shutdown().await.unwrap();
    let whole = image.files()[0].bytes().unwrap();
    let middle = image.segments()[1].bytes().unwrap();
    drop(image);
    std::fs::remove_file(&path).unwrap();
    assert_same(&whole, &bytes, "the view of the file");
    assert_same(&middle, &bytes[SEGMENT..2 * SEGMENT], "the view of a segment");
}

#[tokio::test]
async fn many_files_in_one_load_keep_their_order() {
    let folder = folder();
    let contents: Vec<_> = (0..300).map(|seed| random_bytes(1 + seed * 97, seed as u64)).collect();
    let paths: Vec<_> =
        contents.iter().enumerate().map(|(index, bytes)| file(folder.path(), &format!("{index}.bin"), bytes)).collect();
    let loader = Loader::builder().heap(AnonHeap::default()).build().unwrap();
    let image = loader.load(&paths).await.unwrap();
    for (index, bytes) in contents.iter().enumerate() {
        assert_same(&image.files()[index].bytes().unwrap(), bytes, &format!("file {index}"));
    }
}

#[tokio::test]
async fn window_smaller_than_a_segment_is_refused() {
    let Err(error) = Loader::builder().load_options(LoadOptions::new().segment_bytes(64 << 20)).window_bytes(32 << 20).build()
    else {
        panic!("a window smaller than a segment was accepted")
    };
    assert!(matches!(&error, Error::Config(text) if text.contains("smaller than a segment")), "{error}");
    let loader = Loader::new().unwrap();
    let error = loader.load("/dev/null").options(loader.load_options().segment_bytes(1 << 30)).await.unwrap_err();
    assert!(matches!(error, Error::Config(_)));
}

#[tokio::test]
async fn load_after_the_shutdown_fails_and_says_why() {
    let loader = Loader::new().unwrap();
    let other = loader.clone();
    loader.shutdown().await.unwrap();
    assert_eq!(other.load("whatever").await.unwrap_err(), Error::ShutDown);
    other.shutdown().await.unwrap();
}

#[tokio::test]
async fn unloadable_file_is_reported_with_its_path() {
    let folder = folder();
    let loader = Loader::new().unwrap();
    let missing = folder.path().join("missing.bin");
    let error = loader.load(&missing).await.unwrap_err();
    assert!(error.to_string().contains("missing.bin: cannot open: ENOENT"), "{error}");
    for (path, kind) in [(folder.path(), "a directory"), (std::path::Path::new("/dev/null"), "a character device")] {
        let error = loader.load(path).await.unwrap_err();
        assert!(error.to_string().contains(kind), "{error}");
    }
}

#[test]
fn tests_cover_every_route() {
    assert_eq!(ROUTES, Route::ALL);
}

#[tokio::test]
async fn file_larger_than_memory_is_refused_before_allocating() {
    let folder = folder();
    let path = folder.path().join("sparse.bin");
    std::fs::File::create(&path).unwrap().set_len(10 << 40).unwrap();
    for layout in [Layout::Segmented, Layout::Single] {
        let loader = Loader::builder().load_options(LoadOptions::new().layout(layout)).build().unwrap();
        let mut load = loader.load(&path).start();
        let error = load.next().await.unwrap().unwrap_err();
        assert!(matches!(&error, Error::OutOfMemory { wanted_bytes, .. } if *wanted_bytes == 10 << 40), "{error}");
        assert_eq!(load.progress().allocated_bytes, 0);
    }
    // A stream does not need memory for the whole file.
    let mut segments = Loader::new().unwrap().load(&path).segments();
    assert!(segments.next().await.unwrap().unwrap().bytes().unwrap().iter().all(|&byte| byte == 0));
}

/// The loader allows only one open load, so later loads would hang if a failed load still counted
/// as open.
#[tokio::test]
async fn load_whose_planning_panics_frees_its_place() {
    #[derive(Debug)]
    struct Panics(AtomicUsize);
    impl HeapHooks for Panics {
        fn name(&self) -> Option<Cow<'_, str>> {
            Some("panicking".into())
        }

        fn size_limit(&self, of_the_heap: Option<SizeLimit>) -> Option<SizeLimit> {
            assert!(self.0.fetch_add(1, Ordering::Relaxed) >= 3, "a mistake in size_limit");
            of_the_heap
        }
    }
    let folder = folder();
    let path = file(folder.path(), "model.bin", &random_bytes(5_000_000, 1));
    let heap = Hooked::new(AnonHeap::default(), Panics(AtomicUsize::new(0)));
    let loader = Loader::builder().max_open_loads(1).heap(heap).build().unwrap();
    let load = async || {
        let load = loader.load(&path).into_future();
        tokio::time::timeout(std::time::Duration::from_secs(20), load).await.expect("a failed load must not count as open")
    };
    for _ in 0..3 {
        let failed = load().await;
        let text = failed.unwrap_err().to_string();
        assert_eq!(text, "heap panicking panicked: a mistake in size_limit");
    }
    assert_eq!(load().await.unwrap().report().bytes, 5_000_000);
}
