//! The plan of a file: which segments it goes into, in which pieces they are filled, and by which reads.
//!
//! ```text
//!   file      |------------------------- bytes --------------------------|
//!   segments  |--------- 0 ----------|--------- 1 ----------|---- 2 -----|....|   padded to the alignment
//!   pieces    |--0--|--1--|--2--|--3-|--4--| ...                                  allocated, populated, registered, permitted
//!   chunks    |-|-|-|-|-|-|-|-| ...                                               one read each
//! ```
//!
//! Pure: no clock, no syscall, the same answer every time.

use std::num::NonZeroU64;
use std::ops::Range;

/// How a file is spread over segments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layout {
    /// Segments of the configured size, each with its own memory: the first is usable while the rest is read.
    #[default]
    Segmented,
    /// One segment for the whole file. Still filled piece by piece while the rest is being populated.
    Single,
}

impl Layout {
    /// The name used on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Segmented => "segmented",
            Layout::Single => "single",
        }
    }
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Layout {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        [Layout::Segmented, Layout::Single]
            .into_iter()
            .find(|layout| layout.name() == name)
            .ok_or_else(|| format!("no such layout: {name:?}; the layouts are segmented, single"))
    }
}

/// What shapes a plan. All sizes are multiples of `alignment_bytes`, which is a power of two and at least a page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) layout: Layout,
    pub(crate) segment_bytes: u64,
    pub(crate) piece_bytes: u64,
    pub(crate) alignment_bytes: u64,
}

/// A file's plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) file_bytes: u64,
    pub(crate) segments: Vec<SegmentPlan>,
    pub(crate) pieces: Vec<Piece>,
}

/// A segment: the file's bytes in it, and the memory that holds them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SegmentPlan {
    pub(crate) file_range: Range<u64>,
    /// The length of its memory: that of the range, rounded up to the alignment.
    pub(crate) memory_bytes: u64,
    /// Its pieces, as indices into the plan's.
    pub(crate) pieces: Range<usize>,
}

/// A piece: the unit that is allocated, registered, filled and counted by the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) segment: usize,
    /// Where it begins in its segment's memory.
    pub(crate) memory_offset: u64,
    /// Where it begins in the file.
    pub(crate) file_offset: u64,
    /// The file's bytes in it.
    pub(crate) bytes: u64,
    /// The length of its memory, at least `bytes`; what lies beyond is read too (a direct read takes whole
    /// blocks) and zeroed afterwards.
    pub(crate) memory_bytes: u64,
}

impl Plan {
    /// Plans a file of `file_bytes` bytes. A file of 0 bytes has no segments.
    pub(crate) fn new(file_bytes: u64, shape: Shape) -> Plan {
        debug_assert!(shape.alignment_bytes.is_power_of_two());
        debug_assert!(
            shape.segment_bytes.is_multiple_of(shape.alignment_bytes) && shape.piece_bytes.is_multiple_of(shape.alignment_bytes)
        );
        let segment_bytes = match shape.layout {
            Layout::Segmented => shape.segment_bytes,
            Layout::Single => u64::MAX,
        };
        let mut plan = Plan { file_bytes, segments: Vec::new(), pieces: Vec::new() };
        for file_range in split(0..file_bytes, segment_bytes) {
            let first_piece = plan.pieces.len();
            for part in split(file_range.clone(), shape.piece_bytes) {
                let bytes = part.end - part.start;
                plan.pieces.push(Piece {
                    segment: plan.segments.len(),
                    memory_offset: part.start - file_range.start,
                    file_offset: part.start,
                    bytes,
                    memory_bytes: bytes.next_multiple_of(shape.alignment_bytes),
                });
            }
            let memory_bytes = (file_range.end - file_range.start).next_multiple_of(shape.alignment_bytes);
            plan.segments.push(SegmentPlan { file_range, memory_bytes, pieces: first_piece..plan.pieces.len() });
        }
        plan
    }

    /// The memory that all segments take.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.memory_bytes).sum()
    }
}

/// Cuts a range into parts of `step` bytes; the last may be shorter.
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

    fn shape(layout: Layout, segment_pages: u64, piece_pages: u64) -> Shape {
        Shape {
            layout,
            segment_bytes: segment_pages * ALIGNMENT,
            piece_bytes: piece_pages * ALIGNMENT,
            alignment_bytes: ALIGNMENT,
        }
    }

    #[test]
    fn an_empty_file_has_no_segments() {
        let plan = Plan::new(0, shape(Layout::Segmented, 4, 2));
        assert_eq!((plan.segments.len(), plan.pieces.len()), (0, 0));
    }

    #[test]
    fn a_file_of_one_segment_and_a_byte_has_two() {
        let plan = Plan::new(4 * ALIGNMENT + 1, shape(Layout::Segmented, 4, 2));
        assert_eq!(plan.segments[1].file_range, 4 * ALIGNMENT..4 * ALIGNMENT + 1);
        assert_eq!(plan.segments[1].memory_bytes, ALIGNMENT);
        assert_eq!(plan.pieces.len(), 3);
    }

    #[test]
    fn single_is_one_segment_of_several_pieces() {
        let plan = Plan::new(9 * ALIGNMENT - 5, shape(Layout::Single, 4, 2));
        assert_eq!(plan.segments.len(), 1);
        assert_eq!(plan.segments[0].memory_bytes, 9 * ALIGNMENT);
        assert_eq!(plan.segments[0].pieces, 0..5);
    }

    proptest! {
        #[test]
        fn every_byte_is_in_one_segment_and_one_piece(
            file_bytes in 0u64..2_000_000, segment_pages in 1u64..40, piece_pages in 1u64..50, single: bool,
        ) {
            let layout = if single { Layout::Single } else { Layout::Segmented };
            let plan = Plan::new(file_bytes, shape(layout, segment_pages, piece_pages));
            let mut file_at = 0;
            for (index, segment) in plan.segments.iter().enumerate() {
                prop_assert_eq!(segment.file_range.start, file_at);
                let mut memory_at = 0;
                for piece in &plan.pieces[segment.pieces.clone()] {
                    prop_assert_eq!(piece.segment, index);
                    prop_assert_eq!(piece.file_offset, file_at);
                    prop_assert_eq!(piece.memory_offset, memory_at);
                    prop_assert!(piece.bytes > 0 && piece.bytes <= piece.memory_bytes);
                    prop_assert!(piece.memory_bytes - piece.bytes < ALIGNMENT);
                    prop_assert!(piece.memory_bytes <= piece_pages * ALIGNMENT);
                    prop_assert_eq!(piece.file_offset % ALIGNMENT, 0);
                    file_at += piece.bytes;
                    memory_at += piece.memory_bytes;
                }
                prop_assert_eq!(segment.file_range.end, file_at);
                prop_assert_eq!(segment.memory_bytes, memory_at);
                prop_assert!(single || segment.memory_bytes <= segment_pages * ALIGNMENT);
            }
            prop_assert_eq!(file_at, file_bytes);
            prop_assert_eq!(plan.segments.iter().map(|segment| segment.pieces.len()).sum::<usize>(), plan.pieces.len());
        }
    }
}
