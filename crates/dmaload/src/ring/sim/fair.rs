//! Tests that loads whose reads never complete hold at most their file system's share of each
//! resource, so other loads can proceed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::disk::{BLOCK, FileFaults, SimFile, byte_of};
use super::faults::Faults;
use super::kernel::SimKernel;
use super::memory::{Memory, SimBuffer};
use crate::engine::schedule::{Job, LoadNeeds, Need, Scheduler};
use crate::files::source::CachedChunks;
use crate::options::choices::Layout;
use crate::options::observer::{Observer, ObserverOption, Rejection};
use crate::plan::{Plan, Shape, Span};
use crate::ring::driver::Driver;
use crate::ring::message::{Failure, FileSpec, LoadEvent, LoadSpec, Output};
use crate::ring::staging::StagingBudget;
use crate::ring::watch::{Observation, Watch};
use crate::route::Route;
use crate::support::id::LoadId;

const PIECES: usize = 24;
/// More of a resource than all loads in a test need.
const ENOUGH: u16 = 1000;

/// How much there is of each resource that the loads share.
#[derive(Debug, Clone, Copy)]
struct Shared {
    window_pieces: u16,
    depth: u16,
    staging_slots: u16,
    buffer_slots: u16,
}

#[derive(Debug)]
struct AcceptAll;

impl Observer for AcceptAll {
    fn bytes(&self, _: usize, _: u64, _: &[u8]) -> Result<(), Rejection> {
        Ok(())
    }
}

struct FairLoad {
    file: SimFile,
    file_system: u64,
    route: Route,
    plan: Plan,
}

fn need(load: &FairLoad) -> Need {
    Need { bytes: BLOCK, file_system: load.file_system, ..Need::default() }
}

struct FairMachine {
    memory: Rc<RefCell<Memory>>,
    scheduler: Scheduler<LoadId>,
    driver: Driver<SimKernel, SimBuffer>,
    loads: BTreeMap<LoadId, FairLoad>,
    /// Loads that are observed in staging.
    observed: Vec<LoadId>,
    full: BTreeMap<LoadId, usize>,
}

impl FairMachine {
    fn new(seed: u64, shared: Shared, faults: &Faults) -> Self {
        let memory: Rc<RefCell<Memory>> = Rc::default();
        let clock: Rc<Cell<Duration>> = Rc::default();
        let faults = Faults { buffer_slots: shared.buffer_slots, ..faults.clone() };
        let staging = StagingBudget { slot_bytes: 4096, slots: shared.staging_slots.into() };
        let kernel = SimKernel::new(seed, faults, &memory, &clock, Duration::ZERO);
        FairMachine {
            memory,
            scheduler: Scheduler::new(u64::from(shared.window_pieces) * BLOCK, u64::MAX, 1, 64),
            driver: Driver::new(kernel, shared.depth.into(), staging),
            loads: BTreeMap::new(),
            observed: Vec::new(),
            full: BTreeMap::new(),
        }
    }

    fn submit(&mut self, number: u64, file_system: u64, route: Route, hangs: bool) {
        let bytes = PIECES as u64 * BLOCK;
        let shape = Shape { layout: Layout::Segmented, segment_bytes: BLOCK, batch_bytes: BLOCK, packed: false, batch_files: 64 };
        let plan = Plan::new(&[BLOCK], &[Span::whole(0, bytes)], shape);
        let file = SimFile { number, bytes, faults: Rc::new(FileFaults { hangs, ..FileFaults::default() }) };
        self.loads.insert(LoadId(number), FairLoad { file, file_system, route, plan });
        self.scheduler.submit(LoadId(number));
    }

