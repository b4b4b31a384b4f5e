//! Measures how much allocating and reading overlap.
//!
//! The benchmark first measures how long it takes to read a piece, then slows allocation down by
//! multiples of that time. With full overlap, the total time is close to the longer of the
//! allocation time and the reading time. Without overlap, it is close to their sum.

use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use dmaload::heap::{HeapError, HeapHooks, Hooked, MemfdHeap};
use dmaload::{Cache, LoadOptions, Loader, Report};
use dmaload_testing::random_bytes;

const FILE_BYTES: usize = 512 << 20;
/// The size of each segment and of each piece. With a single allocator thread, batches are 16 MiB,
/// regardless of the number of processors, so each piece is a whole segment.
const SEGMENT_BYTES: usize = 16 << 20;
const ROUNDS: usize = 5;

/// Slows a heap down: each call that populates memory first sleeps for this duration.
#[derive(Debug)]
struct SlowHeap(Duration);

impl HeapHooks for SlowHeap {
    fn before_populate(&self, _mapped: Range<usize>, _part: Range<usize>) -> Result<(), HeapError> {
        std::thread::sleep(self.0);
        Ok(())
    }
}

fn load(path: &Path, delay: Duration, window_pieces: u64) -> anyhow::Result<Report> {
    let builder = Loader::builder().heap(Hooked::new(MemfdHeap::default(), SlowHeap(delay))).allocator_threads(1);
    // The file is in the page cache, because it has just been written.
    let options = LoadOptions::new().segment_bytes(SEGMENT_BYTES as u64).cache(Cache::Bypass);
    let loader = builder.load_options(options).window_bytes(window_pieces * SEGMENT_BYTES as u64).build()?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let report = runtime.block_on(loader.load(path).into_future())?.report().clone();
    anyhow::ensure!(report.cached_bytes == 0, "{} bytes came from the page cache", report.cached_bytes);
    Ok(report)
}

fn main() -> anyhow::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(std::env::var_os("BENCH_DIR").unwrap_or("/var/tmp".into()))?;
    for number in (0..).take(FILE_BYTES / (1 << 20)) {
        file.write_all(&random_bytes(1 << 20, number))?;
    }
    file.as_file().sync_all()?;

    let pieces = u32::try_from(FILE_BYTES / SEGMENT_BYTES)?;
    load(file.path(), Duration::ZERO, 4)?;
    println!(
        "{:>22} {:>11} {:>9} {:>9} {:>12} {:>12}",
        "allocating slowed by", "allocating", "reading", "total", "total / max", "total / sum"
    );
    for (factor, window) in [(1, 4), (3, 4), (1, 1)] {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let reading = load(file.path(), Duration::ZERO, 4)?.reading;
            rounds.push(load(file.path(), reading / pieces * factor, window)?);
        }
        rounds.sort_by_key(|report| report.total);
        let median = &rounds[ROUNDS / 2];
        let (longer, sum) = (median.allocating.max(median.reading), median.allocating + median.reading);
        let what = format!("{factor} x read, window {window}");
        let ratio = |to: Duration| median.total.as_secs_f64() / to.as_secs_f64();
        println!(
            "{what:>22} {:>9.0?} {:>9.0?} {:>9.0?} {:>12.2} {:>12.2}",
            median.allocating,
            median.reading,
            median.total,
            ratio(longer),
            ratio(sum)
        );
    }
    Ok(())
}
