//! Formats the output of the `dmaload` command and its benchmark: sizes, rates and times, aligned
//! pairs and tables, and file errors with the action, the path and the errno.
//!
//! Nothing here writes output or makes a system call.

mod amount;
mod file_error;
mod table;

pub use amount::{bytes, duration, grouped, rate};
pub use file_error::{FileError, ForPath, Named};
pub use table::{Align, Pairs, Table};
