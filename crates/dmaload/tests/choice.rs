//! Tests for the choice between direct and staged reads. In large loads, a loader measures the
//! speed of both and uses the faster kind, unless the load's options settle the choice.
#![allow(clippy::print_stdout, reason = "measurements are printed")]
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{assert_same, file, folder, random_bytes};
use dmaload::heap::{AnonHeap, HeapError, HeapHooks, Hooked, MemfdHeap, Pages};
use dmaload::{Cache, Image, LoadOptions, Loader, Prefer, Route, TraceKind, Way};
use rustix::fs::{Advice, fadvise};

const MIB: usize = 1 << 20;
/// The size in bytes of the smallest load that measures both kinds of reads.
const LARGE: usize = 512 * MIB;

/// Writes a file of 1 MiB blocks that differ only in the block number at their start.
fn write_large_file(folder: &Path, block: &[u8]) -> PathBuf {
    let path = folder.join("large.bin");
    let mut file = File::create(&path).unwrap();
    for number in 0..LARGE / MIB {
        file.write_all(&number.to_le_bytes()).unwrap();
        file.write_all(&block[8..]).unwrap();
    }
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    path
}

fn assert_large(image: &Image, block: &[u8], what: &str) {
    let bytes = image.files()[0].bytes().unwrap();
    assert_eq!(bytes.len(), LARGE, "{what}");
    for (number, found) in bytes.chunks(MIB).enumerate() {
        let found_number = usize::from_le_bytes(found[..8].try_into().unwrap());
        assert_eq!(found_number, number, "{what}: found block {found_number} in place of block {number}");
        assert_same(&found[8..], &block[8..], &format!("{what}, block {number}"));
    }
}

/// Returns the loader's options with the page cache bypassed, because loads from the page cache do
/// not measure.
fn options(loader: &Loader) -> LoadOptions {
    loader.load_options().cache(Cache::Bypass)
}

/// Loads the file and checks its bytes and the report. Returns the route of the load and, if the
/// load measured both kinds of reads, the one that it chose.
async fn load(loader: &Loader, path: &Path, options: LoadOptions, block: &[u8], what: &str) -> (Option<Way>, Route) {
    let image = loader.load(path).options(options).await.unwrap();
    assert_large(&image, block, what);
    let report = image.report();
    let Some(measured) = report.measured else { return (None, report.route) };
    let (direct, staged) = (measured.direct_bytes_per_second, measured.staged_bytes_per_second);
    println!("{what}: direct {:.2} GB/s, staged {:.2} GB/s: {}", direct / 1e9, staged / 1e9, measured.chosen);
    for rate in [direct, staged] {
        assert!(rate > 1e6 && rate < 1e12, "{what}: {rate} bytes per second");
    }
    // The kind of read that is expected to be slower is chosen only if it is measured to be more
    // than 3 % faster. The choice is therefore asserted only if the rates differ by more than 4 %.
    if direct > 1.04 * staged {
        assert_eq!(measured.chosen, Way::Direct, "{what}");
    } else if staged > 1.04 * direct {
        assert_eq!(measured.chosen, Way::Staged, "{what}");
    }
    // The measurement stages some bytes, and the report shows the least preferred route by which
    // any byte was read.
    assert_eq!(report.route, Route::Bounce, "{what}");
    // Staging for a measurement is not a fallback: no request was refused.
    assert!(report.fallbacks.iter().all(|fallback| fallback.to != Route::Bounce), "{what}: {:?}", report.fallbacks);
    (Some(measured.chosen), report.route)
}

