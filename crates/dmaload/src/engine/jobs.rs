//! Where worker threads get their jobs from, and wait for them: the scheduler and the loads it is about, under one lock.
//!
//! Who changes something that may make a job possible wakes one worker; a worker that got a job wakes the next one, since there
//! may be more than the one it was woken for. Every interleaving of that is tried by `tests`, with loom.

use std::any::Any;
use std::collections::HashMap;

use crate::foreign;
use crate::load::Follows;
use crate::ring::LoadId;
use crate::schedule::{Demand, Job, Need, Scheduler};
use crate::sync::{Condvar, Mutex, MutexGuard};

/// See the module. `T` is a load.
#[derive(Debug)]
pub(super) struct Jobs<T> {
    schedule: Mutex<Schedule<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Schedule<T> {
    scheduler: Scheduler<LoadId>,
    loads: HashMap<LoadId, T>,
    next_id: u64,
    /// No new loads.
    refusing: bool,
    /// No more jobs.
    closing: bool,
    /// The ring's thread has ended, or is not waited for: workers may end.
    finished: bool,
    /// What is to be dropped by a worker.
    buried: Vec<Box<dyn Any + Send>>,
}

impl<T: Clone> Jobs<T> {
    pub(super) fn new(window_bytes: u64, memory_bytes: u64, files: u64, max_open: usize) -> Self {
        let scheduler = Scheduler::new(window_bytes, memory_bytes, files, max_open);
        let schedule = Schedule {
            scheduler,
            loads: HashMap::new(),
            next_id: 0,
            refusing: false,
            closing: false,
            finished: false,
            buried: Vec::new(),
        };
        Jobs { schedule: Mutex::new(schedule), changed: Condvar::new() }
    }

    fn schedule(&self) -> MutexGuard<'_, Schedule<T>> {
        crate::sync::lock(&self.schedule)
    }

    /// A number for a new load.
    pub(super) fn next_id(&self) -> LoadId {
        let mut schedule = self.schedule();
        schedule.next_id += 1;
        LoadId(schedule.next_id)
    }

    /// A new load, to be opened when its turn comes. `false` when there are to be no more of them.
    pub(super) fn submit(&self, id: LoadId, load: T) -> bool {
        let mut schedule = self.schedule();
        if schedule.refusing {
            return false;
        }
        schedule.loads.insert(id, load);
        schedule.scheduler.submit(id);
        drop(schedule);
        self.changed.notify_one();
        true
    }

    /// A load was opened and planned.
    pub(super) fn opened(&self, id: LoadId, demand: Demand) {
        let mut schedule = self.schedule();
        if schedule.loads.contains_key(&id) {
            schedule.scheduler.opened(id, demand);
        }
        drop(schedule);
        self.changed.notify_one();
    }

    /// There is something to be done for a load, unless it was forgotten meanwhile.
    pub(super) fn follow(&self, id: LoadId, follows: Follows) {
        if follows == Follows::default() {
            return;
        }
        let mut schedule = self.schedule();
        if schedule.loads.contains_key(&id) {
            if let Some(memory) = follows.finish {
                schedule.scheduler.memory_read(id, memory);
            }
            if let Some(file) = follows.check {
                schedule.scheduler.file_read(id, file);
            }
        }
        drop(schedule);
        self.changed.notify_one();
    }

    /// A permit comes back.
    pub(super) fn give_back(&self, load: LoadId, need: Need) {
        self.schedule().scheduler.give_back(&load, need);
        self.changed.notify_one();
    }

    /// Changes what is known of memory.
    pub(super) fn account(&self, change: impl FnOnce(&mut Scheduler<LoadId>)) {
        change(&mut self.schedule().scheduler);
        self.changed.notify_one();
    }

