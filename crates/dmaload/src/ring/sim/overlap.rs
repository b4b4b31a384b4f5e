//! Tests that allocating, reading and copying overlap. A load should take about as long as the
//! longest of these phases, not as long as all of them in sequence.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use super::disk::{BLOCK, FileFaults, SimFile};
use super::faults::Faults;
use super::kernel::SimKernel;
use super::memory::{Memory, SimBuffer};
use crate::engine::schedule::{Job, LoadNeeds, Need, Scheduler};
use crate::files::source::CachedChunks;
use crate::options::choices::Layout;
use crate::plan::{Plan, Shape, Span};
use crate::ring::driver::Driver;
use crate::ring::message::{FileSpec, LoadEvent, LoadSpec, Output};
use crate::ring::staging::StagingBudget;
use crate::route::Route;
use crate::support::id::LoadId;

const PIECES: u32 = 24;
const STAGING: StagingBudget = StagingBudget { slot_bytes: 4096, slots: 4 };

/// A load, and the machine that it runs on. Durations are per piece.
#[derive(Debug, Clone)]
struct TimedMachine {
    route: Route,
    pieces: u32,
    window_pieces: u64,
    staging: StagingBudget,
    /// Whether memory is populated when bytes are copied to it, rather than before reads.
    filled_by_copiers: bool,
    allocating: Duration,
    reading: Duration,
    copying: Duration,
    /// The number of copiers; 0 means one for each copy.
    copiers: usize,
}

/// Simulates loading a file of [`PIECES`] pieces with one allocator that takes `allocating` per
/// piece, and a disk that takes `reading` per piece. Returns how long the load took, and the peak
/// number of pieces that were being allocated or filled.
fn simulate(window_pieces: u64, allocating: Duration, reading: Duration) -> (Duration, u64) {
    simulate_route(Route::UringFixedDirect, window_pieces, allocating, reading, Duration::ZERO)
}

/// Like [`simulate`], but with the given route. A copy from staging takes `copying` per piece.
fn simulate_route(
    route: Route,
    window_pieces: u64,
    allocating: Duration,
    reading: Duration,
    copying: Duration,
) -> (Duration, u64) {
    let machine = TimedMachine {
        route,
        pieces: PIECES,
        window_pieces,
        staging: STAGING,
        filled_by_copiers: false,
        allocating,
        reading,
        copying,
        copiers: 0,
    };
    let (total, most_out, ..) = simulate_machine(&machine);
    (total, most_out)
}

