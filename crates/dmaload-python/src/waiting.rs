//! Waits for the library's futures, on a blocked thread or in an event loop.
//!
//! The library wakes tasks on its own thread, which must not wait for the interpreter. Therefore a
//! waker either unparks a thread, or records a key and writes to an eventfd that an event loop
//! watches ([`Hub`]). Neither needs the interpreter.

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

/// Wakes a thread that is blocked in [`Parked::sleep_until`].
#[derive(Debug)]
pub(crate) struct Parked {
    thread: Thread,
    is_woken: AtomicBool,
}

impl Parked {
    /// Creates a waker for the calling thread.
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Parked { thread: thread::current(), is_woken: AtomicBool::new(false) })
    }

    /// Blocks until woken. Returns `false` if the deadline passes first.
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

/// Wakes tasks in an event loop. A descriptor becomes readable when a future is woken, and
/// [`Hub::drain`] returns the keys of the woken futures.
#[pyclass(frozen, module = "dmaload._native")]
#[derive(Debug)]
pub(crate) struct Hub(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    event: OwnedFd,
    woken: Mutex<Vec<u64>>,
}

impl Hub {
    /// Creates a waker that reports this key to the event loop.
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

    /// Returns the keys of the futures that were woken since the last call, and resets the
    /// descriptor, so it is no longer readable.
    fn drain(&self) -> Vec<u64> {
        // Read the eventfd before taking the list, so that later wakes make it readable again.
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
        // Fails only if the counter is at its maximum. The descriptor is already readable then.
        let _ = rustix::io::write(&self.hub.event, &1_u64.to_ne_bytes());
    }
}
