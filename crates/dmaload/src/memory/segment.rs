//! Finished segments: memory that holds a known range of a file.
//!
//! Its bytes are either lent, as views under which nothing is written, or its dma-buf is handed
//! out, and then whoever has it may write: never both. The first of the two decides; views that
//! are dropped undo their part, handing out is for good.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;
use dmabuf::{Access, DmaBuf, Errno};

use crate::error::{Error, Result};
use crate::memory::backing::Backing;
use crate::plan::tensors::FileTensors;
use crate::support::convert::to_usize;

/// A contiguous piece of a heap's memory that holds a range of a file, complete.
///
/// Small files that follow one another in a load share memory: their segments have one dma-buf or memfd, each at its own
/// [`Segment::memory_offset`] (see [`crate::LoadOptions::packed`]).
///
/// Cheap to clone; the memory is freed, by a thread of its own, when the last clone and the last view of the last segment in
/// it are gone, and outlives the loader.
#[derive(Clone)]
pub struct Segment(Arc<Inner>);

struct Inner {
    place: Placement,
    heap: Arc<str>,
    backing: Arc<Backing>,
}

/// What a segment holds, and where.
#[derive(Debug)]
pub(crate) struct Placement {
    pub(crate) index: usize,
    pub(crate) file_index: usize,
    /// Segments of one span lie side by side.
    pub(crate) span: usize,
    pub(crate) tensors: Option<Arc<FileTensors>>,
    pub(crate) path: Arc<PathBuf>,
    pub(crate) file_bytes: u64,
    /// The part of the file that is the model.
    pub(crate) part: Range<u64>,
    pub(crate) file_range: Range<u64>,
    pub(crate) memory_offset: usize,
    pub(crate) memory_bytes: usize,
}

impl Segment {
    /// Makes a segment of memory that is filled.
    ///
    /// # Safety
    /// All bytes of the place's `file_range` must have been read into the memory, from its `memory_offset`; nothing in the
    /// kernel may still write to the memory, and nothing in this process may ever again.
    pub(crate) unsafe fn new(place: Placement, heap: Arc<str>, backing: Arc<Backing>) -> Self {
        let end = place.memory_offset.checked_add(place.memory_bytes);
        assert!(end.is_some_and(|end| end <= backing.bytes()), "a segment lies within its memory");
        assert!(
            place.file_range.end - place.file_range.start <= place.memory_bytes as u64,
            "a segment's bytes fit into its part of the memory"
        );
        Segment(Arc::new(Inner { place, heap, backing }))
    }

    /// Segments of the same span lie side by side.
    pub(crate) fn span(&self) -> usize {
        self.0.place.span
    }

    /// Its number in the load, counted over all files.
    pub fn index(&self) -> usize {
        self.0.place.index
    }

    /// The number of its file in the load.
    pub fn file_index(&self) -> usize {
        self.0.place.file_index
    }

    /// The path of its file, as it was given.
    pub fn path(&self) -> &Path {
        &self.0.place.path
    }

    /// The bytes of the file that it holds.
    pub fn file_range(&self) -> Range<u64> {
        self.0.place.file_range.clone()
    }

    /// How many bytes of the file it holds.
    pub fn len(&self) -> usize {
        to_usize(self.0.place.file_range.end - self.0.place.file_range.start)
    }

    /// Whether it holds none; no load gives such a segment.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where its memory begins in its dma-buf or memfd, a multiple of the page size: 0, except for small files that share one.
    pub fn memory_offset(&self) -> usize {
        self.0.place.memory_offset
    }

    /// The length of its memory: that of its bytes, rounded up. What lies beyond them is zero.
    pub fn memory_bytes(&self) -> usize {
        self.0.place.memory_bytes
    }

    /// Whether it has its dma-buf or memfd in common with another segment. Handing out the
    /// descriptor of one hands out that of all that share it.
    pub fn shares_memory_with(&self, other: &Segment) -> bool {
        Arc::ptr_eq(&self.0.backing, &other.0.backing)
    }

