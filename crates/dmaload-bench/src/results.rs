//! The results of measurements, and the figures that are derived from them.

use std::collections::BTreeSet;

use crate::curves::Curves;
use crate::mode::Mode;
use crate::stats::{Spread, median};

/// One measured run of one mode.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Run {
    /// Time from just before files are opened or memory is allocated, whichever comes first, until
    /// the last byte is in memory.
    pub(crate) seconds: f64,
    /// User and system CPU time of the process in that period.
    pub(crate) cpu_seconds: f64,
    /// The page size used for most of the loaded memory, in bytes.
    pub(crate) page_bytes: u64,
    /// Time until the first segment was usable.
    pub(crate) first_segment_seconds: Option<f64>,
    /// Peak resident memory minus the size of the files.
    pub(crate) peak_extra_bytes: Option<u64>,
    /// Separate times for allocating and reading, if the mode reads only after it has allocated.
    pub(crate) apart: Option<Apart>,
    /// The engine's progress over time, if a chart was requested.
    pub(crate) curves: Option<Curves>,
    /// Remarks, such as the engine's route.
    pub(crate) notes: Vec<String>,
    /// For [`Mode::Limit`]: the results for each destination. [`Results::choose_limit`] copies
    /// `seconds` and `cpu_seconds` from the chosen one.
    pub(crate) destinations: Vec<ReadInto>,
}

/// The result of reading the files once into reused buffers.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct ReadInto {
    /// The total size of the buffers.
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: f64,
}

/// The times for allocating and for reading, in a load that allocates everything before it reads.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Apart {
    pub(crate) allocate_seconds: f64,
    pub(crate) read_seconds: f64,
}

/// Why a run failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The reason, as a message.
    pub(crate) reason: String,
    /// Whether wrong bytes were loaded, which is never acceptable.
    pub(crate) wrong_bytes: bool,
}

/// A mode and its runs, one for each round.
#[derive(Debug, Clone)]
pub(crate) struct ModeRuns {
    pub(crate) mode: Mode,
    pub(crate) runs: Vec<Result<Run, Failure>>,
}

impl ModeRuns {
    pub(crate) fn successes(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter_map(|run| run.as_ref().ok())
    }

    pub(crate) fn failures(&self) -> impl Iterator<Item = (usize, &Failure)> {
        let numbered = self.runs.iter().zip(1..);
        numbered.filter_map(|(run, round)| run.as_ref().err().map(|failure| (round, failure)))
    }

    pub(crate) fn seconds(&self) -> Option<Spread> {
        Spread::from_values(self.successes().map(|run| run.seconds))
    }

    /// Returns the successful run with the median time.
    pub(crate) fn median_run(&self) -> Option<&Run> {
        let mut runs: Vec<_> = self.successes().collect();
        runs.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        runs.get(runs.len() / 2).copied()
    }

    /// Returns the smallest and the largest page size among the runs.
    pub(crate) fn page_bytes(&self) -> Option<(u64, u64)> {
        let sizes = || self.successes().map(|run| run.page_bytes);
        Some((sizes().min()?, sizes().max()?))
    }

    pub(crate) fn first_segment_share(&self) -> Option<f64> {
        median(self.successes().filter_map(|run| Some(run.first_segment_seconds? / run.seconds)))
    }

    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the values are whole bytes")]
    pub(crate) fn peak_extra_bytes(&self) -> Option<u64> {
        median(self.successes().filter_map(|run| Some(run.peak_extra_bytes? as f64))).map(|bytes| bytes.round() as u64)
    }

    /// Returns the notes of all runs, without duplicates.
    pub(crate) fn notes(&self) -> Vec<&str> {
        let mut notes: Vec<&str> = Vec::new();
        for note in self.successes().flat_map(|run| &run.notes) {
            if !notes.contains(&note.as_str()) {
                notes.push(note);
            }
        }
        notes
    }
}

/// The results of a bench.
#[derive(Debug, Clone)]
pub struct Results {
    pub(crate) rounds: u32,
    /// The total size of the files.
    pub(crate) file_bytes: u64,
    /// A description of the pressure.
    pub(crate) pressure: Option<String>,
    /// The user that all modes except `limit` ran as, if different from the user who started the
    /// command.
    pub(crate) user: Option<u32>,
    /// Whether the files were in the page cache before each run.
    pub(crate) warm: bool,
    /// The readahead of the first file's disk, which affects every mode that reads through the
    /// page cache.
    pub(crate) read_ahead_kib: Option<u64>,
    /// The modes, in display order.
    pub(crate) modes: Vec<ModeRuns>,
    /// The destinations with their median times, as (bytes, seconds), fastest first.
    pub(crate) destinations: Vec<(u64, f64)>,
}

