//! Finished segments: memory that holds a known range of a file.
//!
//! While a view of the bytes exists, nothing may write to them. Once the dma-buf is handed out,
//! its holders may write to them at any time. The dma-buf can therefore be handed out only while
//! no view exists, and no view can be created afterwards. Handing out can't be undone. The same
//! rules apply to anonymous memory that becomes [`private`](super::private).
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;
use dmabuf::{Access, DmaBuf, Errno, Memfd};

use crate::error::{Error, Result};
use crate::memory::backing::Backing;
use crate::plan::tensors::FileTensors;
use crate::support::convert::to_usize;

/// A contiguous range of a file, completely loaded into memory from a heap.
///
/// Consecutive small files in a load share one allocation (a dma-buf, a memfd or anonymous
/// memory). Each segment in it then has its own [`Segment::memory_offset`] (see
/// [`crate::LoadOptions::packed`]).
///
/// Segments are cheap to clone. An allocation is released once all clones and all views of every
/// segment in it are dropped. It is then kept for later loads
/// ([`crate::LoaderBuilder::pool_bytes`]), or a background thread frees it, even if the loader is
/// gone.
#[derive(Clone)]
pub struct Segment(Arc<Inner>);

struct Inner {
    place: Placement,
    heap: Arc<str>,
    backing: Arc<Backing>,
}

/// The contents of a segment, and their place in the file and in memory.
#[derive(Debug)]
pub(crate) struct Placement {
    pub(crate) index: usize,
    pub(crate) file_index: usize,
    /// The number of the segment's span, which is a contiguous range of a file to read. Segments
    /// of one span are adjacent in memory.
    pub(crate) span: usize,
    pub(crate) tensors: Option<Arc<FileTensors>>,
    pub(crate) path: Arc<PathBuf>,
    pub(crate) file_bytes: u64,
    /// The byte range of the file that contains the model.
    pub(crate) part: Range<u64>,
    pub(crate) file_range: Range<u64>,
    pub(crate) memory_offset: usize,
    pub(crate) memory_bytes: usize,
}

impl Segment {
    /// Creates a segment from filled memory.
    ///
    /// # Safety
    /// All bytes of `place.file_range` must have been read into the memory, starting at
    /// `place.memory_offset`. Nothing in the kernel may still write to the memory, and nothing in
    /// this process may do so before the memory is handed out.
    pub(crate) unsafe fn new(place: Placement, heap: Arc<str>, backing: Arc<Backing>) -> Self {
        let end = place.memory_offset.checked_add(place.memory_bytes);
        assert!(end.is_some_and(|end| end <= backing.bytes()), "a segment must lie within its allocation");
        assert!(
            place.file_range.end - place.file_range.start <= place.memory_bytes as u64,
            "a segment's bytes must fit into its part of the memory"
        );
        Segment(Arc::new(Inner { place, heap, backing }))
    }

    /// The number of the segment's span.
    pub(crate) fn span(&self) -> usize {
        self.0.place.span
    }

    /// The index of the segment in the load, counted from 0 across all files.
    pub fn index(&self) -> usize {
        self.0.place.index
    }

    /// The index of the segment's file in the load, counted from 0.
    pub fn file_index(&self) -> usize {
        self.0.place.file_index
    }

    /// The path of the file that the segment was loaded from. It is the path that the caller gave,
    /// or a path that was found through the given folder, index or part of a split model. For a
    /// file that the caller passed as an open descriptor, it is `/proc/self/fd/N`.
    pub fn path(&self) -> &Path {
        &self.0.place.path
    }

    /// The byte range of the file that the segment holds.
    pub fn file_range(&self) -> Range<u64> {
        self.0.place.file_range.clone()
    }

    /// The number of bytes of the file that the segment holds.
    pub fn len(&self) -> usize {
        to_usize(self.0.place.file_range.end - self.0.place.file_range.start)
    }

    /// Whether the segment holds no bytes; loads never return such a segment.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The segment's offset in its allocation (a dma-buf, a memfd or anonymous memory). It is a
    /// multiple of the page size, and 0 if no other segment shares the allocation.
    pub fn memory_offset(&self) -> usize {
        self.0.place.memory_offset
    }

