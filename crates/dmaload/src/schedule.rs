//! Who is served next: the scheduler of opening, allocating and finishing, over all loads of a loader.
//!
//! Pure bookkeeping, driven by the worker threads under one lock. Loads take turns, one batch each, so a large one
//! can't starve a small one; when the batch whose turn it is does not fit into the window, nobody overtakes it,
//! so a small one can't starve a large one either. The number of loads that are open at once is bounded; the
//! others wait in the order they came.

use std::collections::VecDeque;

use crate::window::Window;

/// Something for a worker thread to do. `L` names a load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Job<L> {
    /// Open the files, read their headers, plan.
    Open(L),
    /// Allocate the batch of this number, for which the permit is taken.
    Allocate(L, usize, Need),
    /// All reads of a file are done: see whether it is still the file that was opened.
    Check(L, usize),
    /// All bytes of a memory are there: make it a dma-buf.
    Export(L, usize),
}

/// What a batch takes until it is full: what its permit is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Need {
    /// Memory.
    pub(crate) bytes: u64,
    /// Files that are opened for it.
    pub(crate) files: u64,
}

impl<L> Job<L> {
    /// The load that it is for.
    pub(crate) fn load(&self) -> &L {
        match self {
            Job::Open(load) | Job::Allocate(load, ..) | Job::Check(load, _) | Job::Export(load, _) => load,
        }
    }
}

#[derive(Debug)]
struct Turn<L> {
    load: L,
    /// What each batch takes, in order.
    batches: Vec<Need>,
    next: usize,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Scheduler<L> {
    window: Window,
    /// How many files may be open for batches that are not full. Counted like the window's bytes.
    files: Window,
    max_open: usize,
    open: usize,
    waiting: VecDeque<L>,
    /// What comes before anything else: a consumer waits for it.
    urgent: VecDeque<Job<L>>,
    turns: VecDeque<Turn<L>>,
}

impl<L: Clone + PartialEq> Scheduler<L> {
    pub(crate) fn new(window_bytes: u64, files: u64, max_open: usize) -> Self {
        Scheduler {
            window: Window::new(window_bytes),
            files: Window::new(files),
            max_open,
            open: 0,
            waiting: VecDeque::new(),
            urgent: VecDeque::new(),
            turns: VecDeque::new(),
        }
    }

    /// A new load. It is opened when its turn comes; from then on it counts as open until [`Self::end`].
    pub(crate) fn submit(&mut self, load: L) {
        self.waiting.push_back(load);
    }

    /// A load was opened and planned: these are its batches.
    pub(crate) fn opened(&mut self, load: L, batches: Vec<Need>) {
        self.turns.push_back(Turn { load, batches, next: 0 });
    }

    /// All pieces of this file are full.
    pub(crate) fn file_read(&mut self, load: L, file: usize) {
        self.urgent.push_back(Job::Check(load, file));
    }

    /// All pieces of this memory are full.
    pub(crate) fn memory_read(&mut self, load: L, memory: usize) {
        self.urgent.push_back(Job::Export(load, memory));
    }

    /// The next thing to do, if there is one now.
    pub(crate) fn next(&mut self) -> Option<Job<L>> {
        if let Some(job) = self.urgent.pop_front() {
            return Some(job);
        }
        if self.open < self.max_open
            && let Some(load) = self.waiting.pop_front()
        {
            self.open += 1;
            return Some(Job::Open(load));
        }
        while let Some(mut turn) = self.turns.pop_front() {
            let Some(&need) = turn.batches.get(turn.next) else { continue };
            if !self.take(need) {
                self.turns.push_front(turn);
                return None;
            }
            let job = Job::Allocate(turn.load.clone(), turn.next, need);
            turn.next += 1;
            self.turns.push_back(turn);
            return Some(job);
        }
        None
    }

    /// Nobody will do this job: what was taken for it comes back.
    pub(crate) fn decline(&mut self, job: &Job<L>) {
        match job {
            Job::Open(_) => self.end(),
            Job::Allocate(_, _, need) => self.give_back(*need),
            Job::Check(..) | Job::Export(..) => {}
        }
    }

    /// A permit, all of it or nothing.
    fn take(&mut self, need: Need) -> bool {
        let taken = self.window.take(need.bytes);
        if taken && !self.files.take(need.files) {
            self.window.give_back(need.bytes);
            return false;
        }
        taken
    }

    /// A permit comes back.
    pub(crate) fn give_back(&mut self, need: Need) {
        self.window.give_back(need.bytes);
        self.files.give_back(need.files);
    }

