//! What must not stay behind when the bench is interrupted: its processes and its memory groups.
//!
//! Processes are known by descriptors (`pidfd_open(2)`), which never come to mean another process. A kernel without them
//! (before 5.3) leaves the processes to find out by themselves: their standard input ends.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::scratch;

/// What exists now.
static ALIVE: Mutex<Alive> = Mutex::new(Alive { processes: BTreeMap::new(), groups: BTreeSet::new() });
/// A group can be removed a moment after its last process has gone.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

struct Alive {
    processes: BTreeMap<u32, OwnedFd>,
    groups: BTreeSet<PathBuf>,
}

/// Every change to it is one call, so a thread that panicked has left it whole.
fn alive() -> MutexGuard<'static, Alive> {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sees to it that an interrupt leaves nothing behind.
pub(crate) fn remove_on_interrupt() {
    scratch::before_an_interrupt_ends(|| {
        // Held until the end: what is started from here on would be left behind.
        let alive = alive();
        for process in alive.processes.values() {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
        for group in &alive.groups {
            remove(group);
        }
        std::mem::forget(alive);
    });
}

/// Starts a process that an interrupt ends. [`ended`] must be told of its end.
///
/// # Errors
/// When it can't be started.
pub(crate) fn start(command: &mut Command) -> io::Result<Child> {
    let mut alive = alive();
    let child = command.spawn()?;
    if let Ok(process) = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
        alive.processes.insert(child.id(), process);
    }
    Ok(child)
}

/// A process has been waited for.
pub(crate) fn ended(child: &Child) {
    alive().processes.remove(&child.id());
}

/// Makes a group's folder, to be removed by [`remove_group`] or an interrupt.
///
/// # Errors
/// When it can't be made.
pub(crate) fn make_group(folder: &Path) -> io::Result<()> {
    let mut alive = alive();
    fs::create_dir(folder)?;
    alive.groups.insert(folder.to_owned());
    Ok(())
}

/// Removes a group's folder.
pub(crate) fn remove_group(folder: &Path) {
    remove(folder);
    alive().groups.remove(folder);
}

fn remove(folder: &Path) {
    for _ in 0..TRIES {
        match fs::remove_dir(folder) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => thread::sleep(PAUSE),
            // Nobody is left to be told.
            _ => return,
        }
    }
}
