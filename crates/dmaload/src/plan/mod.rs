//! The plan of a load. It says how files are divided into segments, which memories hold the
//! segments, in which batches memory is allocated, and in which pieces it is filled. The driver
//! splits pieces into chunks.
//!
//! ```text
//!   a large file |---------------- bytes ------------------|  small: a |---| b |--| c |---------|
//!   segments     |----- 0 -------|----- 1 -------|-- 2 -|..|         |-3-|.|-4|...|----5----|.|
//!   memories     |----- 0 -------|----- 1 -------|--- 2 ---|         |----------- 3 -----------|
//!   batches      |-0-|-1-|-2-|-3-|-4-| ... allocated, populated      |-------7-------|----8----|
//!   pieces       |-0-|-1-|-2-|-3-|-4-| ... registered, filled        |--7--|--8--|-9-|---10----|
//!   chunks       |-|-|-|-|-|-|-|-| ...     one read each
//! ```
//!
//! Dots are padding up to a multiple of the alignment. Consecutive small files share memories, so
//! a thousand of them need only a few allocations and can use huge pages. Each file begins at a
//! multiple of the alignment, as direct reads require.
//!
//! A plan is made from spans: whole files, or the ranges of files that [`select`] selects. Small
//! spans are treated like small files.
//!
//! Planning is pure: it uses no clock and makes no system calls, so the same input always gives
//! the same plan. The input consists of lengths, headers and options, and does not include open
//! files, memory or a ring. A plan is made before any data is read, and never changes.

pub(crate) mod glob;
pub(crate) mod select;
pub(crate) mod tensors;

use std::num::NonZeroU64;
use std::ops::Range;

use crate::options::choices::Layout;

const HUGE_PAGE_BYTES: u64 = dmabuf::HUGE_PAGE_BYTES as u64;

/// The parameters of a plan. The sizes are multiples of every file's alignment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) layout: Layout,
    pub(crate) segment_bytes: u64,
    /// Maximum size of a batch. If this is no smaller than `segment_bytes`, each memory that small
    /// files share is a single batch.
    pub(crate) batch_bytes: u64,
    /// Whether small files share memories.
    pub(crate) packed: bool,
    /// Maximum number of files that may share a batch, from 1 to [`BATCH_FILES`].
    pub(crate) batch_files: usize,
}

/// A contiguous range of a file to read, possibly the whole file. It begins at a multiple of the
/// file's alignment, and ends at such a multiple or at the end of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Span {
    /// The number of the file.
    pub(crate) file: usize,
    pub(crate) range: Range<u64>,
    /// The position of the span's request in the caller's order, counted from 0. Several spans may
    /// have the same class.
    pub(crate) class: usize,
    /// The range of the file to move to the beginning of the memory after the span has been read,
    /// or `None`. A span with such a range is a single segment.
    pub(crate) moved: Option<Range<u64>>,
    /// Whether the span is a single segment, however large it is.
    pub(crate) single: bool,
}

impl Span {
    /// Creates the span of a whole file.
    pub(crate) fn whole(file: usize, bytes: u64) -> Self {
        Span { file, range: 0..bytes, class: 0, moved: None, single: false }
    }
}

/// The plan of all spans of a load. All lists except `files` are in span order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The length of the address range that holds all memories.
    pub(crate) memory_bytes: u64,
    /// Indexed by file number.
    pub(crate) files: Vec<FileParts>,
    pub(crate) memories: Vec<MemoryPlan>,
    pub(crate) segments: Vec<SegmentPlan>,
    pub(crate) batches: Vec<Batch>,
    pub(crate) pieces: Vec<Piece>,
}

/// Where a file's segments are in the plan, and how many pieces the file has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct FileParts {
    /// The file's first segment in the plan; `None` if nothing is read from the file.
    pub(crate) first_segment: Option<usize>,
    /// The memory that contains the file's last segment; `None` if nothing is read from the file.
    pub(crate) last_memory: Option<usize>,
    /// How many pieces the file has.
    pub(crate) pieces: usize,
}

