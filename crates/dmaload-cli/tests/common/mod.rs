//! Helpers for the command's tests, which run the real binary on files on a disk.
#![allow(dead_code, unreachable_pub, reason = "each test uses only some of the helpers")]
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

pub const MIB: usize = 1 << 20;
pub const ROUTES: [&str; 6] = ["uring-fixed-direct", "uring-direct", "pread-direct", "bounce", "uring-buffered", "buffered"];
/// Options for small segments, so that even small files have several.
pub const SMALL_SEGMENTS: [&str; 4] = ["--segment-size", "2MiB", "--window", "4MiB"];
/// The ID of a user without privileges.
pub const NOBODY: u32 = 65534;
/// A program that runs longer than this is considered hung.
const PATIENCE: Duration = Duration::from_secs(120);

/// Returns the folder for files that must be on a disk, not in memory, so that `O_DIRECT` reads
/// from storage.
pub fn base() -> &'static Path {
    let base = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(base).unwrap();
    base
}

/// Creates a folder for one test. Every user can enter the folder, and it is removed on drop.
pub fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir_in(base()).unwrap();
    allow(folder.path(), 0o755);
    folder
}

pub fn allow(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[allow(unused_imports, reason = "each test uses only some of the helpers")]
pub use dmaload_testing::{file, random_bytes};

/// Writes a file of random bytes.
pub fn random_file(folder: &Path, name: &str, len: usize) -> PathBuf {
    file(folder, name, &random_bytes(len, len as u64))
}

/// Writes a large file quickly. The file repeats 1 MiB of random bytes, but every sector begins
/// with a different number, so no two sectors are equal.
pub fn large_file(folder: &Path, name: &str, len: u64) -> PathBuf {
    const SECTOR: u64 = 512;
    let path = folder.join(name);
    let mut file = File::create(&path).unwrap();
    let mut block = random_bytes(MIB, len);
    let mut written = 0;
    while written < len {
        for (number, sector) in (written / SECTOR..).zip(block.chunks_exact_mut(512)) {
            sector[..8].copy_from_slice(&number.to_le_bytes());
        }
        let next = block.len().min(usize::try_from(len - written).unwrap());
        file.write_all(&block[..next]).unwrap();
        written += next as u64;
    }
    path
}

/// Writes a safetensors file with this header and `data` random bytes.
pub fn safetensors(folder: &Path, name: &str, header: &[u8], data: usize) -> PathBuf {
    file(folder, name, &dmaload_testing::safetensors(header, &random_bytes(data, 1)))
}

pub fn dmaload<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dmaload"));
    command.env_remove("DMALOAD_LOG").env("LC_ALL", "C").args(arguments);
    command
}

/// Returns a command that runs the given command under a limit set by the shell's `ulimit`, such
/// as `-n 12`.
pub fn limited(command: &Command, ulimit: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("ulimit {ulimit} && exec \"$@\""), "sh"]).arg(command.get_program()).args(command.get_args());
    shell.env_remove("DMALOAD_LOG").env("LC_ALL", "C");
    shell
}

/// Makes a command run as an unprivileged user. If this is impossible, the error says why.
pub fn as_nobody(mut command: Command) -> Result<Command, &'static str> {
    if !is_root() {
        return Err("only root can run a program as another user");
    }
    let reachable = dmaload(["--version"]).uid(NOBODY).gid(NOBODY).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !reachable.is_ok_and(|status| status.success()) {
        return Err("other users have no access to the build folder");
    }
    command.uid(NOBODY).gid(NOBODY);
    Ok(command)
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The result of running a program.
pub struct Done {
    pub command: String,
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

/// Runs a program until it exits, and kills it if it hangs.
pub fn run(command: &mut Command) -> Done {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    finish(format!("{command:?}"), child)
}

/// Like [`run`], for a program that is already running.
pub fn finish(command: String, child: Child) -> Done {
    let pid = Pid::from_child(&child);
    let (ended, wait) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        let hangs = wait.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout);
        if hangs {
            let _ = kill_process(pid, Signal::KILL);
        }
        hangs
    });
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    drop(ended);
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    let done = Done { command, code: status.code(), signal: status.signal(), stdout, stderr };
    assert!(!watchdog.join().unwrap(), "the program hung: {done}");
    done
}

/// A running program that is killed on drop, so that it ends with its test even if the test fails.
pub struct KilledOnDrop(Child);

