//! The job queue: the scheduler and its loads under one lock, and the workers that wait for jobs.
//!
//! A change that may make a job available wakes one worker. A worker that gets a job wakes the
//! next one, because more jobs may have become available. `just loom` runs the tests in `tests`
//! with every interleaving of their threads that has at most three preemptions.
//!
//! Workers also drop the files and memory of loads that have ended. Closing a file may block, so
//! at most one worker at a time closes a load's files.
//!
//! Another thread runs [`Jobs::watch`]. It finds workers that have waited too long for files (see
//! [`super::workers`]). While loads are waiting for others to end, it also finds file systems that
//! have stopped responding, which the code calls *silent*.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::state::FollowUpJobs;
use super::workers::{Task, WorkerId, Workers};
use crate::engine::schedule::{HeldUp, Job, LoadNeeds, Need, Scheduler};
use crate::ring::pace::Pace;
use crate::support::foreign;
use crate::support::id::LoadId;
use crate::support::sync::{Condvar, Mutex, MutexGuard};

/// How often to check for file systems that have stopped responding, while loads are waiting for
/// others to end. A file system has stopped responding if its loads hold permits and return none
/// between two checks. In that time, even a server that delivers only 4 MiB/s completes a 16 MiB
/// batch.
const SILENCE_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The job queue; see the module documentation. `T` is a load.
#[derive(Debug)]
pub(super) struct Jobs<T> {
    schedule: Mutex<Schedule<T>>,
    changed: Condvar,
    /// Wakes the thread that watches the workers.
    watch: Condvar,
}

/// The findings of [`Jobs::watch`].
#[derive(Debug)]
pub(super) struct WatchReport {
    /// The tasks of workers that have become stalled.
    pub(super) stalled: Vec<Task>,
    /// Workers to start in place of stalled ones.
    pub(super) substitutes: Vec<WorkerId>,
    /// Whether all workers are stalled and no more may be started.
    pub(super) is_exhausted: bool,
}

#[derive(Debug)]
struct Schedule<T> {
    scheduler: Scheduler<LoadId>,
    loads: HashMap<LoadId, T>,
    next_id: u64,
    /// Whether new loads are refused.
    refusing: bool,
    /// Whether no more jobs are handed out.
    closing: bool,
    /// Whether workers may exit: the ring thread has exited, or a shutdown no longer waits for it.
    finished: bool,
    drop_queue: DropQueue,
    workers: Workers,
    /// The pace of the workers that allocate; its clock starts at `since`.
    pace: Pace,
    since: Instant,
    /// How many bytes each worker is allocating.
    allocating: HashMap<WorkerId, u64>,
    /// Whether the pace allows one more worker, which has not been hired yet.
    growing: bool,
    /// Whether the watching thread is sleeping until a worker has to wait for a file, or a load
    /// has to wait for other loads to end.
    watch_sleeps: bool,
    silence_checked_at: Instant,
}

/// Identifies a group of values that belonged to a load and have yet to be dropped. At most one
/// worker at a time drops values from a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum DropKey {
    /// The load's files. Closing them may wait for a server.
    Files(LoadId),
    /// The load's memory. Dropping it must not wait for the files.
    Memory(LoadId),
}

impl DropKey {
    fn load(self) -> LoadId {
        match self {
            DropKey::Files(load) | DropKey::Memory(load) => load,
        }
    }
}

/// Values that workers have to drop.
#[derive(Debug, Default)]
struct DropQueue {
    /// The values in each group. A group that a worker is dropping stays in the map and may be
    /// empty.
    parts: HashMap<DropKey, Vec<Box<dyn Any + Send>>>,
    /// The groups that no worker is dropping, in the order in which they are taken.
    order: VecDeque<DropKey>,
}

impl DropQueue {
    fn push(&mut self, left: DropKey, what: Box<dyn Any + Send>) {
        let part = self.parts.entry(left).or_insert_with(|| {
            self.order.push_back(left);
            Vec::new()
        });
        part.push(what);
    }

