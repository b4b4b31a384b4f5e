//! Runs dmaload's tests on kernels that have real dma-bufs, wherever QEMU runs.
//!
//! ```text
//! cargo run -p dmaload-guest -- test
//!
//!   tools.rs      qemu, busybox, …              debian.rs, modules.rs   a stock kernel, unpacked
//!   compile.rs    static test programs          disks.rs                an empty disk, and a bad one
//!        └──────────────┬──────────────────────────────┘
//!   initramfs.rs   init.sh, programs, lists
//!        │
//!   machine.rs     one QEMU per kernel: the console to a file, results to a pipe
//!        │
//!   transcript.rs  verdicts, rows, what is missing      →  rows.rs, report.md, exit status
//! ```
//!
//! No KVM is needed: everything is emulated. So this proves what is right, never what is fast.
#![allow(clippy::disallowed_methods, reason = "what is shown here has names of its own making only")]

mod boot;
mod compile;
mod cpio;
mod debian;
mod disks;
mod initramfs;
mod kernels;
mod machine;
mod modules;
mod report;
mod rows;
mod run;
mod say;
mod session;
mod suites;
mod tools;
mod transcript;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Boots stock kernels in QEMU and runs dmaload's tests inside.
#[derive(Debug, Parser)]
#[command(name = "guest", version)]
enum Arguments {
    /// Fetches the kernels, builds the suites, boots, and tells what came of each test.
    Test(Options),
    /// Lists kernels and their suites.
    List,
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Boots this kernel only; can be given again.
    #[arg(long, value_name = "ID")]
    kernel: Vec<String>,
    /// Runs this suite only; can be given again.
    #[arg(long, value_name = "SUITE")]
    only: Vec<String>,
    /// Runs only tests with this in their name.
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
    /// Writes the tables in this Markdown file anew. Takes a whole run, in which all went well.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "only", "filter"])]
    write: Option<PathBuf>,
    /// Boots so many kernels at a time.
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    jobs: u8,
    /// Keeps disk images, initramfs and consoles.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let done = match Arguments::parse() {
        Arguments::Test(options) => session::run(&options),
        Arguments::List => {
            list();
            Ok(true)
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say::line(&format!("guest: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn list() {
    for kernel in &kernels::KERNELS {
        let names = suites::SUITES.iter().filter(|suite| suite.kernels.contains(&kernel.id)).map(|suite| suite.name);
        say::line(&format!("{}  {}  {}", kernel.id, kernel.package, names.collect::<Vec<_>>().join(" ")));
    }
}
