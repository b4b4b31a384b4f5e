#![allow(unsafe_code, reason = "tests store through mappings")]
#![allow(clippy::print_stdout, reason = "prints what a test skips")]
#![allow(clippy::single_range_in_vec_init, reason = "the elements are ranges")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dmaload_testing::mounted;
use rustix::fs::{Advice, fadvise};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::*;
use crate::error::Error;
use crate::files::residency::cached_bytes;

const MIB: u64 = 1 << 20;

/// Creates a folder on the source tree's disk, because `/tmp` may be a tmpfs.
fn folder() -> tempfile::TempDir {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tmp");
    fs::create_dir_all(&target).unwrap();
    tempfile::tempdir_in(target).unwrap()
}

/// Creates a file in which all pages differ, and writes it back.
fn file(folder: &Path, bytes: u64) -> (PathBuf, Vec<u8>) {
    let words = (0..bytes.div_ceil(8)).flat_map(|word| (word.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1).to_le_bytes());
    let content: Vec<u8> = words.take(to_usize(bytes)).collect();
    let path = folder.join("file");
    let file = fs::File::create(&path).unwrap();
    file.write_all_at(&content, 0).unwrap();
    file.sync_all().unwrap();
    (path, content)
}

/// Evicts a file from the page cache, then reads exactly these ranges of it into the cache.
fn cache_only(path: &Path, ranges: &[Range<u64>]) {
    let file = fs::File::open(path).unwrap();
    // Pages that are still being read are not dropped, so try again.
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        if !cached_bytes(&file).is_ok_and(|bytes| bytes > 0) || Instant::now() > deadline {
            break;
        }
    }
    fadvise(&file, 0, None, Advice::Random).unwrap();
    for range in ranges {
        file.read_exact_at(&mut vec![0; to_usize(range.end - range.start)], range.start).unwrap();
    }
}

fn read(file: &OpenFile, range: Range<u64>) -> Vec<u8> {
    let mut buffer = vec![MaybeUninit::uninit(); to_usize(range.end - range.start)];
    let bytes = file.read_cached(&mut buffer, range.start).unwrap();
    // SAFETY: `read_cached` initialized that many bytes.
    buffer[..bytes].iter().map(|byte| unsafe { byte.assume_init() }).collect()
}

fn chunks(cached: &CachedChunks, count: usize) -> Vec<usize> {
    (0..count).filter(|&chunk| cached.contains(chunk)).collect()
}

/// Whether a page that a probe has requested may be cached before the next probe. That happens
/// often in a guest with an emulated CPU and a real disk. The chunk is then reported as cached,
/// but only its beginning can be read from the cache. The rest is read from storage.
fn may_outrun_probes() -> bool {
    std::env::var_os("DMALOAD_GUEST").is_some()
}

/// A shared mapping of a file.
struct Mapping(NonNull<u8>, usize);

impl Mapping {
    fn new(path: &Path) -> Self {
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        let bytes = to_usize(file.metadata().unwrap().len());
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no other mapping is replaced.
        let address = unsafe { mmap(std::ptr::null_mut(), bytes, flags, MapFlags::SHARED, &file, 0) }.unwrap();
        Mapping(NonNull::new(address.cast()).unwrap(), bytes)
    }