    /// Takes all values of a group that no worker is dropping, if such a group exists. The caller
    /// must call [`Self::dropped`] once it has dropped them.
    fn take(&mut self) -> Option<(DropKey, Vec<Box<dyn Any + Send>>)> {
        let left = self.order.pop_front()?;
        let part = self.parts.get_mut(&left).expect("a group should be kept until its values are dropped");
        Some((left, std::mem::take(part)))
    }

    /// Records that the values taken from a group were dropped, so another worker may take those
    /// added since.
    fn dropped(&mut self, left: DropKey) {
        if self.parts.get(&left).expect("a group should be kept until its values are dropped").is_empty() {
            self.parts.remove(&left);
        } else {
            self.order.push_back(left);
        }
    }
}

impl<T: Clone> Jobs<T> {
    pub(super) fn new(window_bytes: u64, memory_bytes: u64, files: u64, max_open: usize, pace: Pace) -> Self {
        let scheduler = Scheduler::new(window_bytes, memory_bytes, files, max_open);
        let schedule = Schedule {
            scheduler,
            loads: HashMap::new(),
            next_id: 0,
            refusing: false,
            closing: false,
            finished: false,
            drop_queue: DropQueue::default(),
            workers: Workers::new(pace.threads()),
            pace,
            since: Instant::now(),
            allocating: HashMap::new(),
            growing: false,
            watch_sleeps: false,
            silence_checked_at: Instant::now(),
        };
        Jobs { schedule: Mutex::new(schedule), changed: Condvar::new(), watch: Condvar::new() }
    }

