//! A kernel that is a list of reads in flight, and memory that knows who may still write to it.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc, dealloc};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::Random;
use crate::memory::buffer::{Buffer, Fault, Place, Sink, Write};
use crate::ring::kernel::{CachedRead, Completion, Kernel, Look, Read, StagedCopy};
use crate::route::Route;
use crate::support::id::LoadId;

pub(super) const BLOCK: u64 = 4096;
const BLOCK_BYTES: usize = 4096;
/// What memory holds before anything was read into it; no file has this byte.
const POISON: u8 = 0xEE;

/// A file of the simulated disk: its bytes follow from its number.
#[derive(Debug, Clone)]
pub(super) struct SimFile {
    pub(super) number: u64,
    /// Its length on disk, which may differ from the planned one.
    pub(super) bytes: u64,
    pub(super) faults: Rc<FileFaults>,
}

#[derive(Debug, Default)]
pub(super) struct FileFaults {
    /// Reads that touch this range fail.
    pub(super) bad: Option<(Range<u64>, Errno)>,
    /// Direct reads are refused.
    pub(super) no_direct: Option<Errno>,
    /// io_uring reads are refused.
    pub(super) no_ring: Option<Errno>,
    /// Reads never complete.
    pub(super) hangs: bool,
}

impl SimFile {
    pub(super) fn byte(&self, offset: u64) -> u8 {
        byte_of(self.number, offset)
    }
}

/// The byte at this offset of the file of this number.
pub(super) fn byte_of(number: u64, offset: u64) -> u8 {
    let mixed = (offset ^ number << 40).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    let byte = (mixed & 0xFF) as u8;
    if byte == POISON || byte == 0 { 0x11 } else { byte }
}

/// What the simulated kernel may do.
#[derive(Debug, Clone)]
pub(super) struct Faults {
    pub(super) ring: Option<Errno>,
    pub(super) register: Option<Errno>,
    /// Of those that would be taken, this many of 1000 registrations are refused.
    pub(super) register_per_mille: u64,
    pub(super) short_per_mille: u64,
    pub(super) interrupted_per_mille: u64,
    /// So many of 1000 reads fail because another one of the file, in flight too, is taken to hit a bad block.
    pub(super) collateral_per_mille: u64,
    /// So many of 1000 submissions fail, after a part of what was queued was taken.
    pub(super) breaks_per_mille: u64,
    /// So many of 1000 reads give nothing, though the file does not end there.
    pub(super) nothing_per_mille: u64,
    /// So many of 1000 reads never complete.
    pub(super) hangs_per_mille: u64,
    pub(super) buffer_slots: u16,
    /// Neither registration nor direct reads can pin the heap's memory.
    pub(super) unpinnable: bool,
    /// There is no thread for copies and looks.
    pub(super) no_threads: bool,
    /// So many staging buffers can be had.
    pub(super) staging: usize,
    /// So many of 1000 pieces find no memory when they are filled.
    pub(super) no_memory_per_mille: u64,
    /// So many of 1000 chunks have gone from the page cache, wholly or in part, when they are copied from there.
    pub(super) evicted_per_mille: u64,
}

impl Faults {
    pub(super) fn none() -> Self {
        Faults {
            ring: None,
            register: None,
            register_per_mille: 0,
            short_per_mille: 0,
            interrupted_per_mille: 0,
            collateral_per_mille: 0,
            breaks_per_mille: 0,
            nothing_per_mille: 0,
            hangs_per_mille: 0,
            buffer_slots: 16,
            unpinnable: false,
            no_threads: false,
            staging: usize::MAX,
            no_memory_per_mille: 0,
            evicted_per_mille: 0,
        }
    }
}

/// What has been allocated and what is being written to, for the kernel and its memory to agree on.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Memory that reads in flight may write to, by token.
    writing: BTreeMap<u64, Range<usize>>,
    registered: BTreeMap<u16, Range<usize>>,
    /// Allocated and not yet full, by the load that it is for.
    pub(super) unfilled: BTreeMap<LoadId, u64>,
    pub(super) leaked_bytes: u64,
    pub(super) live_buffers: usize,
    pub(super) looks_at_staging: usize,
    pub(super) looks_at_pieces: usize,
    /// Staging, which is no part of the window.
    pub(super) staging: Vec<Range<usize>>,
    /// Where sinks put what they take, by their addresses.
    sinks: BTreeMap<usize, Range<usize>>,
    /// Memory without pages: only sinks may write there.
    unpopulated: Vec<Range<usize>>,
}

