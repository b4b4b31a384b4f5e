//! `dmaload load`: loads files and prints a report.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use clap::Args;
use dmaload::heap::HeapChoice;
use dmaload::verify::Algorithm;
use dmaload::{Error, ImporterLimits, Layout, Shard, Source};
use dmaload_bench::usage;
use dmaload_text::ForPath;

use crate::checksums::Checksums;
use crate::engine::{self, EngineArguments, block_on};
use crate::manifests::Against;
use crate::progress::{finish, is_quiet};
use crate::summary::{Used, summary_with, to_json_with};
use crate::{errors, exec, output, parse, trace};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The files to load; for a folder or an index, all files of its model are loaded.
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: EngineArguments,
    /// Load only these tensors: a name, or a pattern with *, ?, {a,b}, {0..3}; may be repeated.
    /// Tensors are loaded in the order given.
    #[arg(long, value_name = "PATTERN")]
    pub(crate) tensors: Vec<String>,
    /// Load only this byte range of each file.
    #[arg(long, value_name = "START..END", value_parser = parse::range, conflicts_with = "tensors")]
    pub(crate) range: Option<(u64, u64)>,
    /// With --layout tensors: align each tensor in memory to this many bytes; tensors with a
    /// smaller alignment in their file are copied.
    #[arg(long, value_name = "BYTES", value_parser = parse::bytes)]
    pub(crate) align: Option<u64>,
    /// Fail rather than copy tensors for --align.
    #[arg(long, requires = "align")]
    pub(crate) no_copy: bool,
    /// Load the model in this byte range of the file, such as weights stored inside a package.
    #[arg(long, value_name = "START..END", value_parser = parse::range)]
    pub(crate) inside: Option<(u64, u64)>,
    /// Load only the shard of this rank, counted from 0; or env, to read RANK and WORLD_SIZE from
    /// the environment.
    ///
    /// Multi-process launchers such as torchrun set both variables. Without `--rank env`, these
    /// variables have no effect.
    #[arg(long, value_name = "NUMBER|env")]
    pub(crate) rank: Option<Rank>,
    /// Number of shards; 1 loads everything as one shard.
    #[arg(long, value_name = "RANKS")]
    pub(crate) world_size: Option<u32>,
    /// Split each tensor along this dimension, where 0 is the outermost; by default, the bytes of
    /// each file are split.
    #[arg(long, value_name = "DIMENSION")]
    pub(crate) shard_dim: Option<usize>,
    /// Fail unless the files match this manifest (see `dmaload manifest`), or the one given file
    /// matches this checksum: sha256:HEX, blake3:HEX, crc32c:HEX or xxh3:HEX. With a checksum,
    /// other files of its model are not checked.
    #[arg(long, value_name = "MANIFEST|ALGORITHM:HEX")]
    pub(crate) verify: Option<Against>,
    /// Compute this digest of each file from the loaded memory: sha256, blake3, crc32c, xxh3.
    #[arg(long, value_name = "ALGORITHM")]
    pub(crate) digest: Option<Algorithm>,
    /// Print one JSON object to standard output, and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
    /// Print nothing but errors.
    #[arg(long, conflicts_with = "json")]
    pub(crate) quiet: bool,
    /// Write a timeline of the load to this file, for Perfetto (ui.perfetto.dev) or
    /// chrome://tracing.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// After the load, run this command and exit with its status. It inherits the descriptors of
    /// the segments, numbered from 3. The command extends to the end of the line.
    ///
    /// DMALOAD_FDS is the number of descriptors; DMALOAD_SEGMENTS and DMALOAD_FILES describe their
    /// contents: see docs/cli.md.
    #[arg(long, value_name = "COMMAND", num_args = 1.., allow_hyphen_values = true)]
    pub(crate) exec: Vec<OsString>,
}

/// The value of `--rank`: the rank itself, or where to read it from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rank {
    Number(u32),
    /// The rank and the number of ranks are in the variables RANK and WORLD_SIZE, which a launcher
    /// sets.
    Environment,
}

impl FromStr for Rank {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "env" => Ok(Rank::Environment),
            text => text.parse().map(Rank::Number).map_err(|_| format!("invalid rank {text:?}: use a number, or env")),
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let about = |error| errors::with_files(error, &arguments.paths);
    if !arguments.exec.is_empty() && arguments.engine.heap == HeapChoice::Anon {
        return Err(Error::Config("--exec: anon memory has no descriptor to pass on".to_owned()).into());
    }
    let loader = engine::loader_for(&arguments.engine, &arguments.paths)?;
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
    let (shard, ignored) = requested_shard(arguments, variable)?;
    if let Some(shard) = shard {
        options = options.shard(shard);
    }
    let whole = arguments.tensors.is_empty() && arguments.range.is_none() && shard.is_none() && arguments.inside.is_none();
    if arguments.digest.is_some() && !(whole && arguments.engine.layout != Layout::Tensors) {
        return Err(Error::Config(
            "--digest needs whole files: it cannot be used with --tensors, --range, --rank, --inside or --layout tensors"
                .to_owned(),
        )
        .into());
    }
    if let Some(against) = &arguments.verify {
        options = against.apply_to(options)?;
    }
    if let Some(checksums) = &checksums {
        options = checksums.apply_to(options);
    }
    let cpu_before = usage::cpu_time();
    let load = match (arguments.inside, arguments.paths.as_slice()) {
        (None, paths) => loader.load(paths).options(options).start(),
        (Some((start, end)), [path]) => loader.load(Source::from(path).range(start..end)).options(options).start(),
        (Some(_), _) => return Err(Error::Config("--inside needs exactly one file".to_owned()).into()),
    };
    let quiet = arguments.quiet || arguments.json || is_quiet();
    let image = block_on(finish(load, quiet))?.map_err(about)?;
    let used = Used::since(cpu_before);
    if let Some(file) = &arguments.trace {
        std::fs::write(file, trace::to_json(image.report()).to_string()).for_path("write the timeline to", file)?;
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
        [] => Ok(crate::status::SUCCESS),
        [program, rest @ ..] => exec::run(&image, program, rest),
    }
}

/// Returns the requested shard, and a note if the environment names a rank that was not requested.
fn requested_shard(
    arguments: &Arguments,
    variable: impl Fn(&str) -> Option<String>,
) -> dmaload::Result<(Option<Shard>, Option<String>)> {
    // A launcher may leave an unused variable empty.
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
                format!(
                    "RANK={rank} and WORLD_SIZE={all} in the environment are ignored; use --rank env to load only that rank's shard"
                )
            });
            (None, world_size, note)
        }
    };
    let dim = arguments.shard_dim;
    match (rank, world_size) {
        (None, None | Some(1)) if dim.is_none() => Ok((None, note)),
        (Some(0), Some(1)) => Ok((None, note)),
        (Some(rank), Some(world_size)) => Ok((Some(Shard { rank, world_size, dim }), note)),
        _ => Err(Error::Config("a shard needs --rank and --world-size, or --rank env".to_owned())),
    }
}
