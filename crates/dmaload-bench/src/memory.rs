//! Memory from a heap in one contiguous address range, populated or not.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use dmabuf::{AddressRange, Error, HUGE_PAGE_BYTES, Mapping, Memory, huge_bytes_in, page_bytes};
use dmaload::heap::Heap;

/// The maximum size of a region's parts, equal to the engine's default segment size.
pub(crate) const PART_BYTES: usize = 64 << 20;

/// A contiguous address range, backed by one or more allocations, which are its parts.
#[derive(Debug)]
pub(crate) struct Region {
    /// The parts in address order. Their mappings keep the address range reserved.
    parts: Vec<(Mapping, Memory)>,
    address: NonNull<u8>,
    bytes: usize,
}

/// A range within a region that the ring can read into.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// The address of its first byte.
    pub(crate) address: NonNull<u8>,
    /// The number of the part that contains it.
    pub(crate) part: u16,
}

impl Region {
    /// Allocates `bytes` bytes, rounded up to whole pages. The memory is not populated yet,
    /// unless the heap does that when it allocates.
    ///
    /// # Errors
    /// The kernel's error.
    pub(crate) fn allocate(heap: &dyn Heap, bytes: usize) -> Result<Self, Error> {
        let bytes = bytes.max(1).next_multiple_of(page_bytes());
        let limit = heap.size_limit().and_then(|limit| usize::try_from(limit.bytes).ok()).unwrap_or(usize::MAX);
        let part_bytes = PART_BYTES.min(limit / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES).max(HUGE_PAGE_BYTES);
        let range = AddressRange::reserve(bytes)?;
        let mut parts = Vec::new();
        for at in (0..bytes).step_by(part_bytes) {
            let length = part_bytes.min(bytes - at);
            let memory = heap.allocate(length)?;
            let mapping = range.map(&memory, at, length)?;
            parts.push((mapping, memory));
        }
        Ok(Region { parts, address: range.base(), bytes })
    }

    /// Populates the whole region with up to two threads, which is also the number of threads that
    /// the engine starts with.
    ///
    /// # Errors
    /// The kernel's error.
    pub(crate) fn populate(&self, heap: &dyn Heap) -> Result<(), Error> {
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get().min(2));
        let share = self.parts.len().div_ceil(threads).max(1);
        let populate = |parts: &[(Mapping, Memory)]| -> Result<(), Error> {
            parts.iter().try_for_each(|(mapping, memory)| heap.populate(mapping, memory, 0..mapping.bytes()).map(|_| ()))
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = self.parts.chunks(share).map(|parts| scope.spawn(move || populate(parts))).collect();
            workers.into_iter().try_for_each(|worker| match worker.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    }

    /// Allocates populated memory.
    ///
    /// # Errors
    /// The kernel's error.
    pub(crate) fn populated(heap: &Arc<dyn Heap>, bytes: usize) -> Result<Self, Error> {
        let region = Self::allocate(heap, bytes)?;
        region.populate(heap)?;
        Ok(region)
    }

    /// Iterates over the parts in address order.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &(Mapping, Memory)> {
        self.parts.iter()
    }

    /// The size of each part. The last part may be shorter.
    pub(crate) fn part_bytes(&self) -> usize {
        self.parts.first().map_or(PART_BYTES, |(mapping, _)| mapping.bytes())
    }

    /// The address of the first byte.
    pub(crate) fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// The length, a whole number of pages.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns a range within the region, or `None` if the range crosses a boundary between parts,
    /// or the region's end.
    pub(crate) fn place(&self, at: usize, bytes: usize) -> Option<Place> {
        let number = at / self.part_bytes();
        let (mapping, _) = self.parts.get(number)?;
        let within = at - number * self.part_bytes();
        let end = within.checked_add(bytes).filter(|&end| end <= mapping.bytes())?;
        let start = NonNull::new(mapping.address().as_ptr().wrapping_add(end - bytes))?;
        Some(Place { address: start, part: u16::try_from(number).ok()? })
    }

    /// Returns the page size used for most of the region, in bytes.
    pub(crate) fn page_bytes(&self) -> u64 {
        let start = self.address.addr().get();
        page_bytes_of(start..start + self.bytes)
    }
}

/// Returns the page size used for most of the memory at these addresses, in bytes.
pub(crate) fn page_bytes_of(addresses: Range<usize>) -> u64 {
    let seen = huge_bytes_in(addresses);
    (if seen.huge_bytes * 2 > seen.seen_bytes { HUGE_PAGE_BYTES } else { page_bytes() }) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;
    use dmabuf::Pages;
    use dmaload::heap::{AnonHeap, MemfdHeap};

    #[test]
    fn parts_are_contiguous_in_memory() {
        let heap: Arc<dyn Heap> = Arc::new(MemfdHeap { pages: Pages::Auto });
        let mut region = Region::populated(&heap, PART_BYTES + 5000).unwrap();
        assert_eq!((region.bytes(), region.parts().count()), (PART_BYTES + 8192, 2));
        sys::bytes_mut(&mut region)[PART_BYTES - 1..=PART_BYTES].copy_from_slice(b"ab");
        assert_eq!(sys::bytes(&region)[PART_BYTES - 1..=PART_BYTES], *b"ab");
    }

    #[test]
    fn place_is_within_one_part() {
        let heap = AnonHeap { pages: Pages::Small };
        let region = Region::allocate(&heap, PART_BYTES + 4096).unwrap();
        assert_eq!(region.place(0, PART_BYTES).unwrap().part, 0);
        let second = region.place(PART_BYTES, 4096).unwrap();
        assert_eq!((second.part, second.address.addr().get()), (1, region.address().addr().get() + PART_BYTES));
        for (at, bytes) in [(PART_BYTES - 1, 2), (PART_BYTES, 4097), (PART_BYTES + 4096, 1), (0, usize::MAX)] {
            assert!(region.place(at, bytes).is_none(), "{at} {bytes}");
        }
    }

    #[test]
    fn small_pages_are_detected() {
        let heap: Arc<dyn Heap> = Arc::new(AnonHeap { pages: Pages::Small });
        assert_eq!(Region::populated(&heap, 4 << 20).unwrap().page_bytes(), 4096);
    }
}
