//! What loads and loaders report: the [`Report`](report::Report) of one load, the
//! [`Metrics`](metrics::Metrics) of a loader, and the events of a trace.
//!
//! This module does only bookkeeping: it reads neither files nor the clock, and starts no threads.
//! The engine fills in these values and returns them to the caller, who may keep them: nothing
//! here refers to a loader. Measuring the process as a whole, such as its CPU time, is left to the
//! caller.

pub(crate) mod busy;
pub(crate) mod metrics;
pub(crate) mod report;
pub(crate) mod trace;
