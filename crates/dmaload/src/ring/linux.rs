//! The real kernel: io_uring if it is allowed, otherwise threads that call `pread`.
//!
//! Reads through a ring require `IORING_OP_READ` (Linux 5.6 or later). The following features are
//! used if they are available:
//!
//! - `SINGLE_ISSUER` with `DEFER_TASKRUN` (6.1 or later): completions are processed on request,
//!   instead of interrupting this thread.
//! - Sparse tables of registered buffers and files (5.19 or later).
//! - A limit on kernel threads (5.15 or later).
//! - `RWF_DONTCACHE` (6.14 or later).
//!
//! `SQPOLL` is not used because it took 2.7 times the CPU time without making loads faster.
//! `IOPOLL` is not used because most devices are not set up for it.
//!
//! Closing a ring does not stop its reads. If the driver abandons a ring before all reads have
//! completed, it therefore leaks their memory (see [`super::driver`]).
#![allow(unsafe_code)]

pub(crate) mod probe;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dmabuf::{AddressRange, Mapping, Memory, Pages};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::io::Errno;

use super::kernel::{CachedRead, Completion, Kernel, ObserveRequest, PopulateRequest, Read, StagedCopy};
use super::pool::{OBSERVERS, READERS, ThreadPool};
use super::slots::Token;
use super::wake::Wake;
use crate::files::source::OpenFile;
use crate::memory::buffer::{Buffer, Fault};
use crate::ring::pace::FIRST;
use crate::route::Route;
use crate::support::errno;
use crate::support::id::LoadId;

/// Maximum number of registered buffers: staging slots, and pieces that are being read. Reads are
/// issued piece by piece, so there are usually no more registered pieces than reads in flight,
/// and by default far fewer than 512 reads are in flight. If no entry is free, a piece waits for
/// one.
const BUFFER_SLOTS: u16 = 512;
/// Maximum number of registered files. Any further files are read through their descriptors.
const FILE_SLOTS: u32 = 64;
/// The user data of the request that polls the eventfd. No operation has this token, because its
/// slot index would be 2^32 - 1, and far fewer operations are in flight at once.
const WAKE_USER_DATA: u64 = u64::MAX;

/// See the module documentation.
pub(crate) struct LinuxKernel {
    started: Instant,
    wake: Arc<Wake>,
    ring: Result<Ring, Errno>,
    readers: ThreadPool,
    copiers: ThreadPool,
    observers: ThreadPool,
}

impl LinuxKernel {
    /// Sets up a ring for `depth` reads in flight. Must be called on the thread that will use the
    /// ring, because a ring with `SINGLE_ISSUER` belongs to the thread that created it.
    pub(crate) fn new(depth: usize, started: Instant, wake: Arc<Wake>) -> Self {
        let ring = Ring::new(depth, &wake);
        LinuxKernel {
            started,
            readers: ThreadPool::new(Arc::clone(&wake), "read", READERS),
            copiers: ThreadPool::new(Arc::clone(&wake), "copy", FIRST),
            observers: ThreadPool::new(Arc::clone(&wake), "observe", OBSERVERS),
            ring,
            wake,
        }
    }
}

impl Kernel for LinuxKernel {
    type File = Arc<OpenFile>;
    type Staging = StagingMemory;

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn ring(&self) -> Result<(), Errno> {
        self.ring.as_ref().map(|_| ()).map_err(|errno| *errno)
    }

    fn buffer_slots(&self) -> u16 {
        BUFFER_SLOTS
    }

    fn register_buffer(&mut self, slot: u16, address: NonNull<u8>, bytes: usize) -> Result<(), Errno> {
        let ring = self.ring.as_mut().map_err(|errno| *errno)?;
        ring.buffers?;
        ring.update_buffer(slot, address.as_ptr(), bytes)
    }

    fn unregister_buffer(&mut self, slot: u16) {
        if let Ok(ring) = &mut self.ring {
            // The kernel does not refuse to empty an entry. Even if it did, the pages would only
            // stay pinned until the slot is reused or the ring is closed.
            let _ = ring.update_buffer(slot, std::ptr::null_mut(), 0);
        }
    }

