//! Helpers for the suites. They create files on the guest's disk, load files, read dma-bufs
//! through a mapping, and change kernel settings.
#![allow(dead_code, unreachable_pub, reason = "each suite uses only some of the helpers")]
#![allow(clippy::unwrap_used, reason = "a setup error should fail the suite")]
#![allow(unsafe_code, reason = "accesses mappings of dma-bufs as slices")]

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dmabuf::{Access, AddressRange, DmaBuf, Memory, Pages};
use dmaload::heap::{Heap, HeapChoice};
use dmaload::{Image, LoadOptions, Loader, Segment};
use dmaload_testing::{meminfo_bytes, random_bytes};

#[allow(unused_imports, reason = "each suite uses only some of the helpers")]
pub use dmaload_testing::assert_same;

pub const MIB: usize = 1 << 20;
/// The length of a large file in bytes. It exceeds the default size limit of a udmabuf (64 MiB
/// before Linux 7.3), it is more than twice the window of 32 MiB that the `dma_bufs` suite uses,
/// and it is not a multiple of the block size or the page size.
pub const LARGE: usize = 72 * MIB + 777;

/// Returns the path of a folder on the guest's disk.
pub fn disk() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// Returns the bytes that [`file`] writes to files. A file of `len` bytes contains the first `len`
/// of them.
pub fn original() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| random_bytes(LARGE, 11))
}

/// Returns the path of a file that contains the first `len` bytes of [`original`]. Creates the
/// file unless it exists.
pub fn file(len: usize) -> PathBuf {
    let path = disk().join(format!("{len}.bin"));
    if fs::metadata(&path).map_or(0, |found| found.len()) != len as u64 || len == 0 {
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(&original()[..len]).unwrap();
        file.sync_all().unwrap();
    }
    path
}

/// Calls `run` while this guest's file systems are also mounted below `root`, so a program can be
/// run there with `chroot` (see `src/roots.rs`).
pub fn in_root<T>(root: &str, run: impl FnOnce() -> T) -> T {
    let script = |script: &str| {
        let status = Command::new("/bin/sh").args(["-ec", &format!("cd {root} && {script}")]).status().unwrap();
        assert!(status.success(), "{script}");
    };
    script("for folder in dev proc sys disk; do mount -o bind /$folder $folder; done && mount -t tmpfs tmp tmp");
    let done = run();
    script("umount dev proc sys disk tmp");
    done
}

/// Formats sizes in a form that is easy to read, such as `8 MiB + 1`.
pub fn format_sizes(sizes: &[usize]) -> String {
    let format_size = |size: &usize| match (size / MIB, size % MIB) {
        (0, bytes) => bytes.to_string(),
        (mib, 0) => format!("{mib} MiB"),
        (mib, bytes) if bytes + 1 == MIB => format!("{} MiB − 1", mib + 1),
        (mib, bytes) => format!("{mib} MiB + {bytes}"),
    };
    sizes.iter().map(format_size).collect::<Vec<_>>().join(", ")
}

/// Creates a file of zeros that occupies no blocks on the disk.
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

pub fn load(loader: &Loader, path: &Path, options: LoadOptions) -> dmaload::Result<Image> {
    block_on(async { loader.load(path).options(options).await })
}

pub fn shut_down(loader: Loader) {
    block_on(loader.shutdown()).unwrap();
}

/// Maps a dma-buf, begins CPU access, and calls `inspect` with the dma-buf's bytes.
pub fn with_mapping<T>(dma_buf: OwnedFd, inspect: impl FnOnce(&[u8]) -> T) -> T {
    let memory = Memory::DmaBuf(DmaBuf::from_fd(dma_buf).unwrap());
    let dma_buf = memory.dma_buf().unwrap();
    let bytes = dma_buf.bytes();
    let mapping = AddressRange::reserve(bytes).unwrap().map(&memory, 0, bytes).unwrap();
    let access = dma_buf.cpu_access(Access::Read).unwrap();
    // SAFETY: the mapping has that many bytes. Callers pass the dma-buf of a finished load, so
    // nothing writes to the dma-buf while the slice is alive.
    let seen = inspect(unsafe { std::slice::from_raw_parts(mapping.address().as_ptr(), bytes) });
    access.end().unwrap();
    seen
}

