//! The thread that runs the driver. It passes commands to the driver, and the driver's outputs to
//! the engine.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use rustix::io::Errno;

use super::driver::Driver;
use super::kernel::Kernel;
use super::linux::LinuxKernel;
use super::message::{Failure, FileSpec, LoadEvent, LoadSpec, Output};
use super::staging::StagingBudget;
use super::wake::Wake;
use crate::files::source::OpenFile;
use crate::memory::buffer::PieceMemory;
use crate::plan::Piece;
use crate::ring::pace::Pace;
use crate::support::foreign;
use crate::support::id::LoadId;
use crate::telemetry::metrics::ReadCounters;

/// Limits for the ring thread.
#[derive(Debug)]
pub(crate) struct RingLimits {
    /// Maximum number of reads, copies and observations in flight.
    pub(crate) depth: usize,
    /// The initial amount of staging memory.
    pub(crate) staging: StagingBudget,
    pub(crate) copiers: Pace,
    /// Whether the amount of staging memory grows with the number of copiers.
    pub(crate) staging_grows: bool,
}

/// Callbacks from the ring thread to the engine. They are called on the ring thread, so they must
/// not block, and must not run the caller's code.
pub(crate) trait Events<B>: Send + Sync + 'static {
    /// Receives the driver's outputs, in the order in which it produced them.
    fn on_outputs(&self, outputs: Vec<Output<B>>);
    /// Receives files that loads have released. Another thread must close them.
    fn on_released_files(&self, files: Vec<(LoadId, Arc<OpenFile>)>);
    /// Reports that the ring was abandoned, and how many bytes of memory were leaked. Either the
    /// ring failed and a new one replaces it, or a shutdown reached its deadline (ETIMEDOUT).
    fn on_ring_failure(&self, errno: Errno, leaked_bytes: u64);
    /// Reports that the thread is exiting, either normally or because of a panic with the message
    /// `panic`. `left` is what the thread leaves behind. `self` is the thread's reference to the
    /// engine. It must not be dropped on this thread: it may be the last reference, and dropping
    /// the engine may run the caller's code.
    fn on_end(self: Arc<Self>, left: LeftBehind, panic: Option<String>);
}

/// The memory and threads that the ring thread left behind.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LeftBehind {
    /// Bytes of leaked memory. Operations that never completed may still use it.
    pub(crate) bytes: u64,
    /// Threads that were still busy with reads, copies or observations.
    pub(crate) threads: usize,
}

#[derive(Debug)]
enum Command<B> {
    Begin(LoadSpec, Arc<AtomicBool>),
    Piece {
        load: LoadId,
        number: usize,
        piece: Piece,
        file: FileSpec<Arc<OpenFile>>,
        buffer: B,
    },
    /// Makes the thread panic, as if an invariant were broken.
    #[cfg(test)]
    Panic,
}

#[derive(Debug)]
struct RingShared<B> {
    /// `None` after the thread has exited; later commands are dropped immediately.
    commands: Mutex<Option<Vec<Command<B>>>>,
    closing: AtomicBool,
    giving_up: AtomicBool,
    wake: Arc<Wake>,
    counters: Arc<ReadCounters>,
}

impl<B> RingShared<B> {
    fn commands(&self) -> MutexGuard<'_, Option<Vec<Command<B>>>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle to the ring thread.
#[derive(Debug)]
pub(crate) struct RingThread<B> {
    shared: Arc<RingShared<B>>,
}

impl<B: PieceMemory + Send + 'static> RingThread<B> {
    /// Creates a handle to a thread that has not been started yet.
    ///
    /// # Errors
    /// If no eventfd can be created, for example because too many files are open (EMFILE).
    pub(crate) fn new() -> Result<Self, Errno> {
        let wake = Arc::new(Wake::new()?);
        let (closing, giving_up) = (AtomicBool::new(false), AtomicBool::new(false));
        let counters = Arc::default();
        Ok(RingThread {
            shared: Arc::new(RingShared { commands: Mutex::new(Some(Vec::new())), closing, giving_up, wake, counters }),
        })
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// If no thread can be started.
    pub(crate) fn start(&self, limits: RingLimits, started: Instant, events: Arc<impl Events<B>>) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let body = move || {
            let ran = foreign::call(|| run(&shared, &limits, started, &*events));
            let commands = shared.commands().take().unwrap_or_default();
            let files = commands.into_iter().filter_map(|command| match command {
                Command::Piece { load, file, .. } => Some((load, file.handle)),
                Command::Begin(..) => None,
                #[cfg(test)]
                Command::Panic => None,
            });
            events.on_released_files(files.collect());
            // After a panic, dropping the driver has leaked memory with operations in flight, and
            // has counted it.
            let bytes = shared.counters.leaked_bytes.load(Ordering::Relaxed);
            let threads = ran.as_ref().copied().unwrap_or(0);
            events.on_end(LeftBehind { bytes, threads }, ran.err());
        };
        thread::Builder::new().name("dmaload-ring".to_owned()).spawn(body).map(|_| ())
    }

