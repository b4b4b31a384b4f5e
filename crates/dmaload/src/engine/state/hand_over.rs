//! Hands over full segments to the load's consumer.
//!
//! The teller records full pieces, and workers record checked files. Only the teller hands
//! segments over ([`LoadShared::deliver`]).
//!
//! Segments are handed over in order. Segments that share an allocation wait until all of it is
//! ready, because a consumer that holds one of them can see the whole allocation. The last segment
//! of a file waits until the file has been checked. If the file changed while it was being read,
//! the load fails instead.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dmabuf::Errno;
use tracing::Span;

use super::reporting::filled_cache_bytes;
use super::{DeferredDrop, FileState, LoadShared, LoadState, no_span};
use crate::engine::event::{Event, Finished, LoadFile};
use crate::engine::outbox::Announcer;
use crate::error::{Error, Result};
use crate::files::source::{Identity, OpenFile};
use crate::memory::backing::{Backing, Move};
use crate::memory::segment::{Placement, Segment};
use crate::model::TensorMap;
use crate::plan::SegmentPlan;
use crate::plan::select::ChosenTensors;
use crate::plan::tensors::FileTensors;
use crate::ring::Times;
use crate::route::Route;
use crate::support::convert::to_usize;
use crate::support::foreign::{self, Foreign};
use crate::telemetry::metrics::increment;
use crate::telemetry::trace::TraceKind;

/// The bytes of a small file, which all lie in one segment.
#[derive(Debug)]
pub(crate) struct WholeFile {
    backing: Arc<Backing>,
    range: Range<usize>,
}

impl AsRef<[u8]> for WholeFile {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `LoadShared::whole_file` creates this only for small files whose pieces have all
        // been returned by the driver, so their memory is filled. The memory is handed over only
        // after this file's check, and nothing writes to it before that: only the `tensors` layout
        // moves bytes within filled memory, and it has no small files.
        unsafe { self.backing.filled(self.range.clone()) }
    }
}

/// The jobs that become due when a piece is full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct FollowUpJobs {
    /// The file whose last piece this was. It has to be checked now.
    pub(crate) check: Option<usize>,
    /// The allocation whose last piece this was, if it has to be finished: its tensors have to be
    /// moved, or it has to be exported as a dma-buf.
    pub(crate) finish: Option<usize>,
}

/// The state of a load after [`LoadShared::deliver`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HandOverStatus {
    /// The load has not delivered its final event yet.
    Going,
    /// The load has delivered its final event, or was dropped.
    Over,
}

impl LoadShared {
    /// Records that all bytes of a piece were read.
    pub(crate) fn record_full_piece(&self, number: usize, route: Option<Route>) -> FollowUpJobs {
        let mut state = self.state();
        if state.is_over() {
            return FollowUpJobs::default();
        }
        self.count_piece(&mut state, number, route)
    }

    fn count_piece(&self, state: &mut LoadState, number: usize, route: Option<Route>) -> FollowUpJobs {
        let piece = *state.plan.pieces.get(number).expect("the driver should fill only planned pieces");
        let planned = state.plan.segments.get(piece.segment).expect("a piece should belong to a planned segment");
        let SegmentPlan { file: file_index, memory: memory_index, .. } = *planned;
        let file = state.files.get_mut(file_index).expect("a segment should belong to a planned file");
        self.read_bytes.fetch_add(piece.bytes, Ordering::Relaxed);
        self.counters.read_bytes.fetch_add(piece.bytes, Ordering::Relaxed);
        file.route = route.map_or(file.route, |route| file.route.max(route));
        file.pieces_left = file.pieces_left.checked_sub(1).expect("each piece of a file should be filled only once");
        let read = file.pieces_left == 0;
        let memory = state.memories.get_mut(memory_index).expect("a segment should belong to a planned allocation");
        memory.pieces_left = memory.pieces_left.checked_sub(1).expect("each piece of an allocation should be filled only once");
        memory.full_at = Some(Instant::now());
        let finish = memory.pieces_left == 0 && memory.unfinished;
        FollowUpJobs { check: read.then_some(file_index), finish: finish.then_some(memory_index) }
    }

    /// Returns a full allocation that has to be finished, and the moves to make within it; `None`
    /// if the load has ended.
    pub(crate) fn full_memory(&self, number: usize) -> Option<(Arc<Backing>, Vec<Move>)> {
        let state = self.state();
        if state.is_over() {
            return None;
        }
        let cell = Arc::clone(&state.memories.get(number).expect("only planned allocations should be finished").cell);
        let planned = state.plan.memories.get(number).expect("every allocation should have been planned");
        let own = state.plan.segments.get(planned.segments.clone()).expect("an allocation should have planned segments");
        let moves = own.iter().filter_map(|segment| {
            let moved = segment.moved.as_ref()?;
            let from = segment.memory_offset + (moved.start - segment.file_range.start);
            let slot = to_usize(segment.memory_offset)..to_usize(segment.memory_offset + segment.memory_bytes);
            Some(Move { slot, from: to_usize(from), bytes: to_usize(moved.end - moved.start) })
        });
        let moves = moves.collect();
        drop(state);
        Some((cell.get().expect("full pieces should belong to an existing allocation"), moves))
    }

