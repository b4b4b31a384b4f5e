//! Keeps track of the worker threads and of what they are waiting for. This is pure bookkeeping,
//! protected by the lock of [`super::jobs`].
//!
//! A worker that opens, checks or closes a file may have to wait for a server (of a FUSE or
//! network file system) that never answers. A worker that has waited longer than [`STALLED_AFTER`]
//! ([`NEXT_STALLED_AFTER`] while another is stalled) is *stalled*: it no longer counts toward the
//! target number of workers, so another one takes its place, up to [`MOST_SUBSTITUTES`]. When a
//! stalled worker resumes, a surplus one exits.
//!
//! Until the server has answered, a stalled worker's load gets no further jobs that may wait for
//! files. Thus a load whose server hangs ties up the workers that are already waiting for it, but
//! no others.
//!
//! Each file that a worker opens for a batch counts as progress, so a worker is not stalled just
//! because its batch has many files.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::support::id::LoadId;

/// How long a worker may wait for a file before it counts as stalled. A local file system answers
/// within milliseconds, even if its disk is busy. Mistaking a slow worker for a stalled one costs
/// an extra thread and delays the load's other jobs that need files until the worker makes
/// progress.
pub(super) const STALLED_AFTER: Duration = Duration::from_secs(1);

/// Used instead of [`STALLED_AFTER`] while some worker is stalled. Other workers may get stuck on
/// the same unresponsive server one after another, and must be detected quickly.
const NEXT_STALLED_AFTER: Duration = Duration::from_millis(100);

/// How long to wait before trying again to start a worker.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// The maximum number of workers that replace stalled ones. The number is limited because each
/// thread needs a stack. It equals the default limit on open loads.
pub(super) const MOST_SUBSTITUTES: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct WorkerId(u64);

impl WorkerId {
    /// The number of the worker within its loader, counted from 0.
    pub(super) fn number(self) -> u64 {
        self.0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) load: LoadId,
    /// Whether the task opens the load.
    pub(super) is_open: bool,
}

#[derive(Debug, Default)]
struct Worker {
    task: Option<Task>,
    /// When the worker began to wait for a file; `None` if it is not waiting for one.
    at_files_since: Option<Instant>,
    stalled: bool,
}

/// The workers of a loader; see the module documentation.
#[derive(Debug)]
pub(super) struct Workers {
    /// The target number of workers, not counting stalled ones.
    wanted: usize,
    hired: u64,
    workers: HashMap<WorkerId, Worker>,
}

impl Workers {
    pub(super) fn new(wanted: usize) -> Self {
        Workers { wanted, hired: 0, workers: HashMap::new() }
    }

    /// Sets the target number of workers, not counting stalled ones.
    pub(super) fn want(&mut self, wanted: usize) {
        self.wanted = wanted;
    }

    fn worker(&mut self, id: WorkerId) -> &mut Worker {
        self.workers.get_mut(&id).expect("a worker should exist until it leaves")
    }

    /// Whether a worker is working for this load, and so may hold some of its memory.
    pub(super) fn is_any_working_for(&self, load: LoadId) -> bool {
        self.workers.values().any(|worker| worker.task.is_some_and(|task| task.load == load))
    }

    fn stalled(&self) -> usize {
        self.workers.values().filter(|worker| worker.stalled).count()
    }

    pub(super) fn hire(&mut self) -> WorkerId {
        let id = WorkerId(self.hired);
        self.hired += 1;
        self.workers.insert(id, Worker::default());
        id
    }

    /// Returns how many workers are missing and may be hired.
    pub(super) fn missing(&self) -> usize {
        let most = (self.wanted + MOST_SUBSTITUTES).saturating_sub(self.workers.len());
        (self.wanted + self.stalled()).saturating_sub(self.workers.len()).min(most)
    }

    /// Whether all workers that may exist are stalled.
    pub(super) fn is_exhausted(&self) -> bool {
        self.stalled() >= self.wanted + MOST_SUBSTITUTES
    }

    /// Whether a worker that is not stalled should exit.
    pub(super) fn is_overstaffed(&self) -> bool {
        self.workers.len() > self.wanted + self.stalled()
    }

    /// Removes a worker that exits or could not be started.
    pub(super) fn leave(&mut self, id: WorkerId) {
        let worker = self.workers.remove(&id).expect("a worker should leave only once");
        assert!(worker.task.is_none(), "a worker must not leave while it has a task");
    }

    /// Begins a task. `at_files_since` is when it began to wait for a file; `None` if it does not
    /// begin with such a wait.
    pub(super) fn begin(&mut self, id: WorkerId, task: Task, at_files_since: Option<Instant>) {
        let worker = self.worker(id);
        assert!(worker.task.is_none(), "a worker must have only one task at a time");
        *worker = Worker { task: Some(task), at_files_since, stalled: false };
    }

    /// Records that a worker made progress. `at_files_since` is when it may have begun to wait for
    /// its next file; `None` if it is done with files. Returns its load if this was the load's
    /// last stalled worker.
    #[must_use]
    pub(super) fn proceed(&mut self, id: WorkerId, at_files_since: Option<Instant>) -> Option<LoadId> {
        let worker = self.worker(id);
        worker.at_files_since = at_files_since;
        let was_stalled = std::mem::take(&mut worker.stalled);
        let task = worker.task.expect("only a worker with a task should make progress");
        self.resumed(was_stalled.then_some(task))
    }

