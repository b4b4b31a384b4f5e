//! `dmaload bench`: ways of loading compared, so that the comparison can be believed.
//!
//! ```text
//!   for each round, for each mode, another one first each time:
//!     a process of its own ── gets ready ──► file made cold ──► memory warmed ──► go ──► one line of JSON
//! ```
//!
//! What one mode leaves behind (page cache, fragments, a peak of memory) is not the next one's: the process is new, the file
//! is checked to be cold, and rounds are interleaved, so that what the machine does meanwhile hits all modes alike.
//! Ratios are taken within a round, then their median.

mod cgroup;
mod child;
mod compare;
mod curves;
mod host;
mod json;
mod leftovers;
mod limit;
mod memory;
mod mode;
mod panel;
mod plot;
mod pressure;
mod results;
mod stats;
mod sys;
mod table;
mod ways;
mod worker;

use std::env;
use std::fs::{self, Permissions};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use dmaload::dmabuf::printable;

use crate::errors::At;
use crate::scratch::ScratchFile;
use crate::synth::Model;
use crate::{args, cold, demo, engine};
pub(crate) use mode::Mode;
use pressure::Arm;
pub(crate) use pressure::Pressure;
use results::{Failure, ModeRuns, Results, Run};
use worker::Worker;

/// Any would do; this one makes the same file every time.
const SEED: u64 = 1;

