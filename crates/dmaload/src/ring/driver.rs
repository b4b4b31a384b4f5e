//! The state machine that owns all operations in flight.
//!
//! ```text
//!   piece ─► queue of its load ─► chunks, round-robin over loads, at most `depth` ─► kernel
//!                                     ▲                  (bounce: staging ─► copy)   │
//!                                     └─ the rest of a short read; the same read ────┤ completion
//!                                        by another route after a refusal            ▼
//!                          last chunk: zero the tail, unregister ─► (observer) ─► PieceFull
//! ```
//!
//! Observers see the bytes of a load in file order. They see each piece once it is full or, if the
//! load's memory is uncached, each chunk while it is in staging. A piece keeps its permit, and a
//! chunk its staging slot, until it has been observed.
//!
//! A load whose bytes are observed in staging can't deadlock. Its reads, including retries, are
//! issued in file order. Whenever the load takes a slot, its first unobserved chunk therefore
//! either has a slot already or gets this one, and that chunk doesn't wait for any other chunk.
//!
//! Copiers copy cached chunks from the page cache. A cached chunk takes its turn in the queue like
//! any other. If it has been evicted by the time it is copied, it is read from storage instead.
//!
//! [`Driver::enqueue_piece`] moves a piece's buffer into the driver. The buffer leaves it with
//! [`Output::PieceFull`], or the driver drops it. Either happens only when no operation on the
//! buffer is in flight. After a load has failed or been abandoned, each of its buffers is dropped
//! once the last operation on that buffer has completed. If the kernel itself fails, or a shutdown
//! passes its deadline, buffers with operations in flight are leaked.
//!
//! The driver itself makes no system calls and reads no clock. It interacts with the outside world
//! only through [`Kernel`].
#![allow(unsafe_code)]

mod cached;
mod entry;
mod issue;
mod observe;
mod retry;
mod staged;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use entry::{Chunk, InFlight, LoadEntry, Operation, PieceEntry, Step, Unobserved, split_into_chunks};

use super::kernel::{Completion, Kernel};
use super::known::Known;
use super::message::{Failure, FileSpec, LoadEvent, LoadSpec, Output, TimedSpan};
use super::order::InOrder;
use super::slots::{Slots, Token};
use super::staging::{Staging, StagingBudget};
use crate::memory::buffer::{Fault, PieceMemory};
use crate::memory::window::Holders;
use crate::plan::Piece;
use crate::ring::pace::{FIRST, Pace, more_staging_slots};
use crate::route::{Attempt, Route};
use crate::support::convert::to_usize;
use crate::support::id::LoadId;
use crate::telemetry::busy::BusyTime;
use crate::telemetry::metrics::ReadCounters;
use crate::telemetry::trace::TraceKind;

// If an entry is missing, an invariant is broken, and the driver panics with one of these
// messages. The engine then fails all loads with that message. Continuing would lose a read, and
// the read's load would hang.
const PIECE: &str = "a piece must exist while it has chunks queued or in flight, or is being observed";
const LOAD: &str = "a load must exist while it has pieces";

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Driver<K: Kernel, B: PieceMemory> {
    kernel: K,
    depth: usize,
    loads: HashMap<LoadId, LoadEntry>,
    turns: VecDeque<LoadId>,
    pieces: Slots<PieceEntry<K::File, B>>,
    /// Operations in flight.
    reads: Slots<Operation>,
    /// How many of `reads` are requests to populate memory. These requests count neither towards
    /// the queue depth nor towards the operations in flight of their load.
    populating: usize,
    /// Operations in flight, counted for each load and each file system.
    in_flight: Holders<LoadId>,
    /// Free entries in the kernel's table of registered buffers.
    buffer_slots: Vec<u16>,
    /// Registered pieces, counted for each load and each file system.
    registered: Holders<LoadId>,
    staging: Staging<K::Staging>,
    /// Decides how many copiers may run.
    pace: Pace,
    /// The initial number of staging slots, if staging grows with the number of copiers.
    growing_from: Option<usize>,
    known: Known,
    completions: Vec<Completion>,
    outputs: Vec<Output<B>>,
    /// The files of pieces that have been output or dropped. [`Driver::take_released`] takes them.
    released: Vec<(LoadId, K::File)>,
    counters: Arc<ReadCounters>,
}

