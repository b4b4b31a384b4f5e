//! A loader's metrics, for exporters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a loader has done since it was created, and what it holds now; see
/// [`crate::Loader::metrics`]. Counters never decrease.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metrics {
    /// Loads that have started.
    pub loads_started: u64,
    /// Loads that have delivered all of their data.
    pub loads_finished: u64,
    /// Loads that have failed.
    pub loads_failed: u64,
    /// Loads that were dropped before they finished or failed.
    pub loads_dropped: u64,
    /// Bytes read from files into segments.
    pub read_bytes: u64,
    /// Segments delivered to the caller.
    pub segments: u64,
    /// Fallbacks from one route to another ([`crate::Fallback`]).
    pub fallbacks: u64,
    /// Reads that failed because of the storage medium and were retried.
    pub retried_reads: u64,
    /// Reads in flight now, at most [`crate::LoaderBuilder::queue_depth`].
    pub reads_in_flight: u64,
    /// How many reads may be in flight at once.
    pub queue_depth: u64,
    /// Bytes of memory that segments and the pool occupy now ([`crate::Loader::memory_bytes`]).
    pub memory_bytes: u64,
    /// Bytes of memory that the pool holds now.
    pub pooled_bytes: u64,
    /// How long reads waited before they were submitted to the kernel, counted from when memory
    /// for them was ready. Most of this is spent waiting for a place in the queue.
    pub before_kernel: Latency,
    /// How long reads took, from submission until their completion was received.
    pub in_kernel: Latency,
    /// How long complete segments waited before they were delivered to the caller. A segment may
    /// wait for earlier segments, for its export as a dma-buf, and for the check that its file has
    /// not changed.
    pub after_kernel: Latency,
}

/// A histogram of durations.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Latency {
    /// Number of samples.
    pub count: u64,
    /// Sum of all samples.
    pub sum: Duration,
    /// Number of samples in each bucket. Each bucket counts the samples that are above the
    /// preceding bucket's [`Latency::bound`] and no greater than its own. The last bucket has no
    /// bound.
    pub buckets: [u64; Latency::BUCKETS],
}

impl Latency {
    /// The number of buckets.
    pub const BUCKETS: usize = 22;

    /// The upper bound of a bucket: 1 µs, 2 µs, 4 µs and so on; `None` for the last one, which
    /// begins at about 1 s.
    #[must_use]
    pub fn bound(bucket: usize) -> Option<Duration> {
        (bucket + 1 < Self::BUCKETS).then(|| Duration::from_micros(1 << bucket))
    }

    /// The average; zero without samples.
    #[must_use]
    pub fn mean(&self) -> Duration {
        let nanos = self.sum.as_nanos().checked_div(self.count.into()).unwrap_or(0);
        Duration::from_nanos(u64::try_from(nanos).expect("the average should fit into 64 bits, like the sum"))
    }
}

/// Counts latencies in buckets. Several threads can add to it at the same time.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    sum_nanos: AtomicU64,
    buckets: [AtomicU64; Latency::BUCKETS],
}

impl Histogram {
    pub(crate) fn add(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).expect("a latency should be less than 500 years");
        let micros = nanos.div_ceil(1000);
        // The exponent of the smallest power of two that is at least `micros`.
        let bucket = micros.max(1).next_power_of_two().trailing_zeros() as usize;
        let bucket =
            self.buckets.get(bucket.min(Latency::BUCKETS - 1)).expect("the index should be at most that of the last bucket");
        bucket.fetch_add(1, Ordering::Relaxed);
        self.sum_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Latency {
        let buckets = self.buckets.each_ref().map(|bucket| bucket.load(Ordering::Relaxed));
        Latency { count: buckets.iter().sum(), sum: Duration::from_nanos(self.sum_nanos.load(Ordering::Relaxed)), buckets }
    }
}

/// Counters of the ring thread.
#[derive(Debug, Default)]
pub(crate) struct ReadCounters {
    pub(crate) in_flight: AtomicU64,
    /// Bytes leaked because operations in flight may still use them.
    pub(crate) leaked_bytes: AtomicU64,
    pub(crate) before_kernel: Histogram,
    pub(crate) in_kernel: Histogram,
}

/// Counters of loads.
#[derive(Debug, Default)]
pub(crate) struct LoadCounters {
    pub(crate) started: AtomicU64,
    pub(crate) finished: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) segments: AtomicU64,
    pub(crate) fallbacks: AtomicU64,
    pub(crate) retried_reads: AtomicU64,
    pub(crate) after_kernel: Histogram,
}

impl LoadCounters {
    /// Takes a snapshot. The metrics that are not counted here are set to zero, and the caller
    /// must fill them in.
    pub(crate) fn snapshot(&self, reads: &ReadCounters) -> Metrics {
        let seen = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Metrics {
            loads_started: seen(&self.started),
            loads_finished: seen(&self.finished),
            loads_failed: seen(&self.failed),
            loads_dropped: seen(&self.dropped),
            read_bytes: seen(&self.read_bytes),
            segments: seen(&self.segments),
            fallbacks: seen(&self.fallbacks),
            retried_reads: seen(&self.retried_reads),
            reads_in_flight: seen(&reads.in_flight),
            queue_depth: 0,
            memory_bytes: 0,
            pooled_bytes: 0,
            before_kernel: reads.before_kernel.snapshot(),
            in_kernel: reads.in_kernel.snapshot(),
            after_kernel: self.after_kernel.snapshot(),
        }
    }
}

pub(crate) fn increment(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_latency_is_in_the_right_bucket() {
        let histogram = Histogram::default();
        let times = [0, 1, 1000, 1001, 4000, 1_000_000, 999_999_999, 3_600_000_000_000];
        for nanos in times {
            histogram.add(Duration::from_nanos(nanos));
        }
        let seen = histogram.snapshot();
        assert_eq!((seen.count, seen.sum), (8, Duration::from_nanos(times.iter().sum())));
        let within = |took: u64| {
            let bucket = (0..Latency::BUCKETS)
                .find(|&bucket| Latency::bound(bucket).is_none_or(|bound| Duration::from_nanos(took) <= bound));
            bucket.unwrap()
        };
        let mut expected = [0; Latency::BUCKETS];
        times.iter().for_each(|&took| expected[within(took)] += 1);
        assert_eq!(seen.buckets, expected);
        assert_eq!(Latency::bound(Latency::BUCKETS - 1), None);
        assert_eq!(Latency { count: 0, sum: Duration::ZERO, buckets: expected }.mean(), Duration::ZERO);
    }
}
