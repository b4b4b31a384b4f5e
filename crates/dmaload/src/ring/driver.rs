//! The state machine that owns everything in flight.
//!
//! ```text
//!   piece ──► queue of its load ──► chunks, in turn over the loads, at most `depth` in flight ──► kernel
//!                                      ▲                              (bounce: staging ──► copy)  │
//!                                      └─ the rest of a short read; the same read by a lower ─────┤ completion
//!                                         route after a refusal                                   ▼
//!                                                       last chunk: zero the tail, unregister ──► PieceFull
//! ```
//!
//! Memory: a piece's buffer is moved in with [`Driver::piece`] and leaves with [`Output::PieceFull`], or is dropped
//! here, and in both cases only when no read into it is in flight. A load that failed or was abandoned keeps its
//! buffers here until its last read has come back. If the kernel itself fails, what is in flight is leaked.
//!
//! It makes no syscall and knows no clock of its own: [`Kernel`] is the only door.
#![allow(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::ptr::NonNull;
use std::time::Duration;

use rustix::io::Errno;

use super::kernel::{Buffer, Completion, Copy, Kernel, Read};
use super::slots::{Slots, Token};
use super::staging::{Staging, StagingBudget, StagingSlot};
use crate::busy::BusyTime;
use crate::plan::{Piece, split};
use crate::route::{Attempt, Fallback, Route, is_refusal};
use crate::trace::TraceKind;

/// Names a load. Never used twice by one loader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LoadId(pub(crate) u64);

/// A read that is interrupted (EINTR, EAGAIN) this often in a row is not asked for again.
const INTERRUPTIONS: u32 = 64;

/// A direct read that gives less than a block this often in a row has met the end of the file, or a file system
/// that can't do better.
const PARTS_OF_A_BLOCK: u32 = 16;

/// What the driver has to know of a load before its first piece.
#[derive(Debug, Clone)]
pub(crate) struct LoadSpec {
    pub(crate) id: LoadId,
    /// Number of pieces over all files.
    pub(crate) pieces: usize,
    pub(crate) chunk_bytes: u64,
    pub(crate) strict: bool,
    pub(crate) trace: bool,
}

/// A file of a load, as each of its pieces brings it along.
#[derive(Debug, Clone)]
pub(crate) struct FileSpec<F> {
    pub(crate) handle: F,
    pub(crate) index: usize,
    /// The best route that opening it allows.
    pub(crate) route: Route,
    /// The best route for reads into staging, where it comes to that.
    pub(crate) staged_by: Route,
    /// Names the file system that it is on.
    pub(crate) mount: u64,
    /// What direct reads must be aligned to, in the file and in memory.
    pub(crate) alignment_bytes: u64,
}

/// What happened, for the thread around the driver to act on.
#[derive(Debug)]
pub(crate) enum Output<B> {
    /// A piece holds its bytes.
    PieceFull { load: LoadId, piece: usize, route: Route, buffer: B },
    /// A step down the ladder was taken.
    SteppedDown { load: LoadId, fallback: Fallback },
    /// A read failed, and is tried once more.
    Retried { load: LoadId, retried: Retried },
    /// Something was done for a piece; only where the load wants to know.
    Traced { load: LoadId, piece: usize, span: Span },
    /// The load can't be finished. Told once; its memory goes when its last read has come back.
    Failed { load: LoadId, failure: Failure },
    /// No buffer of this load is here any more, and none will be.
    Gone { load: LoadId, times: Times },
}

/// A read that failed, and is tried once more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Retried {
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) errno: Errno,
}

/// Something that was done, by the kernel's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) kind: TraceKind,
    pub(crate) start: Duration,
    pub(crate) end: Duration,
    pub(crate) bytes: u64,
}

/// How long the parts of a load took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Times {
    /// While at least one read was in flight.
    pub(crate) reading: Duration,
    /// While at least one copy from staging was under way.
    pub(crate) copying: Duration,
}

