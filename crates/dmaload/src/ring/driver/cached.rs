//! Handles chunks that were in the page cache when their piece was prepared.

use super::super::kernel::{CachedRead, Kernel};
use super::super::message::Failure;
use super::entry::{Chunk, InFlight, Operation, Step, progress};
use super::{Driver, LOAD, PIECE};
use crate::memory::buffer::{Fault, PieceMemory};
use crate::route::Route;
use crate::support::convert::to_usize;
use crate::support::id::LoadId;

impl<K: Kernel, B: PieceMemory> Driver<K, B> {
    /// Starts copying a chunk from the page cache into its piece.
    pub(super) fn issue_cached(&mut self, id: LoadId, chunk: Chunk) {
        let load = self.loads.get_mut(&id).expect(LOAD);
        let staged = load.spec.observation.as_ref().is_some_and(|observation| observation.staged);
        assert!(!staged, "a load that is observed in staging must read everything into staging");
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let (start, bytes) = (to_usize(chunk.range.start), to_usize(chunk.range.end - chunk.range.start));
        assert!(start + bytes <= entry.buffer.bytes(), "a copy must stay within its piece");
        entry.in_flight += 1;
        load.in_flight += 1;
        self.in_flight.take(&id, entry.file.mount, 1);
        let (to, offset, route) = (entry.buffer.place(start), entry.piece.file_offset + chunk.range.start, entry.file.route);
        let since = self.kernel.now();
        load.from_cache.begin(since);
        self.pace.begin(since);
        let token = self.reads.insert(Operation::Chunk(InFlight { chunk, route, step: Step::Cached, since }));
        // SAFETY: the place is in the piece's buffer, by the assertion above. As in `start_read`,
        // the entry's `in_flight` count keeps the buffer alive until the completion, and no other
        // chunk covers the place.
        unsafe { self.kernel.read_cached(&entry.file.handle, CachedRead { token, to, bytes, offset }) };
    }

    /// Completes a copy from the page cache. Bytes that were evicted in the meantime are read from
    /// storage, starting at a block boundary, as direct reads require.
    pub(super) fn complete_cached(&mut self, id: LoadId, chunk: Chunk, route: Route, result: Result<usize, Fault>) {
        let wanted = chunk.range.end - chunk.range.start;
        let came = match result {
            Ok(bytes) => bytes as u64,
            Err(Fault::Read(_)) => 0,
            Err(Fault::Memory(errno)) => return self.fail(id, Failure::Memory { bytes: wanted, errno }),
        };
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        let counted = progress(&chunk, came, Route::PreadDirect, entry.file.alignment_bytes);
        self.loads.get_mut(&id).expect(LOAD).cached_bytes += counted;
        if counted == wanted {
            self.advance(chunk, route, counted);
        } else {
            self.requeue(id, chunk.rest(counted));
        }
    }
}