    /// The length of the segment's memory. It is at least [`Self::len`], and a multiple of the
    /// alignment that direct reads of the file need, which is at least 4 KiB and at least a page.
    /// The bytes past [`Self::len`] are zero.
    pub fn memory_bytes(&self) -> usize {
        self.0.place.memory_bytes
    }

    /// Whether the two segments are in the same allocation. Handing out the allocation's
    /// descriptor for one segment exposes all segments in that allocation.
    pub fn shares_memory_with(&self, other: &Segment) -> bool {
        Arc::ptr_eq(&self.0.backing, &other.0.backing)
    }

    /// Returns a view of the bytes without copying them. The view keeps the memory alive, and the
    /// dma-buf can't be handed out until the view is dropped.
    ///
    /// # Errors
    /// [`Error::HandedOut`] if other code may write to the memory. That is the case once the
    /// dma-buf of this segment, or of one that shares its memory, has been handed out
    /// ([`Segment::hand_out_dma_buf`]), or once its anonymous memory has become
    /// [`PrivateMemory`](crate::PrivateMemory).
    pub fn bytes(&self) -> Result<Bytes> {
        Ok(Bytes::from_owner(View::new(self)?))
    }

    /// Whether the segment has a dma-buf. Does not hand it out.
    pub fn has_dma_buf(&self) -> bool {
        self.0.backing.dma_buf().is_some()
    }

