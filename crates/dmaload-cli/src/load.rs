//! `dmaload load`: loads, and tells how it went.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use dmabuf::{HUGE_PAGE_BYTES, printable};
use dmaload::heap::HeapChoice;
use dmaload::verify::{Algorithm, Digest};
use dmaload::{Errno, Error, Fallback, Image, ImporterLimits, Layout, Load, Measured, Report, Segment, Shard, Source};
use dmaload_bench::usage;
use dmaload_text::{At, Pairs, bytes, duration, rate};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::checksums::Checksums;
use crate::engine::{self, EngineArguments, block_on};
use crate::manifest::Against;
use crate::{errors, exec, output, parse, trace};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The files; a folder or an index stands for all files of a model.
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
    /// Load these tensors only: a name, or a pattern with *, ?, {a,b}, {0..3}; may be repeated, and they come in this order.
    #[arg(long, value_name = "PATTERN")]
    pub(crate) tensors: Vec<String>,
    /// Load this range of each file's bytes only.
    #[arg(long, value_name = "START..END", value_parser = parse::range, conflicts_with = "tensors")]
    pub(crate) range: Option<(u64, u64)>,
    /// With --layout tensors: let each tensor begin at a multiple of this in its memory; what is elsewhere in its file is copied.
    #[arg(long, value_name = "BYTES", value_parser = parse::bytes)]
    pub(crate) align: Option<u64>,
    /// Fail rather than copy for --align.
    #[arg(long, requires = "align")]
    pub(crate) no_copy: bool,
    /// The model is this range of the one file's bytes: weights stored inside of a package.
    #[arg(long, value_name = "START..END", value_parser = parse::range)]
    pub(crate) inside: Option<(u64, u64)>,
    /// Load one rank's part only: the number of the part, from 0 on; or env, for that of the variables RANK and WORLD_SIZE.
    ///
    /// A launcher of many processes (torchrun) sets both variables. They are read only when they are asked for.
    #[arg(long, value_name = "NUMBER|env")]
    pub(crate) rank: Option<Rank>,
    /// How many parts there are; 1 is all in one.
    #[arg(long, value_name = "RANKS")]
    pub(crate) world_size: Option<u32>,
    /// Cut each tensor along this dimension, the outermost is 0; without it the bytes of each file are cut.
    #[arg(long, value_name = "DIMENSION")]
    pub(crate) shard_dim: Option<usize>,
    /// Fail unless the files are what this says: a manifest (see `dmaload manifest`), or sha256:HEX (or blake3:, crc32c:, xxh3:)
    /// of the one file that is named; parts of the model that come with it are not looked at.
    #[arg(long, value_name = "MANIFEST|ALGORITHM:HEX")]
    pub(crate) verify: Option<Against>,
    /// Compute this digest of each file, from the loaded memory: sha256, blake3, crc32c, xxh3.
    #[arg(long, value_name = "ALGORITHM")]
    pub(crate) digest: Option<Algorithm>,
    /// Print one JSON object, and nothing else, on standard output.
    #[arg(long)]
    pub(crate) json: bool,
    /// Print nothing but errors.
    #[arg(long, conflicts_with = "json")]
    pub(crate) quiet: bool,
    /// Write a timeline of the load to this file, for Perfetto (ui.perfetto.dev) or chrome://tracing.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Then run this command, to the end of the line, with the segments' descriptors from 3 on; exit as it does.
    ///
    /// DMALOAD_FDS tells their number, DMALOAD_SEGMENTS and DMALOAD_FILES what each holds: see docs/cli.md.
    #[arg(long, value_name = "COMMAND", num_args = 1.., allow_hyphen_values = true)]
    pub(crate) exec: Vec<OsString>,
}

/// The number of a rank, or where it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rank {
    Number(u32),
    /// The variables that a launcher sets.
    Environment,
}

