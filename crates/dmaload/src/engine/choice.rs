//! Direct or staged: which way is faster here, found out by trying both on parts of a load.
//!
//! Where storage is a virtual disk, its host copies into the memory that is read into, and staging that
//! stays in the processor's cache is faster by a third. A real drive writes to cold memory as fast as to
//! any, and direct reads spare the copy. Nothing tells the two apart but measuring.
//!
//! Pure: no clock, no syscall.

use std::collections::HashMap;
use std::time::Duration;

use dmabuf::Pages;

use crate::support::id::LoadId;
use crate::telemetry::report::{Measured, Way};

/// A load with less than this is not measured: what is learned must be worth what it costs.
pub(crate) const LEAST_BYTES: u64 = 512 << 20;
/// What each way is tried on. On small pages direct reads wait for memory, and are rarely the faster
/// ones: less of the load is risked for them.
const PHASE_BYTES: u64 = 96 << 20;
const SMALL_PAGES_PHASE_BYTES: u64 = 48 << 20;
/// By so much the way that was not expected to be faster has to be.
const MARGIN: f64 = 1.03;
/// Loads that were measured look again at the first, second, fourth … load, and then after so many.
const LOOK_AGAIN: u64 = 32;

/// The bytes of a load, cut into batches that go one way or the other until it is known which is faster.
#[derive(Debug)]
pub(crate) struct Trial {
    phase_bytes: u64,
    expected: Way,
    direct: Phase,
    staged: Phase,
}

/// When the batches of one way were full.
#[derive(Debug, Default)]
struct Phase {
    /// What they have, and how much of that is full.
    bytes: u64,
    full_bytes: u64,
    /// When its first batch was handed over to be read.
    handed: Option<Duration>,
    /// When storage had nothing else to do any more, and how much was full then.
    alone: Option<(Duration, u64)>,
    ended: Option<Duration>,
}

impl Phase {
    /// `bytes` more are full.
    fn full(&mut self, bytes: u64, now: Duration) {
        self.full_bytes += bytes;
        if self.full_bytes == self.bytes {
            self.ended = Some(now);
        }
    }

    /// Known once all of it is full.
    fn rate(&self) -> Option<f64> {
        // Where most of it was full before it was alone, the time beside the other way counts, too: it was
        // at least as fast as that.
        let alone = self.alone.filter(|&(_, before)| before <= self.bytes / 2);
        let (begun, before) = alone.or(self.handed.map(|handed| (handed, 0)))?;
        let took = self.ended?.saturating_sub(begun).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let rate = (self.bytes - before) as f64 / took.max(1e-6);
        Some(rate)
    }
}

impl Trial {
    fn new(expected: Way, pages: Pages) -> Self {
        let phase_bytes = if pages == Pages::Small { SMALL_PAGES_PHASE_BYTES } else { PHASE_BYTES };
        Trial { phase_bytes, expected, direct: Phase::default(), staged: Phase::default() }
    }

    /// The way of a batch of `bytes` bytes that begins after `start` bytes of the load, while nothing is
    /// known. Direct comes first: at a load's beginning no memory is ahead of the reads, which would
    /// make it seem faster.
    pub(crate) fn way(&self, start: u64) -> Way {
        if start < self.phase_bytes { Way::Direct } else { Way::Staged }
    }

    /// A batch goes this way, and has so many bytes.
    fn has(&mut self, start: u64, bytes: u64) {
        if start < self.phase_bytes {
            self.direct.bytes += bytes;
        } else if start < 2 * self.phase_bytes {
            self.staged.bytes += bytes;
        }
    }

    /// Bytes of the batch that begins after `start` are full. What was measured, once all of it was.
    ///
    /// Direct reads are timed from the first one on, and staged ones from the last direct one on: many reads
    /// are in flight, and storage finishes them at about the same time, so what comes between the first
    /// full batch and the last says little.
    fn full(&mut self, start: u64, bytes: u64, now: Duration) -> Option<Measured> {
        if start < self.phase_bytes {
            self.direct.full(bytes, now);
            if self.direct.ended.is_some() {
                self.staged.alone.get_or_insert((now, self.staged.full_bytes));
            }
        } else if start < 2 * self.phase_bytes {
            self.staged.full(bytes, now);
        } else {
            return None;
        }
        let (direct, staged) = (self.direct.rate()?, self.staged.rate()?);
        Some(Measured {
            direct_bytes_per_second: direct,
            staged_bytes_per_second: staged,
            chosen: chosen(self.expected, direct, staged),
        })
    }
}

