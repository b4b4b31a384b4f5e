//! Kills the bench's processes and removes its cgroups when the bench is interrupted.
//!
//! Processes are identified by pidfds (`pidfd_open(2)`), which never refer to another process,
//! even if the ID is reused. On kernels before 5.3, which lack pidfds, the processes exit on their
//! own when their standard input ends.

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

/// The processes and groups that currently exist.
static ALIVE: Mutex<Alive> = Mutex::new(Alive { processes: BTreeMap::new(), groups: BTreeSet::new() });
/// How many times to try to remove a group. With a [`PAUSE`] after each attempt, this is 2 s.
/// The kernel refuses to remove a group until shortly after the last process in it has exited.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

struct Alive {
    processes: BTreeMap<u32, OwnedFd>,
    groups: BTreeSet<PathBuf>,
}

/// Locks [`ALIVE`]. Ignores poisoning: every change is a single call, so a panicking thread leaves
/// the state consistent.
fn lock_alive() -> MutexGuard<'static, Alive> {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Registers a hook that kills the processes and removes the groups on an interrupt.
pub(crate) fn remove_on_interrupt() {
    scratch::before_an_interrupt_ends(|| {
        // The lock is held until the process ends, so nothing new can be started and left behind.
        let alive = lock_alive();
        for process in alive.processes.values() {
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
        for group in &alive.groups {
            remove(group);
        }
        std::mem::forget(alive);
    });
}

/// Starts a process that is killed on an interrupt. Call [`forget_process`] once the process has
/// exited.
///
/// # Errors
/// If the process can't be started.
pub(crate) fn start(command: &mut Command) -> io::Result<Child> {
    let mut alive = lock_alive();
    let child = command.spawn()?;
    if let Ok(process) = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
        alive.processes.insert(child.id(), process);
    }
    Ok(child)
}

/// Stops tracking a process that has been waited for.
pub(crate) fn forget_process(child: &Child) {
    lock_alive().processes.remove(&child.id());
}

/// Creates a group's folder, to be removed by [`remove_group`] or on an interrupt.
///
/// # Errors
/// If the folder can't be created.
pub(crate) fn make_group(folder: &Path) -> io::Result<()> {
    let mut alive = lock_alive();
    fs::create_dir(folder)?;
    alive.groups.insert(folder.to_owned());
    Ok(())
}

/// Removes a group's folder.
pub(crate) fn remove_group(folder: &Path) {
    remove(folder);
    lock_alive().groups.remove(folder);
}

fn remove(folder: &Path) {
    for _ in 0..TRIES {
        match fs::remove_dir(folder) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => thread::sleep(PAUSE),
            // Any other failure is ignored, because nothing could report it.
            _ => return,
        }
    }
}
