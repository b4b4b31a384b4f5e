//! Runs dmaload's tests on stock Debian kernels in QEMU. Most of these kernels have devices that
//! create dma-bufs.
//!
//! ```text
//! cargo run -p dmaload-guest -- test
//!
//!   tools.rs      qemu, busybox, …              archive.rs, debian.rs   a stock kernel,
//!                                                        modules.rs   unpacked
//!   compile.rs    static test programs          disks.rs, roots.rs      disk images
//!        └──────────────┬──────────────────────────────┘
//!   initramfs.rs   init.sh, programs, lists
//!        │
//!   machine.rs     one QEMU per kernel: console to a file, results to a pipe
//!        │
//!   transcript.rs  test results, rows, problems         →  rows.rs, report.md, exit status
//! ```
//!
//! Requires cargo, a C compiler, and apt with a Debian mirror. KVM is not needed, because QEMU
//! emulates the processor. Emulation is slow, so the suites test correctness, not speed.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]

mod archive;
mod boot;
mod compile;
mod config;
mod cpio;
mod debian;
mod disks;
mod initramfs;
mod kernels;
mod machine;
mod modules;
mod progress;
mod python;
mod report;
mod roots;
mod rows;
mod run;
mod session;
mod suites;
mod tools;
mod transcript;
mod vulkan;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Boots stock kernels in QEMU and runs dmaload's tests on them.
#[derive(Debug, Parser)]
#[command(name = "guest", version)]
enum Arguments {
    /// Fetches kernels, builds suites, boots the kernels, and prints the outcome of each test.
    Test(Options),
    /// Lists the kernels, the archive suites that provide them, and the test suites that they run.
    List,
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Boots only this kernel, even if it is not booted by default; can be repeated.
    #[arg(long, value_name = "ID")]
    kernel: Vec<String>,
    /// Runs only this suite; can be repeated.
    #[arg(long, value_name = "SUITE")]
    only: Vec<String>,
    /// Runs only tests whose names contain this text.
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
    /// Fills the tables in this Markdown file with the rows that this run records. Does nothing if
    /// the run fails.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "only", "filter"])]
    write: Option<PathBuf>,
    /// Fails if the tables in this Markdown file differ from the rows that this run records.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "only", "filter", "write"])]
    check: Option<PathBuf>,
    /// Fetches kernels and builds the suites, but boots nothing.
    #[arg(long, conflicts_with_all = ["write", "check"])]
    no_run: bool,
    /// The number of kernels to run at a time.
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    jobs: u8,
    /// Keeps this run's disk images, initramfs archives and console output.
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
            progress::print(&format!("guest: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn list() {
    for kernel in &kernels::KERNELS {
        let suites = suites::SUITES.iter().filter(|suite| (suite.runs_on)(kernel, kernel.line));
        let names = suites.map(|suite| suite.name).collect::<Vec<_>>().join(" ");
        let when = if kernel.by_default { "by default" } else { "with --kernel" };
        progress::print(&format!("{}  {when}  {}  {names}", kernel.id, kernel.suites.join(",")));
    }
}
