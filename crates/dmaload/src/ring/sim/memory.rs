//! Memory that records which operations are using it. The simulator panics if the driver frees or
//! outputs memory, or starts another operation on it, while an operation is using it.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc, dealloc};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use rustix::io::Errno;

use super::disk::POISON;
use crate::memory::buffer::{Buffer, Fault, PieceMemory, Place, Sink, Write};
use crate::support::id::LoadId;

const BLOCK_BYTES: usize = 4096;
/// The owner of staging, which belongs to no load.
const STAGING: LoadId = LoadId(u64::MAX);

/// All allocated memory, and the operations that use it. Shared by the kernel and the buffers.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Memory that operations in flight may write to or read from, by the operation's token.
    writing: BTreeMap<u64, Range<usize>>,
    /// Memory that is being populated, by the request's token. Other operations may use it at the
    /// same time, but it must be neither freed nor output.
    pub(super) populating: BTreeMap<u64, Range<usize>>,
    pub(super) registered: BTreeMap<u16, Range<usize>>,
    /// Bytes that are allocated but not filled yet, by load.
    pub(super) unfilled: BTreeMap<LoadId, u64>,
    pub(super) leaked_bytes: u64,
    pub(super) live_buffers: usize,
    pub(super) observed_in_staging: usize,
    pub(super) observed_in_pieces: usize,
    /// Staging buffers, which do not count towards the window.
    pub(super) staging: Vec<Range<usize>>,
    /// The memory that each sink fills, by the sink's address.
    sinks: BTreeMap<usize, Range<usize>>,
    /// Unpopulated memory, which only sinks may write to.
    unpopulated: Vec<Range<usize>>,
}

impl Memory {
    pub(super) fn unfilled_bytes(&self) -> u64 {
        self.unfilled.values().sum()
    }

    fn unfilled_by(&mut self, load: LoadId) -> &mut u64 {
        self.unfilled.entry(load).or_default()
    }

    pub(super) fn is_staging(&self, address: usize) -> bool {
        self.staging.iter().any(|staging| staging.contains(&address))
    }

    pub(super) fn is_written_to(&self, range: &Range<usize>) -> bool {
        self.writing.values().any(|other| overlaps(other, range))
    }

    fn is_in_use(&self, range: &Range<usize>) -> bool {
        self.is_written_to(range) || self.populating.values().any(|other| overlaps(other, range))
    }

    pub(super) fn is_unpopulated(&self, address: usize) -> bool {
        self.unpopulated.iter().any(|range| range.contains(&address))
    }

    fn is_registered(&self, range: &Range<usize>) -> bool {
        self.registered.values().any(|other| overlaps(other, range))
    }

    pub(super) fn address_of(&self, place: &Place) -> usize {
        let sink = Arc::as_ptr(&place.sink).addr();
        self.sinks.get(&sink).expect("a sink should live as long as its buffer").start + place.offset
    }

    /// Reserves `range` for the operation with this token until [`Memory::end_use`].
    pub(super) fn begin_use(&mut self, token: u64, range: Range<usize>) {
        assert_eq!(self.writing.insert(token, range), None, "a token was used twice");
    }

    pub(super) fn end_use(&mut self, token: u64) {
        self.writing.remove(&token);
    }
}

fn overlaps(one: &Range<usize>, other: &Range<usize>) -> bool {
    one.start < other.end && other.start < one.end
}

/// The memory of a piece.
#[derive(Debug)]
pub(super) struct SimBuffer {
    address: NonNull<u8>,
    bytes: usize,
    load: LoadId,
    populated: bool,
    sink: Arc<SimSink>,
    memory: Rc<RefCell<Memory>>,
}

/// Fills memory one block at a time.
#[derive(Debug)]
struct SimSink {
    address: NonNull<u8>,
    bytes: usize,
    /// The error with which populating a block fails, if it does.
    refuses: Option<Errno>,
}

// SAFETY: the simulator runs on one thread.
unsafe impl Send for SimSink {}
// SAFETY: the simulator runs on one thread.
unsafe impl Sync for SimSink {}

impl Sink for SimSink {
    unsafe fn fill_with(&self, offset: usize, bytes: usize, write: &mut Write<'_>) -> Result<usize, Fault> {
        assert!(offset + bytes <= self.bytes, "a place must be within its buffer");
        let mut done = 0;
        while done < bytes {
            if let Some(errno) = self.refuses {
                return Err(Fault::Memory(errno));
            }
            let here = (BLOCK_BYTES - (offset + done) % BLOCK_BYTES).min(bytes - done);
            let start = self.address.as_ptr().wrapping_add(offset + done).cast();
            // SAFETY: the block is within the buffer. The caller guarantees that the buffer stays
            // allocated and that nothing else accesses these bytes in the meantime.
            let part = unsafe { std::slice::from_raw_parts_mut(start, here) };
            let written = write(part).map_err(Fault::Read)?;
            done += written;
            if written < here {
                break;
            }
        }
        Ok(done)
    }

    fn populate(&self, offset: usize, bytes: usize) -> Result<(), Fault> {
        assert!(offset + bytes <= self.bytes, "a place must be within its buffer");
        self.refuses.map_or(Ok(()), |errno| Err(Fault::Memory(errno)))
    }

    fn runs_foreign_code(&self) -> bool {
        true
    }
}

