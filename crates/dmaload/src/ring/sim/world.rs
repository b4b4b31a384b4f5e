//! A world generated from a seed. It has up to five loads, some of which encounter faults or are
//! abandoned.

mod checks;
mod load;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use self::load::{SimLoad, SimObserver};
use super::Random;
use super::disk::{BLOCK, FileFaults, SimFile};
use super::faults::Faults;
use super::kernel::SimKernel;
use super::memory::{Memory, SimBuffer};
use crate::engine::schedule::{Job, LoadNeeds, Need, Scheduler};
use crate::files::source::CachedChunks;
use crate::options::choices::Layout;
use crate::options::observer::ObserverOption;
use crate::plan::{Plan, Shape, Span};
use crate::ring::driver::Driver;
use crate::ring::message::{Failure, FileSpec, LoadEvent, LoadSpec, Output};
use crate::ring::pace::{Pace, more_staging_slots};
use crate::ring::staging::StagingBudget;
use crate::ring::watch::{Observation, Watch};
use crate::route::Route;
use crate::support::id::LoadId;
use crate::telemetry::metrics::ReadCounters;

/// The permit that a load needs for `bytes` bytes of memory. There are two file systems. A load
/// may have files on both, but all of its memory counts towards one of them.
fn need(load: LoadId, bytes: u64) -> Need {
    Need { bytes, file_system: load.0 % 2, ..Need::default() }
}

/// If everything in flight hangs for more than this many consecutive steps, the world is shut
/// down.
const PATIENCE: u32 = 200;

/// A batch whose memory is being allocated. It holds a permit of `bytes` bytes.
struct Allocating {
    load: LoadId,
    batch: usize,
    bytes: u64,
}

pub(super) struct World {
    random: Random,
    faults: Faults,
    memory: Rc<RefCell<Memory>>,
    clock: Rc<Cell<Duration>>,
    window_bytes: u64,
    depth: usize,
    scheduler: Scheduler<LoadId>,
    driver: Driver<SimKernel, SimBuffer>,
    pub(super) loads: BTreeMap<LoadId, SimLoad>,
    allocating: Vec<Allocating>,
    alloc_fails_per_mille: u64,
    abandon_per_mille: u64,
    pub(super) leaked_bytes: u64,
    counters: Arc<ReadCounters>,
    /// Whether the ring broke or a shutdown reached its deadline.
    broken: bool,
    staging: StagingBudget,
}

const MOST_COPIERS: usize = 4;

fn random_staging(random: &mut Random) -> StagingBudget {
    let slots = 1 + usize::try_from(random.below(4)).unwrap();
    StagingBudget { slot_bytes: usize::try_from((1 + random.below(2)) * BLOCK).unwrap(), slots }
}

fn random_shape(random: &mut Random) -> Shape {
    let layout = *random.pick(&[Layout::Segmented, Layout::Single]);
    let (batch_pages, batches) = (1 + random.below(4), *random.pick(&[1, 2, 3, 8]));
    Shape {
        layout,
        segment_bytes: batch_pages * batches * BLOCK,
        batch_bytes: batch_pages * BLOCK,
        packed: random.chance(500),
        batch_files: 64,
    }
}

