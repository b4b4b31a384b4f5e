//! Simulates machines with fast devices and many processors, in virtual time. The tests check how
//! close the engine comes to the machine's limit, and how many threads it uses.
//!
//! The machine is modeled as flows of bytes:
//!
//! - Each processor zeroes or copies memory at [`PASS`]. If there are more threads than
//!   processors, the threads share the processors.
//! - The device works on all of its reads at once, each after [`LATENCY`], and finishes them at
//!   about the same time.
//! - The memory bus moves at most [`BUS`]. If more is demanded, everything that uses the bus slows
//!   down equally.
//!
//! The driver, the scheduler, the window, staging and the paces of copiers and allocators are
//! those of the engine, with its default settings. The kernel, the copiers and the allocators are
//! simulated.
//!
//! Each path has these costs:
//!
//! | path | processor, passes per byte | bus, bytes per byte |
//! |---|---|---|
//! | direct | 1 (zeroing) | 2: zeroing writes the memory, and so does the device |
//! | staged, in the cache | 2 (zeroing, copying) | 2: the device writes staging, the copy writes the memory that was zeroed in the cache |
//! | staged, not in the cache | 2 | 4: the device writes staging; the copier reads staging, zeroes the memory, and writes to it |
//!
//! The ring thread takes [`CALL`] for each read and copy that it issues or completes, and
//! [`REGISTER`] to register a piece or a staging slot. A request to populate memory takes it
//! [`REQUEST`]. A copier that finds a request while no copy is waiting zeroes the memory, and the
//! copy then takes one pass fewer.
#![allow(unsafe_code)]

use std::alloc::{Layout as Allocation, alloc, dealloc};
use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::engine::schedule::{Job, LoadNeeds, Need, Scheduler};
use crate::engine::settings::Settings;
use crate::files::source::CachedChunks;
use crate::memory::buffer::{Buffer, Fault, PieceMemory, Place, Sink, Write};
use crate::options::choices::Layout;
use crate::plan::{Plan, Shape, Span};
use crate::ring::driver::Driver;
use crate::ring::kernel::{CachedRead, Completion, Kernel, ObserveRequest, PopulateRequest, Read, StagedCopy};
use crate::ring::message::{FileSpec, LoadEvent, LoadSpec, Output};
use crate::ring::pace::{FIRST, most_allocators, most_copiers};
use crate::ring::slots::Token;
use crate::route::Route;
use crate::support::id::LoadId;

const GIB: f64 = (1 << 30) as f64;
/// Speed of zeroing or copying on one processor, in bytes per second.
const PASS: f64 = 9.0 * GIB;
/// Bytes per second that the memory bus moves.
const BUS: f64 = 100.0 * GIB;
/// The time from issuing a read to its first byte, in seconds.
const LATENCY: f64 = 100e-6;
/// The ring thread's time to issue or complete a read or a copy, in seconds.
const CALL: f64 = 2e-6;
/// The ring thread's time to register memory, in seconds.
const REGISTER: f64 = 20e-6;
/// The ring thread's time to request that memory be populated, in seconds. It makes no system call
/// unless a copier is idle.
const REQUEST: f64 = 0.2e-6;
/// The time, in seconds, that an allocator takes for a batch of a staged load. The copiers
/// populate such a batch.
const PREPARE: f64 = 20e-6;
/// Speeds of devices, in GiB/s.
const DEVICES: [f64; 4] = [3.0, 14.0, 28.0, 50.0];
const CORES: [usize; 5] = [2, 4, 8, 16, 32];
const FILE_BYTES: u64 = 16 << 30;
/// The fraction of the machine's limit that must be reached.
const SHARE: f64 = 0.95;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Path {
    Direct,
    StagedInCache,
    StagedOutOfCache,
}

impl Path {
    /// Number of passes that a processor makes over each byte.
    fn passes(self) -> f64 {
        if self == Path::Direct { 1.0 } else { 2.0 }
    }

    /// Bytes that processors move over the bus for each byte of the file. This does not include
    /// the byte that the device itself transfers.
    fn traffic(self) -> f64 {
        if self == Path::StagedOutOfCache { 3.0 } else { 1.0 }
    }

    /// The machine's limit, in bytes per second, with a device of `device` GiB/s.
    fn limit(self, device: f64, cores: usize) -> f64 {
        (device * GIB).min(BUS / (1.0 + self.traffic())).min(cores as f64 * PASS / self.passes())
    }
}

