//! Tests that a refusal caused by the memory or by a file system is remembered for a minute.
//! During that minute, later loads report the known refusal without trying again, unless they are
//! strict.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;

use super::disk::{BLOCK, FileFaults, SimFile};
use super::faults::Faults;
use super::kernel::SimKernel;
use super::memory::{Memory, SimBuffer};
use crate::files::source::CachedChunks;
use crate::options::choices::Layout;
use crate::plan::{Plan, Shape, Span};
use crate::ring::driver::Driver;
use crate::ring::message::{Failure, FileSpec, LoadEvent, LoadSpec, Output};
use crate::ring::staging::StagingBudget;
use crate::route::{Attempt, Fallback, Route};
use crate::support::errno::to_rustix;
use crate::support::id::LoadId;

struct RefusingMachine {
    driver: Driver<SimKernel, SimBuffer>,
    memory: Rc<RefCell<Memory>>,
    clock: Rc<Cell<Duration>>,
    loads: u64,
    /// The route at which loads start.
    route: Route,
}

/// The result of a load.
struct Done {
    fallbacks: Vec<Fallback>,
    failure: Option<Failure>,
    /// How many reads the file system refused, plus how many registrations failed because the
    /// memory can't be pinned.
    refusals: usize,
}

impl RefusingMachine {
    fn new(faults: Faults) -> Self {
        let memory: Rc<RefCell<Memory>> = Rc::default();
        let clock: Rc<Cell<Duration>> = Rc::default();
        let kernel = SimKernel::new(1, faults, &memory, &clock, Duration::ZERO);
        let staging = StagingBudget { slot_bytes: 4096, slots: 2 };
        RefusingMachine { driver: Driver::new(kernel, 4, staging), memory, clock, loads: 0, route: Route::UringFixedDirect }
    }

    /// Loads a file of three pieces on this mount. Direct reads fail with `no_direct`, if set.
    fn load(&mut self, mount: u64, no_direct: Option<Errno>, strict: bool) -> Done {
        self.load_with(mount, FileFaults { no_direct, ..FileFaults::default() }, strict)
    }

    fn load_with(&mut self, mount: u64, faults: FileFaults, strict: bool) -> Done {
        self.load_file(0, mount, faults, strict)
    }

    /// Like [`Self::load`], but the file has shrunk by `lost` bytes since it was planned.
    fn load_shrunk(&mut self, lost: u64, mount: u64, no_direct: Option<Errno>, strict: bool) -> Done {
        self.load_file(lost, mount, FileFaults { no_direct, ..FileFaults::default() }, strict)
    }

    fn load_file(&mut self, lost: u64, mount: u64, faults: FileFaults, strict: bool) -> Done {
        let id = LoadId(self.loads);
        self.loads += 1;
        let shape = Shape { layout: Layout::Segmented, segment_bytes: BLOCK, batch_bytes: BLOCK, packed: false, batch_files: 64 };
        let plan = Plan::new(&[BLOCK], &[Span::whole(0, 3 * BLOCK)], shape);
        let file = SimFile { number: id.0, bytes: 3 * BLOCK - lost, faults: Rc::new(faults) };
        let before = self.driver.kernel().refusals;
        self.driver.begin(LoadSpec {
            id,
            pieces: plan.pieces.len(),
            chunk_bytes: BLOCK,
            strict,
            trace: false,
            observation: None,
        });
        for (number, &piece) in plan.pieces.iter().enumerate() {
            let route = self.route;
            let spec = FileSpec {
                handle: file.clone(),
                index: 0,
                route,
                staged_by: Route::UringFixedDirect,
                mount,
                alignment_bytes: BLOCK,
                in_memory: false,
                cached: CachedChunks::default(),
            };
            self.driver.enqueue_piece(id, number, piece, spec, SimBuffer::new(id, BLOCK, &self.memory));
        }
        let mut done = Done { fallbacks: Vec::new(), failure: None, refusals: 0 };
        loop {
            self.driver.issue();
            self.driver.turn(false).unwrap();
            self.driver.kernel().complete_any();
            for output in self.driver.take_outputs() {
                match output {
                    Output::Event { event: LoadEvent::SteppedDown { fallback, .. }, .. } => done.fallbacks.push(fallback),
                    Output::Event { event: LoadEvent::Failed { failure, .. }, .. } => done.failure = Some(failure),
                    Output::PieceFull { .. }
                    | Output::Event {
                        event:
                            LoadEvent::Traced { .. } | LoadEvent::Retried { .. } | LoadEvent::LessStaging { .. } | LoadEvent::NoThread,
                        ..
                    } => {}
                    Output::Event { event: LoadEvent::Gone { .. }, .. } => {
                        done.refusals = self.driver.kernel().refusals - before;
                        return done;
                    }
                }
            }
        }
    }
}

impl Done {
    fn steps(&self) -> Vec<(Route, Route, Attempt, Errno)> {
        self.fallbacks.iter().map(|step| (step.from, step.to, step.attempt, to_rustix(step.errno))).collect()
    }
}

