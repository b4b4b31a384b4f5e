//! What is full, and can be handed over.
//!
//! Segments are handed over in order, and those that share a memory together: whoever gets the memory sees all of it. The last
//! one of a file waits until the file was checked: a file that changed while it was read gives an error instead.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use tracing::Span;

use super::{LoadShared, State};
use crate::load::{Event, FileTensors, Finished, FinishedFile};
use crate::memory::{Backing, Move};
use crate::metrics::count;
use crate::model::TensorMap;
use crate::plan::SegmentPlan;
use crate::ring::Times;
use crate::route::Route;
use crate::segment::{Place, Segment};
use crate::source::{Identity, OpenFile};
use crate::trace::TraceKind;

/// The bytes of a file that is in one segment, all of them.
#[derive(Debug)]
pub(crate) struct WholeFile {
    backing: Arc<Backing>,
    range: Range<usize>,
}

impl AsRef<[u8]> for WholeFile {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `LoadShared::whole_file` makes these of files whose pieces have all come back from the driver: their part of
        // the memory is filled, and nobody writes to it before it is handed over, which its file's check comes before.
        unsafe { self.backing.filled(self.range.clone()) }
    }
}

/// What follows from a piece that is full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Follows {
    /// All reads of this file are done; it is to be checked.
    pub(crate) check: Option<usize>,
    /// All bytes of this memory are there; its tensors are to be moved, or it is to be made a dma-buf.
    pub(crate) finish: Option<usize>,
}

/// What handing over has led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handover {
    /// There is more to come.
    Going,
    /// The load has given its end, or was over already.
    Over,
}

impl LoadShared {
    /// A piece holds its bytes.
    pub(crate) fn piece_full(&self, number: usize, route: Route) -> Follows {
        let mut state = self.state();
        let follows = self.count_piece(&mut state, number, route).unwrap_or_default();
        self.hand_over(&mut state);
        follows
    }

    fn count_piece(&self, state: &mut State, number: usize, route: Route) -> Option<Follows> {
        let piece = *state.plan.pieces.get(number)?;
        let SegmentPlan { file: file_index, memory: memory_index, .. } = *state.plan.segments.get(piece.segment)?;
        let file = state.files.get_mut(file_index)?;
        self.read_bytes.fetch_add(piece.bytes, Ordering::Relaxed);
        self.counters.read_bytes.fetch_add(piece.bytes, Ordering::Relaxed);
        file.route = file.route.max(route);
        file.pieces_left -= 1;
        let read = file.pieces_left == 0;
        let memory = state.memories.get_mut(memory_index)?;
        memory.pieces_left -= 1;
        memory.full_at = Some(Instant::now());
        let finish = memory.pieces_left == 0 && memory.unfinished;
        Some(Follows { check: read.then_some(file_index), finish: finish.then_some(memory_index) })
    }

    /// A full memory that is to be finished, and what is to be moved in it; `None` when the load is over.
    pub(crate) fn full_memory(&self, number: usize) -> Option<(Arc<Backing>, Vec<Move>)> {
        let state = self.state();
        let cell = Arc::clone(&state.memories.get(number)?.cell);
        let own = state.plan.segments.get(state.plan.memories.get(number)?.segments.clone()).unwrap_or_default();
        let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        let moves = own.iter().filter_map(|segment| {
            let moved = segment.moved.as_ref()?;
            let from = segment.memory_offset + (moved.start - segment.file_range.start);
            let slot = at(segment.memory_offset)..at(segment.memory_offset + segment.memory_bytes);
            Some(Move { slot, from: at(from), bytes: at(moved.end - moved.start) })
        });
        let moves = moves.collect();
        drop(state);
        let backing = cell.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        Some((backing, moves))
    }

    /// A memory is what it should be.
    pub(crate) fn memory_finished(&self, number: usize, start: Instant) -> Handover {
        let mut state = self.state();
        if let Some(memory) = state.memories.get_mut(number) {
            memory.unfinished = false;
        }
        if self.options.trace {
            let segment = state.plan.memories.get(number).map_or(0, |memory| memory.segments.start);
            let file_index = state.plan.segments.get(segment).map_or(0, |segment| segment.file);
            let event = self.event(TraceKind::Export, start, Instant::now(), file_index, segment, 0);
            state.trace.push(event);
        }
        self.hand_over(&mut state)
    }

    /// The file to be checked, and what it was. Taken out: it is closed when the caller drops it.
    pub(crate) fn take_file(&self, index: usize) -> Option<(Arc<OpenFile>, Identity)> {
        let (cell, identity) = {
            let state = self.state();
            let file = state.files.get(index)?;
            (Arc::clone(&file.open), file.planned.identity)
        };
        let open = cell.lock().unwrap_or_else(PoisonError::into_inner).take();
        open.map(|open| (open, identity))
    }

    /// All bytes of a small file, which its header is taken from; `None` for any other file, while it is being read, and when the
    /// load is over.
    pub(crate) fn whole_file(&self, index: usize) -> Option<WholeFile> {
        let (cell, start, bytes) = {
            let state = self.state();
            state.files.get(index).filter(|file| file.planned.small && file.pieces_left == 0)?;
            let segment = state.plan.segments.get(state.plan.files.get(index)?.first_segment?)?;
            let cell = Arc::clone(&state.memories.get(segment.memory)?.cell);
            (cell, segment.memory_offset, segment.file_range.end)
        };
        let backing = cell.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let at = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        Some(WholeFile { backing, range: at(start)..at(start + bytes) })
    }