impl FromStr for Rank {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "env" => Ok(Rank::Environment),
            text => text.parse().map(Rank::Number).map_err(|_| format!("{text:?} is not the number of a rank, and not env")),
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let about = |error| errors::about(error, &arguments.paths);
    if !arguments.exec.is_empty() && arguments.engine.heap == HeapChoice::Anon {
        return Err(Error::Config("--exec: anon memory has no descriptor to hand over".to_owned()).into());
    }
    let loader = engine::loader(&arguments.engine).map_err(about)?;
    let checksums = arguments.digest.map(|algorithm| Checksums::new(algorithm, loader.heap()));
    let mut options = loader.load_options().trace(arguments.trace.is_some());
    if !arguments.tensors.is_empty() {
        options = options.tensors(&arguments.tensors);
    }
    if let Some((start, end)) = arguments.range {
        options = options.range(start..end);
    }
    if let Some(alignment_bytes) = arguments.align {
        options = options.importer(ImporterLimits { alignment_bytes, may_copy: !arguments.no_copy, ..ImporterLimits::default() });
    }
    let variable = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    let (shard, ignored) = shard(arguments, variable)?;
    if let Some(shard) = shard {
        options = options.shard(shard);
    }
    let whole = arguments.tensors.is_empty() && arguments.range.is_none() && shard.is_none() && arguments.inside.is_none();
    if arguments.digest.is_some() && !(whole && arguments.engine.layout != Layout::Tensors) {
        return Err(Error::Config("--digest is of whole files, and parts of files are loaded".to_owned()).into());
    }
    if let Some(against) = &arguments.verify {
        options = against.applied_to(options)?;
    }
    if let Some(checksums) = &checksums {
        options = checksums.applied_to(options);
    }
    let cpu_before = usage::cpu_time();
    let load = match (arguments.inside, arguments.paths.as_slice()) {
        (None, paths) => loader.load(paths).options(options).start(),
        (Some((start, end)), [path]) => loader.load(Source::from(path).range(start..end)).options(options).start(),
        (Some(_), _) => return Err(Error::Config("--inside is about one file".to_owned()).into()),
    };
    let quiet = arguments.quiet || arguments.json || is_quiet();
    let image = block_on(finish(load, quiet))?.map_err(about)?;
    let used = Used::since(cpu_before);
    if let Some(file) = &arguments.trace {
        std::fs::write(file, trace::to_json(image.report()).to_string()).at("write the timeline to", file)?;
    }
    let digests = match &checksums {
        Some(checksums) => checksums.finish(&image)?.into_iter().map(Some).collect(),
        None => vec![None; image.files().len()],
    };
    let notes: Vec<String> = ignored.into_iter().collect();
    if arguments.json {
        output::write_json(&to_json_with(&image, &digests, used, &notes))?;
    } else if !arguments.quiet {
        let mut stdout = output::stdout();
        write!(stdout, "{}", summary_with(&image, &digests, used, &notes))?;
        stdout.flush()?;
    }
    match arguments.exec.as_slice() {
        [] => Ok(ExitCode::SUCCESS),
        [program, rest @ ..] => exec::run(&image, program, rest),
    }
}

/// The part that is asked for; a note where the environment has one and it was not asked for.
fn shard(arguments: &Arguments, variable: impl Fn(&str) -> Option<String>) -> dmaload::Result<(Option<Shard>, Option<String>)> {
    // A launcher that has nothing to say leaves a variable empty.
    let variable = |name: &str| variable(name).filter(|text| !text.is_empty());
    let number = |name: &str| match variable(name) {
        Some(text) => text.parse().map_err(|_| Error::Config(format!("--rank env: {name} is {text:?}, which is not a number"))),
        None => Err(Error::Config(format!("--rank env: {name} is not set"))),
    };
    let (rank, world_size, note) = match (arguments.rank, arguments.world_size) {
        (Some(Rank::Environment), world_size) => {
            (Some(number("RANK")?), Some(world_size.map_or_else(|| number("WORLD_SIZE"), Ok)?), None)
        }
        (Some(Rank::Number(rank)), world_size) => (Some(rank), world_size, None),
        (None, world_size) => {
            let both = variable("RANK").zip(variable("WORLD_SIZE"));
            let note = both.map(|(rank, all)| {
                format!("RANK={rank} and WORLD_SIZE={all} in the environment are ignored; --rank env loads that rank's part only")
            });
            (None, world_size, note)
        }
    };
    let dim = arguments.shard_dim;
    match (rank, world_size) {
        (None, None | Some(1)) if dim.is_none() => Ok((None, note)),
        (Some(0), Some(1)) => Ok((None, note)),
        (Some(rank), Some(world_size)) => Ok((Some(Shard { rank, world_size, dim }), note)),
        _ => Err(Error::Config("a part needs --rank and --world-size, or --rank env".to_owned())),
    }
}

/// Whether nobody is there to see a bar.
pub(crate) fn is_quiet() -> bool {
    !std::io::stderr().is_terminal()
}

/// Waits for a load, with a bar on the terminal unless it is to be quiet.
pub(crate) async fn finish(mut load: Load, quiet: bool) -> dmaload::Result<Image> {
    if quiet {
        return load.await;
    }
    let bar = progress_bar("loading");
    // From the beginning: until the first segment is there, files are opened and memory is allocated.
    bar.tick();
    loop {
        // `next` may be dropped at any time without losing a segment.
        match tokio::time::timeout(Duration::from_millis(50), load.next()).await {
            Ok(Some(Ok(_))) | Err(_) => {}
            // An error is told by `finish`, too.
            Ok(Some(Err(_)) | None) => break,
        }
        // Also while segments come faster than that.
        let progress = load.progress();
        bar.set_length(progress.planned_bytes);
        bar.set_position(progress.read_bytes);
    }
    bar.finish_and_clear();
    load.finish().await
}

