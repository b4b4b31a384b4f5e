//! Compares ways of loading files: the machinery behind `dmaload bench`.
//!
//! ```text
//! for each round, for each mode, starting with a different mode each time:
//!   a new process ── prepares ──► file made cold ──► memory warmed ──► go ──► one line of JSON
//! ```
//!
//! What one mode leaves behind (page cache, fragmentation, peak memory) must not affect another
//! mode. Each run is therefore a new process. Before each run, the file is verified to be cold or,
//! if [`Settings::warm`] is set, to be cached.
//!
//! The modes take turns in each round, so other load on the machine affects all of them alike.
//! Ratios are computed within each round, and their medians are reported.
//!
//! The child processes run the same program as the [`Bench`]. They are started through
//! `/proc/self/exe` (unless [`run_children_by`] sets another command) with `bench-child` as the
//! first argument. The program must then call [`child::Load::run`],
//! [`child::fill_cache_on_request`] or [`child::hog`]. The program also implements [`Engine`],
//! which creates the loaders to measure.
//!
//! The other public modules are useful for any measurement: [`synth`] generates models in which
//! every byte is known, [`scratch`] keeps files on a disk and removes them on a signal, [`cold`]
//! evicts files from the page cache, [`baseline`] loads files as a simple program would, and
//! [`usage`] reports the resources that this process has used.
//!
//! Requires `/proc`; cgroups require root.

mod cgroup;
mod compare;
mod curves;
mod engine;
mod host;
mod json;
mod leftovers;
mod limit;
mod mapping;
mod memory;
mod mode;
mod noise;
mod panel;
mod plot;
mod pressure;
mod results;
mod stats;
mod svg;
mod sys;
mod table;
mod ways;
mod worker;

pub mod baseline;
pub mod child;
pub mod cold;
pub mod scratch;
pub mod synth;
pub mod usage;

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use dmabuf::printable;
use dmaload_text::ForPath;
use serde_json::Value;

pub use compare::first_difference;
pub use engine::Engine;
pub use mode::{Mode, Peer};
pub use noise::fill_with_noise;
pub use pressure::{Cache, Pressure};
pub use results::Results;
pub use worker::run_children_by;

use pressure::Applied;
use results::{Failure, ModeRuns, Run};
use worker::Worker;

/// What to measure, and how.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The files to load. Several files form one load, except in the `at-once` mode.
    pub paths: Vec<PathBuf>,
    /// The file created for the bench, if any, which is one of `paths`. Child processes receive it
    /// as `--scratch`.
    pub scratch: Option<PathBuf>,
    /// The folder for temporary files. By default, the first suitable folder on a disk is used.
    pub folder: Option<PathBuf>,
    /// The modes, in the order of the output: see [`Mode::chosen`].
    pub modes: Vec<Mode>,
    /// Number of runs of each mode; medians are reported.
    pub rounds: u32,
    /// The memory pressure to apply, if any.
    pub pressure: Option<Pressure>,
    /// Whether the files are read into the page cache before each run. Otherwise, they are evicted
    /// from it.
    pub warm: bool,
    /// The user that all modes except `limit` run as. Setting it requires root.
    pub user: Option<u32>,
    /// The arguments that these settings were parsed from, which are passed to child processes.
    pub arguments: Vec<OsString>,
}

impl Results {
    /// Formats the results as a table for a terminal, with conclusions and remarks.
    #[must_use]
    pub fn to_text(&self) -> String {
        table::plain(self)
    }

    /// Formats the results as Markdown.
    #[must_use]
    pub fn to_markdown(&self) -> String {
        table::markdown(self)
    }

    /// Returns the results as one JSON object: see docs/cli.md.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json::to_json(self)
    }

    /// Draws the results as an SVG chart.
    #[must_use]
    pub fn to_svg(&self) -> String {
        plot::svg(self)
    }
}

/// A comparison that is ready to run.
#[derive(Debug)]
pub struct Bench {
    settings: Settings,
    file_bytes: u64,
    pressure: Applied,
}

impl Bench {
    /// Checks the files and applies the memory pressure. From then on, an interrupt kills the
    /// bench's processes and removes its files and cgroups.
    ///
    /// # Errors
    /// If a path can't be inspected or is not a regular file, if all files are empty, or if the
    /// pressure can't be applied.
    pub fn set_up(settings: Settings) -> Result<Self> {
        leftovers::remove_on_interrupt();
        let paths = &settings.paths;
        let mut file_bytes = 0;
        for path in paths {
            let about = fs::metadata(path).for_path("stat", path)?;
            if !about.is_file() {
                bail!("{} is not a file", printable::path(&path));
            }
            file_bytes += about.len();
        }
        if file_bytes == 0 {
            bail!(
                "{}: there is nothing to load, because every file is empty",
                paths.first().map(|path| printable::path(&path).to_string()).unwrap_or_default()
            );
        }
        let pressure = Applied::new(settings.pressure, settings.folder.as_deref())?;
        Ok(Bench { settings, file_bytes, pressure })
    }