    /// How much memory segments and the pool have.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.schedule().scheduler.memory_bytes()
    }

    /// A load holds no files and no memory of the driver any more: another may be opened.
    pub(super) fn end(&self) {
        self.schedule().scheduler.end();
        self.changed.notify_one();
    }

    /// Nothing more is to be scheduled for this load, which is given back.
    #[must_use = "dropping it may close files and run the caller's code: see `bury`"]
    pub(super) fn forget(&self, id: LoadId) -> Option<T> {
        let mut schedule = self.schedule();
        schedule.scheduler.forget(&id);
        let load = schedule.loads.remove(&id);
        drop(schedule);
        // The batch that it waited with may have kept others waiting.
        self.changed.notify_one();
        load
    }

    /// A worker is to drop this: files and addresses of loads are not the caller's to close and unmap.
    pub(super) fn bury(&self, what: impl Send + 'static) {
        self.schedule().buried.push(Box::new(what));
        self.changed.notify_one();
    }

    pub(super) fn load_of(&self, id: LoadId) -> Option<T> {
        self.schedule().loads.get(&id).cloned()
    }

    /// No new loads; gives those that there are.
    pub(super) fn refuse(&self) -> Vec<T> {
        let mut schedule = self.schedule();
        schedule.refusing = true;
        schedule.loads.values().cloned().collect()
    }

    /// Drops what was left to workers that have ended.
    pub(super) fn drop_buried(&self) {
        let buried = std::mem::take(&mut self.schedule().buried);
        buried.into_iter().for_each(foreign::discard);
    }

    /// No more jobs. A worker drops this, as with [`Self::bury`]. The workers stay until
    /// [`Self::finish`], to drop what the ring's thread releases last.
    pub(super) fn close(&self, what: impl Send + 'static) {
        let mut schedule = self.schedule();
        schedule.refusing = true;
        schedule.closing = true;
        schedule.buried.push(Box::new(what));
        drop(schedule);
        self.changed.notify_all();
    }

    /// Lets the workers end: nothing more has to be dropped. Returns `false` if they may already.
    pub(super) fn finish(&self) -> bool {
        let first = !std::mem::replace(&mut self.schedule().finished, true);
        self.changed.notify_all();
        first
    }

    /// Bytes of the window in use: pieces being populated and those that the ring's thread has.
    pub(super) fn window_taken_bytes(&self) -> u64 {
        self.schedule().scheduler.window_taken_bytes()
    }

    /// What a load leaves in the scheduler when it is forgotten between two of its steps.
    #[cfg(test)]
    pub(super) fn leave_behind(&self, gone: LoadId, need: Need) {
        let mut schedule = self.schedule();
        schedule.scheduler.file_read(gone, 0);
        schedule.scheduler.memory_read(gone, 0);
        schedule.scheduler.opened(gone, Demand { batches: vec![need], ..Demand::default() });
        schedule.scheduler.submit(gone);
        drop(schedule);
        self.changed.notify_all();
    }

    /// How much of the window is taken, and how many loads are open.
    #[cfg(test)]
    pub(super) fn taken(&self) -> (u64, usize) {
        let schedule = self.schedule();
        (schedule.scheduler.window_taken_bytes(), schedule.scheduler.open_loads())
    }

    /// Waits for a job; `None` when there are to be no more.
    pub(super) fn next(&self) -> Option<(Job<LoadId>, T)> {
        let mut schedule = self.schedule();
        loop {
            let buried = std::mem::take(&mut schedule.buried);
            if !buried.is_empty() {
                drop(schedule);
                buried.into_iter().for_each(foreign::discard);
                schedule = self.schedule();
                continue;
            }
            if schedule.closing {
                if schedule.finished {
                    return None;
                }
                schedule = crate::sync::wait(&self.changed, schedule);
                continue;
            }
            match schedule.scheduler.next() {
                Some(job) => {
                    let Some(load) = schedule.loads.get(job.load()).cloned() else {
                        // Forgotten a moment ago; what the job took goes back.
                        schedule.scheduler.decline(&job);
                        continue;
                    };
                    drop(schedule);
                    self.changed.notify_one();
                    return Some((job, load));
                }
                None => schedule = crate::sync::wait(&self.changed, schedule),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::model::{Arc, model, spawn};

    /// A load of so many batches, each as large as the window: each waits for the permit of the one before.
    fn opened(jobs: &Jobs<Arc<()>>, batches: usize) -> LoadId {
        let id = jobs.next_id();
        assert!(jobs.submit(id, Arc::new(())));
        assert!(matches!(jobs.next(), Some((Job::Open(_), _))));
        jobs.opened(id, Demand { batches: vec![Need { bytes: 1, ..Need::default() }; batches], ..Demand::default() });
        id
    }

    /// As an allocator thread with the ring thread behind it: takes permits, gives them back; ends when it is told to.
    fn worker(jobs: &Jobs<Arc<()>>) -> usize {
        let mut done = 0;
        while let Some((job, _load)) = jobs.next() {
            match job {
                Job::Allocate(id, _, need) => {
                    done += 1;
                    jobs.give_back(id, need);
                }
                Job::Check(..) | Job::Finish(..) => done += 1,
                Job::Open(_) => jobs.end(),
                Job::MakeRoom(..) => unreachable!("memory is not limited"),
            }
        }
        done
    }

    #[test]
    fn whoever_waits_for_a_permit_gets_it_when_it_comes_back() {
        model(|| {
            let jobs = Arc::new(Jobs::new(1, u64::MAX, 1, 1));
            let id = opened(&jobs, 2);
            // A permit is out; nobody can go on before it comes back.
            let Some((Job::Allocate(_, 0, need), _)) = jobs.next() else { panic!("the first batch fits") };
            let waiting = {
                let jobs = Arc::clone(&jobs);
                spawn(move || jobs.next().map(|(job, _)| matches!(job, Job::Allocate(_, 1, _))))
            };
            jobs.give_back(id, need);
            assert_eq!(waiting.join().unwrap(), Some(true));
        });
    }

    #[test]
    fn two_workers_leave_nothing_undone_and_both_end() {
        model(|| {
            let jobs = Arc::new(Jobs::new(1, u64::MAX, 1, 1));
            let id = opened(&jobs, 1);
            let workers = [(); 2].map(|()| {
                let jobs = Arc::clone(&jobs);
                spawn(move || worker(&jobs))
            });
            // What the ring thread says when all is read; then nobody needs the workers any more.
            jobs.follow(id, Follows { check: Some(0), finish: None });
            loop {
                let left = {
                    let schedule = jobs.schedule();
                    !schedule.scheduler.is_idle() || schedule.scheduler.window_taken_bytes() > 0
                };
                if !left {
                    break;
                }
                crate::sync::model::yield_now();
            }
            jobs.close(());
            jobs.finish();
            let done: usize = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
            assert_eq!(done, 2, "one batch and one check");
        });
    }

    #[test]
    fn a_load_that_is_forgotten_while_its_batch_is_taken_holds_up_nobody() {
        model(|| {
            let jobs = Arc::new(Jobs::new(1, u64::MAX, 1, 2));
            let first = opened(&jobs, 2);
            let Some((Job::Allocate(_, 0, need), _)) = jobs.next() else { panic!("the first batch fits") };
            opened(&jobs, 1);
            let waiting = {
                let jobs = Arc::clone(&jobs);
                spawn(move || jobs.next().map(|(job, _)| matches!(job, Job::Allocate(..))))
            };
            let forgetting = {
                let jobs = Arc::clone(&jobs);
                spawn(move || drop(jobs.forget(first)))
            };
            jobs.give_back(first, need);
            forgetting.join().unwrap();
            assert_eq!(waiting.join().unwrap(), Some(true), "its next batch, or the other load's");
        });
    }

    #[test]
    fn forgetting_a_load_whose_batch_did_not_fit_lets_a_smaller_one_go_on() {
        model(|| {
            let jobs = Arc::new(Jobs::new(2, u64::MAX, 1, 3));
            opened(&jobs, 1);
            assert!(matches!(jobs.next(), Some((Job::Allocate(_, 0, _), _))));
            // One byte is taken and stays so: the batch of the large load does not fit, and nobody overtakes it.
            let large = opened(&jobs, 0);
            jobs.opened(large, Demand { batches: vec![Need { bytes: 2, ..Need::default() }], ..Demand::default() });
            let small = opened(&jobs, 1);
            let waiting = {
                let jobs = Arc::clone(&jobs);
                spawn(move || jobs.next().map(|(job, _)| *job.load()))
            };
            drop(jobs.forget(large));
            assert_eq!(waiting.join().unwrap(), Some(small));
        });
    }

    #[test]
    fn what_is_buried_while_closing_is_dropped_before_workers_end() {
        model(|| {
            let jobs = Arc::new(Jobs::<Arc<()>>::new(1, u64::MAX, 1, 1));
            let workers = [(); 2].map(|()| {
                let jobs = Arc::clone(&jobs);
                spawn(move || assert!(jobs.next().is_none()))
            });
            jobs.close(());
            // Workers that don't wait have ended by then.
            #[cfg(not(dmaload_loom))]
            std::thread::sleep(std::time::Duration::from_millis(1));
            // The ring's thread does this with the files of the last load.
            let file = std::sync::Arc::new(());
            jobs.bury(std::sync::Arc::clone(&file));
            assert!(jobs.finish() && !jobs.finish());
            for worker in workers {
                worker.join().unwrap();
            }
            assert_eq!(std::sync::Arc::strong_count(&file), 1);
        });
    }

    #[test]
    fn whoever_waits_ends_when_no_more_jobs_come() {
        model(|| {
            let jobs = Arc::new(Jobs::<Arc<()>>::new(1, u64::MAX, 1, 1));
            let waiting = {
                let jobs = Arc::clone(&jobs);
                spawn(move || jobs.next().is_none())
            };
            let load = Arc::new(());
            jobs.bury(load);
            jobs.close(());
            jobs.finish();
            assert!(!jobs.submit(jobs.next_id(), Arc::new(())));
            assert!(waiting.join().unwrap());
        });
    }
}
