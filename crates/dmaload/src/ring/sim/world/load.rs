//! One load in a simulated world: its request and its outcome.

use std::sync::{Arc, Mutex};

use crate::options::observer::{Observer, Rejection};
use crate::plan::{Piece, Plan};
use crate::ring::message::Failure;
use crate::ring::sim::disk::{BLOCK, SimFile, byte_of};
use crate::ring::watch::Observation;
use crate::route::{Attempt, Route};

pub(crate) struct SimLoad {
    pub(crate) observed: Option<(Arc<SimObserver>, Observation)>,
    pub(crate) start: Route,
    pub(crate) strict: bool,
    /// Whether direct reads are copies from memory. Such copies may go into unpopulated memory.
    pub(crate) in_memory: bool,
    /// How many batches in a thousand are unpopulated when they are enqueued. Unless the files are
    /// in memory, reads for such batches start at `bounce` or a less preferred route.
    pub(crate) unpopulated_per_mille: u64,
    /// How many chunks in a thousand are in the page cache.
    pub(crate) cached_per_mille: u64,
    /// Bytes of chunks that were in the page cache when their pieces were prepared.
    pub(crate) cacheable_bytes: u64,
    /// Bytes that the driver has copied from the page cache.
    pub(crate) cached_bytes: u64,
    pub(crate) chunk_bytes: u64,
    /// The files, each with its planned length.
    pub(crate) files: Vec<(SimFile, u64)>,
    pub(crate) plan: Plan,
    pub(crate) full: Vec<bool>,
    pub(crate) begun: bool,
    pub(crate) abandoned: bool,
    pub(crate) failure: Option<Failure>,
    pub(crate) gone: bool,
    /// The least preferred route that was reported, initially `start`.
    pub(crate) lowest_reported: Route,
    /// Attempts that were reported as refused.
    pub(crate) refused: Vec<Attempt>,
    pub(crate) bounced: bool,
    pub(crate) less_staging: bool,
    pub(crate) no_thread: bool,
}

impl SimLoad {
    pub(crate) fn is_over(&self) -> bool {
        self.gone || (!self.begun && self.abandoned)
    }

    pub(crate) fn is_staged(&self) -> bool {
        self.observed.as_ref().is_some_and(|(_, observation)| observation.staged)
    }

    pub(crate) fn staged_by(&self) -> Route {
        if self.start < Route::Bounce { self.start } else { Route::UringFixedDirect }
    }

    /// Returns the index of the piece's file, and the piece.
    pub(crate) fn numbered_piece(&self, number: usize) -> (usize, Piece) {
        let piece = self.plan.pieces[number];
        (self.plan.segments[piece.segment].file, piece)
    }

    /// Whether a file in the load has a fault that no route avoids. Bad blocks are ignored if any
    /// bytes were copied from the page cache, because those may include the bytes of the bad
    /// blocks.
    pub(crate) fn must_fail(&self) -> bool {
        self.files.iter().any(|(file, planned)| {
            let bad = file.faults.bad.as_ref().is_some_and(|(range, _)| range.start < planned.next_multiple_of(BLOCK));
            *planned > 0 && (bad && self.cached_bytes == 0 || file.bytes < *planned)
        })
    }

    /// Checks a full piece: the file's bytes, and zeros after them.
    pub(crate) fn check_bytes(&self, number: usize, seen: &[u8]) {
        let (file, piece) = self.numbered_piece(number);
        let file = &self.files[file].0;
        assert_eq!(seen.len() as u64, piece.memory_bytes);
        for (at, &byte) in seen.iter().enumerate() {
            let expected = if (at as u64) < piece.bytes { file.byte(piece.file_offset + at as u64) } else { 0 };
            assert_eq!(byte, expected, "byte {at} of piece {number} ({piece:?})");
        }
    }
}

/// An observer that checks every byte, and checks that bytes arrive in file order.
pub(crate) struct SimObserver {
    /// The number and planned length of each file.
    files: Vec<(u64, u64)>,
    /// The file and offset of the byte that the observer rejects.
    pub(crate) rejects: Option<(usize, u64)>,
    /// The file and offset of the byte that must be observed next.
    seen: Mutex<(usize, u64)>,
}

impl SimObserver {
    pub(crate) fn new(files: Vec<(u64, u64)>, rejects: Option<(usize, u64)>) -> Self {
        SimObserver { files, rejects, seen: Mutex::new((0, 0)) }
    }

    pub(crate) fn has_seen(&self, file: usize, end: u64) -> bool {
        *self.seen.lock().unwrap() >= (file, end)
    }

    pub(crate) fn has_seen_all(&self) -> bool {
        let end = self.files.iter().rposition(|&(_, bytes)| bytes > 0).map(|last| (last, self.files[last].1));
        end.is_none_or(|(file, bytes)| self.has_seen(file, bytes))
    }
}

impl Observer for SimObserver {
    fn bytes(&self, file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        let mut seen = self.seen.lock().unwrap();
        while seen.1 == self.files[seen.0].1 {
            *seen = (seen.0 + 1, 0);
        }
        let (number, planned) = self.files[file_index];
        let end = offset + bytes.len() as u64;
        // `Watch` turns a panic here into a verdict that `check_failure` does not accept.
        assert!(
            (file_index, offset) == *seen && end <= planned,
            "bytes {offset}..{end} of file {file_index} were observed, but {seen:?} is next"
        );
        for (at, &byte) in bytes.iter().enumerate() {
            assert_eq!(byte, byte_of(number, offset + at as u64), "byte {at} after offset {offset}");
        }
        if self.rejects.is_some_and(|(file, at)| file == file_index && (offset..end).contains(&at)) {
            return Err("this byte".into());
        }
        *seen = (file_index, end);
        Ok(())
    }
}