/// A bar with rate and time left.
pub(crate) fn progress_bar(what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg:10} [{bar:32}] {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left",
    );
    let bar = ProgressBar::new(0).with_message(what);
    if let Ok(style) = style {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// What the process has used by the end of a load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Used {
    /// CPU time during the load.
    cpu: Duration,
    peak_resident_bytes: u64,
}

impl Used {
    /// Now, with the CPU time when the load was started.
    pub(crate) fn since(cpu_before: Duration) -> Self {
        let cpu = usage::cpu_time().saturating_sub(cpu_before);
        Used { cpu, peak_resident_bytes: usage::peak_resident_bytes().unwrap_or(0) }
    }
}

fn memory(report: &Report) -> String {
    let shared = if report.memories < report.segments { format!(" in {} memories", report.memories) } else { String::new() };
    format!("{}, {} ({}{shared})", report.heap, report.layout, counted(report.segments, "segment"))
}

/// Whether the bytes were read here: those of an image that another process has loaded were not.
fn were_read(report: &Report) -> bool {
    report.bytes == 0 || !report.reading.is_zero() || !report.from_cache.is_zero()
}

/// What happened, for people.
pub(crate) fn summary(image: &Image, digests: &[Option<Digest>], used: Used) -> String {
    summary_with(image, digests, used, &[])
}

/// The same, with notes that are the command's own.
fn summary_with(image: &Image, digests: &[Option<Digest>], used: Used, notes: &[String]) -> String {
    let report = image.report();
    let in_time = format!("{} in {}", bytes(report.bytes), duration(report.total));
    let mut pairs = Pairs::new();
    pairs = if were_read(report) {
        pairs.with("loaded", format!("{in_time}, {}", rate(report.bytes, report.total)))
    } else {
        pairs.with("attached", in_time)
    };
    pairs = pairs.with("route", report.route).with("memory", memory(report)).with("pages", pages(report));
    if were_read(report) {
        let (cpu, resident) = (duration(used.cpu), bytes(used.peak_resident_bytes));
        pairs =
            pairs.with("time", times(report)).with("CPU", format!("{cpu} for the whole process, {resident} resident at most"));
    }
    if report.wanted_bytes != report.bytes {
        let along = report.bytes.saturating_sub(report.wanted_bytes);
        pairs = pairs.with("wanted", format!("{} of these; {} were read along", bytes(report.wanted_bytes), bytes(along)));
    }
    if report.cached_bytes > 0 {
        pairs = pairs.with("cached", cached(report));
    }
    if report.copied_bytes > 0 {
        pairs = pairs.with("copied", format!("{}, to where tensors are to be", bytes(report.copied_bytes)));
    }
    let tensors = image.tensors().count();
    if tensors > 0 {
        pairs = pairs.with("tensors", tensors);
    }
    pairs = pairs.with_some("measured", report.measured.map(|measured| told_measured(&measured)));
    pairs = pairs.with_some("verified", report.verified.as_ref());
    for note in report.notes.iter().chain(notes) {
        pairs = pairs.with("note", note);
    }
    for fallback in &report.fallbacks {
        pairs = pairs.with("fallback", described(report, fallback));
    }
    for (file, digest) in report.files.iter().zip(digests) {
        let told = digest.as_ref().map(|digest| format!("{}  {}", digest.hex(), printable::path(&file.path)));
        pairs = pairs.with_some(digest.as_ref().map(|digest| digest.algorithm().to_string()).unwrap_or_default(), told);
    }
    pairs.to_string()
}

fn told_measured(measured: &Measured) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "shown with three digits")]
    let rate = |bytes: f64| rate(bytes as u64, Duration::from_secs(1));
    let (staged, direct) = (rate(measured.staged_bytes_per_second), rate(measured.direct_bytes_per_second));
    let buffered = measured.buffered_bytes_per_second.map(|bytes| format!(", buffered {}", rate(bytes)));
    format!("staged {staged}, direct {direct}{}: {} for the rest", buffered.unwrap_or_default(), measured.chosen)
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn pages(report: &Report) -> String {
    let (seen, huge) = (report.pages.seen_bytes, report.pages.huge_bytes);
    let told = match (seen, huge) {
        (0, _) => return "of unknown size (this kernel offers no way to look)".to_owned(),
        (_, 0) => format!("{}, all of them", bytes(report.page_size_bytes() as u64)),
        (seen, huge) if seen - huge < HUGE_PAGE_BYTES as u64 => "2 MiB".to_owned(),
        (seen, huge) => format!("2 MiB for {} of {}", bytes(huge), bytes(seen)),
    };
    match report.pages_refused {
        Some(errno) => format!("{told}; more 2 MiB pages were refused: {}", errno.describe()),
        None => told,
    }
}

