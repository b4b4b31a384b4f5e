//! The scheduler: decides which load is opened, allocated for or finished next, across all loads
//! of a loader.
//!
//! This is pure bookkeeping, under the lock of [`super::jobs`].
//!
//! Loads take turns, one batch each, so a large load can't starve a small one. If a batch does not
//! fit into the window, or exceeds a share of it (see [`crate::memory::window`]), its load has to
//! wait. Small loads can't starve a large one either, because not every load may overtake one that
//! is waiting:
//!
//! - If the waiting load already holds bytes of the window, any load may overtake it.
//! - If it holds none, but other loads from its file system do, only loads from other file systems
//!   may overtake it.
//! - If no load from its file system holds any, no load may overtake it.
//!
//! The number of open loads is bounded; further loads wait in order of arrival. Among the open
//! loads, those with a higher priority get memory first.
//!
//! If memory is limited, loads start in order of arrival, each once there is enough free memory
//! for its reservation (see [`crate::memory::budget`]). A load that holds its share is passed over
//! until its consumer drops memory. Even without a limit, the memory that a stream allocates ahead
//! of its consumer is bounded: a stream that is far ahead is passed over until its consumer takes
//! a segment.
//!
//! A load is *stalled* while one of its jobs is waiting for a file whose server is not answering.
//! A stalled load gets no further jobs that may wait for files, does not hold up others, and does
//! not count as open if the stalled job is the one that opens it.
//!
//! A file system is *silent*, meaning that it has stopped responding, if loads from it hold bytes
//! of the window and have not returned any for a long time
//! ([`Scheduler::find_silent_file_systems`]). Loads from silent file systems, up to
//! [`MOST_SILENT`] in total, don't count as open either. Otherwise, they would keep loads from
//! other file systems from being opened.

use std::collections::VecDeque;

use crate::memory::budget::{Admitted, Budget, Taken};
use crate::memory::window::{Permitted, Window};
use crate::options::choices::Priority;
use crate::plan::{BATCH_BYTES, BATCH_FILES};

/// A job for a worker thread. `L` identifies a load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Job<L> {
    /// Open or inspect the files, read their headers, and plan.
    Open(L),
    /// Allocate the batch with this number, whose permit is already taken.
    Allocate(L, usize, Need),
    /// Check that a file that was read completely has not changed since the load was planned.
    Check(L, usize),
    /// Finish a full allocation: move tensors within it, and export it as a dma-buf.
    Finish(L, usize),
    /// Free this many bytes of the pool, because the load is waiting for memory.
    MakeRoom(L, u64),
}

/// The resources that a batch takes: those of its permit, and bytes of the memory budget.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Need {
    /// How many bytes of the window the batch takes.
    pub(crate) bytes: u64,
    /// How many of the batch's pieces belong to small files.
    pub(crate) files: u64,
    /// Bytes that the load takes from the budget for this batch. The first batch of an allocation
    /// takes the bytes of the whole allocation, because memory from the pool comes in whole
    /// allocations. Later batches take 0.
    pub(crate) held_bytes: u64,
    /// The file system that the batch is read from. If small files from several file systems share
    /// the batch, this is the file system of the first one.
    pub(crate) file_system: u64,
}

impl<L> Job<L> {
    pub(crate) fn load(&self) -> &L {
        match self {
            Job::Open(load) | Job::Allocate(load, ..) | Job::Check(load, _) | Job::Finish(load, _) | Job::MakeRoom(load, _) => {
                load
            }
        }
    }
}

/// The resources that a planned load needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LoadNeeds {
    /// The needs of each batch, in order.
    pub(crate) batches: Vec<Need>,
    /// How many bytes of memory the load must be able to hold to make progress.
    pub(crate) reserved_bytes: u64,
    /// The maximum amount of allocated memory that the consumer has not taken yet. An allocation
    /// that would exceed this is made only once the consumer has taken everything before it.
    /// `None` if the consumer keeps the whole load anyway.
    pub(crate) ahead_bytes: Option<u64>,
    pub(crate) priority: Priority,
}