    /// Records that an allocation was finished.
    pub(crate) fn record_finished_memory(&self, number: usize, start: Instant) {
        let mut state = self.state();
        if state.is_over() {
            return;
        }
        state.memories.get_mut(number).expect("only planned allocations should be finished").unfinished = false;
        if self.options.trace {
            let segment = state.plan.memories.get(number).expect("every allocation should have been planned").segments.start;
            let file_index = state.plan.segments.get(segment).expect("an allocation should begin with a planned segment").file;
            let event = self.event(TraceKind::Export, start, Instant::now(), file_index, segment, 0);
            state.trace.push(event);
        }
    }

    /// Takes a file that has to be checked, and the identity that it had when the load was
    /// planned; `None` if the load has ended. Dropping the file may close it.
    pub(crate) fn take_file(&self, index: usize) -> Option<(Arc<OpenFile>, Identity)> {
        let (cell, identity) = {
            let state = self.state();
            if state.is_over() {
                return None;
            }
            let file = state.files.get(index).expect("only planned files should be checked");
            (Arc::clone(&file.open), file.planned.identity)
        };
        Some((cell.take().expect("a file that was read should stay open until its only check"), identity))
    }

    /// Returns all bytes of a small file, so that its header can be parsed. Returns `None` if the
    /// file is not small or is still being read, or if the load has ended.
    pub(crate) fn whole_file(&self, index: usize) -> Option<WholeFile> {
        let (cell, start, bytes) = {
            let state = self.state();
            if state.is_over() {
                return None;
            }
            let file = state.files.get(index).expect("only planned files should be inspected");
            if !file.planned.small || file.pieces_left > 0 {
                return None;
            }
            let planned = state.plan.files.get(index).expect("each file should have been planned");
            let segment = planned.first_segment.expect("a small file with bytes should have a segment");
            let segment = state.plan.segments.get(segment).expect("the first segment of a file should have been planned");
            let memory = state.memories.get(segment.memory).expect("a segment should belong to a planned allocation");
            (Arc::clone(&memory.cell), segment.memory_offset, segment.file_range.end)
        };
        let backing = cell.get().expect("the memory of a file that was read should be allocated and not yet handed over");
        Some(WholeFile { backing, range: to_usize(start)..to_usize(start + bytes) })
    }

    /// Records that a file has not changed. `tensors` is the tensor map that was parsed from a
    /// small file's memory. It is `None` for a small file of raw bytes, and for every file that is
    /// not small.
    ///
    /// # Errors
    /// If this is the last file of a load with small files, the errors of
    /// [`LoadShared::check_whole`], which could not run before all headers were known.
    pub(crate) fn record_checked_file(&self, index: usize, tensors: Option<Arc<TensorMap>>) -> Result<()> {
        let mut state = self.state();
        if state.is_over() {
            return Ok(());
        }
        state.files_left = state.files_left.checked_sub(1).expect("each file should be checked only once");
        if let Some(map) = tensors {
            let source = self.sources().get(index).expect("only planned files should be checked");
            let file = state.files.get_mut(index).expect("only planned files should be checked");
            let chosen = ChosenTensors::owned(&map, |name| source.owns(name)).map(Arc::new);
            file.planned.tensors = Some(Arc::new(FileTensors { map, chosen }));
        }
        // Check this before the last segments are handed over, so the load can still fail if the
        // model is incomplete.
        if state.files_left == 0 && state.files.iter().any(|file| file.planned.small) {
            let maps = state.files.iter().map(|file| file.planned.tensors.as_deref().map(|tensors| &*tensors.map));
            let notes = self.check_whole(maps)?;
            state.notes.extend(notes);
        }
        let memory = state.last_memory_of(index).expect("a file that was read should end in an allocation");
        let memory = state.memories.get_mut(memory).expect("a file should end in a planned allocation");
        memory.unchecked = memory.unchecked.checked_sub(1).expect("each file should be checked only once");
        Ok(())
    }

    /// Records that the driver has released the load, and the times that the driver measured.
    pub(crate) fn record_times(&self, times: Times) {
        self.state().times = Some(times);
    }

