//! Staged reads: reads into staging, followed by copies into the piece. The `bounce` route always
//! uses staging. `uring-buffered` and `buffered` use it if the load's bytes are observed in
//! staging. `uring-buffered` also uses it if the memory is not populated.

use std::ops::Range;

use super::super::kernel::{Kernel, PopulateRequest, StagedCopy};
use super::super::message::{Failure, LoadEvent, Output};
use super::super::slots::Token;
use super::super::staging::StagingSlot;
use super::entry::{Chunk, InFlight, Operation, Step, read_bytes};
use super::issue::Destination;
use super::{Driver, LOAD, PIECE};
use crate::memory::buffer::{Buffer, Fault, PieceMemory};
use crate::ring::pace::FIRST;
use crate::route::{Fallback, Route};
use crate::support::convert::to_usize;
use crate::support::errno;
use crate::support::id::LoadId;

impl<K: Kernel, B: PieceMemory> Driver<K, B> {
    /// Issues a read into staging. Returns `false` if no slot is available.
    pub(super) fn issue_staged(&mut self, id: LoadId, mut chunk: Chunk) -> bool {
        // If a load with an observer has nothing in flight, this is its first unobserved chunk.
        // The bytes in all slots that the load holds can be observed only after this chunk, so
        // these slots don't count towards the load's share.
        let load = self.loads.get(&id).expect(LOAD);
        let waits = load.is_observed() && load.in_flight == 0;
        let file_system = self.pieces.get_mut(chunk.piece).expect(PIECE).file.mount;
        let taken = self.staging.take(id, file_system, waits, &mut self.kernel);
        if let Some((bytes, errno)) = self.staging.shortage().filter(|_| taken.is_ok())
            && let Some(load) = self.loads.get_mut(&id).filter(|load| !load.less_staging_reported)
        {
            load.less_staging_reported = true;
            self.outputs.push(Output::Event { load: id, event: LoadEvent::LessStaging { bytes, errno } });
        }
        let slot = match taken {
            Ok(Some(slot)) => slot,
            Ok(None) => {
                self.requeue(id, chunk);
                return false;
            }
            Err(errno) => {
                self.fail(id, Failure::Staging { bytes: self.staging.slot_bytes() as u64, errno });
                return true;
            }
        };
        if !self.register_staging(id, &chunk, slot) {
            self.staging.give_back(slot);
            return true;
        }
        let (buffer, registered) = self.staging.get(slot);
        let (address, slot_bytes) = (buffer.address(), buffer.bytes());
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        // The less staging is in use, the longer its bytes stay in the processor's cache, so reads
        // into half of each slot are faster on virtual disks. Once copiers have been added, it
        // matters more to keep the number of reads low, so reads fill whole slots.
        let half = (slot_bytes as u64 / 2).next_multiple_of(entry.file.alignment_bytes);
        let most = if self.pace.threads() > FIRST { slot_bytes as u64 } else { half };
        // If the chunk is larger than this limit, only its beginning is read now.
        let end = chunk.range.end.min(chunk.range.start + most);
        if end < chunk.range.end {
            entry.chunks_left += 1;
            let rest = chunk.rest(most);
            chunk.range.end = end;
            self.requeue(id, rest);
        }
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let route = entry.file.route;
        let bytes = read_bytes(&chunk, &entry.file);
        assert!(bytes <= slot_bytes, "a read must stay within its slot");
        let best = match (self.kernel.ring(), registered) {
            (Err(_), _) => Route::PreadDirect,
            (Ok(()), None) => Route::UringDirect,
            (Ok(()), Some(_)) => Route::UringFixedDirect,
        };
        let by = if route.is_direct() { best.max(entry.file.staged_by) } else { route };
        let registered = registered.filter(|_| by == Route::UringFixedDirect);
        let (piece, range) = (chunk.piece, chunk.range.clone());
        let in_flight = InFlight { chunk, route, step: Step::Staged(slot), since: self.kernel.now() };
        self.start_read(id, in_flight, by, Destination { buffer_slot: registered, address, bytes, place: None });
        self.start_populating(piece, range);
        true
    }

    /// Has a copier populate memory while its bytes are being read into staging, unless all of the
    /// piece's pages are present. A copier is often idle then, and copies free their slots sooner
    /// if the pages are already present. If there are at least two copies for each copier, or more
    /// copiers than at first, no copier will be idle soon, so nothing is requested. The piece is
    /// finished only once the request has completed.
    fn start_populating(&mut self, piece: Token, range: Range<u64>) {
        let entry = self.pieces.get_mut(piece).expect(PIECE);
        // The pace counts requests as jobs, too.
        let copies = self.pace.jobs().saturating_sub(self.populating);
        let copiers = self.pace.threads();
        if entry.buffer.is_populated() || copiers > FIRST || copies >= 2 * copiers {
            return;
        }
        let (place, bytes) = (entry.buffer.place(to_usize(range.start)), range.end - range.start);
        entry.in_flight += 1;
        entry.chunks_left += 1;
        self.populating += 1;
        // Populating keeps a copier busy, so it counts as a job.
        self.pace.begin(self.kernel.now());
        let token = self.reads.insert(Operation::Populate { piece, bytes });
        self.kernel.populate(PopulateRequest { token, place, bytes: to_usize(bytes) });
    }