    fn schedule(&self) -> MutexGuard<'_, Schedule<T>> {
        crate::support::sync::lock(&self.schedule)
    }

    pub(super) fn next_id(&self) -> LoadId {
        let mut schedule = self.schedule();
        schedule.next_id += 1;
        LoadId(schedule.next_id)
    }

    /// Adds a new load, which is opened when its turn comes. Returns `false` if no more loads are
    /// accepted.
    pub(super) fn submit(&self, id: LoadId, load: T) -> bool {
        let mut schedule = self.schedule();
        if schedule.refusing {
            return false;
        }
        schedule.loads.insert(id, load);
        schedule.scheduler.submit(id);
        self.wake_watch_for_places(&mut schedule);
        drop(schedule);
        self.changed.notify_one();
        true
    }

    /// Records that a load was opened and planned.
    pub(super) fn opened(&self, id: LoadId, demand: LoadNeeds) {
        let mut schedule = self.schedule();
        if schedule.loads.contains_key(&id) {
            schedule.scheduler.opened(id, demand);
        }
        drop(schedule);
        self.changed.notify_one();
    }

    /// Schedules follow-up jobs for a load, unless it was forgotten in the meantime.
    pub(super) fn schedule_follow_ups(&self, id: LoadId, follow_ups: FollowUpJobs) {
        if follow_ups == FollowUpJobs::default() {
            return;
        }
        let mut schedule = self.schedule();
        if schedule.loads.contains_key(&id) {
            if let Some(memory) = follow_ups.finish {
                schedule.scheduler.memory_read(id, memory);
            }
            if let Some(file) = follow_ups.check {
                schedule.scheduler.file_read(id, file);
            }
        }
        drop(schedule);
        self.changed.notify_one();
    }

    /// Gives a permit back.
    pub(super) fn give_back(&self, load: LoadId, need: Need) {
        let mut schedule = self.schedule();
        schedule.scheduler.give_back(&load, need);
        // If the permit's file system had stopped responding, its loads now count as open again.
        // Loads that are waiting to be opened may then have to wait until open ones end.
        self.wake_watch_for_places(&mut schedule);
        drop(schedule);
        self.changed.notify_one();
    }

    /// Updates the scheduler's memory accounts.
    pub(super) fn update_accounts(&self, change: impl FnOnce(&mut Scheduler<LoadId>)) {
        change(&mut self.schedule().scheduler);
        self.changed.notify_one();
    }

    /// If a load can continue only after its consumer drops segments, returns what the load needs.
    /// Returns `None` while a worker may hold memory of the load.
    pub(super) fn held_up(&self, id: LoadId) -> Option<HeldUp> {
        let schedule = self.schedule();
        if schedule.workers.is_any_working_for(id) { None } else { schedule.scheduler.held_up(&id) }
    }

    /// Returns how many bytes the loads hold and the pool keeps, in total.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.schedule().scheduler.memory_bytes()
    }

    /// Records that an opened load no longer holds files or memory in the driver, so another load
    /// may be opened.
    pub(super) fn end(&self) {
        self.schedule().scheduler.end();
        self.changed.notify_one();
    }

    /// Stops scheduling a load, and returns it.
    #[must_use = "dropping it may close files and run the caller's code: see `defer_drop`"]
    pub(super) fn forget(&self, id: LoadId) -> Option<T> {
        let mut schedule = self.schedule();
        schedule.scheduler.forget(&id);
        let load = schedule.loads.remove(&id);
        drop(schedule);
        // The load's waiting batch may have held up other loads.
        self.changed.notify_one();
        load
    }

    /// Queues `what` to be dropped by a worker, because the caller must not close files or unmap
    /// memory itself.
    pub(super) fn defer_drop(&self, left: DropKey, what: impl Send + 'static) {
        self.schedule().drop_queue.push(left, Box::new(what));
        self.changed.notify_one();
    }

    pub(super) fn load_of(&self, id: LoadId) -> Option<T> {
        self.schedule().loads.get(&id).cloned()
    }

    pub(super) fn is_scheduled(&self, id: LoadId) -> bool {
        self.schedule().loads.contains_key(&id)
    }

    /// Stops accepting new loads; returns the current ones.
    pub(super) fn refuse_loads(&self) -> Vec<T> {
        let mut schedule = self.schedule();
        schedule.refusing = true;
        schedule.loads.values().cloned().collect()
    }

    /// Drops the values that workers did not drop before they exited. A group that a worker is
    /// still dropping is left to that worker.
    pub(super) fn drop_deferred(&self) {
        loop {
            let taken = self.schedule().drop_queue.take();
            let Some((left, part)) = taken else { return };
            part.into_iter().for_each(foreign::discard);
            self.schedule().drop_queue.dropped(left);
        }
    }

    /// Stops handing out jobs. The workers stay until [`Self::finish`], to drop the last files and
    /// memory that the ring thread releases.
    pub(super) fn close(&self) {
        let mut schedule = self.schedule();
        schedule.refusing = true;
        schedule.closing = true;
        drop(schedule);
        self.changed.notify_all();
    }

    /// Lets the workers exit once nothing is left to drop. Returns `false` if a previous call
    /// already did so.
    pub(super) fn finish(&self) -> bool {
        let first = !std::mem::replace(&mut self.schedule().finished, true);
        self.changed.notify_all();
        self.watch.notify_all();
        first
    }

    /// Whether the workers may exit.
    pub(super) fn is_finished(&self) -> bool {
        self.schedule().finished
    }

    /// Adds a worker that is about to be started.
    pub(super) fn hire(&self) -> WorkerId {
        self.schedule().workers.hire()
    }

    /// Removes a worker that could not be started.
    pub(super) fn dismiss(&self, worker: WorkerId) {
        self.schedule().workers.leave(worker);
    }

    /// Records that a worker made progress and is about to wait for a file.
    pub(super) fn begin_file(&self, worker: WorkerId) {
        self.proceed(worker, Some(Instant::now()));
    }

    /// Records that a worker is done waiting for files: the rest of its task allocates memory.
    pub(super) fn end_files(&self, worker: WorkerId) {
        self.proceed(worker, None);
    }

    fn proceed(&self, worker: WorkerId, at_files_since: Option<Instant>) {
        let mut schedule = self.schedule();
        let resumed = schedule.workers.proceed(worker, at_files_since);
        self.wake_watch(&mut schedule);
        if let Some(load) = resumed {
            schedule.scheduler.resume(&load);
            drop(schedule);
            self.changed.notify_one();
        }
    }

    fn wake_watch_for_places(&self, schedule: &mut Schedule<T>) {
        if schedule.watch_sleeps && schedule.scheduler.lacks_places() {
            self.wake_watch(schedule);
        }
    }

    fn wake_watch(&self, schedule: &mut Schedule<T>) {
        if std::mem::take(&mut schedule.watch_sleeps) {
            self.watch.notify_all();
        }
    }

    /// Waits until workers become stalled or substitutes for them are needed. Returns `None` once
    /// workers may exit.
    pub(super) fn watch(&self) -> Option<WatchReport> {
        let mut schedule = self.schedule();
        while !schedule.finished {
            let mut pause = schedule.next_check(Instant::now());
            if pause.is_none() {
                schedule.watch_sleeps = true;
                schedule = crate::support::sync::wait(&self.watch, schedule);
                // Sleep until the worker could have become stalled, even if its task ends sooner.
                // Most tasks take microseconds, and must not wake this thread each time.
                pause = (!schedule.finished).then(|| schedule.workers.patience());
            }
            let Some(pause) = pause else { break };
            schedule = crate::support::sync::wait_timeout(&self.watch, schedule, pause);
            let report = self.find_stalled(&mut schedule, Instant::now());
            if !(report.stalled.is_empty() && report.substitutes.is_empty()) {
                return Some(report);
            }
        }
        None
    }

    /// Finds file systems that have stopped responding, and stalled workers. Suspends the loads of
    /// the stalled workers, and hires the workers that are missing.
    fn find_stalled(&self, schedule: &mut Schedule<T>, now: Instant) -> WatchReport {
        if schedule.next_silence_check(now) == Some(Duration::ZERO) {
            schedule.silence_checked_at = now;
            if schedule.scheduler.find_silent_file_systems() {
                // Loads from file systems that have stopped responding no longer count as open, so
                // other loads may be opened.
                self.changed.notify_one();
            }
        }
        let stalled = schedule.workers.find_stalled(now);
        for task in &stalled {
            schedule.scheduler.stall(task.load, task.is_open);
        }
        if !stalled.is_empty() {
            // Other loads may have waited for the stalled ones.
            self.changed.notify_one();
        }
        let missing = if schedule.finished { 0 } else { schedule.workers.missing() };
        let substitutes = (0..missing).map(|_| schedule.workers.hire()).collect();
        WatchReport { stalled, substitutes, is_exhausted: schedule.workers.is_exhausted() }
    }

    /// Returns how many bytes of the window are in use, by pieces that are being populated and by
    /// pieces that the ring thread holds.
    pub(super) fn window_taken_bytes(&self) -> u64 {
        self.schedule().scheduler.window_taken_bytes()
    }

    /// Simulates a load that is forgotten between two of its steps.
    #[cfg(test)]
    pub(super) fn simulate_forgotten_load(&self, gone: LoadId, need: Need) {
        let mut schedule = self.schedule();
        schedule.scheduler.file_read(gone, 0);
        schedule.scheduler.memory_read(gone, 0);
        schedule.scheduler.opened(gone, LoadNeeds { batches: vec![need], ..LoadNeeds::default() });
        schedule.scheduler.submit(gone);
        drop(schedule);
        self.changed.notify_all();
    }

    /// Returns how many bytes of the window are taken, and how many loads are open.
    #[cfg(test)]
    pub(super) fn taken(&self) -> (u64, usize) {
        let schedule = self.schedule();
        (schedule.scheduler.window_taken_bytes(), schedule.scheduler.open_loads())
    }

    /// Returns an additional worker to start, if the rate of allocation calls for one.
    pub(super) fn hire_more(&self) -> Option<WorkerId> {
        let mut schedule = self.schedule();
        let wanted = !schedule.closing && schedule.growing && schedule.workers.missing() > 0;
        schedule.growing = false;
        wanted.then(|| schedule.workers.hire())
    }

    /// Waits for a job. Returns `None` when the worker should exit, because there will be no more
    /// jobs or there are too many workers.
    pub(super) fn next(&self, worker: WorkerId) -> Option<(Job<LoadId>, T)> {
        let mut schedule = self.schedule();
        schedule.end_task(worker);
        loop {
            if schedule.workers.is_overstaffed() {
                break;
            }
            if let Some((left, part)) = schedule.drop_queue.take() {
                schedule.workers.begin(worker, Task { load: left.load(), is_open: false }, Some(Instant::now()));
                self.wake_watch(&mut schedule);
                drop(schedule);
                // Wake another worker, because more groups may be waiting.
                self.changed.notify_one();
                part.into_iter().for_each(foreign::discard);
                schedule = self.schedule();
                schedule.drop_queue.dropped(left);
                schedule.end_task(worker);
                continue;
            }
            if schedule.closing {
                if schedule.finished {
                    break;
                }
                schedule = crate::support::sync::wait(&self.changed, schedule);
                continue;
            }
            match schedule.scheduler.next() {
                Some(job) => {
                    let Some(load) = schedule.loads.get(job.load()).cloned() else {
                        // The load was just forgotten; return the permits that the job took.
                        schedule.scheduler.decline(&job);
                        continue;
                    };
                    let is_open = matches!(job, Job::Open(_));
                    // A worker that allocates a batch calls `begin_file` before it opens each
                    // file.
                    let at_files_since = (is_open || matches!(job, Job::Check(..))).then(Instant::now);
                    schedule.workers.begin(worker, Task { load: *job.load(), is_open }, at_files_since);
                    if let Job::Allocate(_, _, need) = &job {
                        schedule.begin_allocating(worker, need.bytes);
                    }
                    if at_files_since.is_some() {
                        self.wake_watch(&mut schedule);
                    }
                    drop(schedule);
                    self.changed.notify_one();
                    return Some((job, load));
                }
                None => schedule = crate::support::sync::wait(&self.changed, schedule),
            }
        }
        schedule.workers.leave(worker);
        drop(schedule);
        // Pass the wake-up on: it may have been meant for another worker.
        self.changed.notify_one();
        None
    }
}

