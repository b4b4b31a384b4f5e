//! The report of a load.

use std::path::PathBuf;
use std::time::Duration;

use dmabuf::{Errno, HUGE_PAGE_BYTES, PageCount, page_bytes};

use crate::options::choices::Layout;
use crate::route::{Fallback, Route};
use crate::telemetry::trace::TraceEvent;

/// What happened during a load: how much was read, how long that took, and which routes were used.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// Bytes read into segments: all bytes of the files, or the requested parts plus whatever was
    /// read along with them.
    pub bytes: u64,
    /// Number of bytes requested. Equal to `bytes`, unless only parts of the files were requested
    /// ([`crate::LoadOptions::tensors`] and the like) or the layout is [`Layout::Tensors`].
    pub wanted_bytes: u64,
    /// Bytes of tensors that were copied to meet the importer's alignment
    /// ([`crate::ImporterLimits::alignment_bytes`]).
    pub copied_bytes: u64,
    /// Bytes copied from the page cache ([`crate::LoadOptions::cache`]) rather than read from
    /// storage.
    pub cached_bytes: u64,
    /// Number of segments.
    pub segments: usize,
    /// Number of allocations (memfds, dma-bufs or private memory) that hold the segments: fewer
    /// than segments if small files share allocations.
    pub memories: usize,
    /// Time from the start of the load until all of its data was delivered to the caller.
    pub total: Duration,
    /// Time during which memory was being allocated or populated.
    pub allocating: Duration,
    /// Time during which at least one read from storage was in flight.
    pub reading: Duration,
    /// Time during which at least one copy from staging was running; zero if no read was staged.
    pub copying: Duration,
    /// Time during which at least one copy from the page cache was running; zero if nothing was
    /// copied from there.
    pub from_cache: Duration,
    /// Time until the first segment was delivered to the caller; `None` if there were no segments.
    pub first_segment: Option<Duration>,
    /// How much of the segments' memory lies on 2 MiB pages.
    pub pages: PageCount,
    /// Why some of the memory is on small pages even though 2 MiB pages were wanted. If there were
    /// several reasons, this is the first one found. Always `None` before Linux 6.7.
    pub pages_refused: Option<Errno>,
    /// How much of the segments' memory came from the pool ([`crate::LoaderBuilder::pool_bytes`]).
    pub reused_bytes: u64,
    /// The name of the heap that the memory was allocated from.
    pub heap: String,
    /// Why this heap was chosen, unless the caller chose it, and anything unexpected about the
    /// load.
    pub notes: Vec<String>,
    /// How the files were divided into segments.
    pub layout: Layout,
    /// The least preferred route that was used for any byte, in the order of [`Route::ALL`]. If
    /// everything came from the page cache, this is the route that the load started with.
    pub route: Route,
    /// Every fallback from one route to another, in the order in which they happened. If several
    /// files had the same fallback, it is listed once and names no file.
    pub fallbacks: Vec<Fallback>,
    /// How fast each way of reading was, if this load measured them to find the fastest one
    /// ([`crate::LoadOptions::route`]).
    pub measured: Option<Measured>,
    /// What was verified ([`crate::LoadOptions::verify`]), as described by the verifier; `None` if
    /// the load was not verified.
    pub verified: Option<String>,
    /// A timeline, sorted by the times at which the events ended. Empty without
    /// [`crate::LoadOptions::trace`].
    pub trace: Vec<TraceEvent>,
    /// The files, in load order.
    pub files: Vec<FileReport>,
}

/// A way of reading files into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Way {
    /// Memory is populated before the reads, which then write directly into it.
    Direct,
    /// Reads go into a few buffers that stay in the CPU cache. Threads then populate memory and
    /// copy the bytes into it while both are in the cache ([`Route::Bounce`]).
    Staged,
    /// io_uring through the page cache ([`Route::UringBuffered`]), for network file systems where
    /// direct reads may be slow. Strict loads never use it, because that would be a fallback.
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

/// The speed of each way of reading, as measured on parts of a load.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Measured {
    /// Speed of direct reads.
    pub direct_bytes_per_second: f64,
    /// Speed of staged reads.
    pub staged_bytes_per_second: f64,
    /// Speed of reads through the page cache; `None` if they were not measured.
    pub buffered_bytes_per_second: Option<f64>,
    /// The way that the rest of the load and later loads from the same file system use.
    pub chosen: Way,
}

/// What happened to one file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileReport {
    /// The path, as given or as found in the given folder.
    pub path: PathBuf,
    /// The file's length when the load began, even if only parts of it were loaded.
    pub bytes: u64,
    /// The least preferred route that was used for any of its bytes, in the order of
    /// [`Route::ALL`]. If all of them came from the page cache, this is the route that the load
    /// started with.
    pub route: Route,
}

impl Report {
    /// Bytes per second over the whole load, allocation included.
    #[allow(clippy::cast_precision_loss)]
    pub fn throughput_bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.total.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// The speed of reads from storage, over the time during which any were in flight; `None` if
    /// there were no reads.
    pub fn storage_bytes_per_second(&self) -> Option<f64> {
        rate(self.bytes.saturating_sub(self.cached_bytes), self.reading)
    }

    /// The speed of copies from the page cache, over the time during which any were running;
    /// `None` if there were no such copies.
    pub fn cache_bytes_per_second(&self) -> Option<f64> {
        rate(self.cached_bytes, self.from_cache)
    }

    /// The page size used for most of the segments' memory, in bytes: 2 MiB if more than half of
    /// that memory is on such pages ([`Self::pages`]), otherwise the size of a small page.
    pub fn page_size_bytes(&self) -> usize {
        if self.pages.huge_bytes * 2 > self.pages.seen_bytes { HUGE_PAGE_BYTES } else { page_bytes() }
    }

    /// How much of the shorter phase, allocating or reading, was hidden behind the longer one: 1
    /// if the load took no longer than the longer phase, 0 if the phases ran one after the other
    /// or one of them took no time.
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
    fn overlap_is_the_hidden_share_of_the_shorter_part() {
        for (total, allocating, reading, expected) in
            [(300, 100, 200, 0.0), (200, 100, 200, 1.0), (250, 100, 200, 0.5), (5, 0, 5, 0.0)]
        {
            assert!((report(total, allocating, reading).overlap() - expected).abs() < 1e-9);
        }
    }

    #[test]
    fn storage_and_cache_have_separate_rates() {
        let neither = report(10, 0, 0);
        assert_eq!((neither.storage_bytes_per_second(), neither.cache_bytes_per_second()), (None, None));
        let half = Report { cached_bytes: 1 << 19, from_cache: Duration::from_secs(1), ..report(3000, 0, 2000) };
        let half_mib = f64::from(1 << 19);
        assert_eq!(half.storage_bytes_per_second(), Some(half_mib / 2.0));
        assert_eq!(half.cache_bytes_per_second(), Some(half_mib));
    }
}
