//! FUSE file systems whose servers may never answer. The servers run in separate processes.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Tells the server process where to mount its file system.
const SERVED_FOLDER: &str = "DMALOAD_TEST_SERVED_FOLDER";
/// How long a server may take to mount its file system.
const PATIENCE: Duration = Duration::from_secs(20);

/// A FUSE mount whose server runs in another process. That process executes this test program
/// again, but runs only a single ignored test.
///
/// A call that waits for a server in its own process could keep that process alive forever.
/// Dropping this value kills the server, which fails every call that waits for it, and unmounts
/// the file system.
#[derive(Debug)]
pub struct ServedFolder {
    server: Child,
    folder: TempDir,
}

impl ServedFolder {
    /// Starts the server and waits until it has mounted `folder`.
    ///
    /// `test` is the full name of the ignored test that mounts the file system. That test gets the
    /// folder from [`folder_to_serve`], and finds `variables` in its environment.
    pub fn start<'a>(folder: TempDir, test: &str, variables: impl IntoIterator<Item = (&'a str, &'a OsStr)>) -> Self {
        let server = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", test])
            .env(SERVED_FOLDER, folder.path())
            .envs(variables)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let served = ServedFolder { server, folder };
        let start = Instant::now();
        while !std::fs::read_to_string("/proc/self/mounts").unwrap().contains(served.path().to_str().unwrap()) {
            assert!(start.elapsed() < PATIENCE, "the server did not mount the file system");
            std::thread::sleep(Duration::from_millis(5));
        }
        served
    }

    /// Returns the folder at which the file system is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for ServedFolder {
    fn drop(&mut self) {
        let ended = self.server.kill().and_then(|()| self.server.wait());
        let unmounted = Command::new("umount").arg("-l").arg(self.folder.path()).status();
        assert!(ended.is_ok() && unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// Returns the folder at which this process should mount its file system, or `None` if it is not a
/// server process.
#[must_use]
pub fn folder_to_serve() -> Option<PathBuf> {
    std::env::var_os(SERVED_FOLDER).map(PathBuf::from)
}
