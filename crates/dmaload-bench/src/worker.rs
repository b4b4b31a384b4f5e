//! A child process that is controlled by lines of text and answers with lines.
//!
//! It is this same program, started through `/proc/self/exe`: another user may not have access to
//! its folder, and a build may replace it in the meantime. It exits when its standard input ends.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};

use crate::leftovers;

/// See [`run_children_by`].
static PROGRAM: OnceLock<Vec<OsString>> = OnceLock::new();

/// Starts child processes by this command instead of by this process' executable, for programs
/// that are run by an interpreter. The first call counts.
pub fn run_children_by(program: Vec<OsString>) {
    let _ = PROGRAM.set(program);
}

/// The command `dmaload bench-child`, to be completed.
pub(crate) fn command() -> Command {
    let mut command = match PROGRAM.get().and_then(|program| program.split_first()) {
        Some((executable, arguments)) => {
            let mut command = Command::new(executable);
            command.args(arguments);
            command
        }
        None => {
            let mut command = Command::new("/proc/self/exe");
            command.arg0("dmaload");
            command
        }
    };
    command.arg("bench-child").stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// Another program, run by the shell. It exits when its standard input ends.
pub(crate) fn peer(command: &str, paths: &[PathBuf]) -> Command {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("{command} \"$@\"")).arg("sh").args(paths);
    shell.stdin(Stdio::piped()).stdout(Stdio::piped());
    shell
}

/// A running child process.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts it.
    ///
    /// # Errors
    /// If it can't be started.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let mut child = leftovers::start(command).context("cannot start this program as another process")?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("its standard output is a pipe")?);
        Ok(Worker { child, stdin, stdout })
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a line. If the process is gone, [`Worker::receive_line`] reports it.
    pub(crate) fn send_line(&mut self, line: &str) {
        if let Some(stdin) = &mut self.stdin {
            let _ = writeln!(stdin, "{line}").and_then(|()| stdin.flush());
        }
    }

    /// Receives the next line.
    ///
    /// # Errors
    /// How the process ended, if there is no line.
    pub(crate) fn receive_line(&mut self) -> Result<String> {
        let mut line = String::new();
        // A pipe error means the same as its end.
        if self.stdout.read_line(&mut line).is_ok_and(|count| count > 0) {
            return Ok(line);
        }
        drop(self.stdin.take());
        let status = self.child.wait()?;
        leftovers::ended(&self.child);
        Err(anyhow!(end(status)))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // Nothing more is expected from it: killing a finished process does no harm, and a hanging
        // one would block the wait.
        let _ = self.child.kill();
        let _ = self.child.wait();
        leftovers::ended(&self.child);
    }
}

fn end(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(libc::SIGKILL), _) => "killed, most likely for lack of memory".to_owned(),
        (Some(signal), _) => format!("ended by signal {signal}"),
        (None, code) => format!("ended early, with status {}", code.unwrap_or(-1)),
    }
}
