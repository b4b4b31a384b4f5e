//! Who is served next: the scheduler of opening, allocating and finishing, over all loads of a loader.
//!
//! Pure bookkeeping, driven by the worker threads under one lock. Loads take turns, one batch
//! each, so a large one can't starve a small one. One that has its part of the window (see
//! [`crate::memory::window`]) is passed over; when one that holds nothing of it finds no room,
//! nobody overtakes it, so small ones can't starve a large one either. Where its file system has
//! its part, no load of that file system overtakes it, and loads of others do. The number of loads
//! that are open at once is bounded; the others wait in the order they came. Loads of a higher
//! priority go first.
//!
//! Where memory is limited, a load begins when its reservation is free (see [`crate::memory::budget`]), in the order they came; one that has
//! its share is passed over until its consumer drops something. A stream has a bounded amount of memory ahead of its consumer, also
//! where memory is not limited: one that is far ahead is passed over until its consumer takes a segment.
//!
//! A load is *stalled* while one of its jobs waits for a file whose server does not answer.
//! Until it does, the load gets no further job that may wait for files, holds up no other, and does
//! not count as open if it is the opening that waits.
//!
//! A file system is *silent* while it holds permits of the window and none has come back for long
//! ([`Scheduler::look_for_silence`]). Its loads don't count as open either, up to [`MOST_SILENT`]
//! of them: they would keep all places from loads of other file systems.

use std::collections::VecDeque;

use crate::memory::budget::{Admitted, Budget, Taken};
use crate::memory::window::{Permitted, Window};
use crate::options::choices::Priority;
use crate::plan::{BATCH_BYTES, BATCH_FILES};

/// Something for a worker thread to do. `L` names a load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Job<L> {
    /// Open the files, read their headers, plan.
    Open(L),
    /// Allocate the batch of this number, for which the permit is taken.
    Allocate(L, usize, Need),
    /// All reads of a file are done: see whether it is still the file that was opened.
    Check(L, usize),
    /// All bytes of a memory are there: move what is to be moved in it, make it a dma-buf.
    Finish(L, usize),
    /// The load waits for so much memory that the pool has.
    MakeRoom(L, u64),
}

/// What a batch takes until it is full: what its permit is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Need {
    /// Memory.
    pub(crate) bytes: u64,
    /// Files that are opened for it.
    pub(crate) files: u64,
    /// What its load takes of the budget for it: all of a memory with its first batch, since memory of the pool comes as a whole.
    pub(crate) held_bytes: u64,
    /// The file system that it is read from. Where small files of several share a memory, that of
    /// the first.
    pub(crate) file_system: u64,
}

impl<L> Job<L> {
    /// The load that it is for.
    pub(crate) fn load(&self) -> &L {
        match self {
            Job::Open(load) | Job::Allocate(load, ..) | Job::Check(load, _) | Job::Finish(load, _) | Job::MakeRoom(load, _) => {
                load
            }
        }
    }
}

/// What a load was planned to take.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LoadNeeds {
    /// What each batch takes, in order.
    pub(crate) batches: Vec<Need>,
    /// What it must be able to hold to go on.
    pub(crate) reserved_bytes: u64,
    /// The most memory that it may have ahead of its consumer: allocated, but not taken yet. A memory larger than that is
    /// allocated when it is the only one. `None` where the consumer keeps all of it anyway.
    pub(crate) ahead_bytes: Option<u64>,
    pub(crate) priority: Priority,
}

impl LoadNeeds {
    /// The file system that a load is from whose consumer keeps all of it.
    fn kept_from(&self) -> Option<u64> {
        self.batches.first().filter(|_| self.ahead_bytes.is_none()).map(|need| need.file_system)
    }
}

#[derive(Debug)]
struct LoadTurn<L> {
    load: L,
    demand: LoadNeeds,
    next: usize,
    /// What it has ahead of its consumer.
    ahead: u64,
    /// It has its reservation.
    admitted: bool,
    /// Loads that came before it, and are not opened yet.
    waits_for: Vec<L>,
}

impl<L> LoadTurn<L> {
    /// Whether its next batch begins a memory that has to wait for its consumer.
    fn is_far_ahead(&self, need: Need) -> bool {
        let most = self.demand.ahead_bytes.unwrap_or(u64::MAX);
        need.held_bytes > 0 && self.ahead > 0 && self.ahead.saturating_add(need.held_bytes) > most
    }
}

/// The most loads that do not count as open because their file systems are silent: each has files
/// open.
const MOST_SILENT: usize = 64;

