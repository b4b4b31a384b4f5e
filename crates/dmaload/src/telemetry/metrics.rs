//! What a loader has done so far, for exporters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a loader has done since it was made, and what it holds now; see [`crate::Loader::metrics`]. Counters only ever rise.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metrics {
    /// Loads that were begun.
    pub loads_started: u64,
    /// Loads that have given all they had.
    pub loads_finished: u64,
    /// Loads that ended with an error.
    pub loads_failed: u64,
    /// Loads that were dropped before their end.
    pub loads_dropped: u64,
    /// Bytes of files that were read into segments.
    pub read_bytes: u64,
    /// Segments that were handed over.
    pub segments: u64,
    /// Steps down the ladder of routes.
    pub fallbacks: u64,
    /// Reads that failed, and were tried once more.
    pub retried_reads: u64,
    /// Reads that the kernel has now, and at most ([`crate::LoaderBuilder::queue_depth`]).
    pub reads_in_flight: u64,
    /// The most of them.
    pub queue_depth: u64,
    /// Memory that segments and the pool have now ([`crate::Loader::memory_bytes`]).
    pub memory_bytes: u64,
    /// Memory that the pool keeps now.
    pub pooled_bytes: u64,
    /// How long reads waited, from when their memory was there until the kernel was asked: for the queue, mostly.
    pub before_kernel: Latency,
    /// How long reads took, from when the kernel was asked until its answer was seen.
    pub in_kernel: Latency,
    /// How long segments waited, from when all their bytes were there until they were handed over: for the ones before them, and for
    /// the check of their file.
    pub after_kernel: Latency,
}

/// How long something took, each time.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Latency {
    /// How often.
    pub count: u64,
    /// In all.
    pub sum: Duration,
    /// How often it took up to [`Latency::bound`] of each bucket, and longer than that of the one before it; the last has no bound.
    pub buckets: [u64; Latency::BUCKETS],
}

impl Latency {
    /// The number of buckets.
    pub const BUCKETS: usize = 22;

    /// The bound of a bucket: 1 µs, 2 µs, 4 µs and so on; `None` for the last one, from a second on.
    #[must_use]
    pub fn bound(bucket: usize) -> Option<Duration> {
        (bucket + 1 < Self::BUCKETS).then(|| Duration::from_micros(1 << bucket))
    }

    /// The average; zero where there was none.
    #[must_use]
    pub fn mean(&self) -> Duration {
        let nanos = self.sum.as_nanos().checked_div(self.count.into()).unwrap_or(0);
        Duration::from_nanos(u64::try_from(nanos).expect("the average is within the sum, which was counted in 64 bits"))
    }
}

/// Latencies as they come.
#[derive(Debug, Default)]
pub(crate) struct Histogram {
    sum_nanos: AtomicU64,
    buckets: [AtomicU64; Latency::BUCKETS],
}

impl Histogram {
    pub(crate) fn add(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).expect("less than 500 years");
        let micros = nanos.div_ceil(1000);
        // The first power of two that is not less.
        let bucket = micros.max(1).next_power_of_two().trailing_zeros() as usize;
        let bucket = self.buckets.get(bucket.min(Latency::BUCKETS - 1)).expect("the last bucket is for all that is longer");
        bucket.fetch_add(1, Ordering::Relaxed);
        self.sum_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub(crate) fn seen(&self) -> Latency {
        let buckets = self.buckets.each_ref().map(|bucket| bucket.load(Ordering::Relaxed));
        Latency { count: buckets.iter().sum(), sum: Duration::from_nanos(self.sum_nanos.load(Ordering::Relaxed)), buckets }
    }
}

/// What the ring thread counts.
#[derive(Debug, Default)]
pub(crate) struct ReadCounters {
    pub(crate) in_flight: AtomicU64,
    /// What a panic of the ring thread has leaked.
    pub(crate) leaked_bytes: AtomicU64,
    pub(crate) before_kernel: Histogram,
    pub(crate) in_kernel: Histogram,
}

/// What loads count.
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
    /// What was counted, without what is not theirs.
    pub(crate) fn seen(&self, reads: &ReadCounters) -> Metrics {
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
            before_kernel: reads.before_kernel.seen(),
            in_kernel: reads.in_kernel.seen(),
            after_kernel: self.after_kernel.seen(),
        }
    }
}

/// One more.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_latency_is_in_the_bucket_of_its_bound() {
        let histogram = Histogram::default();
        let times = [0, 1, 1000, 1001, 4000, 1_000_000, 999_999_999, 3_600_000_000_000];
        for nanos in times {
            histogram.add(Duration::from_nanos(nanos));
        }
        let seen = histogram.seen();
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
