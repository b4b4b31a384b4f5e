//! What follows a read: the rest of a short one, another try, a lower route, or the load's failure.

use rustix::io::Errno;

use super::entry::{Chunk, progress};
use super::{Driver, LOAD, PIECE};
use crate::memory::buffer::Buffer;
use crate::ring::kernel::Kernel;
use crate::ring::message::{Failure, FileSpec, LoadEvent, Output, Retried};
use crate::ring::slots::Token;
use crate::route::{Attempt, Fallback, Route, is_refusal};
use crate::support::errno;
use crate::support::id::LoadId;

/// A read that is interrupted (EINTR, EAGAIN) this often in a row is not asked for again.
const INTERRUPTIONS: u32 = 64;

/// A direct read that gives less than a block this often in a row has met the end of the file, or a file system
/// that can't do better.
const PARTS_OF_A_BLOCK: u32 = 16;

impl<K: Kernel, B: Buffer> Driver<K, B> {
    /// `bytes` bytes of a chunk came.
    pub(super) fn advance(&mut self, mut chunk: Chunk, route: Route, bytes: u64) {
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let wanted = chunk.range.end - chunk.range.start;
        if bytes >= wanted {
            entry.chunks_left -= 1;
            if entry.chunks_left == 0 {
                self.fill(chunk.piece);
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
            // Only a buffered read can tell whether the file ends here. The kernel gave no error, so the step is
            // told with the one that reading on from the middle of a block would give.
            let piece = chunk.piece;
            self.requeue(id, chunk);
            self.step_down(piece, route, Route::Buffered, Attempt::ReadOn, Errno::INVAL, offset);
        }
    }

    /// A read was interrupted, or is to be tried again.
    pub(super) fn again(&mut self, mut chunk: Chunk, route: Route) {
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

    /// A read failed: by a lower route, if the error says that this one is at fault; else once more, alone.
    ///
    /// The kernel merges neighbouring reads into one request, and when the medium can't give a block of it, all of them fail:
    /// alone, only the one fails that asks for the bad block.
    pub(super) fn refused(&mut self, mut chunk: Chunk, route: Route, errno: Errno) {
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

    /// `from` was refused to the file of this piece: all of its reads from now on go by `to`, unless they have gone
    /// lower already. What the ring refuses, it refuses to every file.
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
            // What memory refuses, it refuses to every file.
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
        // Several reads may be refused before the first refusal is seen; one step is told once.
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