/// A memory: one allocation of the heap. It holds one segment, or the segments of many small
/// spans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MemoryPlan {
    /// Offset in the load's address range.
    pub(crate) range_offset: u64,
    pub(crate) bytes: u64,
    pub(crate) segments: Range<usize>,
    pub(crate) pieces: Range<usize>,
}

/// A segment: a range of a file and its place in its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SegmentPlan {
    pub(crate) file: usize,
    /// The number of the span that the segment belongs to. The segments of a span are consecutive.
    pub(crate) span: usize,
    pub(crate) memory: usize,
    pub(crate) memory_offset: u64,
    pub(crate) file_range: Range<u64>,
    /// The number of bytes of memory that the segment occupies: the length of `file_range`,
    /// rounded up to a multiple of the file's alignment.
    pub(crate) memory_bytes: u64,
    /// The range of the file that is moved to the segment's beginning; `None` if the bytes stay
    /// where they were read.
    pub(crate) moved: Option<Range<u64>>,
}

/// A batch: the unit in which memory is allocated, populated and counted against the window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Batch {
    pub(crate) memory: usize,
    pub(crate) memory_offset: u64,
    pub(crate) bytes: u64,
    pub(crate) pieces: Range<usize>,
}

/// A piece: the part of a batch that belongs to one segment. It is registered and filled as a
/// unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) segment: usize,
    /// Offset in the segment's memory, which other segments may share.
    pub(crate) memory_offset: u64,
    /// Offset in the file.
    pub(crate) file_offset: u64,
    /// The number of bytes to read from the file.
    pub(crate) bytes: u64,
    /// Length of the piece's memory, at least `bytes`. The memory after the first `bytes` bytes
    /// corresponds to offsets beyond the end of the file. Direct reads may write to that memory,
    /// because they transfer whole blocks, so it is zeroed afterwards.
    pub(crate) memory_bytes: u64,
}

/// The default maximum size of a batch: 16 MiB. With more than two allocators, the default is
/// three eighths of this: see `Settings::batch_bytes`.
///
/// 16 MiB is small enough for the first reads to start early and for the window to be divided
/// finely. It is large enough that the fixed cost of each call that registers or populates memory
/// hardly matters.
pub(crate) const BATCH_BYTES: u64 = 16 << 20;

/// Maximum number of files that may share a batch. All files in a batch are open while it is being
/// read, and at most four times this number of small files may be open at once (see
/// `engine::descriptors`).
pub(crate) const BATCH_FILES: usize = 64;

/// Maximum number of pieces in a plan, as estimated by [`Shape::count_pieces`]. For long files,
/// pieces grow up to the size of a segment, so this limit is enough for 32 TiB in segments of 64
/// MiB, or 1 TiB in segments of 2 MiB.
///
/// There is a limit because a plan uses up to 400 bytes of memory per piece, and a sparse file of
/// any length costs nothing to create.
pub(crate) const MOST_PIECES: u64 = 1 << 19;

/// Spans of up to a quarter of a segment share memories. The segments of a shared memory are
/// handed over together. For larger spans, saving allocations is not worth waiting for the other
/// spans in the memory.
const PACKED_PART: u64 = 4;

impl Shape {
    /// Estimates how many pieces spans with these lengths have, without making a plan.
    pub(crate) fn count_pieces(&self, lengths: impl Iterator<Item = u64>) -> u64 {
        let batch_bytes = self.batch_bytes.min(self.segment_bytes).max(1);
        lengths.map(|bytes| bytes.div_ceil(batch_bytes)).fold(0, u64::saturating_add)
    }

    /// Returns whether a span of this size may share its memory with other spans.
    pub(crate) fn shares_memory(&self, bytes: u64) -> bool {
        self.packed && self.layout != Layout::Single && bytes > 0 && bytes <= self.segment_bytes / PACKED_PART
    }
}