    fn attach(&mut self, file: &Arc<OpenFile>) {
        // The ring must not hold a file that it never reads directly: releasing the ring's
        // reference may close the file, and that may block this thread.
        if let Ok(ring) = &mut self.ring
            && file.ring_refused.is_none()
        {
            ring.files.attach(&ring.ring, file);
        }
    }

    fn detach(&mut self, file: &Arc<OpenFile>) {
        if let Ok(ring) = &mut self.ring
            && file.ring_refused.is_none()
        {
            ring.files.detach(&ring.ring, file);
        }
    }

    unsafe fn read(&mut self, file: &Arc<OpenFile>, read: Read) {
        match &mut self.ring {
            Ok(ring) if read.route.uses_ring() && file.ring_refused_to(read.route).is_none() => ring.read(file, &read),
            // SAFETY: the caller upholds the same contract.
            _ => unsafe { self.readers.read(Arc::clone(file), read) },
        }
    }

    fn cancel(&mut self, load: LoadId) {
        // The kernel does not cancel reads that it has started: see docs/architecture.md.
        self.readers.cancel(load);
    }

    fn staging(&mut self, bytes: usize) -> Result<StagingMemory, Errno> {
        StagingMemory::new(bytes, Pages::Auto).map_err(|error| errno::to_rustix(error.errno))
    }

    fn populate(&mut self, request: PopulateRequest) {
        self.copiers.populate(request);
    }

    unsafe fn copy(&mut self, copy: StagedCopy) {
        // SAFETY: the caller upholds the same contract.
        unsafe { self.copiers.copy(copy) };
    }

    fn set_copiers(&mut self, threads: usize) {
        self.copiers.set_max_threads(threads);
    }

    unsafe fn read_cached(&mut self, file: &Arc<OpenFile>, read: CachedRead) {
        // SAFETY: the caller upholds the same contract.
        unsafe { self.copiers.read_cached(Arc::clone(file), read) };
    }

    unsafe fn observe(&mut self, request: ObserveRequest) {
        // SAFETY: the caller upholds the same contract.
        unsafe { self.observers.observe(request) };
    }

    fn lacks_threads(&self) -> bool {
        self.copiers.lacks_threads()
    }

    fn busy_threads(&self) -> usize {
        [&self.readers, &self.copiers, &self.observers].into_iter().map(ThreadPool::busy).sum()
    }

    fn submit(&mut self, wait: bool) -> Result<(), Errno> {
        let wait = wait && ![&self.readers, &self.copiers, &self.observers].into_iter().any(ThreadPool::has_completions);
        match &mut self.ring {
            Ok(ring) => ring.submit(wait, &self.wake),
            Err(_) => {
                if wait {
                    self.wake.wait();
                }
                Ok(())
            }
        }
    }

    fn reap(&mut self, into: &mut Vec<Completion>) {
        self.readers.reap(into);
        self.copiers.reap(into);
        self.observers.reap(into);
        if let Ok(ring) = &mut self.ring {
            ring.reap(into, &self.wake);
        }
    }
}

/// Anonymous, populated memory.
#[derive(Debug)]
pub(crate) struct StagingMemory(Mapping);

impl StagingMemory {
    fn new(bytes: usize, pages: Pages) -> Result<Self, dmabuf::Error> {
        let mapping = AddressRange::reserve(bytes)?.map(&Memory::Anonymous, 0, bytes)?;
        mapping.populate(&Memory::Anonymous, 0..bytes, pages)?;
        Ok(StagingMemory(mapping))
    }
}

// SAFETY: a `Mapping` stays mapped, writable and at the same address until it is dropped, and the
// memory of this one is reachable only by its address.
unsafe impl Buffer for StagingMemory {
    fn address(&self) -> NonNull<u8> {
        self.0.address()
    }

    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    fn leak(self) {
        std::mem::forget(self);
    }
}

