//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum};
use dmaload::dmabuf::Pages;
use dmaload::verify::Algorithm;
use dmaload::{Cache, Format, Layout, Prefer, Route};

use crate::bench::{Mode, Pressure};
use crate::manifest::Against;

/// Loads model files straight into shareable memory through io_uring, without the page cache.
#[derive(Debug, Parser)]
#[command(name = "dmaload", version, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Loads files into memory, and tells how it went.
    ///
    /// Exit status: 0 done, 1 a load failed, 2 wrong usage.
    Load(Load),
    /// Loads a file, or one tensor, and writes it to standard output from the loaded memory.
    Cat(Cat),
    /// Writes a manifest of files to standard output: checksums of their chunks, for `load --verify`.
    Manifest(Manifest),
    /// Shows what tensors a file holds; reads only its header.
    Inspect(Inspect),
    /// Loads files, and hands their memory out to other processes at a Unix socket, until it is ended (SIGINT, SIGTERM).
    Serve(Serve),
    /// Maps the memory that `serve` has loaded, without a copy, and tells what is in it.
    Attach(Attach),
    /// Tells what loads get from this machine, by trying, and what would help most.
    ///
    /// Exit status: 0 when a load would work, 1 when not, 2 wrong usage.
    Doctor(Doctor),
    /// Makes a synthetic model, loads it cold, verifies it, and compares with allocate + mmap + memcpy.
    Demo(Demo),
    /// Compares ways of loading a file cold, in turn, each run in a process of its own.
    ///
    /// Exit status: 0 done, 1 a mode failed (without --pressure) or loaded wrong bytes, 2 wrong usage.
    Bench(Bench),
    /// A process of `bench`.
    #[command(subcommand, hide = true)]
    BenchChild(BenchChild),
}

