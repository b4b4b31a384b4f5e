//! Converts the tensors of a load as they arrive, and returns them by name.
//!
//! ```text
//!   dmaload::Tensors ──► a thread: convert, drop the original ──► a map by name ──► callers
//! ```
//!
//! The thread exits when the load ends. Dropping the [`Arrivals`] cancels the load.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use dmaload::{Errno, Error, LoadRequest, Report, Result, Tensor, Tensors};

/// The thread's name. The kernel keeps at most 15 bytes of it.
const THREAD: &str = "dmaload-candle";

/// The tensors that have arrived from a load, by name.
pub(crate) struct Arrivals<T> {
    shared: Arc<Shared<T>>,
    thread: Thread,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    is_cancelled: AtomicBool,
}

struct State<T> {
    /// The tensors that have arrived, by name. For a tensor that could not be converted, the error
    /// is the reason.
    tensors: HashMap<String, std::result::Result<T, String>>,
    end: Option<Result<Report>>,
}

/// Why a requested tensor is not available.
#[derive(Debug)]
pub(crate) enum Missing {
    /// The tensor has arrived, but could not be converted.
    Unusable(String),
    /// The load failed before the tensor arrived.
    Failed(Error),
    /// Tensors that arrived before the requested one are still held, and use up the loader's
    /// memory limit.
    HeldUp(Error),
    /// The load has finished without yielding the tensor.
    NotLoaded,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Missing::Unusable(reason) => f.write_str(reason),
            Missing::Failed(error) => error.fmt(f),
            Missing::HeldUp(error) => write!(f, "{error}; {}", error.hint().unwrap_or_default()),
            Missing::NotLoaded => f.write_str("the load's options left it out"),
        }
    }
}

impl<T: Clone + Send + 'static> Arrivals<T> {
    /// Starts the load on a new thread.
    ///
    /// # Errors
    /// [`Error::Start`] if the thread cannot be started.
    pub(crate) fn start(
        load: LoadRequest,
        convert: impl Fn(&Tensor) -> std::result::Result<T, String> + Send + 'static,
    ) -> Result<Self> {
        let state = Mutex::new(State { tensors: HashMap::new(), end: None });
        let shared = Arc::new(Shared { state, changed: Condvar::new(), is_cancelled: AtomicBool::new(false) });
        let own = Arc::clone(&shared);
        let started = thread::Builder::new().name(THREAD.to_owned()).spawn(move || {
            // Conversions run outside the lock, and their state is not used after a panic.
            let taken = catch_unwind(AssertUnwindSafe(|| take_all(load.tensors(), &own, convert)));
            own.end(taken.unwrap_or_else(|panic| Err(Error::Panicked { code: THREAD.to_owned(), message: message(&*panic) })));
        });
        let thread = started.map_err(|error| Error::Start {
            operation: "start the thread that receives the tensors of a load",
            errno: Errno::from_io_error(&error).unwrap_or(Errno::EAGAIN),
        })?;
        Ok(Arrivals { shared, thread: thread.thread().clone() })
    }

    /// Returns the tensor with this name. Blocks the caller's thread until the tensor arrives or
    /// the load ends.
    ///
    /// # Errors
    /// Returns the reason why the tensor is not available.
    pub(crate) fn wait(&self, name: &str) -> std::result::Result<T, Missing> {
        let mut state = self.shared.lock();
        loop {
            match (state.tensors.get(name), &state.end) {
                (Some(Ok(tensor)), _) => return Ok(tensor.clone()),
                (Some(Err(reason)), _) => return Err(Missing::Unusable(reason.clone())),
                (None, Some(Ok(_))) => return Err(Missing::NotLoaded),
                (None, Some(Err(error))) => return Err(Missing::Failed(error.clone())),
                (None, None) => {}
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Returns the report. Blocks the caller's thread until the load ends.
    ///
    /// # Errors
    /// Returns the error of the load.
    pub(crate) fn finish(&self) -> Result<Report> {
        let mut state = self.shared.lock();
        loop {
            if let Some(end) = &state.end {
                return end.clone();
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<T> Drop for Arrivals<T> {
    fn drop(&mut self) {
        self.shared.is_cancelled.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

impl<T> fmt::Debug for Arrivals<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.lock();
        f.debug_struct("Arrivals").field("arrived", &state.tensors.len()).field("end", &state.end).finish()
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, name: &str, tensor: std::result::Result<T, String>) {
        let before = self.lock().tensors.insert(name.to_owned(), tensor);
        assert!(before.is_none(), "a load must yield each tensor only once: {name}");
        self.changed.notify_all();
    }

    fn end(&self, end: Result<Report>) {
        self.lock().end = Some(end);
        self.changed.notify_all();
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Receives and converts the tensors of a load until the load ends or is cancelled.
fn take_all<T>(
    mut tensors: Tensors,
    shared: &Shared<T>,
    convert: impl Fn(&Tensor) -> std::result::Result<T, String>,
) -> Result<Report> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if shared.is_cancelled.load(Ordering::Acquire) {
            return Err(Error::ShutDown);
        }
        // Dropping the future after each poll loses no tensor, and the waker stays registered.
        let next = pin!(tensors.next()).poll(&mut context);
        match next {
            Poll::Pending => thread::park(),
            Poll::Ready(Some(Ok(tensor))) => shared.add(tensor.name(), convert(&tensor)),
            Poll::Ready(Some(Err(error))) => return Err(error),
            Poll::Ready(None) => return Ok(tensors.report().expect("a stream that has ended should have a report").clone()),
        }
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let literal = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    literal.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