/// See the module.
#[derive(Debug)]
pub(crate) struct Scheduler<L> {
    window: Window<L>,
    budget: Budget<L>,
    /// The pool was asked for room, and has not given any yet.
    making_room: bool,
    /// How many files may be open for batches that are not full. Counted like the window's bytes.
    files: Window<L>,
    max_open: usize,
    open: usize,
    waiting: VecDeque<L>,
    /// Loads that are being opened, in the order they came.
    opening: Vec<L>,
    /// What comes before anything else: a consumer waits for it.
    urgent: VecDeque<Job<L>>,
    turns: VecDeque<LoadTurn<L>>,
    stalled: Vec<L>,
    /// Those of them whose opening is what waits, whether they are still wanted or not.
    stalled_opening: Vec<L>,
    /// Checks of stalled loads.
    parked: VecDeque<Job<L>>,
    /// File systems that have held permits since the last look, without any that came back.
    watched: Vec<u64>,
    /// Those of them that did so at the look before.
    silent: Vec<u64>,
}

impl<L: Clone + PartialEq> Scheduler<L> {
    pub(crate) fn new(window_bytes: u64, memory_bytes: u64, files: u64, max_open: usize) -> Self {
        Scheduler {
            window: Window::new(window_bytes, BATCH_BYTES),
            budget: Budget::new(memory_bytes),
            making_room: false,
            // Not by file system: loads that hold few files each would keep one that needs many waiting.
            files: Window::of_loads(files, BATCH_FILES as u64),
            max_open,
            open: 0,
            waiting: VecDeque::new(),
            opening: Vec::new(),
            urgent: VecDeque::new(),
            turns: VecDeque::new(),
            stalled: Vec::new(),
            stalled_opening: Vec::new(),
            parked: VecDeque::new(),
            watched: Vec::new(),
            silent: Vec::new(),
        }
    }

    /// A new load. It is opened when its turn comes; from then on it counts as open until [`Self::end`].
    pub(crate) fn submit(&mut self, load: L) {
        self.waiting.push_back(load);
    }

    /// A load was opened and planned.
    pub(crate) fn opened(&mut self, load: L, demand: LoadNeeds) {
        let came_before = self.opening.iter().position(|other| *other == load).unwrap_or(0);
        let waits_for = self.opening.get(..came_before).unwrap_or_default().to_vec();
        self.is_opened(&load);
        // Those that came later and were opened sooner wait for this one.
        let later = |turn: &LoadTurn<L>| !turn.admitted && turn.waits_for.contains(&load);
        let at = self.turns.iter().position(later).unwrap_or(self.turns.len());
        self.turns.iter_mut().for_each(|turn| turn.waits_for.retain(|other| *other != load));
        self.turns.insert(at, LoadTurn { load, demand, next: 0, ahead: 0, admitted: false, waits_for });
    }

    fn is_opened(&mut self, load: &L) {
        self.opening.retain(|other| other != load);
    }

    /// All pieces of this file are full.
    pub(crate) fn file_read(&mut self, load: L, file: usize) {
        self.urgent.push_back(Job::Check(load, file));
    }

    /// All pieces of this memory are full.
    pub(crate) fn memory_read(&mut self, load: L, memory: usize) {
        self.urgent.push_back(Job::Finish(load, memory));
    }

    /// The next thing to do, if there is one now.
    pub(crate) fn next(&mut self) -> Option<Job<L>> {
        while let Some(job) = self.urgent.pop_front() {
            if matches!(&job, Job::Check(load, _) if self.stalled.contains(load)) {
                self.parked.push_back(job);
            } else {
                return Some(job);
            }
        }
        if !self.waiting.is_empty()
            && self.counted_open() < self.max_open
            && let Some(load) = self.waiting.pop_front()
        {
            self.open += 1;
            self.opening.push(load.clone());
            return Some(Job::Open(load));
        }
        self.close_done();
        self.admit();
        self.batch()
    }

    /// Loads that count as open.
    fn counted_open(&self) -> usize {
        self.open.saturating_sub(self.stalled_opening.len() + self.silent_loads())
    }

    /// Loads of silent file systems: those that wait for permits, and those that hold some.
    fn silent_loads(&self) -> usize {
        if self.silent.is_empty() {
            return 0;
        }
        let is_silent =
            |turn: &&LoadTurn<L>| turn.demand.batches.get(turn.next).is_some_and(|need| self.silent.contains(&need.file_system));
        let mut loads: Vec<_> = self.turns.iter().filter(is_silent).map(|turn| &turn.load).collect();
        for (load, file_system) in self.window.holders() {
            if self.silent.contains(&file_system) && !loads.contains(&load) {
                loads.push(load);
            }
        }
        loads.len().min(MOST_SILENT)
    }

