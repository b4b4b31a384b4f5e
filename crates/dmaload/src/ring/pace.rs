//! Decides how many threads do one kind of work. Threads are added as long as all are busy and
//! adding more speeds up the work.
//!
//! Copiers and, by default, allocators start with at most [`FIRST`] threads. At the end of each
//! *epoch* (a number of jobs), the pace checks what limited the work. If the threads were busy for
//! at least nine tenths of the time, they are the bottleneck. One more thread is then tried for an
//! epoch. It is kept if the rate rises by at least a quarter of what the thread would add if
//! nothing else limited the rate. Otherwise, the bottleneck is the device, the processor or the
//! memory bus. The thread is then withdrawn, and no other thread is tried for 1 to 16 epochs.
//! Threads are withdrawn one by one as long as the remaining ones would have been busy for less
//! than seven tenths of the time.
//!
//! Threads that read wait for storage or for a server rather than for the processor. Each file
//! system has its own pace for them. The number of these threads starts at [`FIRST_READERS`], and
//! doubles or halves in situations where the number of copiers would change by one. It has to grow
//! fast: from a server that takes 20 ms to answer each read, even 32 threads read only about
//! 3 GiB/s in chunks of 2 MiB, and adding them one by one would take 4 GiB of reads.
//!
//! The module is pure: it starts no threads and reads no clock. The engine and the simulator both
//! use it.

use std::time::Duration;

/// Initial number of copiers, and of allocators if there are at least two processors. Two copiers
/// keep up with a device that reads 9 GiB/s, and two allocators with one that reads 18 GiB/s.
pub(crate) const FIRST: usize = 2;

/// Maximum number of threads that copy from staging and from the page cache: at 4.5 GiB/s each
/// (one pass to populate and one to copy, both at 9 GiB/s), enough for 72 GiB/s.
const MOST_COPIERS: usize = 16;

/// Maximum number of threads that allocate: at 9 GiB/s each, enough for 72 GiB/s.
const MOST_ALLOCATORS: usize = 8;

/// Initial number of threads that read for one load. Four are enough for large reads from a local
/// device: four threads reached the device's limit, and a single thread reached an eighth of it.
pub(crate) const FIRST_READERS: usize = 4;

/// Maximum number of threads that read for one load. This equals the number of reads that a single
/// load may have in flight at the default queue depth of 44 (see [`crate::memory::window`]).
pub(crate) const MOST_READERS: usize = 32;

/// Maximum number of epochs to rest after a trial without gain. The rest is one epoch after the
/// first such trial, and doubles after each further one.
const REST_EPOCHS_MAX: u32 = 16;

/// Number of jobs that are not measured after a pause. While the window fills, jobs run as fast as
/// memory can be allocated, however slow the device is. A load's share of the default 128 MiB
/// window (96 MiB) holds six batches of 16 MiB; all but the last are left out.
const FILLING_JOBS: usize = 5;

/// Maximum number of threads that copy on a machine with `cores` processors.
pub(crate) fn most_copiers(cores: usize) -> usize {
    cores.clamp(FIRST, MOST_COPIERS)
}

/// Maximum number of threads that allocate on a machine with `cores` processors.
pub(crate) fn most_allocators(cores: usize) -> usize {
    cores.clamp(1, MOST_ALLOCATORS)
}

/// How many staging slots to add to the initial ones for `copiers` copiers: for each additional
/// copier, one that is copied from and one that is read into.
pub(crate) fn more_staging_slots(copiers: usize) -> usize {
    copiers.saturating_sub(FIRST) * 2
}

/// The number of processors that this process may use.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A run of jobs whose rate is measured.
#[derive(Debug, Clone, Copy)]
struct Epoch {
    began: Duration,
    /// How many jobs to skip before the epoch begins. These are jobs that began with the previous
    /// number of threads, or that fill an empty window.
    before: usize,
    jobs: usize,
    bytes: u64,
    /// The time that threads were busy, added up over all threads.
    busy: Duration,
}