    /// A load failed or was dropped: nothing more is to be done for it. Whether it was opened is for the caller to
    /// know; one that was must be ended too.
    pub(crate) fn forget(&mut self, load: &L) {
        self.waiting.retain(|other| other != load);
        self.urgent.retain(|job| job.load() != load);
        self.turns.retain(|turn| turn.load != *load);
    }

    /// An opened load holds no files any more.
    pub(crate) fn end(&mut self) {
        self.open = self.open.saturating_sub(1);
    }

    /// Whether there is nothing to be done, now or later.
    #[cfg(test)]
    pub(crate) fn is_idle(&self) -> bool {
        let done = |turn: &Turn<L>| turn.next == turn.batches.len();
        self.waiting.is_empty() && self.urgent.is_empty() && self.turns.iter().all(done)
    }

    #[cfg(test)]
    pub(crate) fn open_loads(&self) -> usize {
        self.open
    }

    #[cfg(test)]
    pub(crate) fn window_taken_bytes(&self) -> u64 {
        self.window.taken_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(bytes: u64) -> Need {
        Need { bytes, files: 0 }
    }

    fn opened(window: u64, loads: &[(u32, &[u64])]) -> Scheduler<u32> {
        let mut scheduler = Scheduler::new(window, 100, 8);
        for &(load, batches) in loads {
            scheduler.submit(load);
            assert_eq!(scheduler.next(), Some(Job::Open(load)));
            scheduler.opened(load, batches.iter().map(|&bytes| need(bytes)).collect());
        }
        scheduler
    }

    fn drain(scheduler: &mut Scheduler<u32>) -> Vec<Job<u32>> {
        std::iter::from_fn(|| scheduler.next()).collect()
    }

    #[test]
    fn loads_take_turns() {
        let mut scheduler = opened(100, &[(1, &[10, 10, 10]), (2, &[10])]);
        let jobs = drain(&mut scheduler);
        assert_eq!(
            jobs,
            [
                Job::Allocate(1, 0, need(10)),
                Job::Allocate(2, 0, need(10)),
                Job::Allocate(1, 1, need(10)),
                Job::Allocate(1, 2, need(10))
            ]
        );
    }

    #[test]
    fn nothing_is_allocated_beyond_the_window_and_nobody_overtakes() {
        let mut scheduler = opened(25, &[(1, &[10, 20]), (2, &[10, 1])]);
        assert_eq!(drain(&mut scheduler), [Job::Allocate(1, 0, need(10)), Job::Allocate(2, 0, need(10))]);
        scheduler.give_back(need(10));
        assert_eq!(drain(&mut scheduler), [], "the large batch of load 1 waits, and the small one of load 2 behind it");
        scheduler.give_back(need(10));
        assert_eq!(drain(&mut scheduler), [Job::Allocate(1, 1, need(20)), Job::Allocate(2, 1, need(1))]);
        assert_eq!(scheduler.window_taken_bytes(), 21);
    }

    #[test]
    fn no_more_files_are_open_than_may_be() {
        let mut scheduler = Scheduler::new(100, 3, 8);
        scheduler.submit(1);
        assert_eq!(scheduler.next(), Some(Job::Open(1)));
        let need = Need { bytes: 1, files: 2 };
        scheduler.opened(1, vec![need; 2]);
        assert_eq!(drain(&mut scheduler), [Job::Allocate(1, 0, need)]);
        assert_eq!(scheduler.window_taken_bytes(), 1, "what did not fit holds nothing");
        scheduler.give_back(need);
        assert_eq!(drain(&mut scheduler), [Job::Allocate(1, 1, need)]);
    }

    #[test]
    fn only_so_many_loads_are_open_at_once() {
        let mut scheduler = Scheduler::new(100, 100, 2);
        for load in 0..4 {
            scheduler.submit(load);
        }
        assert_eq!(drain(&mut scheduler), [Job::Open(0), Job::Open(1)]);
        scheduler.end();
        assert_eq!(drain(&mut scheduler), [Job::Open(2)]);
    }

    #[test]
    fn a_forgotten_load_gets_no_more_jobs() {
        let mut scheduler = opened(100, &[(1, &[10, 10]), (2, &[10])]);
        scheduler.submit(3);
        scheduler.file_read(1, 0);
        scheduler.memory_read(1, 0);
        for load in [1, 3] {
            scheduler.forget(&load);
        }
        assert_eq!(drain(&mut scheduler), [Job::Allocate(2, 0, need(10))]);
    }
}
