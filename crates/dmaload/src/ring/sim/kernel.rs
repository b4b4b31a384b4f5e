//! The simulated kernel: a list of operations in flight. It completes them in any order and in any
//! way that the real one may, and checks that the driver makes only valid requests.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::rc::Rc;
use std::time::Duration;

use rustix::io::Errno;

use super::Random;
use super::disk::{BEYOND_END, BLOCK, SimFile};
use super::faults::Faults;
use super::memory::{Memory, SimBuffer, SimStaging};
use crate::memory::buffer::Fault;
use crate::ring::kernel::{CachedRead, Completion, Kernel, ObserveRequest, PopulateRequest, Read, StagedCopy};
use crate::ring::slots::Token;
use crate::route::Route;

#[derive(Debug)]
struct SimInFlight {
    job: SimJob,
    due: Duration,
}

#[derive(Debug)]
enum SimJob {
    Read(SimFile, Read),
    Copy(StagedCopy),
    Populate(PopulateRequest),
    Cached(SimFile, CachedRead),
    Observe(ObserveRequest),
}

#[derive(Debug)]
pub(super) struct SimKernel {
    random: Random,
    faults: Faults,
    memory: Rc<RefCell<Memory>>,
    clock: Rc<Cell<Duration>>,
    /// Reads that the driver has queued but not submitted yet.
    queued: Vec<SimInFlight>,
    in_flight: Vec<SimInFlight>,
    /// Operations in flight that are completed only by [`SimKernel::complete_late`].
    hung: Vec<SimInFlight>,
    done: Vec<Completion>,
    /// The time that the disk takes for one read. The disk performs one read at a time.
    service: Duration,
    /// The time that a copy takes.
    pub(super) copying: Duration,
    /// The time at which each copier becomes free. If empty, each copy has its own copier.
    pub(super) copiers: Vec<Duration>,
    disk_free_at: Duration,
    attached: BTreeMap<u64, usize>,
    /// How many reads file systems have refused so far, plus how many registrations have failed
    /// because the memory can't be pinned.
    pub(super) refusals: usize,
    /// How many requests to populate memory have been made so far.
    pub(super) populate_requests: usize,
}

impl SimKernel {
    pub(super) fn new(
        seed: u64,
        faults: Faults,
        memory: &Rc<RefCell<Memory>>,
        clock: &Rc<Cell<Duration>>,
        service: Duration,
    ) -> Self {
        // A new ring has no registered buffers.
        memory.borrow_mut().registered.clear();
        SimKernel {
            random: Random::new(seed),
            faults,
            memory: Rc::clone(memory),
            clock: Rc::clone(clock),
            queued: Vec::new(),
            in_flight: Vec::new(),
            hung: Vec::new(),
            done: Vec::new(),
            service,
            copying: Duration::ZERO,
            copiers: Vec::new(),
            disk_free_at: Duration::ZERO,
            attached: BTreeMap::new(),
            refusals: 0,
            populate_requests: 0,
        }
    }

    /// Stops refusing registrations, as if the locked-memory limit had been raised.
    pub(super) fn allow_registration(&mut self) {
        self.faults.register = None;
    }

    pub(super) fn reads_in_flight(&self) -> usize {
        self.in_flight.iter().chain(&self.hung).filter(|job| matches!(job.job, SimJob::Read(..))).count()
    }

    pub(super) fn is_clean(&self) -> bool {
        let memory = self.memory.borrow();
        memory.registered.values().all(|range| memory.is_staging(range.start))
            && self.attached.is_empty()
            && self.in_flight.is_empty()
            && self.hung.is_empty()
            && self.queued.is_empty()
    }

    /// Returns the time at which the next operation in flight is due.
    pub(super) fn next_due(&self) -> Option<Duration> {
        self.in_flight.iter().map(|job| job.due).min()
    }

    /// Completes every operation that is due.
    pub(super) fn complete_due(&mut self) {
        let now = self.clock.get();
        while let Some(index) = self.in_flight.iter().position(|job| job.due <= now) {
            self.complete(index);
        }
    }

    /// Reports a completion whose token belongs to no operation in flight.
    pub(super) fn complete_stray(&mut self) {
        self.done.push(Completion { token: Token::from_user_data(u64::from(u32::MAX)), result: Ok(4096) });
    }

    /// Completes a random operation.
    pub(super) fn complete_any(&mut self) {
        if !self.in_flight.is_empty() {
            let index = self.random.below(self.in_flight.len() as u64);
            self.complete(usize::try_from(index).unwrap());
        }
    }

    /// Whether operations are in flight and all of them hang.
    pub(super) fn only_hangs(&self) -> bool {
        !self.hung.is_empty() && self.in_flight.is_empty() && self.queued.is_empty() && self.done.is_empty()
    }