impl<T> Schedule<T> {
    /// Returns how long until the next check is due; `None` if no check is needed until something
    /// changes.
    fn next_check(&self, now: Instant) -> Option<Duration> {
        self.workers.next_check(now).into_iter().chain(self.next_silence_check(now)).min()
    }

    fn next_silence_check(&self, now: Instant) -> Option<Duration> {
        let left = || SILENCE_CHECK_INTERVAL.saturating_sub(now.saturating_duration_since(self.silence_checked_at));
        self.scheduler.lacks_places().then(left)
    }

    fn begin_allocating(&mut self, worker: WorkerId, bytes: u64) {
        self.pace.begin(self.since.elapsed());
        self.allocating.insert(worker, bytes);
    }

    fn end_allocating(&mut self, bytes: u64) {
        let before = self.pace.threads();
        if self.pace.end(self.since.elapsed(), bytes) {
            self.workers.want(self.pace.threads());
            self.growing = self.pace.threads() > before;
        }
        if self.scheduler.window_taken_bytes() == 0 && self.allocating.is_empty() {
            self.pace.pause();
        }
    }

    fn end_task(&mut self, worker: WorkerId) {
        if let Some(bytes) = self.allocating.remove(&worker) {
            self.end_allocating(bytes);
        }
        if let Some(load) = self.workers.end(worker) {
            self.scheduler.resume(&load);
        }
    }
}

#[cfg(test)]
mod tests;