    /// Hands out the dma-buf to importers and other processes. **This permanently revokes
    /// [`Segment::bytes`]** for this segment and for all segments that share its memory.
    ///
    /// A dma-buf can't be made read-only: every holder of a descriptor can write to it. After this
    /// call, the bytes can't be viewed, even after the descriptor is closed; use
    /// [`Segment::cpu_access`] instead. Later loads don't reuse the memory
    /// ([`crate::LoaderBuilder::pool_bytes`]). If this method is called again, it returns the same
    /// dma-buf.
    ///
    /// The segment's memory starts at offset [`Segment::memory_offset`] in the dma-buf and is
    /// [`Segment::memory_bytes`] long. The dma-buf stays valid as long as it has a descriptor, an
    /// import or a mapping, even after this segment, its loader and this process are gone.
    ///
    /// # Errors
    /// [`Error::NoDescriptor`] if the heap has no dma-bufs, and [`Error::Viewed`] if views of the
    /// bytes are alive. In both cases, nothing is handed out or revoked.
    pub fn hand_out_dma_buf(&self) -> Result<BorrowedFd<'_>> {
        let heap = || self.0.heap.to_string();
        let dma_buf = self.0.backing.dma_buf().ok_or_else(|| Error::NoDescriptor { heap: heap(), wanted: "dma-buf" })?;
        match self.0.backing.hand_out() {
            Ok(()) => Ok(dma_buf.as_fd()),
            Err(views) => Err(Error::Viewed { segment: self.index(), views }),
        }
    }

    /// Hands out the dma-buf as a descriptor that the caller owns (close-on-exec). **This
    /// permanently revokes [`Segment::bytes`]**, as [`Segment::hand_out_dma_buf`] does.
    ///
    /// # Errors
    /// Those of [`Segment::hand_out_dma_buf`]. Also [`Error::File`] if the descriptor can't be
    /// duplicated, for example because the process has reached its limit on open files.
    /// [`Segment::bytes`] is revoked even in that case.
    pub fn hand_out_owned_dma_buf(&self) -> Result<OwnedFd> {
        self.hand_out_dma_buf()?.try_clone_to_owned().map_err(|error| Error::File {
            path: self.path().to_owned(),
            operation: "duplicate its dma-buf",
            errno: Errno::from_io_error(&error).unwrap_or(Errno::EMFILE),
        })
    }

    /// Begins a CPU access to the bytes, even if the dma-buf was handed out. The access ends when
    /// the guard is dropped. If the segment has a dma-buf, `DMA_BUF_IOCTL_SYNC` begins and ends
    /// the access, so the CPU sees what devices have written.
    ///
    /// # Errors
    /// [`Error::Memory`] if the kernel refuses the access.
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

    /// Hands out the memfd, so other processes can map it read-only. The memfd is sealed: no
    /// process can write to it through a new mapping or a descriptor, resize it or punch holes in
    /// it. Existing views stay valid, and new ones can be made. Later loads don't reuse the memory
    /// ([`crate::LoaderBuilder::pool_bytes`]).
    ///
    /// The segment's bytes start at [`Segment::memory_offset`] in the memfd. On the `udmabuf`
    /// heap, writes by importers of the dma-buf are visible in the memfd.
    ///
    /// # Errors
    /// [`Error::NoDescriptor`] on a heap without memfds; [`Error::Memory`] if the kernel refuses
    /// the seal, as kernels before Linux 5.1 do.
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

    /// Returns the part of the segment that belongs to the tensor with this name, as offsets from
    /// the start of the segment. The tensor must be in the segment's own file. A tensor that
    /// crosses segment boundaries has a range in each of the segments. Returns `None` if the
    /// segment contains no bytes of the tensor, or if the tensor's bytes are not contiguous in the
    /// file ([`crate::Tensor::is_contiguous`]).
    pub fn tensor_range(&self, tensor: &str) -> Option<Range<usize>> {
        let tensors = self.file_tensors()?;
        let part = tensors.part_at(tensors.map.get_index_of(tensor)?)?;
        let (wanted, held) = (part.rows.hull(), self.file_range());
        let (start, end) = (wanted.start.max(held.start), wanted.end.min(held.end));
        let at = |offset: u64| usize::try_from(offset - held.start).expect("an offset in a segment should fit into usize");
        (part.rows.count == 1 && start < end).then(|| at(start)..at(end))
    }

    pub(crate) fn heap(&self) -> &str {
        &self.0.heap
    }

    /// The segment's memfd, without handing it out.
    pub(crate) fn memfd(&self) -> Option<&Memfd> {
        self.0.backing.memfd()
    }

    /// Whether the segment's memory is anonymous, so only this process can access it.
    pub(crate) fn is_anonymous(&self) -> bool {
        let (_, memory) = self.0.backing.parts();
        memory.is_private()
    }

    /// Permanently disallows views, so code that has the memory's address may write to it.
    ///
    /// # Errors
    /// [`Error::Viewed`] if views are alive. Nothing changes in that case.
    pub(crate) fn hand_out_memory(&self) -> Result<()> {
        self.0.backing.hand_out().map_err(|views| Error::Viewed { segment: self.index(), views })
    }

    /// The path of the file, without copying it.
    pub(crate) fn shared_path(&self) -> Arc<PathBuf> {
        Arc::clone(&self.0.place.path)
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        self.0.place.file_bytes
    }

    /// The byte range of the file that contains the model.
    pub(crate) fn file_part(&self) -> Range<u64> {
        self.0.place.part.clone()
    }

    /// The tensors of the file; `None` for raw bytes.
    pub(crate) fn file_tensors(&self) -> Option<&Arc<FileTensors>> {
        self.0.place.tensors.as_ref()
    }

    /// Ensures that the dma-buf, if the segment has one, is never handed out, so no code outside
    /// the library can write to the segment's memory through it.
    ///
    /// # Errors
    /// [`Error::HandedOut`] if it was already handed out.
    pub(crate) fn prevent_hand_out(&self) -> Result<()> {
        if self.has_dma_buf() {
            // While a view exists, the dma-buf can't be handed out. This view is leaked, so it
            // exists forever.
            std::mem::forget(View::new(self)?);
        }
        Ok(())
    }

    /// The address of the first byte. The segments of a span follow one another in memory without
    /// gaps, as they do in the file.
    pub(crate) fn address(&self) -> usize {
        self.start().addr().get()
    }

    /// [`Self::address`] as a pointer.
    pub(crate) fn start(&self) -> NonNull<u8> {
        // SAFETY: `new` checked that the segment lies within the mapping.
        unsafe { self.0.backing.address().add(self.0.place.memory_offset) }
    }

    /// Borrows the segment's bytes.
    ///
    /// # Safety
    /// Nothing may write to the bytes while the slice lives.
    unsafe fn filled(&self) -> &[u8] {
        let start = self.0.place.memory_offset;
        // SAFETY: the caller of `new` guaranteed that these bytes are filled; this caller
        // guarantees that nothing writes to them.
        unsafe { self.0.backing.filled(start..start + self.len()) }
    }
}

/// The right to read a segment's bytes. While a view exists, the memory can't be handed out to
/// code that may write to it.
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
        // SAFETY: nothing writes to the bytes before the memory is handed out: the caller of
        // `Segment::new` guaranteed that. While this view is counted (`ViewCount`), neither a
        // dma-buf nor anonymous memory can be handed out. A memfd is handed out only once it is
        // sealed against writes (`Segment::hand_out_memfd`).
        unsafe { self.0.filled() }
    }
}