struct Ring {
    ring: IoUring,
    /// Entries that are not in the submission queue yet.
    queue: Vec<squeue::Entry>,
    /// Whether the ring is polling the eventfd.
    armed: bool,
    /// The result of creating the table of registered buffers.
    buffers: Result<(), Errno>,
    files: FileTable,
    uncached: Uncached,
}

/// Tracks which reads have the `RWF_DONTCACHE` flag, and which file systems refuse it. With this
/// flag (Linux 6.14 or later), a read through the page cache leaves nothing in the cache.
#[derive(Debug, Default)]
struct Uncached {
    /// The user data of each read in flight with the flag, and the number of the read's file
    /// system.
    in_flight: HashMap<u64, u64>,
    /// File systems that have refused the flag. Before Linux 6.14, all file systems do.
    refused_by: HashSet<u64>,
}

impl Uncached {
    /// Returns the flags for a read from this file system.
    fn flags(&mut self, user_data: u64, mount: u64) -> i32 {
        if self.refused_by.contains(&mount) {
            return 0;
        }
        self.in_flight.insert(user_data, mount);
        libc::RWF_DONTCACHE
    }

    /// Translates the result of a completion for the driver: a refused flag becomes EAGAIN, so the
    /// read is retried without the flag.
    fn interpret(&mut self, user_data: u64, result: Result<usize, Errno>) -> Result<usize, Errno> {
        match (self.in_flight.remove(&user_data), result) {
            (Some(mount), Err(Errno::OPNOTSUPP)) => {
                self.refused_by.insert(mount);
                Err(Errno::AGAIN)
            }
            (_, result) => result,
        }
    }
}

impl Ring {
    fn new(depth: usize, wake: &Wake) -> Result<Self, Errno> {
        let entries =
            u32::try_from(depth + 1).expect("settings should allow at most 4096 reads").next_power_of_two().clamp(8, 4096);
        let ring = set_up(entries)?;
        let buffers = ring.submitter().register_buffers_sparse(u32::from(BUFFER_SLOTS)).map_err(|error| errno(&error));
        let files = FileTable::new(&ring);
        // If this fails (before Linux 5.15), the kernel may use fewer threads, and reads through
        // the page cache may wait for each other.
        let _ = set_kernel_threads(&ring, depth);
        let mut ring = Ring { ring, queue: Vec::new(), armed: false, buffers, files, uncached: Uncached::default() };
        // This call fails if a ring can be set up but not entered, for example because of a
        // seccomp profile.
        ring.submit(false, wake)?;
        Ok(ring)
    }

    fn read(&mut self, file: &OpenFile, read: &Read) {
        let entry = if read.route == Route::UringBuffered {
            let user_data = read.token.user_data();
            let fd = types::Fd(file.descriptor(read.route).as_raw_fd());
            let flags = self.uncached.flags(user_data, file.identity.mount());
            let entry = opcode::Read::new(fd, read.address.as_ptr(), length(read)).offset(read.offset).rw_flags(flags);
            // `ASYNC` passes the read to a kernel thread at once, so this thread neither waits for
            // a server nor copies the bytes itself.
            entry.build().flags(squeue::Flags::ASYNC).user_data(user_data)
        } else {
            self.files.entry(file, read)
        };
        self.queue.push(entry);
    }

    fn update_buffer(&mut self, slot: u16, address: *mut u8, bytes: usize) -> Result<(), Errno> {
        // Update one slot per call: given several, the kernel might accept only some of them
        // without reporting it.
        let vector = libc_iovec(address, bytes);
        // SAFETY: the memory stays mapped while it is registered: the driver unregisters a buffer
        // before releasing it, or leaks the buffer. The probe never reads into its memory.
        unsafe { self.ring.submitter().register_buffers_update(u32::from(slot), &[vector], None) }.map_err(|error| errno(&error))
    }