impl SimBuffer {
    pub(super) fn new(load: LoadId, bytes: u64, memory: &Rc<RefCell<Memory>>) -> Self {
        let layout = layout(usize::try_from(bytes).unwrap());
        // SAFETY: the layout's size is not zero, because a piece or a staging slot has at least
        // one block.
        let address = NonNull::new(unsafe { alloc(layout) }).expect("the test should have enough memory");
        // SAFETY: the memory was just allocated with this size.
        unsafe { address.as_ptr().write_bytes(POISON, layout.size()) };
        *memory.borrow_mut().unfilled_by(load) += bytes;
        memory.borrow_mut().live_buffers += 1;
        let bytes = layout.size();
        let sink = Arc::new(SimSink { address, bytes, refuses: None });
        let buffer = SimBuffer { address, bytes, load, populated: true, sink, memory: Rc::clone(memory) };
        buffer.register_sink();
        buffer
    }

    /// Creates an unpopulated buffer. Its sink populates it or, if `refuses` is set, fails with
    /// that error.
    pub(super) fn unpopulated(load: LoadId, bytes: u64, memory: &Rc<RefCell<Memory>>, refuses: Option<Errno>) -> Self {
        let mut buffer = Self::new(load, bytes, memory);
        buffer.unregister_sink();
        memory.borrow_mut().unpopulated.push(buffer.range());
        buffer.populated = false;
        buffer.sink = Arc::new(SimSink { address: buffer.address, bytes: buffer.bytes, refuses });
        buffer.register_sink();
        buffer
    }

    /// Creates a staging buffer, which does not count towards the window.
    pub(super) fn staging(bytes: usize, memory: &Rc<RefCell<Memory>>) -> SimStaging {
        let buffer = Self::new(STAGING, bytes as u64, memory);
        let mut shared = memory.borrow_mut();
        shared.staging.push(buffer.range());
        *shared.unfilled_by(STAGING) -= bytes as u64;
        SimStaging(buffer)
    }

    fn register_sink(&self) {
        self.memory.borrow_mut().sinks.insert(Arc::as_ptr(&self.sink).addr(), self.range());
    }

    fn unregister_sink(&self) {
        self.memory.borrow_mut().sinks.remove(&Arc::as_ptr(&self.sink).addr());
    }

    pub(super) fn contents(&self) -> &[u8] {
        assert!(!self.memory.borrow().is_in_use(&self.range()), "bytes were accessed while an operation was using them");
        // SAFETY: the memory has `bytes` bytes, initialized with poison, and nothing writes to it.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.bytes) }
    }

    fn range(&self) -> Range<usize> {
        let start = self.address.addr().get();
        start..start + self.bytes
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, BLOCK_BYTES).expect("the layout should be valid")
}

// SAFETY: the memory stays allocated until the drop. Apart from operations that are given its
// address or a place, only `contents` accesses it, after checking that nothing writes to it.
unsafe impl Buffer for SimBuffer {
    fn address(&self) -> NonNull<u8> {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn leak(self) {
        *self.memory.borrow_mut().unfilled_by(self.load) -= self.bytes as u64;
        self.memory.borrow_mut().leaked_bytes += self.bytes as u64;
        std::mem::forget(self);
    }
}

impl PieceMemory for SimBuffer {
    fn is_populated(&self) -> bool {
        self.populated
    }

    fn place(&self, offset: usize) -> Place {
        Place { sink: Arc::clone(&self.sink) as Arc<dyn Sink>, offset }
    }
}

impl Drop for SimBuffer {
    fn drop(&mut self) {
        self.unregister_sink();
        let range = self.range();
        let mut memory = self.memory.borrow_mut();
        memory.unpopulated.retain(|other| *other != range);
        if !std::thread::panicking() {
            assert!(!memory.is_in_use(&range), "memory was freed while an operation was using it");
            assert!(!memory.is_registered(&range), "memory was freed while it was registered");
        }
        *memory.unfilled_by(self.load) -= self.bytes as u64;
        memory.live_buffers -= 1;
        drop(memory);
        // SAFETY: the memory was allocated in `new` with the same layout, and is freed only here.
        unsafe { dealloc(self.address.as_ptr(), layout(self.bytes)) };
    }
}

/// A staging buffer.
#[derive(Debug)]
pub(super) struct SimStaging(SimBuffer);

impl SimStaging {
    /// Adds the buffer's size to the unfilled bytes, because dropping or leaking the inner buffer
    /// subtracts it again.
    fn count_as_unfilled(&self) {
        let range = self.0.range();
        let mut memory = self.0.memory.borrow_mut();
        memory.staging.retain(|other| *other != range);
        *memory.unfilled_by(STAGING) += self.0.bytes as u64;
    }
}

// SAFETY: the buffer inside upholds the contract.
unsafe impl Buffer for SimStaging {
    fn address(&self) -> NonNull<u8> {
        self.0.address()
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    fn leak(self) {
        self.count_as_unfilled();
        // SAFETY: `self` is forgotten, so the buffer inside is moved out only once.
        let buffer = unsafe { std::ptr::read(&raw const self.0) };
        std::mem::forget(self);
        buffer.leak();
    }
}

impl Drop for SimStaging {
    fn drop(&mut self) {
        self.count_as_unfilled();
    }
}