fn times(report: &Report) -> String {
    let first = report.first_segment.map(|first| format!("; first segment after {}", duration(first))).unwrap_or_default();
    let (allocating, reading) = (duration(report.allocating), duration(report.reading));
    let copying = if report.copying.is_zero() { String::new() } else { format!(", copying {}", duration(report.copying)) };
    format!("allocating {allocating}, reading {reading}{copying}, {:.0} % overlapped{first}", report.overlap() * 100.0)
}

/// What came from the page cache, and how fast that and the rest were.
fn cached(report: &Report) -> String {
    let stored_bytes = report.bytes.saturating_sub(report.cached_bytes);
    let rest = report
        .storage_bytes_per_second()
        .map(|_| format!("; the rest from storage at {}", rate(stored_bytes, report.reading)))
        .unwrap_or_default();
    let from = rate(report.cached_bytes, report.from_cache);
    format!("{} copied from the page cache at {from}{rest}", bytes(report.cached_bytes))
}

fn described(report: &Report, fallback: &Fallback) -> String {
    let file = fallback.file_index.and_then(|index| report.files.get(index));
    let file = file.map(|file| format!("{}: ", printable::path(&file.path))).unwrap_or_default();
    format!("{file}{} -> {}: {} ({})", fallback.from, fallback.to, fallback.reason(), fallback.errno.describe())
}

/// What happened, for programs.
pub(crate) fn to_json(image: &Image, digests: &[Option<Digest>], used: Used) -> Value {
    to_json_with(image, digests, used, &[])
}

/// The same, with notes that are the command's own.
fn to_json_with(image: &Image, digests: &[Option<Digest>], used: Used, notes: &[String]) -> Value {
    let report = image.report();
    let files = report.files.iter().zip(digests).map(|(file, digest)| {
        json!({
            "path": file.path.to_string_lossy(),
            "bytes": file.bytes,
            "route": file.route.name(),
            "digest": digest.as_ref().map(|digest| json!({ "algorithm": digest.algorithm().name(), "hex": digest.hex() })),
        })
    });
    json!({
        "bytes": report.bytes,
        "wanted_bytes": report.wanted_bytes,
        "copied_bytes": report.copied_bytes,
        "cached_bytes": report.cached_bytes,
        "seconds": report.total.as_secs_f64(),
        "throughput_bytes_per_second": were_read(report).then(|| report.throughput_bytes_per_second()),
        "allocate_seconds": report.allocating.as_secs_f64(),
        "read_seconds": report.reading.as_secs_f64(),
        "copy_seconds": report.copying.as_secs_f64(),
        "cache_seconds": report.from_cache.as_secs_f64(),
        "storage_bytes_per_second": report.storage_bytes_per_second(),
        "cache_bytes_per_second": report.cache_bytes_per_second(),
        "overlap": report.overlap(),
        "first_segment_seconds": report.first_segment.map(|first| first.as_secs_f64()),
        "cpu_seconds": used.cpu.as_secs_f64(),
        "peak_resident_bytes": used.peak_resident_bytes,
        "page_size_bytes": report.page_size_bytes(),
        "huge_page_bytes": report.pages.huge_bytes,
        "pages_refused": report.pages_refused.map(Errno::describe),
        "heap": report.heap,
        "notes": report.notes.iter().chain(notes).collect::<Vec<_>>(),
        "layout": report.layout.name(),
        "memories": report.memories,
        "route": report.route.name(),
        "fallbacks": report.fallbacks.iter().map(|fallback| json!({
            "from": fallback.from.name(),
            "to": fallback.to.name(),
            "reason": fallback.reason(),
            "errno": fallback.errno.name().map_or_else(|| fallback.errno.raw_os_error().to_string(), str::to_owned),
            "file": fallback.file_index,
        })).collect::<Vec<_>>(),
        "measured": report.measured.map(|measured| serde_json::json!({
            "direct_bytes_per_second": measured.direct_bytes_per_second,
            "staged_bytes_per_second": measured.staged_bytes_per_second,
            "buffered_bytes_per_second": measured.buffered_bytes_per_second,
            "chosen": measured.chosen.to_string(),
        })),
        "verified": report.verified,
        "segments": image.segments().iter().map(segment_to_json).collect::<Vec<_>>(),
        "tensors": image.tensors().count(),
        "files": files.collect::<Vec<_>>(),
    })
}

fn segment_to_json(segment: &Segment) -> Value {
    json!({
        "index": segment.index(),
        "file": segment.file_index(),
        "memory_offset": segment.memory_offset(),
        "file_offset": segment.file_range().start,
        "bytes": segment.len(),
        "dma_buf": segment.has_dma_buf(),
    })
}
