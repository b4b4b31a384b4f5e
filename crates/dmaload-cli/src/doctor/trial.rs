//! Loads a small file of random bytes into each heap, to show how other loads would work.

use std::env;
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use dmabuf::{Pages, Udmabuf, printable};
use dmaload::heap::{Heap, HeapChoice};
use dmaload::{Attempt, Cache, Errno, ErrorKind, Format, Loader, Route, probe};
use dmaload_bench::scratch::ScratchFile;
use dmaload_bench::{fill_with_noise, first_difference};
use dmaload_text::{ForPath, Named};

use crate::engine::block_on;
use crate::errors;
use crate::progress::finish;

/// The length of the trial file, unless the file size limit is smaller. 4 MiB fills two huge
/// pages, and fits under an ordinary user's locked memory limit of 8 MiB.
const BYTES_MAX: u64 = 4 << 20;
/// The name of the row that reports the absence of dma-heaps, and the prefix of the names of all
/// dma-heaps.
pub(crate) const DMA_HEAP: &str = "dma-heap";

/// The results of the trial loads.
#[derive(Debug, Clone)]
pub(crate) struct Trial {
    /// The folder that contains the trial file, or why no folder could be used.
    pub(crate) folder: Result<PathBuf, String>,
    /// The length of the trial file.
    pub(crate) bytes: u64,
    /// Why the trial file is not in the requested folder; `None` if it is, or if no folder was
    /// requested.
    pub(crate) elsewhere: Option<String>,
    /// The results of probing the trial file, if it could be probed.
    pub(crate) file: Option<probe::File>,
    pub(crate) heaps: Vec<HeapTrial>,
}

/// The result for one heap.
#[derive(Debug, Clone)]
pub(crate) struct HeapTrial {
    pub(crate) name: String,
    pub(crate) outcome: Result<Loaded, String>,
    /// The path of the device and the errno, if the device could not be opened.
    pub(crate) device: Option<(PathBuf, Errno)>,
    /// Maximum size of a dma-buf in bytes.
    pub(crate) limit_bytes: Option<u64>,
    /// Maximum number of memfds joined into one dma-buf.
    pub(crate) limit_parts: Option<u64>,
}

/// A load that worked and returned the right bytes.
#[derive(Debug, Clone)]
pub(crate) struct Loaded {
    pub(crate) route: Route,
    /// The page size of the memory in bytes; `None` if the kernel does not report it.
    pub(crate) page_bytes: Option<u64>,
    pub(crate) pages_refused: Option<Errno>,
    pub(crate) steps: Vec<Step>,
}

/// A fallback from one route to the next, slower one.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) from: Route,
    pub(crate) to: Route,
    pub(crate) attempt: Attempt,
    pub(crate) reason: String,
    pub(crate) errno: Errno,
}

impl Trial {
    /// Writes a trial file to the wanted folder, or to another folder if that fails, and loads the
    /// file into each heap. If no folder works, loads a memfd instead, which requires procfs. If
    /// that fails, too, loads the beginning of `file`.
    pub(crate) fn run(wanted: Option<&Path>, file: Option<&Path>) -> Self {
        // Writing more than the limit would kill the process (SIGXFSZ).
        let limit = dmabuf::Limit::FileSize.current().unwrap_or(BYTES_MAX);
        let content = random_bytes(BYTES_MAX.min(limit));
        let bytes = content.len() as u64;
        let mut elsewhere = None;
        let scratch = wanted.and_then(|folder| match write_in(folder, &content) {
            Ok(scratch) => Some(Ok(scratch)),
            Err(error) => {
                elsewhere = Some(errors::describe(&error));
                None
            }
        });
        match scratch.unwrap_or_else(|| write_anywhere(&content)) {
            Ok(scratch) => Trial {
                folder: Ok(scratch.path().parent().unwrap_or(Path::new("/")).to_owned()),
                bytes,
                elsewhere,
                file: probe::file(scratch.path()).ok(),
                heaps: try_heaps(|heap| load_and_compare(heap, scratch.path(), &content)),
            },
            Err(error) => {
                let folder = Err(errors::describe(&error).replace('\n', " "));
                let heaps = match write_memfd(&content) {
                    Ok((_file, path)) => try_heaps(|heap| load_and_compare(heap, &path, &content)),
                    Err(error) => match file.map(read_beginning) {
                        Some(Ok((path, content))) => try_heaps(|heap| load_and_compare(heap, path, &content)),
                        _ => try_heaps(|_| Err(anyhow::anyhow!("not tried: no file could be written: {error}"))),
                    },
                };
                Trial { folder, bytes, elsewhere, file: None, heaps }
            }
        }
    }

    pub(crate) fn heap(&self, name: &str) -> Option<&HeapTrial> {
        self.heaps.iter().find(|heap| heap.name == name)
    }
}

/// Returns random bytes that differ in each run, so that no layer of the storage can have cached
/// them.
fn random_bytes(len: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or_default() / 8 * 8];
    fill_with_noise(&mut bytes, RandomState::new().hash_one(0));
    bytes
}

fn write_in(folder: &Path, content: &[u8]) -> Result<ScratchFile> {
    let folder = fs::canonicalize(folder).for_path("resolve", folder)?;
    write_content(ScratchFile::create_in(&folder, "doctor.bin")?, content)
}