/// Work for a processor.
#[derive(Debug)]
struct CpuTask {
    work: Work,
    /// When the thread can start the task, in seconds.
    from: f64,
    /// Bytes that are left to process.
    left: f64,
    bytes: u64,
    /// See [`Path::passes`] and [`Path::traffic`].
    passes: f64,
    traffic: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Work {
    Batch(LoadId, usize),
    Copy(Token),
    Populate(Token),
}

/// Identifies a place in memory: the address of its sink, and its offset.
type PlaceKey = (usize, usize);

fn key(place: &Place) -> PlaceKey {
    (Arc::as_ptr(&place.sink).addr(), place.offset)
}

#[derive(Debug)]
struct Transfer {
    token: Token,
    from: f64,
    left: f64,
    bytes: usize,
}

#[derive(Debug)]
struct FlowMachine {
    path: Path,
    /// Speed of the device, in GiB/s.
    device: f64,
    cores: usize,
    /// Seconds since the start.
    now: f64,
    tasks: Vec<CpuTask>,
    transfers: Vec<Transfer>,
    copies: VecDeque<(Token, PlaceKey, usize)>,
    /// Queued requests to populate memory.
    requests: VecDeque<(Token, PlaceKey, usize)>,
    /// Places that are populated, or being populated, ahead of their copies.
    populated: HashSet<PlaceKey>,
    copiers: usize,
    most_copying: usize,
    /// The time until which the ring thread is busy.
    ring_until: f64,
    completions: Vec<Completion>,
    /// The completions of requests to populate memory.
    completed_requests: Vec<Completion>,
    batches: Vec<(LoadId, usize)>,
}

impl FlowMachine {
    /// Occupies the ring thread for `time` seconds.
    fn occupy_ring(&mut self, time: f64) {
        self.ring_until = self.ring_until.max(self.now) + time;
    }

    fn copying(&self) -> usize {
        self.tasks.iter().filter(|task| matches!(task.work, Work::Copy(_) | Work::Populate(_))).count()
    }

    fn start_copies(&mut self) {
        // Zeroing is one of the passes. If the memory leaves the cache before the copy, zeroing
        // also adds traffic on the bus.
        let (passes, traffic) = (self.path.passes(), self.path.traffic());
        let zeroing = (1.0, if self.path == Path::StagedOutOfCache { 1.0 } else { 0.0 });
        while self.copying() < self.copiers {
            let (work, bytes, (passes, traffic)) = if let Some((token, key, bytes)) = self.copies.pop_front() {
                let is_populated = self.populated.remove(&key);
                let left = if is_populated { (passes - zeroing.0, traffic - zeroing.1) } else { (passes, traffic) };
                (Work::Copy(token), bytes, left)
            } else if let Some((token, key, bytes)) = self.requests.pop_front() {
                self.populated.insert(key);
                (Work::Populate(token), bytes, zeroing)
            } else {
                return;
            };
            let from = self.ring_until.max(self.now);
            self.tasks.push(CpuTask { work, from, left: bytes as f64, bytes: bytes as u64, passes, traffic });
            self.most_copying = self.most_copying.max(self.copying());
        }
    }

    /// The speeds of a pass on one thread and of each transfer, in bytes per second.
    fn rates(&self) -> (f64, f64) {
        let running = || self.tasks.iter().filter(|task| task.from <= self.now);
        let threads = running().count() + usize::from(self.ring_until > self.now);
        let pass = PASS * (self.cores as f64 / threads.max(1) as f64).min(1.0);
        let moving = self.transfers.iter().filter(|transfer| transfer.from <= self.now).count();
        let device = if moving > 0 { self.device * GIB } else { 0.0 };
        let wanted = device + running().map(|task| pass / task.passes * task.traffic).sum::<f64>();
        let slowed = (BUS / wanted.max(1.0)).min(1.0);
        (pass * slowed, device * slowed / moving.max(1) as f64)
    }

