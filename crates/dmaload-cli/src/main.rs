//! `dmaload`: loads model files from the command line.

mod args;
mod baseline;
mod bench;
mod cat;
mod checksums;
mod cold;
mod demo;
mod doctor;
mod engine;
mod errors;
mod exec;
mod inspect;
mod load;
mod manifest;
mod scratch;
mod serve;
mod summary;
mod synth;
mod sys;
mod trace;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use tracing_subscriber::EnvFilter;

use args::{Arguments, Command};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Fallbacks are in every report; the events are for those who ask for them.
    let filter = EnvFilter::try_from_env("DMALOAD_LOG").unwrap_or_else(|_| EnvFilter::new("off"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let result = match arguments.command {
        Command::Load(arguments) => load::run(&arguments),
        Command::Cat(arguments) => cat::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Manifest(arguments) => manifest::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Inspect(arguments) => inspect::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Serve(arguments) => serve::serve(&arguments),
        Command::Attach(arguments) => serve::attached(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::BenchChild(arguments) => bench::run_child(arguments).map(|()| ExitCode::SUCCESS),
    };
    match result {
        Ok(code) => code,
        Err(error) if summary::is_closed_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            let usage = matches!(error.downcast_ref(), Some(dmaload::Error::Config(_)));
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

fn report(error: &anyhow::Error) {
    let mut stderr = std::io::stderr().lock();
    // Nobody is left to be told when this fails.
    let _ = writeln!(stderr, "dmaload: {}", errors::told(error));
    if let Some(hint) = error.downcast_ref::<dmaload::Error>().and_then(dmaload::Error::hint) {
        let _ = writeln!(stderr, "  {hint}");
    }
}

/// Runs a future to its end: one thread is enough, the loader has its own.
fn block_on<T>(future: impl Future<Output = T>) -> Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(future))
}