/// Simulates a load. Returns its duration, the peak number of pieces that were being allocated or
/// filled, the peak number of reads in flight, and the number of requests to populate memory.
fn simulate_machine(machine: &TimedMachine) -> (Duration, u64, usize, usize) {
    let &TimedMachine { route, pieces, window_pieces, staging, filled_by_copiers, allocating, reading, copying, copiers } =
        machine;
    let memory: Rc<RefCell<Memory>> = Rc::default();
    let clock: Rc<Cell<Duration>> = Rc::default();
    let shape = Shape { layout: Layout::Segmented, segment_bytes: BLOCK, batch_bytes: BLOCK, packed: false, batch_files: 64 };
    let bytes = u64::from(pieces) * BLOCK;
    let plan = Plan::new(&[BLOCK], &[Span::whole(0, bytes)], shape);
    let file = SimFile { number: 1, bytes, faults: Rc::new(FileFaults::default()) };
    let id = LoadId(0);
    let mut scheduler = Scheduler::new(window_pieces * BLOCK, u64::MAX, 1, 1);
    let mut driver: Driver<_, SimBuffer> = Driver::new(SimKernel::new(1, Faults::none(), &memory, &clock, reading), 32, staging);
    driver.kernel().copying = copying;
    driver.kernel().copiers = vec![Duration::ZERO; copiers];
    driver.begin(LoadSpec { id, pieces: plan.pieces.len(), chunk_bytes: BLOCK, strict: true, trace: false, observation: None });
    scheduler.submit(id);
    assert_eq!(scheduler.next(), Some(Job::Open(id)));
    let batches = plan.batches.iter().map(|batch| Need { bytes: batch.bytes, ..Need::default() }).collect();
    scheduler.opened(id, LoadNeeds { batches, ..LoadNeeds::default() });

    let mut allocation: Option<(usize, Duration)> = None;
    let (mut out, mut most_out, mut most_reads) = (0, 0, 0);
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
                in_memory: false,
                cached: CachedChunks::default(),
            };
            let buffer = if filled_by_copiers {
                SimBuffer::unpopulated(id, BLOCK, &memory, None)
            } else {
                SimBuffer::new(id, BLOCK, &memory)
            };
            driver.enqueue_piece(id, number, plan.pieces[number], spec, buffer);
        }
        driver.kernel().complete_due();
        driver.turn(false).unwrap();
        // Completions make room for reads, which are issued without delay.
        driver.issue();
        driver.turn(false).unwrap();
        most_reads = most_reads.max(driver.kernel().reads_in_flight());
        for output in driver.take_outputs() {
            match output {
                Output::PieceFull { .. } => {
                    out -= 1;
                    scheduler.give_back(&id, Need { bytes: BLOCK, ..Need::default() });
                }
                Output::Event { event: LoadEvent::Gone { .. }, .. } => {
                    return (clock.get(), most_out, most_reads, driver.kernel().populate_requests);
                }
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
        clock.set(next.expect("something should be in progress until the load is gone"));
    }
}

const MS: Duration = Duration::from_millis(1);

#[test]
fn longer_phase_hides_the_shorter_one() {
    for (allocating, reading) in [(10, 10), (10, 3), (3, 10), (10, 1), (1, 10)] {
        let (total, _) = simulate(2, allocating * MS, reading * MS);
        let (longer, shorter) = (allocating.max(reading), allocating.min(reading));
        // The shorter phase adds only the time for one piece: the first allocation or the last
        // read.
        assert_eq!(total, (PIECES * longer + shorter) * MS, "allocating {allocating} ms, reading {reading} ms");
    }
}

#[test]
fn bounced_reads_copies_and_allocation_all_overlap() {
    for (allocating, reading, copying) in [(10, 10, 10), (3, 10, 5), (10, 3, 5), (1, 10, 10)] {
        let (total, _) = simulate_route(Route::Bounce, 4, allocating * MS, reading * MS, copying * MS);
        let longest = allocating.max(reading).max(copying);
        // Each piece passes through all three phases, but only the longest one limits the rate.
        assert_eq!(total, ((PIECES - 1) * longest + allocating + reading + copying) * MS, "{allocating} {reading} {copying}");
    }
}

/// Simulates staged reads with two copiers that also populate; `copying` covers both. Returns how
/// long the load took, the peak number of reads in flight, and the number of requests to populate
/// memory.
fn simulate_staged(slots: usize, reading: Duration, copying: Duration) -> (Duration, usize, usize) {
    let machine = TimedMachine {
        route: Route::Bounce,
        pieces: PIECES,
        window_pieces: 64,
        staging: StagingBudget { slots, ..STAGING },
        filled_by_copiers: true,
        allocating: Duration::ZERO,
        reading,
        copying,
        copiers: 2,
    };
    let (total, _, most_reads, requests) = simulate_machine(&machine);
    (total, most_reads, requests)
}

#[test]
fn reads_overlap_with_copies_that_populate() {
    for (reading, copying) in [(10, 5), (10, 10), (10, 18), (5, 20), (1, 20)] {
        // If the disk is the bottleneck, the last copy follows the last read. If the two copiers
        // are the bottleneck, the second one starts after two reads.
        let disk = PIECES * reading + copying;
        let copiers = PIECES / 2 * copying + 2 * reading;
        let (total, ..) = simulate_staged(8, reading * MS, copying * MS);
        assert_eq!(total, disk.max(copiers) * MS, "reading {reading} ms, copying {copying} ms");
    }
}

