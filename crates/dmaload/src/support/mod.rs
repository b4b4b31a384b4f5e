//! What every other folder builds on, and that knows nothing of loads: locks and atomics that loom
//! can replace ([`sync`]), the name of a load ([`id`]), a value that the first of several threads
//! makes ([`once_value`]), calls into the caller's code whose panics are caught ([`foreign`]), a thread
//! that sleeps until a future is ready ([`park`]), choices by their names ([`names`]), and conversions of
//! numbers ([`convert`], [`errno`]).
//!
//! It imports nothing of this crate, makes no system call beyond those of the standard library's
//! locks, and starts no thread. Nothing here has to be ended.

pub(crate) mod convert;
pub(crate) mod errno;
pub(crate) mod foreign;
pub(crate) mod id;
pub(crate) mod names;
pub(crate) mod once_value;
pub(crate) mod park;
pub(crate) mod sync;