    /// A view of its bytes, without a copy. It keeps the memory alive, and the dma-buf from being
    /// handed out; dropping it undoes both.
    ///
    /// # Errors
    /// [`Error::HandedOut`] after [`Segment::hand_out_dma_buf`] of this segment, or of one that
    /// shares its memory: others may write to it.
    pub fn bytes(&self) -> Result<Bytes> {
        Ok(Bytes::from_owner(View::new(self)?))
    }

    /// Whether it has a dma-buf. Asking does not hand it out.
    pub fn has_dma_buf(&self) -> bool {
        self.0.backing.dma_buf().is_some()
    }

    /// Hands out its dma-buf to importers and other processes. **This revokes [`Segment::bytes`]
    /// for good**, of this segment and of those that share its memory.
    ///
    /// A dma-buf can't be made read-only: who has it can write to it. So from now on, also after
    /// the descriptor was closed, no view of the bytes is given; [`Segment::cpu_access`] takes its
    /// place. The memory is not used again by other loads ([`crate::LoaderBuilder::pool_bytes`]).
    /// Calling this again gives the same dma-buf and changes nothing more.
    ///
    /// The file's bytes begin [`Segment::memory_offset`] bytes into the dma-buf, and have
    /// [`Segment::memory_bytes`] there. It stays valid as long as there is a descriptor, an import
    /// or a mapping of it: longer than this segment, its loader and this process.
    ///
    /// # Errors
    /// Nothing is handed out, and nothing revoked, with [`Error::NoDescriptor`] (a heap without
    /// dma-bufs) and [`Error::Viewed`] (views of the bytes are alive).
    pub fn hand_out_dma_buf(&self) -> Result<BorrowedFd<'_>> {
        let heap = || self.0.heap.to_string();
        let dma_buf = self.0.backing.dma_buf().ok_or_else(|| Error::NoDescriptor { heap: heap(), wanted: "dma-buf" })?;
        match self.0.backing.hand_out() {
            Ok(()) => Ok(dma_buf.as_fd()),
            Err(views) => Err(Error::Viewed { segment: self.index(), views }),
        }
    }

    /// Hands out its dma-buf as a descriptor that the caller owns (close-on-exec). **This revokes
    /// [`Segment::bytes`] for good**, as [`Segment::hand_out_dma_buf`] does.
    ///
    /// # Errors
    /// Those of [`Segment::hand_out_dma_buf`]; [`Error::File`] at the limit of open files, when
    /// the views are revoked already.
    pub fn hand_out_owned_dma_buf(&self) -> Result<OwnedFd> {
        self.hand_out_dma_buf()?.try_clone_to_owned().map_err(|error| Error::File {
            path: self.path().to_owned(),
            operation: "duplicate its dma-buf",
            errno: Errno::from_io_error(&error).unwrap_or(Errno::EMFILE),
        })
    }

    /// Begins an access of the CPU to its bytes, also when its dma-buf was handed out: on a dma-buf it is bracketed by
    /// `DMA_BUF_IOCTL_SYNC`, so that what a device wrote is seen. Ends with the guard.
    ///
    /// # Errors
    /// [`Error::Memory`] when the kernel refuses it.
    pub fn cpu_access(&self) -> Result<SegmentAccess<'_>> {
        let bytes = self.len() as u64;
        let begin = |dma_buf: &DmaBuf| dma_buf.begin_cpu_access(Access::Read);
        self.0.backing.dma_buf().map_or(Ok(()), begin).map_err(|refusal| Error::Memory {
            heap: self.0.heap.to_string(),
            refusal,
            loaded_bytes: bytes,
            planned_bytes: bytes,
        })?;
        Ok(SegmentAccess { segment: self })
    }

    /// Hands out its memory file to other processes, which can map it read-only. Views of the
    /// bytes stay, and can still be had. **This seals the memory for good**: no process can write
    /// to the file, resize it or punch holes into it, and other loads don't use its memory again
    /// ([`crate::LoaderBuilder::pool_bytes`]).
    ///
    /// The file's bytes begin [`Segment::memory_offset`] bytes into it. On the heap `udmabuf` it
    /// shows what importers of the dma-buf write.
    ///
    /// # Errors
    /// [`Error::NoDescriptor`] on a heap of other memory; [`Error::Memory`] where the seal is
    /// refused (Linux before 5.1).
    pub fn hand_out_memfd(&self) -> Result<BorrowedFd<'_>> {
        let heap = || self.0.heap.to_string();
        let memfd = self.0.backing.memfd();
        let memfd = memfd.ok_or_else(|| Error::NoDescriptor { heap: heap(), wanted: "memfd" })?;
        let bytes = self.len() as u64;
        let failed = |refusal| Error::Memory { heap: heap(), refusal, loaded_bytes: bytes, planned_bytes: bytes };
        memfd.seal_against_writes().map_err(failed)?;
        self.0.backing.forbid_reuse();
        Ok(memfd.as_fd())
    }

    /// Where in this segment the bytes of its file's tensor of that name are, in bytes from its
    /// beginning. A tensor that crosses segments is in each of these in part. `None` where the
    /// segment has none of its bytes, or where these are not contiguous
    /// ([`crate::Tensor::is_contiguous`]).
    pub fn tensor_range(&self, tensor: &str) -> Option<Range<usize>> {
        let tensors = self.file_tensors()?;
        let part = tensors.part_at(tensors.map.get_index_of(tensor)?)?;
        let (wanted, held) = (part.rows.hull(), self.file_range());
        let (start, end) = (wanted.start.max(held.start), wanted.end.min(held.end));
        let at = |offset: u64| usize::try_from(offset - held.start).expect("a segment's length fits into memory");
        (part.rows.count == 1 && start < end).then(|| at(start)..at(end))
    }

    /// The path, as it is kept.
    pub(crate) fn shared_path(&self) -> Arc<PathBuf> {
        Arc::clone(&self.0.place.path)
    }

    /// The length of its file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.0.place.file_bytes
    }

    /// The part of its file that is the model.
    pub(crate) fn file_part(&self) -> Range<u64> {
        self.0.place.part.clone()
    }

    /// The tensors of its file; `None` for one of raw bytes.
    pub(crate) fn file_tensors(&self) -> Option<&Arc<FileTensors>> {
        self.0.place.tensors.as_ref()
    }

    /// Promises for good that nobody can write to it: its dma-buf is handed to nobody from now on.
    ///
    /// # Errors
    /// [`Error::HandedOut`] where it was handed out already.
    pub(crate) fn keep_unwritten(&self) -> Result<()> {
        if self.has_dma_buf() {
            // A view that never ends.
            std::mem::forget(View::new(self)?);
        }
        Ok(())
    }

    /// The first address of its memory. Segments of a span lie in memory as they do in the file, without gaps.
    pub(crate) fn address(&self) -> usize {
        self.start().addr().get()
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: the segment's part is within the mapping, checked in `new`.
        unsafe { self.0.backing.address().add(self.0.place.memory_offset) }
    }

    /// # Safety
    /// As long as the slice lives, nobody may write to its bytes.
    unsafe fn filled(&self) -> &[u8] {
        let start = self.0.place.memory_offset;
        // SAFETY: `new` was promised that these bytes are filled; that nobody writes to them is the caller's promise.
        unsafe { self.0.backing.filled(start..start + self.len()) }
    }
}

