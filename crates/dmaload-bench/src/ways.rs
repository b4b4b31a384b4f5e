//! Prepares and runs each mode once.
//!
//! Preparation covers what a process needs only once, no matter how much it loads: the engine's
//! threads and ring, the memory in the pool, a manifest, and the buffers that `limit` reads into.
//! Timing begins just before files are opened or memory is allocated, and ends when the last byte
//! is in memory.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dmabuf::{Errno, Pages, page_bytes, printable};
use dmaload::heap::{AnonHeap, Heap, MemfdHeap};
use dmaload::verify::{Algorithm, Manifest, Recorder};
use dmaload::{Image, LoadOptions, Loader, Route};
use dmaload_text::ForPath;
use rustix::thread::disable_transparent_huge_pages;

use crate::compare::compare;
use crate::curves::Curves;
use crate::engine::{Engine, block_on};
use crate::limit::{self, DESTINATIONS, Into, LARGEST};
use crate::memory::{PART_BYTES, Region, page_bytes_of};
use crate::mode::Mode;
use crate::results::{Apart, ReadInto, Run};
use crate::sys::{self, Reader};
use crate::usage::{cpu_time, peak_resident_bytes};
use crate::{baseline, mapping};

/// Loaded bytes differ from the file. Unlike other failures, this is never acceptable.
#[derive(Debug, thiserror::Error)]
#[error("{} differs between memory and disk: {what}", printable::path(&path))]
pub(crate) struct WrongBytes {
    path: PathBuf,
    what: String,
}

/// A prepared run.
pub(crate) type Ready = Box<dyn FnOnce() -> Result<Run>>;

/// Prepares a mode. With `curves`, `direct_io` and `direct_io_check` record their progress over
/// time.
///
/// # Errors
/// If this machine lacks something that the mode needs, or a file can't be inspected.
pub(crate) fn prepare(mode: Mode, engine: &dyn Engine, paths: Vec<PathBuf>, curves: bool) -> Result<Ready> {
    let files = Files::open(paths)?;
    Ok(match mode {
        Mode::Normal => {
            disable_huge_pages()?;
            Box::new(move || run_normal(&files))
        }
        Mode::NormalIo => {
            if matches!(engine.pages(), Pages::Small) {
                disable_huge_pages()?;
            }
            let populate = matches!(engine.pages(), Pages::Huge);
            Box::new(move || run_normal_io(&files, populate))
        }
        Mode::DirectIo | Mode::DirectIoCheck => {
            let loader = engine.loader()?;
            let check = mode == Mode::DirectIoCheck;
            Box::new(move || run_engine(&loader, &files, loader.load_options().trace(curves), check))
        }
        Mode::Reuse => {
            let loader = engine.loader_with_pool()?;
            drop(block_on(loader.load(&files.paths).into_future())??);
            Box::new(move || run_engine(&loader, &files, loader.load_options(), false))
        }
        Mode::Swap => {
            let loader = engine.loader_with_pool()?;
            let load = || block_on(loader.load(&files.paths).into_future());
            let (before, served) = (load()??, load()??);
            drop(before);
            Box::new(move || {
                let run = run_engine(&loader, &files, loader.load_options(), false);
                drop(served);
                run
            })
        }
        Mode::Verify => {
            let recorder = Recorder::new(Algorithm::Crc32c, Manifest::LARGEST_CHUNK_BYTES);
            let manifest = Arc::new(engine.manifest(&files.paths, recorder)?);
            let loader = engine.loader()?;
            Box::new(move || run_engine(&loader, &files, loader.load_options().verify(manifest), false))
        }
        Mode::AtOnce => {
            let loader = engine.loader()?;
            Box::new(move || run_at_once(&loader, &files))
        }
        Mode::PreadDirect => {
            let loader = engine.loader_by(Route::PreadDirect)?;
            Box::new(move || run_engine(&loader, &files, loader.load_options(), false))
        }
        Mode::Limit => {
            let (mut reader, notes) = limit_reader()?;
            let open = limit::open(&files.paths)?;
            let (chunks, _) = limit::plan(&files.lengths, PART_BYTES, LARGEST.chunk_bytes);
            // Fill the buffers once, or as many of them as the files can fill, because the first
            // read into memory that no device has written to is slow.
            let first = chunks.get(..LARGEST.depth.min(chunks.len())).unwrap_or(&chunks);
            limit::read_all(&mut reader, &open, &files.paths, first, Into::Slots(LARGEST))?;
            drop(open);
            Box::new(move || run_limit(reader, &files, notes))
        }
        Mode::Peer(peer) => bail!("{} is another program", peer.name),
        Mode::Mmap => Box::new(move || run_mmap(&files)),
        Mode::TokioFs => Box::new(move || run_tokio(&files)),
        Mode::NoOverlap => {
            let heap = engine.heap()?;
            Box::new(move || run_no_overlap(&heap, &files))
        }
    })
}

/// The files to load, with their lengths.
#[derive(Debug)]
struct Files {
    paths: Vec<PathBuf>,
    lengths: Vec<u64>,
}