impl Command {
    /// Whether standard output is to be one JSON object.
    pub(crate) fn wants_json(&self) -> bool {
        match self {
            Command::Load(arguments) => arguments.json,
            Command::Inspect(arguments) => arguments.json,
            Command::Attach(arguments) => arguments.json,
            Command::Doctor(arguments) => arguments.json,
            Command::Bench(arguments) => arguments.json,
            Command::Cat(_) | Command::Manifest(_) | Command::Serve(_) | Command::Demo(_) | Command::BenchChild(_) => false,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Load {
    /// The files; a folder or an index stands for all files of a model.
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: Engine,
    /// Load these tensors only: a name, or a pattern with *, ?, {a,b}, {0..3}; may be repeated, and they come in this order.
    #[arg(long, value_name = "PATTERN")]
    pub(crate) tensors: Vec<String>,
    /// Load this range of each file's bytes only.
    #[arg(long, value_name = "START..END", value_parser = range, conflicts_with = "tensors")]
    pub(crate) range: Option<(u64, u64)>,
    /// With --layout tensors: let each tensor begin at a multiple of this in its memory; what is elsewhere in its file is copied.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) align: Option<u64>,
    /// Fail rather than copy for --align.
    #[arg(long, requires = "align")]
    pub(crate) no_copy: bool,
    /// The model is this range of the one file's bytes: weights stored inside of a package.
    #[arg(long, value_name = "START..END", value_parser = range)]
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

#[derive(Debug, Args)]
pub(crate) struct Cat {
    /// The file, which is written as it is, also where it is a part of a model; of a folder, the files of its model.
    #[arg(value_name = "MODEL")]
    pub(crate) path: PathBuf,
    /// Write the bytes of this tensor only: of the file that the model's index maps it to. Little else is read.
    #[arg(long, value_name = "NAME", conflicts_with = "verify")]
    pub(crate) tensor: Option<String>,
    /// Fail unless the file is what this says, as for `load`; only what was verified is written.
    #[arg(long, value_name = "MANIFEST|ALGORITHM:HEX")]
    pub(crate) verify: Option<Against>,
    #[command(flatten)]
    pub(crate) engine: Engine,
}

#[derive(Debug, Args)]
pub(crate) struct Manifest {
    /// The files.
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    /// The checksum of the chunks: crc32c, xxh3, or, against somebody who forges files, blake3, sha256.
    #[arg(long, default_value = "crc32c")]
    pub(crate) algorithm: Algorithm,
    /// The size of a chunk: a power of two from 4KiB to 1MiB.
    #[arg(long, default_value = "1MiB", value_name = "BYTES", value_parser = bytes)]
    pub(crate) chunk: u64,
    #[command(flatten)]
    pub(crate) engine: Engine,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The file; a folder or an index stands for all files of a model.
    pub(crate) path: PathBuf,
    /// What its bytes are taken for: auto, safetensors, gguf, raw.
    #[arg(long, default_value = "auto")]
    pub(crate) format: Format,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The socket, which appears when the files are loaded; one that no process listens at any more is replaced.
    pub(crate) socket: PathBuf,
    /// The files; a folder or an index stands for all files of a model.
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    /// The name that the memory is asked for by.
    #[arg(long, default_value = "model")]
    pub(crate) name: String,
    /// Let this user attach, too, by its number; may be repeated. Without, only your own may.
    ///
    /// In a user namespace, users that are not mapped all appear as the overflow id, usually 65534: to allow that is to allow all of
    /// them.
    #[arg(long = "allow-user", value_name = "UID")]
    pub(crate) allow_users: Vec<u32>,
    /// Hand out dma-bufs, which whoever has them can WRITE to, instead of sealed memory files; takes --dma-buf.
    #[arg(long, requires = "dma_buf")]
    pub(crate) share_dma_bufs: bool,
    #[command(flatten)]
    pub(crate) engine: Engine,
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// The socket.
    pub(crate) socket: PathBuf,
    /// The name of what is asked for; needed where the server has several.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Trust a server of this user, by its number, besides your own and root's; may be repeated.
    ///
    /// In a user namespace, users that are not mapped all appear as the overflow id, usually 65534: to trust that is to trust all of
    /// them.
    #[arg(long = "trust-user", value_name = "UID")]
    pub(crate) trust_users: Vec<u32>,
    /// Compute this digest of each file, from the mapped memory: sha256, blake3, crc32c, xxh3.
    #[arg(long, value_name = "ALGORITHM")]
    pub(crate) digest: Option<Algorithm>,
    /// Print one JSON object, and nothing else, on standard output.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// A file to be loaded, or the folder of such files.
    pub(crate) path: Option<PathBuf>,
    /// Print one JSON object, and nothing else, on standard output.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// The size of the model.
    #[arg(long, default_value = "1GiB", value_parser = bytes)]
    pub(crate) size: u64,
    /// The folder for it; by default one on a disk, not in memory.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// How often each way is measured; the median counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// The files; several are one load.
    #[arg(value_name = "PATH", required_unless_present = "size", conflicts_with = "size")]
    pub(crate) paths: Vec<PathBuf>,
    /// Make a file of random weights of this size, and remove it afterwards.
    #[arg(long, value_parser = bytes)]
    pub(crate) size: Option<u64>,
    /// The folder for files that are made; by default one on a disk, not in memory.
    #[arg(long)]
    pub(crate) dir: Option<PathBuf>,
    /// What is compared, by names with commas between; normal and limit always are [default: all].
    ///
    /// normal, normal_io, direct_io, direct_io_check, limit, mmap, tokio-fs, pread-direct, no-overlap; reuse, swap, at-once
    /// and verify where they are asked for: see docs/cli.md.
    #[arg(long, value_name = "MODES", value_delimiter = ',')]
    pub(crate) modes: Vec<Mode>,
    /// Another program to compare with, run by the shell with the paths as arguments; may be repeated: see docs/cli.md.
    #[arg(long = "peer", value_name = "NAME=COMMAND", value_parser = Mode::peer)]
    pub(crate) peers: Vec<Mode>,
    /// How often each mode is measured; the medians count.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Let memory be short: cgroup:SIZE, cgroup:SIZE,clean, cgroup:SIZE,dirty, hog:SIZE, hog:all-but:SIZE.
    #[arg(long)]
    pub(crate) pressure: Option<Pressure>,
    /// Have the files in the page cache before each run, instead of making sure that they are not.
    #[arg(long, conflicts_with = "pressure")]
    pub(crate) warm: bool,
    /// Measure all modes but limit as this user, who may lock 8 MiB of memory; takes root.
    #[arg(long, value_name = "UID")]
    pub(crate) user: Option<u32>,
    /// Print one JSON object, and nothing else, on standard output.
    #[arg(long, conflicts_with = "md")]
    pub(crate) json: bool,
    /// Print a Markdown table.
    #[arg(long)]
    pub(crate) md: bool,
    /// Write a picture of it to this file, an SVG.
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: Engine,
}

/// What `bench` starts.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchChild {
    /// Measures one run.
    Load {
        #[arg(long)]
        mode: Mode,
        /// The file that `bench` made.
        #[arg(long)]
        scratch: Option<PathBuf>,
        #[command(flatten)]
        bench: Box<Bench>,
    },
    /// Takes memory.
    Hog { bytes: u64 },
    /// Fills page cache.
    Fill {
        bytes: u64,
        path: PathBuf,
        #[arg(long)]
        dirty: bool,
    },
}

/// How to load.
#[derive(Debug, Args)]
pub(crate) struct Engine {
    /// Where memory comes from: auto, memfd, anon, udmabuf, dma-heap:NAME.
    #[arg(long, default_value = "auto")]
    pub(crate) heap: HeapName,
    /// Require dma-bufs: with --heap auto, udmabuf, else the dma-heap system.
    #[arg(long)]
    pub(crate) dma_buf: bool,
    /// The page size: auto takes 2 MiB pages wherever they can be had, 2m fails without them.
    #[arg(long, default_value = "auto")]
    pub(crate) pages: PageChoice,
    /// Allow 2 MiB pages in a udmabuf on Linux 6.11 to 6.15, where drivers that map it see WRONG BYTES.
    #[arg(long)]
    pub(crate) despite_udmabuf_bug: bool,
    /// How files are spread over segments: segmented, single, tensors (cut between tensors).
    #[arg(long, default_value = "segmented")]
    pub(crate) layout: Layout,
    /// Give each small file a memory of its own, where several share one otherwise
    #[arg(long)]
    pub(crate) no_pack: bool,
    /// The size of a segment: a multiple of 2 MiB, at most 1 GiB [default: 64MiB, or less where the heap gives less].
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) segment_size: Option<u64>,
    /// The most memory that is allocated and not yet filled: at least a segment.
    #[arg(long, default_value = "128MiB", value_name = "BYTES", value_parser = bytes)]
    pub(crate) window: u64,
    /// The most memory that segments may have at once, those that are being filled and those that are still in use: a load that
    /// needs more fails before it reads, and `cat` goes on within it [default: no limit].
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) memory_limit: Option<u64>,
    /// The size of one read: a multiple of 64 KiB.
    #[arg(long, default_value = "2MiB", value_name = "BYTES", value_parser = bytes)]
    pub(crate) chunk_size: u64,
    /// Reads in flight at once.
    #[arg(long, default_value_t = dmaload::LoaderBuilder::QUEUE_DEPTH, value_name = "READS")]
    pub(crate) queue_depth: usize,
    /// The most memory that reads are staged in by the route bounce [default: 16MiB, and 4MiB for each thread that copies
    /// besides the first two].
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) staging: Option<u64>,
    /// The route to start at: auto, uring-fixed-direct, uring-direct, pread-direct, bounce, buffered. auto is the faster one
    /// of direct and staged reads (bounce), which large loads find out.
    #[arg(long, default_value = "auto")]
    pub(crate) route: RouteChoice,
    /// What matters where the route is left open: speed, or cpu, which reads directly and copies nothing.
    #[arg(long, default_value = "speed", value_name = "speed|cpu")]
    pub(crate) prefer: Prefer,
    /// Fail rather than take a lower route than the one to start at.
    #[arg(long)]
    pub(crate) strict: bool,
    /// What the page cache has: auto copies it from there, bypass reads all from storage [default: auto; bypass with --strict
    /// and for bench].
    #[arg(long)]
    pub(crate) cache: Option<Cache>,
    /// What the files' bytes are taken for: auto, safetensors, gguf, raw.
    #[arg(long, default_value = "auto")]
    pub(crate) format: Format,
    /// Load what is there of models of which files are missing, rather than fail.
    #[arg(long)]
    pub(crate) allow_missing: bool,
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

/// A heap by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HeapName {
    Auto,
    Memfd,
    Anon,
    Udmabuf,
    DmaHeap(String),
}

