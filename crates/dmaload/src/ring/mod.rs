//! The ring thread, which owns all operations in flight.
//!
//! ```text
//!   thread   passes commands in and outputs out          ─┐
//!    └─ driver   the state machine (pure)                 │ one thread
//!        └─ kernel   the trait: linux, or sim in tests    │
//!            ├─ io_uring                                 ─┘
//!            └─ pool    threads that pread if there is no io_uring, copy from staging and from
//!                       the page cache, and run observers
//! ```
//!
//! The ring thread reads open files into memory that the engine has allocated. It doesn't open
//! files, allocates no memory except staging, and never runs the caller's code. Routes that use a
//! ring require io_uring (Linux 5.6 or later). If io_uring is refused, the threads of a pool read
//! with `pread` instead.
//!
//! After [`RingThread::close`], the thread exits once the last operation has completed and the
//! driver has no loads left. If a shutdown reaches its deadline first, [`RingThread::give_up`]
//! makes the thread leak the memory that still has operations in flight, and exit immediately.

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
