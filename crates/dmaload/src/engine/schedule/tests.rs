use super::*;

fn need(bytes: u64) -> Need {
    need_from(0, bytes)
}

fn need_from(file_system: u64, bytes: u64) -> Need {
    Need { bytes, files: 0, held_bytes: bytes, file_system }
}

fn demand_from(file_system: u64, batches: &[u64]) -> LoadNeeds {
    LoadNeeds { batches: batches.iter().map(|&bytes| need_from(file_system, bytes)).collect(), ..LoadNeeds::default() }
}

/// Returns a scheduler in which these loads are open. Each load is given by its number, its file
/// system and the sizes of its batches.
fn opened_from(window: u64, loads: &[(u32, u64, &[u64])]) -> Scheduler<u32> {
    let mut scheduler = Scheduler::new(window, u64::MAX, 100, 64);
    for &(load, file_system, batches) in loads {
        scheduler.submit(load);
        assert_eq!(scheduler.next(), Some(Job::Open(load)));
        scheduler.opened(load, demand_from(file_system, batches));
    }
    scheduler
}

fn demand(batches: &[u64], reserved_bytes: u64, priority: Priority) -> LoadNeeds {
    LoadNeeds { batches: batches.iter().map(|&bytes| need(bytes)).collect(), reserved_bytes, priority, ahead_bytes: None }
}

fn opened(window: u64, loads: &[(u32, &[u64])]) -> Scheduler<u32> {
    let mut scheduler = Scheduler::new(window, u64::MAX, 100, 8);
    for &(load, batches) in loads {
        scheduler.submit(load);
        assert_eq!(scheduler.next(), Some(Job::Open(load)));
        scheduler.opened(load, demand(batches, 0, Priority::Normal));
    }
    scheduler
}

fn drain(scheduler: &mut Scheduler<u32>) -> Vec<Job<u32>> {
    std::iter::from_fn(|| scheduler.next()).collect()
}

