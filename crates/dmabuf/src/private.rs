//! Memory files as memory of this process alone: pages that are shared until they are written to.
#![allow(unsafe_code)]

use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::{Error, Memfd, page_bytes};

/// Parts of memory files, mapped side by side, readable and writable, and copied on write.
///
/// A write changes the bytes that this mapping shows, and neither the memory file nor what others
/// have mapped of it. It takes a page of memory for each page that is written to. A file that is
/// sealed against writes can be mapped so, and what others write to one that is not may show in
/// pages that have not been written to here.
///
/// Dropping it unmaps the addresses and frees the pages that were copied.
#[derive(Debug)]
pub struct PrivateMapping {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the addresses are this value's alone, and mappings belong to no thread.
unsafe impl Send for PrivateMapping {}
// SAFETY: as above; nothing here dereferences the address.
unsafe impl Sync for PrivateMapping {}

impl PrivateMapping {
    /// Maps these ranges of bytes of memory files, in this order, without gaps.
    ///
    /// # Errors
    /// EINVAL for a range that is empty, does not begin and end at a page, or reaches past the
    /// pages of its file, and without any range; else what `mmap(2)` answered.
    pub fn new(parts: &[(&Memfd, Range<usize>)]) -> Result<Self, Error> {
        let page = page_bytes();
        let is_whole = |(memfd, range): &(&Memfd, Range<usize>)| {
            let pages_end = memfd.bytes().next_multiple_of(page);
            let aligned = range.start.is_multiple_of(page) && range.end.is_multiple_of(page);
            aligned && range.start < range.end && range.end <= pages_end
        };
        let sum = parts.iter().try_fold(0_usize, |sum, (_, range)| sum.checked_add(range.len()));
        let failed = |errno| Error::from_call("map memory privately", sum.unwrap_or(usize::MAX), errno);
        let bytes = sum.filter(|&bytes| bytes > 0 && parts.iter().all(is_whole)).ok_or(failed(Errno::INVAL))?;
        let reserved = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), reserved) }.map_err(failed)?;
        let address = NonNull::new(start.cast::<u8>()).ok_or(failed(Errno::NOMEM))?;
        // From here on a failure unmaps what was mapped.
        let mapping = PrivateMapping { address, bytes };
        let mut at = 0;
        for (memfd, range) in parts {
            let place = start.wrapping_byte_add(at);
            let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, reserved | MapFlags::FIXED);
            // SAFETY: the ranges' lengths add up to that of the reservation, so this replaces
            // addresses that were reserved above and that only this function knows.
            unsafe { mmap(place, range.len(), access, flags, memfd, range.start as u64) }.map_err(failed)?;
            at += range.len();
        }
        Ok(mapping)
    }

    /// The first address, page-aligned.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// The length in bytes, a multiple of the page size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for PrivateMapping {
    fn drop(&mut self) {
        // SAFETY: the addresses were reserved by `new` and belong to this value alone.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(pages: usize, fill: u8) -> Memfd {
        let memfd = Memfd::create("test", pages * page_bytes()).unwrap();
        for (page, byte) in (0..pages).zip(fill..) {
            rustix::io::pwrite(&memfd, &vec![byte; page_bytes()], (page * page_bytes()) as u64).unwrap();
        }
        memfd.seal_against_writes().unwrap();
        memfd
    }

    fn byte_at(mapping: &PrivateMapping, at: usize) -> u8 {
        assert!(at < mapping.bytes());
        // SAFETY: within the mapping.
        let address = unsafe { mapping.address().add(at) };
        // SAFETY: it is readable, and known to this test alone.
        unsafe { address.read() }
    }

    #[test]
    fn parts_lie_side_by_side_and_writes_stay_private() {
        let page = page_bytes();
        let (first, second) = (memfd(3, 10), memfd(2, 20));
        let parts = [(&first, page..3 * page), (&second, 0..page)];
        let (ours, theirs) = (PrivateMapping::new(&parts).unwrap(), PrivateMapping::new(&parts).unwrap());
        assert_eq!([0, page, 2 * page].map(|at| byte_at(&ours, at)), [11, 12, 20]);
        // SAFETY: within the mapping.
        let second = unsafe { ours.address().add(page) };
        // SAFETY: it is writable, and known to this test alone.
        unsafe { second.write(99) };
        assert_eq!((byte_at(&ours, page), byte_at(&theirs, page)), (99, 12));
        let mut seen = [0];
        rustix::io::pread(&first, &mut seen, 2 * page as u64).unwrap();
        assert_eq!(seen, [12], "the memory file is what it was");
    }

    #[test]
    fn what_is_unaligned_or_out_of_range_is_refused() {
        let page = page_bytes();
        let memfd = memfd(2, 0);
        for range in [1..page, 0..page - 1, page..page, 0..3 * page, usize::MAX - page + 1..usize::MAX] {
            let refused = PrivateMapping::new(&[(&memfd, range.clone())]).unwrap_err();
            assert_eq!(refused.errno, crate::Errno::EINVAL, "{range:?}");
        }
        assert_eq!(PrivateMapping::new(&[]).unwrap_err().errno, crate::Errno::EINVAL);
    }
}
