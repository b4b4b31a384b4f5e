//! Creates loaders from the command line's options.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use dmabuf::Pages;
use dmaload::heap::{Heap, HeapChoice, UdmabufHeap};
use dmaload::{Cache, Error, Format, Layout, LoadOptions, Loader, LoaderBuilder, Prefer, Result, Route};

use crate::{errors, parse};

/// The maximum number of open loads if `--memory-limit` is set. The library divides the limit by
/// this number to bound the size of a segment.
const MEMORY_PARTS: usize = 4;

/// Options for a loader and its loads.
#[derive(Debug, Args)]
pub(crate) struct EngineArguments {
    /// The heap to allocate from: auto, memfd, anon, udmabuf, dma-heap:NAME.
    #[arg(long, default_value = "auto", value_parser = heap_choice)]
    pub(crate) heap: HeapChoice,
    /// Require dma-bufs. With --heap auto, allocate them from udmabuf or, if that is unavailable,
    /// from the dma-heap named system.
    #[arg(long)]
    pub(crate) dma_buf: bool,
    /// The page size: auto uses 2 MiB pages where available, 2m fails without them.
    #[arg(long, default_value = "auto")]
    pub(crate) pages: PageChoice,
    /// Allow 2 MiB pages in a udmabuf on Linux 6.11 to 6.15, where drivers that map it see WRONG
    /// BYTES.
    #[arg(long)]
    pub(crate) despite_udmabuf_bug: bool,
    /// How files are divided into segments: segmented, single, tensors (cut between tensors).
    #[arg(long, default_value = "segmented")]
    pub(crate) layout: Layout,
    /// Allocate memory for each small file separately, instead of sharing memory among several
    /// files.
    #[arg(long)]
    pub(crate) no_pack: bool,
    /// The size of a segment: a multiple of 2 MiB, at most 1 GiB [default: 64MiB; smaller or
    /// larger if a limit on the heap, memory or open files requires it].
    #[arg(long, value_name = "BYTES", value_parser = parse::bytes)]
    pub(crate) segment_size: Option<u64>,
    /// Maximum memory that is allocated but not yet filled: at least a segment [default: 128MiB].
    #[arg(long, value_name = "BYTES", value_parser = parse::bytes)]
    pub(crate) window: Option<u64>,
    /// Maximum memory that segments may occupy at once, including those that are still being
    /// filled. A load that needs more fails before it reads anything; `cat` stays within the limit
    /// [default: no limit].
    #[arg(long, value_name = "BYTES", value_parser = parse::bytes)]
    pub(crate) memory_limit: Option<u64>,
    /// The size of one read: a multiple of 64 KiB [default: 2MiB].
    #[arg(long, value_name = "BYTES", value_parser = parse::bytes)]
    pub(crate) chunk_size: Option<u64>,
    /// Maximum number of reads in flight.
    #[arg(long, default_value_t = dmaload::LoaderBuilder::QUEUE_DEPTH, value_name = "READS")]
    pub(crate) queue_depth: usize,
    /// Maximum memory for the staging buffers of the bounce route [default: 16MiB, plus 4MiB for
    /// each copier thread after the first two].
    #[arg(long, value_name = "BYTES", value_parser = parse::bytes)]
    pub(crate) staging: Option<u64>,
    /// The route to start with: auto, uring-fixed-direct, uring-direct, pread-direct, bounce,
    /// uring-buffered, buffered. auto uses the fastest of direct reads, staged reads (bounce) and,
    /// on network file systems, buffered reads; it measures them during large loads.
    #[arg(long, default_value = "auto")]
    pub(crate) route: RouteChoice,
    /// What to optimize for if no route is set: speed, or cpu, which saves CPU time by using
    /// direct reads without copies.
    #[arg(long, default_value = "speed", value_name = "speed|cpu")]
    pub(crate) prefer: Prefer,
    /// Fail if the starting route is refused, instead of falling back to another.
    #[arg(long)]
    pub(crate) strict: bool,
    /// Whether to use the page cache: auto copies cached chunks from it, bypass reads everything
    /// from storage [default: auto; bypass with --strict and for bench].
    #[arg(long)]
    pub(crate) cache: Option<Cache>,
    /// How to interpret the files' bytes: auto, safetensors, gguf, raw.
    #[arg(long, default_value = "auto")]
    pub(crate) format: Format,
    /// If some files of a model are missing, load the files that exist instead of failing.
    #[arg(long)]
    pub(crate) allow_missing: bool,
}

