//! Populates a mapping before data is read into it.
//!
//! The page size determines the cost of everything that follows (populating, pinning, the number
//! of block requests), so 2 MiB pages are worth some effort. `MADV_COLLAPSE` (Linux 6.1 or later,
//! mm/khugepaged.c) replaces the pages of an aligned 2 MiB extent with one huge page, for any
//! user, even with the sysfs switches at `never`. It needs at least one present page in the
//! extent. Its return value is unreliable (stock Linux 6.1 and 6.12 return EINVAL even after
//! collapsing everything), so the result is read from the page tables (`PAGEMAP_SCAN`, Linux 6.7
//! or later).
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::address::Kind;
use crate::pages::scan;
use crate::{Error, HUGE_PAGE_BYTES, Mapping, Memory, PageCount, page_bytes};

/// Which page size to populate with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pages {
    /// 2 MiB pages where possible, small ones elsewhere.
    #[default]
    Auto,
    /// Small pages only.
    Small,
    /// 2 MiB pages for every aligned 2 MiB extent. If that is impossible, populating fails. Before
    /// Linux 6.7 or without procfs, the result cannot be checked, so missing huge pages are not an
    /// error.
    Huge,
}

/// The result of [`Mapping::populate`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Populated {
    /// The page sizes obtained; `None` for a dma-buf, and if there is no cheap way to inspect them
    /// (before Linux 6.7, or without procfs).
    pub pages: Option<PageCount>,
    /// Why an extent is not on a huge page even though one was requested. Always `None` if `pages`
    /// is `None`.
    pub refused: Option<crate::Errno>,
}

/// Maximum number of attempts to collapse extents. An attempt can fail temporarily (a page under
/// migration, a contended lock).
const COLLAPSE_TRIES: usize = 3;

impl Mapping {
    /// Allocates and maps the pages of `part`, so later accesses cause no page faults. `part` is a
    /// range of byte offsets in this mapping, which must be multiples of the page size. `memory`
    /// must be the memory that backs the mapping.
    ///
    /// A read-only mapping ([`crate::Memfd::from_sealed`]) is populated with the existing pages of
    /// its file, whatever their size; nothing is written (`MADV_POPULATE_READ`, Linux 5.14 or
    /// later).
    ///
    /// # Errors
    /// ENOMEM or EFAULT when memory runs out (at a cgroup limit, for example), or the process has
    /// too many mappings; EINVAL when `part` is empty, unaligned or reaches past the mapping, when
    /// `memory` is not of the mapping's kind, and before Linux 5.14 for a read-only mapping. With
    /// [`Pages::Huge`], populating also fails when an extent is on small pages. The error is then
    /// the errno of `MADV_COLLAPSE`, or EOPNOTSUPP if that call reported success.
    pub fn populate(&self, memory: &Memory, part: Range<usize>, pages: Pages) -> Result<Populated, Error> {
        let failed = |errno| Error::from_call("populate memory", part.len(), errno);
        let page = page_bytes();
        if part.is_empty() || part.end > self.bytes() || !part.start.is_multiple_of(page) || !part.end.is_multiple_of(page) {
            return Err(failed(Errno::INVAL));
        }
        if !self.kind().fits(memory) {
            return Err(failed(Errno::INVAL));
        }
        if memory.dma_buf().is_some() {
            // The exporter is expected to have allocated all pages when it created the dma-buf.
            // The kernel does not populate mappings by page frame number (VM_PFNMAP) anyway.
            return Ok(Populated::default());
        }
        let area = Area { mapping: self, memory, part: part.clone() };
        if self.kind() == Kind::ReadOnly {
            area.fault_in(Advice::LinuxPopulateRead).map_err(failed)?;
            return Ok(Populated { pages: scan(area.addresses(part)), refused: None });
        }
        let extents = area.whole_extents();
        let refused = match pages {
            Pages::Small => {
                match area.advise(area.whole_mapping(), Advice::LinuxNoHugepage) {
                    // A kernel without huge pages does not know this advice, and doesn't need it.
                    Ok(()) | Err(Errno::INVAL) => {}
                    // After any other error, such as ENOMEM because of too many mappings, page
                    // faults could still map huge pages.
                    Err(errno) => return Err(Error::from_call("turn off huge pages for memory", part.len(), errno)),
                }
                None
            }
            Pages::Auto | Pages::Huge if extents.is_empty() => None,
            Pages::Auto | Pages::Huge => area.make_huge(extents.clone()),
        };
        area.fault_in(Advice::LinuxPopulateWrite).map_err(failed)?;

        let pages_seen = scan(area.addresses(part.clone()));
        let whole = extents.len() as u64;
        let short = pages != Pages::Small && pages_seen.is_some_and(|seen| seen.huge_bytes < whole);
        if short && pages == Pages::Huge {
            return Err(Error::from_call("use 2 MiB pages for memory", part.len(), refused.unwrap_or(Errno::NOTSUP)));
        }
        let refused = short.then(|| crate::Errno::from_rustix(refused.unwrap_or(Errno::NOTSUP)));
        Ok(Populated { pages: pages_seen, refused })
    }
}

