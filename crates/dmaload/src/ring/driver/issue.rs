//! Issues chunks to the kernel: as reads into the piece or into staging, or as copies from the
//! page cache.

use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use super::entry::{Chunk, InFlight, Operation, Step, read_bytes};
use super::{Driver, LOAD, PIECE};
use crate::memory::buffer::{PieceMemory, Place};
use crate::memory::window::may_have_one;
use crate::ring::kernel::{Kernel, Read};
use crate::ring::message::{LoadEvent, Output, TimedSpan};
use crate::route::{Attempt, Route};
use crate::support::convert::to_usize;
use crate::support::errno;
use crate::support::id::LoadId;
use crate::telemetry::trace::TraceKind;

/// The destination of a read.
pub(super) struct Destination {
    pub(super) buffer_slot: Option<u16>,
    pub(super) address: NonNull<u8>,
    pub(super) bytes: usize,
    pub(super) place: Option<Place>,
}

impl<K: Kernel, B: PieceMemory> Driver<K, B> {
    /// Issues a chunk or, if it has to wait for a buffer slot, another chunk in its place. Returns
    /// `false` if nothing was issued because the chunk has to wait for a buffer slot or for
    /// staging.
    pub(super) fn issue_chunk(&mut self, id: LoadId, chunk: Chunk) -> bool {
        if chunk.cached {
            self.issue_cached(id, chunk);
            return true;
        }
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let load = self.loads.get(&id).expect(LOAD);
        let staged = load.spec.observation.as_ref().is_some_and(|observed| observed.staged);
        match entry.file.route {
            Route::Bounce => self.issue_staged(id, chunk),
            // If a load is observed in staging, its buffered reads go into staging as well.
            Route::UringBuffered | Route::Buffered if staged => self.issue_staged(id, chunk),
            // A ring can't populate memory.
            Route::UringBuffered if !entry.buffer.is_populated() => self.issue_staged(id, chunk),
            Route::UringFixedDirect if entry.buffer_slot.is_none() => {
                let (all, free) = (self.kernel.buffer_slots(), self.buffer_slots.len());
                let file_system = entry.file.mount;
                let held = self.registered.held_by(&id, file_system);
                let may = may_have_one(all.into(), (usize::from(all) - free) as u64, held);
                let Some(slot) = self.buffer_slots.pop_if(|_| may) else {
                    return self.issue_registered_instead(id, chunk);
                };
                let start = self.kernel.now();
                match self.kernel.register_buffer(slot, entry.buffer.address(), entry.buffer.bytes()) {
                    Ok(()) => {
                        entry.buffer_slot = Some(slot);
                        self.registered.take(&id, file_system, 1);
                        if load.spec.trace {
                            let (bytes, end) = (entry.buffer.bytes() as u64, self.kernel.now());
                            let span = TimedSpan { kind: TraceKind::Register, start, end, bytes };
                            self.outputs.push(Output::Event { load: id, event: LoadEvent::Traced { piece: entry.number, span } });
                        }
                        self.issue_read(id, chunk);
                    }
                    Err(errno) => {
                        self.buffer_slots.push(slot);
                        let (token, offset) = (chunk.piece, entry.piece.file_offset + chunk.range.start);
                        self.requeue(id, chunk);
                        let from = Route::UringFixedDirect;
                        let to = from.lower(errno::from_rustix(errno)).unwrap_or(Route::UringDirect);
                        self.step_down(token, from, to, Attempt::RegisterBuffer, errno, offset);
                    }
                }
                true
            }
            _ => {
                self.issue_read(id, chunk);
                true
            }
        }
    }

    /// Issues another chunk in place of one for which no buffer slot is free: a chunk of a piece
    /// that already holds a slot. Returns `false` if none can be issued.
    ///
    /// Such a piece may come later in the file than the waiting chunk, for example if that chunk
    /// was evicted from the page cache. The piece keeps its slot until its last chunk is read, but
    /// its chunks are queued behind the chunk that waits for the slot. If chunks were issued
    /// strictly in queue order, neither would ever be read.
    ///
    /// A chunk that must be read alone is issued only if the load has nothing in flight.
    pub(super) fn issue_registered_instead(&mut self, id: LoadId, chunk: Chunk) -> bool {
        let load = self.loads.get_mut(&id).expect(LOAD);
        let mut has_slot = |other: &Chunk| self.pieces.get_mut(other.piece).expect(PIECE).buffer_slot.is_some();
        let other = match load.chunks.iter().position(&mut has_slot) {
            Some(at) => load.chunks.remove(at),
            None if load.in_flight == 0 => load.alone.iter().position(&mut has_slot).and_then(|at| load.alone.remove(at)),
            None => None,
        };
        if let Some(other) = &other {
            load.alone_in_flight = other.alone;
        }
        self.requeue(id, chunk);
        other.is_some_and(|other| self.issue_chunk(id, other))
    }

    /// Issues a read into the piece's own memory.
    pub(super) fn issue_read(&mut self, id: LoadId, chunk: Chunk) {
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let route = entry.file.route;
        let bytes = read_bytes(&chunk, &entry.file);
        let start = to_usize(chunk.range.start);
        assert!(start + bytes <= entry.buffer.bytes(), "a read must stay within its piece");
        // SAFETY: `start` is within the buffer, by the assertion above.
        let address = unsafe { entry.buffer.address().add(start) };
        let buffer_slot = entry.buffer_slot.filter(|_| route == Route::UringFixedDirect);
        let place = (!entry.buffer.is_populated()).then(|| entry.buffer.place(start));
        assert!(
            place.is_none() || entry.file.fills_unpopulated() && !route.uses_ring(),
            "a device must write only to populated memory"
        );
        let in_flight = InFlight { chunk, route, step: Step::Read, since: self.kernel.now() };
        self.start_read(id, in_flight, route, Destination { buffer_slot, address, bytes, place });
    }

    /// Starts a read through the route `by`. For a direct read into staging, `by` is the route
    /// into the staging slot, and the file's route is `bounce`.
    pub(super) fn start_read(&mut self, id: LoadId, in_flight: InFlight, by: Route, to: Destination) {
        let Destination { buffer_slot, address, bytes, place } = to;
        let entry = self.pieces.get_mut(in_flight.chunk.piece).expect(PIECE);
        entry.route = entry.route.max(Some(in_flight.route));
        entry.in_flight += 1;
        self.in_flight.take(&id, entry.file.mount, 1);
        let offset = entry.piece.file_offset + in_flight.chunk.range.start;
        self.counters.before_kernel.add(in_flight.since.saturating_sub(entry.since));
        self.counters.in_flight.fetch_add(1, Ordering::Relaxed);
        let token = self.reads.insert(Operation::Chunk(in_flight));
        let read = Read { token, load: id, route: by, buffer_slot, address, bytes, offset, place };
        // SAFETY: the address is in the piece's buffer or in a staging slot, and no other
        // operation uses this part of the buffer, or the slot. The piece's entry owns the buffer
        // and is removed only when its `in_flight` is 0; the slot stays taken until `complete`
        // gets this read's completion. `give_up` leaks buffer and slot instead.
        unsafe { self.kernel.read(&entry.file.handle, read) };
        let load = self.loads.get_mut(&id).expect(LOAD);
        load.in_flight += 1;
        load.reading.begin(self.kernel.now());
    }
}