#[tokio::test]
async fn both_ways_are_measured_and_the_faster_one_is_taken() {
    let folder = folder();
    let block = random_bytes(MIB, 1);
    let path = write_large_file(folder.path(), &block);
    for (heap, pages) in [("memfd", Pages::Auto), ("anon", Pages::Small)] {
        let builder = Loader::builder();
        let builder = if heap == "memfd" { builder.heap(MemfdHeap { pages }) } else { builder.heap(AnonHeap { pages }) };
        let loader = builder.build().unwrap();
        let mut known = None;
        // The first three loads measure; the fourth uses the kind of read that the third chose.
        for number in 0..4 {
            // Staged reads are not a fallback, so a strict load may use them.
            let options = options(&loader).strict(number == 1);
            let what = format!("{heap}, {pages:?}, load {number}");
            let (chosen, route) = load(&loader, &path, options, &block, &what).await;
            assert_eq!(chosen.is_some(), number < 3, "{what}");
            known = chosen.or(known);
            if chosen.is_none() {
                assert_eq!(route == Route::Bounce, known == Some(Way::Staged), "{what}: {route}");
            }
        }
    }
}

/// Hooks that slow down calls that populate at most 2 MiB. A copier populates one extent of at
/// most 2 MiB per call; for direct reads, a worker populates a whole batch per call. The hooks
/// therefore slow down only staged reads, so direct reads win.
#[derive(Debug)]
struct SlowExtents;

impl HeapHooks for SlowExtents {
    fn before_populate(&self, _: Range<usize>, part: Range<usize>) -> Result<(), HeapError> {
        if part.len() <= 2 * MIB {
            std::thread::sleep(Duration::from_millis(15));
        }
        Ok(())
    }
}

/// A trial stages some bytes of a file. If direct reads win, the remaining bytes are read
/// directly.
#[tokio::test]
async fn rest_of_a_load_takes_the_chosen_way_after_a_trial() {
    let folder = folder();
    let block = random_bytes(MIB, 1);
    let path = write_large_file(folder.path(), &block);
    let heap = Hooked::new(MemfdHeap { pages: Pages::Auto }, Arc::new(SlowExtents));
    let loader = Loader::builder().heap(heap).build().unwrap();
    let image = loader.load(&path).options(options(&loader).trace(true)).await.unwrap();
    assert_large(&image, &block, "direct reads are faster");
    let report = image.report();
    let measured = report.measured.expect("a load of 512 MiB should be measured");
    assert_eq!((measured.chosen, measured.buffered_bytes_per_second), (Way::Direct, None), "{measured:?}");
    let copied: u64 = report.trace.iter().filter(|event| event.kind == TraceKind::Copy).map(|event| event.bytes).sum();
    // The trial copies 96 MiB. At most one more window, which is 128 MiB, was prepared for staging
    // before the result of the trial was known.
    assert!((96 << 20..=(96 + 128) << 20).contains(&copied), "{copied} bytes were copied");
}

#[tokio::test]
async fn fixed_or_small_loads_are_not_measured() {
    let folder = folder();
    let block = random_bytes(MIB, 1);
    let path = write_large_file(folder.path(), &block);
    let small = file(folder.path(), "small.bin", &random_bytes(20 * MIB, 2));
    for pages in [Pages::Auto, Pages::Small] {
        let loader = Loader::builder().heap(MemfdHeap { pages }).build().unwrap();
        let cpu = options(&loader).prefer(Prefer::Cpu);
        let (measured, route) = load(&loader, &path, cpu, &block, "cpu").await;
        assert!(measured.is_none() && route < Route::Bounce, "{pages:?}: {measured:?}, {route}");
        for fixed in [Route::UringDirect, Route::Bounce] {
            let (measured, route) = load(&loader, &path, options(&loader).route(fixed), &block, "fixed").await;
            assert_eq!((measured, route), (None, fixed), "{pages:?}");
        }
        // Without a measurement, the load uses the kind of read that is expected to be faster.
        let image = loader.load(&small).options(options(&loader)).await.unwrap();
        assert_eq!(image.report().measured, None);
        assert_eq!(image.report().route == Route::Bounce, pages == Pages::Small, "{pages:?}: {}", image.report().route);
    }
}