/// Why a load failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// A read failed for good.
    Read { file: usize, offset: u64, bytes: u64, route: Route, errno: Errno },
    /// The file has no bytes at this offset, which is before its planned end.
    Ended { file: usize, offset: u64, route: Route },
    /// A route was refused, and the load is strict or there is no lower one.
    Refused { file: usize, offset: u64, route: Route, attempt: Attempt, errno: Errno },
    /// There is no memory to stage reads in.
    Staging { bytes: u64, errno: Errno },
    /// The ring broke down.
    Kernel { errno: Errno },
}

#[derive(Debug)]
struct PieceEntry<F, B> {
    load: LoadId,
    number: usize,
    piece: Piece,
    file: FileSpec<F>,
    buffer: B,
    buffer_slot: Option<u16>,
    /// Chunks that are not complete, in flight or not.
    chunks_left: usize,
    in_flight: usize,
    /// The lowest route that any of its bytes took.
    route: Route,
}

/// A read to be done: a range of a piece's memory.
#[derive(Debug, Clone)]
struct Chunk {
    piece: Token,
    range: Range<u64>,
    /// How often in a row it gave less than a block, or was interrupted.
    parts_of_a_block: u32,
    interruptions: u32,
    /// It failed, and is to be tried once more with no other read of its load in flight.
    alone: bool,
}

impl Chunk {
    fn new(piece: Token, range: Range<u64>) -> Self {
        Chunk { piece, range, parts_of_a_block: 0, interruptions: 0, alone: false }
    }
}

#[derive(Debug)]
struct InFlight {
    chunk: Chunk,
    route: Route,
    step: Step,
    since: Duration,
}

/// What is in flight.
#[derive(Debug, Clone, std::marker::Copy)]
enum Step {
    /// A read into the piece's memory.
    Read,
    /// A read into staging.
    Staged(StagingSlot),
    /// A copy from staging into the piece's memory.
    Copied(StagingSlot),
}

#[derive(Debug)]
struct LoadEntry {
    spec: LoadSpec,
    pieces_left: usize,
    chunks: VecDeque<Chunk>,
    /// Chunks that are read one at a time, before all others.
    alone: VecDeque<Chunk>,
    alone_in_flight: bool,
    in_flight: usize,
    pieces: Vec<Token>,
    reading: BusyTime,
    copying: BusyTime,
    /// Whether it knows why its reads into staging do not take the best way.
    staging_told: bool,
    /// The best route that is left to all files.
    floor: Route,
    /// The best route that is left to a file which has stepped down by itself.
    stepped: HashMap<usize, Route>,
    ended: bool,
}

impl LoadEntry {
    /// What is to be read next, if anything can be now.
    fn next_chunk(&mut self) -> Option<Chunk> {
        if self.in_flight > 0 && (self.alone_in_flight || !self.alone.is_empty()) {
            return None;
        }
        let alone = self.alone.pop_front();
        self.alone_in_flight = alone.is_some();
        alone.or_else(|| self.chunks.pop_front())
    }

    fn times(&self) -> Times {
        Times { reading: self.reading.total(), copying: self.copying.total() }
    }
}

/// What the first reads from a file system have shown.
#[derive(Debug)]
enum Mount {
    /// Direct reads work: a file that refuses them is one of its own kind.
    Direct,
    /// Reads by routes better than this one were refused; known until then.
    Refused { to: Route, errno: Errno, until: Duration },
}

/// How long a refusal is taken for granted. It costs little to try again, and the first file may have been an odd one.
const KNOWN_FOR: Duration = Duration::from_secs(60);