impl<K: Kernel, B: PieceMemory> Driver<K, B> {
    pub(crate) fn new(kernel: K, depth: usize, staging: StagingBudget) -> Self {
        let buffer_slots = (0..kernel.buffer_slots()).rev().collect();
        Driver {
            kernel,
            depth,
            loads: HashMap::new(),
            turns: VecDeque::new(),
            pieces: Slots::new(),
            reads: Slots::new(),
            populating: 0,
            in_flight: Holders::new(),
            buffer_slots,
            registered: Holders::new(),
            staging: Staging::new(staging),
            pace: Pace::fixed(FIRST),
            growing_from: None,
            known: Known::default(),
            completions: Vec::new(),
            outputs: Vec::new(),
            released: Vec::new(),
            counters: Arc::default(),
        }
    }

    /// Counts reads in `counters`.
    pub(crate) fn with_counters(mut self, counters: Arc<ReadCounters>) -> Self {
        self.counters = counters;
        self
    }

    /// Lets `pace` decide the number of copiers. If `growing` is set, the number of staging slots
    /// grows with the number of copiers.
    pub(crate) fn with_pace(mut self, pace: Pace, growing: bool) -> Self {
        self.kernel.set_copiers(pace.threads());
        self.growing_from = growing.then(|| self.staging.slots());
        self.pace = pace;
        self
    }