    /// Completes everything that was queued or is in flight, including reads that hang, as may
    /// happen long after the engine gave up.
    pub(super) fn complete_late(&mut self) {
        self.in_flight.append(&mut self.hung);
        self.in_flight.append(&mut self.queued);
        while !self.in_flight.is_empty() {
            self.complete(0);
        }
    }

    fn complete(&mut self, index: usize) {
        let (token, result) = match self.in_flight.swap_remove(index).job {
            SimJob::Read(file, read) => (read.token, self.complete_read(&file, &read)),
            SimJob::Copy(copy) => (copy.token, self.complete_copy(&copy)),
            SimJob::Populate(PopulateRequest { token, place, bytes }) => {
                self.memory.borrow_mut().populating.remove(&token.user_data());
                // Without threads, or once the bytes are copied, nothing has to be populated.
                let skipped = self.faults.no_threads || self.random.chance(300);
                let populated = if skipped { Ok(()) } else { place.sink.populate(place.offset, bytes) };
                (token, populated.map(|()| 0))
            }
            SimJob::Cached(file, read) => (read.token, self.complete_cached_read(&file, &read)),
            SimJob::Observe(request) => {
                // SAFETY: the driver guarantees that these bytes are initialized, and that nothing
                // frees or writes to them until this observation completes.
                let bytes = unsafe { std::slice::from_raw_parts(request.address.as_ptr(), request.bytes) };
                let verdict = request.watch.observe(request.file, request.offset, bytes);
                (request.token, verdict.map(|()| request.bytes).map_err(Fault::Read))
            }
        };
        self.memory.borrow_mut().end_use(token.user_data());
        self.done.push(Completion { token, result });
    }

    fn complete_read(&mut self, file: &SimFile, read: &Read) -> Result<usize, Fault> {
        // A sink that can't populate its memory fails before anything is read.
        if let Some(place) = &read.place {
            // SAFETY: the driver guarantees that this place has room for `read.bytes` bytes, and
            // that nothing else accesses them. Nothing is written there.
            unsafe { place.sink.fill_with(place.offset, read.bytes, &mut |_| Ok(0)) }?;
        }
        self.perform(file, read).map_err(Fault::Read)
    }

    fn complete_copy(&mut self, copy: &StagedCopy) -> Result<usize, Fault> {
        let mut from = copy.from.as_ptr();
        let mut write = |part: &mut [MaybeUninit<u8>]| {
            for byte in part.iter_mut() {
                // SAFETY: the driver guarantees that staging is valid for `copy.bytes` bytes until
                // this copy completes.
                byte.write(unsafe { from.read() });
                from = from.wrapping_add(1);
            }
            Ok(part.len())
        };
        // SAFETY: the driver guarantees that the target has room for `copy.bytes` bytes, and that
        // nothing else accesses them until this copy completes.
        let result = unsafe { copy.to.sink.fill_with(copy.to.offset, copy.bytes, &mut write) };
        self.memory.borrow_mut().end_use(source_token(copy));
        result
    }

    fn complete_cached_read(&mut self, file: &SimFile, read: &CachedRead) -> Result<usize, Fault> {
        let cached = if self.faults.no_threads {
            0
        } else if self.random.chance(self.faults.evicted_per_mille) {
            self.random.below(read.bytes as u64)
        } else {
            file.bytes.min(read.offset + read.bytes as u64).saturating_sub(read.offset)
        };
        let mut done = 0;
        let mut write = |part: &mut [MaybeUninit<u8>]| {
            let here = usize::try_from(cached - done).unwrap().min(part.len());
            if here == 0 {
                return Err(Errno::AGAIN);
            }
            for byte in &mut part[..here] {
                byte.write(file.byte(read.offset + done));
                done += 1;
            }
            Ok(here)
        };
        // SAFETY: the driver guarantees that this place has room for `read.bytes` bytes, and that
        // nothing else accesses them until this read completes.
        unsafe { read.to.sink.fill_with(read.to.offset, read.bytes, &mut write) }
    }

