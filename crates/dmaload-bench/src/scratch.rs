//! A large temporary file on a disk with enough free space. It is removed on drop and on a signal.
//!
//! - **On a disk.** `/tmp` is often a tmpfs. Reading from it would measure memory, `O_DIRECT` is
//!   refused or emulated, and a few GiB may invoke the OOM killer. The file system of each folder
//!   is therefore checked first.
//! - **With enough space.** A demo must not fill up a file system. The free space is therefore
//!   checked before the first byte is written, and a tenth of it stays free.
//! - **With a name.** A nameless file (`O_TMPFILE`) would need no cleanup, but loaders choose the
//!   format by the file's extension, and other programs need a path. The file therefore
//!   has a name, and a signal thread removes it on SIGHUP, SIGINT or SIGTERM. A process that is
//!   terminated differently, for example by SIGKILL, may leave it behind. The name `dmaload-PID-…`
//!   makes it easy to find.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Mutex, MutexGuard, Once, OnceLock, PoisonError};
use std::thread;

use dmabuf::printable;
use dmaload_text::bytes;
use dmaload_text::{FileError, ForPath, Named};
use rustix::fs::{Access, FsWord, StatFs, access, statfs};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

/// File systems that keep their files in memory, with their `f_type` in `statfs(2)`.
const IN_MEMORY: &[(FsWord, &str)] =
    &[(0x0102_1994, "tmpfs"), (0x8584_58F6_u32 as FsWord, "ramfs"), (0x9584_58F6_u32 as FsWord, "hugetlbfs")];

/// The scratch files that currently exist. The signal thread removes them.
static ALIVE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// The hook to run when a signal ends the process, before the files are removed.
static BEFORE_EXIT: OnceLock<fn()> = OnceLock::new();

/// Registers a function to call when a signal ends the process. Only the first registration
/// has an effect.
pub fn before_an_interrupt_ends(hook: fn()) {
    let _ = BEFORE_EXIT.set(hook);
    remove_on_signals();
}

/// A file that is removed on drop, or when the process is interrupted.
#[derive(Debug)]
pub struct ScratchFile {
    path: PathBuf,
    /// The created file. Its bytes are written through this descriptor, never by path: in a folder
    /// that others can write to, the path may refer to another file by the time it is opened
    /// again.
    file: File,
}

/// Why a scratch file could not be created.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// No folder is suitable. The message lists each folder with the reason.
    #[error("cannot create a scratch file of {}{}\nuse another folder, or set TMPDIR", bytes(*.wanted), Reasons(.refused))]
    NoFolder {
        /// The number of bytes that the file needs.
        wanted: u64,
        /// The folders that were tried, and why each was refused.
        refused: Vec<(PathBuf, Refusal)>,
    },
    /// The folder seemed suitable, but the file could not be created.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Why a folder is not suitable.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The folder is in memory, so reading from it would measure memory.
    #[error("is in memory ({0})")]
    InMemory(&'static str),
    /// The folder does not have enough free space.
    #[error("has {} free for this user, a tenth of which must stay free", bytes(*.0))]
    NoRoom(u64),
    /// The folder can't be inspected or written to.
    #[error("{}", Named(.0))]
    Unusable(io::Error),
}

struct Reasons<'a>(&'a [(PathBuf, Refusal)]);

impl fmt::Display for Reasons<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(folder, refusal)| write!(f, "\n  {}: {refusal}", printable::path(&folder)))
    }
}

impl ScratchFile {
    /// Creates an empty scratch file on a disk with room for `length` bytes. The file is created
    /// in `folder` or, if none is given, in the first suitable folder among `$TMPDIR` (or `/tmp`),
    /// `/var/tmp` and the current folder. Its name ends with `suffix`, such as
    /// `"demo.safetensors"`.
    ///
    /// An unsuitable `folder` is an error: it is never silently replaced.
    ///
    /// # Errors
    /// If no folder is suitable, or the file can't be created.
    pub fn create(folder: Option<&Path>, suffix: &str, length: u64) -> Result<Self, ScratchError> {
        let candidates = folder.map_or_else(usual_folders, |folder| vec![folder.to_owned()]);
        let folder = choose(candidates, length)?;
        Ok(Self::create_in(&folder, suffix)?)
    }

    /// Creates an empty scratch file in `folder`, an absolute path. The folder is not checked: it
    /// may be in memory or full.
    ///
    /// # Errors
    /// If the file can't be created.
    pub fn create_in(folder: &Path, suffix: &str) -> Result<Self, FileError> {
        remove_on_signals();
        let mut alive = lock_alive();
        let path = free_name(folder, suffix, &alive);
        let file = OpenOptions::new().write(true).create_new(true).open(&path).for_path("create", &path)?;
        alive.insert(path.clone());
        Ok(Self { path, file })
    }

