//! Copy-on-write mappings of memfds.
#![allow(unsafe_code)]

use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::{Error, Memfd, page_bytes};

/// Parts of memfds, mapped side by side, readable, writable and copy-on-write.
///
/// A write changes only the bytes seen through this mapping, not the memfd or its other mappings.
/// The first write to a page allocates a private copy of the page. A memfd that is sealed against
/// writes can be mapped this way. If a memfd is not sealed, later writes by others can appear in
/// pages that have no private copy yet.
///
/// Dropping it unmaps the addresses and frees the private copies.
#[derive(Debug)]
pub struct PrivateMapping {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: only this value owns the addresses, and a mapping is not tied to a thread.
unsafe impl Send for PrivateMapping {}
// SAFETY: no method changes the value or dereferences the address.
unsafe impl Sync for PrivateMapping {}

impl PrivateMapping {
    /// Maps byte ranges of memfds, in this order and without gaps.
    ///
    /// # Errors
    /// EINVAL when `parts` is empty, or when a range is empty, is not page-aligned, or reaches
    /// past the last page of its memfd; otherwise the errno of `mmap(2)`.
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
        // SAFETY: no address is requested, so no existing mapping is replaced.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), reserved) }.map_err(failed)?;
        let address = NonNull::new(start.cast::<u8>()).ok_or(failed(Errno::NOMEM))?;
        // From here on, an early return drops this and unmaps everything.
        let mapping = PrivateMapping { address, bytes };
        let mut at = 0;
        for (memfd, range) in parts {
            let place = start.wrapping_byte_add(at);
            let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, reserved | MapFlags::FIXED);
            // SAFETY: the ranges' lengths add up to that of the reservation, so this replaces only
            // addresses that were reserved above and that nothing else uses.
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

    fn create_memfd(pages: usize, first: u8) -> Memfd {
        let memfd = Memfd::create("test", pages * page_bytes()).unwrap();
        for (page, byte) in (0..pages).zip(first..) {
            rustix::io::pwrite(&memfd, &vec![byte; page_bytes()], (page * page_bytes()) as u64).unwrap();
        }
        memfd.seal_against_writes().unwrap();
        memfd
    }

    fn read_byte(mapping: &PrivateMapping, at: usize) -> u8 {
        assert!(at < mapping.bytes());
        // SAFETY: `at` lies within the mapping, as asserted above.
        let address = unsafe { mapping.address().add(at) };
        // SAFETY: the mapping is readable, and only this test uses it.
        unsafe { address.read() }
    }

    #[test]
    fn parts_lie_side_by_side_and_writes_stay_private() {
        let page = page_bytes();
        let (first, second) = (create_memfd(3, 10), create_memfd(2, 20));
        let parts = [(&first, page..3 * page), (&second, 0..page)];
        let (ours, theirs) = (PrivateMapping::new(&parts).unwrap(), PrivateMapping::new(&parts).unwrap());
        assert_eq!([0, page, 2 * page].map(|at| read_byte(&ours, at)), [11, 12, 20]);
        // SAFETY: the mapping is 3 pages long.
        let second = unsafe { ours.address().add(page) };
        // SAFETY: the mapping is writable, and only this test uses it.
        unsafe { second.write(99) };
        assert_eq!((read_byte(&ours, page), read_byte(&theirs, page)), (99, 12));
        let mut seen = [0];
        rustix::io::pread(&first, &mut seen, 2 * page as u64).unwrap();
        assert_eq!(seen, [12], "the memfd is unchanged");
    }

    #[test]
    fn unaligned_or_out_of_range_parts_are_refused() {
        let page = page_bytes();
        let memfd = create_memfd(2, 0);
        for range in [1..page, 0..page - 1, page..page, 0..3 * page, usize::MAX - page + 1..usize::MAX] {
            let refused = PrivateMapping::new(&[(&memfd, range.clone())]).unwrap_err();
            assert_eq!(refused.errno, crate::Errno::EINVAL, "{range:?}");
        }
        assert_eq!(PrivateMapping::new(&[]).unwrap_err().errno, crate::Errno::EINVAL);
    }
}