/// How to increase the number of threads when all are busy.
#[derive(Debug, Clone, Copy)]
enum Growth {
    OneMore,
    TwiceAsMany,
}

/// A trial of more threads.
#[derive(Debug, Clone, Copy)]
struct PaceTrial {
    /// The previous number of threads.
    threads: usize,
    /// Their rate, in bytes per second.
    rate: u64,
}

/// See the module documentation.
#[derive(Debug, Clone)]
pub(crate) struct Pace {
    growth: Growth,
    least: usize,
    most: usize,
    threads: usize,
    /// Jobs that are running or waiting for a thread.
    jobs: usize,
    /// The time up to which the epoch's `busy` is counted.
    counted: Duration,
    epoch: Option<Epoch>,
    trial: Option<PaceTrial>,
    rest_epochs: u32,
    /// How many epochs to rest after the next trial without gain.
    next_rest_epochs: u32,
}

impl Pace {
    pub(crate) fn new(first: usize, most: usize) -> Self {
        Pace {
            growth: Growth::OneMore,
            least: first,
            most: most.max(first),
            threads: first,
            jobs: 0,
            counted: Duration::ZERO,
            epoch: None,
            trial: None,
            rest_epochs: 0,
            next_rest_epochs: 1,
        }
    }

    /// A pace with a constant number of threads.
    pub(crate) fn fixed(threads: usize) -> Self {
        Pace::new(threads, threads)
    }

    /// The pace of threads that read from a file system.
    pub(crate) fn for_readers() -> Self {
        Pace { growth: Growth::TwiceAsMany, ..Pace::new(FIRST_READERS, MOST_READERS) }
    }