    fn submit(&mut self, wait: bool, wake: &Wake) -> Result<(), Errno> {
        if !self.armed {
            let poll = opcode::PollAdd::new(types::Fd(wake.as_fd().as_raw_fd()), u32::from(rustix::event::PollFlags::IN.bits()));
            self.queue.push(poll.build().user_data(WAKE_USER_DATA));
            self.armed = true;
        }
        loop {
            let room = {
                let mut submission = self.ring.submission();
                let room = (submission.capacity() - submission.len()).min(self.queue.len());
                for entry in self.queue.drain(..room) {
                    // SAFETY: the memory and the descriptor of an entry stay valid until its
                    // completion: the eventfd as long as the ring, a read's memory by the contract
                    // of `Kernel::read`, and its file because the driver holds it until then.
                    let pushed = unsafe { submission.push(&entry) };
                    assert!(pushed.is_ok(), "the submission queue should have room");
                }
                room
            };
            let wait = wait && self.queue.is_empty();
            if wait && cfg!(dmaload_valgrind) {
                // Valgrind 3.19 does not know that io_uring_enter(2) blocks, and would not let any
                // other thread run.
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            let want = usize::from(wait && cfg!(not(dmaload_valgrind)));
            match self.ring.submit_and_wait(want) {
                Ok(_) if self.queue.is_empty() || room == 0 => return Ok(()),
                Ok(_) => {}
                // Interrupted, or the kernel lacks a resource until completions are reaped. The
                // caller reaps them next, and queued entries stay queued.
                Err(error) => match errno(&error) {
                    Errno::INTR | Errno::AGAIN | Errno::BUSY | Errno::TIME => return Ok(()),
                    errno => return Err(errno),
                },
            }
        }
    }

    fn reap(&mut self, into: &mut Vec<Completion>, wake: &Wake) {
        for entry in self.ring.completion() {
            if entry.user_data() == WAKE_USER_DATA {
                self.armed = false;
                wake.clear();
                continue;
            }
            let token = Token::from_user_data(entry.user_data());
            let result = usize::try_from(entry.result()).map_err(|_| Errno::from_raw_os_error(-entry.result()));
            let result = self.uncached.interpret(entry.user_data(), result).map_err(Fault::Read);
            into.push(Completion { token, result });
        }
    }
}

/// The ring's table of registered files. Reading by table index saves the kernel a descriptor
/// lookup and the update of a reference count.
struct FileTable {
    /// For each attached file, by its identifier: its slot, if it has one, and the number of
    /// pieces that attached it.
    slots: HashMap<u64, (Option<u32>, usize)>,
    free: Vec<u32>,
    refused: Option<Errno>,
}

impl FileTable {
    fn new(ring: &IoUring) -> Self {
        let refused = ring.submitter().register_files_sparse(FILE_SLOTS).err().map(|error| errno(&error));
        let free = if refused.is_none() { (0..FILE_SLOTS).rev().collect() } else { Vec::new() };
        FileTable { slots: HashMap::new(), free, refused }
    }

    fn attach(&mut self, ring: &IoUring, file: &OpenFile) {
        let entry = self.slots.entry(file.id).or_insert((None, 0));
        entry.1 += 1;
        if entry.1 == 1
            && let Some(slot) = self.free.pop()
        {
            let fd = file.descriptor(Route::UringDirect).as_raw_fd();
            match ring.submitter().register_files_update(slot, &[fd]) {
                Ok(1) => entry.0 = Some(slot),
                _ => self.free.push(slot),
            }
        }
    }

    fn detach(&mut self, ring: &IoUring, file: &OpenFile) {
        let entry = self.slots.get_mut(&file.id).expect("a file must be attached before it is detached");
        entry.1 -= 1;
        if entry.1 == 0
            && let Some((Some(slot), _)) = self.slots.remove(&file.id)
        {
            // A slot that could not be emptied is not reused.
            if ring.submitter().register_files_update(slot, &[-1]).is_ok() {
                self.free.push(slot);
            }
        }
    }