fn chosen(expected: Way, direct: f64, staged: f64) -> Way {
    match expected {
        Way::Direct if staged > direct * MARGIN => Way::Staged,
        Way::Staged if direct > staged * MARGIN => Way::Direct,
        expected => expected,
    }
}

/// How the batches of a load are read.
#[derive(Debug)]
pub(crate) struct Choosing {
    /// Where each batch begins in the bytes of the load.
    starts: Vec<u64>,
    trial: Option<Trial>,
    known: Option<Way>,
    expected: Way,
}

impl Choosing {
    /// By one way from the beginning to the end.
    pub(crate) fn fixed(way: Way) -> Self {
        Choosing { starts: Vec::new(), trial: None, known: Some(way), expected: way }
    }

    /// By both, at first.
    fn measured(expected: Way, pages: Pages, batches: &[u64]) -> Self {
        let mut trial = Trial::new(expected, pages);
        let mut start = 0;
        let starts = batches.iter().map(|&bytes| {
            let own = start;
            trial.has(own, bytes);
            start += bytes;
            own
        });
        Choosing { starts: starts.collect(), trial: Some(trial), known: None, expected }
    }

    /// The way of a batch that is about to be prepared.
    pub(crate) fn way(&self, batch: usize) -> Way {
        match (self.known, &self.trial, self.starts.get(batch)) {
            // What was decided for a batch of the trial stays, so that it is measured.
            (_, Some(trial), Some(&start)) if start < 2 * trial.phase_bytes => trial.way(start),
            (Some(way), ..) => way,
            (None, Some(trial), Some(&start)) => trial.way(start),
            (None, ..) => self.expected,
        }
    }

    /// The pieces of a batch are about to be read.
    pub(crate) fn handed(&mut self, batch: usize, now: Duration) {
        if let (Some(trial), Some(&start)) = (&mut self.trial, self.starts.get(batch)) {
            let phase = if start < trial.phase_bytes { &mut trial.direct } else { &mut trial.staged };
            phase.handed.get_or_insert(now);
        }
    }

    /// What is being measured does not come from storage: the load goes on by what was expected.
    pub(crate) fn give_up(&mut self) {
        if self.known.is_none() {
            (self.known, self.trial) = (Some(self.expected), None);
        }
    }

    /// Bytes of a batch are full. What was measured, when that has just become known.
    pub(crate) fn full(&mut self, batch: usize, bytes: u64, now: Duration) -> Option<Measured> {
        if self.known.is_some() {
            return None;
        }
        let trial = self.trial.as_mut()?;
        let measured = trial.full(*self.starts.get(batch)?, bytes, now)?;
        self.known = Some(measured.chosen);
        Some(measured)
    }
}

/// What a loader has found out, by file system.
#[derive(Debug)]
pub(crate) struct Choices {
    pages: Pages,
    mounts: HashMap<u64, Known>,
    /// The load that tries now: others would disturb it.
    trying: Option<LoadId>,
}

#[derive(Debug)]
struct Known {
    way: Way,
    /// Loads that could have been measured.
    loads: u64,
}

impl Known {
    fn is_due(&self) -> bool {
        self.loads.is_power_of_two() && self.loads < LOOK_AGAIN || self.loads.is_multiple_of(LOOK_AGAIN)
    }
}

impl Choices {
    pub(crate) fn new(pages: Pages) -> Self {
        Choices { pages, mounts: HashMap::new(), trying: None }
    }

    /// What is expected to be faster before anything was measured: on small pages memory is slow to come
    /// by, so nothing should wait for it; on large ones direct reads cost less.
    pub(crate) fn expected(&self) -> Way {
        if self.pages == Pages::Small { Way::Staged } else { Way::Direct }
    }

