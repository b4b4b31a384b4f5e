//! Tests loads from FUSE file systems that misbehave in known ways. The file systems are really
//! mounted, some of them below an overlayfs. Their servers refuse direct reads, return short or
//! empty reads, fail, are slow, do not answer, report a wrong length, or rewrite the file while
//! its attributes are cached.
//!
//! Mounting needs root and `/dev/fuse`; without them, these tests report that they are skipped.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(clippy::print_stderr, reason = "skipped tests are reported")]

#[path = "../common/fuse_attributes.rs"]
mod attributes;
mod closing;
#[path = "../common/mod.rs"]
mod common;
mod file_system;
mod loop_device;
mod silent;

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dmaload::{Attempt, Errno, Error, Format, LoadOptions, Loader, LoaderBuilder, Route, Source};

use common::{ROUTES, assert_same, random_bytes};
use file_system::{Manners, Model, Mounted, Overlay};

const SEGMENT: usize = 2 << 20;
const BYTES: usize = 4 * SEGMENT + 777;
/// Routes that bypass the page cache. The page cache would treat a short read as the end of the
/// file, and pad the page with zeros.
const DIRECT_ROUTES: [Route; 4] = [Route::UringFixedDirect, Route::UringDirect, Route::PreadDirect, Route::Bounce];

fn options() -> LoadOptions {
    LoadOptions::new().segment_bytes(SEGMENT as u64)
}

fn loader() -> LoaderBuilder {
    Loader::builder().load_options(options())
}

/// Builds a loader with a small window and little staging. Two hanging loads would use them up if
/// the loads from one file system were not limited to a share of them.
fn small_loader(route: Route) -> Loader {
    loader()
        .load_options(options().route(route).chunk_bytes(256 << 10))
        .window_bytes(8 * SEGMENT as u64)
        .staging_bytes(32 << 20)
        .shutdown_timeout(Duration::from_millis(300))
        .build()
        .unwrap()
}

#[tokio::test]
async fn refused_first_direct_read_steps_down() {
    let Some(mounted) = Mounted::new(Manners::RefusesDirect) else { return };
    for route in ROUTES {
        let loader = loader().load_options(options().route(route)).build().unwrap();
        let image = loader.load(&mounted.path).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes, &route.to_string());
        let report = image.report();
        assert_eq!(report.route, Route::Buffered, "{route}");
        let read_refused = report.fallbacks.iter().any(|step| step.attempt == Attempt::Read && step.errno == Errno::EINVAL);
        assert_eq!(read_refused, route.is_direct(), "{route}: {:?}", report.fallbacks);
        let strict = loader.load(&mounted.path).options(loader.load_options().route(route).strict(true)).await;
        match strict {
            Ok(_) => assert_eq!(route, Route::Buffered, "every other route must be refused"),
            Err(error) => {
                assert!(matches!(error, Error::Refused { errno: Errno::EINVAL | Errno::EOPNOTSUPP, .. }), "{route}: {error}");
            }
        }
        loader.shutdown().await.unwrap();
    }
}

/// After a short read, io_uring can return the same bytes twice (seen on Linux 6.18), so a ring
/// never reads files that are or may be on FUSE.
#[tokio::test]
async fn ring_never_reads_files_that_may_be_on_fuse() {
    for (manners, attempt, errno) in [
        (Manners::FailsAt(usize::MAX), Attempt::RingOnFuse, Errno::EOPNOTSUPP),
        (Manners::RefusesStatfs, Attempt::RingOnUnknown, Errno::ENOSYS),
    ] {
        let Some(mounted) = Mounted::new(manners) else { return };
        assert_read_by_threads(&mounted.path, &mounted.bytes, attempt, errno).await;
        if errno == Errno::EOPNOTSUPP {
            let overlay = Overlay::over(mounted.folder());
            assert_read_by_threads(&overlay.path, &mounted.bytes, Attempt::RingOnStacked, errno).await;
            let nested = Overlay::over(overlay.path.parent().unwrap());
            assert_read_by_threads(&nested.path, &mounted.bytes, Attempt::RingOnStacked, errno).await;
        }
    }
}

