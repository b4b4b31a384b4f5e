//! The ring: one thread that owns everything in flight.
//!
//! ```text
//!   thread   the loop: commands in, outputs out          ─┐
//!    └─ driver   the state machine (pure)                 │ one thread
//!        └─ kernel   the trait: linux, or sim in tests    │
//!            ├─ io_uring                                 ─┘
//!            └─ pread   a few threads, where io_uring is refused
//! ```
//!
//! How it ends: the thread leaves when it was told to close and no load is left in the driver, that is when the last
//! read has come back; or, past the deadline of a shutdown, it leaks what is in flight and leaves at once.

mod driver;
mod kernel;
mod linux;
mod pread;
#[cfg(test)]
mod sim;

mod slots;
mod thread;
mod wake;

pub(crate) use driver::{Failure, FileSpec, LoadId, LoadSpec};
pub(crate) use kernel::Buffer;
pub(crate) use thread::{Events, RingThread};
