//! A child process that is told things by lines and answers by lines.
//!
//! It is this same program, by `/proc/self/exe`: another user may not reach the folder it lies in, and a build may replace
//! it meanwhile. It ends by itself when its standard input does.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, anyhow};

use crate::leftovers;

/// The command `dmaload bench-child`, to be completed.
pub(crate) fn command() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("dmaload").arg("bench-child").stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// Another program, run by the shell. It ends by itself when its standard input does.
pub(crate) fn peer(command: &str, paths: &[PathBuf]) -> Command {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("{command} \"$@\"")).arg("sh").args(paths);
    shell.stdin(Stdio::piped()).stdout(Stdio::piped());
    shell
}

/// Such a process.
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
    /// When it can't be started.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let mut child = leftovers::start(command).context("cannot start a process of this program")?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("its standard output is a pipe")?);
        Ok(Worker { child, stdin, stdout })
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a line. That it is gone is told by [`Worker::hear`].
    pub(crate) fn tell(&mut self, line: &str) {
        if let Some(stdin) = &mut self.stdin {
            let _ = writeln!(stdin, "{line}").and_then(|()| stdin.flush());
        }
    }

    /// Its next line.
    ///
    /// # Errors
    /// How it ended, when there is none.
    pub(crate) fn hear(&mut self) -> Result<String> {
        let mut line = String::new();
        // An error is of the pipe, and as good as its end.
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
        // It has nothing to say any more; one that is done is not hurt, one that hangs would be waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
        leftovers::ended(&self.child);
    }
}

fn end(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(libc::SIGKILL), _) => "killed, most likely because memory ran out".to_owned(),
        (Some(signal), _) => format!("ended by signal {signal}"),
        (None, code) => format!("ended early, with status {}", code.unwrap_or(-1)),
    }
}