impl Memory {
    pub(super) fn unfilled_bytes(&self) -> u64 {
        self.unfilled.values().sum()
    }

    fn unfilled_by(&mut self, load: LoadId) -> &mut u64 {
        self.unfilled.entry(load).or_default()
    }

    fn is_staging(&self, address: usize) -> bool {
        self.staging.iter().any(|staging| staging.contains(&address))
    }

    fn is_written_to(&self, range: &Range<usize>) -> bool {
        self.writing.values().any(|other| other.start < range.end && range.start < other.end)
    }

    fn is_unpopulated(&self, address: usize) -> bool {
        self.unpopulated.iter().any(|range| range.contains(&address))
    }

    /// Where this place is.
    fn address_of(&self, place: &Place) -> usize {
        let sink = Arc::as_ptr(&place.sink).addr();
        self.sinks.get(&sink).expect("a sink lives as long as its buffer").start + place.offset
    }

    fn is_registered(&self, range: &Range<usize>) -> bool {
        self.registered.values().any(|other| other.start < range.end && range.start < other.end)
    }
}

/// A piece of memory that panics when it is freed too early.
#[derive(Debug)]
pub(super) struct SimBuffer {
    address: NonNull<u8>,
    bytes: usize,
    load: LoadId,
    populated: bool,
    sink: Arc<SimSink>,
    memory: Rc<RefCell<Memory>>,
}

/// Brings memory into being by parts of a block.
#[derive(Debug)]
struct SimSink {
    address: NonNull<u8>,
    bytes: usize,
    refuses: Option<Errno>,
}

// SAFETY: everything runs on one thread.
unsafe impl Send for SimSink {}
// SAFETY: as above.
unsafe impl Sync for SimSink {}

impl Sink for SimSink {
    unsafe fn fill(&self, offset: usize, bytes: usize, write: &mut Write<'_>) -> Result<usize, Fault> {
        assert!(offset + bytes <= self.bytes, "a place is within its buffer");
        let mut done = 0;
        while done < bytes {
            if let Some(errno) = self.refuses {
                return Err(Fault::Memory(errno));
            }
            let here = (BLOCK_BYTES - (offset + done) % BLOCK_BYTES).min(bytes - done);
            let start = self.address.as_ptr().wrapping_add(offset + done).cast();
            // SAFETY: within the buffer, which lives as long as anybody may write to it, and which
            // nobody looks at meanwhile.
            let part = unsafe { std::slice::from_raw_parts_mut(start, here) };
            let written = write(part).map_err(Fault::Read)?;
            done += written;
            if written < here {
                break;
            }
        }
        Ok(done)
    }

    fn runs_foreign_code(&self) -> bool {
        true
    }
}

/// Staging is for no load.
const STAGING: LoadId = LoadId(u64::MAX);

impl SimBuffer {
    pub(super) fn new(load: LoadId, bytes: u64, memory: &Rc<RefCell<Memory>>) -> Self {
        let layout = layout(usize::try_from(bytes).unwrap());
        // SAFETY: the layout has a size above zero.
        let address = NonNull::new(unsafe { alloc(layout) }).expect("memory for a test");
        // SAFETY: the memory was just allocated with this size.
        unsafe { address.as_ptr().write_bytes(POISON, layout.size()) };
        *memory.borrow_mut().unfilled_by(load) += bytes;
        memory.borrow_mut().live_buffers += 1;
        let bytes = layout.size();
        let sink = Arc::new(SimSink { address, bytes, refuses: None });
        SimBuffer { address, bytes, load, populated: true, sink, memory: Rc::clone(memory) }.known()
    }

    /// The same without pages, which can be had when it is filled, or are refused.
    pub(super) fn unpopulated(load: LoadId, bytes: u64, memory: &Rc<RefCell<Memory>>, refuses: Option<Errno>) -> Self {
        let mut buffer = Self::new(load, bytes, memory);
        memory.borrow_mut().sinks.remove(&Arc::as_ptr(&buffer.sink).addr());
        memory.borrow_mut().unpopulated.push(buffer.range());
        buffer.populated = false;
        buffer.sink = Arc::new(SimSink { address: buffer.address, bytes: buffer.bytes, refuses });
        buffer.known()
    }

