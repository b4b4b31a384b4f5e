//! Passes the bytes of a load to its observers, in file order, from pieces or from staging.

use std::sync::Arc;

use super::super::kernel::{Kernel, ObserveRequest};
use super::super::message::Failure;
use super::super::staging::StagingSlot;
use super::entry::{Chunk, InFlight, Operation, Step, Unobserved, progress};
use super::{Driver, LOAD, PIECE};
use crate::memory::buffer::{Buffer, Fault, PieceMemory};
use crate::route::Route;
use crate::support::convert::to_usize;
use crate::support::id::LoadId;

impl<K: Kernel, B: PieceMemory> Driver<K, B> {
    /// Starts the next observation in file order, if its bytes are ready and no other observation
    /// is in flight.
    pub(super) fn observe_next(&mut self, id: LoadId) {
        let load = self.loads.get_mut(&id).expect(LOAD);
        let observation = load.spec.observation.as_ref().expect("only a load with an observer should queue bytes for it");
        let watch = Arc::clone(&observation.watch);
        let Some(unobserved) = load.unobserved.take() else { return };
        let token = match &unobserved {
            Unobserved::Piece(token) => *token,
            Unobserved::Staged { chunk, .. } => chunk.piece,
        };
        let entry = self.pieces.get_mut(token).expect(PIECE);
        let (address, bytes, chunk, route, step) = match unobserved {
            Unobserved::Piece(token) => {
                let all = Chunk::new(token, entry.position, 0..entry.piece.bytes);
                (entry.buffer.address(), to_usize(entry.piece.bytes), all, entry.file.route, Step::Observed)
            }
            Unobserved::Staged { chunk, route, slot, bytes } => {
                let (staging, _) = self.staging.get(slot);
                (staging.address(), bytes, chunk, route, Step::ObservedStaged(slot))
            }
        };
        entry.in_flight += 1;
        load.in_flight += 1;
        self.in_flight.take(&id, entry.file.mount, 1);
        let (file, offset) = (entry.file.index, entry.piece.file_offset + chunk.range.start);
        let token = self.reads.insert(Operation::Chunk(InFlight { chunk, route, step, since: self.kernel.now() }));
        // SAFETY: these bytes were written by reads and copies that have completed. As in
        // `start_read`, the entry's `in_flight` count keeps the piece's buffer alive until the
        // completion, and the slot stays taken. Nothing writes to a full piece or to a slot whose
        // read has completed.
        unsafe { self.kernel.observe(ObserveRequest { token, watch, file, offset, address, bytes }) };
        self.report_missing_thread(id);
    }

    /// Queues the observation of bytes in staging after they have been copied. Bytes after the
    /// last whole block of a short direct read are not observed yet: they are read again with the
    /// rest.
    pub(super) fn queue_observation(&mut self, id: LoadId, chunk: Chunk, route: Route, slot: StagingSlot, bytes: usize) {
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let counted = progress(&chunk, bytes as u64, route, entry.file.alignment_bytes);
        if counted == 0 {
            self.staging.give_back(slot);
            self.advance(chunk, route, bytes as u64);
            return;
        }
        let position = chunk.start_position();
        let load = self.loads.get_mut(&id).expect(LOAD);
        load.unobserved.insert(position, counted, Unobserved::Staged { chunk, route, slot, bytes: to_usize(counted) });
        self.observe_next(id);
    }

    /// Completes an observation: outputs an observed piece, or completes a chunk that was observed
    /// in staging. If the bytes were rejected, fails the load.
    pub(super) fn complete_observation(
        &mut self,
        id: LoadId,
        chunk: Chunk,
        route: Route,
        step: Step,
        result: Result<usize, Fault>,
    ) {
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        match result {
            Ok(bytes) => {
                self.observe_next(id);
                match step {
                    Step::Observed => self.output_piece(chunk.piece),
                    _ => self.advance(chunk, route, bytes as u64),
                }
            }
            Err(_) => {
                let (file, offset) = (entry.file.index, entry.piece.file_offset + chunk.range.start);
                let bytes = chunk.range.end - chunk.range.start;
                self.fail(id, Failure::Rejected { file, offset, bytes });
            }
        }
    }
}