/// What was found out about the heap's memory.
#[derive(Debug)]
enum Pinnable {
    Unknown,
    /// Direct reads have gone into it: what is refused with EFAULT is not the memory's.
    Yes,
    No {
        attempt: Attempt,
        errno: Errno,
        until: Duration,
    },
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Driver<K: Kernel, B: Buffer> {
    kernel: K,
    depth: usize,
    loads: HashMap<LoadId, LoadEntry>,
    turns: VecDeque<LoadId>,
    pieces: Slots<PieceEntry<K::File, B>>,
    reads: Slots<InFlight>,
    buffer_slots: Vec<u16>,
    staging: Staging<K::Staging>,
    /// What has shown of the heap's memory, and of file systems: later loads need not try again.
    pinnable: Pinnable,
    mounts: HashMap<u64, Mount>,
    completions: Vec<Completion>,
    outputs: Vec<Output<B>>,
}

impl<K: Kernel, B: Buffer> Driver<K, B> {
    pub(crate) fn new(kernel: K, depth: usize, staging: StagingBudget) -> Self {
        let buffer_slots = (0..kernel.buffer_slots()).rev().collect();
        Driver {
            kernel,
            depth,
            loads: HashMap::new(),
            turns: VecDeque::new(),
            pieces: Slots::new(),
            reads: Slots::new(),
            buffer_slots,
            staging: Staging::new(staging),
            pinnable: Pinnable::Unknown,
            mounts: HashMap::new(),
            completions: Vec::new(),
            outputs: Vec::new(),
        }
    }

    #[cfg(test)]
    pub(crate) fn kernel(&mut self) -> &mut K {
        &mut self.kernel
    }

    /// Reads that the kernel has.
    #[cfg(test)]
    pub(crate) fn in_flight(&self) -> usize {
        self.reads.len()
    }

    /// Takes what has happened since the last call.
    pub(crate) fn outputs(&mut self) -> Vec<Output<B>> {
        std::mem::take(&mut self.outputs)
    }