    fn store(&self, offset: u64, byte: u8) {
        let offset = to_usize(offset);
        assert!(offset < self.1);
        // SAFETY: the offset is within the mapping, and only this thread writes to it.
        let place = unsafe { self.0.add(offset) };
        // SAFETY: `place` is valid for writes, as above.
        unsafe { place.write_volatile(byte) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        unsafe { munmap(self.0.as_ptr().cast(), self.1) }.unwrap();
    }
}

#[test]
fn chunks_are_counted_across_words() {
    let odd = CachedChunks::collect(200, |chunk| chunk % 2 == 1);
    assert!((0..300).all(|chunk| odd.contains(chunk) == (chunk % 2 == 1 && chunk < 200)));
    assert_eq!(odd.first(), Some(1));
    assert_eq!(CachedChunks::collect(200, |_| false), CachedChunks::default());
    assert_eq!(CachedChunks::collect(65, |chunk| chunk == 64).first(), Some(64));
}

#[test]
fn only_fully_cached_chunks_are_used() {
    let folder = folder();
    mounted::on_each(folder.path(), |what, at| {
        let end = 8 * MIB + 777;
        let (path, content) = file(at, end);
        let opened = OpenFile::open(&path).unwrap();
        for ranges in [vec![0..3 * MIB], vec![0..end], vec![], vec![MIB..MIB + 4096, 4 * MIB..7 * MIB, 8 * MIB..end]] {
            cache_only(&path, &ranges);
            let has = |chunk: Range<u64>| ranges.iter().any(|range| range.start <= chunk.start && chunk.end <= range.end);
            let whole: Vec<_> = (0..9).filter(|&chunk| has(chunk * MIB..(chunk * MIB + MIB).min(end))).map(to_usize).collect();
            // Without `cachestat`, two chunks of 1 MiB are probed as one.
            let pairs = (0..9).filter(|chunk| has(chunk / 2 * 2 * MIB..(chunk / 2 * 2 * MIB + 2 * MIB).min(end)));
            let any = [0, end / 2, end - 1].iter().any(|&offset| has(offset..offset + 1));
            let probed: Vec<_> = pairs.filter(|_| any).map(to_usize).collect();
            let can_count = cached_bytes(&opened.buffered).is_ok();
            let cached = opened.cached(&(0..end), MIB);
            let matches = |found: &[usize], expected: &[usize]| {
                found == expected || may_outrun_probes() && expected.iter().all(|chunk| found.contains(chunk))
            };
            let found = chunks(&cached, 9);
            assert!(if can_count { found == whole } else { matches(&found, &probed) }, "{what}: {ranges:?}: {found:?}");
            for chunk in 0..9 {
                let range = chunk * MIB..(chunk * MIB + MIB).min(end);
                let read = read(&opened, range.clone());
                let all = read.len() as u64 == range.end - range.start;
                let expected = whole.contains(&to_usize(chunk));
                assert!(all == expected || all && may_outrun_probes(), "{what}: {ranges:?}, {chunk}: {} bytes", read.len());
                assert!(content[to_usize(range.start)..].starts_with(&read), "{what}: {ranges:?}, chunk {chunk}");
            }
            // The reads above may have started readahead that finishes only after the eviction, so
            // evict and try again.
            let probe = || {
                cache_only(&path, &ranges);
                chunks(&opened.probe(&(0..end), MIB), 9)
            };
            let found = (0..5).map(|_| probe()).find(|found| matches(found, &probed)).unwrap_or_else(probe);
            assert!(matches(&found, &probed), "{what}: {ranges:?}, probed: {found:?}");
        }
    });
}

#[test]
fn checking_the_cache_starts_no_readahead() {
    let folder = folder();
    mounted::on_each(folder.path(), |what, at| {
        let (path, _) = file(at, 64 * MIB);
        let page = dmabuf::page_bytes() as u64;
        for probes in [false, true] {
            cache_only(&path, &[]);
            let opened = OpenFile::open(&path).unwrap();
            // Read in the way in which a load reads a header: first a few bytes, then the rest.
            opened.read_exact(&mut [0; 9], 0).unwrap();
            opened.read_exact(&mut vec![0; 100_000], 8).unwrap();
            for start in (0..64 * MIB).step_by(to_usize(16 * MIB)) {
                let range = start..start + 16 * MIB;
                let found = if probes { opened.probe(&range, 2 * MIB) } else { opened.cached(&range, 2 * MIB) };
                let may_seem_cached = (probes || cached_bytes(&opened.buffered).is_err()) && may_outrun_probes();
                assert!(found == CachedChunks::default() || may_seem_cached, "{what}, by probes: {probes}: {found:?}");
                std::thread::sleep(Duration::from_millis(3));
            }
            // Each probe reads at most one page. There are three probes for each of four ranges,
            // plus two for each of the eight chunks of a range that seems to be partly cached. The
            // first range seems partly cached because its header was read.
            let seem_cached = if may_outrun_probes() { 4 } else { 1 };
            let most = 100_008_u64.next_multiple_of(page) + if probes { (4 * 3 + seem_cached * 8 * 2) * page } else { 0 };
            match cached_bytes(&opened.buffered) {
                Ok(bytes) => assert!(bytes <= most, "{what}, by probes: {probes}: {bytes} bytes are cached"),
                Err(errno) => println!("skipped: cachestat: {errno}"),
            }
        }
    });
}

/// Requesting the descriptor for the `buffered` route turns readahead on. From then on, cached
/// pages may come from the load's own readahead, so no chunk is reported as cached.
#[test]
fn file_with_readahead_is_not_copied_from_the_cache() {
    let folder = folder();
    let (path, _) = file(folder.path(), 4 * MIB);
    let opened = OpenFile::open(&path).unwrap();
    assert_eq!(chunks(&opened.cached(&(0..4 * MIB), MIB), 4), [0, 1, 2, 3]);
    opened.descriptor(crate::Route::Buffered);
    assert_eq!(opened.cached(&(0..4 * MIB), MIB), CachedChunks::default());
}

#[test]
fn nothing_is_copied_from_the_cache_on_tmpfs() {
    let folder = folder();
    match mounted::tmpfs(&folder.path().join("tmpfs"), "96m") {
        Ok(tmpfs) => {
            let (path, _) = file(&tmpfs.0, 4 * MIB);
            assert_eq!(OpenFile::open(&path).unwrap().cached(&(0..4 * MIB), MIB), CachedChunks::default());
        }
        Err(reason) => println!("skipped: {reason}"),
    }
}

fn has_changed(file: &OpenFile) -> bool {
    match file.check_unchanged(&file.identity) {
        Ok(()) => false,
        Err(Error::Changed { change: "it was modified", .. }) => true,
        Err(error) => panic!("{error}"),
    }
}

/// The kernel does not notice further stores into dirty mapped pages until they are written back.
#[test]
fn stores_into_dirty_pages_are_detected() {
    let folder = folder();
    mounted::on_each(folder.path(), |what, at| {
        let bytes = 16 * MIB;
        let (path, _) = file(at, bytes);
        let mapping = Mapping::new(&path);
        let dirty = || {
            (0..bytes).step_by(4096).for_each(|offset| mapping.store(offset, 1));
            // Before Linux 6.13, times have the resolution of the clock tick, up to 10 ms. Later
            // stores must fall into another tick.
            std::thread::sleep(Duration::from_millis(20));
        };
        for offset in (0..bytes).step_by(to_usize(4 * MIB)).map(|offset| offset + 5000) {
            dirty();
            let opened = OpenFile::open(&path).unwrap();
            // A store before anything is read does not matter.
            mapping.store(offset, 2);
            assert_eq!(chunks(&opened.cached(&(0..bytes), MIB), 16).len(), 16, "{what}");
            assert_eq!(read(&opened, offset..offset + 1), [2], "{what}");
            assert!(!has_changed(&opened), "{what}: writing back should not count as a change");
            mapping.store(offset, 3);
            assert!(has_changed(&opened), "{what}: a store at {offset} should be detected once that byte has been read");
        }
        // The same holds for headers, which are read before anything else is known.
        dirty();
        let opened = OpenFile::open(&path).unwrap();
        opened.read_exact(&mut [0; 100], 0).unwrap();
        mapping.store(50, 4);
        assert!(has_changed(&opened), "{what}: a store into the header should be detected");
    });
}

/// `write(2)` sets the modification time before it writes its first byte, so a file may be opened
/// after the time was set and before the last byte is written.
#[test]
fn running_write_is_waited_for_or_detected() {
    let folder = folder();
    mounted::on_each(folder.path(), |what, at| {
        let bytes = 64 * MIB;
        let (path, _) = file(at, bytes);
        let mut under_way = 0;
        for round in 0..5 {
            let filled = vec![round; to_usize(bytes)];
            let modified = || fs::metadata(&path).unwrap().modified().unwrap();
            cache_only(&path, &[0..bytes]);
            let before = modified();
            let writer = std::thread::spawn({
                let file = Arc::new(fs::File::options().write(true).open(&path).unwrap());
                let filled = filled.clone();
                move || file.write_all_at(&filled, 0).unwrap()
            });
            let deadline = Instant::now() + Duration::from_secs(10);
            while modified() == before && Instant::now() < deadline {}
            let opened = OpenFile::open(&path).unwrap();
            under_way += usize::from(!writer.is_finished());
            let last = bytes - MIB..bytes;
            let cached = opened.cached(&last, MIB);
            let seen = if cached.contains(0) { read(&opened, last) } else { Vec::new() };
            writer.join().unwrap();
            assert!(
                has_changed(&opened) || seen.iter().all(|&byte| byte == round),
                "{what}: old bytes were read, but no change was detected"
            );
        }
        println!("{what}: {under_way} of 5 writes were still running when the file was opened");
    });
}
