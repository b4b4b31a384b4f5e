//! Messages between the driver and the thread that runs it.

use std::time::Duration;

use rustix::io::Errno;

use crate::files::source::CachedChunks;
use crate::ring::watch::Observation;
use crate::route::{Attempt, Fallback, Route};
use crate::support::id::LoadId;
use crate::telemetry::trace::TraceKind;

/// The properties of a load that the driver needs to know before it gets the first piece.
#[derive(Debug, Clone)]
pub(crate) struct LoadSpec {
    pub(crate) id: LoadId,
    /// The number of pieces in all files.
    pub(crate) pieces: usize,
    pub(crate) chunk_bytes: u64,
    pub(crate) strict: bool,
    pub(crate) trace: bool,
    pub(crate) observation: Option<Observation>,
}

/// What the driver needs to know about a piece's file.
#[derive(Debug, Clone)]
pub(crate) struct FileSpec<F> {
    pub(crate) handle: F,
    pub(crate) index: usize,
    /// The best route that reads of the file may use. A fallback replaces it with a lower route.
    pub(crate) route: Route,
    /// The best route for direct reads of the file into staging.
    pub(crate) staged_by: Route,
    /// Identifies the file system that the file is on.
    pub(crate) mount: u64,
    /// The alignment of direct reads, in the file and in memory.
    pub(crate) alignment_bytes: u64,
    /// Whether the file is in memory, so direct reads are copies made by the thread that submits
    /// them.
    pub(crate) in_memory: bool,
    /// Which chunks of the piece were in the page cache when the piece was prepared.
    pub(crate) cached: CachedChunks,
}

impl<F> FileSpec<F> {
    /// Whether reads through the file's current route can fill unpopulated memory. They can if
    /// threads write the bytes (by copying them from staging, or by reading into the memory
    /// itself), because a thread populates memory as it writes to it. Devices and rings can't.
    pub(crate) fn fills_unpopulated(&self) -> bool {
        self.route >= Route::Bounce || self.route == Route::PreadDirect && self.in_memory
    }
}

/// What the driver returns to the thread that runs it.
#[derive(Debug)]
pub(crate) enum Output<B> {
    /// All bytes of a piece were read and, if the load has an observer, observed. `route` is the
    /// least preferred of the routes through which they were read from storage; `None` if no bytes
    /// were.
    PieceFull { load: LoadId, piece: usize, route: Option<Route>, buffer: B },
    /// Any other load event.
    Event { load: LoadId, event: LoadEvent },
}

/// A load event other than a full piece.
#[derive(Debug)]
pub(crate) enum LoadEvent {
    /// The load or one of its files has fallen back to another route.
    SteppedDown { fallback: Fallback },
    /// Less staging could be allocated than the load may use, so fewer of its reads can be in
    /// flight. Reported once.
    LessStaging { bytes: u64, errno: Errno },
    /// No thread could be started for copies. The ring thread copies instead, except into memory
    /// whose sink runs the caller's code, and issues no reads in the meantime. Reported once.
    NoThread,
    /// A read failed and will be retried once.
    Retried { retried: Retried },
    /// When an operation on a piece started and ended. Reported only if the load is traced.
    Traced { piece: usize, span: TimedSpan },
    /// The load can't be completed. Reported once. Each of the load's buffers is released when no
    /// operation on that buffer is in flight.
    Failed { failure: Failure },
    /// The driver has removed the load, and has released or leaked all of its buffers. Contains
    /// the load's observation, because dropping it may run the caller's code, which the ring
    /// thread must not do.
    Gone { times: Times, observation: Option<Observation> },
}

impl<B> Output<B> {
    /// Applies `map` to the buffer of a full piece. Other outputs stay the same.
    pub(crate) fn map_buffer<C>(self, map: impl FnOnce(B) -> C) -> Output<C> {
        match self {
            Output::PieceFull { load, piece, route, buffer } => Output::PieceFull { load, piece, route, buffer: map(buffer) },
            Output::Event { load, event } => Output::Event { load, event },
        }
    }

    /// Returns the load that the output is about.
    pub(crate) fn load(&self) -> LoadId {
        match *self {
            Output::PieceFull { load, .. } | Output::Event { load, .. } => load,
        }
    }
}

/// A read that failed and is retried once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Retried {
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) errno: Errno,
}

/// An operation on a piece, with times from the driver's clock (`Kernel::now`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TimedSpan {
    pub(crate) kind: TraceKind,
    pub(crate) start: Duration,
    pub(crate) end: Duration,
    pub(crate) bytes: u64,
}

/// How long a load was reading and copying, and how many bytes came from the page cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Times {
    /// The time during which at least one read was in flight.
    pub(crate) reading: Duration,
    /// The time during which at least one copy from staging was in flight.
    pub(crate) copying: Duration,
    /// The time during which at least one copy from the page cache was in flight.
    pub(crate) from_cache: Duration,
    /// How many bytes were copied from the page cache.
    pub(crate) cached_bytes: u64,
}

/// Why a load failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// A read failed, and retrying it did not help.
    Read { file: usize, offset: u64, bytes: u64, route: Route, errno: Errno },
    /// No more bytes could be read at this offset, which is before the file's planned end.
    Ended { file: usize, offset: u64, route: Route },
    /// A route was refused, and the load is strict.
    Refused { file: usize, offset: u64, route: Route, attempt: Attempt, errno: Errno },
    /// An observer rejected these bytes or panicked, or no thread could be started to observe
    /// them.
    Rejected { file: usize, offset: u64, bytes: u64 },
    /// No staging could be allocated.
    Staging { bytes: u64, errno: Errno },
    /// The memory for these bytes could not be populated, or no thread could be started to do so.
    Memory { bytes: u64, errno: Errno },
    /// The ring failed, or a shutdown reached its deadline.
    Kernel { errno: Errno },
}