    fn known(self) -> Self {
        self.memory.borrow_mut().sinks.insert(Arc::as_ptr(&self.sink).addr(), self.range());
        self
    }

    fn forget(&self) {
        let mut memory = self.memory.borrow_mut();
        let range = self.range();
        memory.sinks.remove(&Arc::as_ptr(&self.sink).addr());
        memory.unpopulated.retain(|other| *other != range);
    }

    pub(super) fn contents(&self) -> &[u8] {
        assert!(!self.memory.borrow().is_written_to(&self.range()), "bytes are looked at while a read may write to them");
        // SAFETY: the memory is that long and initialised (poisoned), and nothing writes to it.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.bytes) }
    }

    fn range(&self) -> Range<usize> {
        let start = self.address.addr().get();
        start..start + self.bytes
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, 4096).expect("a valid layout")
}

// SAFETY: the memory is allocated until the drop, and shown only by `contents`, which looks whether it may.
unsafe impl Buffer for SimBuffer {
    fn address(&self) -> NonNull<u8> {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn is_populated(&self) -> bool {
        self.populated
    }

    fn place(&self, offset: usize) -> Place {
        Place { sink: Arc::clone(&self.sink) as Arc<dyn Sink>, offset }
    }

    fn leak(self) {
        *self.memory.borrow_mut().unfilled_by(self.load) -= self.bytes as u64;
        self.memory.borrow_mut().leaked_bytes += self.bytes as u64;
        std::mem::forget(self);
    }
}

impl Drop for SimBuffer {
    fn drop(&mut self) {
        self.forget();
        let mut memory = self.memory.borrow_mut();
        if !std::thread::panicking() {
            assert!(!memory.is_written_to(&self.range()), "memory is freed while a read may write to it");
            assert!(!memory.is_registered(&self.range()), "memory is freed while it is registered");
        }
        *memory.unfilled_by(self.load) -= self.bytes as u64;
        memory.live_buffers -= 1;
        drop(memory);
        // SAFETY: allocated in `new` with the same layout, and not freed before.
        unsafe { dealloc(self.address.as_ptr(), layout(self.bytes)) };
    }
}

/// Staging: the same memory, counted apart.
#[derive(Debug)]
pub(super) struct SimStaging(SimBuffer);

// SAFETY: as for the buffer in it.
unsafe impl Buffer for SimStaging {
    fn address(&self) -> NonNull<u8> {
        self.0.address()
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    fn is_populated(&self) -> bool {
        true
    }

    fn place(&self, _: usize) -> Place {
        unreachable!("threads copy from staging, and put nothing into it")
    }

    fn leak(self) {
        // What was counted out of the window comes back into it, to be counted as leaked.
        *self.0.memory.borrow_mut().unfilled_by(STAGING) += self.0.bytes as u64;
        let memory = Rc::clone(&self.0.memory);
        let range = self.0.range();
        memory.borrow_mut().staging.retain(|other| *other != range);
        // SAFETY: `self` is forgotten, so the buffer in it is moved out once.
        let buffer = unsafe { std::ptr::read(&raw const self.0) };
        std::mem::forget(self);
        buffer.leak();
    }
}

impl Drop for SimStaging {
    fn drop(&mut self) {
        let range = self.0.range();
        let mut memory = self.0.memory.borrow_mut();
        memory.staging.retain(|other| *other != range);
        *memory.unfilled_by(STAGING) += self.0.bytes as u64;
    }
}

#[derive(Debug)]
struct InFlight {
    job: Job,
    due: Duration,
}

#[derive(Debug)]
enum Job {
    Read(SimFile, Read),
    Copy(StagedCopy),
    Cached(SimFile, CachedRead),
    Look(Look),
}

/// See the module.
#[derive(Debug)]
pub(super) struct SimKernel {
    random: Random,
    faults: Faults,
    memory: Rc<RefCell<Memory>>,
    clock: Rc<Cell<Duration>>,
    /// Queued, and not yet handed to the kernel.
    queued: Vec<InFlight>,
    in_flight: Vec<InFlight>,
    /// In flight, and not to complete while anybody waits for it.
    hung: Vec<InFlight>,
    done: Vec<Completion>,
    /// How long the disk takes for one read; it does one at a time.
    service: Duration,
    /// How long a copy takes.
    pub(super) copying: Duration,
    /// When each copier is done; without any, as many as there are copies.
    pub(super) copiers: Vec<Duration>,
    disk_free_at: Duration,
    attached: BTreeMap<u64, usize>,
    /// Reads and registrations that were refused.
    pub(super) refusals: usize,
}

impl SimKernel {
    pub(super) fn new(
        seed: u64,
        faults: Faults,
        memory: &Rc<RefCell<Memory>>,
        clock: &Rc<Cell<Duration>>,
        service: Duration,
    ) -> Self {
        // A new ring has an empty table.
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
        }
    }