    /// Performs a read: writes the bytes that it returns, or fails.
    fn perform(&mut self, file: &SimFile, read: &Read) -> Result<usize, Errno> {
        let refused = match read.route {
            Route::Buffered => None,
            Route::UringBuffered => file.faults.no_ring,
            Route::PreadDirect => file.faults.no_direct,
            _ => file.faults.no_ring.or(file.faults.no_direct),
        };
        if let Some(errno) = refused {
            self.refusals += 1;
            return Err(errno);
        }
        if self.faults.unpinnable && read.route.is_direct() && !self.memory.borrow().is_staging(read.address.addr().get()) {
            return Err(Errno::FAULT);
        }
        if self.random.chance(self.faults.interrupted_per_mille) {
            return Err(*self.random.pick(&[Errno::INTR, Errno::AGAIN]));
        }
        let wanted = read.offset..read.offset + read.bytes as u64;
        if let Some((bad, errno)) = &file.faults.bad
            && bad.start < wanted.end
            && wanted.start < bad.end
        {
            return Err(*errno);
        }
        if self.random.chance(self.faults.nothing_per_mille) {
            return Ok(0);
        }
        let neighbour = |job: &SimInFlight| matches!(&job.job, SimJob::Read(other, _) if other.number == file.number);
        if self.in_flight.iter().any(neighbour) && self.random.chance(self.faults.collateral_per_mille) {
            return Err(Errno::IO);
        }
        let available = file.bytes.min(wanted.end).saturating_sub(wanted.start);
        let short = available > 0 && self.random.chance(self.faults.short_per_mille);
        let bytes = if short { 1 + self.random.below(available) } else { available };
        for at in 0..bytes {
            write(read, at, file.byte(wanted.start + at));
        }
        // A device writes whole blocks, including the bytes on the disk after the end of the file.
        if read.route.is_direct() && bytes == available {
            for at in bytes..(bytes.next_multiple_of(BLOCK)).min(read.bytes as u64) {
                write(read, at, BEYOND_END);
            }
        }
        Ok(usize::try_from(bytes).unwrap())
    }
}

/// The token under which a copy's source is reserved, so that no read writes to it before the copy
/// completes.
fn source_token(copy: &StagedCopy) -> u64 {
    !copy.token.user_data()
}

fn write(read: &Read, at: u64, byte: u8) {
    let at = usize::try_from(at).unwrap();
    assert!(at < read.bytes);
    let address = read.address.as_ptr().wrapping_add(at);
    // SAFETY: the driver guarantees that the memory is valid for `read.bytes` bytes until this
    // read completes.
    unsafe { address.write(byte) };
}

impl Kernel for SimKernel {
    type File = SimFile;
    type Staging = SimStaging;

    fn now(&self) -> Duration {
        self.clock.get()
    }

    fn ring(&self) -> Result<(), Errno> {
        self.faults.ring.map_or(Ok(()), Err)
    }

    fn buffer_slots(&self) -> u16 {
        self.faults.buffer_slots
    }

    fn register_buffer(&mut self, slot: u16, address: NonNull<u8>, bytes: usize) -> Result<(), Errno> {
        assert!(self.faults.ring.is_none(), "a buffer was registered even though there is no ring");
        assert!(slot < self.faults.buffer_slots);
        if let Some(errno) = self.faults.register
            && self.random.chance(self.faults.register_per_mille)
        {
            return Err(errno);
        }
        let start = address.addr().get();
        assert!(!self.memory.borrow().is_unpopulated(start), "unpopulated memory was registered");
        if self.faults.unpinnable && !self.memory.borrow().is_staging(start) {
            self.refusals += 1;
            return Err(Errno::FAULT);
        }
        let before = self.memory.borrow_mut().registered.insert(slot, start..start + bytes);
        assert_eq!(before, None, "slot {slot} was registered twice");
        Ok(())
    }

    fn unregister_buffer(&mut self, slot: u16) {
        let mut memory = self.memory.borrow_mut();
        let range = memory.registered.remove(&slot).expect("a buffer must be registered before it is unregistered");
        assert!(!memory.is_written_to(&range), "a buffer was unregistered while an operation was using it");
    }

    fn attach(&mut self, file: &SimFile) {
        *self.attached.entry(file.number).or_default() += 1;
    }

    fn detach(&mut self, file: &SimFile) {
        let count = self.attached.get_mut(&file.number).expect("a file must be attached before it is detached");
        *count -= 1;
        if *count == 0 {
            self.attached.remove(&file.number);
        }
    }

    unsafe fn read(&mut self, file: &SimFile, read: Read) {
        assert!(self.attached.contains_key(&file.number), "a file was read without being attached");
        assert!(read.bytes > 0);
        let start = read.address.addr().get();
        let range = start..start + read.bytes;
        if read.route.uses_ring() {
            assert!(self.faults.ring.is_none(), "a read used a ring even though there is none");
        }
        if read.route.is_direct() {
            let aligned = read.offset.is_multiple_of(BLOCK)
                && (read.bytes as u64).is_multiple_of(BLOCK)
                && (start as u64).is_multiple_of(BLOCK);
            assert!(aligned, "a direct read must be aligned: {read:?}");
        }
        let mut memory = self.memory.borrow_mut();
        assert_eq!(
            memory.is_unpopulated(start),
            read.place.is_some(),
            "a read must have a place if and only if its memory is unpopulated"
        );
        let by_thread = matches!(read.route, Route::PreadDirect | Route::Buffered);
        assert!(read.place.as_ref().is_none_or(|place| memory.address_of(place) == start && by_thread));
        assert_eq!(read.buffer_slot.is_some(), read.route == Route::UringFixedDirect);
        if let Some(slot) = read.buffer_slot {
            let registered = memory.registered.get(&slot).expect("the buffer of a read must be registered");
            assert!(registered.start <= range.start && range.end <= registered.end, "a read exceeded its registered buffer");
        }
        assert!(!memory.is_written_to(&range), "a read was started on memory that another operation was using");
        memory.begin_use(read.token.user_data(), range);
        drop(memory);
        self.queued.push(SimInFlight { job: SimJob::Read(file.clone(), read), due: Duration::ZERO });
    }

