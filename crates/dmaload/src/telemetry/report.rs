//! What happened during a load.

use std::path::PathBuf;
use std::time::Duration;

use dmabuf::{Errno, HUGE_PAGE_BYTES, PageCount, page_bytes};

use crate::options::choices::Layout;
use crate::route::{Fallback, Route};
use crate::telemetry::trace::TraceEvent;

/// What happened during a load: how much, how long, by which ways.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// Bytes that were read into segments: of all files, or of what was asked for with what was read along.
    pub bytes: u64,
    /// Bytes that were asked for: as many, unless only parts of the files were ([`crate::LoadOptions::tensors`] and the like).
    pub wanted_bytes: u64,
    /// Bytes of tensors that were copied to where the importer wants them ([`crate::ImporterLimits::alignment_bytes`]).
    pub copied_bytes: u64,
    /// Bytes that were copied from the page cache ([`crate::LoadOptions::cache`]) rather than read from storage.
    pub cached_bytes: u64,
    /// Number of segments.
    pub segments: usize,
    /// Number of allocations (memfds, dma-bufs) that they are in: fewer where small files share them.
    pub memories: usize,
    /// From the call of `load` to the last segment.
    pub total: Duration,
    /// While at least one piece was being allocated and populated.
    pub allocating: Duration,
    /// While at least one read was in flight.
    pub reading: Duration,
    /// While at least one copy from staging was under way; zero where nothing was bounced.
    pub copying: Duration,
    /// While at least one copy from the page cache was under way; zero where nothing was taken from there.
    pub from_cache: Duration,
    /// Until the first segment was handed over; `None` when there was none.
    pub first_segment: Option<Duration>,
    /// How much of the segments' memory lies on 2 MiB pages.
    pub pages: PageCount,
    /// Why a 2 MiB extent has small pages although huge ones were wanted.
    pub pages_refused: Option<Errno>,
    /// How much of the segments' memory came from the pool ([`crate::LoaderBuilder::pool_bytes`]).
    pub reused_bytes: u64,
    /// The heap.
    pub heap: String,
    /// Why it is this heap, where it was chosen for the caller, and what it does otherwise than one might expect.
    pub notes: Vec<String>,
    /// The layout.
    pub layout: Layout,
    /// The lowest route that any byte took; the one to start at where all came from the page cache.
    pub route: Route,
    /// Every step down the ladder, in the order taken.
    pub fallbacks: Vec<Fallback>,
    /// How fast direct and staged reads were, where this load has tried them to find the fastest way
    /// ([`crate::LoadOptions::route`]).
    pub measured: Option<Measured>,
    /// What was compared with what was expected ([`crate::LoadOptions::verify`]); `None` when nothing was.
    pub verified: Option<String>,
    /// What was done when, in the order in which it ended; empty unless [`crate::LoadOptions::trace`] was asked for.
    pub trace: Vec<TraceEvent>,
    /// The files, in the order given.
    pub files: Vec<FileReport>,
}

/// A way for bytes to get into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Way {
    /// Memory is brought into being ahead of reads, and devices write to it.
    Direct,
    /// Reads go into a few buffers that stay in the processor's cache. Threads bring memory into being,
    /// and copy what was read while both are in the cache ([`Route::Bounce`]).
    Staged,
    /// Through the page cache, by io_uring ([`Route::UringBuffered`]): on network file systems, where direct reads may be
    /// slow. A step down, so no strict load takes it.
    Buffered,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Way::Direct => "direct",
            Way::Staged => "staged",
            Way::Buffered => "buffered",
        })
    }
}

/// How fast the ways were on parts of a load.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Measured {
    /// By direct reads.
    pub direct_bytes_per_second: f64,
    /// By staged ones.
    pub staged_bytes_per_second: f64,
    /// By those through the page cache; `None` where these were not tried.
    pub buffered_bytes_per_second: Option<f64>,
    /// Which of them the rest of the load took, and later loads take.
    pub chosen: Way,
}

/// What happened to one file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileReport {
    /// The path, as it was given.
    pub path: PathBuf,
    /// Its length when the load began, which is what was loaded.
    pub bytes: u64,
    /// The lowest route that any of its bytes took.
    pub route: Route,
}

impl Report {
    /// Bytes per second over the whole load, allocation included.
    #[allow(clippy::cast_precision_loss)]
    pub fn throughput_bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.total.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Bytes per second that were read from storage, while any were; `None` where none were.
    pub fn storage_bytes_per_second(&self) -> Option<f64> {
        rate(self.bytes.saturating_sub(self.cached_bytes), self.reading)
    }

    /// Bytes per second that were copied from the page cache, while any were; `None` where none were.
    pub fn cache_bytes_per_second(&self) -> Option<f64> {
        rate(self.cached_bytes, self.from_cache)
    }

    /// The page size that most of the memory has.
    pub fn page_size_bytes(&self) -> usize {
        if self.pages.huge_bytes * 2 > self.pages.seen_bytes { HUGE_PAGE_BYTES } else { page_bytes() }
    }

    /// How much of the shorter of allocating and reading was hidden behind the longer: 1 when the load took no longer
    /// than the longer of the two, 0 when they ran one after the other.
    pub fn overlap(&self) -> f64 {
        let shorter = self.allocating.min(self.reading).as_secs_f64();
        let hidden = (self.allocating + self.reading).saturating_sub(self.total).as_secs_f64();
        if shorter > 0.0 { (hidden / shorter).clamp(0.0, 1.0) } else { 0.0 }
    }
}

#[allow(clippy::cast_precision_loss)]
fn rate(bytes: u64, time: Duration) -> Option<f64> {
    (bytes > 0 && !time.is_zero()).then(|| bytes as f64 / time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(total_ms: u64, allocating_ms: u64, reading_ms: u64) -> Report {
        let ms = Duration::from_millis;
        Report {
            wanted_bytes: 0,
            copied_bytes: 0,
            cached_bytes: 0,
            bytes: 1 << 20,
            segments: 1,
            memories: 1,
            total: ms(total_ms),
            allocating: ms(allocating_ms),
            reading: ms(reading_ms),
            copying: ms(0),
            from_cache: ms(0),
            first_segment: None,
            pages: PageCount::default(),
            pages_refused: None,
            reused_bytes: 0,
            heap: "memfd".to_owned(),
            notes: Vec::new(),
            layout: Layout::Segmented,
            route: Route::Buffered,
            fallbacks: Vec::new(),
            measured: None,
            verified: None,
            trace: Vec::new(),
            files: Vec::new(),
        }
    }

    #[test]
    fn overlap_is_what_was_hidden_of_the_shorter_part() {
        for (total, allocating, reading, expected) in
            [(300, 100, 200, 0.0), (200, 100, 200, 1.0), (250, 100, 200, 0.5), (5, 0, 5, 0.0)]
        {
            assert!((report(total, allocating, reading).overlap() - expected).abs() < 1e-9);
        }
    }

    #[test]
    fn storage_and_cache_have_rates_of_their_own() {
        let neither = report(10, 0, 0);
        assert_eq!((neither.storage_bytes_per_second(), neither.cache_bytes_per_second()), (None, None));
        let half = Report { cached_bytes: 1 << 19, from_cache: Duration::from_secs(1), ..report(3000, 0, 2000) };
        let half_mib = f64::from(1 << 19);
        assert_eq!(half.storage_bytes_per_second(), Some(half_mib / 2.0));
        assert_eq!(half.cache_bytes_per_second(), Some(half_mib));
    }
}
