//! Memory files as memory of this process alone: pages that are shared until they are written to.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};

use crate::address::{reserve_hole, trim};
use crate::{Error, Memfd, page_bytes};

/// Parts of memory files, mapped side by side, readable and writable, and copied on write.
///
/// A write changes the bytes that this mapping shows, and neither the memory file nor what others
/// have mapped of it. It takes a page of memory for each page that is written to. A file that is
/// sealed against writes can be mapped so, and what others write to one that is not may show in
/// pages that have not been written to here.
///
/// From Linux 5.1 to 5.12 a file that is sealed against writes is copied as a whole instead: there
/// such a mapping would not be copied on write after a fork, so that parent and child would see
/// each other's writes.
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
            let (place, length) = (start.wrapping_byte_add(at), range.len());
            // SAFETY: the ranges' lengths add up to that of the reservation, so this replaces
            // addresses that were reserved above and that only this function knows.
            let mapped = unsafe { mmap(place, length, ProtFlags::READ, reserved | MapFlags::FIXED, memfd, range.start as u64) };
            if let Err(errno) = mapped {
                if !reserve_hole(place, length) {
                    mapping.unmap_around(at..at + length);
                }
                return Err(failed(errno));
            }
            at += length;
        }
        match mapping.make_writable() {
            Ok(()) => Ok(mapping),
            // The kernel has taken the right to write from the mapping, as it should from shared
            // ones only, and so does not know that it is copied on write.
            Err(Errno::ACCESS) => PrivateMapping::copied(parts, bytes).map_err(failed),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Asks for the right to write only after mapping, because the kernel refuses it then where it
    /// would not copy on write.
    fn make_writable(&self) -> Result<(), Errno> {
        // SAFETY: these addresses are this value's alone, and no reference to their bytes exists.
        unsafe { mprotect(self.address.as_ptr().cast(), self.bytes, MprotectFlags::READ | MprotectFlags::WRITE) }
    }

    /// Memory with the bytes of these parts.
    fn copied(parts: &[(&Memfd, Range<usize>)], bytes: usize) -> Result<Self, Errno> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: no address is asked for, so nothing that exists is replaced.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) }?;
        let address = NonNull::new(start.cast::<u8>()).ok_or(Errno::NOMEM)?;
        let mapping = PrivateMapping { address, bytes };
        // SAFETY: it was mapped above with that many bytes, which are zero, and only this function
        // knows of it.
        let mut rest = unsafe { std::slice::from_raw_parts_mut(address.as_ptr(), bytes) };
        for (memfd, range) in parts {
            let (mut part, behind) = rest.split_at_mut(range.len());
            let mut offset = range.start as u64;
            while !part.is_empty() {
                match rustix::io::pread(memfd, &mut *part, offset) {
                    // The rest of the file's last page is zero.
                    Ok(0) => break,
                    Ok(read) => {
                        offset += read as u64;
                        part = &mut part[read..];
                    }
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno),
                }
            }
            rest = behind;
        }
        Ok(mapping)
    }

    /// Unmaps all but these addresses, which may belong to others.
    fn unmap_around(self, lost: Range<usize>) {
        let this = ManuallyDrop::new(self);
        let at = |offset| this.address.as_ptr().wrapping_add(offset).cast::<c_void>();
        trim(at(0), lost.start);
        trim(at(lost.end), this.bytes - lost.end);
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
    use crate::address::is_reserved;

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

    /// What Linux 5.1 to 5.12 gets.
    #[test]
    fn copy_has_the_bytes_of_its_parts_and_is_writable() {
        let page = page_bytes();
        let (first, second) = (memfd(3, 10), memfd(2, 20));
        let copy = PrivateMapping::copied(&[(&first, page..3 * page), (&second, 0..page)], 3 * page).unwrap();
        assert_eq!([0, page, 2 * page, 3 * page - 1].map(|at| byte_at(&copy, at)), [11, 12, 20, 20]);
        // SAFETY: it is writable, and known to this test alone.
        unsafe { copy.address().write(99) };
        let mut seen = [0];
        rustix::io::pread(&first, &mut seen, page as u64).unwrap();
        assert_eq!((byte_at(&copy, 0), seen), (99, [11]));
        let odd = Memfd::create("test", 7).unwrap();
        rustix::io::pwrite(&odd, b"sevenby", 0).unwrap();
        let copy = PrivateMapping::copied(&[(&odd, 0..page)], page).unwrap();
        assert_eq!([0, 6, 7, page - 1].map(|at| byte_at(&copy, at)), [b's', b'y', 0, 0]);
    }

    /// Children share the pages until one of them writes.
    #[test]
    fn mapping_is_copied_on_write_after_a_fork() {
        let memfd = memfd(1, 10);
        let mapping = PrivateMapping::new(&[(&memfd, 0..page_bytes())]).unwrap();
        // SAFETY: it is writable, and known to this test alone.
        unsafe { mapping.address().write(1) };
        // SAFETY: the child only writes a byte and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above, and mapped in the child, too.
            unsafe { mapping.address().write(2) };
            // SAFETY: it runs no handlers and returns to nothing.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: the child is this test's own.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!((status, byte_at(&mapping, 0)), (0, 1), "the child's write is its own");
    }

    #[test]
    fn refused_mapping_unmaps_no_addresses_that_may_be_anothers() {
        let page = page_bytes();
        let reserved = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is asked for.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), 3 * page, ProtFlags::empty(), reserved) }.unwrap();
        let places = [0, 1, 2].map(|number| start.wrapping_byte_add(number * page));
        let mapping = PrivateMapping { address: NonNull::new(start.cast()).unwrap(), bytes: 3 * page };
        assert!(!reserve_hole(places[1], page), "something is there");
        mapping.unmap_around(page..2 * page);
        assert_eq!(places.map(is_reserved), [false, true, false]);
        assert!(reserve_hole(places[0], page), "nothing was there");
        assert!(is_reserved(places[0]));
        trim(start, 2 * page);
        assert_eq!(places.map(is_reserved), [false; 3]);
    }
}
