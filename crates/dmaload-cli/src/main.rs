//! `dmaload`: loads model files from the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(dmaload_cli::run(std::env::args_os(), None))
}