    /// A file has not changed; `tensors` are those that were found in its memory.
    pub(crate) fn file_checked(&self, index: usize, tensors: Option<Arc<TensorMap>>) -> Handover {
        let mut state = self.state();
        state.files_left = state.files_left.saturating_sub(1);
        if let (Some(map), Some(file)) = (tensors, state.files.get_mut(index)) {
            file.planned.tensors = Some(Arc::new(FileTensors { map, chosen: None }));
        }
        if let Some(memory) = state.last_memory_of(index).and_then(|memory| state.memories.get_mut(memory)) {
            memory.unchecked = memory.unchecked.saturating_sub(1);
        }
        self.hand_over(&mut state)
    }

    /// The driver has forgotten the load, which took this long to read.
    pub(crate) fn gone(&self, times: Times) -> Handover {
        let mut state = self.state();
        state.times = Some(times);
        self.hand_over(&mut state)
    }

    /// Hands over what is complete and next in order; after the last segment, the end.
    pub(super) fn hand_over(&self, state: &mut State) -> Handover {
        let Some(events) = state.events.clone() else { return Handover::Over };
        while let Some(segment) = self.next_segment(state) {
            state.first_segment.get_or_insert_with(|| self.started.elapsed());
            state.handed += 1;
            count(&self.counters.segments);
            let memory = state.plan.segments.get(segment.index()).and_then(|planned| state.memories.get(planned.memory));
            let waited = memory.and_then(|memory| memory.full_at).map(|full_at| full_at.elapsed()).unwrap_or_default();
            self.counters.after_kernel.add(waited);
            let (index, file, bytes) = (segment.index(), segment.file_index(), segment.len());
            let waited_us = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
            tracing::debug!(parent: &self.span, load = self.id.0, segment = index, file, bytes, waited_us, "segment handed over");
            let place = state.plan.segments.get(index).map(|planned| planned.memory);
            let last =
                place.and_then(|place| state.plan.memories.get(place)).is_some_and(|memory| memory.segments.end == index + 1);
            if let Some(memory) = place.filter(|_| last).and_then(|place| state.memories.get_mut(place)) {
                memory.span = Span::none();
            }
            if self.options.trace {
                let (now, bytes) = (Instant::now(), segment.len() as u64);
                let event = self.event(TraceKind::HandOver, now, now, segment.file_index(), segment.index(), bytes);
                state.trace.push(event);
            }
            let _ = events.send(Event::Segment(segment));
        }
        let Some(times) = state.times.filter(|_| state.handed == state.plan.segments.len() && state.files_left == 0) else {
            return Handover::Going;
        };
        let report = self.report(state, times);
        tracing::debug!(load = self.id.0, bytes = report.bytes, route = %report.route, "load finished");
        let files = state.files.drain(..).zip(self.sources()).zip(&state.plan.files);
        let files = files.map(|((file, source), parts)| FinishedFile {
            path: Arc::clone(&source.path),
            bytes: file.planned.identity.bytes,
            part: file.planned.part,
            tensors: file.planned.tensors,
            has_segments: parts.first_segment.is_some(),
        });
        let files = files.collect();
        state.events = None;
        count(&self.counters.finished);
        self.span.record("bytes", report.bytes);
        let _ = events.send(Event::Done(Box::new(Finished { report, files })));
        Handover::Over
    }

    /// The segment whose turn it is, once its memory is ready.
    fn next_segment(&self, state: &State) -> Option<Segment> {
        let index = state.handed;
        let planned = state.plan.segments.get(index)?;
        let file = &state.files.get(planned.file)?.planned;
        let memory = state.memories.get(planned.memory).filter(|memory| memory.is_ready())?;
        let sharing = &state.plan.memories.get(planned.memory)?.segments;
        let mut cell = memory.cell.lock().unwrap_or_else(PoisonError::into_inner);
        // After the last one it belongs to the consumer alone.
        let backing = if index + 1 == sharing.end { cell.take()? } else { Arc::clone(cell.as_ref()?) };
        drop(cell);
        if index == sharing.start {
            if let Some(memfd) = backing.parts().and_then(|(_, memory)| memory.memfd()) {
                // Whoever else has its descriptor (a heap of the caller's may) can't write to it from now on. Before Linux 5.1
                // there is no such seal, and the promise is the heap's alone.
                let _ = memfd.seal_against_writes();
            }
            // Once: whoever gets the first segment may hand it out before the second one is made.
            backing.allow_reuse();
            backing.allow_fork();
        }
        let place = Place {
            index,
            file_index: planned.file,
            span: planned.span,
            tensors: file.tensors.clone(),
            path: Arc::clone(self.path(planned.file)?),
            file_bytes: file.identity.bytes,
            part: file.part.clone(),
            file_range: planned.moved.clone().unwrap_or_else(|| planned.file_range.clone()),
            memory_offset: usize::try_from(planned.memory_offset).ok()?,
            memory_bytes: usize::try_from(planned.memory_bytes).ok()?,
        };
        // SAFETY: `pieces_left` of its memory is 0, so the driver has given back every piece of it: all bytes were read, and
        // no read is in flight. Pieces drop their share of the backing unread, and the cell's is for segments like this one.
        Some(unsafe { Segment::new(place, Arc::clone(&self.heap), backing) })
    }
}