    /// How a load reads its batches, of so many bytes each. `is_over` says whether a load is,
    /// which is asked of the one that is being measured.
    pub(crate) fn begin(&mut self, load: LoadId, mount: u64, batches: &[u64], is_over: impl Fn(LoadId) -> bool) -> Choosing {
        let expected = self.expected();
        let way = self.mounts.get(&mount).map_or(expected, |known| known.way);
        if batches.iter().sum::<u64>() < LEAST_BYTES || self.trying.is_some_and(|other| !is_over(other)) {
            return Choosing::fixed(way);
        }
        if let Some(known) = self.mounts.get_mut(&mount) {
            known.loads += 1;
            if !known.is_due() {
                return Choosing::fixed(way);
            }
        }
        self.trying = Some(load);
        Choosing::measured(way, self.pages, batches)
    }

    /// A load has measured both ways.
    pub(crate) fn learned(&mut self, load: LoadId, mount: u64, measured: &Measured) {
        if self.trying == Some(load) {
            self.trying = None;
        }
        let known = self.mounts.entry(mount).or_insert(Known { way: measured.chosen, loads: 0 });
        known.way = measured.chosen;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: u64 = 16 << 20;
    const MOUNT: u64 = 7;

    /// A load of 1 GiB whose batches are prepared `ahead` of those that are full, by a device and copiers of
    /// these speeds in MiB/s; what it measured, and how many of its batches went each way.
    fn load(choices: &mut Choices, number: u64, direct: u64, staged: u64, ahead: usize) -> (Option<Measured>, [usize; 2]) {
        let batches = vec![BATCH; 64];
        let mut choosing = choices.begin(LoadId(number), MOUNT, &batches, |_| true);
        let mut ways = Vec::new();
        let (mut now, mut measured) = (Duration::ZERO, None);
        for full in 0..64 {
            while ways.len() < 64.min(full + ahead) {
                ways.push(choosing.way(ways.len()));
                choosing.handed(ways.len() - 1, now);
            }
            let speed = if ways[full] == Way::Direct { direct } else { staged };
            now += Duration::from_secs(1) * 16 / u32::try_from(speed).unwrap();
            if let Some(seen) = choosing.full(full, BATCH, now) {
                assert_eq!(measured, None, "told once");
                choices.learned(LoadId(number), MOUNT, &seen);
                measured = Some(seen);
            }
        }
        let count = |way| ways.iter().filter(|&&other| other == way).count();
        (measured, [count(Way::Direct), count(Way::Staged)])
    }

    #[test]
    fn the_faster_way_is_found_told_and_taken_for_the_rest() {
        for pages in [Pages::Auto, Pages::Small] {
            for ahead in [1, 6, 20] {
                let (measured, [direct, staged]) = load(&mut Choices::new(pages), 1, 1900, 2600, ahead);
                let measured = measured.expect("1 GiB is enough");
                assert_eq!(measured.chosen, Way::Staged);
                assert!((measured.staged_bytes_per_second / (2600.0 * 1048576.0) - 1.0).abs() < 0.01, "{measured:?}");
                assert!((measured.direct_bytes_per_second / (1900.0 * 1048576.0) - 1.0).abs() < 0.01, "{measured:?}");
                assert!(direct <= 6 && direct + staged == 64, "{direct} batches went the slow way");
                let (measured, [direct, staged]) = load(&mut Choices::new(pages), 1, 2600, 1900, ahead);
                assert_eq!(measured.unwrap().chosen, Way::Direct);
                assert!(direct + staged == 64 && staged <= 6 + ahead, "{staged} batches went the slow way");
            }
        }
    }

    #[test]
    fn what_is_about_as_fast_is_not_preferred_to_what_was_expected() {
        assert_eq!(load(&mut Choices::new(Pages::Auto), 1, 2000, 2040, 6).0.unwrap().chosen, Way::Direct);
        assert_eq!(load(&mut Choices::new(Pages::Small), 1, 2040, 2000, 6).0.unwrap().chosen, Way::Staged);
    }

    #[test]
    fn what_was_learned_is_remembered_and_looked_at_again_now_and_then() {
        let mut choices = Choices::new(Pages::Auto);
        assert_eq!(load(&mut choices, 0, 1900, 2600, 6).0.unwrap().chosen, Way::Staged);
        let looked: Vec<_> = (1..=100).filter(|&number| load(&mut choices, number, 1900, 2600, 6).0.is_some()).collect();
        assert_eq!(looked, [1, 2, 4, 8, 16, 32, 64, 96]);
        // All others go the known way from the beginning.
        assert_eq!(load(&mut choices, 101, 1900, 2600, 6), (None, [0, 64]));
        // The machine has changed.
        let becomes = (102..140).find(|&number| load(&mut choices, number, 2600, 1900, 6).1 == [64, 0]);
        assert_eq!(becomes, Some(129), "known to be slower from the next look on");
    }

    #[test]
    fn small_loads_and_those_beside_a_trial_take_what_is_known_or_expected() {
        let mut choices = Choices::new(Pages::Small);
        let small = choices.begin(LoadId(1), MOUNT, &[BATCH; 8], |_| true);
        assert_eq!((small.way(0), small.trial.is_none()), (Way::Staged, true));
        let large = vec![BATCH; 64];
        assert!(choices.begin(LoadId(2), MOUNT, &large, |_| true).trial.is_some());
        assert!(choices.begin(LoadId(3), MOUNT, &large, |_| false).trial.is_none(), "load 2 is being measured");
        assert!(choices.begin(LoadId(4), MOUNT, &large, |_| true).trial.is_some(), "load 2 has failed");
    }

    /// A load goes on long after it was measured, and others are not to wait for its end.
    #[test]
    fn a_trial_is_over_when_both_ways_are_measured() {
        let mut choices = Choices::new(Pages::Auto);
        let measured = load(&mut choices, 1, 1900, 2600, 6).0.expect("1 GiB is enough");
        let large = vec![BATCH; 64];
        let other_mount = choices.begin(LoadId(2), MOUNT + 1, &large, |_| false);
        assert!(other_mount.trial.is_some(), "load 1 goes on, and its trial is over");
        // What another load has learned does not end the trial of this one.
        choices.learned(LoadId(1), MOUNT, &measured);
        assert!(choices.begin(LoadId(3), MOUNT, &large, |_| false).trial.is_none());
    }

    #[test]
    fn what_comes_from_the_page_cache_is_not_measured() {
        let mut choices = Choices::new(Pages::Auto);
        let batches = vec![BATCH; 64];
        let mut choosing = choices.begin(LoadId(1), MOUNT, &batches, |_| true);
        choosing.give_up();
        for batch in 0..64 {
            assert_eq!(choosing.full(batch, BATCH, Duration::from_millis(batch as u64)), None);
            assert_eq!(choosing.way(batch), Way::Direct);
        }
        // Nothing was learned, so the next load is measured.
        assert!(load(&mut choices, 2, 1900, 2600, 6).0.is_some());
        // What was learned already stays.
        choosing = choices.begin(LoadId(3), MOUNT, &batches, |_| true);
        choosing.give_up();
        assert_eq!(choosing.way(0), Way::Staged);
    }

    /// Pieces of a batch may be full in any order, and some of a phase may never be.
    #[test]
    fn a_phase_that_never_ends_decides_nothing() {
        let mut choices = Choices::new(Pages::Auto);
        let batches = vec![BATCH; 64];
        let mut choosing = choices.begin(LoadId(1), MOUNT, &batches, |_| true);
        (0..64).for_each(|batch| choosing.handed(batch, Duration::ZERO));
        for batch in (1..64).rev() {
            assert_eq!(choosing.full(batch, BATCH, Duration::from_millis(64 - batch as u64)), None);
        }
        assert_eq!(choosing.way(63), Way::Staged);
        // The staged ones were full before, although storage had both to read.
        let measured = choosing.full(0, BATCH, Duration::from_millis(100)).unwrap();
        assert_eq!(measured.chosen, Way::Staged);
        assert!(measured.staged_bytes_per_second > 1.5 * measured.direct_bytes_per_second, "{measured:?}");
    }
}