async fn assert_read_by_threads(path: &Path, bytes: &[u8], attempt: Attempt, errno: Errno) {
    for (route, from, to) in [
        (Route::UringFixedDirect, Route::UringFixedDirect, Route::PreadDirect),
        (Route::UringDirect, Route::UringDirect, Route::PreadDirect),
        // The route stays `bounce`, but threads, not a ring, read into staging.
        (Route::Bounce, Route::UringFixedDirect, Route::Bounce),
        (Route::UringBuffered, Route::UringBuffered, Route::Buffered),
    ] {
        let loader = loader().load_options(options().route(route)).build().unwrap();
        let image = loader.load(path).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), bytes, &format!("{attempt}, {route}"));
        let report = image.report();
        let steps: Vec<_> = report.fallbacks.iter().map(|step| (step.from, step.to, step.attempt, step.errno)).collect();
        let by_threads = if from.is_direct() { Route::PreadDirect } else { Route::Buffered };
        assert_eq!((report.route, steps), (to, vec![(from, by_threads, attempt, errno)]), "{route}");
        assert!(report.fallbacks[0].reason().contains("wrong bytes"), "{}", report.fallbacks[0].reason());
        let strict = loader.load(path).options(loader.load_options().strict(true)).await.unwrap_err();
        let Error::Refused { attempt: refused, errno: reported, .. } = strict else { panic!("{route}: {strict}") };
        assert_eq!((refused, reported), (attempt, errno), "{route}");
        loader.shutdown().await.unwrap();
    }
}

/// Four threads are enough to read from a disk, but with a distant server they would mostly wait.
#[tokio::test]
async fn more_threads_read_from_a_distant_server() {
    const CHUNK: u64 = 128 << 10;
    let bytes = 64 * SEGMENT + 777;
    let Some(mounted) = Mounted::with_bytes(bytes, Manners::AnswersFromAfar(Duration::from_millis(10))) else { return };
    let loader = loader().load_options(options().route(Route::PreadDirect).chunk_bytes(CHUNK)).build().unwrap();
    let most = || mounted.reads.most.swap(0, Ordering::SeqCst);
    let small = Mounted::with_bytes(SEGMENT, Manners::AnswersFromAfar(Duration::from_millis(10))).unwrap();
    let image = loader.load(&small.path).await.unwrap();
    assert_same(&image.files()[0].bytes().unwrap(), &small.bytes, "small");
    assert_eq!(small.reads.most.load(Ordering::SeqCst), 4, "only four threads should read before the server has been measured");
    for _ in 0..2 {
        let image = loader.load(&mounted.path).await.unwrap();
        assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes, "large");
        assert_eq!(image.report().route, Route::PreadDirect);
        let most = most();
        assert!((16..=32).contains(&most), "{most} reads at once");
    }
    // Two loads from one file system together get at most 48 of the 64 reading threads.
    let (one, other) = tokio::join!(loader.load(&mounted.path), loader.load(&mounted.path));
    for image in [one, other] {
        assert_same(&image.unwrap().files()[0].bytes().unwrap(), &mounted.bytes, "one of two concurrent loads");
    }
    let most = most();
    assert!(most <= 48, "{most} reads at once");
    loader.shutdown().await.unwrap();
}

/// After a short read, the missing bytes are requested again, starting with the block in which the
/// read ended.
#[tokio::test]
async fn short_answers_load_the_same_bytes() {
    // The first two are multiples of the block size; the others are not.
    for most in [4096, 12_288, 100_001, 65_535] {
        let Some(mounted) = Mounted::new(Manners::AnswersShort(most)) else { return };
        for route in DIRECT_ROUTES {
            let loader = loader().load_options(options().route(route)).build().unwrap();
            let what = format!("{route}, {most} bytes at once");
            let image = loader.load(&mounted.path).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes, &what);
            loader.shutdown().await.unwrap();
        }
    }
}

#[tokio::test]
async fn file_shorter_than_its_stated_length_is_an_error() {
    for at in [0, 4096, SEGMENT + 333, 4 * SEGMENT] {
        let Some(mounted) = Mounted::new(Manners::EndsAt(at)) else { return };
        for route in DIRECT_ROUTES {
            let loader = loader().load_options(options().route(route)).build().unwrap();
            let error = loader.load(&mounted.path).await.unwrap_err();
            let Error::Ended { offset, planned_bytes, .. } = error else { panic!("{route}, {at}: {error}") };
            assert!(offset >= at as u64, "{route}: {error}");
            assert_eq!(planned_bytes, mounted.bytes.len() as u64);
            loader.shutdown().await.unwrap();
        }
        let inspected = dmaload::inspect(&mounted.path, Format::Raw).await.unwrap_err();
        let Error::Ended { offset, planned_bytes, .. } = inspected else { panic!("{at}: {inspected}") };
        assert_eq!((offset, planned_bytes), (at as u64, mounted.bytes.len() as u64));
    }
}