    /// Ends a worker's task. Returns its load if this was the load's last stalled worker.
    #[must_use]
    pub(super) fn end(&mut self, id: WorkerId) -> Option<LoadId> {
        let ended = std::mem::take(self.worker(id));
        self.resumed(ended.task.filter(|_| ended.stalled))
    }

    fn resumed(&self, task: Option<Task>) -> Option<LoadId> {
        let is_stalled =
            |load| self.workers.values().any(|worker| worker.stalled && worker.task.is_some_and(|task| task.load == load));
        task.map(|task| task.load).filter(|&load| !is_stalled(load))
    }

    /// Returns how long a worker may currently wait for a file before it counts as stalled.
    pub(super) fn patience(&self) -> Duration {
        if self.stalled() > 0 { NEXT_STALLED_AFTER } else { STALLED_AFTER }
    }

    /// Returns how long until the next check is due; `None` if no check is needed before a worker
    /// waits for a file.
    pub(super) fn next_check(&self, now: Instant) -> Option<Duration> {
        let patience = self.patience();
        let waiting = self.workers.values().filter(|worker| !worker.stalled).filter_map(|worker| worker.at_files_since);
        let next = waiting.map(|since| patience.saturating_sub(now.saturating_duration_since(since))).min();
        next.into_iter().chain((self.missing() > 0).then_some(RETRY_AFTER)).min()
    }

    /// Marks the workers that have become stalled, and returns their tasks.
    pub(super) fn find_stalled(&mut self, now: Instant) -> Vec<Task> {
        let (patience, mut found) = (self.patience(), Vec::new());
        for worker in self.workers.values_mut().filter(|worker| !worker.stalled) {
            let since = worker.at_files_since.filter(|&since| now.saturating_duration_since(since) >= patience);
            if let (Some(_), Some(task)) = (since, worker.task) {
                worker.stalled = true;
                found.push(task);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(load: u64) -> Task {
        Task { load: LoadId(load), is_open: false }
    }

    #[test]
    fn stalled_workers_are_replaced_and_surplus_ones_end() {
        let mut workers = Workers::new(2);
        let now = Instant::now();
        let late = now + STALLED_AFTER;
        let (first, second) = (workers.hire(), workers.hire());
        workers.begin(first, task(7), Some(now));
        workers.begin(second, task(7), Some(now));
        assert_eq!(workers.find_stalled(late - Duration::from_millis(1)), []);
        assert_eq!(workers.next_check(late - Duration::from_millis(1)), Some(Duration::from_millis(1)));
        assert_eq!((workers.missing(), workers.is_overstaffed()), (0, false));
        assert_eq!(workers.find_stalled(late), [task(7), task(7)]);
        assert_eq!(workers.find_stalled(late), [], "each stalled worker should be found only once");
        assert_eq!((workers.missing(), workers.next_check(late)), (2, Some(RETRY_AFTER)));
        let third = workers.hire();
        assert_eq!((workers.missing(), workers.is_overstaffed()), (1, false));
        workers.hire();
        assert_eq!(workers.next_check(late), None, "the stalled workers were already found");
        workers.begin(third, task(8), Some(late));
        assert_eq!(workers.next_check(late), Some(NEXT_STALLED_AFTER), "while a worker is stalled, others should stall sooner");
        assert_eq!(workers.end(third), None);
        assert_eq!(workers.end(first), None, "the load's second worker is still stalled");
        assert!(workers.is_overstaffed());
        workers.leave(first);
        assert!(!workers.is_overstaffed());
        assert_eq!(workers.proceed(second, Some(late)), Some(LoadId(7)), "the last stalled worker of load 7 has made progress");
        assert!(workers.is_overstaffed());
        workers.leave(third);
        assert!(!workers.is_overstaffed());
        assert_eq!(workers.end(second), None, "the worker was no longer stalled");
        assert_eq!(workers.next_check(late), None);
    }

    #[test]
    fn only_workers_that_wait_for_files_stall() {
        let mut workers = Workers::new(1);
        let worker = workers.hire();
        let now = Instant::now();
        workers.begin(worker, task(1), None);
        assert_eq!(workers.next_check(now), None);
        assert_eq!(
            workers.find_stalled(now + 100 * STALLED_AFTER),
            [],
            "the worker allocates memory and does not wait for a file"
        );
        assert_eq!(workers.proceed(worker, Some(now + 100 * STALLED_AFTER)), None);
        assert_eq!(workers.find_stalled(now + 100 * STALLED_AFTER), []);
        assert_eq!(workers.find_stalled(now + 101 * STALLED_AFTER), [task(1)]);
        assert_eq!(workers.proceed(worker, None), Some(LoadId(1)), "the worker should proceed, since its files are open");
        assert_eq!(workers.next_check(now), None);
        assert_eq!(
            workers.find_stalled(now + 200 * STALLED_AFTER),
            [],
            "the worker allocates memory and does not wait for a file"
        );
    }

    #[test]
    fn substitutes_are_bounded() {
        let mut workers = Workers::new(2);
        let now = Instant::now();
        workers.hire();
        workers.hire();
        let mut load = 0;
        while !workers.is_exhausted() {
            let free: Vec<_> = workers.workers.iter().filter(|(_, worker)| worker.task.is_none()).map(|(&id, _)| id).collect();
            for id in free {
                load += 1;
                workers.begin(id, task(load), Some(now));
            }
            assert!(!workers.find_stalled(now + STALLED_AFTER).is_empty());
            for _ in 0..workers.missing() {
                workers.hire();
            }
        }
        assert_eq!((load, workers.missing()), (2 + MOST_SUBSTITUTES as u64, 0));
    }
}
