//! Threads for work that must not block the ring thread: reads by `pread(2)`, copies from staging
//! and from the page cache, requests to populate memory, and observations.
//!
//! Threads start on demand and exit after the pool is dropped. They are not joined, because
//! joining a thread that waits for a dead disk would make the caller hang, too. The driver owns
//! the memory that they use, and keeps it until the completion arrives.
#![allow(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::mem::MaybeUninit;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use rustix::io::Errno;

use super::kernel::{CachedRead, Completion, ObserveRequest, PopulateRequest, Read, StagedCopy};
use super::wake::Wake;
use crate::files::source::OpenFile;
use crate::memory::buffer::{Fault, Place};
use crate::memory::window::Holders;
use crate::ring::pace::{FIRST, FIRST_READERS, MOST_READERS, Pace, cores, most_copiers};
use crate::route::Route;
use crate::support::foreign;
use crate::support::id::LoadId;

/// Maximum number of threads that read for all loads. At most [`MOST_READERS`] of them read for
/// one load. A single file system gets at most three quarters of them.
pub(crate) const READERS: usize = 2 * MOST_READERS;
/// When this many file systems have a pace and a read from another one is queued, the paces of
/// idle file systems are forgotten. This limits the size of the table of paces.
const MOUNTS: usize = 64;
/// Maximum number of threads that run observers. Since each load is observed by one thread at a
/// time, this is also how many loads can be observed at the same time.
pub(crate) const OBSERVERS: usize = 2;

/// Maximum number of other jobs that are started before the first queued request to populate
/// memory: a few times as many as a load has copies in flight.
const PASSED_OVER_MAX: usize = 16;

#[derive(Debug)]
enum PoolJob {
    Read(Arc<OpenFile>, Read),
    Copy(StagedCopy),
    Populate(PopulateRequest),
    Cached(Arc<OpenFile>, CachedRead),
    Observe(ObserveRequest),
}

// SAFETY: the only fields of a job that are not `Send` are pointers to plain bytes, which any
// thread may access. By the contracts of `Kernel`, these stay valid until the job's completion is
// reaped, and until then no other thread accesses them in a way that conflicts with the job.
unsafe impl Send for PoolJob {}

#[derive(Debug)]
struct Queues {
    jobs: VecDeque<PoolJob>,
    /// How many other jobs were started ahead of the first queued request to populate memory.
    passed_over: usize,
    /// How many threads are reading for each load and from each file system.
    reading: Holders<LoadId>,
    /// How many threads may read from a file system for one load, by the file system's number.
    paces: HashMap<u64, Pace>,
    /// The moment from which the times in `paces` are measured.
    since: Instant,
    done: Vec<Completion>,
    /// How many threads are waiting for a job.
    idle: usize,
    /// How many threads have a job.
    busy: usize,
    /// Maximum number of threads that may have a job.
    busy_max: usize,
    /// The name of a thread that panicked, and the panic's message.
    broken: Option<String>,
    closed: bool,
}

impl Queues {
    fn new(busy_max: usize) -> Self {
        Queues {
            jobs: VecDeque::new(),
            passed_over: 0,
            reading: Holders::new(),
            paces: HashMap::new(),
            since: Instant::now(),
            done: Vec::new(),
            idle: 0,
            busy: 0,
            busy_max,
            broken: None,
            closed: false,
        }
    }

    /// Takes the first job that may start now, in a pool of up to `threads` threads. Reads are
    /// passed over if their load or file system already has its share of the threads.
    fn take(&mut self, threads: usize) -> Option<PoolJob> {
        if self.busy >= self.busy_max {
            return None;
        }
        let may_start = |job: &PoolJob| match job {
            PoolJob::Read(file, read) => self.may_read(&self.reading, file, read, threads),
            PoolJob::Copy(_) | PoolJob::Populate(_) | PoolJob::Cached(..) | PoolJob::Observe(_) => true,
        };
        // Copies free staging, so they start before requests to populate memory. But a request
        // must not wait for long: its piece can't be finished until the request has completed, and
        // the copy that would make the request unnecessary never starts if the read fails.
        let request = self.jobs.iter().position(|job| matches!(job, PoolJob::Populate(_)));
        let other = self.jobs.iter().position(|job| !matches!(job, PoolJob::Populate(_)) && may_start(job));
        let at = if request.is_some() && other.is_some() && self.passed_over < PASSED_OVER_MAX {
            self.passed_over += 1;
            other
        } else {
            self.passed_over = 0;
            request.or(other)
        };
        let job = at.and_then(|at| self.jobs.remove(at));
        if let Some(PoolJob::Read(file, read)) = &job {
            self.reading.take(&read.load, file.identity.mount(), 1);
        }
        self.busy += usize::from(job.is_some());
        job
    }

