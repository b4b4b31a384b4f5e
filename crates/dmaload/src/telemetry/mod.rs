//! What a load and a loader tell about themselves: the [`Report`](report::Report) of one load, the
//! [`Metrics`](metrics::Metrics) of a loader, and the events of a trace.
//!
//! Pure bookkeeping. It reads no file and starts no thread; the one system call is
//! `clock_gettime(2)`, for the processor's time. The engine fills these values and hands them to the caller, who may keep
//! them for as long as it likes: nothing here refers to a loader.

pub(crate) mod busy;
pub(crate) mod metrics;
pub(crate) mod report;
pub(crate) mod trace;