    /// Hands over complete segments in order. After the last segment or a failure, delivers the
    /// final event.
    ///
    /// Only one thread at a time may call this, to keep the order. No lock is held while the
    /// consumer is woken. If the load fails here, its remains are added to `remains`.
    pub(crate) fn deliver(&self, remains: &mut Vec<DeferredDrop>) -> HandOverStatus {
        loop {
            // This is a separate statement because the lock must be released before anything is
            // sent or dropped.
            let step = self.next_step(&mut self.state());
            match step {
                DeliveryStep::Nothing => return HandOverStatus::Going,
                DeliveryStep::Over => return HandOverStatus::Over,
                DeliveryStep::Planned { files, events } => events.send(Event::Planned(files)),
                DeliveryStep::Segment { segment, waited, events, span } => {
                    self.counters.after_kernel.add(waited);
                    let (index, file, bytes) = (segment.index(), segment.file_index(), segment.len());
                    let waited_us = u64::try_from(waited.as_micros()).expect("a wait in microseconds should fit into 64 bits");
                    foreign::emit(|| {
                        tracing::debug!(parent: &*self.span, load = self.id.0, segment = index, file, bytes, waited_us, "segment handed over");
                    });
                    drop(span);
                    events.send(Event::Segment(segment));
                }
                DeliveryStep::Unsealed(refusal) => remains.push(self.fail(self.memory_error(refusal))),
                DeliveryStep::Failed { error, events } => {
                    foreign::emit(|| {
                        tracing::debug!(load = self.id.0, %error, "load failed");
                        self.span.record("error", tracing::field::display(&error));
                    });
                    events.send(Event::Failed(error));
                    return HandOverStatus::Over;
                }
                DeliveryStep::Done { finished, cached_bytes, events } => {
                    let report = &finished.report;
                    foreign::emit(|| {
                        if let Some(cached_bytes) = cached_bytes {
                            tracing::warn!(
                                load = self.id.0,
                                cached_bytes,
                                "bytes were read through the page cache, which keeps a copy"
                            );
                        }
                        tracing::debug!(load = self.id.0, bytes = report.bytes, route = %report.route, "load finished");
                        self.span.record("bytes", report.bytes);
                    });
                    events.send(Event::Done(finished));
                    return HandOverStatus::Over;
                }
            }
        }
    }

    /// Determines what to deliver next. Runs under the lock, so it sends nothing itself.
    fn next_step(&self, state: &mut LoadState) -> DeliveryStep {
        if state.events.is_none() {
            return DeliveryStep::Over;
        }
        if let Some(error) = state.failed.take() {
            let events = state.events.take().expect("the load should not have delivered its final event yet");
            return DeliveryStep::Failed { error, events };
        }
        if std::mem::take(&mut state.files_unsent) {
            let files = state.files.iter().enumerate().map(|(index, file)| self.describe_file(state, index, file));
            let (files, events) =
                (files.collect(), state.events.clone().expect("the load should not have delivered its final event yet"));
            return DeliveryStep::Planned { files, events };
        }
        if let Some((segment, last)) = match self.next_segment(state) {
            Ok(next) => next,
            Err(refusal) => return DeliveryStep::Unsealed(refusal),
        } {
            state.first_segment.get_or_insert_with(|| self.started.elapsed());
            state.handed += 1;
            increment(&self.counters.segments);
            if self.options.trace {
                let (now, bytes) = (Instant::now(), segment.len() as u64);
                let event = self.event(TraceKind::HandOver, now, now, segment.file_index(), segment.index(), bytes);
                state.trace.push(event);
            }
            let planned = state.plan.segments.get(segment.index()).expect("a segment should have been planned");
            let memory = state.memories.get_mut(planned.memory).expect("a segment should belong to a planned allocation");
            let waited = memory.full_at.expect("memory that is handed over should be full").elapsed();
            let span = if last { std::mem::replace(&mut memory.span, no_span()) } else { no_span() };
            let events = state.events.clone().expect("the load should not have delivered its final event yet");
            return DeliveryStep::Segment { segment, waited, events, span };
        }
        let all = state.handed == state.plan.segments.len() && state.files_left == 0;
        let Some(times) = state.times.filter(|_| all) else { return DeliveryStep::Nothing };
        let report = self.report(state, times);
        let cached_bytes = filled_cache_bytes(state);
        let files = state.files.iter().enumerate().map(|(index, file)| self.describe_file(state, index, file));
        let files = files.map(|file| LoadFile { is_known: true, ..file }).collect();
        increment(&self.counters.finished);
        let events = state.events.take().expect("the load should not have delivered its final event yet");
        DeliveryStep::Done { finished: Box::new(Finished { report, files }), cached_bytes, events }
    }

    fn describe_file(&self, state: &LoadState, index: usize, file: &FileState) -> LoadFile {
        let source = self.sources().get(index).expect("a planned file should have a source");
        LoadFile {
            path: Arc::clone(&source.path),
            bytes: file.planned.identity.bytes,
            part: file.planned.part.clone(),
            tensors: file.planned.tensors.clone(),
            is_known: !file.planned.small,
            has_segments: state.plan.files.get(index).is_some_and(|parts| parts.first_segment.is_some()),
            index: source.index_in_folder(),
        }
    }

