//! Finished segments: memory that holds a known range of a file, and changes no more.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::memory::Backing;

/// A contiguous piece of a heap's memory that holds a range of a file, complete.
///
/// Cheap to clone; the memory is freed, by a thread of its own, when the last clone and the last view are gone, and
/// outlives the loader.
#[derive(Clone)]
pub struct Segment(Arc<Inner>);

struct Inner {
    index: usize,
    file_index: usize,
    path: Arc<PathBuf>,
    file_range: Range<u64>,
    heap: Arc<str>,
    backing: Arc<Backing>,
}

impl Segment {
    /// Makes a segment of memory that is filled.
    ///
    /// # Safety
    /// All bytes of `file_range` must have been read into the memory, from its start; nothing in the kernel may still
    /// write to it, and nothing in this process may ever again.
    pub(crate) unsafe fn new(
        index: usize,
        file_index: usize,
        path: Arc<PathBuf>,
        file_range: Range<u64>,
        heap: Arc<str>,
        backing: Arc<Backing>,
    ) -> Self {
        assert!(file_range.end - file_range.start <= backing.bytes() as u64, "a segment's bytes fit into its memory");
        Segment(Arc::new(Inner { index, file_index, path, file_range, heap, backing }))
    }

    /// Its number in the load, counted over all files.
    pub fn index(&self) -> usize {
        self.0.index
    }

    /// The number of its file in the load.
    pub fn file_index(&self) -> usize {
        self.0.file_index
    }

    /// The path of its file, as it was given.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The bytes of the file that it holds.
    pub fn file_range(&self) -> Range<u64> {
        self.0.file_range.clone()
    }

    /// How many bytes of the file it holds.
    pub fn len(&self) -> usize {
        self.as_ref().len()
    }

    /// Whether it holds none; no load gives such a segment.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The length of its memory: that of its bytes, rounded up. What lies beyond them is zero.
    pub fn memory_bytes(&self) -> usize {
        self.0.backing.bytes()
    }

    /// Its bytes, without a copy. They keep the memory alive.
    ///
    /// # Errors
    /// None yet: a heap whose descriptors allow others to write will refuse it once a descriptor is out.
    pub fn bytes(&self) -> Result<Bytes> {
        Ok(Bytes::from_owner(self.clone()))
    }

    /// The memory file's descriptor, to be given to other processes: they can map it, read-only.
    ///
    /// It is sealed before it is shown: nobody can write to it, resize it or punch holes into it, so the bytes here
    /// stay what they are. With [`crate::Layout::Segmented`] the segment's bytes begin at offset 0.
    ///
    /// # Errors
    /// [`Error::NoDescriptor`] on a heap of other memory; [`Error::Memory`] where the seal is refused (Linux before 5.1).
    pub fn memfd(&self) -> Result<BorrowedFd<'_>> {
        let heap = || self.0.heap.to_string();
        let memfd = self.0.backing.parts().and_then(|(_, memory)| memory.memfd());
        let memfd = memfd.ok_or_else(|| Error::NoDescriptor { heap: heap(), wanted: "memfd" })?;
        let bytes = self.len() as u64;
        let failed = |refusal| Error::Memory { heap: heap(), refusal, loaded_bytes: bytes, planned_bytes: bytes };
        memfd.seal_against_writes().map_err(failed)?;
        Ok(memfd.as_fd())
    }

    /// The first address of its memory. Segments of a file lie in memory as they do in the file, without gaps.
    pub(crate) fn address(&self) -> usize {
        self.0.backing.address().addr().get()
    }
}

impl AsRef<[u8]> for Segment {
    fn as_ref(&self) -> &[u8] {
        let bytes = usize::try_from(self.0.file_range.end - self.0.file_range.start).unwrap_or(0);
        // SAFETY: the memory is mapped as long as the backing lives, holds that many bytes (checked in `new`), all of
        // them initialised, and nobody writes to it any more (promised to `new`; descriptors are sealed first).
        unsafe { std::slice::from_raw_parts(self.0.backing.address().as_ptr(), bytes) }
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { index, path, file_range, heap, .. } = &*self.0;
        f.debug_struct("Segment")
            .field("index", index)
            .field("path", path)
            .field("file_range", file_range)
            .field("heap", heap)
            .finish()
    }
}

/// A file's segments, seen as one.
#[derive(Debug, Clone)]
pub(crate) struct Contiguous {
    segments: Arc<[Segment]>,
    range: Range<u64>,
}

impl Contiguous {
    /// The bytes `range` of the file that these segments hold, all of it, in order.
    ///
    /// # Panics
    /// When the segments do not hold the range, or do not lie in memory as they do in the file.
    pub(crate) fn new(segments: Arc<[Segment]>, range: Range<u64>) -> Self {
        let mut expected = segments.first().map(|first| (first.file_range().start, first.address()));
        for segment in &*segments {
            assert_eq!(Some((segment.file_range().start, segment.address())), expected, "segments lie side by side");
            expected = Some((segment.file_range().end, segment.address() + segment.len()));
        }
        let held = segments.first().map_or(0, |first| first.file_range().start)..expected.map_or(0, |(end, _)| end);
        assert!(range.is_empty() || (held.start <= range.start && range.end <= held.end), "{range:?} is not within {held:?}");
        Contiguous { segments, range }
    }

    pub(crate) fn bytes(self) -> Bytes {
        if self.range.is_empty() { Bytes::new() } else { Bytes::from_owner(self) }
    }
}

impl AsRef<[u8]> for Contiguous {
    fn as_ref(&self) -> &[u8] {
        let Some(first) = self.segments.first() else { return &[] };
        let offset = usize::try_from(self.range.start - first.file_range().start).unwrap_or(0);
        let bytes = usize::try_from(self.range.end - self.range.start).unwrap_or(0);
        // SAFETY: `new` has checked that the range lies within the segments' bytes, and that these lie side by side in
        // one reserved address range.
        let start = unsafe { first.0.backing.address().add(offset) };
        // SAFETY: as above; each segment is mapped, complete and unchanging as long as it lives (see `Segment::new`).
        unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) }
    }
}
