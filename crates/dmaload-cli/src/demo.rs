//! `dmaload demo`: loads a model of random values, and compares the time with that of a
//! conventional load, which allocates memory, maps the file and copies it.
//!
//! Each round measures a conventional load and then a load with dmaload, both from a cold file.
//! Before each load, as much memory as it needs is touched and freed. Otherwise, a virtual machine
//! that has returned memory to its host would spend part of the measured time getting that memory
//! back. Results are verified outside the measured time.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use dmaload::{Cache, Image, Loader};
use dmaload_bench::scratch::ScratchFile;
use dmaload_bench::synth::Model;
use dmaload_bench::{baseline, cold, usage};
use dmaload_text::{Pairs, bytes, duration, rate};
use memmap2::MmapOptions;

use crate::engine::block_on;
use crate::parse;
use crate::progress::{finish, write_model};
use crate::summary::{Used, summary};

/// The seed of the model, fixed so that the model is the same every time.
const SEED: u64 = 1;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The size of the model.
    #[arg(long, default_value = "1GiB", value_parser = parse::bytes)]
    pub(crate) size: u64,
    /// The folder in which to create the model; by default, a folder on a disk, not in memory.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// The number of rounds, each with one conventional load and one with dmaload; medians are
    /// reported.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let file = ScratchFile::create(arguments.dir.as_deref(), "demo.safetensors", arguments.size)?;
    let model = Model::new(arguments.size, SEED)?;
    write_model(&model, &file)?;

    let mut engine = Vec::new();
    let mut normal = Vec::new();
    let mut last = None;
    for _ in 0..arguments.rounds {
        // The next round needs the memory of the previous image.
        drop(last.take());
        warm_memory(model.bytes)?;
        normal.push(normal_round(&model, file.path(), normal.is_empty())?);
        warm_memory(model.bytes)?;
        let (image, used) = engine_round(file.path())?;
        engine.push(image.report().total);
        last = Some((image, used));
    }
    let (image, used) = last.context("no round was measured")?;
    let loaded = image.files().first().context("the load has no file")?;
    model.verify_all(&loaded.bytes()?).context("the loaded model differs from the one written")?;
    print(arguments, &model, &summary(&image, &[None], used), &mut engine, &mut normal)
}

fn normal_round(model: &Model, path: &Path, verify: bool) -> Result<Duration> {
    let loaded = baseline::load_cold(path)?;
    if verify {
        model.verify_all(&loaded.memory).context("the copied model differs from the one written")?;
    }
    Ok(loaded.elapsed)
}

fn engine_round(path: &Path) -> Result<(Image, Used)> {
    cold::make_cold(path)?;
    // Resets the peak of resident memory (proc_pid_clear_refs(5)). If that fails, the reported
    // peak can be that of an earlier round.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    let loader = Loader::new()?;
    // The demo measures storage, not the page cache.
    let options = loader.load_options().cache(Cache::Bypass);
    let cpu_before = usage::cpu_time();
    let image = block_on(finish(loader.load(path).options(options).start(), !std::io::stderr().is_terminal()))??;
    Ok((image, Used::since(cpu_before)))
}

/// Allocates and touches `len` bytes of memory, and then returns them to the kernel. The module
/// documentation explains why.
fn warm_memory(len: u64) -> Result<()> {
    let len = usize::try_from(len)?;
    drop(MmapOptions::new().len(len).populate().map_anon()?);
    Ok(())
}

fn print(arguments: &Arguments, model: &Model, summary: &str, engine: &mut [Duration], normal: &mut [Duration]) -> Result<()> {
    let ratios: Vec<f64> =
        normal.iter().zip(&*engine).map(|(normal, engine)| normal.as_secs_f64() / engine.as_secs_f64()).collect();
    let (engine, normal, ratio) = (median(engine), median(normal), median_of(ratios));
    let describe = |time| format!("{}, {}", duration(time), rate(model.bytes, time));
    let tensors = model.tensors.len();
    let mut stdout = crate::output::stdout();
    writeln!(stdout, "a synthetic model of {} with {tensors} tensors of random values, loaded cold\n", bytes(model.bytes))?;
    write!(stdout, "{summary}")?;
    let rounds = arguments.rounds;
    let pairs = Pairs::new()
        .with("verified", "every byte, against the generator")
        .with("dmaload", format!("{} (median of {rounds}, allocation included)", describe(engine)))
        .with("normal", format!("{} (allocate + mmap + memcpy, in the same run)", describe(normal)))
        .with("ratio", format!("{ratio:.1} times as fast as normal (median of the rounds' ratios)"));
    write!(stdout, "\n{pairs}")?;
    Ok(stdout.flush()?)
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn median_of(mut ratios: Vec<f64>) -> f64 {
    ratios.sort_unstable_by(f64::total_cmp);
    ratios.get(ratios.len() / 2).copied().unwrap_or_default()
}
