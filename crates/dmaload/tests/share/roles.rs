//! Helper processes that serve and attach as other users.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Uid;

use crate::common::folder;

pub(crate) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: only root can run as another user");
    }
    root
}

/// Runs `task` as another user, on a new thread, because on Linux each thread has its own user ID.
pub(crate) fn as_user<T: Send>(user: u32, task: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let body = || {
            let user = Uid::from_raw(user);
            rustix::thread::set_thread_res_uid(user, user, user).unwrap();
            task()
        };
        scope.spawn(body).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Creates a folder that every user can use.
pub(crate) fn open_folder() -> tempfile::TempDir {
    let folder = folder();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    folder
}

/// Describes a helper process, which [`Role::start`] starts.
pub(crate) struct Role<'a> {
    pub(crate) name: &'a str,
    pub(crate) user: u32,
    /// The uid map of a new user namespace, or `None` if the process stays in the current
    /// namespace. An empty map maps no user.
    pub(crate) map: Option<&'a str>,
    /// Users that the server allows, or that the client trusts.
    pub(crate) named: &'a [u32],
    pub(crate) variables: Vec<(&'a str, String)>,
}

impl Role<'_> {
    pub(crate) fn start(&self, socket: &Path) -> Child {
        let exe = std::env::current_exe().unwrap();
        let mut command = match self.map {
            Some(_) => {
                let mut command = Command::new("unshare");
                command.args(["--user", "--", "sh", "-c", r#"read go; exec "$@""#, "sh"]).arg(exe);
                command
            }
            None => Command::new(exe),
        };
        let named = self.named.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        command.args(["--ignored", "--exact", self.name, "--nocapture", "--quiet"]).uid(self.user);
        command.env("DMALOAD_TEST_SOCKET", socket).env("DMALOAD_TEST_TRUST", &named).env("DMALOAD_TEST_ALLOW", &named);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        if let Some(map) = self.map {
            let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/user")).unwrap();
            let process = child.id().to_string();
            let deadline = Instant::now() + Duration::from_secs(10);
            while namespace(&process) == namespace("self") {
                assert!(Instant::now() < deadline, "unshare created no user namespace");
                std::thread::sleep(Duration::from_millis(1));
            }
            if !map.is_empty() {
                fs::write(format!("/proc/{process}/uid_map"), map).unwrap();
            }
            child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        }
        child
    }

    /// Runs the process and returns the last line it prints that starts with `digest` or `error`.
    pub(crate) fn outcome(&self, socket: &Path) -> String {
        let output = self.start(socket).wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let outcome = text.lines().rfind(|line| line.starts_with("digest") || line.starts_with("error"));
        outcome.unwrap_or_else(|| panic!("{} as {}: {text:?} {:?}", self.name, self.user, output.status)).to_owned()
    }
}

/// A server process, which is stopped on drop.
pub(crate) struct Serving {
    pub(crate) child: Child,
    pub(crate) lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Serving {
    pub(crate) fn start(role: &Role<'_>, socket: &Path) -> (Self, String) {
        let mut child = role.start(socket);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = lines.by_ref().map(|line| line.unwrap()).find(|line| line.starts_with("ready") || line.starts_with("error"));
        (Serving { child, lines }, first.unwrap_or_else(|| panic!("the server run by user {} ended early", role.user)))
    }

    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Stops the server and returns its last line, which has the numbers of served and refused
    /// clients.
    pub(crate) fn end(mut self) -> String {
        drop(self.child.stdin.take());
        let last = self.lines.by_ref().map(|line| line.unwrap()).find(|line| line.starts_with("ended"));
        assert!(self.child.wait().unwrap().success());
        last.unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Returns a user that no other test uses, because all servers that a user runs share that user's
/// limit on descriptors in flight.
pub(crate) fn fresh_user() -> u32 {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    100_000 + 16 * std::process::id() + COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

pub(crate) const ALICE: u32 = 4001;
pub(crate) const BOB: u32 = 4002;
pub(crate) const MALLORY: u32 = 4003;
pub(crate) const STRANGER: u32 = 4004;
pub(crate) const NOBODY: u32 = 65534;
pub(crate) const ALL: &str = "0 0 4294967295";