#[tokio::test]
async fn read_error_names_the_file_and_the_offset() {
    let at = 2 * SEGMENT + 4096;
    let Some(mounted) = Mounted::new(Manners::FailsAt(at)) else { return };
    for route in ROUTES {
        let loader = loader().load_options(options().route(route)).build().unwrap();
        let error = loader.load(&mounted.path).await.unwrap_err();
        let Error::Read { path, offset, bytes, errno, .. } = &error else { panic!("{route}: {error}") };
        assert_eq!((path, *errno), (&mounted.path, Errno::EIO), "{route}");
        assert!(offset + bytes > at as u64, "{route}: {error}");
        loader.shutdown().await.unwrap();
    }
}

/// Lazily pulled container images are mounted this way. Threads read the files, because a ring
/// could return the same bytes twice after a short read from the FUSE server.
#[tokio::test]
async fn overlay_over_fuse_loads_the_same_bytes_by_every_route() {
    for most in [100_001, 65_535, 12_288] {
        let Some(mounted) = Mounted::new(Manners::AnswersShortPastTheCache(most)) else { return };
        let overlay = Overlay::over(mounted.folder());
        for route in ROUTES {
            let what = format!("{route}, {most} bytes at once");
            let loader = loader().load_options(options().route(route)).build().unwrap();
            let image = loader.load(&overlay.path).await.unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes, &what);
            let part = 5_000..(BYTES as u64 - 12_345);
            let file = std::fs::File::open(&overlay.path).unwrap();
            let image = loader.load(Source::file(file).range(part.clone())).await.unwrap();
            let part = usize::try_from(part.start).unwrap()..usize::try_from(part.end).unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes[part], &what);
            let open = std::fs::File::open(&overlay.path).unwrap();
            let image = loader.load(format!("/proc/self/fd/{}", open.as_raw_fd())).await.unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &mounted.bytes, &what);
            loader.shutdown().await.unwrap();
        }
    }
}

/// Cached pages can be older than the server's bytes even if the attributes match.
#[tokio::test]
async fn page_cache_of_fuse_is_not_used() {
    let Some(mounted) = Mounted::new(Manners::KeepsCache) else { return };
    // As long as a file is open, the kernel keeps its inode, and with it the cached pages.
    let open = std::fs::File::open(&mounted.path).unwrap();
    let mut read = vec![0; mounted.bytes.len()];
    std::os::unix::fs::FileExt::read_exact_at(&open, &mut read, 0).unwrap();
    assert_same(&read, &mounted.bytes, "the cached file");
    mounted.rewritten.store(true, Ordering::SeqCst);
    for options in
        [loader().build().unwrap().load_options(), loader().build().unwrap().load_options().cache(dmaload::Cache::Auto)]
    {
        // Opening the file again, as a load does, keeps the cached pages. Linux before 6.5 can't
        // count them.
        let cached = dmaload::probe::cached_bytes(std::fs::File::open(&mounted.path).unwrap());
        assert!(cached == Err(Errno::ENOSYS) || cached.is_ok_and(|bytes| bytes > 0), "{cached:?}");
        let loader = loader().build().unwrap();
        let image = loader.load(&mounted.path).options(options).await.unwrap();
        assert_eq!(image.report().cached_bytes, 0);
        assert_same(&image.files()[0].bytes().unwrap(), &mounted.other_bytes, "from the server");
        loader.shutdown().await.unwrap();
    }
}

/// The kernel caches attributes for a minute, but a load requests them from the server.
#[tokio::test]
async fn rewrite_is_noticed_despite_cached_attributes() {
    for route in ROUTES {
        for at in [0, SEGMENT + 1, 4 * SEGMENT] {
            let Some(mounted) = Mounted::new(Manners::IsRewrittenAt(at)) else { return };
            let loader = loader().load_options(options().route(route)).build().unwrap();
            let error = loader.load(&mounted.path).await.unwrap_err();
            assert!(matches!(error, Error::Changed { change: "it was modified", .. }), "{route}, {at}: {error}");
            loader.shutdown().await.unwrap();
        }
    }
}