pub(crate) fn run(arguments: &args::Bench) -> Result<ExitCode> {
    check(arguments)?;
    leftovers::remove_on_interrupt();
    let bench = Bench::set_up(arguments)?;
    let results = bench.measure()?;
    let mut stdout = crate::output::stdout();
    match (arguments.json, arguments.md) {
        (true, _) => writeln!(stdout, "{}", crate::output::json(&json::to_json(&results)))?,
        (_, true) => write!(stdout, "{}", table::markdown(&results))?,
        _ => write!(stdout, "{}", table::plain(&results))?,
    }
    stdout.flush()?;
    if let Some(path) = &arguments.plot {
        fs::write(path, plot::svg(&results)).at("write the picture to", path)?;
    }
    Ok(if results.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The processes that the bench starts.
pub(crate) fn run_child(arguments: args::BenchChild) -> Result<()> {
    match arguments {
        args::BenchChild::Load { mode, scratch, mut bench } => {
            // It is storage that is measured.
            bench.engine.cache.get_or_insert(dmaload::Cache::Bypass);
            child::run(mode, &bench, scratch)
        }
        args::BenchChild::Hog { bytes } => pressure::hog(bytes),
        args::BenchChild::Fill { bytes, path, dirty } => pressure::fill(&path, bytes, dirty),
    }
}

/// Wrong usage is told before the first file is written.
fn check(arguments: &args::Bench) -> Result<()> {
    if arguments.user.is_some() && !rustix::process::geteuid().is_root() {
        return Err(dmaload::Error::Config("--user: only root can run a process as another user".to_owned()).into());
    }
    drop(engine::loader(&arguments.engine)?);
    Ok(())
}

/// All that is there before the first run.
struct Bench<'a> {
    arguments: &'a args::Bench,
    modes: Vec<Mode>,
    scratch: Option<ScratchFile>,
    paths: Vec<PathBuf>,
    file_bytes: u64,
    arm: Arm,
}

impl<'a> Bench<'a> {
    fn set_up(arguments: &'a args::Bench) -> Result<Self> {
        let scratch = arguments.size.map(|size| make_file(arguments, size)).transpose()?;
        let paths = scratch.as_ref().map_or_else(|| arguments.paths.clone(), |file| vec![file.path().to_owned()]);
        let mut file_bytes = 0;
        for path in &paths {
            let about = fs::metadata(path).at("look at", path)?;
            if !about.is_file() {
                bail!("{} is not a file", printable::path(&path));
            }
            file_bytes += about.len();
        }
        if file_bytes == 0 {
            bail!(
                "{}: there is nothing to load",
                paths.first().map(|path| printable::path(&path).to_string()).unwrap_or_default()
            );
        }
        let arm = Arm::new(arguments.pressure, arguments.dir.as_deref())?;
        let modes = Mode::chosen(&arguments.modes).into_iter().chain(arguments.peers.iter().copied()).collect();
        Ok(Bench { arguments, modes, scratch, paths, file_bytes, arm })
    }

    fn measure(&self) -> Result<Results> {
        let mut measured: Vec<ModeRuns> = self.modes.iter().map(|&mode| ModeRuns { mode, runs: Vec::new() }).collect();
        let rounds = self.arguments.rounds;
        for round in 0..rounds {
            for mode in Mode::rotated(&self.modes, round as usize) {
                let run = self.run_once(mode)?;
                self.tell(round, mode, &run);
                if let Some(runs) = measured.iter_mut().find(|runs| runs.mode == mode) {
                    runs.runs.push(run);
                }
            }
        }
        let mut results = Results {
            rounds,
            file_bytes: self.file_bytes,
            pressure: self.arguments.pressure.map(|pressure| pressure.to_string()),
            user: self.arguments.user,
            warm: self.arguments.warm,
            read_ahead_kib: self.paths.first().and_then(|path| host::read_ahead_kib(path)),
            modes: measured,
            destinations: Vec::new(),
        };
        results.choose_limit();
        Ok(results)
    }

    /// One run of one mode. What goes wrong in its process is a result; what goes wrong here ends the bench.
    fn run_once(&self, mode: Mode) -> Result<Result<Run, Failure>> {
        let group = self.arm.group()?;
        let mut worker = self.start(mode)?;
        if let Some(group) = &group {
            group.add(worker.id())?;
        }
        let died = |error: anyhow::Error| Failure { reason: error.to_string(), wrong_bytes: false };
        worker.tell(child::PREPARE);
        match worker.hear() {
            Ok(line) => match child::heard(&line) {
                Some(Err(failure)) => return Ok(Err(failure)),
                Some(Ok(_)) => bail!("a run was measured before it began"),
                // It is ready.
                None => {}
            },
            Err(error) => return Ok(Err(died(error))),
        }
        if let Some(group) = &group {
            self.arm.fill(group)?;
        }
        for path in &self.paths {
            if self.arguments.warm {
                cold::make_warm(path)?;
            } else {
                cold::make_cold(path)?;
            }
        }
        host::warm(self.file_bytes, self.arm.is_on()).context("cannot warm the machine's memory")?;
        worker.tell(child::GO);
        let run = match worker.hear() {
            Ok(line) => child::heard(&line).with_context(|| format!("a run said {line:?}"))?,
            Err(error) => Err(died(error)),
        };
        // It must have left its group before that is removed.
        drop(worker);
        drop(group);
        self.arm.settle()?;
        Ok(run)
    }

    fn start(&self, mode: Mode) -> Result<Worker> {
        let mut command = if let Mode::Peer(peer) = mode {
            worker::peer(&peer.command, &self.paths)
        } else {
            let mut command = worker::command();
            command.args(["load", "--mode", mode.name()]);
            if let Some(file) = &self.scratch {
                command.arg("--scratch").arg(file.path());
            }
            // The same options, read by the same parser: everything behind the word `bench`.
            command.args(env::args_os().skip(2));
            command
        };
        if let Some(user) = self.arguments.user.filter(|_| mode != Mode::Limit) {
            command.uid(user).gid(user);
        }
        Worker::start(&mut command)
    }

    fn tell(&self, round: u32, mode: Mode, run: &Result<Run, Failure>) {
        let mut stderr = std::io::stderr().lock();
        if !stderr.is_terminal() {
            return;
        }
        let told = match run {
            Ok(run) if mode == Mode::Limit => {
                let all = run.destinations.iter().map(|read| format!("{:.3} s", read.seconds));
                all.collect::<Vec<_>>().join(", ")
            }
            Ok(run) => format!("{:.3} s", run.seconds),
            Err(failure) => format!("failed: {}", failure.reason),
        };
        // Nobody is left to be told when this fails.
        let _ = writeln!(stderr, "round {}/{}  {mode:15}  {told}", round + 1, self.arguments.rounds);
    }
}

/// A file of random weights, which whoever is to load it can read.
fn make_file(arguments: &args::Bench, size: u64) -> Result<ScratchFile> {
    let model = Model::new(size, SEED)?;
    let file = ScratchFile::create(arguments.dir.as_deref(), "bench.safetensors", size)?;
    file.file().set_permissions(Permissions::from_mode(0o644)).at("open to other users", file.path())?;
    demo::write(&model, &file)?;
    Ok(file)
}