    /// Advances time to the next event.
    fn advance(&mut self) {
        let (pass, device) = self.rates();
        let now = self.now;
        let task = |task: &CpuTask| if task.from > now { task.from } else { now + task.left * task.passes / pass };
        let transfer = |transfer: &Transfer| if transfer.from > now { transfer.from } else { now + transfer.left / device };
        let ring = Some(self.ring_until).filter(|&until| until > now);
        let events = self.tasks.iter().map(task).chain(self.transfers.iter().map(transfer)).chain(ring);
        let next = events.min_by(f64::total_cmp).expect("something should be in progress until the load is gone");
        for task in self.tasks.iter_mut().filter(|task| task.from <= now) {
            task.left -= (next - now) * pass / task.passes;
        }
        for transfer in self.transfers.iter_mut().filter(|transfer| transfer.from <= now) {
            transfer.left -= (next - now) * device;
        }
        self.now = next + 1e-12;
        // A hundredth of a byte is less than any real remainder, and more than rounding errors.
        for task in self.tasks.extract_if(.., |task| task.left < 0.01) {
            match task.work {
                Work::Batch(load, number) => self.batches.push((load, number)),
                Work::Copy(token) => {
                    let result = Ok(usize::try_from(task.bytes).unwrap());
                    self.completions.push(Completion { token, result });
                }
                Work::Populate(token) => self.completed_requests.push(Completion { token, result: Ok(0) }),
            }
        }
        for transfer in self.transfers.extract_if(.., |transfer| transfer.left < 0.01) {
            self.completions.push(Completion { token: transfer.token, result: Ok(transfer.bytes) });
        }
        self.start_copies();
    }
}

/// Memory that has addresses but is never accessed.
#[derive(Debug)]
struct Untouched {
    address: NonNull<u8>,
    bytes: usize,
    populated: bool,
    /// Identifies a place in the memory, together with an offset.
    sink: Arc<Nowhere>,
}

impl Untouched {
    fn new(bytes: usize, populated: bool) -> Self {
        let layout = Allocation::from_size_align(bytes, 4096).unwrap();
        // SAFETY: the layout's size is not zero, because a piece or a staging slot is never empty.
        let address = NonNull::new(unsafe { alloc(layout) }).expect("the test should have enough memory");
        Untouched { address, bytes, populated, sink: Arc::new(Nowhere) }
    }
}

impl Drop for Untouched {
    fn drop(&mut self) {
        // SAFETY: the memory was allocated in `new` with the same layout.
        unsafe { dealloc(self.address.as_ptr(), Allocation::from_size_align(self.bytes, 4096).unwrap()) };
    }
}

// SAFETY: the memory stays allocated until the drop, and this module never accesses it.
unsafe impl Buffer for Untouched {
    fn address(&self) -> NonNull<u8> {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn leak(self) {
        unreachable!("no read fails in this model")
    }
}

impl PieceMemory for Untouched {
    fn is_populated(&self) -> bool {
        self.populated
    }

    fn place(&self, offset: usize) -> Place {
        Place { sink: Arc::clone(&self.sink) as Arc<dyn Sink>, offset }
    }
}

#[derive(Debug)]
struct Nowhere;

impl Sink for Nowhere {
    unsafe fn fill_with(&self, _: usize, _: usize, _: &mut Write<'_>) -> Result<usize, Fault> {
        unreachable!("copies move no bytes in this model")
    }

    fn populate(&self, _: usize, _: usize) -> Result<(), Fault> {
        unreachable!("no memory is populated through a sink in this model")
    }

    fn runs_foreign_code(&self) -> bool {
        false
    }
}

#[derive(Debug)]
struct FlowKernel(Rc<RefCell<FlowMachine>>);

impl Kernel for FlowKernel {
    type File = ();
    type Staging = Untouched;

    fn now(&self) -> Duration {
        Duration::from_secs_f64(self.0.borrow().now)
    }

