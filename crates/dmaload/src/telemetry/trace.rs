//! The timeline of a load: an event for each allocation, registration, read, copy and hand-over.

use std::time::Duration;

/// The kind of a [`TraceEvent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum TraceKind {
    /// Memory for a piece of a segment was allocated and populated.
    Allocate,
    /// A piece's pages were registered with the ring.
    Register,
    /// A read was in flight.
    Read,
    /// Data read into staging was copied into place.
    Copy,
    /// A chunk was copied from the page cache.
    FromCache,
    /// An observer saw bytes.
    Observe,
    /// A segment was exported as a dma-buf.
    Export,
    /// A segment was handed over to the consumer. Takes no time.
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

/// Something that a load did. Times count from the start of the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TraceEvent {
    /// What was done.
    pub kind: TraceKind,
    /// When it began.
    pub start: Duration,
    /// When it ended.
    pub end: Duration,
    /// The number of the file.
    pub file_index: usize,
    /// The number of the segment, over all files.
    pub segment: usize,
    /// Number of bytes: of memory for `Allocate` and `Register`, of the file for the others.
    pub bytes: u64,
}