impl LoadNeeds {
    /// The file system of the load's first batch; `None` for a stream and for a load without
    /// batches.
    fn kept_from(&self) -> Option<u64> {
        self.batches.first().filter(|_| self.ahead_bytes.is_none()).map(|need| need.file_system)
    }
}

/// The needs of a load that can continue only after its consumer drops segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeldUp {
    /// The number of bytes that the consumer holds.
    pub(crate) held_bytes: u64,
    /// The size of the load's next allocation.
    pub(crate) wanted_bytes: u64,
}

#[derive(Debug)]
struct LoadTurn<L> {
    load: L,
    demand: LoadNeeds,
    next: usize,
    /// Bytes that are allocated and that the consumer has not taken yet.
    ahead: u64,
    /// Whether the memory for this load is reserved.
    admitted: bool,
    /// Loads that arrived before this one and are still being opened.
    waits_for: Vec<L>,
}

impl<L> LoadTurn<L> {
    /// Whether the load's next batch starts an allocation that has to wait for the consumer.
    fn is_far_ahead(&self, need: Need) -> bool {
        let most = self.demand.ahead_bytes.unwrap_or(u64::MAX);
        need.held_bytes > 0 && self.ahead > 0 && self.ahead.saturating_add(need.held_bytes) > most
    }
}

/// The maximum number of loads that do not count as open because their file systems have stopped
/// responding. There is a limit because each of these loads has open files.
const MOST_SILENT: usize = 64;

/// Decides which job is next; see the module documentation.
#[derive(Debug)]
pub(crate) struct Scheduler<L> {
    window: Window<L>,
    budget: Budget<L>,
    /// Whether a [`Job::MakeRoom`] was issued and no memory has been freed since.
    making_room: bool,
    /// Permits for open small files, accounted for like the window's bytes, but per load.
    files: Window<L>,
    max_open: usize,
    open: usize,
    waiting: VecDeque<L>,
    /// Loads that are being opened, in order of arrival.
    opening: Vec<L>,
    /// Jobs that are handed out before all others, because a consumer is waiting for them.
    urgent: VecDeque<Job<L>>,
    turns: VecDeque<LoadTurn<L>>,
    stalled: Vec<L>,
    /// The loads whose opening is stalled, including forgotten ones.
    stalled_opening: Vec<L>,
    /// [`Job::Check`] jobs of stalled loads, set aside until the loads resume.
    parked: VecDeque<Job<L>>,
    /// File systems that have held permits since the last check and returned none.
    watched: Vec<u64>,
    /// The file systems that were already in `watched` at the previous check.
    silent: Vec<u64>,
}

