//! Reading what the page cache has of a file, and nothing but that.
//!
//! Bytes of the cache are as good as those of storage if every later change of them shows in the file's time of modification,
//! which is compared when the load ends. [`OpenFile::settle`] sees to that, for each range before it is read; on which file
//! systems that works is told by [`crate::files::file_system`].
//!
//! (Direct reads need no such care: the kernel writes a range back, and write-protects it, before it reads that from storage.)

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::Ordering;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::OpenFile;
use crate::files::residency::{cached_bytes_in, read_nowait, write_back};
use crate::support::convert::to_usize;

/// Which chunks of a range are wholly in the page cache; by default none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CachedChunks(Box<[u64]>);

impl CachedChunks {
    /// Of `count` chunks, those that `is_cached` says are.
    pub(crate) fn of(count: usize, mut is_cached: impl FnMut(usize) -> bool) -> Self {
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

    /// Whether that are all chunks of a range of so many bytes.
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

/// What is probed where `cachestat(2)` can't be asked. A probe that misses brings in a page, and a load that finds nothing in the
/// cache is to leave next to nothing there: two pages in 2 MiB are 0.4 %.
const LEAST_PROBED_BYTES: u64 = 2 << 20;

/// What one call copies from the cache: if some of it has gone since it was asked for, no more than that is read ahead.
const STEP_BYTES: usize = 256 << 10;

impl OpenFile {
    /// Which chunks of a range of the file are wholly in the page cache, and may be taken from there: none where the cache is no
    /// witness, or can't be read without waiting. Neither waits for storage nor starts readahead; dirty pages are written back.
    pub(crate) fn cached(&self, range: &Range<u64>, chunk_bytes: u64) -> CachedChunks {
        // With readahead, asking would fill the cache.
        let may_ask = self.cache_is_witness && self.is_quiet.load(Ordering::Relaxed);
        let range = range.start..range.end.min(self.identity.bytes);
        if !may_ask || range.is_empty() {
            return CachedChunks::default();
        }
        let found = match cached_bytes_in(&self.buffered, &range) {
            Ok(0) => CachedChunks::default(),
            Ok(_) => chunks_of(&range, chunk_bytes, |chunk| {
                cached_bytes_in(&self.buffered, chunk).is_ok_and(|bytes| bytes >= page_bytes_of(chunk))
            }),
            Err(_) => self.probed(&range, chunk_bytes),
        };
        let Some(first) = found.first() else { return found };
        let can_read = self.can_read_cached(range.start + first as u64 * chunk_bytes);
        if can_read && self.settle(&range).is_ok() { found } else { CachedChunks::default() }
    }

    fn probed(&self, range: &Range<u64>, chunk_bytes: u64) -> CachedChunks {
        let middle = range.start + (range.end - range.start) / 2;
        if ![range.start, middle, range.end - 1].into_iter().any(|offset| self.has_cached(offset)) {
            return CachedChunks::default();
        }
        let probed_bytes = chunk_bytes.max(LEAST_PROBED_BYTES / chunk_bytes * chunk_bytes);
        let probed = chunks_of(range, probed_bytes, |part| self.has_cached(part.start) && self.has_cached(part.end - 1));
        let chunks_in_probed = to_usize(probed_bytes / chunk_bytes);
        CachedChunks::of(count_of(range, chunk_bytes), |chunk| probed.contains(chunk / chunks_in_probed))
    }

    /// Whether the page of that offset is cached. If not, that page is read, and no other.
    fn has_cached(&self, offset: u64) -> bool {
        read_nowait(&self.buffered, &mut [MaybeUninit::uninit()], offset).is_ok_and(|bytes| bytes > 0)
    }

    /// Some file systems have a cache, and can't be read without waiting.
    fn can_read_cached(&self, offset: u64) -> bool {
        matches!(read_nowait(&self.buffered, &mut [MaybeUninit::uninit()], offset), Ok(_) | Err(Errno::AGAIN))
    }

    /// Copies what the page cache has of the file at this offset, without waiting for storage: fewer bytes than asked for if
    /// the rest has gone from it. Only what [`Self::cached`] has told of may be read so.
    ///
    /// # Errors
    /// What `preadv2(2)` answered, except EAGAIN.
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

    /// Makes sure that every later change of these bytes changes the file's time of modification, where the page cache is a
    /// witness (elsewhere nothing is done).
    ///
    /// A writer inside of `write(2)` has set the time already, perhaps before the file was looked at: it is waited for.
    /// Stores into mapped pages that are dirty set no time: these are written back, and thereby write-protected. Takes 3 µs
    /// when there is no such writer.
    ///
    /// # Errors
    /// What writing back answered.
    pub(crate) fn settle(&self, range: &Range<u64>) -> Result<(), Errno> {
        if !self.cache_is_witness {
            return Ok(());
        }
        // Takes the lock that writers hold. The offset of this description means nothing, and ENXIO that all is a hole.
        match seek(&self.buffered, SeekFrom::Data(0)) {
            Ok(_) | Err(Errno::NXIO) => {}
            Err(errno) => return Err(errno),
        }
        write_back(&self.buffered, range)
    }
}

fn count_of(range: &Range<u64>, chunk_bytes: u64) -> usize {
    to_usize((range.end - range.start).div_ceil(chunk_bytes))
}

fn chunks_of(range: &Range<u64>, chunk_bytes: u64, is_cached: impl Fn(&Range<u64>) -> bool) -> CachedChunks {
    CachedChunks::of(count_of(range, chunk_bytes), |chunk| {
        let start = range.start + chunk as u64 * chunk_bytes;
        is_cached(&(start..(start + chunk_bytes).min(range.end)))
    })
}

/// How many bytes the pages have that a range touches.
fn page_bytes_of(range: &Range<u64>) -> u64 {
    let page = dmabuf::page_bytes() as u64;
    range.end.next_multiple_of(page) - range.start / page * page
}

#[cfg(test)]
mod tests;
