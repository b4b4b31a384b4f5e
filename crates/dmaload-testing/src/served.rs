//! File systems in user space (FUSE) whose server may never answer.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Tells a test program that it is the server, and of which folder.
const SERVED_FOLDER: &str = "DMALOAD_TEST_SERVED_FOLDER";
const PATIENCE: Duration = Duration::from_secs(20);

/// A folder that a process of its own serves: this same test program, in which only one ignored test runs.
///
/// When this is dropped, the process is killed, and every call that waits for it fails.
#[derive(Debug)]
pub struct ServedFolder {
    server: Child,
    folder: TempDir,
}

impl ServedFolder {
    /// Starts the server, and waits until it has mounted. `test` is the name of the ignored test that does so; it gets the
    /// folder from [`folder_to_serve`], and has these variables in its environment.
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
            assert!(start.elapsed() < PATIENCE, "the file system is not mounted");
            std::thread::sleep(Duration::from_millis(5));
        }
        served
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for ServedFolder {
    fn drop(&mut self) {
        // With its server the connection ends, and all that waits for it.
        let ended = self.server.kill().and_then(|()| self.server.wait());
        let unmounted = Command::new("umount").arg("-l").arg(self.folder.path()).status();
        assert!(ended.is_ok() && unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// In the server's process: the folder to mount at. Elsewhere `None`.
#[must_use]
pub fn folder_to_serve() -> Option<PathBuf> {
    std::env::var_os(SERVED_FOLDER).map(PathBuf::from)
}