impl KilledOnDrop {
    pub fn spawn(command: &mut Command) -> Self {
        KilledOnDrop(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }
}

impl std::ops::Deref for KilledOnDrop {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl std::ops::DerefMut for KilledOnDrop {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        // `kill` does nothing if the process was already waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Done {
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "exit status of {self}");
        self
    }

    /// Asserts that the exit status is 0 and that standard error is empty.
    #[track_caller]
    pub fn succeeds(self) -> Self {
        assert_eq!(self.stderr, "", "standard error of {self}");
        self.exits(0)
    }

    /// Asserts that the program failed with this exit status, and with all these words on standard
    /// error. Standard output must be empty or, with `--json`, contain one object with the same
    /// error.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) -> Self {
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is missing in standard error of {self}");
        }
        assert!(!self.stderr.contains("panicked"), "{self}");
        if self.command.contains("\"--json\"") && !self.command.contains("/dev/full") {
            let json = self.json();
            assert_eq!(json["exit_status"], code, "{self}");
            for reported in [&json["error"], &json["hint"]] {
                // Usage errors have several lines.
                let mut lines = reported.as_str().unwrap_or_default().lines();
                assert!(lines.all(|line| self.stderr.contains(line)), "{reported} is not on standard error of {self}");
            }
        } else {
            assert!(self.stdout.is_empty(), "standard output of {self}");
        }
        self.exits(code)
    }

    /// Parses standard output, which must be one JSON object.
    #[track_caller]
    pub fn json(&self) -> Value {
        let value: Value = serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self}"));
        assert!(value.is_object(), "{self}");
        value
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Done { command, code, signal, stdout, stderr } = self;
        let stdout = String::from_utf8_lossy(&stdout[..stdout.len().min(4000)]);
        write!(
            f,
            "{command}\nexit {code:?}, signal {signal:?}\nstdout ({} bytes):\n{stdout}\nstderr:\n{stderr}",
            self.stdout.len()
        )
    }
}

/// Loads a file from storage, even if it is cached, and returns the JSON.
#[track_caller]
pub fn load_json(path: &Path, arguments: &[&str]) -> Value {
    run(dmaload(["load", "--json", "--cache", "bypass"]).args(arguments).arg(path)).succeeds().json()
}

/// Returns the file's sha256 according to coreutils, which share no code with dmaload.
pub fn sha256sum(path: &Path) -> String {
    let done = run(Command::new("sha256sum").arg("--").arg(path)).succeeds();
    done.text().split_whitespace().next().unwrap().trim_start_matches('\\').to_owned()
}

/// Returns the digest of the first file in the JSON.
#[track_caller]
pub fn digest_of(json: &Value) -> &str {
    json["files"][0]["digest"]["hex"].as_str().unwrap_or_else(|| panic!("no digest: {json:#}"))
}

/// Returns why loads in this folder can't use this route, according to the kernel; `None` if they
/// can.
pub fn unavailable(route: &str, folder: &Path) -> Option<String> {
    let probe = random_file(folder, "probe", 10_000);
    let json = load_json(&probe, &["--route", route]);
    fs::remove_file(probe).unwrap();
    let fallback = json["fallbacks"].get(0)?;
    let (errno, reason) = (fallback["errno"].as_str()?, fallback["reason"].as_str()?);
    let excused = match errno {
        "EPERM" | "EACCES" | "ENOSYS" => reason.contains("io_uring"),
        "ENOMEM" => reason.contains("ulimit -l"),
        "EINVAL" | "EOPNOTSUPP" => reason.contains("O_DIRECT") || reason.contains("5.19"),
        _ => false,
    };
    assert!(excused, "unexpected fallback: {fallback}");
    Some(format!("{errno}: {reason}"))
}

/// Reports why a test is skipped on this machine. Writes to standard error directly, because the
/// test runner captures `println!`.
pub fn skip(reason: impl fmt::Display) {
    let name = thread::current().name().unwrap_or("?").to_owned();
    let _ = writeln!(io::stderr(), "skipped in {name}: {reason}");
}

/// Returns the kernel's estimate of the number of bytes that can still be allocated.
pub fn available_memory() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
}

pub fn free_disk(folder: &Path) -> u64 {
    let about = rustix::fs::statvfs(folder).unwrap();
    about.f_bavail * about.f_frsize
}

/// Returns why there is not enough room on the disk or in memory; `None` if there is enough.
pub fn no_room(folder: &Path, disk: u64, memory: u64) -> Option<String> {
    let (free, available) = (free_disk(folder), available_memory());
    (free < disk || available < memory)
        .then(|| format!("needs {disk} bytes of disk and {memory} of memory, but {free} and {available} are available"))
}