    /// A load whose pieces are about to come.
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
            staging_told: false,
            floor: Route::UringFixedDirect,
            stepped: HashMap::new(),
            ended: false,
        };
        let id = entry.spec.id;
        self.loads.insert(id, entry);
        self.turns.push_back(id);
    }

    /// Takes a piece that is allocated and populated, to be filled. One of a load that has failed, or was
    /// abandoned, is dropped at once.
    pub(crate) fn piece(&mut self, id: LoadId, number: usize, piece: Piece, mut file: FileSpec<K::File>, buffer: B) {
        assert_eq!(buffer.bytes() as u64, piece.memory_bytes, "a piece comes with the memory that was planned for it");
        let Some(load) = self.loads.get_mut(&id).filter(|load| !load.ended) else { return };
        let stepped = load.stepped.get(&file.index).copied().unwrap_or(load.floor);
        file.route = file.route.max(load.floor).max(stepped);
        let refused = if file.route.uses_ring() { self.kernel.ring().err() } else { None };
        self.kernel.attach(&file.handle);
        let chunk_bytes = load.spec.chunk_bytes;
        // A direct read takes whole blocks; the planned memory has room for them.
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
            route,
        });
        load.pieces.push(token);
        let ranges = split(0..piece.bytes, chunk_bytes);
        let chunks: Vec<_> = ranges.map(|range| Chunk::new(token, range)).collect();
        if let Some(entry) = self.pieces.get_mut(token) {
            entry.chunks_left = chunks.len();
        }
        load.chunks.extend(chunks);
        if let Some(errno) = refused {
            // The ring was refused for all its routes at once: that is one step, to the first one without it.
            self.step_down(token, route, Route::PreadDirect, Attempt::SetUpRing, errno, piece.file_offset);
            if let Some(load) = self.loads.get_mut(&id) {
                load.staging_told = true;
            }
        }
        // A strict load finds out for itself, and fails for the real reason.
        let known = if strict { None } else { self.known_refusal(mount, route) };
        if let Some((to, attempt, errno)) = known {
            self.step_down(token, route, to, attempt, errno, piece.file_offset);
        }
    }

    /// Nobody wants this load any more: nothing new is submitted, and what it holds goes when its last read has
    /// come back.
    pub(crate) fn abandon(&mut self, id: LoadId) {
        if let Some(load) = self.loads.get_mut(&id) {
            load.ended = true;
            load.chunks.clear();
            load.alone.clear();
            self.release_idle(id);
        }
    }

    /// Issues reads while there are any and the depth allows.
    pub(crate) fn issue(&mut self) {
        let mut passed = 0;
        while self.reads.len() < self.depth && passed < self.turns.len() {
            let Some(id) = self.turns.pop_front() else { break };
            self.turns.push_back(id);
            let chunk = self.loads.get_mut(&id).and_then(LoadEntry::next_chunk);
            match chunk {
                Some(chunk) => {
                    passed = if self.issue_chunk(id, chunk) { 0 } else { passed + 1 };
                }
                None => passed += 1,
            }
        }
    }

    /// Hands reads to the kernel, optionally waits, and works off what came back.
    ///
    /// # Errors
    /// The kernel's, when it can't be used any more: [`Self::give_up`] is all that can be done then.
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

    /// The kernel failed, or time is up: every load here fails with `failure`, and memory that a read may still
    /// be writing to is leaked. Returns how many bytes that was.
    pub(crate) fn give_up(&mut self, failure: Failure) -> u64 {
        let mut leaked = 0;
        for token in self.reads.tokens() {
            self.reads.remove(token);
        }
        for token in self.pieces.tokens() {
            let Some(mut entry) = self.pieces.remove(token) else { continue };
            if entry.in_flight == 0 {
                // A ring that is never closed would keep its pages pinned.
                self.unregister(&mut entry);
            } else {
                leaked += entry.buffer.bytes() as u64;
                // The file must stay open as long as the kernel may read from it.
                std::mem::forget(entry.file.handle);
                entry.buffer.leak();
            }
        }
        leaked += self.staging.clear(&mut self.kernel, &mut self.buffer_slots);
        let now = self.kernel.now();
        self.turns.clear();
        for (id, mut load) in std::mem::take(&mut self.loads) {
            load.reading.stop(now);
            load.copying.stop(now);
            if !load.ended {
                self.outputs.push(Output::Failed { load: id, failure });
            }
            self.outputs.push(Output::Gone { load: id, times: load.times() });
        }
        leaked
    }

    /// Puts another kernel in the place of one that failed, after [`Self::give_up`]. The old one is leaked: the
    /// reads that it holds are not ended by closing it.
    pub(crate) fn replace_kernel(&mut self, kernel: K) {
        assert_eq!(self.reads.len() + self.pieces.len(), 0, "give_up comes first");
        self.buffer_slots = (0..kernel.buffer_slots()).rev().collect();
        std::mem::forget(std::mem::replace(&mut self.kernel, kernel));
    }

    /// Issues one read. `false` when it has to wait for a buffer slot, or for staging.
    fn issue_chunk(&mut self, id: LoadId, chunk: Chunk) -> bool {
        let Some(entry) = self.pieces.get_mut(chunk.piece) else { return true };
        match entry.file.route {
            Route::Bounce => self.issue_staged(id, chunk),
            Route::UringFixedDirect if entry.buffer_slot.is_none() => {
                let Some(slot) = self.buffer_slots.pop() else {
                    self.requeue(id, chunk);
                    return false;
                };
                let start = self.kernel.now();
                match self.kernel.register_buffer(slot, entry.buffer.address(), entry.buffer.bytes()) {
                    Ok(()) => {
                        entry.buffer_slot = Some(slot);
                        if self.loads.get(&id).is_some_and(|load| load.spec.trace) {
                            let (bytes, end) = (entry.buffer.bytes() as u64, self.kernel.now());
                            let span = Span { kind: TraceKind::Register, start, end, bytes };
                            self.outputs.push(Output::Traced { load: id, piece: entry.number, span });
                        }
                        self.issue_read(id, chunk);
                    }
                    Err(errno) => {
                        self.buffer_slots.push(slot);
                        let (token, offset) = (chunk.piece, entry.piece.file_offset + chunk.range.start);
                        self.requeue(id, chunk);
                        let from = Route::UringFixedDirect;
                        let to = from.lower(errno).unwrap_or(Route::UringDirect);
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

    /// Issues a read into the piece's own memory.
    fn issue_read(&mut self, id: LoadId, chunk: Chunk) {
        let Some(entry) = self.pieces.get_mut(chunk.piece) else { return };
        let route = entry.file.route;
        let bytes = read_bytes(&chunk, &entry.file);
        let start = to_usize(chunk.range.start);
        assert!(start + bytes <= entry.buffer.bytes(), "a read stays within its piece");
        // SAFETY: `start` is within the buffer, by the assertion above.
        let address = unsafe { entry.buffer.address().add(start) };
        let buffer_slot = entry.buffer_slot.filter(|_| route == Route::UringFixedDirect);
        self.start_read(
            id,
            InFlight { chunk, route, step: Step::Read, since: self.kernel.now() },
            route,
            buffer_slot,
            address,
            bytes,
        );
    }

    /// Issues a read into staging. `false` when all of it is busy.
    fn issue_staged(&mut self, id: LoadId, mut chunk: Chunk) -> bool {
        let slot = match self.staging.take(&mut self.kernel) {
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
        let Some((buffer, registered)) = self.staging.get(slot) else { return true };
        let (address, slot_bytes) = (buffer.address(), buffer.bytes());
        let Some(entry) = self.pieces.get_mut(chunk.piece) else { return true };
        // A chunk that is larger than a slot goes in parts.
        let end = chunk.range.end.min(chunk.range.start + slot_bytes as u64);
        if end < chunk.range.end {
            entry.chunks_left += 1;
            let rest = Chunk::new(chunk.piece, end..chunk.range.end);
            chunk.range.end = end;
            self.requeue(id, rest);
        }
        let Some(entry) = self.pieces.get_mut(chunk.piece) else { return true };
        let bytes = read_bytes(&chunk, &entry.file);
        assert!(bytes <= slot_bytes, "a read stays within its slot");
        let best = match (self.kernel.ring(), registered) {
            (Err(_), _) => Route::PreadDirect,
            (Ok(()), None) => Route::UringDirect,
            (Ok(()), Some(_)) => Route::UringFixedDirect,
        };
        let by = best.max(entry.file.staged_by);
        let registered = registered.filter(|_| by == Route::UringFixedDirect);
        let in_flight = InFlight { chunk, route: Route::Bounce, step: Step::Staged(slot), since: self.kernel.now() };
        self.start_read(id, in_flight, by, registered, address, bytes);
        true
    }

    /// Has a slot registered for a load that wants that, and tells it, once, when that can't be. `false` when it is strict, and
    /// fails.
    fn register_staging(&mut self, id: LoadId, chunk: &Chunk, slot: StagingSlot) -> bool {
        let Some(entry) = self.pieces.get_mut(chunk.piece) else { return true };
        let (file, offset, wanted) = (entry.file.index, entry.piece.file_offset + chunk.range.start, entry.file.staged_by);
        let Some(load) = self.loads.get_mut(&id) else { return true };
        // What was refused to a load once is not tried again for each of its reads, and what was not wanted is not missed.
        if load.staging_told || wanted > Route::UringFixedDirect && self.kernel.ring().is_ok() {
            return true;
        }
        let Some(step) = self.staging.register(slot, &mut self.kernel, &mut self.buffer_slots) else { return true };
        if wanted >= step.to {
            return true;
        }
        load.staging_told = true;
        let (attempt, errno) = (step.attempt, step.errno);
        if load.spec.strict {
            self.fail(id, Failure::Refused { file, offset, route: Route::Bounce, attempt, errno });
            return false;
        }
        let fallback = Fallback { file_index: None, from: Route::UringFixedDirect, to: step.to, attempt, errno };
        self.outputs.push(Output::SteppedDown { load: id, fallback });
        true
    }

    fn start_read(
        &mut self,
        id: LoadId,
        in_flight: InFlight,
        by: Route,
        buffer_slot: Option<u16>,
        address: NonNull<u8>,
        bytes: usize,
    ) {
        let Some(entry) = self.pieces.get_mut(in_flight.chunk.piece) else { return };
        entry.route = entry.route.max(in_flight.route);
        entry.in_flight += 1;
        let offset = entry.piece.file_offset + in_flight.chunk.range.start;
        let token = self.reads.insert(in_flight);
        let read = Read { token, route: by, buffer_slot, address, bytes, offset };
        // SAFETY: the address is in the piece's buffer, or in a slot of the staging. The piece entry owns the buffer and is
        // not removed before its `in_flight` is back at 0, the slot stays taken until then; that happens only in
        // `complete`. `give_up` leaks both instead.
        unsafe { self.kernel.read(&entry.file.handle, read) };
        if let Some(load) = self.loads.get_mut(&id) {
            load.in_flight += 1;
            load.reading.begin(self.kernel.now());
        }
    }

    /// Has what a read brought into staging copied to where it belongs.
    fn start_copy(&mut self, id: LoadId, chunk: Chunk, slot: StagingSlot, bytes: usize) {
        let Some(entry) = self.pieces.get_mut(chunk.piece) else { return };
        let Some((staging, _)) = self.staging.get(slot) else { return };
        let start = to_usize(chunk.range.start);
        assert!(start + bytes <= entry.buffer.bytes() && bytes <= staging.bytes(), "a copy stays within both buffers");
        // SAFETY: `start` is within the buffer, by the assertion above.
        let to = unsafe { entry.buffer.address().add(start) };
        let from = staging.address();
        entry.in_flight += 1;
        let since = self.kernel.now();
        let token = self.reads.insert(InFlight { chunk, route: Route::Bounce, step: Step::Copied(slot), since });
        // SAFETY: both are that long (asserted above) and of different mappings; as for reads, neither is let go of, nor
        // looked at, before the completion, and a taken slot is read into by nobody else.
        unsafe { self.kernel.copy(Copy { token, from, to, bytes }) };
        if let Some(load) = self.loads.get_mut(&id) {
            load.in_flight += 1;
            load.copying.begin(self.kernel.now());
        }
    }

    fn complete(&mut self, completion: Completion) {
        let in_flight = self.reads.remove(completion.token);
        assert!(in_flight.is_some(), "a completion for a read that is not in flight: {completion:?}");
        let Some(InFlight { chunk, route, step, since }) = in_flight else { return };
        let Some(entry) = self.pieces.get_mut(chunk.piece) else { return };
        entry.in_flight -= 1;
        let (id, piece) = (entry.load, entry.number);
        let now = self.kernel.now();
        let Some(load) = self.loads.get_mut(&id) else { return };
        load.in_flight -= 1;
        match step {
            Step::Read | Step::Staged(_) => load.reading.end(now),
            Step::Copied(_) => load.copying.end(now),
        }
        let ended = load.ended;
        if load.spec.trace {
            let kind = if matches!(step, Step::Copied(_)) { TraceKind::Copy } else { TraceKind::Read };
            let bytes = (completion.result.unwrap_or(0) as u64).min(chunk.range.end - chunk.range.start);
            self.outputs.push(Output::Traced { load: id, piece, span: Span { kind, start: since, end: now, bytes } });
        }
        match step {
            Step::Read => {}
            Step::Staged(slot) => {
                let came = completion.result.unwrap_or(0);
                if came > 0 && !ended {
                    let wanted = to_usize(chunk.range.end - chunk.range.start);
                    self.start_copy(id, chunk, slot, came.min(wanted));
                    return;
                }
                self.staging.give_back(slot);
            }
            Step::Copied(slot) => self.staging.give_back(slot),
        }
        if ended {
            self.release_idle(id);
            return;
        }
        match completion.result {
            Ok(bytes) => self.advance(chunk, route, bytes as u64),
            Err(Errno::INTR | Errno::AGAIN) => self.again(chunk, route),
            Err(errno) => self.refused(chunk, route, errno),
        }
    }

    /// `bytes` bytes of a chunk came.
    fn advance(&mut self, mut chunk: Chunk, route: Route, bytes: u64) {
        let Some(entry) = self.pieces.get_mut(chunk.piece) else { return };
        let wanted = chunk.range.end - chunk.range.start;
        if bytes >= wanted {
            entry.chunks_left -= 1;
            if entry.chunks_left == 0 {
                self.fill(chunk.piece);
            }
            return;
        }
        let (id, file, offset) = (entry.load, entry.file.index, entry.piece.file_offset + chunk.range.start);
        let strict = self.loads.get(&id).is_some_and(|load| load.spec.strict);
        if bytes == 0 || (strict && chunk.parts_of_a_block == PARTS_OF_A_BLOCK) {
            self.fail(id, Failure::Ended { file, offset: offset + bytes, route });
            return;
        }
        // The rest of a direct read must start at a block again: the part of a block is read twice.
        let progress = if route.is_direct() { bytes - bytes % entry.file.alignment_bytes } else { bytes };
        if progress > 0 {
            self.requeue(id, Chunk::new(chunk.piece, chunk.range.start + progress..chunk.range.end));
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
    fn again(&mut self, mut chunk: Chunk, route: Route) {
        let Some(entry) = self.pieces.get_mut(chunk.piece) else { return };
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
    fn refused(&mut self, mut chunk: Chunk, route: Route, errno: Errno) {
        let Some(entry) = self.pieces.get_mut(chunk.piece) else { return };
        let (id, piece) = (entry.load, chunk.piece);
        let offset = entry.piece.file_offset + chunk.range.start;
        let lower = if is_refusal(errno) { route.lower(errno) } else { None };
        match lower {
            Some(lower) => {
                self.requeue(id, chunk);
                self.step_down(piece, route, lower, Attempt::Read, errno, offset);
            }
            None if !chunk.alone => {
                let retried = Retried { file: entry.file.index, offset, bytes: chunk.range.end - chunk.range.start, errno };
                self.outputs.push(Output::Retried { load: id, retried });
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

    fn requeue(&mut self, id: LoadId, chunk: Chunk) {
        if let Some(load) = self.loads.get_mut(&id) {
            if chunk.alone { load.alone.push_front(chunk) } else { load.chunks.push_front(chunk) }
        }
    }

    /// `from` was refused to the file of this piece: all of its reads from now on go by `to`, unless they have gone
    /// lower already. What the ring refuses, it refuses to every file.
    fn step_down(&mut self, piece: Token, from: Route, to: Route, attempt: Attempt, errno: Errno, offset: u64) {
        let Some(entry) = self.pieces.get_mut(piece) else { return };
        let (id, file) = (entry.load, entry.file.index);
        let Some(load) = self.loads.get_mut(&id) else { return };
        if load.spec.strict {
            self.fail(id, Failure::Refused { file, offset, route: from, attempt, errno });
            return;
        }
        let mount = entry.file.mount;
        let file_index = match attempt {
            // What memory refuses, it refuses to every file.
            Attempt::Read if errno == Errno::FAULT => None,
            Attempt::SetUpRing | Attempt::RegisterBuffer | Attempt::RegisterStaging => None,
            Attempt::OpenDirect | Attempt::Read | Attempt::ReadOn => Some(file),
        };
        let until = self.kernel.now() + KNOWN_FOR;
        if to == Route::Bounce {
            if !matches!(self.pinnable, Pinnable::Yes) {
                self.pinnable = Pinnable::No { attempt, errno, until };
            }
        } else if attempt == Attempt::Read && matches!(errno, Errno::INVAL | Errno::OPNOTSUPP) {
            let known = self.mounts.entry(mount).or_insert(Mount::Refused { to, errno, until });
            if let Mount::Refused { to: known, until: known_until, .. } = known {
                *known = to.max(*known);
                *known_until = until;
            }
        }
        let left = match file_index {
            None => &mut load.floor,
            Some(file) => load.stepped.entry(file).or_insert(load.floor),
        };
        // Several reads may be refused before the first refusal is seen; one step is told once.
        let first = *left < to;
        *left = to.max(*left);
        for &token in &load.pieces {
            let concerned = |file: &FileSpec<K::File>| file_index.is_none_or(|index| index == file.index);
            if let Some(other) = self.pieces.get_mut(token).filter(|other| concerned(&other.file)) {
                other.file.route = other.file.route.max(to);
            }
        }
        if first {
            self.outputs.push(Output::SteppedDown { load: id, fallback: Fallback { file_index, from, to, attempt, errno } });
        }
    }

    /// What is known to be refused to reads by this route, before trying: the lowest step that follows from it.
    fn known_refusal(&self, mount: u64, route: Route) -> Option<(Route, Attempt, Errno)> {
        let now = self.kernel.now();
        let memory = match self.pinnable {
            Pinnable::No { attempt, errno, until } if now < until => Some((Route::Bounce, attempt, errno)),
            _ => None,
        };
        let mount = match self.mounts.get(&mount) {
            Some(&Mount::Refused { to, errno, until }) if now < until => Some((to, Attempt::Read, errno)),
            _ => None,
        };
        memory.into_iter().chain(mount).filter(|&(to, ..)| route < to).max_by_key(|&(to, ..)| to)
    }

    /// All bytes of a piece are there.
    fn fill(&mut self, token: Token) {
        let Some(mut entry) = self.pieces.remove(token) else { return };
        assert_eq!(entry.in_flight, 0, "a piece with all its bytes has no read in flight");
        let tail = to_usize(entry.piece.bytes)..entry.buffer.bytes();
        // SAFETY: `tail.start` is the length of the piece's bytes, which is at most that of its buffer.
        let after = unsafe { entry.buffer.address().add(tail.start) };
        // SAFETY: from there to the buffer's end it is valid for writes, and no read into it is in flight.
        unsafe { after.write_bytes(0, tail.len()) };
        self.unregister(&mut entry);
        self.kernel.detach(&entry.file.handle);
        if entry.route.is_direct() {
            self.mounts.insert(entry.file.mount, Mount::Direct);
            if entry.route < Route::Bounce {
                self.pinnable = Pinnable::Yes;
            }
        }
        let id = entry.load;
        self.outputs.push(Output::PieceFull { load: id, piece: entry.number, route: entry.route, buffer: entry.buffer });
        let Some(load) = self.loads.get_mut(&id) else { return };
        load.pieces.retain(|&other| other != token);
        load.pieces_left -= 1;
        if load.pieces_left == 0 {
            self.remove(id);
        }
    }

    fn fail(&mut self, id: LoadId, failure: Failure) {
        let Some(load) = self.loads.get_mut(&id) else { return };
        if !load.ended {
            self.outputs.push(Output::Failed { load: id, failure });
            self.abandon(id);
        }
    }

    /// Drops the pieces of an ended load that no read is writing to; with the last one, the load itself.
    fn release_idle(&mut self, id: LoadId) {
        let Some(tokens) = self.loads.get_mut(&id).map(|load| std::mem::take(&mut load.pieces)) else { return };
        let mut busy = Vec::new();
        for token in tokens {
            if self.pieces.get_mut(token).is_some_and(|entry| entry.in_flight > 0) {
                busy.push(token);
            } else if let Some(mut entry) = self.pieces.remove(token) {
                self.unregister(&mut entry);
                self.kernel.detach(&entry.file.handle);
            }
        }
        if busy.is_empty() {
            self.remove(id);
        } else if let Some(load) = self.loads.get_mut(&id) {
            load.pieces = busy;
        }
    }

    fn unregister(&mut self, entry: &mut PieceEntry<K::File, B>) {
        if let Some(slot) = entry.buffer_slot.take() {
            self.kernel.unregister_buffer(slot);
            self.buffer_slots.push(slot);
        }
    }

    fn remove(&mut self, id: LoadId) {
        if let Some(load) = self.loads.remove(&id) {
            self.turns.retain(|&other| other != id);
            self.outputs.push(Output::Gone { load: id, times: load.times() });
        }
    }
}

impl<K: Kernel, B: Buffer> Drop for Driver<K, B> {
    /// Reached with reads in flight only by a panic: what they may write to is leaked.
    fn drop(&mut self) {
        if !self.reads.is_empty() {
            self.give_up(Failure::Kernel { errno: Errno::CANCELED });
        }
        self.staging.clear(&mut self.kernel, &mut self.buffer_slots);
    }
}

/// How much a read for this chunk asks for: a direct one takes whole blocks.
fn read_bytes<F>(chunk: &Chunk, file: &FileSpec<F>) -> usize {
    let bytes = chunk.range.end - chunk.range.start;
    to_usize(if file.route.is_direct() { bytes.next_multiple_of(file.alignment_bytes) } else { bytes })
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
