//! Tests that the pool reuses the memory of dropped segments, and never exposes the bytes of
//! earlier loads.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::heap::{AnonHeap, MemfdHeap, Pages};
use dmaload::{Image, Layout, LoadOptions, Loader};

const SEGMENT: usize = 2 << 20;

fn loaders(pool_bytes: u64) -> [(&'static str, Loader); 3] {
    let builder = || {
        Loader::builder()
            .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
            .window_bytes(8 << 20)
            .pool_bytes(pool_bytes)
    };
    [
        ("memfd", builder().heap(MemfdHeap::default()).build().unwrap()),
        ("memfd, 4 KiB pages", builder().heap(MemfdHeap { pages: Pages::Small }).build().unwrap()),
        ("anon", builder().heap(AnonHeap::default()).build().unwrap()),
    ]
}

async fn load(loader: &Loader, path: &Path, options: LoadOptions) -> Image {
    loader.load(path).options(options).await.unwrap()
}

/// Waits until the pool holds `bytes` bytes, because a thread of the loader can drop its reference
/// to a segment after the caller does.
async fn assert_pooled(loader: &Loader, bytes: u64, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while loader.pooled_bytes() != bytes {
        assert!(Instant::now() < deadline, "{what}: {} bytes are in the pool, not {bytes}", loader.pooled_bytes());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn pooled_memory_exposes_only_the_bytes_of_its_new_load() {
    let folder = folder();
    let len = 5 * SEGMENT + 4097;
    let memory = (5 * SEGMENT + 8192) as u64;
    let [first, second] = [1, 2].map(|seed| random_bytes(len, seed));
    let paths = [file(folder.path(), "first.bin", &first), file(folder.path(), "second.bin", &second)];
    for (name, loader) in loaders(64 << 20) {
        for layout in [Layout::Segmented, Layout::Single] {
            for route in ROUTES {
                let what = format!("{name}, {layout}, {route}");
                let options = loader.load_options().layout(layout).route(route).strict(true);
                let image = load(&loader, &paths[0], options.clone()).await;
                let huge = image.report().pages.huge_bytes;
                drop(image);
                assert_pooled(&loader, memory, &what).await;
                let image = load(&loader, &paths[1], options).await;
                assert_eq!(image.report().reused_bytes, memory, "{what}");
                assert_eq!(image.report().pages.huge_bytes, huge, "{what}: memory must keep its huge pages when it is reused");
                assert_eq!(loader.pooled_bytes(), 0, "{what}");
                assert_same(&image.files()[0].bytes().unwrap(), &second, &what);
                drop(image);
                assert_pooled(&loader, memory, &what).await;
            }
            loader.trim_pool(0);
        }
        loader.shutdown().await.unwrap();
    }
}

/// The shorter file ends in a page that still holds bytes of the longer file; those bytes must be
/// zeroed.
#[tokio::test]
async fn tail_of_reused_memory_is_zero() {
    let folder = folder();
    let long = file(folder.path(), "long.bin", &random_bytes(8192, 1));
    let short = file(folder.path(), "short.bin", &random_bytes(4097, 2));
    let loader = Loader::builder().pool_bytes(1 << 20).build().unwrap();
    for route in ROUTES {
        let options = loader.load_options().route(route);
        drop(load(&loader, &long, options.clone()).await);
        assert_pooled(&loader, 8192, "the longer file").await;
        let image = load(&loader, &short, options).await;
        assert_eq!(image.report().reused_bytes, 8192);
        let segment = &image.segments()[0];
        let mut memory = vec![0xEE; 8192];
        rustix::io::pread(segment.hand_out_memfd().unwrap(), &mut memory, 0).unwrap();
        assert!(memory[4097..].iter().all(|&byte| byte == 0), "{route}");
        assert_same(&memory[..4097], &random_bytes(4097, 2), "the shorter file");
        drop(image);
    }
}

#[tokio::test]
async fn handed_out_segment_is_never_reused() {
    let folder = folder();
    let bytes = random_bytes(4 * SEGMENT, 1);
    let path = file(folder.path(), "model.bin", &bytes);
    let loader =
        Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).pool_bytes(64 << 20).build().unwrap();
    let image = load(&loader, &path, loader.load_options()).await;
    let kept = image.segments()[1].hand_out_memfd().unwrap().try_clone_to_owned().unwrap();
    drop(image);
    assert_pooled(&loader, 3 * SEGMENT as u64, "all but the handed-out segment").await;
    let other = file(folder.path(), "other.bin", &random_bytes(4 * SEGMENT, 2));
    drop(load(&loader, &other, loader.load_options()).await);
    let mut seen = vec![0; SEGMENT];
    rustix::io::pread(&kept, &mut seen, 0).unwrap();
    assert_same(&seen, &bytes[SEGMENT..2 * SEGMENT], "the handed-out memfd");
}

#[tokio::test]
async fn memory_stays_out_of_the_pool_while_it_is_viewed() {
    let folder = folder();
    let bytes = random_bytes(8 * SEGMENT, 1);
    let path = file(folder.path(), "model.bin", &bytes);
    let loader =
        Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).pool_bytes(64 << 20).build().unwrap();
    let image = load(&loader, &path, loader.load_options()).await;
    let view = image.segments()[0].bytes().unwrap();
    drop(image);
    assert_pooled(&loader, 7 * SEGMENT as u64, "all but the viewed segment").await;
    drop(load(&loader, &path, loader.load_options()).await);
    assert_same(&view, &bytes[..SEGMENT], "a view");
    drop(view);
    assert_pooled(&loader, 9 * SEGMENT as u64, "the viewed segment, and the one allocated in its place").await;
    assert_eq!(loader.trim_pool(SEGMENT as u64), 8 * SEGMENT as u64);
    assert_eq!(loader.pooled_bytes(), SEGMENT as u64);
    loader.trim_pool(0);
    for _ in 0..20 {
        let mut load = loader.load(&path).start();
        let first = load.next().await.unwrap().unwrap();
        drop((load, first));
    }
    // The pool may now hold complete segments that no consumer received. A new load still exposes
    // only its own bytes.
    let image = load(&loader, &path, loader.load_options()).await;
    assert_same(&image.files()[0].bytes().unwrap(), &bytes, "after dropped loads");
}

#[tokio::test]
async fn pool_stays_within_its_limit_and_is_empty_after_shutdown() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &random_bytes(8 * SEGMENT, 1));
    let loader = Loader::builder()
        .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
        .pool_bytes(3 * SEGMENT as u64)
        .build()
        .unwrap();
    drop(load(&loader, &path, loader.load_options()).await);
    assert_pooled(&loader, 3 * SEGMENT as u64, "the pool's limit").await;
    let other = loader.clone();
    loader.shutdown().await.unwrap();
    assert_eq!(other.pooled_bytes(), 0);
    let without = Loader::new().unwrap();
    drop(load(&without, &path, without.load_options()).await);
    assert_eq!(without.pooled_bytes(), 0, "a loader must not have a pool by default");
}