/// Asserts that the segments' dma-bufs contain exactly the `expected` bytes, and that any bytes
/// after the segment in each dma-buf are zero.
#[track_caller]
pub fn assert_dma_bufs(segments: &[Segment], expected: &[u8], what: &str) {
    let mut at = 0;
    for segment in segments {
        let len = segment.len();
        with_mapping(segment.hand_out_owned_dma_buf().unwrap(), |seen| {
            assert_eq!(seen.len(), segment.memory_bytes(), "{what}: the dma-buf's length");
            assert_same(&seen[..len], &expected[at..at + len], what);
            assert!(seen[len..].iter().all(|&byte| byte == 0), "{what}: the bytes after the segment must be zero");
        });
        at += len;
    }
    assert_eq!(at, expected.len(), "{what}: the segments' total length");
}

/// Drops the kernel's caches, and returns the available memory in bytes.
pub fn available_bytes() -> u64 {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    meminfo_bytes("MemAvailable")
}

/// Asserts that `work` releases the memory that it uses.
///
/// Calls `work` up to three times, until one call releases all but at most 24 MiB of the memory.
/// Kernel caches and new threads may keep memory in the first round, whereas a leak loses memory
/// in every round.
#[track_caller]
pub fn assert_memory_is_released(mut work: impl FnMut()) {
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
    panic!("memory was not released; bytes lost in each round: {lost:?}");
}

