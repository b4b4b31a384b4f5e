//! What a load did when: an event for each allocation, registration, read, copy and hand-over.

use std::time::Duration;

/// What was being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum TraceKind {
    /// Memory for a piece of a segment was allocated and populated.
    Allocate,
    /// A piece's pages were registered with the ring.
    Register,
    /// A read was in flight.
    Read,
    /// What a read brought into staging was copied.
    Copy,
    /// A chunk was copied from the page cache.
    FromCache,
    /// An observer looked at bytes.
    Observe,
    /// A segment was made a dma-buf.
    Export,
    /// A segment was handed over to the consumer: a moment.
    HandOver,
}

impl TraceKind {
    /// The name used in timelines.
    pub fn name(self) -> &'static str {
        match self {
            TraceKind::Allocate => "allocate",
            TraceKind::Register => "register",
            TraceKind::Read => "read",
            TraceKind::Copy => "copy",
            TraceKind::FromCache => "from cache",
            TraceKind::Observe => "observe",
            TraceKind::Export => "export",
            TraceKind::HandOver => "hand over",
        }
    }
}

/// Something that a load did; times count from the call of `load`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TraceEvent {
    /// What.
    pub kind: TraceKind,
    /// When it began.
    pub start: Duration,
    /// When it ended.
    pub end: Duration,
    /// The number of the file.
    pub file_index: usize,
    /// The number of the segment, over all files.
    pub segment: usize,
    /// How many bytes: of memory for `Allocate` and `Register`, of the file for the others.
    pub bytes: u64,
}
