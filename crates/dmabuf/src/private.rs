//! Copy-on-write mappings of memfds.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};

use crate::address::{reserve_hole, trim};
use crate::{Error, Memfd, page_bytes};

/// A readable and writable copy-on-write mapping that places parts of memfds side by side.
///
/// A write changes only the bytes seen through this mapping, not the memfd or its other mappings.
/// The first write to a page allocates a private copy of the page. A memfd that is sealed against
/// writes can be mapped this way. If a memfd is not sealed, later writes by others can appear in
/// pages that have no private copy yet.
///
/// On Linux 5.1 to 5.4, all parts are copied instead if any memfd is sealed against writes. On
/// these kernels, a fork would not treat the mapping as copy-on-write, so parent and child would
/// see each other's writes.
///
/// Dropping the mapping unmaps the addresses and frees the private copies.
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
    /// Maps byte ranges of memfds in the given order, without gaps between them.
    ///
    /// # Errors
    /// EINVAL when `parts` is empty, or when a range is empty, is not page-aligned, or reaches
    /// past the last page of its memfd; otherwise the errno of `mmap(2)`, `mprotect(2)` or
    /// `pread(2)`.
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
        // From here on, an early return drops the mapping, which unmaps everything. The only
        // exception is a place that may hold an unrelated mapping by then: see `unmap_around`.
        let mapping = PrivateMapping { address, bytes };
        let mut at = 0;
        for (memfd, range) in parts {
            let (place, length) = (start.wrapping_byte_add(at), range.len());
            // SAFETY: the ranges' lengths add up to that of the reservation, so this replaces only
            // addresses that were reserved above and that nothing else uses.
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
            // Linux 5.1 to 5.4 clear VM_MAYWRITE even for private mappings of a sealed memfd. A
            // fork does not treat a mapping without that flag as copy-on-write.
            Err(Errno::ACCESS) => PrivateMapping::copied(parts, bytes).map_err(failed),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Makes the pages writable. The parts are mapped without write access first, because kernels
    /// that do not treat the mapping as copy-on-write accept a writable `mmap(2)`, but refuse this
    /// `mprotect(2)`.
    fn make_writable(&self) -> Result<(), Errno> {
        // SAFETY: only this value owns the addresses, and no reference to their bytes exists.
        unsafe { mprotect(self.address.as_ptr().cast(), self.bytes, MprotectFlags::READ | MprotectFlags::WRITE) }
    }

    /// Copies the parts into anonymous memory.
    fn copied(parts: &[(&Memfd, Range<usize>)], bytes: usize) -> Result<Self, Errno> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: no address is requested, so no existing mapping is replaced.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) }?;
        let address = NonNull::new(start.cast::<u8>()).ok_or(Errno::NOMEM)?;
        let mapping = PrivateMapping { address, bytes };
        // SAFETY: the memory was mapped above with this length, is zeroed, and is used only here.
        let mut rest = unsafe { std::slice::from_raw_parts_mut(address.as_ptr(), bytes) };
        for (memfd, range) in parts {
            let (mut part, remaining) = rest.split_at_mut(range.len());
            let mut offset = range.start as u64;
            while !part.is_empty() {
                match rustix::io::pread(memfd, &mut *part, offset) {
                    // The memory after the file's end stays zero, as in a mapping.
                    Ok(0) => break,
                    Ok(read) => {
                        offset += read as u64;
                        part = &mut part[read..];
                    }
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno),
                }
            }
            rest = remaining;
        }
        Ok(mapping)
    }

    /// Unmaps all addresses except `lost`, which may belong to another mapping.
    fn unmap_around(self, lost: Range<usize>) {
        let this = ManuallyDrop::new(self);
        let at = |offset| this.address.as_ptr().wrapping_add(offset).cast::<c_void>();
        trim(at(0), lost.start);
        trim(at(lost.end), this.bytes - lost.end);
    }

    /// Returns the first address, which is page-aligned.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// Returns the length in bytes, a multiple of the page size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for PrivateMapping {
    fn drop(&mut self) {
        // SAFETY: the addresses belong to this value alone, and nothing uses them afterwards.
        let _ = unsafe { munmap(self.address.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{assert_in_some_attempt, is_reserved};

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
        assert_eq!(seen, [12], "the memfd must be unchanged");
    }

    #[test]
    fn unaligned_empty_or_out_of_range_parts_are_refused() {
        let page = page_bytes();
        let memfd = create_memfd(2, 0);
        for range in [1..page, 0..page - 1, page..page, 0..3 * page, usize::MAX - page + 1..usize::MAX] {
            let refused = PrivateMapping::new(&[(&memfd, range.clone())]).unwrap_err();
            assert_eq!(refused.errno, crate::Errno::EINVAL, "{range:?}");
        }
        assert_eq!(PrivateMapping::new(&[]).unwrap_err().errno, crate::Errno::EINVAL);
    }

    /// `PrivateMapping::new` makes this copy on Linux 5.1 to 5.4.
    #[test]
    fn copy_has_the_bytes_of_its_parts_and_is_writable() {
        let page = page_bytes();
        let (first, second) = (create_memfd(3, 10), create_memfd(2, 20));
        let copy = PrivateMapping::copied(&[(&first, page..3 * page), (&second, 0..page)], 3 * page).unwrap();
        assert_eq!([0, page, 2 * page, 3 * page - 1].map(|at| read_byte(&copy, at)), [11, 12, 20, 20]);
        // SAFETY: the memory is writable, and only this test uses it.
        unsafe { copy.address().write(99) };
        let mut seen = [0];
        rustix::io::pread(&first, &mut seen, page as u64).unwrap();
        assert_eq!((read_byte(&copy, 0), seen), (99, [11]));
        let odd = Memfd::create("test", 7).unwrap();
        rustix::io::pwrite(&odd, b"sevenby", 0).unwrap();
        let copy = PrivateMapping::copied(&[(&odd, 0..page)], page).unwrap();
        assert_eq!([0, 6, 7, page - 1].map(|at| read_byte(&copy, at)), [b's', b'y', 0, 0]);
    }

    /// Parent and child share the pages until one of them writes.
    #[test]
    fn mapping_is_copied_on_write_after_a_fork() {
        let memfd = create_memfd(1, 10);
        let mapping = PrivateMapping::new(&[(&memfd, 0..page_bytes())]).unwrap();
        // SAFETY: the memory is writable, and only this test uses it.
        unsafe { mapping.address().write(1) };
        // SAFETY: the child only writes a byte and exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above; the mapping also exists in the child.
            unsafe { mapping.address().write(2) };
            // SAFETY: _exit runs no handlers and does not return.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: this test started the child, and `status` is valid for writes.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!((status, read_byte(&mapping, 0)), (0, 1), "the parent must not see the child's write");
    }

    #[test]
    fn unmap_around_spares_addresses_of_a_foreign_mapping() {
        let page = page_bytes();
        let reserved = MapFlags::PRIVATE | MapFlags::NORESERVE;
        assert_in_some_attempt(|| {
            // SAFETY: no address is requested, so no existing mapping is replaced.
            let start = unsafe { mmap_anonymous(std::ptr::null_mut(), 3 * page, ProtFlags::empty(), reserved) }.unwrap();
            let places = [0, 1, 2].map(|number| start.wrapping_byte_add(number * page));
            let mapping = PrivateMapping { address: NonNull::new(start.cast()).unwrap(), bytes: 3 * page };
            assert!(!reserve_hole(places[1], page), "mapped addresses must not be reserved again");
            mapping.unmap_around(page..2 * page);
            let after_unmap = places.map(is_reserved);
            // The addresses are free, unless another thread has just taken them.
            let was_free = reserve_hole(places[0], page);
            let after_reserve = is_reserved(places[0]);
            trim(places[1], page);
            if was_free {
                trim(places[0], page);
            }
            let seen = (after_unmap, was_free, after_reserve, places.map(is_reserved));
            (seen, ([false, true, false], true, true, [false; 3]))
        });
    }
}