/// Copiers populate memory in advance only while they would otherwise be idle.
#[test]
fn memory_is_populated_ahead_unless_copies_are_waiting() {
    let requests = |reading, copying| simulate_staged(8, reading * MS, copying * MS).2;
    assert_eq!(requests(10, 5), PIECES as usize, "one request for each read");
    let busy = requests(1, 20);
    assert!(busy < PIECES as usize / 2, "{busy} requests even though the copiers are always busy");
}

/// Devices finish all their reads at about the same time. If reads used all slots, reads and
/// copies would wait for each other.
#[test]
fn some_staging_is_left_for_copies() {
    for (slots, most) in [(1, 1), (2, 1), (4, 3), (8, 4), (16, 9)] {
        let (_, most_reads, _) = simulate_staged(slots, 10 * MS, MS);
        assert_eq!(most_reads, most, "of {slots} slots, one load should read into {most} at once");
    }
}

#[test]
fn window_of_one_piece_prevents_overlap() {
    let (total, _) = simulate(1, 10 * MS, 10 * MS);
    assert_eq!(total, PIECES * 20 * MS);
}

#[test]
fn allocator_stays_within_the_window() {
    // A window of four or more pieces reserves some for other file systems; one of 16 or more also
    // reserves a piece for other loads from the same file system.
    for (window, most) in [(1, 1), (2, 2), (3, 3), (4, 3), (8, 6), (16, 11)] {
        // The disk is so slow that only the window limits the allocator.
        let (_, most_ahead) = simulate(window, MS, 1000 * MS);
        assert_eq!(most_ahead, most);
    }
}

/// Batches are prepared by several threads, so pieces may be enqueued out of order.
#[test]
fn queued_pieces_are_read_in_file_order() {
    let memory: Rc<RefCell<Memory>> = Rc::default();
    let clock: Rc<Cell<Duration>> = Rc::default();
    let shape = Shape { layout: Layout::Segmented, segment_bytes: BLOCK, batch_bytes: BLOCK, packed: false, batch_files: 64 };
    let plan = Plan::new(&[BLOCK], &[Span::whole(0, 5 * BLOCK)], shape);
    let file = SimFile { number: 1, bytes: 5 * BLOCK, faults: Rc::new(FileFaults::default()) };
    let id = LoadId(0);
    // With a depth of 1, reads are issued one at a time.
    let mut driver: Driver<_, SimBuffer> = Driver::new(SimKernel::new(1, Faults::none(), &memory, &clock, MS), 1, STAGING);
    driver.begin(LoadSpec { id, pieces: 5, chunk_bytes: BLOCK, strict: true, trace: false, observation: None });
    for number in [2, 0, 4, 3, 1] {
        let spec = FileSpec {
            handle: file.clone(),
            index: 0,
            route: Route::UringDirect,
            staged_by: Route::UringFixedDirect,
            mount: 0,
            alignment_bytes: BLOCK,
            in_memory: false,
            cached: CachedChunks::default(),
        };
        driver.enqueue_piece(id, number, plan.pieces[number], spec, SimBuffer::new(id, BLOCK, &memory));
    }
    let mut full = Vec::new();
    while full.len() < 5 {
        driver.issue();
        driver.turn(false).unwrap();
        let due = driver.kernel().next_due().expect("a read should be in flight");
        clock.set(due);
        driver.kernel().complete_due();
        driver.turn(false).unwrap();
        full.extend(driver.take_outputs().into_iter().filter_map(|output| match output {
            Output::PieceFull { piece, .. } => Some(piece),
            Output::Event { .. } => None,
        }));
    }
    assert_eq!(full, [0, 1, 2, 3, 4]);
}
