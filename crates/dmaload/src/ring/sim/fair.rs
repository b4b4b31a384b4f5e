//! Loads whose reads never come back hold their part of everything, and no more: others go on beside them.

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
/// More than a load has pieces.
const ENOUGH: u16 = 1000;

/// What loads share.
#[derive(Debug, Clone, Copy)]
struct Shared {
    window_pieces: u16,
    depth: u16,
    staging_slots: u16,
    buffer_slots: u16,
}

/// Looks at everything, and has nothing against it.
#[derive(Debug)]
struct Content;

impl Observer for Content {
    fn bytes(&self, _: usize, _: u64, _: &[u8]) -> Result<(), Rejection> {
        Ok(())
    }
}

struct Machine {
    memory: Rc<RefCell<Memory>>,
    scheduler: Scheduler<LoadId>,
    driver: Driver<SimKernel, SimBuffer>,
    loads: BTreeMap<LoadId, (SimFile, Route, Plan)>,
    /// They are looked at in staging.
    observed: Vec<LoadId>,
    full: BTreeMap<LoadId, usize>,
}

impl Machine {
    fn new(seed: u64, shared: Shared, faults: &Faults) -> Self {
        let memory: Rc<RefCell<Memory>> = Rc::default();
        let clock: Rc<Cell<Duration>> = Rc::default();
        let faults = Faults { buffer_slots: shared.buffer_slots, ..faults.clone() };
        let staging = StagingBudget { slot_bytes: 4096, slots: shared.staging_slots.into() };
        let kernel = SimKernel::new(seed, faults, &memory, &clock, Duration::ZERO);
        Machine {
            memory,
            scheduler: Scheduler::new(u64::from(shared.window_pieces) * BLOCK, u64::MAX, 1, 8),
            driver: Driver::new(kernel, shared.depth.into(), staging),
            loads: BTreeMap::new(),
            observed: Vec::new(),
            full: BTreeMap::new(),
        }
    }

    fn submit(&mut self, number: u64, route: Route, hangs: bool) {
        let bytes = PIECES as u64 * BLOCK;
        let shape = Shape { layout: Layout::Segmented, segment_bytes: BLOCK, batch_bytes: BLOCK, packed: false, batch_files: 64 };
        let plan = Plan::new(&[BLOCK], &[Span::whole(0, bytes)], shape);
        let file = SimFile { number, bytes, faults: Rc::new(FileFaults { hangs, ..FileFaults::default() }) };
        self.loads.insert(LoadId(number), (file, route, plan));
        self.scheduler.submit(LoadId(number));
    }

    /// Goes on until nothing moves any more; who is done then.
    fn run(&mut self) -> Vec<LoadId> {
        let mut idle = 0;
        while idle < 100 {
            idle += 1;
            while let Some(job) = self.scheduler.next() {
                idle = 0;
                self.act(job);
            }
            self.driver.issue();
            self.driver.turn(false).unwrap();
            self.driver.kernel().complete_due();
            for output in self.driver.outputs() {
                idle = 0;
                match output {
                    Output::PieceFull { load, piece, buffer, .. } => {
                        let start = piece as u64 * BLOCK;
                        let right = (start..).zip(buffer.contents()).all(|(at, &byte)| byte == byte_of(load.0, at));
                        assert!(right, "piece {piece} of {load:?}");
                        drop(buffer);
                        *self.full.entry(load).or_default() += 1;
                        self.scheduler.give_back(&load, Need { bytes: BLOCK, ..Need::default() });
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

    fn act(&mut self, job: Job<LoadId>) {
        let (file, route, plan) = &self.loads[job.load()];
        match job {
            Job::Open(id) => {
                self.driver.begin(LoadSpec {
                    id,
                    pieces: plan.pieces.len(),
                    chunk_bytes: BLOCK,
                    strict: true,
                    trace: false,
                    observation: self.observed.contains(&id).then(|| Observation {
                        watch: Arc::new(Watch::new(Some(ObserverOption::new(Arc::new(Content))))),
                        staged: true,
                    }),
                });
                let batches = plan.batches.iter().map(|batch| Need { bytes: batch.bytes, ..Need::default() }).collect();
                self.scheduler.opened(id, LoadNeeds { batches, ..LoadNeeds::default() });
            }
            Job::Allocate(id, number, _) => {
                let spec = FileSpec {
                    handle: file.clone(),
                    index: 0,
                    route: *route,
                    staged_by: Route::UringFixedDirect,
                    mount: 0,
                    alignment_bytes: BLOCK,
                    cached: CachedChunks::default(),
                };
                self.driver.piece(id, number, plan.pieces[number], spec, SimBuffer::new(id, BLOCK, &self.memory));
            }
            other => unreachable!("{other:?}"),
        }
    }
}

#[test]
fn loads_whose_reads_never_come_back_stop_nobody_else() {
    let enough = Shared { window_pieces: ENOUGH, depth: ENOUGH, staging_slots: ENOUGH, buffer_slots: ENOUGH };
    let scarce = [
        Shared { window_pieces: 8, ..enough },
        Shared { depth: 8, ..enough },
        Shared { staging_slots: 8, ..enough },
        Shared { buffer_slots: 8, ..enough },
    ];
    let routes = Route::ALL;
    for shared in scarce {
        for (hung_by, others_by) in routes.into_iter().flat_map(|hung_by| routes.map(|others_by| (hung_by, others_by))) {
            let mut machine = Machine::new(1, shared, &Faults::none());
            for number in 0..2 {
                machine.submit(number, hung_by, true);
                assert_eq!(machine.run(), [], "{hung_by}: they hang");
            }
            let others = [2, 3, 4].map(LoadId);
            for other in others {
                machine.submit(other.0, others_by, false);
            }
            assert_eq!(machine.run(), others, "by {others_by} beside two that hang by {hung_by}, of {shared:?}");
            machine.driver.give_up(Failure::Kernel { errno: rustix::io::Errno::TIMEDOUT });
            machine.driver.kernel().complete_late();
        }
    }
}

/// What an observed load has in staging waits for the chunk before, which may have to be read once more: its slot must not go to others
/// for good.
#[test]
fn an_observed_load_goes_on_beside_those_that_hang() {
    let faults = Faults { short_per_mille: 300, interrupted_per_mille: 300, ..Faults::none() };
    let shared = Shared { window_pieces: ENOUGH, depth: ENOUGH, staging_slots: 8, buffer_slots: ENOUGH };
    for seed in 0..300 {
        let mut machine = Machine::new(seed, shared, &faults);
        machine.observed = vec![LoadId(0)];
        for number in 0..2 + seed % 5 {
            machine.submit(number, Route::Bounce, number > 0);
        }
        assert_eq!(machine.run(), [LoadId(0)], "seed {seed}");
        machine.driver.give_up(Failure::Kernel { errno: rustix::io::Errno::TIMEDOUT });
        machine.driver.kernel().complete_late();
    }
}
