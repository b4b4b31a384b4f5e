//! Chooses between direct, staged and buffered reads by measuring each on part of a load.
//!
//! On a virtual disk, the host copies the data into the destination of a read, and reading into
//! staging that stays in the processor's cache is a third faster. A physical drive writes to
//! memory outside the cache just as fast, so direct reads save a copy. Only a measurement can tell
//! the two cases apart.
//!
//! On network file systems, direct reads may be far slower or far faster than reads through the
//! page cache, so the latter are measured as a third way.
//!
//! The code here is pure: it reads no clock and makes no system calls.

use std::collections::HashMap;
use std::time::Duration;

use dmabuf::Pages;

use crate::support::id::LoadId;
use crate::telemetry::report::{Measured, Way};

/// The minimum size of a load that is measured. In a smaller load, a faster way gains too little
/// to be worth the cost of finding it.
pub(crate) const MEASURED_BYTES_MIN: u64 = 512 << 20;
/// How many bytes of a load are read in each way to measure it.
const PHASE_BYTES: u64 = 96 << 20;
/// Used instead of [`PHASE_BYTES`] if memory consists of small pages and staged reads are expected
/// to be the fastest. Direct reads have to wait until memory is populated, so less of the load is
/// spent on measuring them.
const SMALL_PAGES_PHASE_BYTES: u64 = 32 << 20;
/// A way is chosen instead of the expected one only if its rate is more than this many times as
/// high.
const MARGIN: f64 = 1.03;
/// How often a file system is measured again. After its first measurement, the loads that could be
/// measured are counted. Loads 1, 2, 4, 8 and 16 are measured, and then every load whose number is
/// a multiple of this.
const MEASURE_EVERY: u64 = 32;

/// The ways in which a load may be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ways {
    /// The way that is expected to be the fastest. It is used as long as nothing has been
    /// measured.
    pub(crate) expected: Way,
    /// Whether [`Way::Buffered`] is allowed.
    pub(crate) buffered: bool,
}

impl Ways {
    fn allows(self, way: Way) -> bool {
        self.buffered || way != Way::Buffered
    }
}

/// A measurement in progress: the first batches of a load are read in different ways, to find the
/// fastest.
#[derive(Debug)]
pub(crate) struct Trial {
    phase_bytes: u64,
    expected: Way,
    /// Each way of reading and the progress of its batches, in the order in which the ways are
    /// measured.
    phases: Vec<(Way, Phase)>,
}

/// The progress of the batches that are read in one way.
#[derive(Debug, Default)]
struct Phase {
    /// The total size of these batches.
    bytes: u64,
    /// How many of these bytes were filled.
    full_bytes: u64,
    /// When its first batch was queued for reading.
    queued_at: Option<Duration>,
    /// When the last of the earlier phases ended, and how many bytes of this phase had been filled
    /// by then.
    alone: Option<(Duration, u64)>,
    ended: Option<Duration>,
}

impl Phase {
    /// Records that `bytes` more bytes were filled.
    fn record_full(&mut self, bytes: u64, now: Duration) {
        self.full_bytes += bytes;
        if self.full_bytes == self.bytes {
            self.ended = Some(now);
        }
    }

    /// Returns the rate in bytes per second; `None` until all bytes of the phase are filled.
    fn rate(&self) -> Option<f64> {
        // If half of the phase was filled before the earlier phases ended, count the whole time
        // since its first batch was queued. The phase shared some of that time with earlier
        // phases, so its real rate is at least as high.
        let alone = self.alone.filter(|&(_, before)| before < self.bytes / 2);
        let (begun, before) = alone.or(self.queued_at.map(|queued_at| (queued_at, 0)))?;
        let took = self.ended?.saturating_sub(begun).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "the rate need not be exact")]
        let rate = (self.bytes - before) as f64 / took.max(1e-6);
        Some(rate)
    }
}

