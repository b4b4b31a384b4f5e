//! A listening socket at a path whose folders other users can change while the socket is being
//! created or removed.
//!
//! The owner of a folder can replace any file in it at any time, even with a symbolic link to
//! another user's file. Therefore the path is resolved once, to the socket's folder, and every
//! later step uses descriptors:
//!
//! 1. A private folder is created next to the socket: `.NAME.dmaload`, mode 0700, owned by this
//!    user. Others cannot change its contents, even if they rename it. The folder is locked
//!    (`flock`), which excludes all other servers at this path.
//! 2. The socket is bound in this folder, its mode is set, and it starts to listen.
//! 3. The socket is moved into place, which fails if another file is there. An existing file is
//!    replaced only if it is a socket that refuses connections.
//!
//! When the server is dropped, the socket is removed under the same lock, and only if its inode is
//! this server's, because another server may have taken the path in the meantime.
//!
//! Requires procfs or permission to `unshare(CLONE_FS)`, because Linux has no `bindat`. The path
//! can be longer than the 107 bytes that fit into a socket address; clients then need procfs.
#![allow(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, Stat, chmod, fchmod, flock, fstat, linkat, mkdirat, open,
    openat, renameat, renameat_with, stat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use rustix::process::{fchdir, geteuid, umask};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::support::errno::describe;
use crate::support::foreign;

/// How long a server waits for another one that is being created or removed at the same path,
/// which usually takes about a millisecond.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// Maximum number of connections waiting to be accepted.
const BACKLOG: i32 = 128;
/// The socket's name in the private folder before it is moved into place.
const FRESH: &str = "socket";
/// The name in the private folder of a file that was moved away from the socket's path.
const TAKEN: &str = "taken";

/// A file's device and inode number. A bound socket keeps its file's inode, so the number is not
/// reused while the socket is open, even if the file was removed.
type SocketIdentity = (u64, u64);

/// A listening socket, and where it is in the file system.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: OwnedFd,
    folder: OwnedFd,
    name: OsString,
    identity: SocketIdentity,
}

/// A completed step of [`Listener::bind`]. Tests change the folder after each step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BindStep {
    MadeFolder,
    Bound,
    Found,
    Ready,
    Placed,
}

impl Listener {
    /// Listens at a path. `mode` is the mode of the socket, which decides who may connect.
    ///
    /// # Errors
    /// A reason to append to the path.
    pub(super) fn bind(socket: OwnedFd, path: &Path, mode: Mode) -> Result<Self, String> {
        Listener::bind_step_by_step(socket, path, mode, &mut |_| {})
    }

    fn bind_step_by_step(socket: OwnedFd, path: &Path, mode: Mode, after: &mut dyn FnMut(BindStep)) -> Result<Self, String> {
        let (folder, name) = open_folder(path)?;
        let private = PrivateFolder::enter(&folder, &name)?;
        after(BindStep::MadeFolder);
        // Binding gives the socket's file this mode, minus the umask. The umask belongs to the
        // whole process, so it must not be changed here.
        fchmod(&socket, mode).map_err(cannot("set the mode of a socket"))?;
        private.bind(&socket).map_err(cannot("bind a socket"))?;
        after(BindStep::Bound);
        let file = openat(&private.fd, FRESH, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let file = file.map_err(cannot("find the bound socket"))?;
        let found = fstat(&file).map_err(cannot("find the bound socket"))?;
        // Only a malicious file system can show another file in a private folder.
        if !is_socket(&found) || found.st_uid != geteuid().as_raw() {
            return Err("cannot bind a socket: this file system shows another file in its place".to_owned());
        }
        after(BindStep::Found);
        if Mode::from_raw_mode(found.st_mode) & Mode::from_raw_mode(0o777) != mode {
            // The path leads through procfs to the descriptor, so the call changes the file that
            // was checked, never a link's target.
            chmod(proc_path(&file), mode).map_err(cannot("set the socket's mode"))?;
        }
        listen(&socket, BACKLOG).map_err(cannot("listen"))?;
        after(BindStep::Ready);
        private.move_socket_to_place()?;
        after(BindStep::Placed);
        let identity = identity(&found);
        drop(private);
        Ok(Listener { socket, folder, name, identity })
    }

    /// Checks that a server could be bound at this path now.
    ///
    /// # Errors
    /// A reason to append to the path.
    pub(super) fn check(path: &Path) -> Result<(), String> {
        let (folder, name) = open_folder(path)?;
        PrivateFolder::enter(&folder, &name)?.find_dead_socket().map(|_| ())
    }

    /// Removes the socket, unless another one has taken its place.
    fn remove(&self) -> Result<(), String> {
        if !self.is_in_place() {
            return Ok(());
        }
        let private = PrivateFolder::enter(&self.folder, &self.name)?;
        if self.is_in_place() {
            private.remove_if(self.identity)?;
        }
        Ok(())
    }

    fn is_in_place(&self) -> bool {
        statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|found| identity(&found) == self.identity)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(reason) = self.remove() {
            foreign::emit(|| {
                let reason = reason.as_str();
                tracing::warn!(socket = ?self.name, reason, "a server left its socket behind");
            });
        }
    }
}

