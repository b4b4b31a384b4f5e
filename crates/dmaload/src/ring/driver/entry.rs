//! The driver's records of loads, pieces and operations in flight.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::time::Duration;

use super::super::message::{FileSpec, LoadSpec, Times};
use super::super::order::InOrder;
use super::super::slots::Token;
use super::super::staging::StagingSlot;
use crate::plan::{Piece, split};
use crate::route::Route;
use crate::support::convert::to_usize;
use crate::support::id::LoadId;
use crate::telemetry::busy::BusyTime;

#[derive(Debug)]
pub(super) struct PieceEntry<F, B> {
    pub(super) load: LoadId,
    pub(super) number: usize,
    pub(super) piece: Piece,
    pub(super) file: FileSpec<F>,
    pub(super) buffer: B,
    pub(super) buffer_slot: Option<u16>,
    /// Number of incomplete chunks, plus the number of requests in flight to populate memory.
    pub(super) chunks_left: usize,
    pub(super) in_flight: usize,
    /// The least preferred of the routes through which the piece's bytes were read from storage;
    /// `None` if no bytes were.
    pub(super) route: Option<Route>,
    /// If the load has an observer, the piece's offset in the concatenation of all files. It is
    /// set once all earlier pieces have been enqueued. Always 0 without an observer.
    pub(super) position: u64,
    /// When the piece was enqueued.
    pub(super) since: Duration,
}

/// A range of a piece that has to be read from storage or copied from the page cache.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub(super) piece: Token,
    /// If the load has an observer, the piece's offset in the concatenation of all files;
    /// otherwise 0.
    pub(super) position: u64,
    pub(super) range: Range<u64>,
    /// Whether the chunk was in the page cache when the piece was prepared.
    pub(super) cached: bool,
    /// Number of reads that have returned less than a block since the last progress.
    pub(super) parts_of_a_block: u32,
    /// Number of reads that have been interrupted since the last progress.
    pub(super) interruptions: u32,
    /// Whether a read of the chunk has failed. If so, the chunk is retried once, with nothing else
    /// from the load in flight.
    pub(super) alone: bool,
}

impl Chunk {
    pub(super) fn new(piece: Token, position: u64, range: Range<u64>) -> Self {
        Chunk { piece, position, range, cached: false, parts_of_a_block: 0, interruptions: 0, alone: false }
    }

    /// Returns the rest of the chunk after its first `bytes` bytes, to be read from storage.
    pub(super) fn rest(&self, bytes: u64) -> Self {
        Chunk::new(self.piece, self.position, self.range.start + bytes..self.range.end)
    }

    pub(super) fn start_position(&self) -> u64 {
        self.position + self.range.start
    }
}

/// An operation in flight.
#[derive(Debug)]
pub(super) enum Operation {
    /// A read, a copy or an observation.
    Chunk(InFlight),
    /// A request to populate `bytes` bytes of the piece's memory.
    Populate { piece: Token, bytes: u64 },
}

#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) chunk: Chunk,
    pub(super) route: Route,
    pub(super) step: Step,
    pub(super) since: Duration,
}

/// The kind of an operation in flight.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    /// A read into the piece's memory.
    Read,
    /// A read into staging.
    Staged(StagingSlot),
    /// A copy from staging into the piece's memory.
    Copied(StagingSlot),
    /// A copy from the page cache into the piece's memory.
    Cached,
    /// An observation of bytes in staging.
    ObservedStaged(StagingSlot),
    /// An observation of the whole piece.
    Observed,
}

/// Bytes waiting for their turn to be observed.
#[derive(Debug)]
pub(super) enum Unobserved {
    Piece(Token),
    Staged { chunk: Chunk, route: Route, slot: StagingSlot, bytes: usize },
}