    pub(super) fn complete_populating(&mut self, piece: Token, bytes: u64, result: Result<usize, Fault>) {
        self.populating -= 1;
        // The bytes are counted when they are copied.
        self.pace.withdraw(self.kernel.now());
        let entry = self.pieces.get_mut(piece).expect(PIECE);
        entry.in_flight -= 1;
        entry.chunks_left -= 1;
        let (id, chunks_left) = (entry.load, entry.chunks_left);
        if self.loads.get(&id).expect(LOAD).ended {
            self.release_idle(id);
        } else if let Err(Fault::Memory(errno) | Fault::Read(errno)) = result {
            self.fail(id, Failure::Memory { bytes, errno });
        } else if chunks_left == 0 {
            self.finish_piece(piece);
        }
    }

    /// Registers a slot if the load wants registered staging, and reports a refusal once. Returns
    /// `false` if the load is strict and has failed because of the refusal.
    pub(super) fn register_staging(&mut self, id: LoadId, chunk: &Chunk, slot: StagingSlot) -> bool {
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let (file, offset, wanted) = (entry.file.index, entry.piece.file_offset + chunk.range.start, entry.file.staged_by);
        let load = self.loads.get_mut(&id).expect(LOAD);
        // Once a refusal has been reported, registration is not tried again for this load. It is
        // not tried at all for buffered reads, nor if `staged_by` is a route without registered
        // buffers. But if there is no ring, `register` is called even for such a route, so that
        // the load reports why the ring could not be set up.
        if load.staging_reported
            || !entry.file.route.is_direct()
            || wanted > Route::UringFixedDirect && self.kernel.ring().is_ok()
        {
            return true;
        }
        let Some(step) = self.staging.register(slot, &mut self.kernel, &mut self.buffer_slots) else { return true };
        if wanted >= step.to {
            return true;
        }
        load.staging_reported = true;
        let (attempt, errno) = (step.attempt, step.errno);
        if load.spec.strict {
            self.fail(id, Failure::Refused { file, offset, route: Route::Bounce, attempt, errno });
            return false;
        }
        let errno = errno::from_rustix(errno);
        let fallback = Fallback { file_index: None, from: Route::UringFixedDirect, to: step.to, attempt, errno };
        self.outputs.push(Output::Event { load: id, event: LoadEvent::SteppedDown { fallback } });
        true
    }

    /// Starts the copy of bytes from staging into their piece.
    pub(super) fn start_copy(&mut self, id: LoadId, chunk: Chunk, route: Route, slot: StagingSlot, bytes: usize) {
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let (staging, _) = self.staging.get(slot);
        let start = to_usize(chunk.range.start);
        assert!(start + bytes <= entry.buffer.bytes() && bytes <= staging.bytes(), "a copy must stay within both buffers");
        let to = entry.buffer.place(start);
        let from = staging.address();
        entry.in_flight += 1;
        self.in_flight.take(&id, entry.file.mount, 1);
        let since = self.kernel.now();
        let token = self.reads.insert(Operation::Chunk(InFlight { chunk, route, step: Step::Copied(slot), since }));
        // SAFETY: both ranges of `bytes` bytes are within their buffers (asserted above), which
        // belong to different mappings. As in `start_read`, the entry's `in_flight` count keeps
        // the piece's buffer alive until the completion, and the slot stays taken, so nothing else
        // reads into it. No other chunk covers the target.
        unsafe { self.kernel.copy(StagedCopy { token, from, to, bytes }) };
        self.report_missing_thread(id);
        let load = self.loads.get_mut(&id).expect(LOAD);
        load.in_flight += 1;
        load.copying.begin(self.kernel.now());
        self.pace.begin(self.kernel.now());
    }

    /// Reports, once, that no thread could be started for copies.
    pub(super) fn report_missing_thread(&mut self, id: LoadId) {
        if let Some(load) = self.loads.get_mut(&id).filter(|load| !load.no_thread_reported)
            && self.kernel.lacks_threads()
        {
            load.no_thread_reported = true;
            self.outputs.push(Output::Event { load: id, event: LoadEvent::NoThread });
        }
    }
}
