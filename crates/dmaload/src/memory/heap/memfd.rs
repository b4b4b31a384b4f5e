//! Heaps of ordinary memory: memfds and private pages.

use std::borrow::Cow;

use super::{Heap, HeapError, Memfd, Memory, Pages, private};
use crate::error::Result;

/// A heap of memfds, which other processes can map through their file descriptors. Each segment
/// has its own descriptor, except that small segments may share one. This heap needs no device and
/// no privileges, so it is the default.
#[derive(Debug, Clone, Copy, Default)]
pub struct MemfdHeap {
    /// The page size to populate with.
    pub pages: Pages,
}

impl MemfdHeap {
    pub(crate) const NAME: &str = "memfd";
}

// SAFETY: each memfd is new, and the returned value has its only descriptor. `Memfd::create`
// allows sealing, and seals it only against shrinking. `Mapping::populate` changes no bytes. This
// heap does not export.
#[allow(unsafe_code)]
unsafe impl Heap for MemfdHeap {
    fn name(&self) -> Cow<'_, str> {
        Self::NAME.into()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        Memfd::create("dmaload", bytes).map(Memory::Memfd)
    }

    fn pages(&self) -> Pages {
        self.pages
    }

    fn is_own(&self, _: private::Key) -> bool {
        true
    }
}

/// A heap of private anonymous memory, for callers that need no file descriptor.
#[derive(Debug, Clone, Copy, Default)]
pub struct AnonHeap {
    /// The page size to populate with.
    pub pages: Pages,
}

impl AnonHeap {
    pub(crate) const NAME: &str = "anon";
}

// SAFETY: anonymous memory is created with its mapping, which dmaload makes, and has no
// descriptor. `Mapping::populate` changes no bytes. This heap does not export.
#[allow(unsafe_code)]
unsafe impl Heap for AnonHeap {
    fn name(&self) -> Cow<'_, str> {
        Self::NAME.into()
    }

    fn allocate(&self, _bytes: usize) -> Result<Memory, HeapError> {
        Ok(Memory::Anonymous)
    }

    fn pages(&self) -> Pages {
        self.pages
    }

    fn is_own(&self, _: private::Key) -> bool {
        true
    }
}