impl Trial {
    fn new(ways: Ways, pages: Pages) -> Self {
        let expects_staged = pages == Pages::Small && ways.expected == Way::Staged;
        let phase_bytes = if expects_staged { SMALL_PAGES_PHASE_BYTES } else { PHASE_BYTES };
        // Measure direct reads first: memory that was prepared in advance would make them seem
        // faster, and at the start of a load, none has been prepared.
        let tried = [Way::Direct, Way::Staged, Way::Buffered].into_iter().filter(|&way| ways.allows(way));
        Trial { phase_bytes, expected: ways.expected, phases: tried.map(|way| (way, Phase::default())).collect() }
    }

    fn phase(&self, start: u64) -> usize {
        usize::try_from(start / self.phase_bytes).unwrap_or(usize::MAX)
    }

    /// Whether the batch that starts at byte `start` of the load is measured.
    fn measures(&self, start: u64) -> bool {
        self.phase(start) < self.phases.len()
    }

    /// Returns how the batch that starts at byte `start` of the load is read as long as no way has
    /// been chosen.
    fn way(&self, start: u64) -> Way {
        self.phases.get(self.phase(start)).or(self.phases.last()).map_or(self.expected, |&(way, _)| way)
    }

    /// The phase in which the batch that starts at byte `start` of the load is measured.
    fn phase_of(&mut self, start: u64) -> Option<&mut Phase> {
        let number = self.phase(start);
        self.phases.get_mut(number).map(|(_, phase)| phase)
    }

    /// Records that `bytes` bytes of the batch that starts at byte `start` of the load were
    /// filled. Returns the measurement once all phases have ended.
    ///
    /// The first phase is timed from its first read, and each later phase from the end of all
    /// phases before it. The time from the first filled batch of a phase to the last one would say
    /// little, because storage finishes the reads in flight at about the same time.
    fn record_full(&mut self, start: u64, bytes: u64, now: Duration) -> Option<Measured> {
        self.phase_of(start)?.record_full(bytes, now);
        let mut ended = true;
        for (number, (_, phase)) in self.phases.iter_mut().enumerate() {
            if ended && number > 0 {
                phase.alone.get_or_insert((now, phase.full_bytes));
            }
            ended &= phase.ended.is_some();
        }
        let rate = |wanted: Way| {
            let (_, phase) = self.phases.iter().find(|&&(way, _)| way == wanted)?;
            phase.rate()
        };
        if !ended {
            return None;
        }
        let (direct, staged, buffered) = (rate(Way::Direct)?, rate(Way::Staged)?, rate(Way::Buffered));
        let rates = [(Way::Direct, direct), (Way::Staged, staged)].into_iter().chain(buffered.map(|rate| (Way::Buffered, rate)));
        Some(Measured {
            direct_bytes_per_second: direct,
            staged_bytes_per_second: staged,
            buffered_bytes_per_second: buffered,
            chosen: choose_way(self.expected, rates),
        })
    }
}

/// Returns the fastest way, or the expected one if no way is faster than it by [`MARGIN`].
fn choose_way(expected: Way, rates: impl Iterator<Item = (Way, f64)> + Clone) -> Way {
    let expected_rate = rates.clone().find(|&(way, _)| way == expected).map_or(0.0, |(_, rate)| rate);
    let fastest = rates.max_by(|(_, one), (_, other)| one.total_cmp(other));
    fastest.filter(|&(_, rate)| rate > expected_rate * MARGIN).map_or(expected, |(way, _)| way)
}

/// How the batches of a load are read.
#[derive(Debug)]
pub(crate) struct Choosing {
    /// The offset of each batch in the bytes of the load.
    starts: Vec<u64>,
    trial: Option<Trial>,
    known: Option<Way>,
    expected: Way,
}

impl Choosing {
    /// Returns a choice that is already settled: the whole load is read in this way, and nothing
    /// is measured.
    pub(crate) fn fixed(way: Way) -> Self {
        Choosing { starts: Vec::new(), trial: None, known: Some(way), expected: way }
    }

