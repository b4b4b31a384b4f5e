//! `dmaload doctor`: what loads get here, and what would help most.
//!
//! ```text
//!   system   files of /proc and /sys ─┐
//!   mounts   which file system        ├─► facts ─┬─► verdict   what a load would do (pure)
//!   trial    real loads of a file    ─┘          └─► advice    what would help most (pure)
//!   cause    who refuses io_uring (pure)                 └───► screen, json
//! ```
//!
//! What can be tried is tried, with the engine itself; files of the system are read only to tell why something was refused.

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
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::output;
use facts::Facts;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// A file to be loaded, or the folder of such files.
    pub(crate) path: Option<PathBuf>,
    /// Print one JSON object, and nothing else, on standard output.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let facts = Facts::gather(arguments.path.as_deref())?;
    if arguments.json {
        output::write_json(&json::object(&facts))?;
    } else {
        let mut stdout = output::stdout();
        write!(stdout, "{}", screen::screen(&facts))?;
        stdout.flush()?;
    }
    Ok(if verdict::load(&facts).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