impl FromStr for HeapName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match (name, name.strip_prefix("dma-heap:")) {
            ("auto", _) => Ok(HeapName::Auto),
            ("memfd", _) => Ok(HeapName::Memfd),
            ("anon", _) => Ok(HeapName::Anon),
            ("udmabuf", _) => Ok(HeapName::Udmabuf),
            (_, Some(heap)) if !heap.is_empty() => Ok(HeapName::DmaHeap(heap.to_owned())),
            _ => Err(format!("no such heap: {name:?}; the heaps are auto, memfd, anon, udmabuf, dma-heap:NAME")),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PageChoice {
    Auto,
    #[value(name = "4k")]
    Small,
    #[value(name = "2m")]
    Huge,
}

impl From<PageChoice> for Pages {
    fn from(choice: PageChoice) -> Self {
        match choice {
            PageChoice::Auto => Pages::Auto,
            PageChoice::Small => Pages::Small,
            PageChoice::Huge => Pages::Huge,
        }
    }
}

/// A route, or the faster one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RouteChoice(pub(crate) Option<Route>);

impl FromStr for RouteChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(RouteChoice(None)),
            name => name.parse().map(|route| RouteChoice(Some(route))),
        }
    }
}

fn range(text: &str) -> Result<(u64, u64), String> {
    let parsed = text.split_once("..").and_then(|(start, end)| Some((bytes(start).ok()?, bytes(end).ok()?)));
    parsed.filter(|(start, end)| start < end).ok_or_else(|| format!("{text:?} is no range of bytes; write it like 1MiB..2MiB"))
}