fn write_content(scratch: ScratchFile, content: &[u8]) -> Result<ScratchFile> {
    ensure!(!content.is_empty(), "the file size limit (ulimit -f) is too small for a file");
    scratch.file().write_all(content).for_path("write to", scratch.path())?;
    Ok(scratch)
}

/// Writes a memfd, which needs no folder and exists as long as its descriptor is open. A memfd
/// can't show whether direct reads work.
fn write_memfd(content: &[u8]) -> Result<(File, PathBuf)> {
    let mut file = File::from(rustix::fs::memfd_create("dmaload-doctor", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    fs::metadata(&path).for_path("stat", &path)?;
    Ok((file, path))
}

/// Reads the first [`BYTES_MAX`] bytes of a file through the page cache.
fn read_beginning(path: &Path) -> Result<(&Path, Vec<u8>)> {
    let mut content = Vec::new();
    File::open(path).for_path("open", path)?.take(BYTES_MAX).read_to_end(&mut content).for_path("read", path)?;
    Ok((path, content))
}

/// Writes a file to a disk if possible, otherwise to the folder for temporary files.
fn write_anywhere(content: &[u8]) -> Result<ScratchFile> {
    match ScratchFile::create(None, "doctor.bin", content.len() as u64) {
        Ok(scratch) => write_content(scratch, content),
        Err(refused) => write_in(&env::temp_dir(), content).map_err(|_| refused.into()),
    }
}

fn try_heaps(mut load: impl FnMut(Arc<dyn Heap>) -> Result<Loaded>) -> Vec<HeapTrial> {
    let mut try_heap = |choice: HeapChoice| {
        let heap = choice.open(Pages::Auto);
        let device = heap.as_ref().err().filter(|error| error.kind() == ErrorKind::Device);
        let device = device.and_then(|error| Some((error.path()?.to_owned(), error.errno()?)));
        let loaded = heap.map_err(anyhow::Error::new).and_then(|(heap, _)| load(heap));
        let outcome = loaded.map_err(|error| errors::describe(&error));
        HeapTrial { name: choice.to_string(), outcome, device, limit_bytes: None, limit_parts: None }
    };
    let mut heaps = vec![try_heap(HeapChoice::Memfd), try_heap(HeapChoice::Anon)];
    let limits = Udmabuf::limits();
    let udmabuf = try_heap(HeapChoice::Udmabuf);
    heaps.push(HeapTrial { limit_bytes: limits.size_bytes, limit_parts: limits.list_entries, ..udmabuf });
    let names = dmabuf::DmaHeap::names();
    if names.is_empty() {
        heaps.push(no_dma_heap());
    }
    heaps.extend(names.into_iter().map(|name| try_heap(HeapChoice::DmaHeap(name))));
    heaps
}

fn no_dma_heap() -> HeapTrial {
    let folder = PathBuf::from(dmabuf::DmaHeap::FOLDER);
    let (reason, errno) = match fs::read_dir(&folder) {
        Ok(_) => ("is empty".to_owned(), Errno::ENOENT),
        Err(error) => (Named(&error).to_string(), Errno::from_io_error(&error).unwrap_or(Errno::ENOENT)),
    };
    HeapTrial {
        name: DMA_HEAP.to_owned(),
        outcome: Err(format!("{}: {reason}; a kernel with CONFIG_DMABUF_HEAPS provides dma-heaps", printable::path(&folder))),
        device: Some((folder, errno)),
        limit_bytes: None,
        limit_parts: None,
    }
}

fn load_and_compare(heap: Arc<dyn Heap>, path: &Path, content: &[u8]) -> Result<Loaded> {
    let exports = heap.exports();
    let loader = Loader::builder().heap(heap).build()?;
    // The trial tests routes, so it must not use bytes from the page cache.
    let mut options = loader.load_options().format(Format::Raw).cache(Cache::Bypass);
    // A file that the user named can be longer than `content`, which is only its beginning.
    if fs::metadata(path).is_ok_and(|about| about.len() > content.len() as u64) {
        options = options.range(0..content.len() as u64);
    }
    let image = block_on(finish(loader.load(path).options(options).start(), true))??;
    let mut compared = 0;
    for segment in image.segments() {
        let bytes = segment.bytes()?;
        let expected = content.get(compared..compared + bytes.len()).context("more bytes were loaded than written")?;
        if let Some(wrong) = first_difference(&bytes, expected) {
            anyhow::bail!("WRONG BYTES were loaded: the first at offset {}", compared + wrong);
        }
        ensure!(segment.has_dma_buf() == exports, "a segment has no dma-buf, or one that its heap should not export");
        compared += bytes.len();
    }
    ensure!(compared == content.len(), "{compared} of {} bytes were loaded", content.len());
    let report = image.report();
    let steps = report.fallbacks.iter().map(|fallback| Step {
        from: fallback.from,
        to: fallback.to,
        attempt: fallback.attempt,
        reason: fallback.reason(),
        errno: fallback.errno,
    });
    Ok(Loaded {
        route: report.route,
        page_bytes: (report.pages.seen_bytes > 0).then(|| report.page_size_bytes() as u64),
        pages_refused: report.pages_refused,
        steps: steps.collect(),
    })
}
