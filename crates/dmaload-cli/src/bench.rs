//! `dmaload bench`: its arguments and output; [`dmaload_bench`] does the measuring.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use clap::{Args, Subcommand};
use dmabuf::Pages;
use dmaload::heap::Heap;
use dmaload::verify::{Manifest, Recorder};
use dmaload::{Loader, Route};
use dmaload_bench::scratch::ScratchFile;
use dmaload_bench::synth::Model;
use dmaload_bench::{Bench, Engine, Mode, Pressure, Settings, child};
use dmaload_text::ForPath;

use crate::engine::{self, EngineArguments, block_on};
use crate::manifests::record_manifest;
use crate::progress::write_model;
use crate::{errors, output, parse};

/// The seed of the created file, fixed so that the file is the same every time.
const SEED: u64 = 1;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The files to load; if there are several, one load reads all of them.
    #[arg(value_name = "PATH", required_unless_present = "size", conflicts_with = "size")]
    pub(crate) paths: Vec<PathBuf>,
    /// Create a file of random weights of this size, and remove it afterwards.
    #[arg(long, value_parser = parse::bytes)]
    pub(crate) size: Option<u64>,
    /// The folder in which to create files; by default, a folder on a disk, not in memory.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// The modes to compare, separated by commas; normal and limit are always included [default:
    /// all except those that run only on request].
    ///
    /// normal, normal_io, direct_io, direct_io_check, limit, mmap, tokio-fs, pread-direct,
    /// no-overlap; and, only on request, reuse, swap, at-once and verify: see docs/cli.md.
    #[arg(long, value_name = "MODES", value_delimiter = ',')]
    pub(crate) modes: Vec<Mode>,
    /// Another program to compare with, run by the shell with the paths as arguments; may be
    /// repeated (see docs/cli.md).
    #[arg(long = "peer", value_name = "NAME=COMMAND", value_parser = Mode::peer)]
    pub(crate) peers: Vec<Mode>,
    /// How many times to measure each mode; medians are reported.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Make memory scarce: cgroup:SIZE, cgroup:SIZE,clean, cgroup:SIZE,dirty, hog:SIZE,
    /// hog:all-but:SIZE.
    #[arg(long)]
    pub(crate) pressure: Option<Pressure>,
    /// Put the files into the page cache before each run, instead of evicting them.
    #[arg(long, conflicts_with = "pressure")]
    pub(crate) warm: bool,
    /// Measure all modes except limit as this user, who may lock 8 MiB of memory; requires root.
    #[arg(long, value_name = "UID")]
    pub(crate) user: Option<u32>,
    /// Print one JSON object to standard output, and nothing else.
    #[arg(long, conflicts_with = "md")]
    pub(crate) json: bool,
    /// Print a Markdown table.
    #[arg(long)]
    pub(crate) md: bool,
    /// Write a chart of the results to this file, as SVG.
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
}

/// Commands that `bench` runs in child processes.
#[derive(Debug, Subcommand)]
pub(crate) enum Child {
    /// Measures one run.
    Load {
        #[arg(long)]
        mode: Mode,
        /// The file that `bench` created, if any.
        #[arg(long)]
        scratch: Option<PathBuf>,
        #[command(flatten)]
        bench: Box<Arguments>,
    },
    /// Occupies memory.
    Hog { bytes: u64 },
    /// Fills the page cache.
    Fill {
        bytes: u64,
        path: PathBuf,
        #[arg(long)]
        dirty: bool,
    },
}

