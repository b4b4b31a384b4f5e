//! Waiting for the library's futures: on a thread that sleeps, or in an event loop.
//!
//! The library wakes tasks on a thread of its own, which must not wait for the interpreter. So a
//! waker here unparks a thread, or notes a number and writes to an eventfd that an event loop
//! watches ([`Hub`]); neither needs the interpreter.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::thread::{self, Thread};
use std::time::Instant;

use pyo3::prelude::*;
use rustix::event::{EventfdFlags, eventfd};

use crate::errors::{Failure, guarded};
use crate::process::lock;

/// Wakes a thread that waits in [`Parked::sleep_until`].
#[derive(Debug)]
pub(crate) struct Parked {
    thread: Thread,
    is_woken: AtomicBool,
}

impl Parked {
    /// For this thread.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Parked { thread: thread::current(), is_woken: AtomicBool::new(false) })
    }

    /// Sleeps until it is woken; `false` when the deadline passes before.
    pub(crate) fn sleep_until(&self, deadline: Instant) -> bool {
        while !self.is_woken.swap(false, Ordering::Acquire) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            thread::park_timeout(left);
        }
        true
    }
}

impl Wake for Parked {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// What an event loop watches: a descriptor that becomes readable when something that it waits for
/// was woken, and the numbers of these.
#[pyclass(frozen, module = "dmaload._native")]
#[derive(Debug)]
pub(crate) struct Hub(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    event: OwnedFd,
    woken: Mutex<Vec<u64>>,
}

impl Hub {
    /// Wakes the event loop for this number.
    pub(crate) fn waker(&self, key: u64) -> Waker {
        Waker::from(Arc::new(HubWaker { hub: Arc::clone(&self.0), key }))
    }
}

#[pymethods]
impl Hub {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        guarded(py, || {
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            let event = eventfd(0, flags).map_err(|errno| {
                let failure = Failure::new("IoError", format!("cannot create an eventfd: {errno}"));
                failure.about(errno.raw_os_error(), "")
            })?;
            Ok(Hub(Arc::new(Shared { event, woken: Mutex::default() })))
        })
    }

    /// The descriptor to watch for reading.
    fn fileno(&self) -> i32 {
        self.0.event.as_raw_fd()
    }

    /// The numbers that were woken since the last call. The descriptor is not readable any more.
    fn drain(&self) -> Vec<u64> {
        // Before the list is taken: what comes later makes it readable again.
        let _ = rustix::io::read(&self.0.event, &mut [0_u8; 8]);
        std::mem::take(&mut lock(&self.0.woken))
    }
}

struct HubWaker {
    hub: Arc<Shared>,
    key: u64,
}

impl Wake for HubWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        lock(&self.hub.woken).push(self.key);
        // It fails only when the counter is full, and then the descriptor is readable.
        let _ = rustix::io::write(&self.hub.event, &1_u64.to_ne_bytes());
    }
}