    #[cfg(test)]
    pub(crate) fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }

    #[cfg(test)]
    pub(crate) fn in_flight(&self) -> usize {
        self.reads.len()
    }

    #[cfg(test)]
    pub(crate) fn staging_taken(&self) -> usize {
        self.staging.taken()
    }

    /// Takes the outputs produced since the last call.
    pub(crate) fn take_outputs(&mut self) -> Vec<Output<B>> {
        std::mem::take(&mut self.outputs)
    }

    /// Takes the files of pieces that have been output or dropped. These may be the last
    /// references to the files, and closing a file may wait for its server, so the caller must
    /// have another thread drop them.
    pub(crate) fn take_released(&mut self) -> Vec<(LoadId, K::File)> {
        std::mem::take(&mut self.released)
    }

    /// Begins a load. Its pieces are added later with [`Self::enqueue_piece`].
    pub(crate) fn begin(&mut self, spec: LoadSpec) {
        let entry = LoadEntry {
            pieces_left: spec.pieces,
            spec,
            chunks: VecDeque::new(),
            alone: VecDeque::new(),
            alone_in_flight: false,
            in_flight: 0,
            pieces: Vec::new(),
            reading: BusyTime::default(),
            copying: BusyTime::default(),
            from_cache: BusyTime::default(),
            cached_bytes: 0,
            staging_reported: false,
            less_staging_reported: false,
            no_thread_reported: false,
            floor: Route::UringFixedDirect,
            stepped: HashMap::new(),
            ended: false,
            unobserved: InOrder::new(),
            next_piece: 0,
            next_position: 0,
            early: BTreeMap::new(),
        };
        let id = entry.spec.id;
        self.loads.insert(id, entry);
        self.turns.push_back(id);
    }

    /// Enqueues an allocated piece to be filled. If its load has failed or been abandoned, the
    /// piece is dropped immediately.
    pub(crate) fn enqueue_piece(&mut self, id: LoadId, number: usize, piece: Piece, mut file: FileSpec<K::File>, buffer: B) {
        assert_eq!(buffer.bytes() as u64, piece.memory_bytes, "a buffer must have the size planned for its piece");
        let Some(load) = self.loads.get_mut(&id).filter(|load| !load.ended) else { return self.released.push((id, file.handle)) };
        let stepped = load.stepped.get(&file.index).copied().unwrap_or(load.floor);
        file.route = file.route.max(load.floor).max(stepped);
        assert!(buffer.is_populated() || file.fills_unpopulated(), "a device must write only to populated memory");
        let refused = if file.route.uses_ring() { self.kernel.ring().err() } else { None };
        self.kernel.attach(&file.handle);
        let chunk_bytes = load.spec.chunk_bytes;
        let route = file.route;
        let (strict, mount) = (load.spec.strict, file.mount);
        let token = self.pieces.insert(PieceEntry {
            load: id,
            number,
            piece,
            file,
            buffer,
            buffer_slot: None,
            chunks_left: 0,
            in_flight: 0,
            route: None,
            position: 0,
            since: self.kernel.now(),
        });
        load.pieces.push(token);
        if load.is_observed() {
            load.early.insert(number, (token, piece.bytes));
            while let Some((token, bytes)) = load.early.remove(&load.next_piece) {
                let position = load.next_position;
                load.next_piece += 1;
                load.next_position += bytes;
                let entry = self.pieces.get_mut(token).expect(PIECE);
                entry.position = position;
                load.chunks.extend(split_into_chunks(token, entry, chunk_bytes));
            }
        } else {
            let entry = self.pieces.get_mut(token).expect(PIECE);
            let chunks = split_into_chunks(token, entry, chunk_bytes);
            // Pieces may be enqueued out of order: several threads prepare batches, and a batch
            // whose memory has to be populated takes longer to prepare than the batches after it
            // that are read into staging.
            let mut is_later = |chunk: &Chunk| self.pieces.get_mut(chunk.piece).expect(PIECE).number > number;
            let later = load.chunks.iter().rev().take_while(|chunk| is_later(chunk)).count();
            let later = load.chunks.split_off(load.chunks.len() - later);
            load.chunks.extend(chunks);
            load.chunks.extend(later);
        }
        if let Some(errno) = refused {
            // Without a ring, all routes that use it are refused, so a single step leads to the
            // equivalent route on threads.
            self.step_down(token, route, route.without_ring(), Attempt::SetUpRing, errno, piece.file_offset);
            // If the load is strict, it has just failed, and may have been removed already.
            if let Some(load) = self.loads.get_mut(&id) {
                load.staging_reported = true;
            }
        }
        // A strict load ignores known refusals, so it fails only if one of its own reads or
        // registrations is refused.
        let known = if strict { None } else { self.known.refusal(mount, route, self.kernel.now()) };
        if let Some((to, attempt, errno)) = known {
            self.step_down(token, route, to, attempt, errno, piece.file_offset);
        }
    }

    /// Abandons a load, so no further reads are submitted for it. Pieces without operations in
    /// flight are released immediately. Each of the other pieces is released when its last
    /// operation has completed.
    pub(crate) fn abandon(&mut self, id: LoadId) {
        if let Some(load) = self.loads.get_mut(&id) {
            if !std::mem::replace(&mut load.ended, true) {
                self.kernel.cancel(id);
            }
            load.chunks.clear();
            load.alone.clear();
            for unobserved in load.unobserved.drain() {
                if let Unobserved::Staged { slot, .. } = unobserved {
                    self.staging.give_back(slot);
                }
            }
            self.release_idle(id);
        }
    }

    /// Issues queued chunks up to the queue depth. Loads take turns, and part of the depth is left
    /// for file systems and loads that have nothing in flight.
    pub(crate) fn issue(&mut self) {
        let mut passed = 0;
        while self.reads.len() - self.populating < self.depth && passed < self.turns.len() {
            let id = self.turns.pop_front().expect("`turns` should contain more loads than were passed over");
            self.turns.push_back(id);
            let load = self.loads.get_mut(&id).expect("every load in `turns` should exist");
            let may_read = load.next_piece().is_some_and(|piece| {
                let file_system = self.pieces.get_mut(piece).expect(PIECE).file.mount;
                self.in_flight.may_have_one(self.depth as u64, &id, file_system)
            });
            let chunk = if may_read { load.next_chunk() } else { None };
            match chunk {
                Some(chunk) => {
                    passed = if self.issue_chunk(id, chunk) { 0 } else { passed + 1 };
                }
                None => passed += 1,
            }
        }
    }

    /// How many of the [`Kernel`]'s own threads are busy.
    pub(crate) fn busy_threads(&self) -> usize {
        self.kernel.busy_threads()
    }

    /// Submits queued reads to the kernel and handles completions. With `wait`, blocks after the
    /// submission until a completion is available or the thread is woken.
    ///
    /// # Errors
    /// Returns the kernel's error if the kernel can no longer be used. The caller must then call
    /// [`Self::give_up`].
    pub(crate) fn turn(&mut self, wait: bool) -> Result<(), Errno> {
        self.kernel.submit(wait)?;
        let mut completions = std::mem::take(&mut self.completions);
        self.kernel.reap(&mut completions);
        for completion in completions.drain(..) {
            self.complete(completion);
        }
        self.completions = completions;
        Ok(())
    }

    /// Fails every load with `failure`, and leaks memory with operations in flight. Called when
    /// the kernel has failed, at the deadline of a shutdown, and after a panic. Returns how many
    /// bytes were leaked.
    pub(crate) fn give_up(&mut self, failure: Failure) -> u64 {
        self.counters.in_flight.store(0, Ordering::Relaxed);
        let mut leaked = 0;
        for token in self.reads.tokens() {
            self.reads.remove(token);
        }
        self.populating = 0;
        self.in_flight = Holders::new();
        for token in self.pieces.tokens() {
            let mut entry = self.pieces.remove(token).expect(PIECE);
            if entry.in_flight == 0 {
                // If the kernel has failed, `replace_kernel` leaks it, so its ring is never
                // closed. Without the next two lines, that ring would keep the buffer's pages
                // pinned and the file open.
                self.unregister(&mut entry);
                self.kernel.detach(&entry.file.handle);
                self.released.push((entry.load, entry.file.handle));
            } else {
                leaked += entry.buffer.bytes() as u64;
                // The file must stay open as long as the kernel may read from it.
                std::mem::forget(entry.file.handle);
                entry.buffer.leak();
            }
        }
        leaked += self.staging.clear(&mut self.kernel, &mut self.buffer_slots);
        // Buffers that were leaked stay registered, but their ring is no longer used.
        self.registered = Holders::new();
        self.pace.stop();
        let now = self.kernel.now();
        self.turns.clear();
        for (id, mut load) in std::mem::take(&mut self.loads) {
            load.reading.stop(now);
            load.copying.stop(now);
            load.from_cache.stop(now);
            if !load.ended {
                self.outputs.push(Output::Event { load: id, event: LoadEvent::Failed { failure } });
            }
            let times = load.times();
            self.outputs.push(Output::Event { load: id, event: LoadEvent::Gone { times, observation: load.spec.observation } });
        }
        self.counters.leaked_bytes.fetch_add(leaked, Ordering::Relaxed);
        leaked
    }

    /// Replaces a kernel that has failed. Must be called after [`Self::give_up`]. The old kernel
    /// is leaked rather than closed: closing a ring doesn't stop its reads, so the memory that
    /// they write to could not be freed anyway.
    pub(crate) fn replace_kernel(&mut self, kernel: K) {
        assert_eq!(self.reads.len() + self.pieces.len(), 0, "`give_up` must be called first, which removes all reads and pieces");
        self.buffer_slots = (0..kernel.buffer_slots()).rev().collect();
        std::mem::forget(std::mem::replace(&mut self.kernel, kernel));
        self.kernel.set_copiers(self.pace.threads());
    }

    fn complete(&mut self, completion: Completion) {
        let InFlight { chunk, route, step, since } = match self.reads.remove(completion.token) {
            Some(Operation::Chunk(in_flight)) => in_flight,
            Some(Operation::Populate { piece, bytes }) => return self.complete_populating(piece, bytes, completion.result),
            None => panic!("a completion for an operation that is not in flight: {completion:?}"),
        };
        let entry = self.pieces.get_mut(chunk.piece).expect(PIECE);
        entry.in_flight -= 1;
        let (id, piece) = (entry.load, entry.number);
        self.in_flight.give_back(&id, entry.file.mount, 1);
        let now = self.kernel.now();
        let load = self.loads.get_mut(&id).expect(LOAD);
        load.in_flight -= 1;
        if let Step::Read | Step::Staged(_) = step {
            self.counters.in_flight.fetch_sub(1, Ordering::Relaxed);
            self.counters.in_kernel.add(now.saturating_sub(since));
        }
        let is_copy = matches!(step, Step::Copied(_) | Step::Cached);
        match step {
            Step::Read | Step::Staged(_) => load.reading.end(now),
            Step::Copied(_) => load.copying.end(now),
            Step::Cached => load.from_cache.end(now),
            Step::ObservedStaged(_) | Step::Observed => load.unobserved.finish(),
        }
        let ended = load.ended;
        if load.spec.trace {
            let kind = match step {
                Step::Read | Step::Staged(_) => TraceKind::Read,
                Step::Copied(_) => TraceKind::Copy,
                Step::Cached => TraceKind::FromCache,
                Step::ObservedStaged(_) | Step::Observed => TraceKind::Observe,
            };
            let bytes = (completion.result.unwrap_or(0) as u64).min(chunk.range.end - chunk.range.start);
            self.outputs.push(Output::Event {
                load: id,
                event: LoadEvent::Traced { piece, span: TimedSpan { kind, start: since, end: now, bytes } },
            });
        }
        if is_copy && self.pace.end(now, completion.result.unwrap_or(0) as u64) {
            self.apply_pace();
        }
        match step {
            Step::Read | Step::Cached => {}
            Step::Staged(slot) => {
                self.staging.finish_read(slot);
                let came = completion.result.unwrap_or(0);
                if came > 0 && !ended {
                    let wanted = to_usize(chunk.range.end - chunk.range.start);
                    self.start_copy(id, chunk, route, slot, came.min(wanted));
                    return;
                }
                self.staging.give_back(slot);
            }
            Step::Copied(slot) => {
                if let (Ok(bytes), false) = (completion.result, ended)
                    && self.loads.get(&id).is_some_and(|load| load.spec.observation.as_ref().is_some_and(|seen| seen.staged))
                {
                    self.queue_observation(id, chunk, route, slot, bytes);
                    return;
                }
                self.staging.give_back(slot);
            }
            Step::ObservedStaged(slot) => self.staging.give_back(slot),
            Step::Observed => {}
        }
        if ended {
            self.release_idle(id);
            return;
        }
        if matches!(step, Step::ObservedStaged(_) | Step::Observed) {
            self.complete_observation(id, chunk, route, step, completion.result);
            return;
        }
        if matches!(step, Step::Cached) {
            self.complete_cached(id, chunk, route, completion.result);
            return;
        }
        match completion.result {
            Ok(bytes) => self.advance(chunk, route, bytes as u64),
            Err(Fault::Read(Errno::INTR | Errno::AGAIN)) => self.retry_interrupted(chunk, route),
            Err(Fault::Read(errno)) => self.handle_read_error(chunk, route, errno),
            Err(Fault::Memory(errno)) => {
                let bytes = chunk.range.end - chunk.range.start;
                self.fail(id, Failure::Memory { bytes, errno });
            }
        }
    }

    /// Finishes a piece after its last byte has been read: zeroes the tail and unregisters the
    /// buffer. Then outputs the piece or, if it has to be observed, queues its observation.
    fn finish_piece(&mut self, token: Token) {
        let entry = self.pieces.get_mut(token).expect(PIECE);
        assert_eq!(entry.in_flight, 0, "a full piece must not have operations in flight");
        let tail = to_usize(entry.piece.bytes)..entry.buffer.bytes();
        // SAFETY: `tail.start` is at most the length of the buffer. In a plan, a piece's `bytes`
        // are at most its `memory_bytes`, and `enqueue_piece` asserts that the buffer has that
        // length.
        let after = unsafe { entry.buffer.address().add(tail.start) };
        // SAFETY: the buffer is valid for writes from `after` to its end, and no operation on it
        // is in flight.
        unsafe { after.write_bytes(0, tail.len()) };
        let (id, position, bytes) = (entry.load, entry.position, entry.piece.bytes);
        let registered = entry.buffer_slot.take();
        if let Some(route) = entry.route {
            self.known.worked(entry.file.mount, route);
        }
        let load = self.loads.get_mut(&id).expect(LOAD);
        if let Some(slot) = registered {
            self.kernel.unregister_buffer(slot);
            self.buffer_slots.push(slot);
            self.registered.give_back(&id, entry.file.mount, 1);
        }
        if load.spec.observation.as_ref().is_some_and(|observation| !observation.staged) {
            load.unobserved.insert(position, bytes, Unobserved::Piece(token));
            self.observe_next(id);
        } else {
            self.output_piece(token);
        }
    }

    /// Outputs a full piece. If the load has an observer, the piece must have been observed
    /// already.
    fn output_piece(&mut self, token: Token) {
        let entry = self.pieces.remove(token).expect(PIECE);
        self.kernel.detach(&entry.file.handle);
        let id = entry.load;
        // The piece's handle may be the last reference to the file, because the load may have just
        // failed and released its own handle.
        self.released.push((id, entry.file.handle));
        self.outputs.push(Output::PieceFull { load: id, piece: entry.number, route: entry.route, buffer: entry.buffer });
        let load = self.loads.get_mut(&id).expect(LOAD);
        load.pieces.retain(|&other| other != token);
        load.pieces_left -= 1;
        if load.pieces_left == 0 {
            self.remove(id);
        }
    }

    fn fail(&mut self, id: LoadId, failure: Failure) {
        let load = self.loads.get_mut(&id).expect(LOAD);
        if !load.ended {
            self.outputs.push(Output::Event { load: id, event: LoadEvent::Failed { failure } });
            self.abandon(id);
        }
    }

    /// Drops the pieces of an ended load that have no operations in flight, and removes the load
    /// when no piece is left.
    fn release_idle(&mut self, id: LoadId) {
        let tokens = std::mem::take(&mut self.loads.get_mut(&id).expect(LOAD).pieces);
        let mut busy = Vec::new();
        for token in tokens {
            if self.pieces.get_mut(token).expect(PIECE).in_flight > 0 {
                busy.push(token);
            } else {
                let mut entry = self.pieces.remove(token).expect(PIECE);
                self.unregister(&mut entry);
                self.kernel.detach(&entry.file.handle);
                self.released.push((id, entry.file.handle));
            }
        }
        if busy.is_empty() {
            self.remove(id);
        } else {
            self.loads.get_mut(&id).expect(LOAD).pieces = busy;
        }
    }

    /// Tells the kernel how many copiers the pace allows. If staging grows with the number of
    /// copiers, adjusts the number of slots, too.
    fn apply_pace(&mut self) {
        let copiers = self.pace.threads();
        self.kernel.set_copiers(copiers);
        if let Some(slots) = self.growing_from {
            self.staging.set_slots(slots + more_staging_slots(copiers));
        }
    }

    fn unregister(&mut self, entry: &mut PieceEntry<K::File, B>) {
        if let Some(slot) = entry.buffer_slot.take() {
            self.kernel.unregister_buffer(slot);
            self.buffer_slots.push(slot);
            self.registered.give_back(&entry.load, entry.file.mount, 1);
        }
    }

    fn remove(&mut self, id: LoadId) {
        let load = self.loads.remove(&id).expect(LOAD);
        if self.loads.is_empty() {
            self.pace.pause();
        }
        self.turns.retain(|&other| other != id);
        let times = load.times();
        self.outputs.push(Output::Event { load: id, event: LoadEvent::Gone { times, observation: load.spec.observation } });
    }
}

impl<K: Kernel, B: PieceMemory> Drop for Driver<K, B> {
    /// Leaks memory with operations in flight. Operations are in flight here only after a panic.
    fn drop(&mut self) {
        if !self.reads.is_empty() {
            self.give_up(Failure::Kernel { errno: Errno::CANCELED });
        }
        self.staging.clear(&mut self.kernel, &mut self.buffer_slots);
    }
}