/// Parses `--heap`. Rejects `dma-buf`, which the library accepts as the name of a heap, because
/// the command has the `--dma-buf` flag for it.
pub(crate) fn heap_choice(name: &str) -> std::result::Result<HeapChoice, String> {
    match name.parse() {
        Err(_) | Ok(HeapChoice::DmaBuf) => {
            Err(format!("unknown heap {name:?}: the heaps are auto, memfd, anon, udmabuf, dma-heap:NAME"))
        }
        choice => choice,
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

/// A route, or `None` for auto.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RouteChoice(pub(crate) Option<Route>);

impl FromStr for RouteChoice {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "auto" => Ok(RouteChoice(None)),
            name => name.parse().map(|route| RouteChoice(Some(route))),
        }
    }
}

/// Creates the loader that the command line describes.
pub(crate) fn loader(arguments: &EngineArguments) -> Result<Loader> {
    builder(arguments, arguments.route.0, arguments.strict)?.build()
}

/// Like [`loader`], but an error from the heap names the files to load. An error from starting the
/// loader does not, because it is unrelated to them.
pub(crate) fn loader_for(arguments: &EngineArguments, paths: &[PathBuf]) -> anyhow::Result<Loader> {
    let builder = builder(arguments, arguments.route.0, arguments.strict);
    Ok(builder.map_err(|error| errors::with_files(error, paths))?.build()?)
}

/// Like [`loader`], but uses the given `route` and `strict` instead of those in `arguments`.
pub(crate) fn loader_by(arguments: &EngineArguments, route: Route, strict: bool) -> Result<Loader> {
    builder(arguments, Some(route), strict)?.build()
}

/// Like [`loader`], but the pool keeps any amount of memory for later loads.
pub(crate) fn loader_with_pool(arguments: &EngineArguments) -> Result<Loader> {
    builder(arguments, arguments.route.0, arguments.strict)?.pool_bytes(u64::MAX).build()
}

fn builder(arguments: &EngineArguments, route: Option<Route>, strict: bool) -> Result<LoaderBuilder> {
    let mut options = LoadOptions::new()
        .layout(arguments.layout)
        .packed(!arguments.no_pack)
        .prefer(arguments.prefer)
        .strict(strict)
        .format(arguments.format)
        .allow_missing(arguments.allow_missing);
    if let Some(route) = route {
        options = options.route(route);
    }
    if let Some(cache) = arguments.cache {
        options = options.cache(cache);
    }
    if let Some(bytes) = arguments.chunk_size {
        options = options.chunk_bytes(bytes);
    }
    if let Some(bytes) = arguments.segment_size {
        options = options.segment_bytes(bytes);
    }
    let mut builder = Loader::builder().queue_depth(arguments.queue_depth).dma_buf(arguments.dma_buf).load_options(options);
    if let Some(bytes) = arguments.window {
        builder = builder.window_bytes(bytes);
    }
    if let Some(bytes) = arguments.staging {
        builder = builder.staging_bytes(bytes);
    }
    if let Some(bytes) = arguments.memory_limit {
        // The command runs one load at a time, so its segments may be larger than the library's
        // default of 64 open loads allows.
        builder = builder.memory_limit_bytes(bytes).max_open_loads(MEMORY_PARTS);
    }
    let (heap, reason) = heap(arguments)?;
    if let Some(reason) = reason {
        builder = builder.note(reason);
    }
    Ok(builder.heap(heap))
}

/// Opens the heap. Also returns why it was chosen, if the user did not choose it.
pub(crate) fn heap(arguments: &EngineArguments) -> Result<(Arc<dyn Heap>, Option<String>)> {
    let pages: Pages = arguments.pages.into();
    let choice = match &arguments.heap {
        HeapChoice::Auto if arguments.dma_buf => HeapChoice::DmaBuf,
        named => named.clone(),
    };
    if !arguments.despite_udmabuf_bug {
        return choice.open(pages);
    }
    if !matches!(choice, HeapChoice::DmaBuf | HeapChoice::Udmabuf) {
        return Err(Error::Config("--despite-udmabuf-bug requires the udmabuf heap".to_owned()));
    }
    Ok((Arc::new(UdmabufHeap::open_despite_bug(pages)?), None))
}

/// Runs a future to completion. One thread is enough: the loader has its own threads.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(future))
}