impl Plan {
    /// Makes the plan for these spans. `alignments` holds the alignment of each file, which is a
    /// power of two and at least a page. A span of 0 bytes gets no segments.
    pub(crate) fn new(alignments: &[u64], spans: &[Span], shape: Shape) -> Plan {
        let segment_bytes = match shape.layout {
            Layout::Segmented | Layout::Tensors => shape.segment_bytes,
            Layout::Single => u64::MAX,
        };
        let mut plan = Plan { files: vec![FileParts::default(); alignments.len()], ..Plan::default() };
        // The alignment and the number of spans of the last memory, if further small spans may
        // join it.
        let mut pack: Option<(u64, usize)> = None;
        for (number, span) in spans.iter().enumerate() {
            let &alignment = alignments.get(span.file).expect("each file should have an alignment");
            debug_assert!(alignment.is_power_of_two() && (span.range.is_empty() || span.range.start.is_multiple_of(alignment)));
            debug_assert!(shape.segment_bytes.is_multiple_of(alignment) && shape.batch_bytes.is_multiple_of(alignment));
            let packed = shape.shares_memory(span.range.end - span.range.start);
            for file_range in split(span.range.clone(), if span.single { u64::MAX } else { segment_bytes }) {
                let memory_bytes = (file_range.end - file_range.start).next_multiple_of(alignment);
                // If a memory is a single batch, the limit on files per batch applies to it.
                let most = if shape.batch_bytes < shape.segment_bytes { usize::MAX } else { shape.batch_files };
                let room = |&(packed_at, count): &(u64, usize)| {
                    let taken = plan.memories.last().map_or(0, |memory| memory.bytes);
                    packed_at == alignment && count < most && taken + memory_bytes <= segment_bytes
                };
                pack = match pack.filter(|_| packed).filter(room) {
                    Some((alignment, count)) => Some((alignment, count + 1)),
                    None => {
                        plan.begin_memory(file_range.start > span.range.start);
                        packed.then_some((alignment, 1))
                    }
                };
                plan.add_segment(span, number, file_range, memory_bytes);
            }
        }
        for memory in 0..plan.memories.len() {
            plan.cut_into_batches(memory, shape);
        }
        plan.memory_bytes = plan.end_of_range();
        plan
    }

    fn end_of_range(&self) -> u64 {
        self.memories.last().map_or(0, |memory| memory.range_offset + memory.bytes)
    }

    /// Adds a memory. If the memory continues a span, it begins where the last memory ends.
    /// Otherwise, it begins at the next huge page boundary.
    fn begin_memory(&mut self, continues_span: bool) {
        let end = self.end_of_range();
        let range_offset = if continues_span { end } else { end.next_multiple_of(HUGE_PAGE_BYTES) };
        let segments = self.segments.len()..self.segments.len();
        self.memories.push(MemoryPlan { range_offset, bytes: 0, segments, pieces: 0..0 });
    }

    /// Adds a segment at the end of the last memory.
    fn add_segment(&mut self, of: &Span, span: usize, file_range: Range<u64>, memory_bytes: u64) {
        let (file, moved) = (of.file, of.moved.clone());
        let number = self.memories.len().checked_sub(1).expect("`begin_memory` should have been called first");
        let memory = self.memories.last_mut().expect("`begin_memory` should have added a memory");
        let parts = self.files.get_mut(file).expect("each file should have its parts");
        parts.first_segment.get_or_insert(self.segments.len());
        parts.last_memory = Some(number);
        let memory_offset = memory.bytes;
        self.segments.push(SegmentPlan { file, span, memory: number, memory_offset, file_range, memory_bytes, moved });
        memory.bytes += memory_bytes;
        memory.segments.end += 1;
    }

