//! Utilities that all other folders may use: locks and atomics that loom can replace ([`sync`]),
//! load identifiers ([`id`]), a value that the first thread to need it creates ([`once_value`]),
//! calls to the caller's code that catch panics ([`foreign`]), blocking on a future ([`park`]),
//! choices by name ([`names`]), and conversions ([`convert`], [`errno`]).
//!
//! Imports nothing from this crate, makes no system calls except those by which the standard
//! library blocks threads, and starts no threads. Nothing here has to be shut down.

pub(crate) mod convert;
pub(crate) mod errno;
pub(crate) mod foreign;
pub(crate) mod id;
pub(crate) mod names;
pub(crate) mod once_value;
pub(crate) mod park;
pub(crate) mod sync;
