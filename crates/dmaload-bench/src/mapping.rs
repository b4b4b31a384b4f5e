//! Unsafe code: two mappings, and a question to the page cache that no safe wrapper asks.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapMut};

/// Maps a whole file for reading. A file cut short by someone else while it is mapped ends the
/// process with SIGBUS.
pub(crate) fn map_file(file: &File) -> io::Result<Mmap> {
    // SAFETY: nobody may change the file while it is mapped, which no program can enforce for a
    // file on a disk; the callers copy it once, touch each page once or never look at its bytes,
    // and hold the mapping for just as long.
    unsafe { Mmap::map(file) }
}

/// Maps a whole memfd for reading and writing.
pub(crate) fn map_memory(memory: &File) -> io::Result<MmapMut> {
    // SAFETY: callers make the memfd themselves and hand its descriptor to nobody, so this mapping
    // is its only user.
    unsafe { MmapMut::map_mut(memory) }
}

/// How many bytes of a mapped file are in the page cache, by `mincore(2)`. Counts whole pages.
pub(crate) fn mincore(mapping: &Mmap) -> io::Result<u64> {
    let page = rustix::param::page_size();
    let mut pages = vec![0_u8; mapping.len().div_ceil(page)];
    // SAFETY: the range is a live mapping that begins on a page, and the vector has a byte for
    // each of its pages.
    let status = unsafe { libc::mincore(mapping.as_ptr().cast_mut().cast(), mapping.len(), pages.as_mut_ptr()) };
    if status == -1 {
        return Err(io::Error::last_os_error());
    }
    // Only the lowest bit says anything; the others are reserved.
    let resident = pages.iter().filter(|&&page| page & 1 == 1).count();
    Ok(resident as u64 * page as u64)
}
