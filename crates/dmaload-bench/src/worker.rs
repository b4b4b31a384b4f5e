//! A child process that reads commands and writes answers, each a line of text.
//!
//! Unless [`run_children_by`] sets another command, the child is this same program, started
//! through `/proc/self/exe`. The program's own path would not always work: the user that the child
//! runs as may not have access to the program's folder, and a build may replace the program in the
//! meantime. The child exits when its standard input ends.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};

use crate::leftovers;

/// The command that was set with [`run_children_by`], if any.
static PROGRAM: OnceLock<Vec<OsString>> = OnceLock::new();

/// Sets the command that starts child processes, in place of this process's executable. Programs
/// that are run by an interpreter need this. Only the first call has an effect.
pub fn run_children_by(program: Vec<OsString>) {
    let _ = PROGRAM.set(program);
}

/// Creates the `dmaload bench-child` command, to which the caller adds arguments.
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

/// Creates the command that runs another program in a shell. The program must exit when its
/// standard input ends.
pub(crate) fn peer_command(command: &str, paths: &[PathBuf]) -> Command {
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
    /// Starts the process.
    ///
    /// # Errors
    /// If the process can't be started.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let mut child = leftovers::start(command).context("cannot start a child process")?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("the child's standard output is not a pipe")?);
        Ok(Worker { child, stdin, stdout })
    }

    /// The process ID.
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
    /// If the process exits without writing a line. The error says how it ended.
    pub(crate) fn receive_line(&mut self) -> Result<String> {
        let mut line = String::new();
        // No further line will arrive after a read error or the end of the data.
        if self.stdout.read_line(&mut line).is_ok_and(|count| count > 0) {
            return Ok(line);
        }
        drop(self.stdin.take());
        let status = self.child.wait()?;
        leftovers::forget_process(&self.child);
        Err(anyhow!(describe_end(status)))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // The process is no longer needed. If it hung and were not killed, `wait` would never
        // return.
        let _ = self.child.kill();
        let _ = self.child.wait();
        leftovers::forget_process(&self.child);
    }
}

fn describe_end(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(libc::SIGKILL), _) => "killed, most likely for lack of memory".to_owned(),
        (Some(signal), _) => format!("ended by signal {signal}"),
        (None, code) => format!("exited early with status {}", code.unwrap_or(-1)),
    }
}