    /// Returns the choice to read the first batches in different ways, to measure them.
    fn measured(ways: Ways, pages: Pages, batches: &[u64]) -> Self {
        let mut trial = Trial::new(ways, pages);
        let expected = ways.expected;
        let mut start = 0;
        let starts = batches.iter().map(|&bytes| {
            let own = start;
            if let Some(phase) = trial.phase_of(own) {
                phase.bytes += bytes;
            }
            start += bytes;
            own
        });
        Choosing { starts: starts.collect(), trial: Some(trial), known: None, expected }
    }

    /// Returns how to read a batch that is about to be prepared.
    pub(crate) fn way(&self, batch: usize) -> Way {
        match (self.known, &self.trial, self.starts.get(batch)) {
            // A batch that the trial measures keeps its way, even if another way has been chosen.
            (_, Some(trial), Some(&start)) if trial.measures(start) => trial.way(start),
            (Some(way), ..) => way,
            (None, Some(trial), Some(&start)) => trial.way(start),
            (None, ..) => self.expected,
        }
    }

    /// Records that the pieces of a batch are about to be read.
    pub(crate) fn record_queued(&mut self, batch: usize, now: Duration) {
        if let (Some(trial), Some(&start)) = (&mut self.trial, self.starts.get(batch))
            && let Some(phase) = trial.phase_of(start)
        {
            phase.queued_at.get_or_insert(now);
        }
    }

    /// Stops measuring. Called if some bytes do not come from storage. The load continues in the
    /// expected way.
    pub(crate) fn stop_measuring(&mut self) {
        if self.known.is_none() {
            (self.known, self.trial) = (Some(self.expected), None);
        }
    }

    /// Records that `bytes` bytes of a batch were filled. If this completes the measurement,
    /// returns it.
    pub(crate) fn record_full(&mut self, batch: usize, bytes: u64, now: Duration) -> Option<Measured> {
        if self.known.is_some() {
            return None;
        }
        let trial = self.trial.as_mut()?;
        let measured = trial.record_full(*self.starts.get(batch)?, bytes, now)?;
        self.known = Some(measured.chosen);
        Some(measured)
    }
}

/// The fastest known way for each file system, as a loader has measured it.
#[derive(Debug)]
pub(crate) struct Choices {
    pages: Pages,
    mounts: HashMap<u64, KnownWay>,
    /// The load that is being measured. Measuring a second one at the same time would distort the
    /// result.
    trying: Option<LoadId>,
}

#[derive(Debug)]
struct KnownWay {
    way: Way,
    /// How many loads since the first measurement could have been measured, too.
    loads: u64,
}

impl KnownWay {
    fn is_due(&self) -> bool {
        self.loads.is_power_of_two() && self.loads < MEASURE_EVERY || self.loads.is_multiple_of(MEASURE_EVERY)
    }
}

impl Choices {
    pub(crate) fn new(pages: Pages) -> Self {
        Choices { pages, mounts: HashMap::new(), trying: None }
    }

    /// Returns the ways for loads from a file system, including the one expected to be the
    /// fastest.
    ///
    /// On small pages, staged reads are expected to be the fastest, because they need not wait for
    /// memory to be populated, which is slow. On large pages, direct reads are expected to be the
    /// fastest, because they save the copy. A server that may answer slowly needs more reads in
    /// flight than staging has room for, so direct reads are expected to be the fastest from such
    /// a server, too.
    pub(crate) fn ways(&self, may_be_slow: bool, buffered: bool) -> Ways {
        let expected = if self.pages == Pages::Small && !may_be_slow { Way::Staged } else { Way::Direct };
        Ways { expected, buffered }
    }

    /// Decides how to read a load whose batches have these sizes. `is_over` is called with the
    /// load that is currently being measured, if any, and returns whether that load has ended.
    pub(crate) fn begin(
        &mut self,
        load: LoadId,
        mount: u64,
        ways: Ways,
        batches: &[u64],
        is_over: impl Fn(LoadId) -> bool,
    ) -> Choosing {
        let way = self.mounts.get(&mount).map_or(ways.expected, |known| known.way);
        if !ways.allows(way) {
            // This load must not use the known fastest way, and a measurement without that way
            // must not replace it.
            return Choosing::fixed(ways.expected);
        }
        if batches.iter().sum::<u64>() < MEASURED_BYTES_MIN || self.trying.is_some_and(|other| !is_over(other)) {
            return Choosing::fixed(way);
        }
        if let Some(known) = self.mounts.get_mut(&mount) {
            known.loads += 1;
            if !known.is_due() {
                return Choosing::fixed(way);
            }
        }
        self.trying = Some(load);
        Choosing::measured(Ways { expected: way, ..ways }, self.pages, batches)
    }