    pub(crate) fn counters(&self) -> &ReadCounters {
        &self.shared.counters
    }

    /// Announces a load. To abandon it, set `abandoned` and wake the thread.
    pub(crate) fn begin(&self, spec: LoadSpec, abandoned: Arc<AtomicBool>) {
        self.send(Command::Begin(spec, abandoned));
    }

    /// Passes a piece to the driver, to be filled.
    pub(crate) fn enqueue_piece(&self, load: LoadId, number: usize, piece: Piece, file: FileSpec<Arc<OpenFile>>, buffer: B) {
        self.send(Command::Piece { load, number, piece, file, buffer });
    }

    /// Makes the thread check for commands and flags.
    pub(crate) fn wake(&self) {
        self.shared.wake.wake();
    }

    /// Lets the thread exit after its last load.
    pub(crate) fn close(&self) {
        self.shared.closing.store(true, Ordering::Release);
        self.wake();
    }

    #[cfg(test)]
    pub(crate) fn panic(&self) {
        self.send(Command::Panic);
    }

    /// Makes the thread leak memory with operations in flight, and exit immediately.
    pub(crate) fn give_up(&self) {
        self.shared.giving_up.store(true, Ordering::Release);
        self.wake();
    }

    fn send(&self, command: Command<B>) {
        let mut commands = self.shared.commands();
        let refused = match &mut *commands {
            Some(commands) => {
                commands.push(command);
                None
            }
            None => Some(command),
        };
        drop(commands);
        // Drop a refused command without holding the lock, because returning its permit takes
        // other locks.
        drop(refused);
        self.wake();
    }
}

/// Runs until [`RingThread::give_up`] is called or, after [`RingThread::close`], until the last
/// load has ended. Returns how many pool threads were still busy when their ring was abandoned.
/// This includes threads of rings that failed and were replaced.
fn run<B: PieceMemory>(shared: &RingShared<B>, limits: &RingLimits, started: Instant, events: &impl Events<B>) -> usize {
    let depth = limits.depth;
    let new_kernel = || LinuxKernel::new(depth, started, Arc::clone(&shared.wake));
    let mut driver = Driver::new(new_kernel(), depth, limits.staging)
        .with_counters(Arc::clone(&shared.counters))
        .with_pace(limits.copiers.clone(), limits.staging_grows);
    let mut watched: HashMap<LoadId, Arc<AtomicBool>> = HashMap::new();
    let mut stuck_threads = 0;
    loop {
        let commands = shared.commands().as_mut().map(std::mem::take).unwrap_or_default();
        for command in commands {
            match command {
                Command::Begin(spec, abandoned) => {
                    watched.insert(spec.id, abandoned);
                    driver.begin(spec);
                }
                Command::Piece { load, number, piece, file, buffer } => driver.enqueue_piece(load, number, piece, file, buffer),
                #[cfg(test)]
                Command::Panic => panic!("requested by a test"),
            }
        }
        for (&load, _) in watched.iter().filter(|(_, abandoned)| abandoned.load(Ordering::Acquire)) {
            driver.abandon(load);
        }
        driver.issue();
        // Files are passed on before outputs, so when a load's end is reported, the engine has
        // already received all files that the load released.
        let released = driver.take_released();
        if !released.is_empty() {
            events.on_released_files(released);
        }
        let outputs = driver.take_outputs();
        for output in &outputs {
            if let Output::Event { load, event: LoadEvent::Gone { .. } } = output {
                watched.remove(load);
            }
        }
        if !outputs.is_empty() {
            events.on_outputs(outputs);
        }
        if shared.giving_up.load(Ordering::Acquire) {
            give_up(&mut driver, Errno::TIMEDOUT, events);
            return stuck_threads + driver.busy_threads();
        }
        if shared.closing.load(Ordering::Acquire) && watched.is_empty() && shared.commands().as_ref().is_none_or(Vec::is_empty) {
            return stuck_threads;
        }
        if let Err(errno) = driver.turn(true) {
            give_up(&mut driver, errno, events);
            stuck_threads += driver.busy_threads();
            driver.replace_kernel(new_kernel());
            watched.clear();
        }
    }
}

fn give_up<K: Kernel<File = Arc<OpenFile>>, B: PieceMemory>(driver: &mut Driver<K, B>, errno: Errno, events: &impl Events<B>) {
    let leaked_bytes = driver.give_up(Failure::Kernel { errno });
    events.on_ring_failure(errno, leaked_bytes);
    events.on_released_files(driver.take_released());
    events.on_outputs(driver.take_outputs());
}