impl Files {
    fn open(paths: Vec<PathBuf>) -> Result<Self> {
        let mut files = Files { paths: Vec::new(), lengths: Vec::new() };
        for path in paths {
            let length = fs::metadata(&path).for_path("stat", &path)?.len();
            // An empty file can't be mapped, and takes no time to load.
            if length > 0 {
                files.paths.push(path);
                files.lengths.push(length);
            }
        }
        Ok(files)
    }

    fn bytes(&self) -> u64 {
        self.lengths.iter().sum()
    }

    fn iter(&self) -> impl Iterator<Item = (&Path, u64)> {
        self.paths.iter().map(PathBuf::as_path).zip(self.lengths.iter().copied())
    }
}

/// Measures elapsed time and CPU time since it was started.
struct Stopwatch {
    start: Instant,
    cpu: Duration,
}

impl Stopwatch {
    fn start() -> Self {
        Stopwatch { cpu: cpu_time(), start: Instant::now() }
    }

    fn stop(&self, files: &Files) -> Run {
        let seconds = self.start.elapsed().as_secs_f64();
        let cpu_seconds = cpu_time().saturating_sub(self.cpu).as_secs_f64();
        let peak_extra_bytes = peak_resident_bytes().map(|peak| peak.saturating_sub(files.bytes()));
        Run { seconds, cpu_seconds, peak_extra_bytes, page_bytes: page_bytes() as u64, ..Run::default() }
    }
}

/// Disables huge pages for this process, regardless of the machine's settings.
fn disable_huge_pages() -> Result<()> {
    disable_transparent_huge_pages(true).context("cannot disable huge pages")
}

fn run_normal(files: &Files) -> Result<Run> {
    let watch = Stopwatch::start();
    let loaded: Vec<_> = files.paths.iter().map(|path| baseline::load(path)).collect::<Result<_, _>>()?;
    let run = watch.stop(files);
    // This sum excludes the time that unmapping the files takes.
    let seconds = loaded.iter().map(|loaded| loaded.elapsed.as_secs_f64()).sum();
    let page_bytes = loaded.first().map_or(run.page_bytes, |loaded| page_bytes_of_slice(&loaded.memory));
    Ok(Run { seconds, page_bytes, ..run })
}

fn run_normal_io(files: &Files, populate: bool) -> Result<Run> {
    let heap = MemfdHeap { pages: Pages::Huge };
    let watch = Stopwatch::start();
    let mut loaded = Vec::new();
    for (path, length) in files.iter() {
        let mut file = File::open(path).for_path("open", path)?;
        let length = usize::try_from(length)?;
        let mut region = Region::allocate(&heap, length)?;
        if populate {
            region.populate(&heap)?;
        }
        let memory = sys::bytes_mut(&mut region).get_mut(..length).context("the memory is shorter than the file")?;
        file.read_exact(memory).for_path("read", path)?;
        loaded.push(region);
    }
    let run = watch.stop(files);
    let page_bytes = loaded.first().map_or(run.page_bytes, Region::page_bytes);
    Ok(Run { page_bytes, ..run })
}

fn run_engine(loader: &Loader, files: &Files, options: LoadOptions, check: bool) -> Result<Run> {
    let watch = Stopwatch::start();
    let load = loader.load(&files.paths).options(options).start();
    let image = block_on(load.finish())??;
    let run = watch.stop(files);
    if check {
        verify(&image)?;
    }
    let report = image.report();
    let mut notes = vec![format!("by {}", report.route)];
    notes.extend(report.pages_refused.map(|errno| format!("some memory is not on 2 MiB pages: {}", errno.describe())));
    if report.reused_bytes > 0 {
        notes.push(format!("{} in pooled memory", dmaload_text::bytes(report.reused_bytes)));
    }
    Ok(Run {
        page_bytes: report.page_size_bytes() as u64,
        first_segment_seconds: report.first_segment.map(|first| first.as_secs_f64()),
        curves: (!report.trace.is_empty()).then(|| Curves::from_report(report)),
        notes,
        ..run
    })
}

/// Loads all files at the same time, each in a separate load. Reports when the first segment of
/// any load was usable.
fn run_at_once(loader: &Loader, files: &Files) -> Result<Run> {
    let watch = Stopwatch::start();
    let loads: Vec<_> = files.paths.iter().map(|path| loader.load(path).start()).collect();
    let images = block_on(async {
        let mut images = Vec::new();
        for load in loads {
            images.push(load.finish().await?);
        }
        Ok::<_, dmaload::Error>(images)
    })??;
    let run = watch.stop(files);
    let reports = || images.iter().map(Image::report);
    let slowest = reports().map(|report| report.route).max().map(|route| format!("{} loads, by {route}", images.len()));
    Ok(Run {
        page_bytes: reports().map(|report| report.page_size_bytes() as u64).min().unwrap_or(run.page_bytes),
        first_segment_seconds: reports().filter_map(|report| report.first_segment).min().map(|first| first.as_secs_f64()),
        notes: slowest.into_iter().collect(),
        ..run
    })
}