#[tokio::test]
async fn earlier_rewrite_is_not_a_change_despite_cached_attributes() {
    for route in ROUTES {
        // The attributes of a small file are read before it is opened, and those of a large file
        // afterwards.
        for bytes in [BYTES, 70_000] {
            let Some(mounted) = Mounted::with_bytes(bytes, Manners::IsRewrittenAt(usize::MAX)) else { return };
            let cached = std::fs::metadata(&mounted.path).unwrap().modified().unwrap();
            mounted.rewritten.store(true, Ordering::SeqCst);
            let modified = std::fs::metadata(&mounted.path).unwrap().modified().unwrap();
            assert_eq!(modified, cached, "the kernel should still report cached attributes");
            let loader = loader().load_options(options().route(route)).build().unwrap();
            let image = loader.load(&mounted.path).await.unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &mounted.other_bytes, &format!("{route}, {bytes} bytes"));
            loader.shutdown().await.unwrap();
        }
    }
}

#[tokio::test]
async fn torn_header_is_reported_as_changed_not_damaged() {
    // The header of a small file is parsed from the loaded memory; that of a large one is read
    // during planning.
    for data in [70_000, BYTES] {
        let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{data}],"data_offsets":[0,{data}]}}}}"#);
        let mut good = (header.len() as u64).to_le_bytes().to_vec();
        good.extend_from_slice(header.as_bytes());
        good.extend(random_bytes(data, 25));
        let mut half = good.clone();
        half[20..].fill(0);
        for torn in [half, vec![0; good.len()], random_bytes(good.len(), 26)] {
            for route in ROUTES {
                let model = Model::holding([good.clone(), torn.clone()], Manners::IsRewrittenAt(0));
                let Some(mounted) = Mounted::serving(model) else { return };
                let loader = loader().load_options(options().route(route).format(Format::Safetensors)).build().unwrap();
                let error = loader.load(&mounted.path).await.unwrap_err();
                assert!(matches!(error, Error::Changed { change: "it was modified", .. }), "{route}, {data} bytes: {error}");
                // Loaded without a concurrent rewrite, the same bytes are reported as a damaged
                // model.
                let error = loader.load(&mounted.path).await.unwrap_err();
                assert!(matches!(error, Error::Model { .. }), "{route}, {data} bytes: {error}");
                loader.shutdown().await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn file_without_a_length_is_an_error_not_an_empty_file() {
    let Some(mounted) = Mounted::new(Manners::HasNoLength) else { return };
    let overlay = Overlay::over(mounted.folder());
    let loader = loader().build().unwrap();
    for path in [&mounted.path, &overlay.path, Path::new("/proc/self/status"), Path::new("/proc/self/mountinfo")] {
        let error = loader.load(path).await.unwrap_err();
        assert_eq!(error, Error::NoLength { path: path.to_owned() });
        let error = loader.load(std::fs::File::open(path).unwrap()).await.unwrap_err();
        assert!(matches!(error, Error::NoLength { .. }), "{error}");
    }
    loader.shutdown().await.unwrap();
}

#[tokio::test]
async fn bytes_beyond_the_stated_length_are_an_error() {
    for stated in [1, 100, 4096, SEGMENT + 333, BYTES - 1] {
        let Some(mounted) = Mounted::new(Manners::StatesLength(stated)) else { return };
        let overlay = Overlay::over(mounted.folder());
        for route in ROUTES {
            let loader = loader().load_options(options().route(route)).build().unwrap();
            for path in [&mounted.path, &overlay.path] {
                let error = loader.load(path).await.unwrap_err();
                let expected = Error::Longer { path: path.clone(), stated_bytes: stated as u64 };
                assert_eq!(error, expected, "{route}, {stated}");
            }
            loader.shutdown().await.unwrap();
        }
        let expected = Error::Longer { path: mounted.path.clone(), stated_bytes: stated as u64 };
        assert_eq!(dmaload::inspect(&mounted.path, Format::Raw).await.unwrap_err(), expected);
    }
}