/// Returns whether this kernel supports `MADV_POPULATE_WRITE` (Linux 5.14 or later), by trying it
/// on a scratch page.
fn kernel_populates() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let (bytes, access) = (page_bytes(), ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: no address is requested, so no existing mapping is replaced.
        let page = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) };
        // Without a scratch page, assume support. If that is wrong, populating returns EINVAL.
        let Ok(page) = page else { return true };
        // SAFETY: the page was just mapped, and nothing else uses it.
        let answer = unsafe { madvise(page, bytes, Advice::LinuxPopulateWrite) };
        // SAFETY: the page was mapped above, and is not used afterwards.
        let _ = unsafe { munmap(page, bytes) };
        answer != Err(Errno::INVAL)
    })
}

struct Area<'a> {
    mapping: &'a Mapping,
    memory: &'a Memory,
    part: Range<usize>,
}

impl Area<'_> {
    /// Returns the range of the whole mapping. If only a part of it were advised, the kernel would
    /// split the mapping and later merge it again, while holding the lock that populating threads
    /// need.
    fn whole_mapping(&self) -> Range<usize> {
        0..self.mapping.bytes()
    }

    /// Returns the range of the aligned 2 MiB extents that lie entirely in the area. A mapping
    /// begins at offset 0 of its memory, so in an aligned mapping, aligned addresses correspond to
    /// aligned offsets in the memory.
    fn whole_extents(&self) -> Range<usize> {
        if !self.mapping.address().addr().get().is_multiple_of(HUGE_PAGE_BYTES) {
            return 0..0;
        }
        let start = self.part.start.next_multiple_of(HUGE_PAGE_BYTES);
        let end = self.part.end / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
        if start < end { start..end } else { 0..0 }
    }

    /// Tries to back each extent with a huge page. Returns the last error if no attempt succeeded.
    fn make_huge(&self, extents: Range<usize>) -> Option<Errno> {
        // Lets page faults use huge pages where the administrator allows them. Fails on kernels
        // without THP.
        let _ = self.advise(self.whole_mapping(), Advice::LinuxHugepage);
        match self.memory {
            // Collapsing an extent requires that at least one of its pages is present.
            Memory::Memfd(memfd) => {
                for extent in extents.clone().step_by(HUGE_PAGE_BYTES) {
                    memfd.allocate(extent as u64, page_bytes() as u64);
                }
            }
            // Faulting in one page of an extent yields a huge page if the kernel allows that.
            // Otherwise, the extent now has the one present page that collapsing requires.
            Memory::Anonymous | Memory::DmaBuf(_) => {
                for extent in extents.clone().step_by(HUGE_PAGE_BYTES) {
                    let _ = self.advise(extent..extent + page_bytes(), Advice::LinuxPopulateWrite);
                }
            }
        }
        let mut refused = None;
        for _ in 0..COLLAPSE_TRIES {
            match self.collapse(extents.clone()) {
                Ok(()) => return None,
                Err(errno) => refused = Some(errno),
            }
            // Retry only after errors that are documented as temporary.
            if !matches!(refused, Some(Errno::AGAIN | Errno::BUSY)) {
                break;
            }
        }
        if let Some(Errno::INVAL | Errno::NOMEM) = refused {
            let seen = scan(self.addresses(extents));
            if seen.is_some_and(|seen| seen.huge_bytes == 0) {
                self.allocate_small();
            }
        }
        refused
    }

    /// If a memfd backs the area, allocates its small pages in one call, which is cheaper than one
    /// page fault per page.
    fn allocate_small(&self) {
        if let Memory::Memfd(memfd) = self.memory {
            memfd.allocate(self.part.start as u64, self.part.len() as u64);
        }
    }

    fn collapse(&self, part: Range<usize>) -> Result<(), Errno> {
        let (address, bytes) = self.pointer(part);
        // SAFETY: the range lies in the mapping; collapsing moves pages but changes no bytes.
        let result = unsafe { libc::madvise(address, bytes, libc::MADV_COLLAPSE) };
        if result == 0 { Ok(()) } else { Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)) }
    }

    /// Makes every page present, and also writable unless `advice` is `MADV_POPULATE_READ`.
    fn fault_in(&self, advice: Advice) -> Result<(), Errno> {
        loop {
            match self.advise(self.part.clone(), advice) {
                Err(Errno::INTR | Errno::AGAIN) => {}
                // EINVAL has two possible causes: a kernel before 5.14, which lacks this
                // advice, and a mapping that is not writable. Touching the pages helps only in the
                // first case.
                Err(Errno::INVAL) if self.mapping.kind() != Kind::ReadOnly && !kernel_populates() => {
                    self.touch();
                    return Ok(());
                }
                other => return other,
            }
        }
    }

    /// Makes every page present and writable, like `MADV_POPULATE_WRITE`. Atomically adding 0 to a
    /// byte dirties its page and leaves the byte unchanged.
    fn touch(&self) {
        assert_ne!(self.mapping.kind(), Kind::ReadOnly, "writing to a read-only mapping would kill the process");
        for at in self.part.clone().step_by(page_bytes()) {
            // SAFETY: `at` lies in the mapping, which is readable and, by the assertion above,
            // writable.
            let byte = unsafe { self.mapping.address().add(at) };
            // SAFETY: an AtomicU8 has the size and alignment of a u8. The byte stays mapped as
            // long as `self.mapping` lives.
            let byte = unsafe { byte.cast::<std::sync::atomic::AtomicU8>().as_ref() };
            byte.fetch_add(0, std::sync::atomic::Ordering::Relaxed);
        }
    }

    fn advise(&self, part: Range<usize>, advice: Advice) -> Result<(), Errno> {
        let (address, bytes) = self.pointer(part);
        // SAFETY: the range lies in the mapping. The advice used here (MADV_HUGEPAGE,
        // MADV_NOHUGEPAGE, MADV_POPULATE_READ and MADV_POPULATE_WRITE) changes no bytes.
        unsafe { madvise(address, bytes, advice) }
    }

    fn pointer(&self, part: Range<usize>) -> (*mut c_void, usize) {
        let start: NonNull<u8> = self.mapping.address();
        (start.as_ptr().wrapping_add(part.start).cast(), part.len())
    }

    fn addresses(&self, part: Range<usize>) -> Range<usize> {
        let start = self.mapping.address().addr().get();
        start + part.start..start + part.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AddressRange, Memfd, huge_bytes_in};

    fn map_whole(memory: &Memory, bytes: usize) -> Mapping {
        AddressRange::reserve(bytes).unwrap().map(memory, 0, bytes).unwrap()
    }

    fn resident_bytes(memory: &Memory) -> u64 {
        rustix::fs::fstat(memory.memfd().unwrap()).unwrap().st_blocks.cast_unsigned() * 512
    }

    #[test]
    fn populating_allocates_exactly_the_pages_of_the_part() {
        let bytes = 4 * HUGE_PAGE_BYTES;
        for pages in [Pages::Small, Pages::Auto] {
            let memory = Memory::Memfd(Memfd::create("test", bytes).unwrap());
            let mapping = map_whole(&memory, bytes);
            mapping.populate(&memory, HUGE_PAGE_BYTES..2 * HUGE_PAGE_BYTES + page_bytes(), pages).unwrap();
            let expected = (HUGE_PAGE_BYTES + page_bytes()) as u64;
            assert_eq!(resident_bytes(&memory), expected, "{pages:?}");
        }
    }

    #[test]
    fn small_pages_are_small_according_to_smaps() {
        let bytes = 2 * HUGE_PAGE_BYTES;
        for memory in [Memory::Memfd(Memfd::create("test", bytes).unwrap()), Memory::Anonymous] {
            let mapping = map_whole(&memory, bytes);
            let populated = mapping.populate(&memory, 0..bytes, Pages::Small).unwrap();
            let start = mapping.address().addr().get();
            assert_eq!(huge_bytes_in(start..start + bytes).huge_bytes, 0);
            assert_eq!(populated.refused, None);
        }
    }

    #[test]
    fn missing_huge_pages_are_reported() {
        let bytes = 3 * HUGE_PAGE_BYTES + 5 * page_bytes();
        for memory in [Memory::Memfd(Memfd::create("test", bytes).unwrap()), Memory::Anonymous] {
            let mapping = map_whole(&memory, bytes);
            let populated = mapping.populate(&memory, 0..bytes, Pages::Auto).unwrap();
            if let Some(seen) = populated.pages {
                assert_eq!(seen.seen_bytes, bytes as u64);
                assert_eq!(seen.huge_bytes == 3 * HUGE_PAGE_BYTES as u64, populated.refused.is_none());
            }
        }
    }

    #[test]
    fn unaligned_empty_or_too_long_part_is_not_populated() {
        let memory = Memory::Anonymous;
        let mapping = map_whole(&memory, 4 * page_bytes());
        for part in [0..1, 1..page_bytes(), 0..5 * page_bytes(), 0..0] {
            assert_eq!(mapping.populate(&memory, part, Pages::Auto).unwrap_err().errno, crate::Errno::EINVAL);
        }
    }

    #[test]
    fn read_only_mapping_is_populated_without_writing() {
        use std::os::fd::AsFd;
        let bytes = 2 * HUGE_PAGE_BYTES;
        for pages in [Pages::Auto, Pages::Small, Pages::Huge] {
            let memfd = Memfd::create("test", bytes).unwrap();
            rustix::io::pwrite(&memfd, b"kept", 4096).unwrap();
            memfd.seal_against_writes().unwrap();
            let foreign = Memory::Memfd(Memfd::from_sealed(memfd.as_fd().try_clone_to_owned().unwrap()).unwrap());
            let mapping = map_whole(&foreign, bytes);
            mapping.populate(&foreign, 0..bytes, pages).unwrap();
            // Memory that is not of the mapping's kind is refused.
            for other in [Memory::Anonymous, Memory::Memfd(Memfd::create("other", bytes).unwrap())] {
                assert_eq!(mapping.populate(&other, 0..bytes, pages).unwrap_err().errno, crate::Errno::EINVAL);
            }
        }
    }

    #[test]
    fn populating_again_keeps_the_bytes() {
        let bytes = 2 * HUGE_PAGE_BYTES;
        let memory = Memory::Memfd(Memfd::create("test", bytes).unwrap());
        let mapping = map_whole(&memory, bytes);
        rustix::io::pwrite(memory.memfd().unwrap(), b"kept", 4096).unwrap();
        mapping.populate(&memory, 0..bytes, Pages::Auto).unwrap();
        let area = Area { mapping: &mapping, memory: &memory, part: 0..bytes };
        area.touch();
        let mut seen = [0; 4];
        rustix::io::pread(memory.memfd().unwrap(), &mut seen, 4096).unwrap();
        assert_eq!(&seen, b"kept");
    }
}
