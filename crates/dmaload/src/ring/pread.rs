//! Reads without io_uring: a few threads that call `pread(2)`.
//!
//! The threads start with the first read and end with the pool. They are not joined: one that hangs in a dead disk would
//! take the caller with it. What they read into is owned by the driver, which keeps it until the completion is here.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::io::Errno;

use super::kernel::{Completion, Read};
use super::wake::Wake;
use crate::source::OpenFile;

/// Enough to keep a device busy with large reads; four threads reached its limit where one reached an eighth.
const THREADS: usize = 4;

#[derive(Debug)]
struct Job {
    file: Arc<OpenFile>,
    read: Read,
}

// SAFETY: the pointer in the read is to memory that the driver keeps until this read's completion is reaped.
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
pub(crate) struct PreadPool {
    shared: Arc<Shared>,
    threads: usize,
}

impl PreadPool {
    pub(crate) fn new(wake: Arc<Wake>) -> Self {
        PreadPool { shared: Arc::new(Shared { queues: Mutex::default(), changed: Condvar::new(), wake }), threads: 0 }
    }

    /// Queues a read.
    ///
    /// # Safety
    /// As for [`super::kernel::Kernel::read`].
    pub(crate) unsafe fn read(&mut self, file: Arc<OpenFile>, read: Read) {
        while self.threads < THREADS {
            let shared = Arc::clone(&self.shared);
            let name = format!("dmaload-read-{}", self.threads);
            if thread::Builder::new().name(name).spawn(move || run(&shared)).is_err() {
                break;
            }
            self.threads += 1;
        }
        let mut queues = self.shared.queues();
        if self.threads == 0 {
            queues.done.push(Completion { token: read.token, result: Err(Errno::NOMEM) });
            self.shared.wake.wake();
        } else {
            queues.jobs.push_back(Job { file, read });
            self.shared.changed.notify_one();
        }
    }

    /// Takes the completions that have come.
    pub(crate) fn reap(&self, into: &mut Vec<Completion>) {
        into.append(&mut self.shared.queues().done);
    }

    pub(crate) fn has_completions(&self) -> bool {
        !self.shared.queues().done.is_empty()
    }
}

impl Drop for PreadPool {
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
        // SAFETY: the driver keeps this memory until the completion is reaped, lets nobody else look at it or write
        // to it meanwhile, and MaybeUninit<u8> has no invalid bytes.
        let buffer =
            unsafe { std::slice::from_raw_parts_mut(job.read.address.cast::<MaybeUninit<u8>>().as_ptr(), job.read.bytes) };
        let file = job.file.descriptor(job.read.route);
        let result = rustix::io::pread(file, buffer, job.read.offset).map(|(read, _)| read.len());
        let token = job.read.token;
        // The file is let go before the driver hears of it: it may be the last to hold it.
        drop(job);
        queues = shared.queues();
        queues.done.push(Completion { token, result });
        shared.wake.wake();
    }
}
