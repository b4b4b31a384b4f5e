//! Handles the results of reads: continues after short reads, retries, falls back to another
//! route, or fails the load.

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

/// Maximum number of interruptions (EINTR, EAGAIN) of a chunk without progress. The next one fails
/// the load, which would otherwise retry forever if every read were interrupted.
const INTERRUPTIONS: u32 = 64;

/// Maximum number of consecutive reads of a chunk that may return less than a block. After each of
/// them, the read is repeated from the start of that block. After one more, the driver assumes
/// that the file ends within the block, or that the file system can't return more through direct
/// reads. It then falls back to buffered reads or, if the load is strict, fails the load.
const PARTS_OF_A_BLOCK: u32 = 16;

impl<K: Kernel, B: PieceMemory> Driver<K, B> {
    /// Records that `bytes` bytes of a chunk were read. If that completes the last chunk of a
    /// piece, finishes the piece. After a short read, requeues the rest. If nothing was read,
    /// fails the load. After too many reads that returned less than a block, falls back to
    /// buffered reads or, if the load is strict, fails the load.
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
        let progress = progress(&chunk, bytes, route, entry.file.alignment_bytes);
        if bytes == 0 || (strict && progress == 0 && chunk.parts_of_a_block == PARTS_OF_A_BLOCK) {
            self.fail(id, Failure::Ended { file, offset: offset + bytes, route });
            return;
        }
        if progress > 0 {
            self.requeue(id, chunk.rest(progress));
        } else if chunk.parts_of_a_block < PARTS_OF_A_BLOCK {
            chunk.parts_of_a_block += 1;
            self.requeue(id, chunk);
        } else {
            // Only a buffered read can tell whether the file ends here. The kernel returned no
            // error, so the fallback is reported with EINVAL, the error of a direct read that does
            // not begin at a block boundary.
            let piece = chunk.piece;
            self.requeue(id, chunk);
            self.step_down(piece, route, Route::Buffered, Attempt::ReadOn, Errno::INVAL, offset);
        }
    }

    /// Requeues a read that was interrupted, or fails the load after more than [`INTERRUPTIONS`]
    /// interruptions without progress.
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

    /// Handles a failed read. If the error means that the route was refused, and there is a route
    /// to fall back to, the read is retried through that route. Otherwise it is retried once, with
    /// nothing else from the load in flight, and a second failure fails the load.
    ///
    /// The kernel merges neighboring reads into one request, and all of them fail if one block of
    /// the request can't be read. If they are then retried one at a time, only the read that
    /// covers the bad block fails again.
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

    /// Falls back to the route `to`, because `from` was refused for a read of this piece. From now
    /// on, all reads of the piece's file use `to` or a less preferred route. If the ring or the
    /// memory is the cause, this applies to all files in the load. A strict load fails instead.
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
            // EFAULT means that the memory can't be pinned, regardless of the file.
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
        // Several reads may be refused before the first refusal is handled, but each fallback is
        // reported only once.
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
