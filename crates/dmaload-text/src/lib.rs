//! What the command and its bench write for people: sizes, rates and times, aligned pairs and tables, and errors of
//! files that name the call, the path and the errno.
//!
//! Everything here makes strings; the caller writes them. It asks the system for nothing, and reads no file.

mod amount;
mod file_error;
mod table;

pub use amount::{bytes, duration, grouped, rate};
pub use file_error::{At, FileError, Named};
pub use table::{Align, Pairs, Table};