#[derive(Debug)]
pub(super) struct LoadEntry {
    pub(super) spec: LoadSpec,
    pub(super) pieces_left: usize,
    pub(super) chunks: VecDeque<Chunk>,
    /// Chunks whose reads failed. They are retried one at a time, before all other chunks or, if
    /// the load has an observer, in file order.
    pub(super) alone: VecDeque<Chunk>,
    pub(super) alone_in_flight: bool,
    pub(super) in_flight: usize,
    pub(super) pieces: Vec<Token>,
    pub(super) reading: BusyTime,
    pub(super) copying: BusyTime,
    pub(super) from_cache: BusyTime,
    pub(super) cached_bytes: u64,
    /// Whether a refusal of the best route for reads into staging was reported.
    pub(super) staging_reported: bool,
    /// Whether `LoadEvent::LessStaging` was output.
    pub(super) less_staging_reported: bool,
    /// Whether `LoadEvent::NoThread` was output.
    pub(super) no_thread_reported: bool,
    /// The best route that files in the load may still use after the fallbacks that apply to all
    /// of them.
    pub(super) floor: Route,
    /// The best route that each file may still use, by the index of the file. Contains only files
    /// that have fallen back on their own.
    pub(super) stepped: HashMap<usize, Route>,
    pub(super) ended: bool,
    pub(super) unobserved: InOrder<Unobserved>,
    /// If the load has an observer, the number of the first piece whose chunks are not queued yet.
    pub(super) next_piece: usize,
    /// The offset of piece `next_piece` in the concatenation of all files.
    pub(super) next_position: u64,
    /// Pieces after `next_piece` that have already been enqueued, by number, with their lengths in
    /// bytes.
    pub(super) early: BTreeMap<usize, (Token, u64)>,
}

impl LoadEntry {
    /// Whether the next chunk has to be read alone.
    fn next_is_alone(&self) -> bool {
        match (self.alone.front(), self.chunks.front()) {
            // Loads with an observer are read in file order: see the driver's module
            // documentation.
            (Some(alone), Some(other)) if self.is_observed() => alone.start_position() < other.start_position(),
            (alone, _) => alone.is_some(),
        }
    }

    /// Returns the piece that the next chunk belongs to, whether or not the chunk can be read now.
    pub(super) fn next_piece(&self) -> Option<Token> {
        let queue = if self.next_is_alone() { &self.alone } else { &self.chunks };
        queue.front().map(|chunk| chunk.piece)
    }

    /// Takes the next chunk, if it can be read now.
    pub(super) fn next_chunk(&mut self) -> Option<Chunk> {
        let alone = self.next_is_alone();
        if self.in_flight > 0 && (self.alone_in_flight || alone) {
            return None;
        }
        self.alone_in_flight = alone;
        if alone { self.alone.pop_front() } else { self.chunks.pop_front() }
    }

    /// Puts back a chunk that still has to be read: at the front of its queue or, if the load has
    /// an observer, at its position in file order.
    pub(super) fn requeue(&mut self, chunk: Chunk) {
        let ordered = self.is_observed();
        let queue = if chunk.alone { &mut self.alone } else { &mut self.chunks };
        let before =
            if ordered { queue.iter().take_while(|other| other.start_position() < chunk.start_position()).count() } else { 0 };
        queue.insert(before, chunk);
    }

    pub(super) fn is_observed(&self) -> bool {
        self.spec.observation.is_some()
    }

    pub(super) fn times(&self) -> Times {
        Times {
            reading: self.reading.total(),
            copying: self.copying.total(),
            from_cache: self.from_cache.total(),
            cached_bytes: self.cached_bytes,
        }
    }
}

/// Splits a piece into chunks, and stores their number in `entry`.
pub(super) fn split_into_chunks<F, B>(token: Token, entry: &mut PieceEntry<F, B>, chunk_bytes: u64) -> Vec<Chunk> {
    let chunk =
        |(number, range)| Chunk { cached: entry.file.cached.contains(number), ..Chunk::new(token, entry.position, range) };
    let chunks: Vec<_> = split(0..entry.piece.bytes, chunk_bytes).enumerate().map(chunk).collect();
    entry.chunks_left = chunks.len();
    chunks
}

/// Returns how many bytes of a chunk are complete after a read of `bytes` bytes. The rest of a
/// direct read must start at a block boundary, so a partial block does not count and is read
/// again.
pub(super) fn progress(chunk: &Chunk, bytes: u64, route: Route, alignment_bytes: u64) -> u64 {
    let wanted = chunk.range.end - chunk.range.start;
    match bytes {
        bytes if bytes >= wanted => wanted,
        bytes if route.is_direct() => bytes - bytes % alignment_bytes,
        bytes => bytes,
    }
}

/// Returns how many bytes to request in a read for this chunk: whole blocks if the read is direct.
pub(super) fn read_bytes<F>(chunk: &Chunk, file: &FileSpec<F>) -> usize {
    let bytes = chunk.range.end - chunk.range.start;
    to_usize(if file.route.is_direct() { bytes.next_multiple_of(file.alignment_bytes) } else { bytes })
}