    fn entry(&self, file: &OpenFile, read: &Read) -> squeue::Entry {
        let bytes = length(read);
        let address = read.address.as_ptr();
        let entry = match (self.slots.get(&file.id), read.buffer_slot) {
            (Some(&(Some(slot), _)), Some(buffer)) => {
                opcode::ReadFixed::new(types::Fixed(slot), address, bytes, buffer).offset(read.offset).build()
            }
            (Some(&(Some(slot), _)), None) => opcode::Read::new(types::Fixed(slot), address, bytes).offset(read.offset).build(),
            (_, Some(buffer)) => {
                let fd = types::Fd(file.descriptor(read.route).as_raw_fd());
                opcode::ReadFixed::new(fd, address, bytes, buffer).offset(read.offset).build()
            }
            (_, None) => {
                let fd = types::Fd(file.descriptor(read.route).as_raw_fd());
                opcode::Read::new(fd, address, bytes).offset(read.offset).build()
            }
        };
        entry.user_data(read.token.user_data())
    }
}

fn length(read: &Read) -> u32 {
    u32::try_from(read.bytes).expect("a read should cover at most one chunk, and a chunk at most 1 GiB")
}

/// Lets the kernel use as many threads for this thread's rings as there can be reads in flight, so
/// no read waits for another read's server. By default, the kernel uses at most four threads for
/// each CPU.
fn set_kernel_threads(ring: &IoUring, depth: usize) -> Result<(), Errno> {
    let threads = u32::try_from(depth).expect("settings should allow at most 4096 reads");
    // The 0 leaves the limit for files other than regular ones unchanged.
    ring.submitter().register_iowq_max_workers(&mut [threads, 0]).map_err(|error| errno(&error))
}

/// Whether a ring can read through the page cache without making reads wait for each other's
/// servers.
pub(crate) fn can_read_buffered() -> bool {
    set_up(8).and_then(|ring| set_kernel_threads(&ring, 1)).is_ok()
}

/// The combinations of flags to try when setting up a ring, best first.
const WAYS: [fn(&mut io_uring::Builder); 3] = [
    |builder| {
        builder.setup_clamp().setup_single_issuer().setup_defer_taskrun();
    },
    |builder| {
        builder.setup_clamp().setup_coop_taskrun();
    },
    |builder| {
        builder.setup_clamp();
    },
];

/// Sets up a ring in the first of the [`WAYS`] that works. The next one is tried only after
/// EINVAL, which means that the kernel does not know one of the flags.
fn set_up(entries: u32) -> Result<IoUring, Errno> {
    let mut refused = Errno::INVAL;
    // With the first combination of flags, completions are processed only while the thread waits
    // in the kernel, which it does not do under valgrind.
    for way in WAYS.into_iter().skip(usize::from(cfg!(dmaload_valgrind))) {
        match build(way, entries) {
            Ok(ring) => return Ok(ring),
            Err(errno) => refused = errno,
        }
        if refused != Errno::INVAL {
            break;
        }
    }
    Err(refused)
}

fn build(way: fn(&mut io_uring::Builder), entries: u32) -> Result<IoUring, Errno> {
    let mut builder = IoUring::builder();
    way(&mut builder);
    builder.build(entries).map_err(|error| errno(&error))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn libc_iovec(address: *mut u8, bytes: usize) -> libc::iovec {
    libc::iovec { iov_base: address.cast(), iov_len: bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_uncached_reads_are_retried_without_the_flag() {
        let mut uncached = Uncached::default();
        let (one, other) = (7, 8);
        assert_eq!([1, 2].map(|read| uncached.flags(read, one)), [libc::RWF_DONTCACHE; 2]);
        assert_eq!(uncached.flags(3, other), libc::RWF_DONTCACHE);
        // Both reads are retried, even though the first one has already shown that the flag is
        // refused.
        assert_eq!([1, 2].map(|read| uncached.interpret(read, Err(Errno::OPNOTSUPP))), [Err(Errno::AGAIN); 2]);
        assert_eq!(uncached.flags(1, one), 0);
        // For a read without the flag, the refusal is an error like any other.
        assert_eq!(uncached.interpret(1, Err(Errno::OPNOTSUPP)), Err(Errno::OPNOTSUPP));
        assert_eq!((uncached.interpret(3, Ok(5)), uncached.flags(3, other)), (Ok(5), libc::RWF_DONTCACHE));
        assert_eq!(uncached.interpret(3, Err(Errno::IO)), Err(Errno::IO));
        assert!(uncached.in_flight.is_empty());
    }
}