    /// Whether loads wait for open ones to end.
    pub(crate) fn lacks_places(&self) -> bool {
        !self.waiting.is_empty() && self.counted_open() >= self.max_open
    }

    /// Finds file systems that have held permits since the last call, of which none has come back.
    /// To be called now and then while [`Self::lacks_places`]. Whether more of them are silent
    /// now.
    pub(crate) fn look_for_silence(&mut self) -> bool {
        let mut holding: Vec<_> = self.window.holders().map(|(_, file_system)| file_system).collect();
        holding.sort_unstable();
        holding.dedup();
        let before = self.silent.len();
        self.silent = holding.iter().copied().filter(|file_system| self.watched.contains(file_system)).collect();
        self.watched = holding;
        self.silent.len() > before
    }

    /// Loads whose last batch was given out take nothing any more. Before others are admitted,
    /// which may wait for that.
    fn close_done(&mut self) {
        let is_done = |turn: &LoadTurn<L>| turn.next == turn.demand.batches.len();
        for done in self.turns.iter().filter(|turn| is_done(turn)) {
            self.budget.close(&done.load);
        }
        self.turns.retain(|turn| !is_done(turn));
    }

    /// Lets loads begin, in order, as far as there is memory for what they reserve.
    fn admit(&mut self) {
        // A load from each of these waits for what others from there have reserved: none of that
        // file system overtakes it.
        let mut waited_for = Vec::new();
        for priority in Priority::DOWN {
            for turn in self.turns.iter_mut().filter(|turn| !turn.admitted && turn.demand.priority == priority) {
                let kept_from = turn.demand.kept_from();
                if kept_from.is_some_and(|file_system| waited_for.contains(&file_system)) {
                    continue;
                }
                let is_next = turn.waits_for.iter().all(|load| self.stalled.contains(load)) || self.budget.is_unlimited();
                let admitted = if is_next {
                    self.budget.admit(turn.load.clone(), turn.demand.reserved_bytes, kept_from)
                } else {
                    Admitted::No
                };
                match admitted {
                    Admitted::Yes => turn.admitted = true,
                    Admitted::FileSystemHasItsPart => waited_for.extend(kept_from),
                    // Nobody overtakes it.
                    Admitted::No => return,
                }
            }
        }
    }

    /// The next batch of whoever's turn it is.
    fn batch(&mut self) -> Option<Job<L>> {
        let mut short = None;
        // A load from each of these waits for what its file system holds: none of that file system
        // overtakes it.
        let mut waited_for = Vec::new();
        for priority in Priority::DOWN {
            let mut at = 0;
            while let Some(turn) = self.turns.get(at) {
                let need = *turn.demand.batches.get(turn.next).expect("a load whose last batch was given out has no turn");
                if turn.demand.priority != priority || !turn.admitted || self.stalled.contains(&turn.load) {
                    at += 1;
                    continue;
                }
                // One that is far ahead is held up by its consumer, and holds up nobody else.
                if turn.is_far_ahead(need) || waited_for.contains(&need.file_system) {
                    at += 1;
                    continue;
                }
                match self.budget.take(&turn.load, need.held_bytes) {
                    Taken::Yes => {}
                    taken => {
                        if let Taken::Pooled(bytes) = taken {
                            short.get_or_insert_with(|| (turn.load.clone(), bytes));
                        }
                        at += 1;
                        continue;
                    }
                }
                let load = turn.load.clone();
                match self.take(&load, need) {
                    Permitted::Yes => {}
                    permitted => {
                        self.budget.give_back(&load, need.held_bytes);
                        match permitted {
                            Permitted::Full => return None,
                            Permitted::FileSystemHasItsPart => waited_for.push(need.file_system),
                            Permitted::Yes | Permitted::HasItsPart => {}
                        }
                        at += 1;
                        continue;
                    }
                }
                let mut turn = self.turns.remove(at)?;
                let job = Job::Allocate(load, turn.next, need);
                turn.next += 1;
                turn.ahead += need.held_bytes;
                self.turns.push_back(turn);
                return Some(job);
            }
        }
        let (load, bytes) = short.filter(|_| !self.making_room)?;
        self.making_room = true;
        Some(Job::MakeRoom(load, bytes))
    }