    /// Whether one more of the pool's `threads` threads may read for this load. `reading` counts
    /// the threads that are reading already.
    fn may_read(&self, reading: &Holders<LoadId>, file: &OpenFile, read: &Read, threads: usize) -> bool {
        let file_system = file.identity.mount();
        let held = reading.held_by(&read.load, file_system).by_load;
        held < self.readers_of_one(file) as u64 && reading.may_have_one(threads as u64, &read.load, file_system)
    }

    /// How many threads may read for one load from the file system of this file.
    fn readers_of_one(&self, file: &OpenFile) -> usize {
        self.paces.get(&file.identity.mount()).map_or(FIRST_READERS, Pace::threads)
    }

    /// Whether the reads that may start now, including this one, outnumber the idle threads.
    fn lacks_a_thread(&self, file: &OpenFile, read: &Read) -> bool {
        let queued =
            self.jobs.iter().filter_map(|job| if let PoolJob::Read(file, read) = job { Some((&**file, read)) } else { None });
        let mut reading = self.reading.clone();
        for (file, read) in queued.chain([(file, read)]) {
            if self.may_read(&reading, file, read, self.busy_max) {
                reading.take(&read.load, file.identity.mount(), 1);
            }
        }
        reading.taken() - self.reading.taken() > self.idle as u64
    }

    fn push(&mut self, job: PoolJob) {
        if let PoolJob::Read(file, _) = &job {
            let mount = file.identity.mount();
            if self.paces.len() >= MOUNTS && !self.paces.contains_key(&mount) {
                self.paces.retain(|_, pace| !pace.is_idle());
            }
            let now = self.since.elapsed();
            self.paces.entry(mount).or_insert_with(|| pace_for(file)).begin(now);
        }
        self.jobs.push_back(job);
    }

    /// Completes the queued requests to populate this place, because the copy that is about to be
    /// queued populates the place anyway.
    fn withdraw_populating(&mut self, place: &Place) {
        let is_same = |job: &PoolJob| {
            matches!(job, PoolJob::Populate(PopulateRequest { place: other, .. })
                if other.offset == place.offset && Arc::ptr_eq(&other.sink, &place.sink))
        };
        while let Some(PoolJob::Populate(request)) = self.jobs.iter().position(is_same).and_then(|at| self.jobs.remove(at)) {
            self.done.push(Completion { token: request.token, result: Ok(0) });
        }
    }

    /// Completes the queued reads of this load with an error. Returns whether any were queued.
    fn cancel(&mut self, load: LoadId) -> bool {
        let is_own = |job: &PoolJob| matches!(job, PoolJob::Read(_, read) if read.load == load);
        let (own, others): (VecDeque<_>, _) = std::mem::take(&mut self.jobs).into_iter().partition(is_own);
        self.jobs = others;
        for job in &own {
            if let PoolJob::Read(file, read) = job {
                let now = self.since.elapsed();
                let pace = self.paces.get_mut(&file.identity.mount());
                let pace = pace.expect("a file system should have a pace while reads from it are queued or running");
                pace.withdraw(now);
                if pace.is_idle() {
                    pace.pause();
                }
                self.done.push(Completion { token: read.token, result: Err(Fault::Read(Errno::CANCELED)) });
            }
        }
        // The driver keeps references to these files until it has seen the completions, so
        // dropping the jobs closes none of the files.
        !own.is_empty()
    }

    /// Records that a read for this load is done. Returns whether the number of threads that may
    /// read has changed.
    fn finish_read(&mut self, load: LoadId, mount: u64, bytes: usize) -> bool {
        self.reading.give_back(&load, mount, 1);
        self.end_read(mount, bytes)
    }

