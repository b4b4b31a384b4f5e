//! Formats the output of the command and its benchmark: sizes, rates and times, aligned pairs and
//! tables, and file errors with the call, the path and the errno.
//!
//! Everything here returns strings for the caller to write; nothing makes a system call.

mod amount;
mod file_error;
mod table;

pub use amount::{bytes, duration, grouped, rate};
pub use file_error::{At, FileError, Named};
pub use table::{Align, Pairs, Table};