    /// From now on registrations are refused for no limit.
    pub(super) fn allow_registration(&mut self) {
        self.faults.register = None;
    }

    pub(super) fn reads_in_flight(&self) -> usize {
        self.in_flight.iter().chain(&self.hung).filter(|job| matches!(job.job, Job::Read(..))).count()
    }

    pub(super) fn is_clean(&self) -> bool {
        let memory = self.memory.borrow();
        memory.registered.values().all(|range| memory.is_staging(range.start))
            && self.attached.is_empty()
            && self.in_flight.is_empty()
            && self.hung.is_empty()
            && self.queued.is_empty()
    }

    /// When the next read is due by the clock.
    pub(super) fn next_due(&self) -> Option<Duration> {
        self.in_flight.iter().map(|job| job.due).min()
    }

    /// Completes what is due.
    pub(super) fn complete_due(&mut self) {
        let now = self.clock.get();
        while let Some(index) = self.in_flight.iter().position(|job| job.due <= now) {
            self.complete(index);
        }
    }

    /// Answers a read that is not in flight.
    pub(super) fn complete_stray(&mut self) {
        self.done.push(Completion { token: crate::ring::slots::Token::from_user_data(u64::from(u32::MAX)), result: Ok(4096) });
    }

    /// Completes any read, in any way.
    pub(super) fn complete_any(&mut self) {
        if !self.in_flight.is_empty() {
            let index = self.random.below(self.in_flight.len() as u64);
            self.complete(usize::try_from(index).unwrap());
        }
    }

    /// Whether only what hangs is in flight.
    pub(super) fn only_hangs(&self) -> bool {
        !self.hung.is_empty() && self.in_flight.is_empty() && self.queued.is_empty() && self.done.is_empty()
    }

    /// What hung is written after all, when nobody waits for it any more.
    pub(super) fn complete_late(&mut self) {
        self.in_flight.append(&mut self.hung);
        self.in_flight.append(&mut self.queued);
        while !self.in_flight.is_empty() {
            self.complete(0);
        }
    }