/// Connects to a socket at a path, which can be longer than a socket address.
pub(super) fn connect_to(socket: &OwnedFd, path: &Path) -> Result<(), Errno> {
    match SocketAddrUnix::new(path) {
        Ok(address) => connect(socket, &address),
        Err(Errno::NAMETOOLONG) => {
            let file = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            connect(socket, &SocketAddrUnix::new(proc_path(&file))?)
        }
        Err(errno) => Err(errno),
    }
}

fn cannot(what: &'static str) -> impl Fn(Errno) -> String {
    move |errno| format!("cannot {what}: {}", describe(errno))
}

fn identity(found: &Stat) -> SocketIdentity {
    #[allow(clippy::useless_conversion, reason = "the types of these fields depend on the architecture")]
    (found.st_dev.into(), found.st_ino.into())
}

fn is_socket(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::Socket
}

pub(super) fn new_socket() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

/// Opens the folder that contains the socket. After this, the path is no longer used.
fn open_folder(path: &Path) -> Result<(OwnedFd, OsString), String> {
    let name = path.file_name().ok_or("cannot create a socket there: the path has no file name")?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    Ok((folder.map_err(cannot("open the folder of the socket"))?, name.to_owned()))
}

/// A path that the kernel resolves to the descriptor's file, whatever its current name.
fn proc_path(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Whether [`proc_path`] works, that is, whether procfs is mounted for this PID namespace.
fn has_proc(file: &OwnedFd) -> bool {
    fstat(file).is_ok_and(|own| stat(proc_path(file)).is_ok_and(|seen| identity(&seen) == identity(&own)))
}

/// Runs `task` on a thread with this folder as its working directory and an empty umask, without
/// affecting the rest of the process.
fn run_in_folder(folder: &OwnedFd, task: impl FnOnce() -> Result<(), Errno> + Send) -> Result<(), Errno> {
    let body = || {
        // SAFETY: the call is unsafe because of `UnshareFlags::FILES`, which is not set: only the
        // working directory, the root and the umask become private to the thread, and descriptors
        // stay shared.
        unsafe { unshare_unsafe(UnshareFlags::FS) }?;
        fchdir(folder)?;
        umask(Mode::empty());
        task()
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("dmaload-bind".to_owned()).spawn_scoped(scope, body);
        let thread = thread.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A folder next to the socket that only this user can change and only one server holds at a time.
struct PrivateFolder<'a> {
    parent: &'a OwnedFd,
    /// The socket's name.
    socket: &'a OsStr,
    name: OsString,
    fd: OwnedFd,
}

impl<'a> PrivateFolder<'a> {
    fn enter(parent: &'a OwnedFd, socket: &'a OsStr) -> Result<Self, String> {
        let mut name = OsString::from(".");
        name.push(socket);
        name.push(".dmaload");
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match mkdirat(parent, &name, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(cannot("create a private folder next to the socket")(errno)),
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match openat(parent, &name, flags, Mode::empty()) {
                Ok(fd) => {
                    let found = fstat(&fd).map_err(cannot("inspect the private folder"))?;
                    if found.st_uid != geteuid().as_raw() || found.st_mode & 0o077 != 0 {
                        return Err(format!(
                            "cannot use {name:?} next to the socket: it is not a private folder owned by this user"
                        ));
                    }
                    if lock(&fd)? && is_same(parent, &name, &found) {
                        let private = PrivateFolder { parent, socket, name, fd };
                        private.clear()?;
                        return Ok(private);
                    }
                }
                // The server that held the folder has removed it.
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(format!("cannot use {name:?} next to the socket: {}", describe(errno))),
            }
            if Instant::now() >= deadline {
                return Err(format!("cannot lock {name:?} next to the socket: other servers held it for {LOCK_PATIENCE:?}"));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Removes sockets left behind by a server that was killed while it held the folder.
    fn clear(&self) -> Result<(), String> {
        for name in [FRESH, TAKEN] {
            match statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(found) if is_socket(&found) => {
                    unlinkat(&self.fd, name, AtFlags::empty()).map_err(cannot("clear the private folder"))?;
                }
                Ok(_) => return Err(format!("cannot use {:?} next to the socket: it contains a file, {name:?}", self.name)),
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(cannot("inspect the private folder")(errno)),
            }
        }
        Ok(())
    }

    fn bind(&self, socket: &OwnedFd) -> Result<(), Errno> {
        if has_proc(&self.fd) {
            return bind(socket, &SocketAddrUnix::new(format!("{}/{FRESH}", proc_path(&self.fd)))?);
        }
        let address = SocketAddrUnix::new(FRESH)?;
        run_in_folder(&self.fd, || bind(socket, &address))
    }

    /// Moves the new socket into place.
    fn move_socket_to_place(&self) -> Result<(), String> {
        // Before each retry, a dead socket is removed from the place, so all attempts fail only if
        // other sockets keep appearing there.
        for _ in 0..8 {
            match self.move_to_place(FRESH) {
                Ok(()) => return Ok(()),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(cannot("move the socket into place")(errno)),
            }
            if let Some(dead) = self.find_dead_socket()? {
                self.remove_if(dead)?;
            }
        }
        Err("cannot move the socket into place: other sockets keep appearing there".to_owned())
    }

    /// Moves a file from the private folder to the socket's path.
    fn move_to_place(&self, name: &str) -> Result<(), Errno> {
        match renameat_with(&self.fd, name, self.parent, self.socket, RenameFlags::NOREPLACE) {
            // Some file systems do not support this flag. On those, create a hard link, which does
            // not replace an existing file either.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                linkat(&self.fd, name, self.parent, self.socket, AtFlags::empty())?;
                unlinkat(&self.fd, name, AtFlags::empty())
            }
            moved => moved,
        }
    }

    /// Identifies a dead socket at the socket's path; `None` if nothing is there.
    ///
    /// # Errors
    /// The reason, for example that something other than a dead socket is in this place.
    fn find_dead_socket(&self) -> Result<Option<SocketIdentity>, String> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(self.parent, self.socket, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(cannot("inspect the existing file")(errno)),
        };
        let found = fstat(&file).map_err(cannot("inspect the existing file"))?;
        if !is_socket(&found) {
            return Err("cannot create a socket there: a file that is not a socket has this name".to_owned());
        }
        let socket = new_socket().map_err(cannot("create a socket"))?;
        let connected = if has_proc(&file) {
            SocketAddrUnix::new(proc_path(&file)).and_then(|address| connect(&socket, &address))
        } else {
            SocketAddrUnix::new(Path::new(self.socket))
                .and_then(|address| run_in_folder(self.parent, || connect(&socket, &address)))
        };
        match connected {
            Err(Errno::CONNREFUSED) => Ok(Some(identity(&found))),
            // A listener accepted the connection, uses another type of socket, or has a full
            // backlog.
            Ok(()) | Err(Errno::PROTOTYPE | Errno::AGAIN) => Err("another process is listening there".to_owned()),
            Err(errno) => Err(cannot("check whether another process is listening there")(errno)),
        }
    }

    /// Removes the file at the socket's path if it is `expected`. The file is checked only after
    /// it has been moved into the private folder, so no other file is removed, even if a program
    /// that ignores the lock replaces it.
    fn remove_if(&self, expected: SocketIdentity) -> Result<(), String> {
        match renameat(self.parent, self.socket, &self.fd, TAKEN) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(cannot("move the existing file away")(errno)),
        }
        let found = statat(&self.fd, TAKEN, AtFlags::SYMLINK_NOFOLLOW).map_err(cannot("inspect the moved file"))?;
        if identity(&found) == expected {
            return unlinkat(&self.fd, TAKEN, AtFlags::empty()).map_err(cannot("remove a socket"));
        }
        self.move_to_place(TAKEN).map_err(|errno| {
            format!("cannot move back another process's file, which is now in {:?}: {}", self.name, describe(errno))
        })
    }
}

impl Drop for PrivateFolder<'_> {
    fn drop(&mut self) {
        // The socket is still in this folder only if an earlier step failed.
        let _ = unlinkat(&self.fd, FRESH, AtFlags::empty());
        // The folder is removed while it is locked: the lock is released only when the descriptor
        // is closed, after this function.
        if let Err(errno) = unlinkat(self.parent, &self.name, AtFlags::REMOVEDIR) {
            foreign::emit(|| tracing::debug!(folder = ?self.name, errno = %describe(errno), "a private folder was left behind"));
        }
    }
}

/// Tries to take the lock without waiting, and returns whether that succeeded.
fn lock(fd: &OwnedFd) -> Result<bool, String> {
    match flock(fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(false),
        Err(errno) => Err(cannot("lock the private folder")(errno)),
    }
}

/// Whether the name still refers to this file.
fn is_same(folder: &OwnedFd, name: &OsStr, file: &Stat) -> bool {
    statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|found| identity(&found) == identity(file))
}

#[cfg(test)]
mod tests;