impl<L: Clone + PartialEq> Scheduler<L> {
    pub(crate) fn new(window_bytes: u64, memory_bytes: u64, files: u64, max_open: usize) -> Self {
        Scheduler {
            window: Window::new(window_bytes, BATCH_BYTES),
            budget: Budget::new(memory_bytes),
            making_room: false,
            // Shares are per load, not per file system: loads that hold few files each must not
            // starve a load from the same file system that needs many.
            files: Window::per_load(files, BATCH_FILES as u64),
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

    /// Adds a new load. From its [`Job::Open`] on, it counts as open until [`Self::end`].
    pub(crate) fn submit(&mut self, load: L) {
        self.waiting.push_back(load);
    }

    /// Records that a load was opened and planned.
    pub(crate) fn opened(&mut self, load: L, demand: LoadNeeds) {
        let came_before = self.opening.iter().position(|other| *other == load).unwrap_or(0);
        let waits_for = self.opening.get(..came_before).unwrap_or_default().to_vec();
        self.remove_opening(&load);
        // Loads that arrived later but were opened sooner wait for this one.
        let later = |turn: &LoadTurn<L>| !turn.admitted && turn.waits_for.contains(&load);
        let at = self.turns.iter().position(later).unwrap_or(self.turns.len());
        self.turns.iter_mut().for_each(|turn| turn.waits_for.retain(|other| *other != load));
        self.turns.insert(at, LoadTurn { load, demand, next: 0, ahead: 0, admitted: false, waits_for });
    }

    fn remove_opening(&mut self, load: &L) {
        self.opening.retain(|other| other != load);
    }

    /// Records that all pieces of this file are full, so it has to be checked.
    pub(crate) fn file_read(&mut self, load: L, file: usize) {
        self.urgent.push_back(Job::Check(load, file));
    }

    /// Records that all pieces of this allocation are full, so it has to be finished.
    pub(crate) fn memory_read(&mut self, load: L, memory: usize) {
        self.urgent.push_back(Job::Finish(load, memory));
    }

    /// Takes the next job, if one can start now.
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
        self.next_batch()
    }

    /// How many loads count as open.
    fn counted_open(&self) -> usize {
        self.open.saturating_sub(self.stalled_opening.len() + self.silent_loads())
    }

    /// Returns how many loads hold or wait for bytes of the window for reads from silent file
    /// systems, but at most [`MOST_SILENT`].
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

    /// Whether loads are waiting to be opened because the maximum number of loads is already open.
    pub(crate) fn lacks_places(&self) -> bool {
        !self.waiting.is_empty() && self.counted_open() >= self.max_open
    }

    /// Finds file systems that have held permits since the last call and returned none. Must be
    /// called periodically while [`Self::lacks_places`]. Returns whether the number of silent file
    /// systems has grown.
    pub(crate) fn find_silent_file_systems(&mut self) -> bool {
        let mut holding: Vec<_> = self.window.holders().map(|(_, file_system)| file_system).collect();
        holding.sort_unstable();
        holding.dedup();
        let before = self.silent.len();
        self.silent = holding.iter().copied().filter(|file_system| self.watched.contains(file_system)).collect();
        self.watched = holding;
        self.silent.len() > before
    }

    /// Closes the accounts of loads whose last batch was handed out. Must run before
    /// [`Self::admit`], since other loads may be waiting for what these loads had reserved.
    fn close_done(&mut self) {
        let is_done = |turn: &LoadTurn<L>| turn.next == turn.demand.batches.len();
        for done in self.turns.iter().filter(|turn| is_done(turn)) {
            self.budget.close(&done.load);
        }
        self.turns.retain(|turn| !is_done(turn));
    }

    /// Admits loads in order, while their reservations fit.
    fn admit(&mut self) {
        // File systems that have a load waiting for memory reserved by other loads from the same
        // file system. No further load from that file system overtakes the waiting one.
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
                    Admitted::FileSystemAtShare => waited_for.extend(kept_from),
                    // No load overtakes one that does not fit.
                    Admitted::No => return,
                }
            }
        }
    }

    /// Takes the next batch, from the load whose turn it is.
    fn next_batch(&mut self) -> Option<Job<L>> {
        let mut short = None;
        // File systems that have a load waiting for permits held by other loads from the same file
        // system. No further load from that file system overtakes the waiting one.
        let mut waited_for = Vec::new();
        for priority in Priority::DOWN {
            let mut at = 0;
            while let Some(turn) = self.turns.get(at) {
                let need = *turn.demand.batches.get(turn.next).expect("a load with a turn should have a next batch");
                if turn.demand.priority != priority || !turn.admitted || self.stalled.contains(&turn.load) {
                    at += 1;
                    continue;
                }
                // A load that is far ahead of its consumer has to wait for it, but does not hold
                // up other loads.
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
                            Permitted::FileSystemAtShare => waited_for.push(need.file_system),
                            Permitted::Yes | Permitted::LoadAtShare => {}
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

    /// Records that a job of this load is waiting for a file whose server is not answering.
    /// `is_opening` says whether that job opens the load.
    pub(crate) fn stall(&mut self, load: L, is_opening: bool) {
        if is_opening {
            self.stalled_opening.push(load.clone());
        }
        if !self.stalled.contains(&load) {
            self.stalled.push(load);
        }
    }

    /// Records that none of this load's jobs are stalled any longer.
    pub(crate) fn resume(&mut self, load: &L) {
        self.stalled.retain(|other| other != load);
        self.stalled_opening.retain(|other| other != load);
        let (resumed, parked) = std::mem::take(&mut self.parked).into_iter().partition(|job| job.load() == load);
        self.parked = parked;
        self.urgent.extend::<VecDeque<_>>(resumed);
    }

    /// Undoes a job that will not be run, by giving back the permits that were taken for it.
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

    /// Takes a permit for bytes and files. If either is not available, takes nothing.
    fn take(&mut self, load: &L, need: Need) -> Permitted {
        let bytes = self.window.take(load, need.file_system, need.bytes);
        if bytes != Permitted::Yes {
            return bytes;
        }
        if self.files.take(load, need.file_system, need.files) == Permitted::Yes {
            return Permitted::Yes;
        }
        self.window.give_back(load, need.file_system, need.bytes);
        // A load that finds no free file permits waits for other loads with many files, and need
        // not hold up loads of large files.
        Permitted::LoadAtShare
    }

    /// Records that the consumer of a load has taken a segment of this much memory.
    pub(crate) fn consumed(&mut self, load: &L, bytes: u64) {
        // A load whose last batch was handed out no longer has a turn.
        if let Some(turn) = self.turns.iter_mut().find(|turn| turn.load == *load) {
            turn.ahead = turn.ahead.checked_sub(bytes).expect("a consumer should take only allocated memory");
        }
    }

    /// Returns what the load needs if its next allocation exceeds the memory limit even though its
    /// consumer has taken all of its segments. The consumer must then drop some of them first.
    /// Memory that other loads can free is not taken into account, because a load can rely only on
    /// its reservation.
    pub(crate) fn held_up(&self, load: &L) -> Option<HeldUp> {
        let turn = self.turns.iter().find(|turn| turn.load == *load)?;
        let need = turn.demand.batches.get(turn.next).filter(|_| turn.admitted && turn.ahead == 0)?;
        let held_up = HeldUp { held_bytes: self.budget.held_by(load), wanted_bytes: need.held_bytes };
        (self.budget.may_take(load, need.held_bytes) == Taken::No).then_some(held_up)
    }

    /// Gives a permit back.
    pub(crate) fn give_back(&mut self, load: &L, need: Need) {
        self.window.give_back(load, need.file_system, need.bytes);
        self.files.give_back(load, need.file_system, need.files);
        if need.bytes > 0 {
            self.watched.retain(|&other| other != need.file_system);
            self.silent.retain(|&other| other != need.file_system);
        }
    }

    /// Removes a load that failed or was dropped. If the load counts as open, [`Self::end`] frees
    /// its place separately.
    pub(crate) fn forget(&mut self, load: &L) {
        self.waiting.retain(|other| other != load);
        self.urgent.retain(|job| job.load() != load);
        self.parked.retain(|job| job.load() != load);
        self.turns.retain(|turn| turn.load != *load);
        self.turns.iter_mut().for_each(|turn| turn.waits_for.retain(|other| other != load));
        self.remove_opening(load);
        self.budget.close(load);
    }

    /// Records that `held` bytes of a load's memory and `pooled` bytes of the pool were freed.
    pub(crate) fn freed(&mut self, load: &L, held: u64, pooled: u64) {
        self.budget.give_back(load, held);
        self.budget.unpool(pooled);
        self.making_room = false;
    }

    /// Records that memory formerly held by a load is now in the pool.
    pub(crate) fn pooled(&mut self, load: &L, bytes: u64) {
        self.budget.pool(load, bytes);
        self.making_room = false;
    }

    /// Records that memory from the pool is reused by a load, which has already taken the bytes
    /// from the budget.
    pub(crate) fn unpooled(&mut self, bytes: u64) {
        self.budget.unpool(bytes);
        self.making_room = false;
    }

    /// Returns how many bytes the loads hold and the pool keeps, in total.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.budget.present()
    }

    /// Records that an opened load no longer holds files or memory in the driver.
    pub(crate) fn end(&mut self) {
        self.open = self.open.saturating_sub(1);
    }

    /// Whether no job is available, and none will be without further events.
    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        let done = |turn: &LoadTurn<L>| turn.next == turn.demand.batches.len();
        self.waiting.is_empty() && self.urgent.is_empty() && self.parked.is_empty() && self.turns.iter().all(done)
    }

    #[cfg(test)]
    pub(crate) fn open_loads(&self) -> usize {
        self.open
    }

    /// How many bytes of the window are taken.
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