fn verify(image: &Image) -> Result<()> {
    for loaded in image.files() {
        let path = loaded.path();
        let file = File::open(path).for_path("open", path)?;
        compare(file, &loaded.bytes()?).map_err(|what| WrongBytes { path: path.to_owned(), what: what.to_string() })?;
    }
    Ok(())
}

fn limit_reader() -> Result<(Reader, Vec<String>)> {
    let bytes = LARGEST.bytes();
    let mut notes = Vec::new();
    let huge: Arc<dyn Heap> = Arc::new(AnonHeap { pages: Pages::Huge });
    let region = match Region::populated(&huge, bytes) {
        Ok(region) => region,
        Err(refused) => {
            notes.push(format!("the buffers are not on 2 MiB pages: {refused}"));
            let any: Arc<dyn Heap> = Arc::new(AnonHeap { pages: Pages::Auto });
            Region::populated(&any, bytes)?
        }
    };
    let reader = Reader::new(u32::try_from(LARGEST.depth)?, region)
        .context("io_uring is not available, so the device's limit is unknown")?;
    notes.extend(reader.registration_error().map(note_unregistered));
    Ok((reader, notes))
}

fn note_unregistered(error: &io::Error) -> String {
    let errno = Errno::from_io_error(error);
    let reason = errno.map_or_else(|| error.to_string(), Errno::describe);
    let hint = if errno == Some(Errno::ENOMEM) { ": the locked memory limit (ulimit -l) may be below 64 MiB" } else { "" };
    format!("the buffers are not registered: {reason}{hint}")
}

/// Reads the files once into each destination. After all rounds, the destination with the best
/// median is chosen as the limit.
fn run_limit(mut reader: Reader, files: &Files, notes: Vec<String>) -> Result<Run> {
    let mut destinations = Vec::new();
    for destination in DESTINATIONS {
        let watch = Stopwatch::start();
        let open = limit::open(&files.paths)?;
        let (chunks, _) = limit::plan(&files.lengths, PART_BYTES, destination.chunk_bytes);
        limit::read_all(&mut reader, &open, &files.paths, &chunks, Into::Slots(destination))?;
        let Run { seconds, cpu_seconds, .. } = watch.stop(files);
        destinations.push(ReadInto { bytes: destination.bytes() as u64, seconds, cpu_seconds });
    }
    let region = reader.into_region().context("cannot wait for the last reads")?;
    // This mode does not keep the files in memory, so it reports no extra peak memory.
    let run = Run { page_bytes: region.page_bytes(), notes, destinations, ..Run::default() };
    Ok(run)
}

fn run_mmap(files: &Files) -> Result<Run> {
    let watch = Stopwatch::start();
    let mut loaded = Vec::new();
    for path in &files.paths {
        let file = File::open(path).for_path("open", path)?;
        let mapping = mapping::map_file(&file).for_path("map", path)?;
        let touched: u64 = mapping.iter().step_by(page_bytes()).map(|&byte| u64::from(byte)).sum();
        black_box(touched);
        loaded.push(mapping);
    }
    let run = watch.stop(files);
    let page_bytes = loaded.first().map_or(run.page_bytes, |loaded| page_bytes_of_slice(loaded));
    Ok(Run { page_bytes, ..run })
}

fn run_tokio(files: &Files) -> Result<Run> {
    let watch = Stopwatch::start();
    let loaded: Vec<Vec<u8>> = block_on(async {
        let mut loaded = Vec::new();
        for path in &files.paths {
            loaded.push(tokio::fs::read(path).await.for_path("read", path)?);
        }
        anyhow::Ok(loaded)
    })??;
    let run = watch.stop(files);
    let page_bytes = loaded.first().map_or(run.page_bytes, |loaded| page_bytes_of_slice(loaded));
    Ok(Run { page_bytes, ..run })
}

fn run_no_overlap(heap: &Arc<dyn Heap>, files: &Files) -> Result<Run> {
    let watch = Stopwatch::start();
    let (_, bytes) = limit::plan(&files.lengths, PART_BYTES, LARGEST.chunk_bytes);
    let region = Region::populated(heap, bytes)?;
    let allocate_seconds = watch.start.elapsed().as_secs_f64();
    let (chunks, _) = limit::plan(&files.lengths, region.part_bytes(), LARGEST.chunk_bytes);
    let mut reader = Reader::new(u32::try_from(LARGEST.depth)?, region).context("io_uring is not available")?;
    let open = limit::open(&files.paths)?;
    limit::read_all(&mut reader, &open, &files.paths, &chunks, Into::Places)?;
    let run = watch.stop(files);
    let region = reader.into_region().context("cannot wait for reads")?;
    let apart = Apart { allocate_seconds, read_seconds: run.seconds - allocate_seconds };
    Ok(Run { page_bytes: region.page_bytes(), apart: Some(apart), ..run })
}

fn page_bytes_of_slice(memory: &[u8]) -> u64 {
    let start = memory.as_ptr().addr();
    page_bytes_of(start..start + memory.len())
}
