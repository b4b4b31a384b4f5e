//! The `dmaload` command, which loads model files.
//!
//! The program `dmaload` and `python -m dmaload` both call [`run`], which takes the command line's
//! arguments and returns an exit status. Both are documented in docs/cli.md. This crate is not
//! meant to be used as a library.

mod args;
mod attach;
mod bench;
mod cat;
mod checksums;
mod demo;
mod doctor;
mod engine;
mod errors;
mod exec;
mod inspect;
mod load;
mod manifest;
mod manifests;
mod output;
mod parse;
mod progress;
mod serve;
mod status;
mod summary;
mod sys;
mod trace;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};

use clap::Parser;
use dmabuf::printable;
use dmaload::ErrorKind;
use serde_json::json;
use tracing_subscriber::EnvFilter;

use args::{Arguments, Command};
pub use manifests::Against;
use status::{FAILURE, SUCCESS, USAGE};

/// Runs the command with these arguments, the first of which is the program's name, and returns
/// its exit status. A running `serve` does not return: SIGINT or SIGTERM ends the process.
///
/// `program` is the command that `bench` runs to start this program again in child processes.
/// `None` means the executable of this process.
pub fn run(arguments: impl IntoIterator<Item = OsString>, program: Option<Vec<OsString>>) -> u8 {
    let command_line: Vec<OsString> = arguments.into_iter().collect();
    if let Some(program) = program {
        dmaload_bench::run_children_by(program);
    }
    let arguments = match Arguments::try_parse_from(&command_line) {
        Ok(arguments) => arguments,
        Err(error) => return report_usage(&error, &command_line),
    };
    // Log events are printed only on request; fallbacks are listed in every report anyway.
    let filter = EnvFilter::try_from_env("DMALOAD_LOG").unwrap_or_else(|_| EnvFilter::new("off"));
    // This fails if the process has run the command before: the first subscriber stays in place.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
    let wants_json = arguments.command.wants_json();
    let result = match arguments.command {
        Command::Load(arguments) => load::run(&arguments),
        Command::Cat(arguments) => cat::run(&arguments).map(|()| SUCCESS),
        Command::Manifest(arguments) => manifest::run(&arguments).map(|()| SUCCESS),
        Command::Inspect(arguments) => inspect::run(&arguments).map(|()| SUCCESS),
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Attach(arguments) => attach::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments).map(|()| SUCCESS),
        Command::Bench(arguments) => bench::run(&arguments, &command_line),
        Command::BenchChild(arguments) => bench::run_child(arguments).map(|()| SUCCESS),
    };
    match result {
        Ok(code) => code,
        Err(error) if errors::is_closed_pipe(error.as_ref()) => SUCCESS,
        Err(error) => {
            let library_error = error.downcast_ref::<dmaload::Error>();
            let is_usage = library_error.is_some_and(|error| error.kind() == ErrorKind::Config);
            let status = if is_usage { USAGE } else { FAILURE };
            let hint = library_error.and_then(errors::hint);
            report(&errors::describe(&error), hint.as_deref(), status, wants_json);
            status
        }
    }
}

/// Reports an error on standard error, and with `--json` also as an object on standard output.
fn report(message: &str, hint: Option<&str>, status: u8, wants_json: bool) {
    let mut stderr = std::io::stderr().lock();
    // There is nowhere else to report a failure.
    let _ = writeln!(stderr, "dmaload: {}", errors::escape(message));
    if let Some(hint) = hint {
        let _ = writeln!(stderr, "  {}", errors::escape(hint));
    }
    if wants_json {
        let object = json!({ "error": message, "hint": hint, "exit_status": status });
        if let Err(error) = output::write_json_error(&object) {
            let _ = writeln!(stderr, "dmaload: {error}");
        }
    }
}

/// Handles an error from clap: prints the help or version that the user asked for, or reports
/// a usage error.
fn report_usage(error: &clap::Error, command_line: &[OsString]) -> u8 {
    if !error.use_stderr() {
        return match error.print() {
            Ok(()) if sys::stdout_was_closed() => FAILURE,
            Ok(()) => SUCCESS,
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => SUCCESS,
            Err(_) => FAILURE,
        };
    }
    let text = error.to_string();
    // The shell may have inserted file names that contain control characters, even line breaks.
    let texts = command_line.iter().map(|argument| argument.to_string_lossy().into_owned());
    let hostile = texts.filter(|argument| argument.contains(printable::is_hidden));
    let shown = hostile.fold(text.clone(), |text, argument| text.replace(&argument, &printable::text(&argument).to_string()));
    let shown = errors::escape(&shown).to_string();
    if shown == text {
        // On a terminal, clap prints the text in color.
        let _ = error.print();
    } else {
        let _ = write!(std::io::stderr(), "{shown}");
    }
    // The arguments after --exec are those of another program, and those after -- are paths.
    let own = command_line.iter().take_while(|argument| *argument != "--exec" && *argument != "--");
    if own.skip(1).any(|argument| argument == "--json") {
        let object = json!({ "error": shown.trim_end(), "hint": null, "exit_status": USAGE });
        if let Err(error) = output::write_json_error(&object) {
            let _ = writeln!(std::io::stderr(), "dmaload: {error}");
        }
    }
    USAGE
}
