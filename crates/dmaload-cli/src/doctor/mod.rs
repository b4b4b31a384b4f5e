//! `dmaload doctor`: shows how loads work on this machine, and what would help most.
//!
//! ```text
//!   system   files of /proc and /sys ─┐
//!   mounts   the path's file system   ├─► facts ─┬─► verdict   what a load would do (pure)
//!   trial    real loads of a file    ─┘          └─► advice    what would help most (pure)
//!   cause    what refuses io_uring (pure)                └───► screen, json
//! ```
//!
//! Doctor tests everything that it can with real loads. It reads system files only to explain
//! refusals and to find limits, modules and file systems.

mod advice;
mod cause;
mod facts;
mod json;
mod mounts;
mod screen;
mod system;
mod trial;
mod verdict;

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::output;
use facts::Facts;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The file or model folder to test; by default, only the machine is tested.
    pub(crate) path: Option<PathBuf>,
    /// Print one JSON object to standard output, and nothing else.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let facts = Facts::gather(arguments.path.as_deref())?;
    if arguments.json {
        output::write_json(&json::object(&facts))?;
    } else {
        let mut stdout = output::stdout();
        write!(stdout, "{}", screen::screen(&facts))?;
        stdout.flush()?;
    }
    Ok(if verdict::load(&facts).is_ok() { crate::status::SUCCESS } else { crate::status::FAILURE })
}