    fn staging(&mut self, bytes: usize) -> Result<SimStaging, Errno> {
        if self.memory.borrow().staging.len() >= self.faults.staging {
            return Err(Errno::NOMEM);
        }
        Ok(SimBuffer::staging(bytes, &self.memory))
    }

    unsafe fn copy(&mut self, copy: StagedCopy) {
        let mut memory = self.memory.borrow_mut();
        let range = |start: usize| start..start + copy.bytes;
        let (from, to) = (range(copy.from.addr().get()), range(memory.address_of(&copy.to)));
        assert!(memory.is_staging(from.start) && !memory.is_staging(to.start));
        assert!(!memory.is_written_to(&from), "staging was copied while another operation was using it");
        assert!(!memory.is_written_to(&to), "a copy was started into memory that another operation was using");
        memory.begin_use(copy.token.user_data(), to);
        memory.begin_use(source_token(&copy), from);
        drop(memory);
        // A copy needs no submission and does not occupy the disk.
        let mut due = self.clock.get() + self.copying;
        if let Some(free_at) = self.copiers.iter_mut().min() {
            due = due.max(*free_at + self.copying);
            *free_at = due;
        }
        self.in_flight.push(SimInFlight { job: SimJob::Copy(copy), due });
    }

    fn populate(&mut self, request: PopulateRequest) {
        self.populate_requests += 1;
        let mut memory = self.memory.borrow_mut();
        let start = memory.address_of(&request.place);
        assert!(memory.is_unpopulated(start), "a request must not ask for populated memory to be populated");
        memory.populating.insert(request.token.user_data(), start..start + request.bytes);
        drop(memory);
        self.in_flight.push(SimInFlight { job: SimJob::Populate(request), due: self.clock.get() });
    }

    fn set_copiers(&mut self, _: usize) {
        // Ignored, because the `copiers` field determines how many copies run at once.
    }

    unsafe fn read_cached(&mut self, file: &SimFile, read: CachedRead) {
        assert!(self.attached.contains_key(&file.number), "a file was copied from the page cache without being attached");
        let mut memory = self.memory.borrow_mut();
        let start = memory.address_of(&read.to);
        let range = start..start + read.bytes;
        assert!(read.bytes > 0 && !memory.is_staging(start));
        assert!(!memory.is_written_to(&range), "a copy was started into memory that another operation was using");
        memory.begin_use(read.token.user_data(), range);
        drop(memory);
        self.in_flight.push(SimInFlight { job: SimJob::Cached(file.clone(), read), due: self.clock.get() + self.copying });
    }

    unsafe fn observe(&mut self, request: ObserveRequest) {
        let start = request.address.addr().get();
        let range = start..start + request.bytes;
        let mut memory = self.memory.borrow_mut();
        assert!(request.bytes > 0 && !memory.is_written_to(&range), "bytes were observed while another operation was using them");
        if memory.is_staging(start) {
            memory.observed_in_staging += 1;
        } else {
            memory.observed_in_pieces += 1;
        }
        memory.begin_use(request.token.user_data(), range);
        drop(memory);
        self.in_flight.push(SimInFlight { job: SimJob::Observe(request), due: self.clock.get() });
    }

    fn lacks_threads(&self) -> bool {
        self.faults.no_threads
    }

    fn submit(&mut self, _wait: bool) -> Result<(), Errno> {
        let breaks = self.random.chance(self.faults.breaks_per_mille);
        // Even if a submission fails, the kernel may have accepted part of the queue.
        let queued = self.queued.len();
        let taken = if breaks { usize::try_from(self.random.below(queued as u64 + 1)).unwrap() } else { queued };
        for mut job in self.queued.drain(..taken) {
            job.due = self.disk_free_at.max(self.clock.get()) + self.service;
            self.disk_free_at = job.due;
            let hangs =
                matches!(&job.job, SimJob::Read(file, _) if file.faults.hangs) || self.random.chance(self.faults.hangs_per_mille);
            if hangs { &mut self.hung } else { &mut self.in_flight }.push(job);
        }
        if breaks { Err(*self.random.pick(&[Errno::IO, Errno::BADF, Errno::NOMEM])) } else { Ok(()) }
    }

    fn reap(&mut self, into: &mut Vec<Completion>) {
        into.append(&mut self.done);
    }
}
