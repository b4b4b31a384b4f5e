//! Heaps of ordinary memory: memory files, and private pages.

use std::borrow::Cow;
use std::ops::Range;

use super::{Heap, HeapError, Mapping, Memfd, Memory, Pages, Populated, private};
use crate::error::Result;

/// Memory files: each segment has a file descriptor that other processes can map. Needs no device and no
/// privilege, so it is the default.
#[derive(Debug, Clone, Copy, Default)]
pub struct MemfdHeap {
    /// The page size to populate with.
    pub pages: Pages,
}

impl MemfdHeap {
    pub(crate) const NAME: &str = "memfd";
}

// SAFETY: each memory file is new, its one descriptor is in the returned value, and `Memfd` creates it without
// F_SEAL_SEAL and sealed against shrinking. Populating changes no byte. It exports nothing.
#[allow(unsafe_code)]
unsafe impl Heap for MemfdHeap {
    fn name(&self) -> Cow<'_, str> {
        Self::NAME.into()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        Memfd::create("dmaload", bytes).map(Memory::Memfd)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, HeapError> {
        mapping.populate(memory, part, self.pages)
    }

    fn pages(&self) -> Pages {
        self.pages
    }

    fn is_own(&self, _: private::Key) -> bool {
        true
    }
}

/// Private memory with transparent huge pages, for callers that need no file descriptor.
#[derive(Debug, Clone, Copy, Default)]
pub struct AnonHeap {
    /// The page size to populate with.
    pub pages: Pages,
}

impl AnonHeap {
    pub(crate) const NAME: &str = "anon";
}

// SAFETY: anonymous memory comes into being with its mapping, which dmaload makes, and has no descriptor.
// Populating changes no byte. It exports nothing.
#[allow(unsafe_code)]
unsafe impl Heap for AnonHeap {
    fn name(&self) -> Cow<'_, str> {
        Self::NAME.into()
    }

    fn allocate(&self, _bytes: usize) -> Result<Memory, HeapError> {
        Ok(Memory::Anonymous)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, HeapError> {
        mapping.populate(memory, part, self.pages)
    }

    fn pages(&self) -> Pages {
        self.pages
    }

    fn is_own(&self, _: private::Key) -> bool {
        true
    }
}