/// Takes all jobs that are available now, and returns their loads.
fn loads(scheduler: &mut Scheduler<u32>) -> Vec<u32> {
    drain(scheduler).iter().map(|job| *job.load()).collect()
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
fn window_is_never_exceeded_and_no_load_overtakes() {
    let mut scheduler = opened_from(25, &[(1, 1, &[10, 20]), (2, 2, &[10])]);
    assert_eq!(drain(&mut scheduler), [Job::Allocate(1, 0, need_from(1, 10)), Job::Allocate(2, 0, need_from(2, 10))]);
    scheduler.opened(3, demand_from(3, &[1]));
    scheduler.give_back(&1, need_from(1, 10));
    assert_eq!(drain(&mut scheduler), [], "load 1's large batch should wait, and load 3's small one should wait behind it");
    scheduler.give_back(&2, need_from(2, 10));
    assert_eq!(drain(&mut scheduler), [Job::Allocate(1, 1, need_from(1, 20)), Job::Allocate(3, 0, need_from(3, 1))]);
    assert_eq!(scheduler.window_taken_bytes(), 21);
}

#[test]
fn loads_of_one_file_system_take_turns_and_do_not_delay_others() {
    let mut scheduler = opened_from(160, &[(1, 1, &[40]), (2, 1, &[40]), (3, 1, &[2]), (4, 2, &[40])]);
    assert_eq!(loads(&mut scheduler), [1, 2, 3, 4]);
    for (load, file_system, bytes) in [(5, 1, 40), (6, 1, 1), (7, 2, 1)] {
        scheduler.submit(load);
        assert_eq!(scheduler.next(), Some(Job::Open(load)));
        scheduler.opened(load, demand_from(file_system, &[bytes]));
    }
    scheduler.give_back(&4, need_from(2, 40));
    assert_eq!(loads(&mut scheduler), [7], "load 6 would fit, but must not overtake load 5");
    scheduler.give_back(&2, need_from(1, 40));
    assert_eq!(loads(&mut scheduler), [5, 6]);
}

#[test]
fn loads_of_a_silent_file_system_always_leave_room() {
    let batches = [10; 100];
    let silent: Vec<_> = (0..20).map(|load| (load, 1, &batches[..])).collect();
    let mut scheduler = opened_from(80, &silent);
    assert_eq!(drain(&mut scheduler).len(), 6);
    assert_eq!(scheduler.window_taken_bytes(), 60);
    for load in [20, 21] {
        scheduler.submit(load);
        assert_eq!(scheduler.next(), Some(Job::Open(load)));
        scheduler.opened(load, demand_from(2, &[10; 5]));
    }
    let mut others = Vec::new();
    while let Some(job) = scheduler.next() {
        others.push(*job.load());
        scheduler.give_back(job.load(), need_from(2, 10));
    }
    assert_eq!(others, [20, 21].repeat(5));
}

#[test]
fn silent_loads_do_not_count_as_open() {
    let mut scheduler = Scheduler::new(80, u64::MAX, 100, 20);
    (0..22).for_each(|load| scheduler.submit(load));
    assert_eq!(loads(&mut scheduler).len(), 20, "only 20 loads may be open at once");
    (0..20).for_each(|load| scheduler.opened(load, demand_from(1, &[10, 10])));
    assert_eq!(loads(&mut scheduler).len(), 6);
    assert!(scheduler.lacks_places());
    assert!(!scheduler.find_silent_file_systems(), "file system 1 has only just taken permits");
    scheduler.give_back(&0, need_from(1, 10));
    assert!(!scheduler.find_silent_file_systems(), "file system 1 has returned a permit");
    assert_eq!(loads(&mut scheduler), [6]);
    assert!(scheduler.find_silent_file_systems());
    assert_eq!(drain(&mut scheduler), [20, 21].map(Job::Open));
    assert!(!scheduler.find_silent_file_systems(), "file system 1 was already silent");
    // Once a permit is returned, the silent loads count as open again, which makes two more than
    // the limit.
    scheduler.submit(22);
    scheduler.give_back(&1, need_from(1, 10));
    assert!(scheduler.lacks_places());
    (20..22).for_each(|load| scheduler.opened(load, demand_from(2, &[10])));
    assert!(loads(&mut scheduler).iter().all(|&load| load < 22));
    (0..3).for_each(|_| scheduler.end());
    assert_eq!(loads(&mut scheduler), [22]);
}

#[test]
fn number_of_loads_not_counted_as_open_is_bounded() {
    let mut scheduler = Scheduler::new(80, u64::MAX, 100, 1);
    (0..200).for_each(|load| scheduler.submit(load));
    let mut open = 0;
    loop {
        match scheduler.next() {
            Some(Job::Open(load)) => {
                open += 1;
                scheduler.opened(load, demand_from(1, &[10, 10]));
            }
            Some(job) => assert!(matches!(job, Job::Allocate(..))),
            None => {
                scheduler.find_silent_file_systems();
                if !scheduler.find_silent_file_systems() {
                    break;
                }
            }
        }
    }
    assert_eq!(open, 1 + MOST_SILENT);
}

#[test]
fn kept_loads_of_silent_file_system_leave_memory_for_others() {
    let mut scheduler = Scheduler::new(80, 160, 100, 64);
    for load in 0..22 {
        scheduler.submit(load);
        assert_eq!(scheduler.next(), Some(Job::Open(load)));
        let file_system = if load < 20 { 1 } else { 2 };
        scheduler.opened(load, LoadNeeds { reserved_bytes: 20, ..demand_from(file_system, &[10, 10]) });
    }
    assert_eq!(
        loads(&mut scheduler),
        [0, 1, 2, 3, 4, 5, 20],
        "file system 1 should get three quarters of the memory and of the window"
    );
    scheduler.give_back(&20, need_from(2, 10));
    assert_eq!(loads(&mut scheduler), [20]);
    scheduler.give_back(&20, need_from(2, 10));
    scheduler.freed(&20, 20, 0);
    assert_eq!(loads(&mut scheduler), [21]);
}

#[test]
fn load_that_holds_permits_and_does_not_fit_is_passed_over() {
    let mut scheduler = opened(25, &[(1, &[10, 20]), (2, &[1, 1])]);
    let jobs = drain(&mut scheduler);
    let one = [Job::Allocate(1, 0, need(10)), Job::Allocate(2, 0, need(1)), Job::Allocate(2, 1, need(1))];
    assert_eq!(jobs, one, "load 1 waits for its own reads, so it must not hold up load 2");
}

#[test]
fn stream_waits_for_its_consumer_without_blocking_others() {
    let mut scheduler = Scheduler::new(1000, u64::MAX, 100, 8);
    for (load, ahead_bytes) in [(1, Some(25)), (2, None)] {
        scheduler.submit(load);
        assert_eq!(scheduler.next(), Some(Job::Open(load)));
        // Each allocation has two batches, and all of its memory is charged with the first one.
        // The last allocation is larger than the bound.
        let part = |held_bytes| Need { bytes: 5, held_bytes, ..Need::default() };
        let batches = vec![part(10), part(0), part(10), part(0), part(40), part(0)];
        scheduler.opened(load, LoadNeeds { batches, ahead_bytes, ..LoadNeeds::default() });
    }
    let count_of = |jobs: &[Job<u32>], load| jobs.iter().filter(|job| *job.load() == load).count();
    let jobs = drain(&mut scheduler);
    assert_eq!((count_of(&jobs, 1), count_of(&jobs, 2)), (4, 6));
    scheduler.give_back(&1, need(20));
    assert_eq!(drain(&mut scheduler), [], "the consumer has not taken the segments that were read");
    scheduler.consumed(&1, 10);
    assert_eq!(drain(&mut scheduler), [], "the consumer has not taken one of the segments yet");
    scheduler.consumed(&1, 10);
    let jobs = drain(&mut scheduler);
    assert_eq!(count_of(&jobs, 1), 2, "an allocation above the bound should be made once the consumer has taken all others");
    scheduler.consumed(&1, 40);
    scheduler.consumed(&3, 10);
}

#[test]
fn stream_is_held_up_only_when_its_consumer_holds_everything() {
    let mut scheduler = Scheduler::new(1000, 40, 100, 8);
    scheduler.submit(1);
    assert_eq!(scheduler.next(), Some(Job::Open(1)));
    let part = |held_bytes| Need { bytes: 5, held_bytes, ..Need::default() };
    let batches = vec![part(10), part(10), part(10), part(10)];
    assert_eq!(scheduler.held_up(&1), None, "the load is not planned yet");
    scheduler.opened(1, LoadNeeds { batches, reserved_bytes: 10, ahead_bytes: Some(100), ..LoadNeeds::default() });
    assert_eq!(scheduler.held_up(&1), None, "the load is not admitted yet");
    assert_eq!(drain(&mut scheduler).len(), 2, "a load may hold half of the limit");
    assert_eq!(scheduler.held_up(&1), None, "the consumer has not taken anything");
    scheduler.consumed(&1, 10);
    assert_eq!(scheduler.held_up(&1), None, "one segment was not taken yet");
    scheduler.consumed(&1, 10);
    assert_eq!(scheduler.held_up(&1), Some(HeldUp { held_bytes: 20, wanted_bytes: 10 }));
    scheduler.freed(&1, 10, 0);
    assert_eq!(scheduler.held_up(&1), None, "the freed memory suffices");
    assert_eq!(drain(&mut scheduler).len(), 1);
    scheduler.consumed(&1, 10);
    assert_eq!(scheduler.held_up(&1), Some(HeldUp { held_bytes: 20, wanted_bytes: 10 }));
    scheduler.freed(&1, 20, 0);
    assert_eq!(drain(&mut scheduler).len(), 1);
    assert_eq!(scheduler.held_up(&1), None, "the last batch was started");
}

#[test]
fn load_that_waits_for_files_does_not_block_others() {
    let mut scheduler = Scheduler::new(100, u64::MAX, 3, 8);
    let many = Need { bytes: 1, files: 3, ..Need::default() };
    for (load, need) in [(1, many), (2, many), (3, need(1))] {
        scheduler.submit(load);
        assert_eq!(scheduler.next(), Some(Job::Open(load)));
        scheduler.opened(load, LoadNeeds { batches: vec![need], ..LoadNeeds::default() });
    }
    assert_eq!(drain(&mut scheduler), [Job::Allocate(1, 0, many), Job::Allocate(3, 0, need(1))]);
    scheduler.give_back(&1, many);
    assert_eq!(drain(&mut scheduler), [Job::Allocate(2, 0, many)]);
}

/// Loads with few files each must not starve a load from the same file system that needs many.
#[test]
fn load_of_many_files_is_not_starved_by_its_file_system() {
    let mut scheduler = Scheduler::new(u64::MAX, u64::MAX, 256, 64);
    let need = |files| Need { bytes: 1, files, held_bytes: 1, file_system: 7 };
    for (load, batches) in [(1, vec![need(8); 1000]), (2, vec![need(8); 1000]), (3, vec![need(64)])] {
        scheduler.submit(load);
        assert_eq!(scheduler.next(), Some(Job::Open(load)));
        scheduler.opened(load, LoadNeeds { batches, ..LoadNeeds::default() });
        if load == 2 {
            // Loads 1 and 2 now hold as many files as they are allowed to.
            assert!(drain(&mut scheduler).len() > 16);
        }
    }
    let mut rounds = 0;
    while !drain(&mut scheduler).iter().any(|job| *job.load() == 3) {
        rounds += 1;
        assert!(rounds < 64, "load 3 should not wait forever");
        scheduler.give_back(&(1 + rounds % 2), need(8));
    }
}

#[test]
fn load_with_hanging_reads_leaves_room_for_others() {
    let mut scheduler = opened_from(80, &[(1, 1, &[10; 100]), (2, 2, &[10; 5]), (3, 3, &[10; 5])]);
    let mut others = Vec::new();
    while let Some(job) = scheduler.next() {
        if *job.load() != 1 {
            others.push(*job.load());
            scheduler.give_back(job.load(), need_from(u64::from(*job.load()), 10));
        }
    }
    assert_eq!(others.iter().filter(|&&load| load == 2).count(), 5);
    assert_eq!(others.len(), 10);
    assert_eq!(scheduler.window_taken_bytes(), 60, "load 1 should end up with three quarters of the window");
}

#[test]
fn open_files_stay_within_their_limit() {
    let mut scheduler = Scheduler::new(100, u64::MAX, 3, 8);
    scheduler.submit(1);
    assert_eq!(scheduler.next(), Some(Job::Open(1)));
    let need = Need { bytes: 1, files: 2, ..Need::default() };
    scheduler.opened(1, LoadNeeds { batches: vec![need; 2], ..LoadNeeds::default() });
    assert_eq!(drain(&mut scheduler), [Job::Allocate(1, 0, need)]);
    assert_eq!(scheduler.window_taken_bytes(), 1, "a batch that did not fit must not hold permits");
    scheduler.give_back(&1, need);
    assert_eq!(drain(&mut scheduler), [Job::Allocate(1, 1, need)]);
}

#[test]
fn number_of_open_loads_is_bounded() {
    let mut scheduler = Scheduler::new(100, u64::MAX, 100, 2);
    for load in 0..4 {
        scheduler.submit(load);
    }
    assert_eq!(drain(&mut scheduler), [Job::Open(0), Job::Open(1)]);
    scheduler.end();
    assert_eq!(drain(&mut scheduler), [Job::Open(2)]);
}

#[test]
fn forgotten_load_gets_no_more_jobs() {
    let mut scheduler = opened(100, &[(1, &[10, 10]), (2, &[10])]);
    scheduler.submit(3);
    scheduler.file_read(1, 0);
    scheduler.memory_read(1, 0);
    for load in [1, 3] {
        scheduler.forget(&load);
    }
    assert_eq!(drain(&mut scheduler), [Job::Allocate(2, 0, need(10))]);
}

#[test]
fn stalled_load_gets_no_job_that_may_wait_for_files() {
    let mut scheduler = opened(100, &[(1, &[10, 10]), (2, &[10])]);
    scheduler.file_read(1, 0);
    scheduler.file_read(2, 0);
    scheduler.file_read(1, 1);
    scheduler.memory_read(1, 0);
    scheduler.stall(1, false);
    let of_others = [Job::Check(2, 0), Job::Finish(1, 0), Job::Allocate(2, 0, need(10))];
    assert_eq!(drain(&mut scheduler), of_others, "jobs that need no files should proceed");
    scheduler.file_read(1, 2);
    assert_eq!(drain(&mut scheduler), []);
    assert!(!scheduler.is_idle());
    scheduler.resume(&1);
    let checks = [0, 1, 2].map(|file| Job::Check(1, file));
    let batches = [0, 1].map(|batch| Job::Allocate(1, batch, need(10)));
    assert_eq!(drain(&mut scheduler), [&checks[..], &batches].concat());
    // A forgotten load leaves no jobs behind.
    scheduler.stall(1, false);
    scheduler.file_read(1, 3);
    assert_eq!(drain(&mut scheduler), []);
    scheduler.forget(&1);
    scheduler.resume(&1);
    assert_eq!(drain(&mut scheduler), []);
}

#[test]
fn stalled_opening_does_not_block_later_loads() {
    // Memory is limited, so loads start in order of arrival. Only one load may be open at a time.
    let mut scheduler = Scheduler::new(1000, 40, 100, 1);
    (1..4).for_each(|load| scheduler.submit(load));
    assert_eq!(drain(&mut scheduler), [Job::Open(1)]);
    scheduler.stall(1, true);
    assert_eq!(drain(&mut scheduler), [Job::Open(2)]);
    scheduler.opened(2, demand(&[10], 10, Priority::Normal));
    assert_eq!(drain(&mut scheduler), [Job::Allocate(2, 0, need(10))]);
    // The same is true after the stalled load has been forgotten.
    scheduler.forget(&1);
    scheduler.end();
    assert_eq!(drain(&mut scheduler), [Job::Open(3)]);
    // The stalled load counts as open again when its server answers, but then fails and ends.
    scheduler.end();
    scheduler.resume(&1);
    scheduler.submit(4);
    assert_eq!(drain(&mut scheduler), [], "load 3 is open");
    scheduler.end();
    assert_eq!(drain(&mut scheduler), [Job::Open(4)]);
}

#[test]
fn load_at_its_share_is_passed_over_without_blocking() {
    let mut scheduler = Scheduler::new(1000, 40, 100, 8);
    for load in 1..4 {
        scheduler.submit(load);
        assert_eq!(scheduler.next(), Some(Job::Open(load)));
        scheduler.opened(load, demand(&[10, 10, 10], 10, Priority::Normal));
    }
    let taken: Vec<_> = drain(&mut scheduler).iter().map(|job| (*job.load(), matches!(job, Job::Allocate(..)))).collect();
    assert_eq!(taken, [(1, true), (2, true), (3, true)], "half of the limit is reserved for later loads");
    scheduler.freed(&2, 10, 0);
    assert_eq!(drain(&mut scheduler), [Job::Allocate(2, 1, need(10))], "the consumer of load 2 has dropped a segment");
    scheduler.forget(&1);
    assert_eq!(drain(&mut scheduler), [], "load 1's memory is still held");
    scheduler.freed(&1, 10, 0);
    scheduler.freed(&3, 10, 0);
    assert_eq!(drain(&mut scheduler), [Job::Allocate(3, 1, need(10))]);
}

#[test]
fn loads_wait_for_reservations_in_order_and_the_pool_yields() {
    let mut scheduler = Scheduler::new(1000, 40, 100, 8);
    for (load, reserved) in [(1, 30), (2, 20), (3, 5)] {
        scheduler.submit(load);
        assert_eq!(scheduler.next(), Some(Job::Open(load)));
        scheduler.opened(load, demand(&[reserved], reserved, Priority::Normal));
    }
    assert_eq!(drain(&mut scheduler), [Job::Allocate(1, 0, need(30))], "load 3 must not overtake load 2");
    scheduler.pooled(&1, 30);
    assert_eq!(
        drain(&mut scheduler),
        [Job::Allocate(3, 0, need(5)), Job::MakeRoom(2, 15)],
        "memory should be requested only once"
    );
    scheduler.freed(&1, 0, 30);
    assert_eq!(drain(&mut scheduler), [Job::Allocate(2, 0, need(20))]);
    assert_eq!(scheduler.memory_bytes(), 25);
}

#[test]
fn higher_priority_goes_first() {
    let mut scheduler = Scheduler::new(20, u64::MAX, 100, 8);
    for (load, priority) in [(1, Priority::Low), (2, Priority::Normal), (3, Priority::High)] {
        scheduler.submit(load);
        assert_eq!(scheduler.next(), Some(Job::Open(load)));
        scheduler.opened(load, demand(&[10, 10], 0, priority));
    }
    let mut order = Vec::new();
    for _ in 0..6 {
        let job = scheduler.next().unwrap();
        order.push(*job.load());
        scheduler.give_back(job.load(), need(10));
    }
    assert_eq!(order, [3, 3, 2, 2, 1, 1]);
}

#[test]
fn loads_start_in_order_of_arrival_though_opened_out_of_order() {
    let mut scheduler = Scheduler::new(1000, 40, 100, 8);
    (1..4).for_each(|load| scheduler.submit(load));
    assert_eq!(drain(&mut scheduler), [Job::Open(1), Job::Open(2), Job::Open(3)]);
    scheduler.opened(3, demand(&[30], 30, Priority::Normal));
    scheduler.opened(2, demand(&[30], 30, Priority::Normal));
    assert_eq!(drain(&mut scheduler), [], "load 1 came first");
    scheduler.opened(1, demand(&[30], 30, Priority::Normal));
    for load in 1..4 {
        assert_eq!(drain(&mut scheduler), [Job::Allocate(load, 0, need(30))]);
        scheduler.freed(&load, 30, 0);
    }
    // A load that can't be opened does not hold up others.
    scheduler.submit(4);
    scheduler.submit(5);
    assert_eq!(drain(&mut scheduler), [Job::Open(4), Job::Open(5)]);
    scheduler.opened(5, demand(&[30], 30, Priority::Normal));
    scheduler.forget(&4);
    assert_eq!(drain(&mut scheduler), [Job::Allocate(5, 0, need(30))]);
}