    fn complete(&mut self, index: usize) {
        let (token, result) = match self.in_flight.swap_remove(index).job {
            Job::Read(file, read) => {
                // Which sinks refuse memory before they are written to.
                let memory = read.place.as_ref().map_or(Ok(0), |place| {
                    // SAFETY: the driver promised this place, and nothing is written there.
                    unsafe { place.sink.fill(place.offset, read.bytes, &mut |_| Ok(0)) }
                });
                (read.token, memory.and_then(|_| self.perform(&file, &read).map_err(Fault::Read)))
            }
            Job::Copy(copy) => {
                let mut from = copy.from.as_ptr();
                let mut write = |part: &mut [MaybeUninit<u8>]| {
                    for byte in part.iter_mut() {
                        // SAFETY: the driver promised this place for that many bytes until this copy completes.
                        byte.write(unsafe { from.read() });
                        from = from.wrapping_add(1);
                    }
                    Ok(part.len())
                };
                // SAFETY: the driver promised the other place, too.
                let result = unsafe { copy.to.sink.fill(copy.to.offset, copy.bytes, &mut write) };
                self.memory.borrow_mut().writing.remove(&!copy.token.user_data());
                (copy.token, result)
            }
            Job::Cached(file, read) => {
                let there = if self.faults.no_threads {
                    0
                } else if self.random.chance(self.faults.evicted_per_mille) {
                    self.random.below(read.bytes as u64)
                } else {
                    file.bytes.min(read.offset + read.bytes as u64).saturating_sub(read.offset)
                };
                let mut done = 0;
                let mut write = |part: &mut [MaybeUninit<u8>]| {
                    let here = usize::try_from(there - done).unwrap().min(part.len());
                    if here == 0 {
                        return Err(Errno::AGAIN);
                    }
                    for byte in &mut part[..here] {
                        byte.write(file.byte(read.offset + done));
                        done += 1;
                    }
                    Ok(here)
                };
                // SAFETY: the driver promised this place until this copy completes.
                (read.token, unsafe { read.to.sink.fill(read.to.offset, read.bytes, &mut write) })
            }
            Job::Look(look) => {
                // SAFETY: the driver promised so many initialised bytes that nobody writes to until this look completes.
                let bytes = unsafe { std::slice::from_raw_parts(look.address.as_ptr(), look.bytes) };
                (look.token, look.watch.look(look.file, look.offset, bytes).map(|()| look.bytes).map_err(Fault::Read))
            }
        };
        self.memory.borrow_mut().writing.remove(&token.user_data());
        self.done.push(Completion { token, result });
    }

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
        let neighbour = |job: &InFlight| matches!(&job.job, Job::Read(other, _) if other.number == file.number);
        if self.in_flight.iter().any(neighbour) && self.random.chance(self.faults.collateral_per_mille) {
            return Err(Errno::IO);
        }
        let there = file.bytes.min(wanted.end).saturating_sub(wanted.start);
        let short = there > 0 && self.random.chance(self.faults.short_per_mille);
        let bytes = if short { 1 + self.random.below(there) } else { there };
        for at in 0..bytes {
            write(read, at, file.byte(wanted.start + at));
        }
        // A device writes whole blocks: past the end of the file it leaves whatever was there on disk.
        if read.route.is_direct() && bytes == there {
            for at in bytes..(bytes.next_multiple_of(BLOCK)).min(read.bytes as u64) {
                write(read, at, 0xBB);
            }
        }
        Ok(usize::try_from(bytes).unwrap())
    }
}