    fn ring(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn buffer_slots(&self) -> u16 {
        512
    }

    fn register_buffer(&mut self, _: u16, _: NonNull<u8>, _: usize) -> Result<(), Errno> {
        self.0.borrow_mut().occupy_ring(REGISTER);
        Ok(())
    }

    fn unregister_buffer(&mut self, _: u16) {}

    fn attach(&mut self, (): &()) {}

    fn detach(&mut self, (): &()) {}

    unsafe fn read(&mut self, (): &(), read: Read) {
        let mut machine = self.0.borrow_mut();
        machine.occupy_ring(CALL);
        let (from, left) = (machine.ring_until + LATENCY, read.bytes as f64);
        machine.transfers.push(Transfer { token: read.token, from, left, bytes: read.bytes });
    }

    fn staging(&mut self, bytes: usize) -> Result<Untouched, Errno> {
        Ok(Untouched::new(bytes, true))
    }

    unsafe fn copy(&mut self, copy: StagedCopy) {
        let mut machine = self.0.borrow_mut();
        machine.occupy_ring(CALL);
        let key = key(&copy.to);
        if let Some(at) = machine.requests.iter().position(|&(_, other, _)| other == key) {
            let (token, ..) = machine.requests.remove(at).expect("the position was just found");
            machine.completed_requests.push(Completion { token, result: Ok(0) });
        }
        machine.copies.push_back((copy.token, key, copy.bytes));
        machine.start_copies();
    }

    fn populate(&mut self, request: PopulateRequest) {
        let mut machine = self.0.borrow_mut();
        machine.occupy_ring(REQUEST);
        machine.requests.push_back((request.token, key(&request.place), request.bytes));
        machine.start_copies();
    }

    fn set_copiers(&mut self, threads: usize) {
        let mut machine = self.0.borrow_mut();
        machine.copiers = threads;
        machine.start_copies();
    }

    unsafe fn read_cached(&mut self, (): &(), _: CachedRead) {
        unreachable!("nothing is cached in this model")
    }

    unsafe fn observe(&mut self, _: ObserveRequest) {
        unreachable!("nothing is observed in this model")
    }

    fn lacks_threads(&self) -> bool {
        false
    }

    fn submit(&mut self, _: bool) -> Result<(), Errno> {
        Ok(())
    }

    fn reap(&mut self, into: &mut Vec<Completion>) {
        let mut machine = self.0.borrow_mut();
        let calls = machine.completions.len() as f64;
        machine.occupy_ring(calls * CALL);
        into.append(&mut machine.completions);
        into.append(&mut machine.completed_requests);
    }
}

#[derive(Debug)]
struct Outcome {
    /// Bytes per second, over the whole load.
    rate: f64,
    copiers: usize,
    allocators: usize,
}

fn round_up(threads: f64) -> usize {
    (1..).find(|&whole| whole as f64 >= threads).expect("some integer should be large enough")
}

/// Simulates loading one large file, or as many bytes in several simultaneous loads from one file
/// system, with the engine's defaults.
fn load(path: Path, device: f64, cores: usize, loads: usize) -> Outcome {
    let machine = Rc::new(RefCell::new(FlowMachine {
        path,
        device,
        cores,
        now: 0.0,
        tasks: Vec::new(),
        transfers: Vec::new(),
        copies: VecDeque::new(),
        requests: VecDeque::new(),
        populated: HashSet::new(),
        copiers: FIRST,
        most_copying: 0,
        ring_until: 0.0,
        completions: Vec::new(),
        completed_requests: Vec::new(),
        batches: Vec::new(),
    }));
    let settings = Settings::for_cores(cores);
    let batch_bytes = settings.batch_bytes();
    let segment_bytes = settings.load.segment_bytes_within(None);
    let shape = Shape { layout: Layout::Segmented, segment_bytes, batch_bytes, packed: false, batch_files: 64 };
    let plan = Plan::new(&[4096], &[Span::whole(0, FILE_BYTES / loads as u64)], shape);
    let chunk_bytes = settings.load.chunk_bytes;
    let mut scheduler = Scheduler::new(settings.window_bytes, u64::MAX, 1, loads);
    let mut driver: Driver<_, Untouched> = Driver::new(FlowKernel(Rc::clone(&machine)), settings.queue_depth, settings.staging())
        .with_pace(settings.copiers(), settings.staging_grows());
    let need = |bytes| Need { bytes, ..Need::default() };
    for id in (0..loads as u64).map(LoadId) {
        driver.begin(LoadSpec { id, pieces: plan.pieces.len(), chunk_bytes, strict: true, trace: false, observation: None });
        scheduler.submit(id);
        assert_eq!(scheduler.next(), Some(Job::Open(id)));
        let batches = plan.batches.iter().map(|batch| need(batch.bytes)).collect();
        scheduler.opened(id, LoadNeeds { batches, ..LoadNeeds::default() });
    }
    let mut loads_left = loads;
    let mut allocators = settings.allocators();
    let (mut allocating, mut most_allocating) = (0, 0);
    loop {
        let now = machine.borrow().now;
        let ended = std::mem::take(&mut machine.borrow_mut().batches);
        for (id, number) in ended {
            allocating -= 1;
            let piece = plan.pieces[number];
            let _ = allocators.end(Duration::from_secs_f64(now), piece.bytes);
            let route = if path == Path::Direct { Route::UringFixedDirect } else { Route::Bounce };
            let spec = FileSpec {
                handle: (),
                index: 0,
                route,
                staged_by: Route::UringFixedDirect,
                mount: 0,
                alignment_bytes: 4096,
                in_memory: false,
                cached: CachedChunks::default(),
            };
            let bytes = usize::try_from(piece.memory_bytes).unwrap();
            driver.enqueue_piece(id, number, piece, spec, Untouched::new(bytes, path == Path::Direct));
        }
        // The ring thread handles completions and issues new reads only when it is not busy.
        if machine.borrow().ring_until <= now {
            driver.turn(false).unwrap();
            driver.issue();
        }
        for output in driver.take_outputs() {
            match output {
                Output::PieceFull { load, piece, .. } => scheduler.give_back(&load, need(plan.pieces[piece].memory_bytes)),
                Output::Event { event: LoadEvent::Gone { .. }, .. } if loads_left > 1 => loads_left -= 1,
                Output::Event { event: LoadEvent::Gone { .. }, .. } => {
                    let machine = machine.borrow();
                    let rate = FILE_BYTES as f64 / machine.now;
                    return Outcome { rate, copiers: machine.most_copying, allocators: most_allocating };
                }
                other => panic!("{other:?}"),
            }
        }
        while allocating < allocators.threads()
            && let Some(Job::Allocate(id, number, need)) = scheduler.next()
        {
            allocators.begin(Duration::from_secs_f64(now));
            allocating += 1;
            most_allocating = most_allocating.max(allocating);
            let (left, passes, traffic) =
                if path == Path::Direct { (need.bytes as f64, 1.0, 1.0) } else { (PREPARE * PASS, 1.0, 0.0) };
            let task = CpuTask { work: Work::Batch(id, number), from: now, left, bytes: need.bytes, passes, traffic };
            machine.borrow_mut().tasks.push(task);
        }
        machine.borrow_mut().advance();
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "slow without optimization: `just simulate` runs it")]
fn threads_and_staging_grow_to_the_machines_limit() {
    use std::fmt::Write as _;

    let mut table = String::from("path | device | cores | limit | reached | share | copiers | allocators\n");
    let mut wrong = Vec::new();
    for path in [Path::Direct, Path::StagedInCache, Path::StagedOutOfCache] {
        for device in DEVICES {
            for cores in CORES {
                let Outcome { rate, copiers, allocators } = load(path, device, cores, 1);
                let limit = path.limit(device, cores);
                // The number of threads whose passes reach the limit. If the bus is the limit, it
                // slows down threads as well as the device, so one more thread is needed to reach
                // the same share of the limit.
                let of_bus = usize::from(limit >= BUS / (1.0 + path.traffic()));
                let needed = (round_up(limit * path.passes() / PASS) + of_bus).min(cores);
                let used = if path == Path::Direct { allocators } else { copiers };
                let share = rate / limit;
                let row = format!(
                    "{path:?} | {device} | {cores} | {:.1} | {:.1} | {share:.3} | {copiers} | {allocators}",
                    limit / GIB,
                    rate / GIB
                );
                writeln!(table, "{row}").unwrap();
                if !(SHARE..=1.0).contains(&share) || used > (needed + 1).clamp(FIRST, cores) {
                    wrong.push(row);
                }
            }
        }
    }
    eprintln!("{table}");
    assert_eq!(wrong, Vec::<String>::new(), "{table}");
}

/// Together, loads from one file system may hold only slightly more of any resource than a single
/// load may. That must be enough for all of them.
#[test]
#[cfg_attr(debug_assertions, ignore = "slow without optimization: `just simulate` runs it")]
fn many_loads_of_one_file_system_are_as_fast_as_one() {
    for path in [Path::Direct, Path::StagedInCache] {
        for (device, cores) in [(3.0, 2), (14.0, 2), (14.0, 8), (50.0, 32)] {
            let [one, many] = [1, 16].map(|loads| load(path, device, cores, loads).rate / path.limit(device, cores));
            let row = format!("{path:?}, {device} GiB/s, {cores} cores: {one:.3} with one load, {many:.3} with 16");
            eprintln!("{row}");
            assert!(many >= one.min(SHARE) * 0.98, "{row}");
        }
    }
}

#[test]
fn thread_bounds_suffice_for_the_fastest_device() {
    assert!(most_copiers(32) as f64 * PASS / 2.0 >= 50.0 * GIB && most_allocators(32) as f64 * PASS >= 50.0 * GIB);
    assert_eq!([1, 2].map(most_copiers), [2, 2], "small machines should keep the initial number of copiers");
    assert_eq!([1, 2].map(most_allocators), [1, 2], "small machines should have one allocator for each processor");
}