#[test]
fn unpinnable_memory_is_tried_once() {
    let mut machine = RefusingMachine::new(Faults { unpinnable: true, ..Faults::none() });
    let expected = [(Route::UringFixedDirect, Route::Bounce, Attempt::RegisterBuffer, Errno::FAULT)];
    let first = machine.load(0, None, false);
    assert_eq!((first.steps(), first.refusals), (expected.to_vec(), 1));
    // The refusal applies to another mount, too, because the memory is the cause.
    let second = machine.load(1, None, false);
    assert_eq!(
        (second.steps(), second.refusals),
        (expected.to_vec(), 0),
        "a known refusal should be reported without another attempt"
    );
    let strict = machine.load(0, None, true);
    assert_eq!(strict.refusals, 1, "a strict load should try again despite a known refusal");
    assert!(matches!(strict.failure, Some(Failure::Refused { attempt: Attempt::RegisterBuffer, errno: Errno::FAULT, .. })));
}

#[test]
fn mount_without_direct_reads_is_tried_once() {
    let mut machine = RefusingMachine::new(Faults::none());
    let first = machine.load(7, Some(Errno::INVAL), false);
    assert!(first.refusals > 0 && first.steps().last().unwrap().1 == Route::Buffered);
    let second = machine.load(7, Some(Errno::INVAL), false);
    let known = [(Route::UringFixedDirect, Route::Buffered, Attempt::Read, Errno::INVAL)];
    assert_eq!(
        (second.steps(), second.refusals),
        (known.to_vec(), 0),
        "a known refusal should be reported without another attempt"
    );
    let other = machine.load(8, None, false);
    assert_eq!(other.steps(), [], "another mount should not be affected");
    let strict = machine.load(7, Some(Errno::INVAL), true);
    assert!(strict.refusals > 0 && matches!(strict.failure, Some(Failure::Refused { .. })));
}

#[test]
fn buffered_and_direct_refusals_are_independent() {
    let mut machine = RefusingMachine::new(Faults::none());
    // Mount 7 refuses direct reads.
    assert!(machine.load(7, Some(Errno::INVAL), false).refusals > 0);
    machine.route = Route::UringBuffered;
    assert_eq!(machine.load(7, Some(Errno::INVAL), false).steps(), []);
    // Mount 8 refuses reads through the page cache from a ring.
    let file = FileFaults { no_ring: Some(Errno::OPNOTSUPP), ..FileFaults::default() };
    let step = (Route::UringBuffered, Route::Buffered, Attempt::Read, Errno::OPNOTSUPP);
    assert_eq!(machine.load_with(8, file, false).steps(), [step]);
    machine.route = Route::UringFixedDirect;
    assert_eq!(machine.load(8, None, false).steps(), []);
}

#[test]
fn unusual_file_does_not_affect_its_mount() {
    let mut machine = RefusingMachine::new(Faults::none());
    assert_eq!(machine.load(7, None, false).steps(), []);
    assert!(!machine.load(7, Some(Errno::INVAL), false).steps().is_empty());
    assert_eq!(machine.load(7, None, false).steps(), [], "a mount on which direct reads have worked should not be affected");
}

#[test]
fn truncated_file_does_not_affect_its_mount() {
    let mut machine = RefusingMachine::new(Faults::none());
    let cut = machine.load_shrunk(100, 7, None, false);
    assert_eq!(cut.fallbacks.last().unwrap().attempt, Attempt::ReadOn);
    assert!(matches!(cut.failure, Some(Failure::Ended { .. })));
    assert_eq!(machine.load(7, None, false).steps(), []);
}

#[test]
fn known_refusals_expire() {
    let mut machine = RefusingMachine::new(Faults { unpinnable: true, ..Faults::none() });
    let over_a_minute = Duration::from_secs(61);
    assert_eq!([0, 1].map(|_| machine.load(0, None, false).refusals), [1, 0]);
    machine.clock.set(machine.clock.get() + over_a_minute);
    assert_eq!([0, 1].map(|_| machine.load(0, None, false).refusals), [1, 0]);

    let mut machine = RefusingMachine::new(Faults::none());
    assert!(machine.load(7, Some(Errno::INVAL), false).refusals > 0);
    machine.clock.set(machine.clock.get() + over_a_minute);
    assert_eq!(machine.load(7, None, false).steps(), [], "the refusal should have been forgotten");
}

#[test]
fn staging_registration_is_retried_by_the_next_load() {
    let mut machine = RefusingMachine::new(Faults {
        unpinnable: true,
        register: Some(Errno::NOMEM),
        register_per_mille: 1000,
        ..Faults::none()
    });
    let refused = |done: &Done| done.fallbacks.iter().any(|step| step.attempt == Attempt::RegisterStaging);
    assert!(refused(&machine.load(0, None, false)));
    machine.driver.kernel().allow_registration();
    assert!(!refused(&machine.load(0, None, false)), "the registration should succeed once the limit is raised");
}

#[test]
fn completion_without_an_operation_panics() {
    let mut machine = RefusingMachine::new(Faults::none());
    machine.driver.kernel().complete_stray();
    let message = crate::support::foreign::call(|| machine.driver.turn(false)).unwrap_err();
    assert!(message.starts_with("a completion for an operation that is not in flight"), "{message}");
}