    /// Updates the pace of a file system after a read. Returns whether the number of threads that
    /// may read from it has changed.
    fn end_read(&mut self, mount: u64, bytes: usize) -> bool {
        let now = self.since.elapsed();
        let pace =
            self.paces.get_mut(&mount).expect("a file system should have a pace while reads from it are queued or running");
        let changed = pace.end(now, bytes as u64);
        if pace.is_idle() {
            pace.pause();
        }
        changed
    }
}

/// Returns the initial pace of threads that read from this file's file system. Reads of files in
/// memory keep the processor busy, so they need no more threads than copies do.
fn pace_for(file: &OpenFile) -> Pace {
    if file.in_memory { Pace::new(FIRST, most_copiers(cores())) } else { Pace::for_readers() }
}

#[derive(Debug)]
struct PoolShared {
    queues: Mutex<Queues>,
    changed: Condvar,
    wake: Arc<Wake>,
}

impl PoolShared {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct ThreadPool {
    shared: Arc<PoolShared>,
    name: &'static str,
    threads: usize,
    threads_max: usize,
    /// Whether the calling thread did or refused a copy because no other thread could be started.
    copied_inline: bool,
}

impl ThreadPool {
    /// Creates a pool. Reads, copies and observations have separate pools, because copies must not
    /// be held up by reads that wait for a dead disk, or by observers, which are the caller's
    /// code.
    pub(crate) fn new(wake: Arc<Wake>, name: &'static str, threads_max: usize) -> Self {
        ThreadPool {
            shared: Arc::new(PoolShared { queues: Mutex::new(Queues::new(threads_max)), changed: Condvar::new(), wake }),
            name,
            threads: 0,
            threads_max,
            copied_inline: false,
        }
    }

    /// Queues a read. If the pool has no thread and can't start one, the read fails with ENOMEM.
    ///
    /// # Safety
    /// As for [`super::kernel::Kernel::read`].
    pub(crate) unsafe fn read(&mut self, file: Arc<OpenFile>, read: Read) {
        let lacks_a_thread = self.shared.queues().lacks_a_thread(&file, &read);
        if self.start_thread(lacks_a_thread) {
            self.queue(PoolJob::Read(file, read));
        } else {
            self.shared.queues().done.push(Completion { token: read.token, result: Err(Fault::Read(Errno::NOMEM)) });
            self.shared.wake.wake();
        }
    }

    /// Cancels the queued reads of this load, because they might be waiting for threads whose own
    /// reads never complete.
    pub(crate) fn cancel(&self, load: LoadId) {
        if self.shared.queues().cancel(load) {
            self.shared.wake.wake();
        }
    }

    /// Queues a copy. If the pool has no thread and can't start one, copies immediately on the
    /// calling thread. If that would run a heap's code, which the calling thread must not do, the
    /// copy fails.
    ///
    /// # Safety
    /// As for [`super::kernel::Kernel::copy`].
    pub(crate) unsafe fn copy(&mut self, copy: StagedCopy) {
        self.shared.queues().withdraw_populating(&copy.to);
        if self.start_thread_for_any() {
            self.queue(PoolJob::Copy(copy));
        } else {
            self.copied_inline = true;
            let completion = if copy.to.sink.runs_foreign_code() {
                Completion { token: copy.token, result: Err(Fault::Memory(Errno::AGAIN)) }
            } else {
                copy_staged(&copy)
            };
            self.shared.queues().done.push(completion);
            self.shared.wake.wake();
        }
    }

    /// Queues a request to populate memory. If the pool has no thread and can't start one,
    /// completes the request without populating anything. The copy to the same place then reports
    /// the missing thread.
    pub(crate) fn populate(&mut self, request: PopulateRequest) {
        if self.start_thread_for_any() {
            self.queue(PoolJob::Populate(request));
        } else {
            self.shared.queues().done.push(Completion { token: request.token, result: Ok(0) });
            self.shared.wake.wake();
        }
    }

    /// Queues a copy from the page cache. If the pool has no thread and can't start one, nothing
    /// is copied, and the copy completes with EAGAIN.
    ///
    /// # Safety
    /// As for [`super::kernel::Kernel::read_cached`].
    pub(crate) unsafe fn read_cached(&mut self, file: Arc<OpenFile>, read: CachedRead) {
        if self.start_thread_for_any() {
            self.queue(PoolJob::Cached(file, read));
        } else {
            self.shared.queues().done.push(Completion { token: read.token, result: Err(Fault::Read(Errno::AGAIN)) });
            self.shared.wake.wake();
        }
    }

