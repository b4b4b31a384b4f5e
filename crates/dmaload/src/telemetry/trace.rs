//! The timeline of a load: an event for each step, such as an allocation, a read or a hand-over.

use std::time::Duration;

/// The kind of a [`TraceEvent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum TraceKind {
    /// Memory for segments was allocated and populated, or part of an allocation was populated.
    Allocate,
    /// A piece's pages were registered with the ring.
    Register,
    /// A read was in flight.
    Read,
    /// Bytes were copied from staging to their place in memory.
    Copy,
    /// A chunk was copied from the page cache.
    FromCache,
    /// An observer was called with bytes of the load.
    Observe,
    /// A full allocation was finished: bytes that belong elsewhere in it were moved there, and it
    /// was exported as a dma-buf if the heap supports that.
    Export,
    /// A segment was delivered to the caller. Takes no time.
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

/// A step of a load. Its times are relative to the start of the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TraceEvent {
    /// The kind of the step.
    pub kind: TraceKind,
    /// When it began.
    pub start: Duration,
    /// When it ended.
    pub end: Duration,
    /// The number of the file. If the memory belongs to several files, this is the first one.
    pub file_index: usize,
    /// The number of the segment, counted across all files. If the memory belongs to several
    /// segments, this is the first one.
    pub segment: usize,
    /// Number of bytes of memory (for `Allocate` and `Register`) or of the file (for the other
    /// kinds); 0 for `Export`.
    pub bytes: u64,
}