    /// How many threads may currently work at the same time.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    pub(crate) fn max_threads(&self) -> usize {
        self.most
    }

    /// Whether no job is running or waiting.
    pub(crate) fn is_idle(&self) -> bool {
        self.jobs == 0
    }

    /// How many jobs are running or waiting for a thread.
    pub(crate) fn jobs(&self) -> usize {
        self.jobs
    }

    /// Records that a job is queued.
    pub(crate) fn begin(&mut self, now: Duration) {
        self.count(now);
        self.jobs += 1;
    }

    /// Records that a job is done. Returns whether the number of threads changes.
    #[must_use]
    pub(crate) fn end(&mut self, now: Duration, bytes: u64) -> bool {
        self.count(now);
        self.jobs = self.jobs.checked_sub(1).expect("a job that ends should have begun");
        if self.least == self.most {
            return false;
        }
        let epoch = self.epoch.get_or_insert(Epoch::new(now, FILLING_JOBS));
        if epoch.before > 0 {
            epoch.before -= 1;
            *epoch = Epoch { began: now, busy: Duration::ZERO, ..*epoch };
            return false;
        }
        epoch.jobs += 1;
        epoch.bytes += bytes;
        let ended = *epoch;
        let elapsed = now.saturating_sub(ended.began);
        if ended.jobs < jobs_of_epoch(self.threads) || elapsed.is_zero() {
            return false;
        }
        let threads = self.next(ended, elapsed);
        self.epoch = Some(Epoch::new(now, if threads == self.threads { 0 } else { self.threads.max(threads) }));
        std::mem::replace(&mut self.threads, threads) != threads
    }

    /// Records that a queued job will not run, or that a job whose bytes are not counted is done.
    /// Until now, the job counted towards the busy time, but it is not one of the epoch's jobs.
    pub(crate) fn withdraw(&mut self, now: Duration) {
        self.count(now);
        self.jobs = self.jobs.checked_sub(1).expect("a job that is withdrawn should have begun");
    }

    /// Discards the current epoch when no work is left for now, because its rate would include the
    /// pause.
    pub(crate) fn pause(&mut self) {
        self.epoch = None;
    }

    /// Forgets all jobs, and discards the current trial and epoch.
    pub(crate) fn stop(&mut self) {
        self.jobs = 0;
        self.trial = None;
        self.pause();
    }

    /// The number of threads for the next epoch.
    fn next(&mut self, epoch: Epoch, elapsed: Duration) -> usize {
        let rate = rate(epoch.bytes, elapsed);
        if let Some(before) = self.trial.take() {
            // Without any other limit, the rate would rise in proportion to the number of threads.
            // The added threads are kept if it rises by at least a quarter of that.
            let more = (self.threads - before.threads) as u64;
            let least = before.rate + before.rate / (4 * before.threads as u64) * more;
            if rate < least {
                self.rest_epochs = self.next_rest_epochs;
                self.next_rest_epochs = (2 * self.next_rest_epochs).min(REST_EPOCHS_MAX);
                return before.threads;
            }
            self.next_rest_epochs = 1;
        }
        let times = |threads: usize| u32::try_from(threads).unwrap_or(u32::MAX);
        if self.rest_epochs > 0 {
            self.rest_epochs -= 1;
        } else if epoch.busy * 10 >= elapsed * 9 * times(self.threads) && self.threads < self.most {
            self.trial = Some(PaceTrial { threads: self.threads, rate });
            return self.more();
        }
        if self.threads > self.least && epoch.busy * 10 < elapsed * 7 * times(self.fewer()) {
            return self.fewer();
        }
        self.threads
    }

    fn more(&self) -> usize {
        let more = match self.growth {
            Growth::OneMore => self.threads + 1,
            Growth::TwiceAsMany => 2 * self.threads,
        };
        more.min(self.most)
    }

    fn fewer(&self) -> usize {
        let fewer = match self.growth {
            Growth::OneMore => self.threads - 1,
            Growth::TwiceAsMany => self.threads / 2,
        };
        fewer.max(self.least)
    }

    fn count(&mut self, now: Duration) {
        let passed = now.saturating_sub(std::mem::replace(&mut self.counted, now));
        let busy = u32::try_from(self.jobs.min(self.threads)).unwrap_or(u32::MAX);
        if let Some(epoch) = &mut self.epoch {
            epoch.busy += passed * busy;
        }
    }
}

impl Epoch {
    fn new(began: Duration, before: usize) -> Self {
        Epoch { began, before, jobs: 0, bytes: 0, busy: Duration::ZERO }
    }
}

/// The number of jobs in an epoch. There are several for each thread, so jobs that cross the
/// epoch's boundaries matter little.
fn jobs_of_epoch(threads: usize) -> usize {
    3 * threads.max(4)
}

