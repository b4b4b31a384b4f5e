//! The ring: one thread that owns everything in flight.
//!
//! ```text
//!   thread   the loop: commands in, outputs out          ─┐
//!    └─ driver   the state machine (pure)                 │ one thread
//!        └─ kernel   the trait: linux, or sim in tests    │
//!            ├─ io_uring                                 ─┘
//!            └─ pool    threads: pread without io_uring; copies from staging and from the page
//!                       cache; observers
//! ```
//!
//! The ring reads open files into memory that the engine allocated. It opens no files, allocates
//! only staging, and never runs the caller's code on its thread. Routes that use a ring require
//! io_uring (Linux 5.6 or later). Where io_uring is refused, threads read with `pread`.
//!
//! Shutdown: after [`RingThread::close`], the thread ends once the driver has no load left, that
//! is, after the last completion. At the deadline of a shutdown ([`RingThread::give_up`]), it
//! leaks memory with operations in flight and ends at once.

mod driver;
mod kernel;
mod known;
mod linux;
mod message;
mod order;
pub(crate) mod pace;
mod pool;
#[cfg(test)]
mod sim;
mod slots;
mod staging;
mod thread;
mod wake;
pub(crate) mod watch;

pub(crate) use linux::{can_read_buffered, probe};
pub(crate) use message::{Failure, FileSpec, LoadEvent, LoadSpec, Output, Retried, TimedSpan, Times};
#[cfg(test)]
pub(crate) use slots::Slots;
pub(crate) use staging::StagingBudget;
pub(crate) use thread::{Events, LeftBehind, RingLimits, RingThread};