impl Results {
    /// Chooses the destination with the best median as the limit, and uses its times in every
    /// round.
    ///
    /// Choosing a destination separately in each round would always pick the luckiest of several
    /// noisy measurements, and overstate the device's speed.
    pub(crate) fn choose_limit(&mut self) {
        let Some(limit) = self.modes.iter_mut().find(|runs| runs.mode == Mode::Limit) else { return };
        let reads = || limit.successes().flat_map(|run| &run.destinations);
        let sizes: BTreeSet<u64> = reads().map(|read| read.bytes).collect();
        let seconds = |bytes| median(reads().filter(|read| read.bytes == bytes).map(|read| read.seconds));
        let mut medians: Vec<_> = sizes.into_iter().filter_map(|bytes| Some((bytes, seconds(bytes)?))).collect();
        medians.sort_by(|(_, a), (_, b)| a.total_cmp(b));
        let Some(&(best, _)) = medians.first() else { return };
        for run in limit.runs.iter_mut().flatten() {
            let read = run.destinations.iter().find(|read| read.bytes == best);
            let read = read.expect("a successful run of `limit` must have read into every destination");
            (run.seconds, run.cpu_seconds) = (read.seconds, read.cpu_seconds);
        }
        self.destinations = medians;
    }

    /// Returns the runs of this mode, if it was measured.
    pub(crate) fn runs_of(&self, mode: Mode) -> Option<&ModeRuns> {
        self.modes.iter().find(|runs| runs.mode == mode)
    }

    /// Divides the time of `reference` by that of `mode`, round by round. A ratio above 1 means
    /// that `mode` is faster.
    pub(crate) fn ratio(&self, reference: Mode, mode: Mode) -> Option<Spread> {
        let (reference, mode) = (self.runs_of(reference)?, self.runs_of(mode)?);
        let pairs = reference.runs.iter().zip(&mode.runs);
        Spread::from_values(pairs.filter_map(|pair| match pair {
            (Ok(reference), Ok(mode)) => Some(reference.seconds / mode.seconds),
            _ => None,
        }))
    }

    /// Computes how well a mode overlaps allocating and reading. In each round, the longer of the
    /// two times that `no-overlap` takes, for allocating and for reading, is divided by the mode's
    /// time.
    pub(crate) fn overlap(&self, mode: Mode) -> Option<Spread> {
        let (apart, mode) = (self.runs_of(Mode::NoOverlap)?, self.runs_of(mode)?);
        let pairs = apart.runs.iter().zip(&mode.runs);
        Spread::from_values(pairs.filter_map(|pair| match pair {
            (Ok(Run { apart: Some(apart), .. }), Ok(mode)) => Some(apart.allocate_seconds.max(apart.read_seconds) / mode.seconds),
            _ => None,
        }))
    }

    pub(crate) fn cpu_seconds_per_gib(&self, mode: Mode) -> Option<f64> {
        let gib = self.file_bytes as f64 / f64::from(1 << 30);
        median(self.runs_of(mode)?.successes().map(|run| run.cpu_seconds / gib))
    }

    pub(crate) fn limit_bytes_per_second(&self) -> Option<f64> {
        Some(self.file_bytes as f64 / self.runs_of(Mode::Limit)?.seconds()?.median)
    }

    /// Returns the page size of the first of the modes `direct_io`, `direct_io_check`,
    /// `pread-direct`, `no-overlap` and `normal` that has results. If the page size varied between
    /// runs, returns the smallest.
    pub(crate) fn page_size_bytes(&self) -> Option<u64> {
        let modes = [Mode::DirectIo, Mode::DirectIoCheck, Mode::PreadDirect, Mode::NoOverlap, Mode::Normal];
        modes.into_iter().find_map(|mode| self.runs_of(mode)?.page_bytes()).map(|(smallest, _)| smallest)
    }