/// The rate in bytes per second.
fn rate(bytes: u64, time: Duration) -> u64 {
    let nanoseconds = time.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Simulates a machine on which up to `useful` threads speed up the work, and each job takes
    /// one of them a millisecond. Work is available for about `load` percent of the time. Returns
    /// the largest and the final number of threads.
    fn simulate_pace(pace: &mut Pace, useful: usize, load: u32, epochs: usize) -> (usize, usize) {
        let mut now = pace.counted;
        let mut most = pace.threads();
        for _ in 0..epochs * 12 {
            let threads = pace.threads();
            (0..threads).for_each(|_| pace.begin(now));
            // Surplus threads do not help: all jobs then take longer.
            now += MS * u32::try_from(threads).unwrap() / u32::try_from(threads.min(useful)).unwrap();
            let changes = (0..threads).filter(|_| pace.end(now, 1 << 20)).count();
            assert_eq!(changes > 0, pace.threads() != threads);
            most = most.max(pace.threads());
            now += MS * (100 - load) / load;
        }
        (most, pace.threads())
    }

    #[test]
    fn threads_are_added_while_they_help_else_withdrawn() {
        for useful in [2, 3, 5, 8] {
            let (most, _) = simulate_pace(&mut Pace::new(2, 16), useful, 100, 200);
            assert_eq!(most, useful + 1, "one more thread than is useful should be tried");
        }
        assert_eq!(simulate_pace(&mut Pace::new(2, 4), 8, 100, 50), (4, 4), "threads should be added up to the bound");
    }

    #[test]
    fn idle_threads_are_withdrawn() {
        let mut pace = Pace::new(2, 16);
        assert_eq!(simulate_pace(&mut pace, 16, 50, 50), (2, 2));
        let (most, last) = simulate_pace(&mut pace, 6, 100, 50);
        assert!(most == 7 && last >= 6, "{most} {last}");
        // Now work is rarely available.
        let (_, last) = simulate_pace(&mut pace, 6, 1, 50);
        assert_eq!(last, 2);
    }

    #[test]
    fn pauses_do_not_count_as_slowness() {
        let mut pace = Pace::new(2, 16);
        for _ in 0..100 {
            simulate_pace(&mut pace, 16, 100, 1);
            pace.pause();
        }
        assert_eq!(pace.threads(), 16);
    }

    #[test]
    fn withdrawn_jobs_do_not_affect_the_pace() {
        let mut pace = Pace::for_readers();
        let threads = simulate_pace(&mut pace, 100, 100, 3).1;
        let now = pace.counted;
        (0..100).for_each(|_| pace.begin(now));
        (0..100).for_each(|_| pace.withdraw(now + 100 * MS));
        assert!(pace.is_idle());
        assert_eq!(pace.threads(), threads);
        pace.pause();
        assert_eq!(simulate_pace(&mut pace, 100, 100, 50).1, 32, "withdrawn jobs must not prevent threads from being added");
    }

    #[test]
    fn fixed_pace_stays_and_can_restart() {
        let mut pace = Pace::fixed(2);
        assert_eq!(simulate_pace(&mut pace, 16, 100, 50), (2, 2));
        pace.begin(MS);
        pace.stop();
        pace.begin(2 * MS);
        assert!(!pace.end(3 * MS, 1));
    }

    #[test]
    fn readers_double_and_are_withdrawn_if_that_does_not_help() {
        for (useful, expected_most, expected_last) in [(1, 8, 4), (4, 8, 4), (6, 16, 8), (8, 16, 8), (20, 32, 32), (100, 32, 32)]
        {
            // Long enough that no trial is running at the end.
            let (most, last) = simulate_pace(&mut Pace::for_readers(), useful, 100, 400);
            assert_eq!((most, last), (expected_most, expected_last), "up to {useful} threads help");
        }
    }

    /// A load should get up to speed early, so the first 128 reads must suffice.
    #[test]
    fn maximum_readers_are_reached_within_128_reads() {
        let mut pace = Pace::for_readers();
        let (mut now, mut reads) = (Duration::ZERO, 0);
        while pace.threads() < MOST_READERS {
            let threads = pace.threads();
            (0..threads).for_each(|_| pace.begin(now));
            now += MS;
            reads += threads;
            let _ = (0..threads).filter(|_| pace.end(now, 1 << 20)).count();
        }
        assert!(reads <= 128, "{reads}");
    }

    #[test]
    fn idle_readers_are_halved() {
        let mut pace = Pace::for_readers();
        assert_eq!(simulate_pace(&mut pace, 100, 100, 50), (32, 32));
        assert_eq!(simulate_pace(&mut pace, 100, 1, 50), (32, FIRST_READERS));
        assert!(pace.is_idle());
    }

    #[test]
    fn thread_bounds_follow_the_processors() {
        assert_eq!([1, 2, 8, 64].map(most_copiers), [2, 2, 8, 16]);
        assert_eq!([1, 2, 8, 64].map(most_allocators), [1, 2, 8, 8]);
        assert_eq!([1, 2, 3, 16].map(more_staging_slots), [0, 0, 2, 28]);
    }
}
