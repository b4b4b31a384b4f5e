//! Maps files and memfds, and queries the page cache. This requires unsafe code.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapMut};

/// Maps a whole file for reading. If the file is truncated while it is mapped, reading the mapping
/// raises SIGBUS.
pub(crate) fn map_file(file: &File) -> io::Result<Mmap> {
    // SAFETY: the file must not change while it is mapped, which can't be enforced for a file on a
    // disk. The callers copy the bytes once, touch each page once or read nothing, and drop the
    // mapping before they return. They read each byte at most once, so a change can only lead to a
    // different byte or raise SIGBUS.
    unsafe { Mmap::map(file) }
}

/// Maps a whole memfd for reading and writing.
pub(crate) fn map_memory(memory: &File) -> io::Result<MmapMut> {
    // SAFETY: callers create the memfd themselves and never share its descriptor, so this mapping
    // is its only user.
    unsafe { MmapMut::map_mut(memory) }
}

/// Returns how many bytes of a mapped file are in the page cache, in whole pages, according to
/// `mincore(2)`.
pub(crate) fn mincore(mapping: &Mmap) -> io::Result<u64> {
    let page = rustix::param::page_size();
    let mut pages = vec![0_u8; mapping.len().div_ceil(page)];
    // SAFETY: the range is a live mapping that begins at a page boundary, and the vector has a
    // byte for each of its pages.
    let status = unsafe { libc::mincore(mapping.as_ptr().cast_mut().cast(), mapping.len(), pages.as_mut_ptr()) };
    if status == -1 {
        return Err(io::Error::last_os_error());
    }
    // Only the lowest bit of each byte is defined.
    let resident = pages.iter().filter(|&&page| page & 1 == 1).count();
    Ok(resident as u64 * page as u64)
}
