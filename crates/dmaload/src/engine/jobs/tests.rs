use super::*;
use crate::support::sync::atomic::{AtomicUsize, Ordering};
use crate::support::sync::model::{Arc, model, spawn};

/// Gets the next job as a new worker.
fn next(jobs: &Jobs<Arc<()>>) -> Option<(Job<LoadId>, Arc<()>)> {
    let worker = jobs.hire();
    let next = jobs.next(worker);
    if next.is_some() {
        jobs.schedule().end_task(worker);
        jobs.dismiss(worker);
    }
    next
}

/// Submits and opens a load of `batches` batches of one byte each. In a window of one byte, each
/// batch waits for the permit of the batch before it.
fn open_load(jobs: &Jobs<Arc<()>>, batches: usize) -> LoadId {
    let id = jobs.next_id();
    assert!(jobs.submit(id, Arc::new(())));
    assert!(matches!(next(jobs), Some((Job::Open(_), _))));
    jobs.opened(id, LoadNeeds { batches: vec![Need { bytes: 1, ..Need::default() }; batches], ..LoadNeeds::default() });
    id
}

/// Acts as a worker, and as the ring thread that completes its reads: takes permits and gives them
/// back until there are no more jobs. Returns the number of allocate, check and finish jobs that
/// it did.
fn run_worker(jobs: &Jobs<Arc<()>>) -> usize {
    let mut done = 0;
    let worker = jobs.hire();
    while let Some((job, _load)) = jobs.next(worker) {
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
fn waiting_worker_gets_a_returned_permit() {
    model(|| {
        let jobs = Arc::new(Jobs::new(1, u64::MAX, 1, 1, Pace::fixed(3)));
        let id = open_load(&jobs, 2);
        // The whole window is taken, so the second batch waits until the permit is returned.
        let Some((Job::Allocate(_, 0, need), _)) = next(&jobs) else { panic!("the first batch should fit into the window") };
        let waiting = {
            let jobs = Arc::clone(&jobs);
            spawn(move || next(&jobs).map(|(job, _)| matches!(job, Job::Allocate(_, 1, _))))
        };
        jobs.give_back(id, need);
        assert_eq!(waiting.join().unwrap(), Some(true));
    });
}

#[test]
fn two_workers_finish_all_jobs_and_end() {
    model(|| {
        let jobs = Arc::new(Jobs::new(1, u64::MAX, 1, 1, Pace::fixed(3)));
        let id = open_load(&jobs, 1);
        let workers = [(); 2].map(|()| {
            let jobs = Arc::clone(&jobs);
            spawn(move || run_worker(&jobs))
        });
        // In production, the teller schedules the check after the last read.
        jobs.schedule_follow_ups(id, FollowUpJobs { check: Some(0), finish: None });
        loop {
            let left = {
                let schedule = jobs.schedule();
                !schedule.scheduler.is_idle() || schedule.scheduler.window_taken_bytes() > 0
            };
            if !left {
                break;
            }
            crate::support::sync::model::yield_now();
        }
        jobs.close();
        jobs.finish();
        let done: usize = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
        assert_eq!(done, 2, "the workers should do one batch and one check");
    });
}

#[test]
fn forgetting_a_load_whose_batch_is_taken_blocks_no_worker() {
    model(|| {
        let jobs = Arc::new(Jobs::new(1, u64::MAX, 1, 2, Pace::fixed(3)));
        let first = open_load(&jobs, 2);
        let Some((Job::Allocate(_, 0, need), _)) = next(&jobs) else { panic!("the first batch should fit into the window") };
        open_load(&jobs, 1);
        let waiting = {
            let jobs = Arc::clone(&jobs);
            spawn(move || next(&jobs).map(|(job, _)| matches!(job, Job::Allocate(..))))
        };
        let forgetting = {
            let jobs = Arc::clone(&jobs);
            spawn(move || drop(jobs.forget(first)))
        };
        jobs.give_back(first, need);
        forgetting.join().unwrap();
        assert_eq!(waiting.join().unwrap(), Some(true), "the worker should get the next batch of either load");
    });
}

#[test]
fn forgetting_a_load_that_did_not_fit_frees_a_smaller_one() {
    model(|| {
        let jobs = Arc::new(Jobs::new(2, u64::MAX, 1, 3, Pace::fixed(3)));
        open_load(&jobs, 1);
        assert!(matches!(next(&jobs), Some((Job::Allocate(_, 0, _), _))));
        // One of the two bytes stays taken, so the large load's batch does not fit, and no load
        // overtakes it.
        let large = open_load(&jobs, 0);
        jobs.opened(large, LoadNeeds { batches: vec![Need { bytes: 2, ..Need::default() }], ..LoadNeeds::default() });
        let small = open_load(&jobs, 1);
        let waiting = {
            let jobs = Arc::clone(&jobs);
            spawn(move || next(&jobs).map(|(job, _)| *job.load()))
        };
        drop(jobs.forget(large));
        assert_eq!(waiting.join().unwrap(), Some(small));
    });
}

#[test]
fn workers_drop_deferred_values_before_they_end() {
    model(|| {
        let jobs = Arc::new(Jobs::<Arc<()>>::new(1, u64::MAX, 1, 1, Pace::fixed(3)));
        let workers = [(); 2].map(|()| {
            let jobs = Arc::clone(&jobs);
            spawn(move || assert!(next(&jobs).is_none()))
        });
        jobs.close();
        // Give workers time to exit early, which they must not do.
        #[cfg(not(dmaload_loom))]
        std::thread::sleep(std::time::Duration::from_millis(1));
        // In production, the ring thread defers the drop of the last load's files.
        let file = std::sync::Arc::new(());
        jobs.defer_drop(DropKey::Files(LoadId(1)), std::sync::Arc::clone(&file));
        assert!(jobs.finish() && !jobs.finish());
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!(std::sync::Arc::strong_count(&file), 1);
    });
}

#[test]
fn files_of_a_load_are_dropped_by_one_worker_at_a_time() {
    model(|| {
        let jobs = Arc::new(Jobs::<Arc<()>>::new(1, u64::MAX, 1, 1, Pace::fixed(3)));
        let seen = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
        let workers = [(); 2].map(|()| {
            let jobs = Arc::clone(&jobs);
            spawn(move || assert!(next(&jobs).is_none()))
        });
        for _ in 0..2 {
            jobs.defer_drop(DropKey::Files(LoadId(1)), Closes(Arc::clone(&seen)));
        }
        jobs.close();
        jobs.finish();
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!(seen.1.load(Ordering::SeqCst), 2, "both values should be dropped, one at a time");
        assert!(jobs.schedule().drop_queue.parts.is_empty());
    });
}

/// Counts the values that are being dropped, and those whose drop began while no other value was
/// being dropped.
struct Closes(Arc<(AtomicUsize, AtomicUsize)>);

impl Drop for Closes {
    fn drop(&mut self) {
        let (closing, alone) = &*self.0;
        let others = closing.fetch_add(1, Ordering::SeqCst);
        crate::support::sync::model::yield_now();
        alone.fetch_add(usize::from(others == 0), Ordering::SeqCst);
        closing.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The file server may or may not answer before the watch finds the worker stalled.
#[test]
fn stalled_workers_are_replaced_without_losing_jobs() {
    model(|| {
        let jobs = Arc::new(Jobs::<Arc<()>>::new(1, u64::MAX, 1, 2, Pace::fixed(1)));
        let id = open_load(&jobs, 0);
        let stalls = jobs.hire();
        jobs.schedule_follow_ups(id, FollowUpJobs { check: Some(0), finish: None });
        assert!(matches!(jobs.next(stalls), Some((Job::Check(_, 0), _))));
        jobs.schedule_follow_ups(id, FollowUpJobs { check: Some(1), finish: None });
        let comes_back = {
            let jobs = Arc::clone(&jobs);
            spawn(move || {
                let mut done = 1;
                while jobs.next(stalls).is_some() {
                    done += 1;
                }
                done
            })
        };
        let late = Instant::now() + 2 * crate::engine::workers::STALLED_AFTER;
        let report = jobs.find_stalled(&mut jobs.schedule(), late);
        assert!(report.substitutes.len() <= 1 && report.stalled.len() >= report.substitutes.len());
        let substitutes: Vec<_> = report
            .substitutes
            .into_iter()
            .map(|worker| {
                let jobs = Arc::clone(&jobs);
                spawn(move || {
                    let mut done = 0;
                    while jobs.next(worker).is_some() {
                        done += 1;
                    }
                    done
                })
            })
            .collect();
        while !jobs.schedule().scheduler.is_idle() {
            crate::support::sync::model::yield_now();
        }
        jobs.close();
        jobs.finish();
        let done: usize = substitutes.into_iter().map(|worker| worker.join().unwrap()).sum();
        assert_eq!(done + comes_back.join().unwrap(), 2, "each check should be done exactly once");
    });
}

#[cfg(not(dmaload_loom))]
#[test]
fn busy_allocators_get_help_up_to_the_bound() {
    let jobs = Jobs::new(u64::MAX, u64::MAX, 1, 1, Pace::new(1, 2));
    let first = jobs.hire();
    assert_eq!(jobs.hire_more(), None);
    let id = jobs.next_id();
    assert!(jobs.submit(id, Arc::new(())));
    assert!(matches!(jobs.next(first), Some((Job::Open(_), _))));
    jobs.opened(id, LoadNeeds { batches: vec![Need { bytes: 1, ..Need::default() }; 100], ..LoadNeeds::default() });
    let mut done = 0;
    let second = loop {
        assert!(matches!(jobs.next(first), Some((Job::Allocate(..), _))));
        std::thread::sleep(std::time::Duration::from_micros(100));
        if let Some(second) = jobs.hire_more() {
            break second;
        }
        done += 1;
        assert!(done < 80, "the worker is always busy, so another one should be hired");
    };
    assert!(done >= 12, "another worker was hired after only {done} batches, before anything was measured");
    assert_eq!((jobs.hire_more(), jobs.schedule().workers.missing()), (None, 0));
    assert!(matches!(jobs.next(second), Some((Job::Allocate(..), _))));
}

#[test]
fn waiting_workers_end_when_jobs_are_closed() {
    model(|| {
        let jobs = Arc::new(Jobs::<Arc<()>>::new(1, u64::MAX, 1, 1, Pace::fixed(3)));
        let waiting = {
            let jobs = Arc::clone(&jobs);
            spawn(move || next(&jobs).is_none())
        };
        let load = Arc::new(());
        jobs.defer_drop(DropKey::Files(LoadId(1)), load);
        jobs.close();
        jobs.finish();
        assert!(!jobs.submit(jobs.next_id(), Arc::new(())));
        assert!(waiting.join().unwrap());
    });
}
