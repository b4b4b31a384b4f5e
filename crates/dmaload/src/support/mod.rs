//! What all other folders build on, without knowledge of loads: locks and atomics that loom can
//! replace ([`sync`]), load identifiers ([`id`]), a value that the first of several threads makes
//! ([`once_value`]), calls into the caller's code that catch panics ([`foreign`]), blocking on a
//! future ([`park`]), choices by name ([`names`]), and conversions of numbers ([`convert`],
//! [`errno`]).
//!
//! Imports nothing from this crate, makes no system calls beyond those of the standard library's
//! locks, and starts no threads. Nothing here has to be shut down.

pub(crate) mod convert;
pub(crate) mod errno;
pub(crate) mod foreign;
pub(crate) mod id;
pub(crate) mod names;
pub(crate) mod once_value;
pub(crate) mod park;
pub(crate) mod sync;