    /// Runs every mode in every round. `report` receives a line of text after each run.
    ///
    /// # Errors
    /// If the bench can't continue. A failed run is not an error, but part of the results.
    pub fn measure(&self, mut report: impl FnMut(&str)) -> Result<Results> {
        let Settings { modes, rounds, .. } = &self.settings;
        let rounds = *rounds;
        let mut measured: Vec<ModeRuns> = modes.iter().map(|&mode| ModeRuns { mode, runs: Vec::new() }).collect();
        for round in 0..rounds {
            for mode in Mode::rotated(modes, round as usize) {
                let run = self.run_once(mode)?;
                report(&format!("round {}/{rounds}  {mode:15}  {}", round + 1, describe_outcome(mode, &run)));
                if let Some(runs) = measured.iter_mut().find(|runs| runs.mode == mode) {
                    runs.runs.push(run);
                }
            }
        }
        let mut results = Results {
            rounds,
            file_bytes: self.file_bytes,
            pressure: self.settings.pressure.map(|pressure| pressure.to_string()),
            user: self.settings.user,
            warm: self.settings.warm,
            read_ahead_kib: self.settings.paths.first().and_then(|path| host::read_ahead_kib(path)),
            modes: measured,
            destinations: Vec::new(),
        };
        results.choose_limit();
        Ok(results)
    }

    /// Runs one mode once. If the child process fails, the failure is returned as the result of
    /// the run. Any other error ends the bench.
    fn run_once(&self, mode: Mode) -> Result<Result<Run, Failure>> {
        let group = self.pressure.create_group()?;
        let mut worker = self.start(mode)?;
        if let Some(group) = &group {
            group.add(worker.id())?;
        }
        let died = |error: anyhow::Error| Failure { reason: error.to_string(), wrong_bytes: false };
        worker.send_line(child::PREPARE);
        match worker.receive_line() {
            Ok(line) => match child::parse_line(&line) {
                Some(Err(failure)) => return Ok(Err(failure)),
                Some(Ok(_)) => bail!("a run reported a result before it began"),
                // The child is ready.
                None => {}
            },
            Err(error) => return Ok(Err(died(error))),
        }
        if let Some(group) = &group {
            self.pressure.fill_page_cache(group)?;
        }
        for path in &self.settings.paths {
            if self.settings.warm {
                cold::make_warm(path)?;
            } else {
                cold::make_cold(path)?;
            }
        }
        host::warm(self.file_bytes, self.pressure.is_on()).context("cannot warm the machine's memory")?;
        worker.send_line(child::GO);
        let run = match worker.receive_line() {
            Ok(line) => child::parse_line(&line).with_context(|| format!("unexpected output of a run: {line:?}"))?,
            Err(error) => Err(died(error)),
        };
        // The kernel removes a group only after the group's process has exited.
        drop(worker);
        drop(group);
        self.pressure.settle()?;
        Ok(run)
    }

    fn start(&self, mode: Mode) -> Result<Worker> {
        let mut command = if let Mode::Peer(peer) = mode {
            worker::peer_command(&peer.command, &self.settings.paths)
        } else {
            let mut command = worker::command();
            command.args(["load", "--mode", mode.name()]);
            if let Some(file) = &self.settings.scratch {
                command.arg("--scratch").arg(file);
            }
            command.args(&self.settings.arguments);
            command
        };
        if let Some(user) = self.settings.user.filter(|_| mode != Mode::Limit) {
            command.uid(user).gid(user);
        }
        Worker::start(&mut command)
    }
}

/// Formats a run's time (for `limit`, a time for each destination) or its failure.
fn describe_outcome(mode: Mode, run: &Result<Run, Failure>) -> String {
    match run {
        Ok(run) if mode == Mode::Limit => {
            let all = run.destinations.iter().map(|read| format!("{:.3} s", read.seconds));
            all.collect::<Vec<_>>().join(", ")
        }
        Ok(run) => format!("{:.3} s", run.seconds),
        Err(failure) => format!("failed: {}", failure.reason),
    }
}