    /// Cuts a memory into batches, and the batches into pieces.
    fn cut_into_batches(&mut self, number: usize, Shape { batch_bytes, batch_files, .. }: Shape) {
        let Plan { files, memories, segments, batches, pieces, .. } = self;
        let memory = memories.get_mut(number).expect("only existing memories should be cut");
        let own = segments.get(memory.segments.clone()).expect("the segments of a memory should be planned before its batches");
        memory.pieces = pieces.len()..pieces.len();
        let (mut start, mut segment) = (0, 0);
        while start < memory.bytes {
            let mut end = start.saturating_add(batch_bytes).min(memory.bytes);
            if let Some(next) = own.get(segment + batch_files).filter(|next| next.memory_offset < end) {
                // The batch would hold bytes from too many files, so it must end earlier. Ending
                // it inside a huge page would split that page into small pages, so it ends at the
                // preceding huge page boundary, unless it would then be empty.
                let whole = next.memory_offset / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
                end = if whole > start { whole } else { next.memory_offset };
            }
            let first_piece = pieces.len();
            while let Some(planned) = own.get(segment).filter(|planned| planned.memory_offset < end) {
                let segment_end = planned.memory_offset + planned.memory_bytes;
                let part = start.max(planned.memory_offset)..end.min(segment_end);
                let file_offset = planned.file_range.start + (part.start - planned.memory_offset);
                let memory_bytes = part.end - part.start;
                files.get_mut(planned.file).expect("a segment should belong to a planned file").pieces += 1;
                pieces.push(Piece {
                    segment: memory.segments.start + segment,
                    memory_offset: part.start,
                    file_offset,
                    bytes: memory_bytes.min(planned.file_range.end - file_offset),
                    memory_bytes,
                });
                if segment_end > end {
                    break;
                }
                segment += 1;
            }
            batches.push(Batch { memory: number, memory_offset: start, bytes: end - start, pieces: first_piece..pieces.len() });
            start = end;
        }
        memory.pieces.end = pieces.len();
    }
}