pub fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Waits until the number of open descriptors is stable, and returns this number. When a test
/// starts, a thread may still be closing segments from earlier tests.
pub fn settle_descriptors() -> usize {
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
pub fn assert_descriptors_are_closed(before: usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while open_descriptors() != before {
        assert!(Instant::now() < deadline, "open descriptors: {}, before: {before}", open_descriptors());
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub const SIZE_LIMIT: &str = "/sys/module/udmabuf/parameters/size_limit_mb";

/// Overrides udmabuf's size limit. Dropping this value restores the previous limit, which differs
/// between kernels.
pub struct SizeLimit(String);

impl SizeLimit {
    pub fn set_mib(mib: u32) -> Self {
        let before = fs::read_to_string(SIZE_LIMIT).unwrap();
        fs::write(SIZE_LIMIT, mib.to_string()).unwrap();
        SizeLimit(before)
    }
}

impl Drop for SizeLimit {
    fn drop(&mut self) {
        fs::write(SIZE_LIMIT, self.0.trim()).unwrap();
    }
}

const THP: &str = "/sys/kernel/mm/transparent_hugepage";

/// Overrides settings for transparent huge pages. Dropping this value restores the previous
/// settings.
pub struct ThpSettings(Vec<(String, String)>);

impl ThpSettings {
    pub fn set(settings: &[(&str, &str)]) -> Self {
        let mut before = Vec::new();
        for (file, value) in settings {
            let file = format!("{THP}/{file}");
            let text = fs::read_to_string(&file).unwrap();
            let (_, rest) = text.split_once('[').unwrap();
            before.push((file.clone(), rest.split(']').next().unwrap().to_owned()));
            fs::write(&file, value).unwrap();
        }
        ThpSettings(before)
    }
}

impl Drop for ThpSettings {
    fn drop(&mut self) {
        for (file, value) in &self.0 {
            fs::write(file, value).unwrap();
        }
    }
}

pub const PAGE: usize = 4096;

/// Counts of the folios that back a range of memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Folios {
    /// The number of folios that consist of a single page.
    pub pages: usize,
    /// The number of pages in large folios.
    pub compound_pages: usize,
    /// The number of large folios. Only the first page of a folio is counted.
    pub compound: usize,
}

impl Folios {
    /// Formats the counts, assuming that all large folios have a size of 2 MiB.
    pub fn describe(self) -> String {
        match self.pages {
            0 => format!("{} folios of 2 MiB", self.compound),
            pages => format!("{} folios of 2 MiB and {pages} pages", self.compound),
        }
    }

    /// Counts the folios that back a range of mapped memory. Requires root, because it reads page
    /// frame numbers.
    #[track_caller]
    pub fn add(&mut self, address: usize, bytes: usize) {
        use std::os::unix::fs::FileExt;
        const HEAD: u64 = 1 << 15;
        const TAIL: u64 = 1 << 16;
        let pagemap = fs::File::open("/proc/self/pagemap").unwrap();
        let flags = fs::File::open("/proc/kpageflags").unwrap();
        let word = |file: &fs::File, index: u64| {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, index * 8).unwrap();
            u64::from_ne_bytes(word)
        };
        for page in address / PAGE..(address + bytes) / PAGE {
            let entry = word(&pagemap, page as u64);
            assert!(entry >> 63 == 1, "every page must be present");
            let frame = entry & ((1 << 55) - 1);
            assert_ne!(frame, 0, "reading page frame numbers requires root");
            let flags = word(&flags, frame);
            let is_compound = flags & (HEAD | TAIL) != 0;
            self.pages += usize::from(!is_compound);
            self.compound_pages += usize::from(is_compound);
            self.compound += usize::from(flags & HEAD != 0);
        }
    }
}

/// Faults in the first `bytes` bytes of a memfd, and counts the folios that back them.
///
/// The bytes are mapped at a multiple of 2 MiB, because a fault creates a large folio only if the
/// folio's offset in the memfd and its address are both multiples of its size.
#[track_caller]
pub fn fault_in(memfd: &OwnedFd, bytes: usize) -> Folios {
    use std::os::fd::AsRawFd;
    let (align, flags) = (dmabuf::HUGE_PAGE_BYTES, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: no address is requested, so the kernel chooses a free range and replaces no mapping.
    let reserved = unsafe { libc::mmap(std::ptr::null_mut(), bytes + align, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(reserved, libc::MAP_FAILED);
    let start = reserved.map_addr(|address| address.next_multiple_of(align));
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE);
    // SAFETY: the range is within the reserved one, which nothing else uses.
    let mapped = unsafe { libc::mmap(start, bytes, access, flags, memfd.as_raw_fd(), 0) };
    assert_eq!(mapped, start);
    let mut folios = Folios::default();
    folios.add(start.addr(), bytes);
    // SAFETY: the range was reserved above, and nothing else uses it.
    assert_eq!(unsafe { libc::munmap(reserved, bytes + align) }, 0);
    folios
}

/// `struct udmabuf_create` from linux/udmabuf.h.
#[repr(C)]
struct Create {
    memfd: u32,
    flags: u32,
    offset: u64,
    size: u64,
}

/// Creates a dma-buf from a memfd by calling the kernel directly, as a vendor's library would.
///
/// # Errors
/// Returns the kernel's errno if the kernel refuses the request.
pub fn create_udmabuf(memfd: &OwnedFd, bytes: usize) -> Result<OwnedFd, dmaload::Errno> {
    use std::os::fd::{AsRawFd, FromRawFd};
    const UDMABUF_CREATE: u32 = 0x4018_7542;
    let device = rustix::fs::open("/dev/udmabuf", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty()).unwrap();
    let create = Create { memfd: memfd.as_raw_fd().cast_unsigned(), flags: 1, offset: 0, size: bytes as u64 };
    // SAFETY: the ioctl's number belongs to this structure, which the kernel only reads.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), UDMABUF_CREATE as _, &raw const create) };
    if fd < 0 {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap();
        return Err(dmaload::Errno::from_raw_os_error(errno));
    }
    // SAFETY: the kernel has just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
