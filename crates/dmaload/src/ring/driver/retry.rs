//! Handles the results of reads: continues after short ones, retries, steps down, or fails the
//! load.

use rustix::io::Errno;

use super::entry::{Chunk, progress};
use super::{Driver, LOAD, PIECE};
use crate::memory::buffer::PieceMemory;
use crate::ring::kernel::Kernel;
use crate::ring::message::{Failure, FileSpec, LoadEvent, Output, Retried};
use crate::ring::slots::Token;
use crate::route::{Attempt, Fallback, Route, is_refusal};
use crate::support::errno;
use crate::support::id::LoadId;

/// Number of consecutive interruptions (EINTR, EAGAIN) after which the next one fails the load.
const INTERRUPTIONS: u32 = 64;

/// Number of consecutive direct reads of less than a block after which the driver assumes that the
/// file has ended or that the file system can't do better.
const PARTS_OF_A_BLOCK: u32 = 16;

impl<K: Kernel, B: PieceMemory> Driver<K, B> {
    /// Records that `bytes` bytes of a chunk were read, and requeues the rest after a short read.
    pub(super) fn advance(&mut self, mut chunk: Chunk, route: Route, bytes: u64) {
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let wanted = chunk.range.end - chunk.range.start;
        if bytes >= wanted {
            entry.chunks_left -= 1;
            if entry.chunks_left == 0 {
                self.finish_piece(chunk.piece);
            }
            return;
        }
        let (id, file, offset) = (entry.load, entry.file.index, entry.piece.file_offset + chunk.range.start);
        let strict = self.loads.get(&id).expect(LOAD).spec.strict;
        if bytes == 0 || (strict && chunk.parts_of_a_block == PARTS_OF_A_BLOCK) {
            self.fail(id, Failure::Ended { file, offset: offset + bytes, route });
            return;
        }
        let progress = progress(&chunk, bytes, route, entry.file.alignment_bytes);
        if progress > 0 {
            self.requeue(id, chunk.rest(progress));
        } else if chunk.parts_of_a_block < PARTS_OF_A_BLOCK {
            chunk.parts_of_a_block += 1;
            self.requeue(id, chunk);
        } else {
            // Only a buffered read can tell whether the file ends here. The kernel returned no
            // error, so the step is reported with EINVAL, which a direct read from within a block
            // would return.
            let piece = chunk.piece;
            self.requeue(id, chunk);
            self.step_down(piece, route, Route::Buffered, Attempt::ReadOn, Errno::INVAL, offset);
        }
    }

    /// Retries a read that was interrupted.
    pub(super) fn retry_interrupted(&mut self, mut chunk: Chunk, route: Route) {
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let id = entry.load;
        chunk.interruptions += 1;
        if chunk.interruptions > INTERRUPTIONS {
            let failure = Failure::Read {
                file: entry.file.index,
                offset: entry.piece.file_offset + chunk.range.start,
                bytes: chunk.range.end - chunk.range.start,
                route,
                errno: Errno::AGAIN,
            };
            self.fail(id, failure);
        } else {
            self.requeue(id, chunk);
        }
    }

    /// Handles a failed read: retries it by a lower route if the error refuses this one; otherwise
    /// retries it once, alone; and fails the load if that fails, too.
    ///
    /// The kernel merges neighbouring reads into one request, and if the medium can't read one
    /// block of it, all of them fail. Alone, only the read that covers the bad block fails.
    pub(super) fn handle_read_error(&mut self, mut chunk: Chunk, route: Route, errno: Errno) {
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let (id, piece) = (entry.load, chunk.piece);
        let offset = entry.piece.file_offset + chunk.range.start;
        let answer = errno::from_rustix(errno);
        let lower = if is_refusal(answer) { route.lower(answer) } else { None };
        match lower {
            Some(lower) => {
                self.requeue(id, chunk);
                self.step_down(piece, route, lower, Attempt::Read, errno, offset);
            }
            None if !chunk.alone => {
                let retried = Retried { file: entry.file.index, offset, bytes: chunk.range.end - chunk.range.start, errno };
                self.outputs.push(Output::Event { load: id, event: LoadEvent::Retried { retried } });
                chunk.alone = true;
                self.requeue(id, chunk);
            }
            None => {
                let bytes = chunk.range.end - chunk.range.start;
                let failure = Failure::Read { file: entry.file.index, offset, bytes, route, errno };
                self.fail(id, failure);
            }
        }
    }

    pub(super) fn requeue(&mut self, id: LoadId, chunk: Chunk) {
        self.loads.get_mut(&id).expect(LOAD).requeue(chunk);
    }

    /// Steps down, because `from` was refused for the file of this piece: from now on all of its
    /// reads use `to` or a lower route. Refusals by the ring or by memory concern all files of the
    /// load.
    pub(super) fn step_down(&mut self, piece: Token, from: Route, to: Route, attempt: Attempt, errno: Errno, offset: u64) {
        let entry = self.pieces.get_mut(piece).expect(PIECE);
        let (id, file) = (entry.load, entry.file.index);
        let load = self.loads.get_mut(&id).expect(LOAD);
        if load.spec.strict {
            self.fail(id, Failure::Refused { file, offset, route: from, attempt, errno });
            return;
        }
        let mount = entry.file.mount;
        let file_index = match attempt {
            // Memory that can't be pinned concerns all files.
            Attempt::Read if errno == Errno::FAULT => None,
            Attempt::SetUpRing | Attempt::RegisterBuffer | Attempt::RegisterStaging => None,
            Attempt::OpenDirect
            | Attempt::RingOnFuse
            | Attempt::RingOnStacked
            | Attempt::RingOnOther
            | Attempt::RingOnDevice
            | Attempt::RingOnUnknown
            | Attempt::Read
            | Attempt::ReadOn => Some(file),
        };
        self.known.stepped_down(mount, (from, to), attempt, errno, self.kernel.now());
        let left = match file_index {
            None => &mut load.floor,
            Some(file) => load.stepped.entry(file).or_insert(load.floor),
        };
        // Several reads may be refused before the first refusal is seen; each step is reported
        // once.
        let first = *left < to;
        *left = to.max(*left);
        for &token in &load.pieces {
            let concerned = |file: &FileSpec<K::File>| file_index.is_none_or(|index| index == file.index);
            let other = self.pieces.get_mut(token).expect(PIECE);
            if concerned(&other.file) {
                other.file.route = other.file.route.max(to);
            }
        }
        if first {
            let fallback = Fallback { file_index, from, to, attempt, errno: errno::from_rustix(errno) };
            self.outputs.push(Output::Event { load: id, event: LoadEvent::SteppedDown { fallback } });
        }
    }
}
