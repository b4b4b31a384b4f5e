//! What is done beside the ring thread: reads without io_uring, by `pread(2)`, copies from staging, and looks.
//!
//! The threads start with the first job and end with the pool. They are not joined: one that hangs in a dead disk would
//! take the caller with it. What they write to is owned by the driver, which keeps it until the completion is here.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::io::Errno;

use super::kernel::{Completion, Copy, Look, Read};
use super::wake::Wake;
use crate::source::OpenFile;

/// Enough to keep a device busy with large reads: four threads reached its limit where one reached an eighth.
pub(crate) const READERS: usize = 4;
/// Copying is bound by memory: one thread copies faster than most disks read.
pub(crate) const COPIERS: usize = 2;
/// Each load is looked at by one at a time.
pub(crate) const LOOKERS: usize = 2;

#[derive(Debug)]
enum Job {
    Read(Arc<OpenFile>, Read),
    Copy(Copy),
    Look(Look),
}

// SAFETY: the pointers in it are to memory that the driver keeps until the job's completion is reaped.
unsafe impl Send for Job {}

#[derive(Debug, Default)]
struct Queues {
    jobs: VecDeque<Job>,
    done: Vec<Completion>,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    queues: Mutex<Queues>,
    changed: Condvar,
    wake: Arc<Wake>,
}

impl Shared {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    name: &'static str,
    threads: usize,
    threads_max: usize,
    /// A job was done by the caller, without any thread.
    alone: bool,
}

impl Pool {
    /// A pool of its own for each kind of job: a read that hangs in a dead disk must not keep copies from being done.
    pub(crate) fn new(wake: Arc<Wake>, name: &'static str, threads_max: usize) -> Self {
        Pool {
            shared: Arc::new(Shared { queues: Mutex::default(), changed: Condvar::new(), wake }),
            name,
            threads: 0,
            threads_max,
            alone: false,
        }
    }

    /// Queues a read.
    ///
    /// # Safety
    /// As for [`super::kernel::Kernel::read`].
    pub(crate) unsafe fn read(&mut self, file: Arc<OpenFile>, read: Read) {
        if self.start_threads() {
            self.queue(Job::Read(file, read));
        } else {
            self.shared.queues().done.push(Completion { token: read.token, result: Err(Errno::NOMEM) });
            self.shared.wake.wake();
        }
    }

    /// Queues a copy; without any thread to be had it is done here and now.
    ///
    /// # Safety
    /// As for [`super::kernel::Kernel::copy`].
    pub(crate) unsafe fn copy(&mut self, copy: Copy) {
        self.queue_or_do(Job::Copy(copy));
    }

    /// Queues a look; without any thread to be had it is done here and now.
    ///
    /// # Safety
    /// As for [`super::kernel::Kernel::look`].
    pub(crate) unsafe fn look(&mut self, look: Look) {
        self.queue_or_do(Job::Look(look));
    }

    fn queue_or_do(&mut self, job: Job) {
        if self.start_threads() {
            self.queue(job);
        } else {
            self.alone = true;
            let completion = do_job(job);
            self.shared.queues().done.push(completion);
            self.shared.wake.wake();
        }
    }

    fn queue(&self, job: Job) {
        self.shared.queues().jobs.push_back(job);
        self.shared.changed.notify_one();
    }

    /// Whether there is any thread.
    fn start_threads(&mut self) -> bool {
        while self.threads < self.threads_max {
            let shared = Arc::clone(&self.shared);
            let name = format!("dmaload-{}-{}", self.name, self.threads);
            if thread::Builder::new().name(name).spawn(move || run(&shared)).is_err() {
                break;
            }
            self.threads += 1;
        }
        self.threads > 0
    }

    /// Whether a copy or a look was done by the caller, since there was no thread.
    pub(crate) fn is_alone(&self) -> bool {
        self.alone
    }

    /// Takes the completions that have come.
    pub(crate) fn reap(&self, into: &mut Vec<Completion>) {
        into.append(&mut self.shared.queues().done);
    }

    pub(crate) fn has_completions(&self) -> bool {
        !self.shared.queues().done.is_empty()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.queues().closed = true;
        self.shared.changed.notify_all();
    }
}

fn run(shared: &Shared) {
    let mut queues = shared.queues();
    while !queues.closed {
        let Some(job) = queues.jobs.pop_front() else {
            queues = shared.changed.wait(queues).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(queues);
        let completion = do_job(job);
        queues = shared.queues();
        queues.done.push(completion);
        shared.wake.wake();
    }
}

fn do_job(job: Job) -> Completion {
    match job {
        // The file is let go before the driver hears of it: it may be the last to hold it.
        Job::Read(file, read) => pread(&file, &read),
        Job::Copy(copy) => perform(copy),
        Job::Look(look) => show(&look),
    }
}

fn pread(file: &OpenFile, read: &Read) -> Completion {
    // SAFETY: the driver keeps this memory until the completion is reaped, lets nobody else look at it or write
    // to it meanwhile, and MaybeUninit<u8> has no invalid bytes.
    let buffer = unsafe { std::slice::from_raw_parts_mut(read.address.cast::<MaybeUninit<u8>>().as_ptr(), read.bytes) };
    let result = rustix::io::pread(file.descriptor(read.route), buffer, read.offset).map(|(read, _)| read.len());
    Completion { token: read.token, result }
}

fn perform(copy: Copy) -> Completion {
    let Copy { token, from, to, bytes } = copy;
    // SAFETY: the driver has promised both places for that many bytes until this copy's completion is reaped, that they
    // don't overlap, and that nobody else writes to the first or looks at the second.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), bytes) };
    Completion { token, result: Ok(bytes) }
}

fn show(look: &Look) -> Completion {
    // SAFETY: the driver has promised that so many bytes are mapped, initialised and written to by nobody until this look's
    // completion is reaped.
    let bytes = unsafe { std::slice::from_raw_parts(look.address.as_ptr(), look.bytes) };
    Completion { token: look.token, result: look.watch.look(look.file, look.offset, bytes).map(|()| look.bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::slots::Slots;
    use std::ptr::NonNull;

    #[test]
    fn a_copy_without_any_thread_is_done_at_once_and_known_to_have_been() {
        let token = Slots::new().insert(());
        for threads_max in [0, 1] {
            let wake = Arc::new(Wake::new().unwrap());
            let mut pool = Pool::new(Arc::clone(&wake), "test", threads_max);
            let (mut from, mut to) = ([7_u8; 64], [0_u8; 64]);
            let copy = Copy { token, from: NonNull::from(&mut from).cast(), to: NonNull::from(&mut to).cast(), bytes: 64 };
            // SAFETY: both arrays stay, and are left alone, until the completion below.
            unsafe { pool.copy(copy) };
            let mut done = Vec::new();
            while done.is_empty() {
                wake.wait();
                pool.reap(&mut done);
            }
            assert_eq!((done.len(), to), (1, [7; 64]));
            assert_eq!(pool.is_alone(), threads_max == 0);
        }
    }
}
