//! Utilities that all other folders may use: locks and atomics that loom can replace ([`sync`]),
//! load identifiers ([`id`]), a value that is created by the first thread that needs it
//! ([`once_value`]), calls to the caller's code that catch panics ([`foreign`]), blocking on a
//! future ([`park`]), choices by name ([`names`]), and conversions ([`convert`], [`errno`]).
//!
//! This module imports nothing from this crate, starts no threads, and makes no system calls
//! except those that the standard library uses to block threads. Nothing here has to be shut down.

pub(crate) mod convert;
pub(crate) mod errno;
pub(crate) mod foreign;
pub(crate) mod id;
pub(crate) mod names;
pub(crate) mod once_value;
pub(crate) mod park;
pub(crate) mod sync;