/// A CPU access to a segment's bytes, which ends when this guard is dropped; see
/// [`Segment::cpu_access`].
#[derive(Debug)]
#[must_use = "the access ends when the guard is dropped"]
pub struct SegmentAccess<'a> {
    segment: &'a Segment,
}

impl SegmentAccess<'_> {
    /// Copies bytes from the segment, starting at `offset`, to `buffer`. Returns the number of
    /// bytes copied, which is less than the buffer's length if the segment ends first. If other
    /// code writes to the memory at the same time, the copy may be a mix of old and new bytes.
    pub fn read_at(&self, buffer: &mut [u8], offset: usize) -> usize {
        let bytes = buffer.len().min(self.segment.len().saturating_sub(offset));
        if bytes > 0 {
            // SAFETY: `offset` is below the segment's length, which is mapped.
            let from = unsafe { self.address().add(offset) };
            // SAFETY: at least `bytes` mapped, initialized bytes start at `from`. The buffer is at
            // least as long, and is this process's own memory. No reference to the segment's bytes
            // is created, so other code may write to them.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), buffer.as_mut_ptr(), bytes) };
        }
        bytes
    }

    /// The address of the bytes in this process. [`Segment::memory_bytes`] bytes are mapped there
    /// while the segment lives. They are readable and writable, except that sealed memory from
    /// another process ([`crate::share`]) is read-only.
    pub fn address(&self) -> NonNull<u8> {
        self.segment.start()
    }

    /// Returns the bytes as a slice.
    ///
    /// # Safety
    /// Nothing may write to the bytes while the slice lives: neither a holder of the dma-buf, nor
    /// code that has the address of [`PrivateMemory`](crate::PrivateMemory) in the same memory.
    pub unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: the caller guarantees that nothing writes to the bytes.
        unsafe { self.segment.filled() }
    }
}

impl Drop for SegmentAccess<'_> {
    fn drop(&mut self) {
        if let Some(dma_buf) = self.segment.0.backing.dma_buf() {
            // Ending an access that was begun does not fail.
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

/// Returns the consecutive segments that together hold `range`. All of them are in the same span.
/// Returns `None` if no single span holds the whole range.
pub(crate) fn segments_of_range<'a>(segments: &'a [Segment], range: &Range<u64>) -> Option<&'a [Segment]> {
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

/// A view of a byte range that may extend over several segments of a file.
#[derive(Debug)]
pub(crate) struct Contiguous {
    /// The segments that overlap the range.
    views: Vec<View>,
    range: Range<u64>,
}

impl Contiguous {
    /// Returns a view of the byte range `range` of the file. `segments` must contain the file's
    /// segments in order.
    ///
    /// # Errors
    /// [`Error::NotLoaded`] if no span of segments holds the whole range; [`Error::HandedOut`] for
    /// the first segment in the range that can't be viewed ([`Segment::bytes`]).
    ///
    /// # Panics
    /// If the segments of a span are not adjacent in memory.
    pub(crate) fn bytes(path: &Path, segments: &[Segment], range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let not_loaded = || Error::NotLoaded { path: path.to_owned(), range: range.clone() };
        let touched = segments_of_range(segments, &range).ok_or_else(not_loaded)?;
        let views = touched.iter().map(View::new).collect::<Result<Vec<_>>>()?;
        let mut expected = views.first().map(|View(first)| (first.file_range().start, first.address()));
        for View(segment) in &views {
            assert_eq!(
                Some((segment.file_range().start, segment.address())),
                expected,
                "the segments of a span must be adjacent"
            );
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
        let View(first) = self.views.first().expect("a non-empty range should overlap at least one segment");
        let offset = to_usize(self.range.start - first.file_range().start);
        let bytes = to_usize(self.range.end - self.range.start);
        // SAFETY: `bytes` checked that the range lies within the segments' bytes, and that each
        // segment starts at the address where the previous one ends. All segments of a span are
        // mapped in one reserved address range.
        let start = unsafe { first.start().add(offset) };
        // SAFETY: as above; each segment stays mapped, complete and unchanged while its view lives
        // (see `View`).
        unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) }
    }
}
