//! What the suites share: files on the guest's disk, loads, and a look at a dma-buf through its own mapping.
#![allow(dead_code, unreachable_pub, reason = "each suite uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a suite that can't make its file has failed")]
#![allow(unsafe_code, reason = "a mapping of a dma-buf is shown as a slice")]

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dmabuf::{Access, AddressRange, DmaBuf, Memory, Pages};
use dmaload::heap::{Heap, HeapChoice};
use dmaload::{Image, LoadOptions, Loader, Result, Segment};
use dmaload_testing::{meminfo_bytes, random_bytes};

#[allow(unused_imports, reason = "each suite uses a part of it")]
pub use dmaload_testing::assert_same;

pub const MIB: usize = 1 << 20;
/// A large file that is no multiple of anything.
pub const LARGE: usize = 200 * MIB + 777;

/// A folder on the guest's disk.
pub fn disk() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// The bytes of all files here: a file of `len` bytes holds the first `len` of them.
pub fn original() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| random_bytes(LARGE, 11))
}

/// A file with the first `len` bytes of the original.
pub fn file(len: usize) -> PathBuf {
    let path = disk().join(format!("{len}.bin"));
    if fs::metadata(&path).map_or(0, |found| found.len()) != len as u64 || len == 0 {
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(&original()[..len]).unwrap();
        file.sync_all().unwrap();
    }
    path
}

/// Sizes as a person reads them: `8 MiB + 1`.
pub fn told(sizes: &[usize]) -> String {
    let told = |size: &usize| match (size / MIB, size % MIB) {
        (0, bytes) => bytes.to_string(),
        (mib, 0) => format!("{mib} MiB"),
        (mib, bytes) if bytes + 1 == MIB => format!("{} MiB − 1", mib + 1),
        (mib, bytes) => format!("{mib} MiB + {bytes}"),
    };
    sizes.iter().map(told).collect::<Vec<_>>().join(", ")
}

/// A file of zeros that takes no room on the disk.
pub fn sparse_file(name: &str, len: u64) -> PathBuf {
    let path = disk().join(name);
    fs::File::create(&path).unwrap().set_len(len).unwrap();
    path
}

pub fn heap(name: &str) -> Arc<dyn Heap> {
    name.parse::<HeapChoice>().unwrap().open(Pages::Auto).unwrap().0
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

pub fn load(loader: &Loader, path: &Path, options: LoadOptions) -> Result<Image> {
    block_on(async { loader.load(path).options(options).await })
}

pub fn shut_down(loader: Loader) {
    block_on(loader.shutdown()).unwrap();
}

/// Shows a dma-buf's bytes through a mapping of its own, between begin and end of CPU access.
pub fn with_mapping<T>(dma_buf: OwnedFd, look: impl FnOnce(&[u8]) -> T) -> T {
    let memory = Memory::DmaBuf(DmaBuf::from_fd(dma_buf).unwrap());
    let dma_buf = memory.dma_buf().unwrap();
    let bytes = dma_buf.bytes();
    let mapping = AddressRange::reserve(bytes).unwrap().map(&memory, 0, bytes).unwrap();
    let access = dma_buf.cpu_access(Access::Read).unwrap();
    // SAFETY: the mapping has that many bytes, and nobody writes to the dma-buf while a test looks at it.
    let seen = look(unsafe { std::slice::from_raw_parts(mapping.address().as_ptr(), bytes) });
    access.end().unwrap();
    seen
}

/// The segments' dma-bufs hold exactly these bytes, and zeros to their ends.
#[track_caller]
pub fn assert_dma_bufs(segments: &[Segment], expected: &[u8], what: &str) {
    let mut at = 0;
    for segment in segments {
        let len = segment.len();
        with_mapping(segment.hand_out_owned_dma_buf().unwrap(), |seen| {
            assert_eq!(seen.len(), segment.memory_bytes(), "{what}: the dma-buf's length");
            assert_same(&seen[..len], &expected[at..at + len], what);
            assert!(seen[len..].iter().all(|&byte| byte == 0), "{what}: the tail is zero");
        });
        at += len;
    }
    assert_eq!(at, expected.len(), "{what}: all of the file");
}

/// Memory that is available without counting on the page cache, which has its own ways.
pub fn available_bytes() -> u64 {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    meminfo_bytes("MemAvailable")
}

/// What `work` takes of the guest's memory comes back. A kernel that was short of memory, and a process that has new threads,
/// keep some for themselves from then on, once; a leak loses as much again each time. So what is short after the first time must
/// not be short again.
#[track_caller]
pub fn assert_gives_memory_back(mut work: impl FnMut()) {
    let mut lost = Vec::new();
    for _ in 0..3 {
        let before = available_bytes();
        work();
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let short = before.saturating_sub(available_bytes());
            if short <= 24 << 20 {
                return;
            }
            if Instant::now() >= deadline {
                lost.push(short);
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    panic!("each time some bytes did not come back: {lost:?}");
}

pub fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The number of open descriptors when none goes any more: segments of earlier tests are closed by a thread.
pub fn settled_descriptors() -> usize {
    let mut seen = open_descriptors();
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let now = open_descriptors();
        if now == seen {
            return now;
        }
        seen = now;
    }
}

#[track_caller]
pub fn assert_descriptors_are_back(before: usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while open_descriptors() != before {
        assert!(Instant::now() < deadline, "{} descriptors are open, {before} were", open_descriptors());
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub const SIZE_LIMIT: &str = "/sys/module/udmabuf/parameters/size_limit_mb";

/// Raises udmabuf's size limit, until it is dropped.
pub struct RaisedLimit(String);

impl RaisedLimit {
    pub fn to(mib: u32) -> Self {
        let before = fs::read_to_string(SIZE_LIMIT).unwrap();
        fs::write(SIZE_LIMIT, mib.to_string()).unwrap();
        RaisedLimit(before)
    }
}

impl Drop for RaisedLimit {
    fn drop(&mut self) {
        fs::write(SIZE_LIMIT, self.0.trim()).unwrap();
    }
}