fn write(read: &Read, at: u64, byte: u8) {
    let at = usize::try_from(at).unwrap();
    assert!(at < read.bytes);
    let address = read.address.as_ptr().wrapping_add(at);
    // SAFETY: the driver promised that the memory is valid for `read.bytes` bytes until this read completes.
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
        assert!(self.faults.ring.is_none(), "registered without a ring");
        assert!(slot < self.faults.buffer_slots);
        if let Some(errno) = self.faults.register
            && self.random.chance(self.faults.register_per_mille)
        {
            return Err(errno);
        }
        let start = address.addr().get();
        assert!(!self.memory.borrow().is_unpopulated(start), "memory without pages is registered");
        if self.faults.unpinnable && !self.memory.borrow().is_staging(start) {
            self.refusals += 1;
            return Err(Errno::FAULT);
        }
        let before = self.memory.borrow_mut().registered.insert(slot, start..start + bytes);
        assert_eq!(before, None, "slot {slot} is used while it is taken");
        Ok(())
    }

    fn unregister_buffer(&mut self, slot: u16) {
        let mut memory = self.memory.borrow_mut();
        let range = memory.registered.remove(&slot).expect("only what is registered is unregistered");
        assert!(!memory.is_written_to(&range), "unregistered while a read is in flight");
    }

    fn attach(&mut self, file: &SimFile) {
        *self.attached.entry(file.number).or_default() += 1;
    }

    fn detach(&mut self, file: &SimFile) {
        let count = self.attached.get_mut(&file.number).expect("only what is attached is detached");
        *count -= 1;
        if *count == 0 {
            self.attached.remove(&file.number);
        }
    }

    unsafe fn read(&mut self, file: &SimFile, read: Read) {
        assert!(self.attached.contains_key(&file.number), "a read from a file that is not attached");
        assert!(read.bytes > 0);
        let start = read.address.addr().get();
        let range = start..start + read.bytes;
        if read.route.uses_ring() {
            assert!(self.faults.ring.is_none(), "a ring read without a ring");
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
            "memory without pages is read into by threads that bring them"
        );
        assert!(read.place.as_ref().is_none_or(|place| memory.address_of(place) == start && read.route == Route::Buffered));
        assert_eq!(read.buffer_slot.is_some(), read.route == Route::UringFixedDirect);
        if let Some(slot) = read.buffer_slot {
            let registered = memory.registered.get(&slot).expect("the buffer is registered");
            assert!(registered.start <= range.start && range.end <= registered.end, "a read leaves its registered buffer");
        }
        assert!(!memory.is_written_to(&range), "two reads in flight write to the same memory");
        assert_eq!(memory.writing.insert(read.token.user_data(), range), None, "a token is used twice");
        drop(memory);
        self.queued.push(InFlight { job: Job::Read(file.clone(), read), due: Duration::ZERO });
    }

    fn staging(&mut self, bytes: usize) -> Result<SimStaging, Errno> {
        if self.memory.borrow().staging.len() >= self.faults.staging {
            return Err(Errno::NOMEM);
        }
        let buffer = SimBuffer::new(STAGING, bytes as u64, &self.memory);
        let mut memory = self.memory.borrow_mut();
        memory.staging.push(buffer.range());
        *memory.unfilled_by(STAGING) -= bytes as u64;
        drop(memory);
        Ok(SimStaging(buffer))
    }

    unsafe fn copy(&mut self, copy: StagedCopy) {
        let mut memory = self.memory.borrow_mut();
        let range = |start: usize| start..start + copy.bytes;
        let (from, to) = (range(copy.from.addr().get()), range(memory.address_of(&copy.to)));
        assert!(memory.is_staging(from.start) && !memory.is_staging(to.start));
        assert!(!memory.is_written_to(&from), "staging is copied while a read writes to it");
        assert!(!memory.is_written_to(&to), "a copy goes where somebody else writes");
        memory.writing.insert(copy.token.user_data(), to);
        // What is being copied must not be read into either.
        memory.writing.insert(!copy.token.user_data(), from);
        drop(memory);
        // A copy needs no submission, and does not occupy the disk.
        let mut due = self.clock.get() + self.copying;
        if let Some(free_at) = self.copiers.iter_mut().min() {
            due = due.max(*free_at + self.copying);
            *free_at = due;
        }
        self.in_flight.push(InFlight { job: Job::Copy(copy), due });
    }

    fn set_copiers(&mut self, _: usize) {
        // Each copy has a thread.
    }

    unsafe fn read_cached(&mut self, file: &SimFile, read: CachedRead) {
        assert!(self.attached.contains_key(&file.number), "a copy from a file that is not attached");
        let mut memory = self.memory.borrow_mut();
        let start = memory.address_of(&read.to);
        let range = start..start + read.bytes;
        assert!(read.bytes > 0 && !memory.is_staging(start));
        assert!(!memory.is_written_to(&range), "a copy goes where somebody else writes");
        assert_eq!(memory.writing.insert(read.token.user_data(), range), None, "a token is used twice");
        drop(memory);
        self.in_flight.push(InFlight { job: Job::Cached(file.clone(), read), due: self.clock.get() + self.copying });
    }

    unsafe fn look(&mut self, look: Look) {
        let start = look.address.addr().get();
        let range = start..start + look.bytes;
        let mut memory = self.memory.borrow_mut();
        assert!(look.bytes > 0 && !memory.is_written_to(&range), "bytes are looked at while somebody writes to them");
        if memory.is_staging(start) {
            memory.looks_at_staging += 1;
        } else {
            memory.looks_at_pieces += 1;
        }
        memory.writing.insert(look.token.user_data(), range);
        drop(memory);
        self.in_flight.push(InFlight { job: Job::Look(look), due: self.clock.get() });
    }

    fn is_alone(&self) -> bool {
        self.faults.no_threads
    }

    fn submit(&mut self, _wait: bool) -> Result<(), Errno> {
        let breaks = self.random.chance(self.faults.breaks_per_mille);
        // Even where the call fails, the kernel may have taken some of what was queued.
        let queued = self.queued.len();
        let taken = if breaks { usize::try_from(self.random.below(queued as u64 + 1)).unwrap() } else { queued };
        for mut job in self.queued.drain(..taken) {
            job.due = self.disk_free_at.max(self.clock.get()) + self.service;
            self.disk_free_at = job.due;
            let hangs =
                matches!(&job.job, Job::Read(file, _) if file.faults.hangs) || self.random.chance(self.faults.hangs_per_mille);
            if hangs { &mut self.hung } else { &mut self.in_flight }.push(job);
        }
        if breaks { Err(*self.random.pick(&[Errno::IO, Errno::BADF, Errno::NOMEM])) } else { Ok(()) }
    }

    fn reap(&mut self, into: &mut Vec<Completion>) {
        into.append(&mut self.done);
    }
}