    /// A job of this load waits for a file whose server does not answer. `is_opening` tells
    /// whether that job opens the load.
    pub(crate) fn stall(&mut self, load: L, is_opening: bool) {
        if is_opening {
            self.stalled_opening.push(load.clone());
        }
        if !self.stalled.contains(&load) {
            self.stalled.push(load);
        }
    }

    /// None of this load's jobs waits any more.
    pub(crate) fn resume(&mut self, load: &L) {
        self.stalled.retain(|other| other != load);
        self.stalled_opening.retain(|other| other != load);
        let (resumed, parked) = std::mem::take(&mut self.parked).into_iter().partition(|job| job.load() == load);
        self.parked = parked;
        self.urgent.extend::<VecDeque<_>>(resumed);
    }

    /// Nobody will do this job: what was taken for it comes back.
    pub(crate) fn decline(&mut self, job: &Job<L>) {
        match job {
            Job::Open(_) => self.end(),
            Job::Allocate(load, _, need) => {
                self.give_back(load, *need);
                self.budget.give_back(load, need.held_bytes);
            }
            Job::MakeRoom(..) => self.making_room = false,
            Job::Check(..) | Job::Finish(..) => {}
        }
    }

    /// A permit, all of it or nothing.
    fn take(&mut self, load: &L, need: Need) -> Permitted {
        let bytes = self.window.take(load, need.file_system, need.bytes);
        if bytes != Permitted::Yes {
            return bytes;
        }
        if self.files.take(load, need.file_system, need.files) == Permitted::Yes {
            return Permitted::Yes;
        }
        self.window.give_back(load, need.file_system, need.bytes);
        // Who waits for files waits for other loads of many files, and need not keep those of large ones waiting.
        Permitted::HasItsPart
    }

    /// The consumer of a load has taken a segment with so much memory.
    pub(crate) fn consumed(&mut self, load: &L, bytes: u64) {
        // One whose last batch was given out has no turn any more.
        if let Some(turn) = self.turns.iter_mut().find(|turn| turn.load == *load) {
            turn.ahead = turn.ahead.checked_sub(bytes).expect("a consumer takes what was allocated");
        }
    }

    /// A permit comes back.
    pub(crate) fn give_back(&mut self, load: &L, need: Need) {
        self.window.give_back(load, need.file_system, need.bytes);
        self.files.give_back(load, need.file_system, need.files);
        if need.bytes > 0 {
            self.watched.retain(|&other| other != need.file_system);
            self.silent.retain(|&other| other != need.file_system);
        }
    }

    /// A load failed or was dropped: nothing more is to be done for it. Whether it was opened is for the caller to
    /// know; one that was must be ended too.
    pub(crate) fn forget(&mut self, load: &L) {
        self.waiting.retain(|other| other != load);
        self.urgent.retain(|job| job.load() != load);
        self.parked.retain(|job| job.load() != load);
        self.turns.retain(|turn| turn.load != *load);
        self.turns.iter_mut().for_each(|turn| turn.waits_for.retain(|other| other != load));
        self.is_opened(load);
        self.budget.close(load);
    }

    /// Memory of a load is freed, and memory of the pool.
    pub(crate) fn freed(&mut self, load: &L, held: u64, pooled: u64) {
        self.budget.give_back(load, held);
        self.budget.unpool(pooled);
        self.making_room = false;
    }

    /// Memory that a load held is in the pool now.
    pub(crate) fn pooled(&mut self, load: &L, bytes: u64) {
        self.budget.pool(load, bytes);
        self.making_room = false;
    }

    /// Memory of the pool is used again, by a load that has taken as much.
    pub(crate) fn unpooled(&mut self, bytes: u64) {
        self.budget.unpool(bytes);
        self.making_room = false;
    }

    /// How much memory is held by anybody, and in the pool.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.budget.there()
    }

    /// An opened load holds no files any more.
    pub(crate) fn end(&mut self) {
        self.open = self.open.saturating_sub(1);
    }

    /// Whether there is nothing to be done, now or later.
    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        let done = |turn: &LoadTurn<L>| turn.next == turn.demand.batches.len();
        self.waiting.is_empty() && self.urgent.is_empty() && self.parked.is_empty() && self.turns.iter().all(done)
    }

    #[cfg(test)]
    pub(crate) fn open_loads(&self) -> usize {
        self.open
    }

    /// How much memory has permits.
    pub(crate) fn window_taken_bytes(&self) -> u64 {
        self.window.taken_bytes()
    }

    #[cfg(test)]
    pub(crate) fn window_held_bytes(&self, load: &L) -> u64 {
        self.window.held_by(load)
    }
}

#[cfg(test)]
mod tests;