/// The right to look at a segment's bytes: while one exists, its dma-buf is handed to nobody.
#[derive(Debug)]
struct View(Segment);

impl View {
    fn new(segment: &Segment) -> Result<Self> {
        if segment.0.backing.lend() { Ok(View(segment.clone())) } else { Err(Error::HandedOut { segment: segment.index() }) }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.0.0.backing.take_back();
    }
}

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: nobody writes to it: promised to `new`; memfds are sealed before they are shown, and a dma-buf is handed to
        // nobody while this view exists.
        unsafe { self.0.filled() }
    }
}

/// An access of the CPU to a segment's bytes, which ends when this is dropped; see [`Segment::cpu_access`].
#[derive(Debug)]
#[must_use = "the access ends when the guard is dropped"]
pub struct SegmentAccess<'a> {
    segment: &'a Segment,
}

impl SegmentAccess<'_> {
    /// Copies bytes out, from `offset` bytes into the segment; returns how many there were (fewer than `buffer` holds at
    /// the segment's end). If somebody who has the dma-buf writes meanwhile, what is copied may be partly old and new.
    pub fn read_at(&self, buffer: &mut [u8], offset: usize) -> usize {
        let bytes = buffer.len().min(self.segment.len().saturating_sub(offset));
        if bytes > 0 {
            // SAFETY: `offset` is below the segment's length.
            let from = unsafe { self.address().add(offset) };
            // SAFETY: `from` has that many bytes left, mapped and initialised, the buffer at least as many, and it is memory
            // of this process' own. No reference to the segment's bytes is made, so others may write to them.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), buffer.as_mut_ptr(), bytes) };
        }
        bytes
    }

    /// Where its bytes begin in this process: [`Segment::memory_bytes`] of them are mapped as long as the segment lives, readable
    /// and writable; of another process' sealed memory ([`crate::share`]) only readable.
    pub fn address(&self) -> NonNull<u8> {
        self.segment.start()
    }

    /// Its bytes.
    ///
    /// # Safety
    /// As long as the slice lives, nobody who has the dma-buf may write to it.
    pub unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: the caller's promise.
        unsafe { self.segment.filled() }
    }
}