fn bytes(text: &str) -> Result<u64, String> {
    text.parse::<ByteSize>().map(|size| size.as_u64()).map_err(|_| format!("{text:?} is no size; write it like 64MiB or 1GiB"))
}

#[cfg(test)]
mod tests {
    use dmaload::LoaderBuilder;
    use proptest::prelude::*;

    use super::*;
    use crate::bench::{Mode, Pressure};

    /// What arguments are made of, and anything else.
    const TEXT: &str = "(sha256|crc32c|blake3|cgroup|hog|all-but|dma-heap|clean|dirty|auto|normal|:|=|,|-|\\.|/|e|[0-9a-fA-F]{1,64}|[KMGTPE]i?B|\\PC){0,8}";

    #[test]
    fn the_command_loads_as_the_library_does() {
        let arguments = Arguments::parse_from(["dmaload", "load", "model"]);
        let Command::Load(Load { engine, .. }) = arguments.command else { panic!("that is load") };
        let library = (LoaderBuilder::WINDOW_BYTES, LoaderBuilder::QUEUE_DEPTH, None);
        assert_eq!((engine.window, engine.queue_depth, engine.staging), library);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2048))]

        #[test]
        fn no_argument_panics_and_what_is_refused_is_said_with_what_was_given(text in TEXT) {
            fn told<T>(text: &str, read: Result<T, String>) {
                if let Err(error) = read {
                    let told = error.contains(&format!("{text:?}")) || error.contains("digits") || error.contains("checksum");
                    assert!(told, "{text:?}: {error}");
                }
            }
            told(&text, bytes(&text));
            told(&text, range(&text));
            told(&text, text.parse::<HeapName>());
            told(&text, text.parse::<RouteChoice>());
            told(&text, text.parse::<Rank>());
            told(&text, text.parse::<Against>());
            told(&text, text.parse::<Mode>());
            told(&text, text.parse::<Pressure>());
            told(&text, Mode::peer(&text));
        }
    }
}
