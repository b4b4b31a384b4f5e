//! What there is once in a process: its loaders, and the gate before the interpreter's end.
//!
//! A forked child has the memory of its parent and none of its threads, and locks may be held by
//! threads that it does not have. So the child gets a state of its own, and whatever belongs to
//! the parent is neither waited for nor dropped there ([`Owned`]).
//!
//! While the interpreter ends, a thread that attaches to it is ended by it (before Python 3.14),
//! which must not happen below frames of Rust's. So each thread that comes back from waiting here
//! passes a gate, which [`before_exit`] closes: those that come later stay detached for good.
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

/// The state of the process that made it.
#[derive(Debug)]
pub(crate) struct Process {
    id: u32,
    /// One for each heap that was asked for, by its name.
    loaders: Mutex<Vec<(String, Loader)>>,
    gate: Mutex<Gate>,
    passed: Condvar,
}

#[derive(Debug, Default)]
struct Gate {
    /// Threads that have passed, and are not attached yet.
    attaching: usize,
    /// The thread that ends the interpreter. It alone attaches from then on.
    exiting: Option<ThreadId>,
}

/// The state of the process that looked last. Never freed.
static CURRENT: AtomicPtr<Process> = AtomicPtr::new(ptr::null_mut());

/// A lock under which nothing can be left half-changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    /// This process' state: after a fork the child makes its own.
    pub(crate) fn current() -> &'static Process {
        let id = std::process::id();
        loop {
            let found = CURRENT.load(Ordering::Acquire);
            // SAFETY: it is null or came from `Box::into_raw` below and is never freed.
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
            // Another thread was first. What was leaked is a hundred bytes, once.
        }
    }

    /// Whether it is this process' state.
    pub(crate) fn is_current(&self) -> bool {
        ptr::eq(self, Process::current())
    }

    /// The loader for this heap, which all loads without a limit of memory share.
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

    /// A thread is about to attach to the interpreter. It waits for ever while that ends.
    fn before_attach(&self) {
        let mut gate = lock(&self.gate);
        while gate.exiting.is_some_and(|thread| thread != thread::current().id()) {
            drop(gate);
            thread::park();
            gate = lock(&self.gate);
        }
        gate.attaching += 1;
    }

    /// It has attached.
    fn after_attach(&self) {
        lock(&self.gate).attaching -= 1;
        self.passed.notify_all();
    }

    /// Lets no other thread attach from now on, and waits for those that are about to.
    fn close(&self) {
        let mut gate = lock(&self.gate);
        gate.exiting = Some(thread::current().id());
        while gate.attaching > 0 {
            gate = self.passed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A loader for this heap.
pub(crate) fn build(builder: LoaderBuilder, heap: &HeapChoice) -> Result<Loader, Failure> {
    let (heap, reason) = heap.open(Pages::Auto)?;
    let builder = reason.into_iter().fold(builder, LoaderBuilder::note);
    Ok(builder.heap(heap).build()?)
}

/// Does work that may wait, detached from the interpreter: other threads of Python's run
/// meanwhile.
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

/// A value of one process. A child that was forked from it can look at it, and leaks it where it
/// would be dropped: its drop may need locks and threads that the child does not have.
#[derive(Debug)]
pub(crate) struct Owned<T> {
    process: &'static Process,
    value: ManuallyDrop<T>,
}

impl<T> Owned<T> {
    pub(crate) fn new(value: T) -> Self {
        Owned { process: Process::current(), value: ManuallyDrop::new(value) }
    }

    /// The value, for what needs the threads that it was made with.
    ///
    /// # Errors
    /// `ForkedError` in a forked child.
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
            // SAFETY: this is the drop of its owner, which does not look at it any more.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}

/// Called by a child that Python has forked, before it runs anything else. Its process id tells
/// that, too, unless it has the same one in a PID namespace of its own.
#[pyfunction]
pub(crate) fn after_fork_in_child() {
    CURRENT.store(ptr::null_mut(), Ordering::Release);
}

/// Called when the interpreter is about to end.
#[pyfunction]
pub(crate) fn before_exit(py: Python<'_>) {
    let process = Process::current();
    py.detach(|| process.close());
}
