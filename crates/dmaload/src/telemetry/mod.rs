//! What a load and a loader tell about themselves: the [`Report`](report::Report) of one load, the
//! [`Metrics`](metrics::Metrics) of a loader, and the events of a trace.
//!
//! Pure bookkeeping: it reads no file and no clock, and starts no thread. The engine fills these
//! values and hands them to the caller, who may keep them for any time: nothing here refers to a
//! loader. Figures of the whole process are the caller's to take.

pub(crate) mod busy;
pub(crate) mod metrics;
pub(crate) mod report;
pub(crate) mod trace;