    /// The open file, for writing.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file's absolute path, which stays valid if the working directory changes.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        if lock_alive().remove(&self.path) {
            // A failure is ignored: nothing could report it, and the file may already be gone.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Returns the folders to try. The first is `$TMPDIR`, or `/tmp` if it is not set.
fn usual_folders() -> Vec<PathBuf> {
    let mut folders = vec![env::temp_dir(), PathBuf::from("/var/tmp"), PathBuf::from(".")];
    folders.dedup();
    folders
}

fn choose(candidates: Vec<PathBuf>, wanted: u64) -> Result<PathBuf, ScratchError> {
    let mut refused = Vec::new();
    for folder in candidates {
        match examine(&folder, wanted) {
            Ok(folder) => return Ok(folder),
            Err(refusal) => refused.push((folder, refusal)),
        }
    }
    Err(ScratchError::NoFolder { wanted, refused })
}

/// Returns the folder's absolute path if it is on a disk, has enough space and can be written to.
fn examine(folder: &Path, wanted: u64) -> Result<PathBuf, Refusal> {
    let folder = fs::canonicalize(folder).map_err(Refusal::Unusable)?;
    let about = statfs(&folder).map_err(|errno| Refusal::Unusable(errno.into()))?;
    if let Some(name) = in_memory_name(&about) {
        return Err(Refusal::InMemory(name));
    }
    let free = about.f_bavail.saturating_mul(u64::try_from(about.f_bsize).unwrap_or(0));
    if wanted > free - free / 10 {
        return Err(Refusal::NoRoom(free));
    }
    access(&folder, Access::WRITE_OK).map_err(|errno| Refusal::Unusable(errno.into()))?;
    Ok(folder)
}

fn free_name(folder: &Path, suffix: &str, alive: &BTreeSet<PathBuf>) -> PathBuf {
    (0_u32..)
        .map(|n| folder.join(OsString::from(format!("dmaload-{}-{n}-{suffix}", process::id()))))
        .find(|path| !alive.contains(path) && !path.exists())
        .expect("a process creates fewer than 2^32 scratch files")
}

/// Locks [`ALIVE`]. Ignores poisoning: every change is a single call, so a panicking thread leaves
/// the set consistent.
fn lock_alive() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the thread that removes the existing files when a signal ends the process, unless it was
/// already started. If it can't be started, the files are still removed on drop.
fn remove_on_signals() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let Ok(mut signals) = Signals::new(handled_signals()) else { return };
        let watch = move || {
            if let Some(signal) = signals.forever().next() {
                if let Some(hook) = BEFORE_EXIT.get() {
                    hook();
                }
                // The lock is held until the process ends, so no file can be created and left
                // behind.
                let alive = lock_alive();
                for path in alive.iter() {
                    let _ = fs::remove_file(path);
                }
                // Let the signal itself end the process, so a shell sees that it was interrupted.
                let _ = emulate_default_handler(signal);
            }
        };
        let _ = thread::Builder::new().name("dmaload-signals".into()).spawn(watch);
    });
}

/// Returns the signals that ask a process to exit, except those that this process ignores.
/// `nohup`, and shells that start background jobs, make a process ignore signals on purpose; a
/// handler would undo that.
fn handled_signals() -> impl Iterator<Item = i32> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    [SIGHUP, SIGINT, SIGTERM].into_iter().filter(move |signal| ignored >> (signal - 1) & 1 == 0)
}

/// Returns the file system's name if it keeps its files in memory.
fn in_memory_name(about: &StatFs) -> Option<&'static str> {
    IN_MEMORY.iter().find(|&&(magic, _)| magic == about.f_type).map(|&(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source_folder() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR"))
    }

    #[test]
    fn scratch_file_exists_until_dropped() {
        let file = ScratchFile::create(Some(source_folder()), "a.safetensors", 4096).unwrap();
        let path = file.path().to_owned();
        assert!(path.is_absolute() && path.exists());
        assert_eq!(path.extension().unwrap(), "safetensors");
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn two_scratch_files_have_different_names() {
        let one = ScratchFile::create(Some(source_folder()), "b", 0).unwrap();
        let two = ScratchFile::create(Some(source_folder()), "b", 0).unwrap();
        assert_ne!(one.path(), two.path());
    }

    #[test]
    fn folder_on_an_in_memory_file_system_is_refused() {
        if !Path::new("/dev/shm").is_dir() {
            return;
        }
        let error = ScratchFile::create(Some(Path::new("/dev/shm")), "d", 1).unwrap_err();
        assert!(error.to_string().contains("/dev/shm: is in memory (tmpfs)"), "{error}");
    }

    #[test]
    fn full_disk_is_detected_before_the_first_byte() {
        let error = ScratchFile::create(Some(source_folder()), "e", u64::MAX / 2).unwrap_err().to_string();
        assert!(error.starts_with("cannot create a scratch file of 8.00 EiB\n"), "{error}");
        assert!(error.contains(" free for this user"), "{error}");
    }

    #[test]
    fn error_lists_every_folder_tried() {
        let folders = vec![PathBuf::from("/nonexistent/one"), PathBuf::from("/nonexistent/two")];
        let error = choose(folders, 1).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/one: ENOENT (No such file or directory)\n"), "{error}");
        assert!(error.contains("/nonexistent/two: "), "{error}");
    }

    /// Starts this test binary again, as a process that can be interrupted.
    #[test]
    fn interrupt_removes_the_file_and_ends_by_the_signal() {
        use std::io::BufRead as _;
        use std::os::unix::process::ExitStatusExt as _;

        let mut child = process::Command::new(env::current_exe().unwrap())
            .args(["--exact", "scratch::tests::waits_to_be_interrupted", "--ignored", "--nocapture"])
            .stdout(process::Stdio::piped())
            .spawn()
            .unwrap();
        let output = io::BufReader::new(child.stdout.take().unwrap());
        let line = output.lines().map(Result::unwrap).find(|line| line.contains("SCRATCH=")).unwrap();
        let path = PathBuf::from(line.split_once("SCRATCH=").unwrap().1);
        assert!(path.exists());

        let id = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(SIGINT));
        assert!(!path.exists());
    }

    #[test]
    #[ignore = "run by the test above, in a separate process"]
    fn waits_to_be_interrupted() {
        let file = ScratchFile::create(Some(source_folder()), "interrupted", 0).unwrap();
        println!("SCRATCH={}", printable::path(&file.path()));
        thread::sleep(std::time::Duration::from_secs(60));
    }
}
