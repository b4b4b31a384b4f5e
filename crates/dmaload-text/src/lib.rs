//! Text for people, as the command and its bench write it: sizes, rates and times, aligned pairs
//! and tables, and file errors that name the call, the path and the errno.
//!
//! Everything here makes strings, which the caller writes; nothing makes a system call.

mod amount;
mod file_error;
mod table;

pub use amount::{bytes, duration, grouped, rate};
pub use file_error::{At, FileError, Named};
pub use table::{Align, Pairs, Table};