    /// Returns the next segment in order and whether it is the last one in its allocation, or
    /// `None` if there are no more segments or the allocation is not ready.
    ///
    /// # Errors
    /// If the allocation's memfd could not be sealed against writes. Its bytes must then not be
    /// shown to the consumer.
    fn next_segment(&self, state: &LoadState) -> Result<Option<(Segment, bool)>, dmabuf::Error> {
        let index = state.handed;
        let Some(planned) = state.plan.segments.get(index) else { return Ok(None) };
        let memory = state.memories.get(planned.memory).expect("a segment should belong to a planned allocation");
        if !memory.is_ready() {
            return Ok(None);
        }
        let file = &state.files.get(planned.file).expect("a segment should belong to a planned file").planned;
        let sharing = &state.plan.memories.get(planned.memory).expect("every allocation should have been planned").segments;
        // After its last segment, the allocation belongs to the consumer alone.
        let last = index + 1 == sharing.end;
        let backing = if last { memory.cell.take() } else { memory.cell.get() };
        let backing = backing.expect("an allocation that is ready should exist until its last segment is handed over");
        if index == sharing.start {
            self.seal(&backing)?;
            // Do this for the first segment only. Before the second segment is created, the first
            // one's consumer may have handed out the memory, which forbids its reuse.
            backing.allow_reuse();
            backing.allow_fork();
        }
        let place = Placement {
            index,
            file_index: planned.file,
            span: planned.span,
            tensors: file.tensors.clone(),
            path: Arc::clone(self.path(planned.file).expect("a planned file should have a path")),
            file_bytes: file.identity.bytes,
            part: file.part.clone(),
            file_range: planned.moved.clone().unwrap_or_else(|| planned.file_range.clone()),
            memory_offset: to_usize(planned.memory_offset),
            memory_bytes: to_usize(planned.memory_bytes),
        };
        // SAFETY: the allocation is ready (`is_ready`). Its `pieces_left` is 0, so the driver has
        // returned all of its pieces: all bytes were read, and no read is in flight. It is not
        // `unfinished`, so all moves are done. The other references to the backing, those of the
        // cell and of returned pieces, are not used to write. A memfd was sealed with the first
        // segment, or one of our own heaps created it and keeps no second descriptor; any other
        // holder of the memory is bound by the contract of `Heap`.
        Ok(Some((unsafe { Segment::new(place, Arc::clone(&self.heap), backing) }, last)))
    }

    /// Seals a memfd against writes, before any segment in it is handed over.
    ///
    /// # Errors
    /// If the memfd can't be sealed: another holder of its descriptor could write to bytes that
    /// the consumer can see.
    fn seal(&self, backing: &Backing) -> Result<(), dmabuf::Error> {
        let Some(memfd) = backing.memfd() else { return Ok(()) };
        match memfd.seal_against_writes() {
            Err(refusal) if !may_stay_unsealed(refusal.errno, self.heap_is_own, dmabuf::Memfd::kernel_seals_writes) => {
                Err(refusal)
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// Whether the segments in a memfd that could not be sealed may be handed over. This requires one
/// of our own heaps, which keep no second descriptor, and a kernel before Linux 5.1, which lacks
/// this seal. EINVAL alone is not enough: files that do not support seals at all return it, too.
fn may_stay_unsealed(errno: Errno, heap_is_own: bool, kernel_seals_writes: impl FnOnce() -> bool) -> bool {
    heap_is_own && errno == Errno::EINVAL && !kernel_seals_writes()
}

/// The next step of [`LoadShared::deliver`], to be taken without holding the lock.
enum DeliveryStep {
    Nothing,
    Over,
    Planned { files: Vec<LoadFile>, events: Arc<Announcer> },
    Segment { segment: Segment, waited: Duration, events: Arc<Announcer>, span: Foreign<Span> },
    Unsealed(dmabuf::Error),
    Failed { error: Error, events: Arc<Announcer> },
    Done { finished: Box<Finished>, cached_bytes: Option<u64>, events: Arc<Announcer> },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_memory_on_an_old_kernel_may_stay_unsealed() {
        for errno in [Errno::EINVAL, Errno::EPERM, Errno::EBUSY, Errno::EBADF] {
            for own in [true, false] {
                for kernel_seals in [true, false] {
                    let expected = errno == Errno::EINVAL && own && !kernel_seals;
                    assert_eq!(may_stay_unsealed(errno, own, || kernel_seals), expected, "{errno} {own} {kernel_seals}");
                }
            }
        }
    }
}
