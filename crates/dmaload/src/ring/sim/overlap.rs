//! The point of it all: allocating and reading take as long as the longer of the two, not as long as both.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use super::kernel::{BLOCK, Faults, FileFaults, Memory, SimBuffer, SimFile, SimKernel};
use crate::plan::{Layout, Plan, Shape, Span};
use crate::ring::driver::Driver;
use crate::ring::message::{FileSpec, LoadId, LoadSpec, Output};
use crate::ring::staging::StagingBudget;
use crate::route::Route;
use crate::schedule::{Demand, Job, Need, Scheduler};
use crate::source::CachedChunks;

const PIECES: u32 = 24;
const STAGING: StagingBudget = StagingBudget { slot_bytes: 4096, slots: 4 };

/// Loads a file of 24 pieces with one allocator that takes `allocating` a piece and a disk that takes `reading` a piece;
/// returns how long it took, and how far the allocator ever was ahead, in pieces.
fn simulate(window_pieces: u64, allocating: Duration, reading: Duration) -> (Duration, u64) {
    simulate_route(Route::UringFixedDirect, window_pieces, allocating, reading, Duration::ZERO)
}

/// The same by any route; a copy from staging takes `copying` a piece.
fn simulate_route(
    route: Route,
    window_pieces: u64,
    allocating: Duration,
    reading: Duration,
    copying: Duration,
) -> (Duration, u64) {
    let memory: Rc<RefCell<Memory>> = Rc::default();
    let clock: Rc<Cell<Duration>> = Rc::default();
    let shape = Shape { layout: Layout::Segmented, segment_bytes: BLOCK, batch_bytes: BLOCK, packed: false, batch_files: 64 };
    let bytes = u64::from(PIECES) * BLOCK;
    let plan = Plan::new(&[BLOCK], &[Span::whole(0, bytes)], shape);
    let file = SimFile { number: 1, bytes, faults: Rc::new(FileFaults::default()) };
    let id = LoadId(0);
    let mut scheduler = Scheduler::new(window_pieces * BLOCK, u64::MAX, 1, 1);
    let mut driver: Driver<_, SimBuffer> = Driver::new(SimKernel::new(1, Faults::none(), &memory, &clock, reading), 32, STAGING);
    driver.kernel().copying = copying;
    driver.begin(LoadSpec { id, pieces: plan.pieces.len(), chunk_bytes: BLOCK, strict: true, trace: false, observation: None });
    scheduler.submit(id);
    assert_eq!(scheduler.next(), Some(Job::Open(id)));
    let batches = plan.batches.iter().map(|batch| Need { bytes: batch.bytes, ..Need::default() }).collect();
    scheduler.opened(id, Demand { batches, ..Demand::default() });

    let mut allocation: Option<(usize, Duration)> = None;
    let (mut out, mut most_out) = (0, 0);
    loop {
        if let Some((number, _)) = allocation.filter(|&(_, due)| due <= clock.get()) {
            allocation = None;
            let spec = FileSpec {
                handle: file.clone(),
                index: 0,
                route,
                staged_by: Route::UringFixedDirect,
                mount: 0,
                alignment_bytes: BLOCK,
                cached: CachedChunks::default(),
            };
            driver.piece(id, number, plan.pieces[number], spec, SimBuffer::new(id, BLOCK, &memory));
        }
        driver.kernel().complete_due();
        driver.issue();
        driver.turn(false).unwrap();
        for output in driver.outputs() {
            match output {
                Output::PieceFull { .. } => {
                    out -= 1;
                    scheduler.give_back(&id, Need { bytes: BLOCK, ..Need::default() });
                }
                Output::Gone { .. } => return (clock.get(), most_out),
                other => panic!("{other:?}"),
            }
        }
        if allocation.is_none()
            && let Some(Job::Allocate(_, number, _)) = scheduler.next()
        {
            out += 1;
            most_out = most_out.max(out);
            allocation = Some((number, clock.get() + allocating));
        }
        let next = allocation.map(|(_, due)| due).into_iter().chain(driver.kernel().next_due()).min();
        clock.set(next.expect("something is under way until the load is gone"));
    }
}

const MS: Duration = Duration::from_millis(1);

#[test]
fn the_longer_part_hides_the_shorter_one() {
    for (allocating, reading) in [(10, 10), (10, 3), (3, 10), (10, 1), (1, 10)] {
        let (total, _) = simulate(2, allocating * MS, reading * MS);
        let (longer, shorter) = (allocating.max(reading), allocating.min(reading));
        // One piece must be allocated before the first read, and one read comes after the last allocation.
        assert_eq!(total, (PIECES * longer + shorter) * MS, "allocating {allocating} ms, reading {reading} ms");
    }
}

#[test]
fn bounced_reads_copies_and_allocation_all_overlap() {
    for (allocating, reading, copying) in [(10, 10, 10), (3, 10, 5), (10, 3, 5), (1, 10, 10)] {
        let (total, _) = simulate_route(Route::Bounce, 4, allocating * MS, reading * MS, copying * MS);
        let longest = allocating.max(reading).max(copying);
        // Each piece passes through all three; only one of them is waited for.
        assert_eq!(total, ((PIECES - 1) * longest + allocating + reading + copying) * MS, "{allocating} {reading} {copying}");
    }
}

#[test]
fn with_a_window_of_one_piece_nothing_overlaps() {
    let (total, _) = simulate(1, 10 * MS, 10 * MS);
    assert_eq!(total, PIECES * 20 * MS);
}

#[test]
fn the_allocator_never_runs_more_than_the_window_ahead() {
    // What has room for four or more keeps some of it for other loads.
    for (window, most) in [(1, 1), (2, 2), (3, 3), (4, 3), (8, 6), (16, 12)] {
        // A disk so slow that only the window holds the allocator back.
        let (_, most_ahead) = simulate(window, MS, 1000 * MS);
        assert_eq!(most_ahead, most);
    }
}