pub(crate) fn run(arguments: &Arguments, command_line: &[OsString]) -> Result<u8> {
    check(arguments)?;
    let scratch = arguments.size.map(|size| make_file(arguments, size)).transpose()?;
    let scratch_path = scratch.as_ref().map(|file| file.path().to_owned());
    let settings = Settings {
        paths: scratch_path.clone().map_or_else(|| arguments.paths.clone(), |path| vec![path]),
        scratch: scratch_path,
        folder: arguments.dir.clone(),
        modes: Mode::chosen(&arguments.modes).into_iter().chain(arguments.peers.iter().copied()).collect(),
        rounds: arguments.rounds,
        pressure: arguments.pressure,
        warm: arguments.warm,
        user: arguments.user,
        // Child processes parse the same options: everything after the word `bench`.
        arguments: command_line.iter().skip(2).cloned().collect(),
    };
    let results = Bench::set_up(settings)?.measure(print_progress)?;
    let mut stdout = output::stdout();
    match (arguments.json, arguments.md) {
        (true, _) => writeln!(stdout, "{}", output::json(&results.to_json()))?,
        (_, true) => write!(stdout, "{}", results.to_markdown())?,
        _ => write!(stdout, "{}", results.to_text())?,
    }
    stdout.flush()?;
    if let Some(path) = &arguments.plot {
        fs::write(path, results.to_svg()).for_path("write the chart to", path)?;
    }
    Ok(if results.failed() { crate::status::FAILURE } else { crate::status::SUCCESS })
}

/// Does the work of a child process of `bench`.
pub(crate) fn run_child(arguments: Child) -> Result<()> {
    let mut stdout = output::stdout();
    match arguments {
        Child::Load { mode, scratch, mut bench } => {
            // The bench measures storage, not the page cache.
            bench.engine.cache.get_or_insert(dmaload::Cache::Bypass);
            let paths = scratch.map_or_else(|| bench.paths.clone(), |path| vec![path]);
            let load = child::Load { mode, paths, user: bench.user, curves: bench.plot.is_some() };
            load.run(&bench.engine, errors::describe, &mut stdout)
        }
        Child::Hog { bytes } => child::hog(bytes, &mut stdout),
        Child::Fill { bytes, path, dirty } => child::fill_cache_on_request(&path, bytes, dirty, &mut stdout),
    }
}

/// Rejects invalid options before the first file is written.
fn check(arguments: &Arguments) -> Result<()> {
    if arguments.user.is_some() && !rustix::process::geteuid().is_root() {
        return Err(dmaload::Error::Config("--user: only root can run a process as another user".to_owned()).into());
    }
    let mut names = BTreeSet::new();
    if let Some(peer) = arguments.peers.iter().find(|peer| !names.insert(peer.name())) {
        return Err(dmaload::Error::Config(format!("--peer: several programs have the name {:?}", peer.name())).into());
    }
    drop(engine::loader(&arguments.engine)?);
    Ok(())
}

/// Prints a line after each run, if standard error is a terminal.
fn print_progress(line: &str) {
    let mut stderr = std::io::stderr().lock();
    if stderr.is_terminal() {
        // There is nowhere else to report a failure.
        let _ = writeln!(stderr, "{line}");
    }
}

/// Creates a file of random weights, which the user given by `--user` must be able to read.
fn make_file(arguments: &Arguments, size: u64) -> Result<ScratchFile> {
    let model = Model::new(size, SEED)?;
    let file = ScratchFile::create(arguments.dir.as_deref(), "bench.safetensors", size)?;
    file.file().set_permissions(Permissions::from_mode(0o644)).for_path("make readable for other users", file.path())?;
    write_model(&model, &file)?;
    Ok(file)
}

impl Engine for EngineArguments {
    fn loader(&self) -> dmaload::Result<Loader> {
        engine::loader(self)
    }

    fn loader_by(&self, route: Route) -> dmaload::Result<Loader> {
        engine::loader_by(self, route, true)
    }

    fn loader_with_pool(&self) -> dmaload::Result<Loader> {
        engine::loader_with_pool(self)
    }

    fn heap(&self) -> dmaload::Result<Arc<dyn Heap>> {
        engine::heap(self).map(|(heap, _)| heap)
    }

    fn pages(&self) -> Pages {
        self.pages.into()
    }

    fn manifest(&self, paths: &[PathBuf], recorder: Recorder) -> Result<Manifest> {
        Ok(block_on(record_manifest(&engine::loader(self)?, paths, recorder))??)
    }
}
