//! The state of a process: its loaders, and the gate that closes when the interpreter exits.
//!
//! A forked child has its parent's memory but only one thread, and locks may be held by threads
//! that do not exist in the child. Therefore the child gets its own state, and neither waits for
//! nor drops its parent's objects ([`Owned`]).
//!
//! Before Python 3.14, an exiting interpreter terminates the threads that attach to it. This must
//! not happen to a thread that has Rust frames on its stack. Therefore each thread passes a gate
//! before it attaches again after waiting. [`before_exit`] closes the gate. Threads that arrive
//! later stay detached forever.
#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use dmaload::heap::{HeapChoice, Pages};
use dmaload::{Loader, LoaderBuilder};
use pyo3::prelude::*;

use crate::errors::Failure;

/// The state of one process. A forked child gets a new state.
#[derive(Debug)]
pub(crate) struct Process {
    id: u32,
    /// A loader for each heap that has been used so far, with the heap's name.
    loaders: Mutex<Vec<(String, Loader)>>,
    gate: Mutex<Gate>,
    passed: Condvar,
}

#[derive(Debug, Default)]
struct Gate {
    /// Number of threads that have passed the gate and are not attached yet.
    attaching: usize,
    /// The thread in which the interpreter exits. Only this thread may attach from then on.
    exiting: Option<ThreadId>,
}

/// The state of the process that last called [`Process::current`]. Never freed.
static CURRENT: AtomicPtr<Process> = AtomicPtr::new(ptr::null_mut());

/// Locks a mutex, ignoring poisoning: no critical section leaves its data inconsistent.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    /// Returns the state of this process. After a fork, the child creates its own.
    pub(crate) fn current() -> &'static Process {
        let id = std::process::id();
        loop {
            let found = CURRENT.load(Ordering::Acquire);
            // SAFETY: `found` is null, or was leaked from a `Box` below and is never freed.
            if let Some(process) = unsafe { found.as_ref() }
                && process.id == id
            {
                return process;
            }
            let gate = Mutex::default();
            let new = Process { id, loaders: Mutex::default(), gate, passed: Condvar::new() };
            let new = Box::leak(Box::new(new));
            if CURRENT.compare_exchange(found, new, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return new;
            }
            // Another thread was faster. The unused state, about a hundred bytes, is leaked.
        }
    }

    /// Returns whether this state belongs to the current process.
    pub(crate) fn is_current(&self) -> bool {
        ptr::eq(self, Process::current())
    }

    /// Returns the loader for this heap, which all loads without a memory limit share.
    pub(crate) fn loader(&self, heap: &HeapChoice) -> Result<Loader, Failure> {
        let name = heap.to_string();
        let mut loaders = lock(&self.loaders);
        if let Some((_, loader)) = loaders.iter().find(|(known, _)| *known == name) {
            return Ok(loader.clone());
        }
        let loader = build(Loader::builder(), heap)?;
        loaders.push((name, loader.clone()));
        Ok(loader)
    }

    /// Must be called before a thread attaches to the interpreter. Blocks forever if the
    /// interpreter is exiting in another thread.
    fn before_attach(&self) {
        let mut gate = lock(&self.gate);
        while gate.exiting.is_some_and(|thread| thread != thread::current().id()) {
            drop(gate);
            thread::park();
            gate = lock(&self.gate);
        }
        gate.attaching += 1;
    }

    /// Must be called after a thread has attached to the interpreter.
    fn after_attach(&self) {
        lock(&self.gate).attaching -= 1;
        self.passed.notify_all();
    }

    /// Keeps other threads from attaching, and waits until those that have already passed the gate
    /// are attached.
    fn close(&self) {
        let mut gate = lock(&self.gate);
        gate.exiting = Some(thread::current().id());
        while gate.attaching > 0 {
            gate = self.passed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Builds a loader for this heap.
pub(crate) fn build(builder: LoaderBuilder, heap: &HeapChoice) -> Result<Loader, Failure> {
    let (heap, reason) = heap.open(Pages::Auto)?;
    let builder = reason.into_iter().fold(builder, LoaderBuilder::note);
    Ok(builder.heap(heap).build()?)
}

/// Runs work that may block, detached from the interpreter, so other Python threads can run.
pub(crate) fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    let process = Process::current();
    let result = py.detach(|| {
        let result = catch_unwind(AssertUnwindSafe(work));
        process.before_attach();
        result
    });
    process.after_attach();
    result.unwrap_or_else(|payload| resume_unwind(payload))
}

/// A value that belongs to one process. A forked child can read it, but leaks it instead of
/// dropping it: dropping may require threads that do not exist in the child, or locks that these
/// threads held at the time of the fork.
#[derive(Debug)]
pub(crate) struct Owned<T> {
    process: &'static Process,
    value: ManuallyDrop<T>,
}

impl<T> Owned<T> {
    pub(crate) fn new(value: T) -> Self {
        Owned { process: Process::current(), value: ManuallyDrop::new(value) }
    }

    /// Returns the value, for operations that need the threads of the process that created it.
    ///
    /// # Errors
    /// Returns `ForkedError` in a forked child.
    pub(crate) fn in_its_process(&self, what: &str) -> Result<&T, Failure> {
        if self.process.is_current() {
            return Ok(&self.value);
        }
        let message = format!(
            "{what} belongs to process {}, which this process was forked from: load again in this process",
            self.process.id
        );
        Err(Failure::new("ForkedError", message))
    }
}

impl<T> Deref for Owned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if self.process.is_current() {
            // SAFETY: the owner is being dropped, so `value` is not used again.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}

/// Resets the state in a child that Python has forked, before the child runs other code.
/// [`Process::current`] also compares process ids, but that is not enough: a child in another PID
/// namespace can have its parent's id.
#[pyfunction]
pub(crate) fn after_fork_in_child() {
    CURRENT.store(ptr::null_mut(), Ordering::Release);
}

/// Closes the gate before the interpreter exits.
#[pyfunction]
pub(crate) fn before_exit(py: Python<'_>) {
    let process = Process::current();
    py.detach(|| process.close());
}