    /// Records the measurement of a load.
    pub(crate) fn record(&mut self, load: LoadId, mount: u64, measured: &Measured) {
        if self.trying == Some(load) {
            self.trying = None;
        }
        let known = self.mounts.entry(mount).or_insert(KnownWay { way: measured.chosen, loads: 0 });
        known.way = measured.chosen;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: u64 = 16 << 20;
    const MOUNT: u64 = 7;

    /// Simulates a load of 1 GiB that prepares up to `ahead` batches before they are full, with
    /// direct and staged reads at these speeds in MiB/s. Returns its measurement, and how many
    /// batches were read in each way.
    fn load(choices: &mut Choices, number: u64, direct: u64, staged: u64, ahead: usize) -> (Option<Measured>, [usize; 2]) {
        let ways = local(choices);
        let (measured, [direct, staged, buffered]) = load_by(choices, number, ways, [direct, staged, 1], ahead);
        assert_eq!(buffered, 0);
        (measured, [direct, staged])
    }

    fn begin(choices: &mut Choices, load: LoadId, mount: u64, batches: &[u64], is_over: impl Fn(LoadId) -> bool) -> Choosing {
        let ways = local(choices);
        choices.begin(load, mount, ways, batches, is_over)
    }

    fn local(choices: &Choices) -> Ways {
        choices.ways(false, false)
    }

    /// Like `load`, but with three ways at these speeds: direct, staged, and through the page
    /// cache.
    fn load_by(
        choices: &mut Choices,
        number: u64,
        ways: Ways,
        [direct, staged, buffered]: [u64; 3],
        ahead: usize,
    ) -> (Option<Measured>, [usize; 3]) {
        let batches = vec![BATCH; 64];
        let mut choosing = choices.begin(LoadId(number), MOUNT, ways, &batches, |_| true);
        let mut ways = Vec::new();
        let (mut now, mut measured) = (Duration::ZERO, None);
        for full in 0..64 {
            while ways.len() < 64.min(full + ahead) {
                ways.push(choosing.way(ways.len()));
                choosing.record_queued(ways.len() - 1, now);
            }
            let speed = match ways[full] {
                Way::Direct => direct,
                Way::Staged => staged,
                Way::Buffered => buffered,
            };
            now += Duration::from_secs(1) * 16 / u32::try_from(speed).unwrap();
            if let Some(seen) = choosing.record_full(full, BATCH, now) {
                assert_eq!(measured, None, "a measurement should be reported only once");
                choices.record(LoadId(number), MOUNT, &seen);
                measured = Some(seen);
            }
        }
        let count = |way| ways.iter().filter(|&&other| other == way).count();
        (measured, [count(Way::Direct), count(Way::Staged), count(Way::Buffered)])
    }

    #[test]
    fn fastest_of_three_ways_is_found() {
        for pages in [Pages::Auto, Pages::Small] {
            for (speeds, fastest) in [([300, 200, 100], 0), ([200, 300, 100], 1), ([100, 200, 900], 2), ([100, 30, 900], 2)] {
                let mut choices = Choices::new(pages);
                let ways = choices.ways(true, true);
                assert_eq!(ways.expected, Way::Direct, "{pages:?}");
                let (measured, batches) = load_by(&mut choices, 1, ways, speeds, 4);
                let measured = measured.expect("a load of 1 GiB should be measured");
                let way = [Way::Direct, Way::Staged, Way::Buffered][fastest];
                assert_eq!(measured.chosen, way, "{measured:?}");
                let rates = [Some(measured.direct_bytes_per_second), Some(measured.staged_bytes_per_second)];
                for (rate, speed) in rates.into_iter().chain([measured.buffered_bytes_per_second]).zip(speeds) {
                    let expected = f64::from(u32::try_from(speed).unwrap()) * 1_048_576.0;
                    assert!((rate.unwrap() / expected - 1.0).abs() < 0.01, "{measured:?}");
                }
                assert!(batches[fastest] >= 64 - 2 * 6 - 4, "{batches:?}");
                // The fourth load uses the known way without measuring.
                (2..4).for_each(|number| _ = load_by(&mut choices, number, ways, speeds, 4));
                let (measured, batches) = load_by(&mut choices, 4, ways, speeds, 4);
                assert_eq!((measured, batches[fastest]), (None, 64));
            }
        }
    }

    #[test]
    fn load_that_must_not_be_buffered_leaves_the_known_way() {
        let mut choices = Choices::new(Pages::Auto);
        let (may, strict) = (choices.ways(true, true), choices.ways(true, false));
        assert_eq!(load_by(&mut choices, 1, may, [100, 200, 900], 4).0.unwrap().chosen, Way::Buffered);
        for number in 2..10 {
            assert_eq!(load_by(&mut choices, number, strict, [100, 200, 900], 4), (None, [64, 0, 0]));
        }
        assert_eq!(load_by(&mut choices, 10, may, [100, 200, 900], 4).0.unwrap().chosen, Way::Buffered);
    }

    #[test]
    fn faster_way_is_found_and_used_for_the_rest() {
        for pages in [Pages::Auto, Pages::Small] {
            for ahead in [1, 6, 20] {
                let (measured, [direct, staged]) = load(&mut Choices::new(pages), 1, 1900, 2600, ahead);
                let measured = measured.expect("a load of 1 GiB should be measured");
                assert_eq!(measured.chosen, Way::Staged);
                assert!((measured.staged_bytes_per_second / (2600.0 * 1048576.0) - 1.0).abs() < 0.01, "{measured:?}");
                assert!((measured.direct_bytes_per_second / (1900.0 * 1048576.0) - 1.0).abs() < 0.01, "{measured:?}");
                assert!(direct <= 6 && direct + staged == 64, "{direct} batches were read in the slower way");
                let (measured, [direct, staged]) = load(&mut Choices::new(pages), 1, 2600, 1900, ahead);
                assert_eq!(measured.unwrap().chosen, Way::Direct);
                assert!(direct + staged == 64 && staged <= 6 + ahead, "{staged} batches were read in the slower way");
            }
        }
    }

    #[test]
    fn way_that_is_about_as_fast_is_not_preferred() {
        assert_eq!(load(&mut Choices::new(Pages::Auto), 1, 2000, 2040, 6).0.unwrap().chosen, Way::Direct);
        assert_eq!(load(&mut Choices::new(Pages::Small), 1, 2040, 2000, 6).0.unwrap().chosen, Way::Staged);
    }

    #[test]
    fn measurements_are_remembered_and_repeated_periodically() {
        let mut choices = Choices::new(Pages::Auto);
        assert_eq!(load(&mut choices, 0, 1900, 2600, 6).0.unwrap().chosen, Way::Staged);
        let measured: Vec<_> = (1..=100).filter(|&number| load(&mut choices, number, 1900, 2600, 6).0.is_some()).collect();
        assert_eq!(measured, [1, 2, 4, 8, 16, 32, 64, 96]);
        // All other loads use the known way from the start.
        assert_eq!(load(&mut choices, 101, 1900, 2600, 6), (None, [0, 64]));
        // From now on, direct reads are faster.
        let becomes = (102..140).find(|&number| load(&mut choices, number, 2600, 1900, 6).1 == [64, 0]);
        assert_eq!(becomes, Some(129), "the next measurement should notice the change");
    }

    #[test]
    fn loads_that_do_not_measure_take_the_known_or_expected_way() {
        let mut choices = Choices::new(Pages::Small);
        let small = begin(&mut choices, LoadId(1), MOUNT, &[BATCH; 8], |_| true);
        assert_eq!((small.way(0), small.trial.is_none()), (Way::Staged, true));
        let large = vec![BATCH; 64];
        assert!(begin(&mut choices, LoadId(2), MOUNT, &large, |_| true).trial.is_some());
        assert!(begin(&mut choices, LoadId(3), MOUNT, &large, |_| false).trial.is_none(), "load 2 is being measured");
        assert!(begin(&mut choices, LoadId(4), MOUNT, &large, |_| true).trial.is_some(), "load 2 has ended");
    }

    /// A load continues long after it was measured, and other measurements must not wait until it
    /// ends.
    #[test]
    fn trial_ends_when_all_ways_are_measured() {
        let mut choices = Choices::new(Pages::Auto);
        let measured = load(&mut choices, 1, 1900, 2600, 6).0.expect("a load of 1 GiB should be measured");
        let large = vec![BATCH; 64];
        let other_mount = begin(&mut choices, LoadId(2), MOUNT + 1, &large, |_| false);
        assert!(other_mount.trial.is_some(), "load 1 continues, but its trial has ended");
        // The measurement of another load does not end this load's trial.
        choices.record(LoadId(1), MOUNT, &measured);
        assert!(begin(&mut choices, LoadId(3), MOUNT, &large, |_| false).trial.is_none());
    }

    #[test]
    fn bytes_from_the_page_cache_are_not_measured() {
        let mut choices = Choices::new(Pages::Auto);
        let batches = vec![BATCH; 64];
        let mut choosing = begin(&mut choices, LoadId(1), MOUNT, &batches, |_| true);
        choosing.stop_measuring();
        for batch in 0..64 {
            assert_eq!(choosing.record_full(batch, BATCH, Duration::from_millis(batch as u64)), None);
            assert_eq!(choosing.way(batch), Way::Direct);
        }
        // Nothing was learned, so the next load is measured.
        assert!(load(&mut choices, 2, 1900, 2600, 6).0.is_some());
        // A later load that can't be measured uses the way that was chosen.
        choosing = begin(&mut choices, LoadId(3), MOUNT, &batches, |_| true);
        choosing.stop_measuring();
        assert_eq!(choosing.way(0), Way::Staged);
    }

    /// Batches may be filled in any order, and some may never be filled.
    #[test]
    fn unfinished_phase_decides_nothing() {
        let mut choices = Choices::new(Pages::Auto);
        let batches = vec![BATCH; 64];
        let mut choosing = begin(&mut choices, LoadId(1), MOUNT, &batches, |_| true);
        (0..64).for_each(|batch| choosing.record_queued(batch, Duration::ZERO));
        for batch in (1..64).rev() {
            assert_eq!(choosing.record_full(batch, BATCH, Duration::from_millis(64 - batch as u64)), None);
        }
        assert_eq!(choosing.way(63), Way::Staged);
        // The staged batches were filled first, even though storage was reading both kinds.
        let measured = choosing.record_full(0, BATCH, Duration::from_millis(100)).unwrap();
        assert_eq!(measured.chosen, Way::Staged);
        assert!(measured.staged_bytes_per_second > 1.5 * measured.direct_bytes_per_second, "{measured:?}");
    }

    /// The rest of a half-full phase may be nearly full as well, so the time at which the phase
    /// ends says nothing about the rate.
    #[test]
    fn half_full_phase_is_timed_as_a_whole() {
        let mut choices = Choices::new(Pages::Small);
        let mut choosing = begin(&mut choices, LoadId(1), MOUNT, &[BATCH; 64], |_| true);
        (0..4).for_each(|batch| choosing.record_queued(batch, Duration::ZERO));
        // Batches 0 and 1 are read directly; batches 2 and 3 are staged.
        for (batch, full_ms) in [(2, 100), (0, 200), (1, 200)] {
            assert_eq!(choosing.record_full(batch, BATCH, Duration::from_millis(full_ms)), None);
        }
        let measured = choosing.record_full(3, BATCH, Duration::from_millis(201)).unwrap();
        assert!(measured.staged_bytes_per_second < measured.direct_bytes_per_second * 1.1, "{measured:?}");
    }
}