    /// Queues an observation. If the pool has no thread and can't start one, the bytes are
    /// rejected: the calling thread must not run observers, which are the caller's code.
    ///
    /// # Safety
    /// As for [`super::kernel::Kernel::observe`].
    pub(crate) unsafe fn observe(&mut self, request: ObserveRequest) {
        if self.start_thread_for_any() {
            self.queue(PoolJob::Observe(request));
        } else {
            let completion = Completion { token: request.token, result: Err(request.watch.reject_unobserved().into()) };
            self.shared.queues().done.push(completion);
            self.shared.wake.wake();
        }
    }

    /// Sets how many threads may have a job at the same time. More threads are started when there
    /// are jobs for them. Surplus threads wait.
    pub(crate) fn set_max_threads(&mut self, threads: usize) {
        self.threads_max = threads;
        self.shared.queues().busy_max = threads;
        // Threads that had to wait may take a job now.
        self.shared.changed.notify_all();
    }

    fn queue(&self, job: PoolJob) {
        self.shared.queues().push(job);
        self.shared.changed.notify_one();
    }

    /// Starts a thread for one more job, unless enough threads are idle. Used for all jobs except
    /// reads, because any idle thread may take them. Returns whether the pool has any threads.
    fn start_thread_for_any(&mut self) -> bool {
        let lacks_a_thread = {
            let queues = self.shared.queues();
            queues.idle <= queues.jobs.len()
        };
        self.start_thread(lacks_a_thread)
    }

    /// Starts a thread if one is needed and allowed. Returns whether the pool has any threads.
    fn start_thread(&mut self, lacks_one: bool) -> bool {
        let (shared, threads) = (Arc::clone(&self.shared), self.threads_max);
        let name = format!("dmaload-{}-{}", self.name, self.threads);
        let may = (lacks_one || self.threads == 0) && self.threads < threads;
        if may && thread::Builder::new().name(name).spawn(move || run(&shared, threads)).is_ok() {
            self.threads += 1;
        }
        self.threads > 0
    }

    /// Whether the calling thread did or refused a copy because no other thread could be started.
    pub(crate) fn lacks_threads(&self) -> bool {
        self.copied_inline
    }

    /// How many threads have a job.
    pub(crate) fn busy(&self) -> usize {
        self.shared.queues().busy
    }

    /// Takes the completions that are available.
    ///
    /// # Panics
    /// If a thread of the pool has panicked: its job never completes, so waiting for the job would
    /// hang.
    pub(crate) fn reap(&self, into: &mut Vec<Completion>) {
        let mut queues = self.shared.queues();
        if let Some(panic) = queues.broken.take() {
            drop(queues);
            panic!("{panic}");
        }
        into.append(&mut queues.done);
    }