/// Returns a random file and its planned length.
fn random_file(random: &mut Random, number: u64, calm: bool) -> (SimFile, u64) {
    let pages = random.below(14);
    let planned = match random.below(4) {
        0 => pages * BLOCK,
        1 => (pages * BLOCK).saturating_sub(1),
        2 => pages * BLOCK + 1,
        _ => random.below(14 * BLOCK),
    };
    let mut bytes = planned;
    let mut faults = FileFaults::default();
    if !calm {
        match random.below(40) {
            0 if planned > 0 => bytes = random.below(planned),
            1..4 => bytes = planned + random.below(3 * BLOCK),
            4 if planned > 0 => {
                let start = random.below(planned) / BLOCK * BLOCK;
                faults.bad = Some((start..start + BLOCK, *random.pick(&[Errno::IO, Errno::NODATA])));
            }
            5..8 => faults.no_direct = Some(*random.pick(&[Errno::INVAL, Errno::OPNOTSUPP])),
            8..11 => faults.no_ring = Some(*random.pick(&[Errno::OPNOTSUPP, Errno::FAULT, Errno::ACCESS, Errno::NOMEM])),
            _ => {}
        }
    }
    (SimFile { number, bytes, faults: Rc::new(faults) }, planned)
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let calm = random.chance(200);
        let faults = Faults {
            ring: if !calm && random.chance(100) {
                Some(*random.pick(&[Errno::PERM, Errno::NOSYS, Errno::ACCESS]))
            } else {
                None
            },
            register: if !calm && random.chance(200) {
                Some(*random.pick(&[Errno::NOMEM, Errno::FAULT, Errno::OPNOTSUPP]))
            } else {
                None
            },
            register_per_mille: *random.pick(&[1000, 300]),
            short_per_mille: *random.pick(&[0, 0, 50, 400]),
            interrupted_per_mille: *random.pick(&[0, 0, 100, 300]),
            collateral_per_mille: *random.pick(&[0, 0, 0, 100]),
            breaks_per_mille: if !calm && random.chance(50) { 20 } else { 0 },
            nothing_per_mille: if !calm && random.chance(50) { 20 } else { 0 },
            hangs_per_mille: if !calm && random.chance(50) { 20 } else { 0 },
            buffer_slots: *random.pick(&[1, 2, 16]),
            unpinnable: !calm && random.chance(250),
            no_threads: !calm && random.chance(100),
            staging: if !calm && random.chance(100) { usize::try_from(random.below(3)).unwrap() } else { usize::MAX },
            evicted_per_mille: *random.pick(&[0, 0, 100, 1000]),
            no_memory_per_mille: if !calm && random.chance(100) { 50 } else { 0 },
        };
        let memory = Rc::default();
        let clock = Rc::default();
        let depth = *random.pick(&[1, 2, 8, 32]);
        let window_bytes = (4 + random.below(12)) * BLOCK;
        let staging = random_staging(&mut random);
        let kernel = SimKernel::new(random.next(), faults.clone(), &memory, &clock, Duration::ZERO);
        let counters = Arc::default();
        let mut world = World {
            faults,
            memory,
            clock,
            window_bytes,
            depth,
            scheduler: Scheduler::new(window_bytes, u64::MAX, 1, 1 + usize::try_from(random.below(3)).unwrap()),
            // With even seeds, staging grows with the number of copiers.
            driver: Driver::new(kernel, depth, staging)
                .with_counters(Arc::clone(&counters))
                .with_pace(Pace::new(1, MOST_COPIERS), seed.is_multiple_of(2)),
            loads: BTreeMap::new(),
            allocating: Vec::new(),
            alloc_fails_per_mille: if !calm && random.chance(100) { 50 } else { 0 },
            abandon_per_mille: if !calm && random.chance(300) { 10 } else { 0 },
            leaked_bytes: 0,
            counters,
            broken: false,
            staging,
            random,
        };
        for id in 0..1 + world.random.below(5) {
            world.add_load(LoadId(id), calm);
        }
        world
    }

    fn add_load(&mut self, id: LoadId, calm: bool) {
        let random = &mut self.random;
        let count = *random.pick(&[1, 2, 3, 8]);
        let files: Vec<_> = (0..count).map(|number| random_file(random, id.0 * 100 + number, calm)).collect();
        let spans: Vec<_> = files.iter().enumerate().map(|(file, &(_, bytes))| Span::whole(file, bytes)).collect();
        let plan = Plan::new(&vec![BLOCK; files.len()], &spans, random_shape(random));
        let start = *random.pick(&[
            Route::UringFixedDirect,
            Route::UringFixedDirect,
            Route::UringDirect,
            Route::PreadDirect,
            Route::Bounce,
            Route::UringBuffered,
            Route::Buffered,
        ]);
        let rejects = if !calm && random.chance(100) {
            let file = random.below(files.len() as u64);
            let file = usize::try_from(file).unwrap();
            let bytes = files[file].1;
            (bytes > 0).then(|| (file, random.below(bytes)))
        } else {
            None
        };
        let numbers = files.iter().map(|&(ref file, planned)| (file.number, planned)).collect();
        let observed = random.chance(400).then(|| {
            let observer = Arc::new(SimObserver::new(numbers, rejects));
            let watch = Arc::new(Watch::new(Some(ObserverOption::new(observer.clone()))));
            (observer, Observation { watch, staged: random.chance(500) })
        });
        // As in the engine, a load that is observed in staging starts at `bounce` or a less
        // preferred route.
        let staged = observed.as_ref().is_some_and(|(_, observation)| observation.staged);
        let start = if staged { start.max(Route::Bounce) } else { start };
        let load = SimLoad {
            observed,
            start,
            strict: random.chance(150),
            in_memory: start == Route::PreadDirect && random.chance(500),
            unpopulated_per_mille: *random.pick(&[0, 0, 300, 1000]),
            // As in the engine, a load that is observed in staging copies nothing from the page
            // cache.
            cached_per_mille: if staged { 0 } else { *random.pick(&[0, 0, 300, 700, 1000]) },
            cacheable_bytes: 0,
            cached_bytes: 0,
            chunk_bytes: (1 + random.below(3)) * BLOCK,
            files,
            full: vec![false; plan.pieces.len()],
            plan,
            begun: false,
            abandoned: false,
            failure: None,
            gone: false,
            lowest_reported: start,
            refused: Vec::new(),
            bounced: false,
            less_staging: false,
            no_thread: false,
        };
        self.loads.insert(id, load);
        self.scheduler.submit(id);
    }

    /// Runs until every load has ended, then checks the final state. Panics if an invariant is
    /// broken.
    pub(super) fn run(&mut self) {
        let (mut steps, mut stuck) = (0, 0);
        while !self.loads.values().all(SimLoad::is_over) {
            steps += 1;
            assert!(steps < 200_000, "the world makes no progress; operations in flight: {}", self.driver.in_flight());
            match self.random.below(4) {
                0 => self.schedule(),
                1 => self.finish_allocation(),
                2 => self.driver.kernel().complete_any(),
                _ => self.turn(),
            }
            if self.random.chance(self.abandon_per_mille) {
                self.abandon_one();
            }
            stuck = if self.driver.kernel().only_hangs() { stuck + 1 } else { 0 };
            if stuck > PATIENCE {
                self.shut_down();
            }
            let unfilled = self.memory.borrow().unfilled_bytes();
            let ahead: u64 = unfilled + self.allocating.iter().map(|allocating| allocating.bytes).sum::<u64>();
            assert!(ahead <= self.window_bytes, "{ahead} bytes are unfilled, but the window is only {} bytes", self.window_bytes);
            let staged = self.memory.borrow().staging.len();
            assert!(
                staged <= self.staging.slots + more_staging_slots(MOST_COPIERS),
                "{staged} staging buffers exceed the budget {:?}",
                self.staging
            );
            assert!(
                self.driver.kernel().reads_in_flight() <= self.depth || self.broken,
                "more reads were in flight than the queue depth allows"
            );
        }
        for allocating in std::mem::take(&mut self.allocating) {
            self.give_back(allocating.load, allocating.bytes);
        }
        self.check_end();
    }

    fn schedule(&mut self) {
        match self.scheduler.next() {
            Some(Job::Open(id)) => {
                let load = self.loads.get_mut(&id).unwrap();
                load.begun = true;
                let needs: Vec<_> = load.plan.batches.iter().map(|batch| need(id, batch.bytes)).collect();
                if needs.is_empty() {
                    load.gone = true;
                    self.scheduler.end();
                    return;
                }
                self.driver.begin(LoadSpec {
                    id,
                    pieces: load.plan.pieces.len(),
                    chunk_bytes: load.chunk_bytes,
                    strict: load.strict,
                    trace: true,
                    observation: load.observed.as_ref().map(|(_, observation)| observation.clone()),
                });
                self.scheduler.opened(id, LoadNeeds { batches: needs, ..LoadNeeds::default() });
            }
            Some(Job::Allocate(load, batch, Need { bytes, .. })) => self.allocating.push(Allocating { load, batch, bytes }),
            Some(Job::Check(..) | Job::Finish(..) | Job::MakeRoom(..)) => unreachable!("the simulator never requests these jobs"),
            None => {}
        }
    }

    fn finish_allocation(&mut self) {
        if self.allocating.is_empty() {
            return;
        }
        let index = self.random.below(self.allocating.len() as u64);
        let Allocating { load: id, batch, bytes } = self.allocating.swap_remove(usize::try_from(index).unwrap());
        if self.random.chance(self.alloc_fails_per_mille) {
            self.give_back(id, bytes);
            self.abandon(id);
            return;
        }
        let load = self.loads.get_mut(&id).unwrap();
        let pieces = load.plan.batches[batch].pieces.clone();
        let mut cached = BTreeMap::new();
        for number in pieces.clone() {
            let (file, piece) = load.numbered_piece(number);
            let bytes = piece.bytes.min(load.files[file].0.bytes.saturating_sub(piece.file_offset));
            let chunk = |chunk: usize| chunk as u64 * load.chunk_bytes;
            // A chunk that extends past the end of a file cannot be cached completely.
            let end = |number: usize| (chunk(number) + load.chunk_bytes).min(piece.bytes);
            let count = usize::try_from(piece.bytes.div_ceil(load.chunk_bytes)).unwrap();
            let chosen = CachedChunks::collect(count, |number| end(number) <= bytes && self.random.chance(load.cached_per_mille));
            let cacheable = (0..count).filter(|&number| chosen.contains(number)).map(|number| end(number) - chunk(number));
            load.cacheable_bytes += cacheable.sum::<u64>();
            cached.insert(number, chosen);
        }
        // As in the engine, either all pieces of a batch are populated, or none are.
        let unpopulated = self.random.chance(load.unpopulated_per_mille);
        let refuses = self.random.chance(self.faults.no_memory_per_mille).then_some(Errno::NOMEM);
        let parts: Vec<_> = pieces
            .map(|number| {
                let (file, piece) = load.numbered_piece(number);
                let spec = FileSpec {
                    handle: load.files[file].0.clone(),
                    index: file,
                    route: if unpopulated && !load.in_memory { load.start.max(Route::Bounce) } else { load.start },
                    staged_by: load.staged_by(),
                    mount: load.files[file].0.number % 2,
                    alignment_bytes: BLOCK,
                    in_memory: load.in_memory,
                    cached: cached.remove(&number).unwrap(),
                };
                let buffer = if unpopulated {
                    SimBuffer::unpopulated(id, piece.memory_bytes, &self.memory, refuses)
                } else {
                    SimBuffer::new(id, piece.memory_bytes, &self.memory)
                };
                (number, piece, spec, buffer)
            })
            .collect();
        for (number, piece, spec, buffer) in parts {
            let before = self.memory.borrow().live_buffers;
            self.driver.enqueue_piece(id, number, piece, spec, buffer);
            // If the load has ended, the driver has dropped the buffer. Return the buffer's permit
            // immediately.
            if self.memory.borrow().live_buffers < before {
                self.sync_window();
            }
        }
        self.act_on_outputs();
    }

    fn give_back(&mut self, load: LoadId, bytes: u64) {
        self.scheduler.give_back(&load, need(load, bytes));
    }

    /// Returns the permits of dropped buffers, computed from the bytes that are still allocated.
    fn sync_window(&mut self) {
        let ids: Vec<_> = self.loads.keys().copied().collect();
        for id in ids {
            let unfilled = self.memory.borrow().unfilled.get(&id).copied().unwrap_or(0);
            let allocating = self.allocating.iter().filter(|allocating| allocating.load == id);
            let out = unfilled + allocating.map(|allocating| allocating.bytes).sum::<u64>();
            let taken = self.scheduler.window_held_bytes(&id);
            assert!(taken >= out, "a permit was returned before its memory was freed");
            self.give_back(id, taken - out);
        }
    }

    fn turn(&mut self) {
        self.driver.issue();
        self.act_on_outputs();
        if let Err(errno) = self.driver.turn(false) {
            self.leaked_bytes += self.driver.give_up(Failure::Kernel { errno });
            let calmer = Faults { breaks_per_mille: 0, ..self.faults.clone() };
            self.broken = true;
            self.act_on_outputs();
            // The old kernel is leaked, and its reads never complete. With a real kernel, they
            // might still write to the leaked memory. Leaked memory stays registered with the old
            // ring, while the new ring has no registered buffers.
            let seed = self.random.next();
            self.driver.replace_kernel(SimKernel::new(seed, calmer, &self.memory, &self.clock, Duration::ZERO));
        }
        self.act_on_outputs();
    }

    /// Shuts down as the engine does at a shutdown's deadline: ends every load, and leaks memory
    /// that operations may still use.
    fn shut_down(&mut self) {
        let unbegun: Vec<_> = self.loads.iter().filter(|(_, load)| !load.begun).map(|(&id, _)| id).collect();
        for id in unbegun {
            self.abandon(id);
        }
        for allocating in std::mem::take(&mut self.allocating) {
            self.give_back(allocating.load, allocating.bytes);
        }
        self.leaked_bytes += self.driver.give_up(Failure::Kernel { errno: Errno::TIMEDOUT });
        self.broken = true;
        self.act_on_outputs();
        // Late completions write into the leaked memory, which must still be allocated.
        self.driver.kernel().complete_late();
    }

    fn abandon_one(&mut self) {
        let ids: Vec<_> = self.loads.keys().copied().collect();
        let id = *self.random.pick(&ids);
        self.abandon(id);
    }

    fn abandon(&mut self, id: LoadId) {
        let load = self.loads.get_mut(&id).unwrap();
        if !load.is_over() {
            load.abandoned = true;
            self.scheduler.forget(&id);
            self.driver.abandon(id);
            self.act_on_outputs();
        }
    }

    fn act_on_outputs(&mut self) {
        drop(self.driver.take_released());
        for output in self.driver.take_outputs() {
            match output {
                Output::PieceFull { load: id, piece: number, route, buffer } => {
                    let load = self.loads.get_mut(&id).unwrap();
                    assert!(!load.gone && load.failure.is_none() && !load.abandoned, "a finished load received a piece");
                    assert!(!std::mem::replace(&mut load.full[number], true), "a piece was reported as full twice");
                    let chosen = load.unpopulated_per_mille > 0 && route == Some(Route::Bounce);
                    let reported = route.is_none_or(|route| route <= load.lowest_reported);
                    assert!(
                        reported || chosen,
                        "a piece was read through {route:?}, but the load has reported nothing worse than {}",
                        load.lowest_reported
                    );
                    load.bounced |= route == Some(Route::Bounce);
                    if let Some((observer, _)) = &load.observed {
                        let (file, piece) = load.numbered_piece(number);
                        assert!(observer.has_seen(file, piece.file_offset + piece.bytes), "a piece was not observed");
                    }
                    load.check_bytes(number, buffer.contents());
                    drop(buffer);
                }
                Output::Event { event: LoadEvent::Traced { .. } | LoadEvent::Retried { .. }, .. } => {}
                Output::Event { load: id, event: LoadEvent::NoThread } => {
                    let load = self.loads.get_mut(&id).unwrap();
                    assert!(!std::mem::replace(&mut load.no_thread, true), "a missing thread must be reported only once");
                }
                Output::Event { load: id, event: LoadEvent::LessStaging { bytes, .. } } => {
                    let load = self.loads.get_mut(&id).unwrap();
                    assert!(!std::mem::replace(&mut load.less_staging, true), "a shortage of staging must be reported only once");
                    let slots = usize::try_from(bytes).unwrap() / self.staging.slot_bytes;
                    assert!(
                        slots == self.faults.staging && slots < self.staging.slots + more_staging_slots(MOST_COPIERS),
                        "a shortage of staging was reported, but no allocation was refused; slots: {slots}"
                    );
                }
                Output::Event { load: id, event: LoadEvent::SteppedDown { fallback } } => {
                    let load = self.loads.get_mut(&id).unwrap();
                    assert!(!load.strict, "a strict load must not fall back to another route");
                    assert!(fallback.from < fallback.to);
                    load.lowest_reported = load.lowest_reported.max(fallback.to);
                    load.refused.push(fallback.attempt);
                    assert!(
                        fallback.errno != dmabuf::Errno::EFAULT || fallback.file_index.is_none(),
                        "a fallback caused by the memory must not name a file: {fallback:?}"
                    );
                }
                Output::Event { load: id, event: LoadEvent::Failed { failure } } => {
                    let load = self.loads.get_mut(&id).unwrap();
                    assert_eq!(load.failure.replace(failure), None, "a load must fail only once");
                    assert!(!load.gone && !load.abandoned);
                    self.scheduler.forget(&id);
                }
                Output::Event { load: id, event: LoadEvent::Gone { times, .. } } => {
                    let load = self.loads.get_mut(&id).unwrap();
                    load.cached_bytes = times.cached_bytes;
                    assert!(!std::mem::replace(&mut load.gone, true), "a load must be reported as gone only once");
                    self.scheduler.end();
                }
            }
        }
        self.sync_window();
    }
}