impl Drop for SegmentAccess<'_> {
    fn drop(&mut self) {
        if let Some(dma_buf) = self.segment.0.backing.dma_buf() {
            // It was begun, so it can be ended.
            let _ = dma_buf.end_cpu_access(Access::Read);
        }
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { place: Placement { index, path, file_range, .. }, heap, .. } = &*self.0;
        f.debug_struct("Segment")
            .field("index", index)
            .field("path", path)
            .field("file_range", file_range)
            .field("heap", heap)
            .finish()
    }
}

/// Of a file's segments those that hold a range together: of one span, in order.
pub(crate) fn holding<'a>(segments: &'a [Segment], range: &Range<u64>) -> Option<&'a [Segment]> {
    segments.chunk_by(|a, b| a.0.place.span == b.0.place.span).find_map(|span| {
        let held = span.first()?.file_range().start..span.last()?.file_range().end;
        if range.start < held.start || held.end < range.end {
            return None;
        }
        let first = span.partition_point(|segment| segment.file_range().end <= range.start);
        let end = span.partition_point(|segment| segment.file_range().start < range.end);
        span.get(first..end)
    })
}

/// A file's segments, seen as one.
#[derive(Debug)]
pub(crate) struct Contiguous {
    /// Those that the range touches.
    views: Vec<View>,
    range: Range<u64>,
}

impl Contiguous {
    /// The bytes `range` of the file that these segments hold, all of it, in order.
    ///
    /// # Errors
    /// [`Error::HandedOut`] for the first segment of the range whose dma-buf is out; [`Error::NotLoaded`] when they do not hold it.
    ///
    /// # Panics
    /// When the segments of a span do not lie in memory as they do in the file.
    pub(crate) fn bytes(path: &Path, segments: &[Segment], range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let not_loaded = || Error::NotLoaded { path: path.to_owned(), range: range.clone() };
        let touched = holding(segments, &range).ok_or_else(not_loaded)?;
        let views = touched.iter().map(View::new).collect::<Result<Vec<_>>>()?;
        let mut expected = views.first().map(|View(first)| (first.file_range().start, first.address()));
        for View(segment) in &views {
            assert_eq!(Some((segment.file_range().start, segment.address())), expected, "segments lie side by side");
            expected = Some((segment.file_range().end, segment.address() + segment.len()));
        }
        let View(first) = views.first().ok_or_else(not_loaded)?;
        let held = first.file_range().start..expected.map_or(0, |(end, _)| end);
        assert!(held.start <= range.start && range.end <= held.end, "{range:?} is not within {held:?}");
        Ok(Bytes::from_owner(Contiguous { views, range }))
    }
}

impl AsRef<[u8]> for Contiguous {
    fn as_ref(&self) -> &[u8] {
        let View(first) = self.views.first().expect("a range with bytes touches a segment: see `bytes`");
        let offset = to_usize(self.range.start - first.file_range().start);
        let bytes = to_usize(self.range.end - self.range.start);
        // SAFETY: `bytes` has checked that the range lies within the segments' bytes, and that these lie side by side in
        // one reserved address range.
        let start = unsafe { first.start().add(offset) };
        // SAFETY: as above; each segment is mapped, complete and unchanging as long as its view lives (see `View`).
        unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) }
    }
}
