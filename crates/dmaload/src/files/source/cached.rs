//! Reads bytes of a file from the page cache, but only those that are already there.
//!
//! Bytes from the page cache are as trustworthy as bytes from storage if every later change to
//! them updates the file's modification time. At the end of a load, that time is compared with the
//! time that the file had at the beginning of the load. [`OpenFile::settle`] ensures that changes
//! to a range update the time, and is called before the range is read.
//! [`crate::files::file_system`] lists the file systems on which that works.
//!
//! Direct reads need no such care, because the kernel writes a range back, and write-protects it,
//! before reading it from storage.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::Ordering;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::OpenFile;
use crate::files::residency::{cached_bytes_in, read_nowait, write_back};
use crate::support::convert::to_usize;

/// The set of chunks of a range that are fully cached; empty by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CachedChunks(Box<[u64]>);

impl CachedChunks {
    /// Collects those of the first `count` chunks for which `is_cached` returns true.
    pub(crate) fn collect(count: usize, mut is_cached: impl FnMut(usize) -> bool) -> Self {
        let mut words = vec![0; count.div_ceil(WORD_BITS)];
        let mut any = false;
        for chunk in (0..count).filter(|&chunk| is_cached(chunk)) {
            if let Some(word) = words.get_mut(chunk / WORD_BITS) {
                *word |= 1_u64 << (chunk % WORD_BITS);
                any = true;
            }
        }
        if any { CachedChunks(words.into()) } else { CachedChunks::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the set contains all chunks of a range of `bytes` bytes.
    pub(crate) fn is_all_of(&self, bytes: u64, chunk_bytes: u64) -> bool {
        (0..to_usize(bytes.div_ceil(chunk_bytes))).all(|chunk| self.contains(chunk))
    }

    fn first(&self) -> Option<usize> {
        (0..self.0.len() * WORD_BITS).find(|&chunk| self.contains(chunk))
    }

    pub(crate) fn contains(&self, chunk: usize) -> bool {
        self.0.get(chunk / WORD_BITS).is_some_and(|word| word >> (chunk % WORD_BITS) & 1 == 1)
    }
}

const WORD_BITS: usize = u64::BITS as usize;

/// Minimum size of the ranges that are probed if `cachestat(2)` is not available, rounded down to
/// whole chunks. A probe that misses reads a page into the cache, and a load that finds little
/// cached should add very little to the cache: two pages of 4 KiB in 2 MiB are 0.4 %.
const LEAST_PROBED_BYTES: u64 = 2 << 20;

/// Maximum number of bytes that one system call copies from the cache. If bytes were evicted in
/// the meantime, the kernel reads ahead at most to the end of that call's range.
const STEP_BYTES: usize = 256 << 10;

impl OpenFile {
    /// Returns which chunks of a range are fully cached and may be copied from the cache. The set
    /// is empty if readahead is on, or if the cache can't be trusted or can't be read without
    /// waiting.
    ///
    /// This call neither waits for reads nor starts readahead. It does wait for running writers
    /// and for the writeback of dirty pages ([`Self::settle`]).
    pub(crate) fn cached(&self, range: &Range<u64>, chunk_bytes: u64) -> CachedChunks {
        // With readahead, probing would fill the cache, and earlier reads may have done so.
        let may_ask = self.cache_is_witness && self.is_quiet.load(Ordering::Relaxed);
        let range = range.start..range.end.min(self.identity.bytes);
        if !may_ask || range.is_empty() {
            return CachedChunks::default();
        }
        let found = match cached_bytes_in(&self.buffered, &range) {
            Ok(0) => CachedChunks::default(),
            Ok(_) => chunks_where(&range, chunk_bytes, |chunk| {
                cached_bytes_in(&self.buffered, chunk).is_ok_and(|bytes| bytes >= touched_page_bytes(chunk))
            }),
            Err(_) => self.probe(&range, chunk_bytes),
        };
        let Some(first) = found.first() else { return found };
        let can_read = self.can_read_cached(range.start + first as u64 * chunk_bytes);
        if can_read && self.settle(&range).is_ok() { found } else { CachedChunks::default() }
    }

    fn probe(&self, range: &Range<u64>, chunk_bytes: u64) -> CachedChunks {
        // A range without cached bytes costs only these three probes, each of which reads at most
        // one page into the cache.
        let middle = range.start + (range.end - range.start) / 2;
        if ![range.start, middle, range.end - 1].into_iter().any(|offset| self.has_cached(offset)) {
            return CachedChunks::default();
        }
        let probed_bytes = chunk_bytes.max(LEAST_PROBED_BYTES / chunk_bytes * chunk_bytes);
        let probed = chunks_where(range, probed_bytes, |part| self.has_cached(part.start) && self.has_cached(part.end - 1));
        let chunks_in_probed = to_usize(probed_bytes / chunk_bytes);
        CachedChunks::collect(count_chunks(range, chunk_bytes), |chunk| probed.contains(chunk / chunks_in_probed))
    }

    /// Whether the page at that offset is cached. If not, the kernel reads that page, and no
    /// other, into the cache, because readahead is off.
    fn has_cached(&self, offset: u64) -> bool {
        read_nowait(&self.buffered, &mut [MaybeUninit::uninit()], offset).is_ok_and(|bytes| bytes > 0)
    }

    /// Whether the file system can read from its cache without waiting; some can't.
    fn can_read_cached(&self, offset: u64) -> bool {
        matches!(read_nowait(&self.buffered, &mut [MaybeUninit::uninit()], offset), Ok(_) | Err(Errno::AGAIN))
    }

    /// Copies bytes at this offset from the page cache, without waiting for storage. Returns fewer
    /// bytes than requested if some were evicted. Call it only for chunks that [`Self::cached`]
    /// reported.
    ///
    /// # Errors
    /// Those of `preadv2(2)`, except EAGAIN.
    pub(crate) fn read_cached(&self, buffer: &mut [MaybeUninit<u8>], offset: u64) -> Result<usize, Errno> {
        let mut done = 0;
        for step in buffer.chunks_mut(STEP_BYTES) {
            match read_nowait(&self.buffered, step, offset + done as u64) {
                Ok(bytes) => {
                    done += bytes;
                    if bytes < step.len() {
                        break;
                    }
                }
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno),
            }
        }
        Ok(done)
    }

    /// Ensures that every later change to these bytes updates the file's modification time. Does
    /// nothing if the page cache is not trusted.
    ///
    /// Two kinds of writers could otherwise change bytes without updating the time. The first kind
    /// is inside `write(2)` and has already updated it, perhaps before the file was first
    /// inspected. This call waits for such a writer. (On xfs, reads from the cache wait for it.)
    /// The second kind stores into mapped pages that are already dirty. This call writes those
    /// pages back and thereby write-protects them, so the next store updates the time. Without
    /// such writers, the call takes about 3 µs.
    ///
    /// # Errors
    /// The error of `lseek(2)` or of the writeback.
    pub(crate) fn settle(&self, range: &Range<u64>) -> Result<(), Errno> {
        if !self.cache_is_witness {
            return Ok(());
        }
        // On ext4 and btrfs, this call takes the lock that writers hold. On xfs, reads from the
        // cache take that lock, too. It does not matter that this call moves the offset of the
        // file description, since nothing uses it. ENXIO means that the file has no data.
        match seek(&self.buffered, SeekFrom::Data(0)) {
            Ok(_) | Err(Errno::NXIO) => {}
            Err(errno) => return Err(errno),
        }
        write_back(&self.buffered, range)
    }
}

fn count_chunks(range: &Range<u64>, chunk_bytes: u64) -> usize {
    to_usize((range.end - range.start).div_ceil(chunk_bytes))
}

fn chunks_where(range: &Range<u64>, chunk_bytes: u64, is_cached: impl Fn(&Range<u64>) -> bool) -> CachedChunks {
    CachedChunks::collect(count_chunks(range, chunk_bytes), |chunk| {
        let start = range.start + chunk as u64 * chunk_bytes;
        is_cached(&(start..(start + chunk_bytes).min(range.end)))
    })
}

/// Total size of the pages that a range touches.
fn touched_page_bytes(range: &Range<u64>) -> u64 {
    let page = dmabuf::page_bytes() as u64;
    range.end.next_multiple_of(page) - range.start / page * page
}

#[cfg(test)]
mod tests;