    /// Returns whether the bench has failed. It has failed if wrong bytes were loaded, or if any
    /// run failed without memory pressure.
    #[must_use]
    pub fn failed(&self) -> bool {
        let mut failures = self.modes.iter().flat_map(ModeRuns::failures);
        failures.any(|(_, failure)| failure.wrong_bytes || self.pressure.is_none())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn run(seconds: f64) -> Result<Run, Failure> {
        Ok(Run { seconds, cpu_seconds: seconds / 2.0, page_bytes: 4096, ..Run::default() })
    }

    pub(crate) fn killed() -> Result<Run, Failure> {
        Err(Failure { reason: "killed".to_owned(), wrong_bytes: false })
    }

    pub(crate) fn results(modes: Vec<(Mode, Vec<Result<Run, Failure>>)>) -> Results {
        let rounds = modes.first().map_or(0, |(_, runs)| u32::try_from(runs.len()).unwrap());
        let modes = modes.into_iter().map(|(mode, runs)| ModeRuns { mode, runs }).collect();
        Results {
            rounds,
            file_bytes: 1 << 29,
            pressure: None,
            user: None,
            warm: false,
            read_ahead_kib: Some(8192),
            modes,
            destinations: Vec::new(),
        }
    }

    #[test]
    fn ratios_are_paired_within_a_round() {
        // The machine was half as fast in the second round, so the ratio of the medians is not the
        // ratio of any round.
        let measured = results(vec![
            (Mode::Normal, vec![run(2.0), run(4.0), run(8.0)]),
            (Mode::DirectIo, vec![run(1.0), run(2.0), run(1.0)]),
        ]);
        assert_eq!(measured.ratio(Mode::Normal, Mode::DirectIo), Some(Spread { median: 2.0, min: 2.0, max: 8.0 }));
        assert_eq!(measured.ratio(Mode::Limit, Mode::DirectIo), None);
        assert_eq!(measured.cpu_seconds_per_gib(Mode::DirectIo), Some(1.0));
    }

    #[test]
    fn round_in_which_a_mode_failed_forms_no_pair() {
        let mut measured = results(vec![(Mode::Normal, vec![killed(), run(4.0)]), (Mode::DirectIo, vec![run(1.0), run(2.0)])]);
        assert_eq!(measured.ratio(Mode::Normal, Mode::DirectIo), Some(Spread { median: 2.0, min: 2.0, max: 2.0 }));
        assert!(measured.failed());
        measured.pressure = Some("hog:1GiB".to_owned());
        assert!(!measured.failed(), "a failure under memory pressure must not fail the bench");
        let wrong = Failure { reason: "byte 3".to_owned(), wrong_bytes: true };
        measured.modes[1].runs[0] = Err(wrong);
        assert!(measured.failed());
        assert_eq!(measured.modes[1].failures().next().map(|(round, _)| round), Some(1));
    }

    #[test]
    fn overlap_is_the_longer_part_divided_by_the_whole() {
        let apart = |allocate_seconds, read_seconds| {
            run(allocate_seconds + read_seconds).map(|run| Run { apart: Some(Apart { allocate_seconds, read_seconds }), ..run })
        };
        let measured =
            results(vec![(Mode::NoOverlap, vec![apart(1.0, 3.0), apart(2.0, 1.0)]), (Mode::DirectIo, vec![run(4.0), run(2.0)])]);
        assert_eq!(measured.overlap(Mode::DirectIo), Some(Spread { median: 0.875, min: 0.75, max: 1.0 }));
    }

    #[test]
    fn limit_is_the_destination_with_the_best_median() {
        let round = |reads: [(u64, f64); 3]| {
            let destinations = reads.map(|(bytes, seconds)| ReadInto { bytes, seconds, cpu_seconds: seconds / 4.0 });
            Ok(Run { destinations: destinations.to_vec(), ..Run::default() })
        };
        // The 4-byte destination wins one round by luck; the 8-byte one has the best median.
        let limit = vec![
            round([(4, 0.1), (8, 0.3), (64, 0.5)]),
            round([(4, 0.4), (8, 0.3), (64, 0.5)]),
            killed(),
            round([(4, 0.4), (8, 0.2), (64, 0.5)]),
        ];
        let engine = vec![run(0.6), run(0.6), run(0.6), run(0.4)];
        let mut measured = results(vec![(Mode::DirectIo, engine), (Mode::Limit, limit)]);
        measured.choose_limit();
        assert_eq!(measured.destinations.iter().map(|&(bytes, _)| bytes).collect::<Vec<_>>(), [8, 4, 64]);
        let share = measured.ratio(Mode::Limit, Mode::DirectIo);
        assert_eq!(share, Some(Spread { median: 0.5, min: 0.5, max: 0.5 }));
        assert_eq!(measured.cpu_seconds_per_gib(Mode::Limit), Some(0.15));
    }

    #[test]
    fn page_sizes_that_vary_between_runs_are_reported() {
        let huge = run(1.0).map(|run| Run { page_bytes: 2 << 20, ..run });
        let measured = results(vec![(Mode::Normal, vec![run(1.0)]), (Mode::DirectIo, vec![huge, run(1.0)])]);
        assert_eq!(measured.page_size_bytes(), Some(4096));
        assert_eq!(measured.runs_of(Mode::DirectIo).unwrap().page_bytes(), Some((4096, 2 << 20)));
    }
}