/// Splits a range into parts of `step` bytes; the last may be shorter. If `step` is 0, the whole
/// range is one part.
pub(crate) fn split(range: Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> {
    let step = NonZeroU64::new(step).map_or(u64::MAX, NonZeroU64::get);
    let mut start = range.start;
    std::iter::from_fn(move || {
        let part = start..start.saturating_add(step).min(range.end);
        start = part.end;
        (!part.is_empty()).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALIGNMENT: u64 = 4096;
    const MIB: u64 = 1 << 20;

    fn shape(layout: Layout, segment_pages: u64, batch_pages: u64) -> Shape {
        let (segment_bytes, batch_bytes) = (segment_pages * ALIGNMENT, batch_pages * ALIGNMENT);
        Shape { layout, segment_bytes, batch_bytes, packed: true, batch_files: BATCH_FILES }
    }

    fn large_shape(batch_bytes: u64) -> Shape {
        let layout = Layout::Segmented;
        Shape { layout, segment_bytes: 64 * MIB, batch_bytes, packed: true, batch_files: BATCH_FILES }
    }

    fn planned(bytes: &[u64], shape: Shape) -> Plan {
        let spans: Vec<_> = bytes.iter().enumerate().map(|(file, &bytes)| Span::whole(file, bytes)).collect();
        Plan::new(&vec![ALIGNMENT; bytes.len()], &spans, shape)
    }

    #[test]
    fn empty_file_has_no_segments() {
        let plan = planned(&[0], shape(Layout::Segmented, 4, 2));
        assert_eq!((plan.segments.len(), plan.pieces.len(), plan.files.len()), (0, 0, 1));
    }

    #[test]
    fn file_one_byte_longer_than_a_segment_has_two() {
        let plan = planned(&[4 * ALIGNMENT + 1], shape(Layout::Segmented, 4, 2));
        assert_eq!(plan.segments[1].file_range, 4 * ALIGNMENT..4 * ALIGNMENT + 1);
        assert_eq!(plan.segments[1].memory_bytes, ALIGNMENT);
        assert_eq!((plan.memories.len(), plan.batches.len(), plan.pieces.len()), (2, 3, 3));
    }

    #[test]
    fn single_layout_has_one_segment_of_several_pieces() {
        let plan = planned(&[9 * ALIGNMENT - 5, 1], shape(Layout::Single, 4, 2));
        assert_eq!((plan.segments.len(), plan.memories.len()), (2, 2), "a single segment must not share its memory");
        assert_eq!(plan.segments[0].memory_bytes, 9 * ALIGNMENT);
        assert_eq!(plan.files[0].pieces, 5);
    }

    #[test]
    fn small_files_share_memories_and_batches_end_at_huge_pages() {
        let shape = large_shape(16 * MIB);
        let plan = planned(&vec![700_000; 2000], shape);
        // Each file occupies 171 pages, so 95 files fit into 64 MiB.
        assert_eq!((plan.memories.len(), plan.segments.len()), (22, 2000));
        let whole = |batch: &Batch| batch.memory_offset.is_multiple_of(HUGE_PAGE_BYTES);
        assert!(plan.batches.iter().all(whole) && plan.batches.len() == 21 * 4 + 1, "{} batches", plan.batches.len());
        let apart = planned(&vec![700_000; 2000], Shape { packed: false, ..shape });
        assert_eq!(apart.memories.len(), 2000);
    }

    #[test]
    fn batch_has_no_more_files_than_may_be_open() {
        for batch_bytes in [16 * MIB, 64 * MIB] {
            for batch_files in [1, 7, BATCH_FILES] {
                let plan = planned(&vec![5; 1000], Shape { batch_files, ..large_shape(batch_bytes) });
                assert!(plan.batches.iter().all(|batch| batch.pieces.len() <= batch_files));
                let fewest = 1000_usize.div_ceil(batch_files);
                // A batch may end early, at the end of its memory or at a huge page boundary.
                assert!((fewest..fewest + 2 * plan.memories.len()).contains(&plan.batches.len()), "{}", plan.batches.len());
            }
        }
    }

    #[test]
    fn large_file_ends_sharing_to_keep_the_order() {
        let shape = large_shape(16 * MIB);
        let plan = planned(&[5, 6, 100 * MIB, 7, 8], shape);
        let memories: Vec<_> = plan.segments.iter().map(|segment| (segment.file, segment.memory)).collect();
        assert_eq!(memories, [(0, 0), (1, 0), (2, 1), (2, 2), (3, 3), (4, 3)]);
        let offsets: Vec<_> = plan.memories.iter().map(|memory| memory.range_offset).collect();
        assert_eq!(offsets, [0, 2 * MIB, 66 * MIB, 102 * MIB]);
    }

    proptest! {
        #[test]
        fn every_byte_is_in_one_segment_and_one_piece(
            bytes in proptest::collection::vec(prop_oneof![0u64..20_000, 0u64..2_000_000], 1..20),
            large in proptest::collection::vec(any::<bool>(), 20),
            cuts in proptest::collection::vec(0u8..3, 20),
            segment_pages in 1u64..40, batch_pages in 1u64..50, single: bool, packed: bool, batch_files in 1usize..70,
        ) {
            let layout = if single { Layout::Single } else { Layout::Segmented };
            let shape = Shape { packed, batch_files, ..shape(layout, segment_pages * 2, batch_pages * 2) };
            let alignments: Vec<u64> = bytes.iter().zip(large).map(|(_, large)| if large { 2 * ALIGNMENT } else { ALIGNMENT }).collect();
            // Some files have one span: the whole file or its second half. Others have two spans,
            // and the second half is requested first.
            let mut spans = Vec::new();
            for (file, (&bytes, alignment)) in bytes.iter().zip(&alignments).enumerate() {
                let cut = (bytes / 2).next_multiple_of(*alignment).min(bytes);
                match cuts[file] {
                    0 => spans.push(Span::whole(file, bytes)),
                    1 => spans.push(Span { file, range: cut..bytes, class: 0, moved: None, single: false }),
                    _ => spans.extend([Span { file, range: cut..bytes, class: 0, moved: None, single: false }, Span { file, range: 0..cut, class: 1, moved: None, single: false }]),
                }
            }
            spans.sort_by_key(|span| span.class);
            let plan = Plan::new(&alignments, &spans, shape);
            let lengths = spans.iter().map(|span| span.range.end - span.range.start);
            prop_assert!(plan.batches.len() <= plan.pieces.len());
            prop_assert!(plan.pieces.len() as u64 <= shape.count_pieces(lengths) + 2 * plan.segments.len() as u64);
            // Spans, segments and pieces cover all bytes, in order and without overlap.
            prop_assert_eq!(plan.files.len(), bytes.len());
            let (mut segment_at, mut piece_at) = (0, 0);
            for (number, span) in spans.iter().enumerate() {
                let alignment = alignments[span.file];
                let mut file_at = span.range.start;
                while let Some(segment) = plan.segments.get(segment_at).filter(|segment| segment.span == number) {
                    prop_assert_eq!((segment.file, segment.file_range.start), (span.file, file_at));
                    prop_assert!(segment.file_range.end > file_at);
                    prop_assert_eq!(segment.memory_offset % alignment, 0);
                    let bytes = segment.file_range.end - file_at;
                    prop_assert_eq!(segment.memory_bytes, bytes.next_multiple_of(alignment));
                    prop_assert!(single || segment.memory_bytes <= shape.segment_bytes);
                    let parts = &plan.files[span.file];
                    prop_assert!(parts.first_segment.is_some_and(|first| first <= segment_at));
                    prop_assert!(parts.last_memory.is_some_and(|last| last >= segment.memory));
                    file_at = segment.file_range.end;
                    segment_at += 1;
                }
                prop_assert_eq!(file_at, span.range.end);
                let mut file_at = span.range.start;
                while let Some(piece) = plan.pieces.get(piece_at).filter(|piece| plan.segments[piece.segment].span == number) {
                    let segment = &plan.segments[piece.segment];
                    prop_assert_eq!(piece.file_offset, file_at);
                    prop_assert!(piece.bytes > 0 && piece.bytes <= piece.memory_bytes);
                    prop_assert!(piece.memory_bytes - piece.bytes < alignment);
                    prop_assert_eq!(piece.memory_offset - segment.memory_offset, piece.file_offset - segment.file_range.start);
                    prop_assert_eq!((piece.file_offset % alignment, piece.memory_offset % alignment), (0, 0));
                    file_at += piece.bytes;
                    piece_at += 1;
                }
                prop_assert_eq!(file_at, span.range.end);
            }
            prop_assert_eq!(plan.files.iter().map(|file| file.pieces).sum::<usize>(), plan.pieces.len());
            prop_assert_eq!((segment_at, piece_at), (plan.segments.len(), plan.pieces.len()));
            // Memories, batches and pieces have no gaps or overlaps.
            let (mut range_at, mut batch_at, mut piece_at) = (0, 0, 0);
            for (index, memory) in plan.memories.iter().enumerate() {
                prop_assert!(memory.range_offset >= range_at && !memory.segments.is_empty());
                prop_assert!(packed || memory.segments.len() == 1);
                prop_assert!(single || memory.bytes <= shape.segment_bytes);
                range_at = memory.range_offset + memory.bytes;
                let mut at = 0;
                prop_assert_eq!(memory.pieces.start, piece_at);
                while at < memory.bytes {
                    let batch = &plan.batches[batch_at];
                    prop_assert_eq!((batch.memory, batch.memory_offset, batch.pieces.start), (index, at, piece_at));
                    prop_assert!(batch.bytes <= shape.batch_bytes && batch.pieces.len() <= batch_files);
                    for piece in &plan.pieces[batch.pieces.clone()] {
                        prop_assert_eq!((plan.segments[piece.segment].memory, piece.memory_offset), (index, at));
                        at += piece.memory_bytes;
                    }
                    prop_assert_eq!(at, batch.memory_offset + batch.bytes);
                    (batch_at, piece_at) = (batch_at + 1, batch.pieces.end);
                }
                prop_assert_eq!(memory.pieces.end, piece_at);
                prop_assert_eq!(memory.segments.clone().map(|number| plan.segments[number].memory_bytes).sum::<u64>(), memory.bytes);
            }
            prop_assert_eq!((batch_at, piece_at, range_at), (plan.batches.len(), plan.pieces.len(), plan.memory_bytes));
        }
    }
}