    pub(crate) fn has_completions(&self) -> bool {
        let queues = self.shared.queues();
        !queues.done.is_empty() || queues.broken.is_some()
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.queues().closed = true;
        self.shared.changed.notify_all();
    }
}

fn run(shared: &PoolShared, threads: usize) {
    let mut queues = shared.queues();
    while !queues.closed {
        let Some(job) = queues.take(threads) else {
            queues.idle += 1;
            queues = shared.changed.wait(queues).unwrap_or_else(PoisonError::into_inner);
            queues.idle -= 1;
            continue;
        };
        drop(queues);
        let read_for = if let PoolJob::Read(file, read) = &job { Some((read.load, file.identity.mount())) } else { None };
        let completion = foreign::call(|| do_job(job));
        queues = shared.queues();
        queues.busy -= 1;
        if let Some((load, mount)) = read_for {
            let bytes = completion.as_ref().map_or(0, |completion| completion.result.unwrap_or(0));
            if queues.finish_read(load, mount, bytes) {
                shared.changed.notify_all();
            } else {
                // Several queued reads may have been waiting for this one to end, and this thread
                // takes only one of them.
                shared.changed.notify_one();
            }
        }
        match completion {
            Ok(completion) => queues.done.push(completion),
            // Panics in the caller's code are caught at the call, so this is a bug in the library.
            // The ring thread panics as well, which fails all loads.
            Err(message) => {
                let thread = thread::current();
                queues.broken = Some(format!("{}: {message}", thread.name().unwrap_or("a thread")));
            }
        }
        shared.wake.wake();
    }
}

fn do_job(job: PoolJob) -> Completion {
    match job {
        // `file` is dropped before the driver sees the completion and releases its own reference.
        // This is therefore never the last reference to the file, so dropping it does not close
        // the file, which could block.
        PoolJob::Read(file, read) => pread(&file, &read),
        PoolJob::Copy(copy) => copy_staged(&copy),
        PoolJob::Populate(PopulateRequest { token, place, bytes }) => {
            Completion { token, result: place.sink.populate(place.offset, bytes).map(|()| 0) }
        }
        PoolJob::Cached(file, read) => read_cached(&file, &read),
        PoolJob::Observe(request) => run_observers(&request),
    }
}

fn pread(file: &OpenFile, read: &Read) -> Completion {
    if read.route == Route::Buffered {
        // If this fails, the bytes are read anyway, but some changes to them may go unnoticed.
        let _ = file.settle(&(read.offset..read.offset + read.bytes as u64));
    }
    let pread = |buffer: &mut [MaybeUninit<u8>], offset| {
        rustix::io::pread(file.descriptor(read.route), buffer, offset).map(|(read, _)| read.len())
    };
    let result = match &read.place {
        None => {
            let start = read.address.cast::<MaybeUninit<u8>>().as_ptr();
            // SAFETY: the driver keeps this memory until the completion is reaped and lets nothing
            // else read or write it, and MaybeUninit<u8> has no invalid bytes.
            pread(unsafe { std::slice::from_raw_parts_mut(start, read.bytes) }, read.offset).map_err(Fault::Read)
        }
        Some(Place { sink, offset }) => {
            let mut at = read.offset;
            let mut next = |part: &mut [MaybeUninit<u8>]| {
                let bytes = pread(part, at)?;
                at += bytes as u64;
                Ok(bytes)
            };
            // SAFETY: the place comes from the piece's memory. The driver has checked that it has
            // room for the read, and lets nothing else access it until the completion is reaped.
            unsafe { sink.fill_with(*offset, read.bytes, &mut next) }
        }
    };
    Completion { token: read.token, result }
}

fn copy_staged(copy: &StagedCopy) -> Completion {
    // SAFETY: the driver guarantees that `copy.bytes` initialized bytes stay mapped at
    // `copy.from`, and are not written to, until this copy's completion is reaped.
    let mut left = unsafe { std::slice::from_raw_parts(copy.from.as_ptr(), copy.bytes) };
    let mut next = |part: &mut [MaybeUninit<u8>]| {
        let (now, later) = left.split_at(part.len());
        // This uses ordinary stores. Non-temporal stores were no faster, on small pages or on huge
        // ones.
        part.write_copy_of_slice(now);
        left = later;
        Ok(part.len())
    };
    // SAFETY: the place comes from the piece's memory. The driver has checked that it has room for
    // the copy, and lets nothing else access it until the completion is reaped.
    let result = unsafe { copy.to.sink.fill_with(copy.to.offset, copy.bytes, &mut next) };
    Completion { token: copy.token, result }
}

fn read_cached(file: &OpenFile, read: &CachedRead) -> Completion {
    let mut at = read.offset;
    let mut next = |part: &mut [MaybeUninit<u8>]| {
        let bytes = file.read_cached(part, at)?;
        at += bytes as u64;
        Ok(bytes)
    };
    // SAFETY: the place comes from the piece's memory. The driver has checked that it has room for
    // the copy, and lets nothing else access it until the completion is reaped.
    let result = unsafe { read.to.sink.fill_with(read.to.offset, read.bytes, &mut next) };
    Completion { token: read.token, result }
}

fn run_observers(request: &ObserveRequest) -> Completion {
    // SAFETY: the driver guarantees that `request.bytes` initialized bytes stay mapped at
    // `request.address`, and are not written to, until this observation's completion is reaped.
    let bytes = unsafe { std::slice::from_raw_parts(request.address.as_ptr(), request.bytes) };
    Completion {
        token: request.token,
        result: request.watch.observe(request.file, request.offset, bytes).map(|()| request.bytes).map_err(Fault::Read),
    }
}

#[cfg(test)]
mod tests;