    /// Runs until nothing changes any more. Returns the loads that have completed.
    fn run(&mut self) -> Vec<LoadId> {
        let mut idle = 0;
        while idle < 100 {
            idle += 1;
            while let Some(job) = self.scheduler.next() {
                idle = 0;
                self.run_job(job);
            }
            self.driver.issue();
            self.driver.turn(false).unwrap();
            self.driver.kernel().complete_due();
            for output in self.driver.take_outputs() {
                idle = 0;
                match output {
                    Output::PieceFull { load, piece, buffer, .. } => {
                        let start = piece as u64 * BLOCK;
                        let right = (start..).zip(buffer.contents()).all(|(at, &byte)| byte == byte_of(load.0, at));
                        assert!(right, "piece {piece} of {load:?} has wrong bytes");
                        drop(buffer);
                        *self.full.entry(load).or_default() += 1;
                        self.scheduler.give_back(&load, need(&self.loads[&load]));
                    }
                    Output::Event { load, event: LoadEvent::Gone { .. } } => {
                        self.scheduler.end();
                        assert_eq!(self.full.get(&load), Some(&PIECES));
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        self.full.iter().filter(|&(_, &full)| full == PIECES).map(|(&load, _)| load).collect()
    }

    fn run_job(&mut self, job: Job<LoadId>) {
        let load = &self.loads[job.load()];
        let FairLoad { file, file_system, route, plan } = load;
        match job {
            Job::Open(id) => {
                self.driver.begin(LoadSpec {
                    id,
                    pieces: plan.pieces.len(),
                    chunk_bytes: BLOCK,
                    strict: true,
                    trace: false,
                    observation: self.observed.contains(&id).then(|| Observation {
                        watch: Arc::new(Watch::new(Some(ObserverOption::new(Arc::new(AcceptAll))))),
                        staged: true,
                    }),
                });
                let batches = plan.batches.iter().map(|_| need(load)).collect();
                self.scheduler.opened(id, LoadNeeds { batches, ..LoadNeeds::default() });
            }
            Job::Allocate(id, number, _) => {
                let spec = FileSpec {
                    handle: file.clone(),
                    index: 0,
                    route: *route,
                    staged_by: Route::UringFixedDirect,
                    mount: *file_system,
                    alignment_bytes: BLOCK,
                    in_memory: false,
                    cached: CachedChunks::default(),
                };
                self.driver.enqueue_piece(id, number, plan.pieces[number], spec, SimBuffer::new(id, BLOCK, &self.memory));
            }
            other => unreachable!("{other:?}"),
        }
    }

    /// Gives up, as a shutdown does at its deadline.
    fn give_up(mut self) {
        self.driver.give_up(Failure::Kernel { errno: rustix::io::Errno::TIMEDOUT });
        self.driver.kernel().complete_late();
    }
}

const PLENTY: Shared = Shared { window_pieces: ENOUGH, depth: ENOUGH, staging_slots: ENOUGH, buffer_slots: ENOUGH };

/// Returns four cases. In each of them, one of the resources is scarce, with only the given number
/// of units.
fn each_scarce(window_pieces: u16, depth: u16, staging_slots: u16, buffer_slots: u16) -> [Shared; 4] {
    [
        Shared { window_pieces, ..PLENTY },
        Shared { depth, ..PLENTY },
        Shared { staging_slots, ..PLENTY },
        Shared { buffer_slots, ..PLENTY },
    ]
}

/// Combines each scarce resource with each pair of routes: one for the loads whose reads never
/// complete, and one for the other loads.
fn each_case(scarce: [Shared; 4]) -> impl Iterator<Item = (Shared, Route, Route)> {
    let routes = || Route::ALL.into_iter();
    let pairs = move || routes().flat_map(move |hung_by| routes().map(move |others_by| (hung_by, others_by)));
    scarce.into_iter().flat_map(move |shared| pairs().map(move |(hung_by, others_by)| (shared, hung_by, others_by)))
}

/// Loads from a third file system proceed, whichever resource is scarce, and whether one load or
/// ten hang on each of two file systems that have stopped responding.
#[test]
fn two_silent_file_systems_do_not_stop_a_third() {
    for (shared, hung_by, others_by) in each_case(each_scarce(8, 8, 8, 8)) {
        for loads in [1, 10] {
            let mut machine = FairMachine::new(1, shared, &Faults::none());
            for number in 0..2 * loads {
                machine.submit(number, number / loads, hung_by, true);
            }
            assert_eq!(machine.run(), [], "loads through {hung_by} should hang");
            let others = [20, 21, 22].map(LoadId);
            for other in others {
                machine.submit(other.0, 2, others_by, false);
            }
            let case = format!(
                "loads through {others_by} should finish despite {loads} hanging loads through {hung_by} from each of two file systems, with {shared:?}"
            );
            assert_eq!(machine.run(), others, "{case}");
            machine.give_up();
        }
    }
}

/// Loads also proceed if 20 loads from a file system that has stopped responding are submitted
/// just before them.
#[test]
fn loads_that_start_alongside_many_silent_ones_proceed() {
    for (shared, hung_by, others_by) in each_case(each_scarce(8, 8, 8, 8)) {
        let mut machine = FairMachine::new(2, shared, &Faults::none());
        for number in 0..20 {
            machine.submit(number, 0, hung_by, true);
        }
        let others = [20, 21, 22].map(LoadId);
        for other in others {
            machine.submit(other.0, 1, others_by, false);
        }
        assert_eq!(
            machine.run(),
            others,
            "loads through {others_by} should finish despite many hanging loads through {hung_by}, with {shared:?}"
        );
        machine.give_up();
    }
}

/// If there is room for 16 permits, a load that hangs leaves one for other loads from its file
/// system.
#[test]
fn silent_load_leaves_a_share_to_its_file_system() {
    // Of 22 slots, 16 may be read into at once.
    for (shared, hung_by, others_by) in each_case(each_scarce(16, 16, 22, 16)) {
        let mut machine = FairMachine::new(3, shared, &Faults::none());
        machine.submit(0, 0, hung_by, true);
        assert_eq!(machine.run(), [], "a load through {hung_by} should hang");
        let others = [1, 2, 3].map(LoadId);
        for other in others {
            machine.submit(other.0, 0, others_by, false);
        }
        assert_eq!(
            machine.run(),
            others,
            "loads through {others_by} should finish despite a hanging load through {hung_by}, with {shared:?}"
        );
        machine.give_up();
    }
}

/// Healthy loads never deadlock, however scarce the resources are and whichever loads have
/// observers.
#[test]
fn many_loads_of_one_file_system_all_finish() {
    for seed in 0..50 {
        let little = [1, 2, 3, 4, 5, 8, 17];
        let pick = |at: u64| little[usize::try_from((seed / 7_u64.pow(u32::try_from(at).unwrap()) + seed) % 7).unwrap()];
        let shared = Shared { window_pieces: pick(0), depth: pick(1), staging_slots: pick(2), buffer_slots: pick(3) };
        let faults = Faults { short_per_mille: 200, interrupted_per_mille: 200, ..Faults::none() };
        let mut machine = FairMachine::new(seed, shared, &faults);
        let all: Vec<_> = (0..16).map(LoadId).collect();
        // As in the engine, a load that is observed in staging starts at `bounce` or a less
        // preferred route.
        machine.observed = all.iter().copied().filter(|load| (load.0 + seed).is_multiple_of(3)).collect();
        for load in &all {
            let route = if machine.observed.contains(load) {
                Route::Bounce
            } else {
                Route::ALL[usize::try_from((load.0 * 5 + seed) % Route::ALL.len() as u64).unwrap()]
            };
            machine.submit(load.0, 0, route, false);
        }
        assert_eq!(machine.run(), all, "seed {seed}, with {shared:?}");
    }
}

/// Chunks of a load with an observer hold their slots until all earlier chunks have been observed,
/// and an earlier chunk may have to be read again. Hanging loads must not hold all the slots that
/// this read could use.
#[test]
fn observed_load_proceeds_despite_hanging_ones() {
    let faults = Faults { short_per_mille: 300, interrupted_per_mille: 300, ..Faults::none() };
    let shared = Shared { staging_slots: 8, ..PLENTY };
    for seed in 0..300 {
        let mut machine = FairMachine::new(seed, shared, &faults);
        machine.observed = vec![LoadId(0)];
        for number in 0..2 + seed % 20 {
            machine.submit(number, if number == 0 { 0 } else { 1 + number % 2 }, Route::Bounce, number > 0);
        }
        assert_eq!(machine.run(), [LoadId(0)], "seed {seed}");
        machine.give_up();
    }
}
