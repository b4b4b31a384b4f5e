//! A socket that listens at a path, in folders that other users can change while it is made and
//! removed.
//!
//! The owner of a folder can replace any name in it at any time, by a symbolic link to somebody
//! else's file too. So a path is resolved once, to the folder, and everything after that goes by
//! descriptor:
//!
//! 1. A private folder is made beside the socket: `.NAME.dmaload`, mode 0700, of this user.
//!    Others cannot change what is in it, whatever they do to its name. It is locked (`flock`),
//!    and serves as the lock of all servers at this path.
//! 2. The socket is bound, given its mode and made to listen in there.
//! 3. It is moved to its place, which fails if something is there. What is there is replaced only
//!    if it is a socket that refuses connections.
//!
//! At the end the socket is removed under the same lock, and only if it is this server's own by
//! its inode: another server may have taken the path meanwhile.
//!
//! Requires procfs, or the permission to `unshare(CLONE_FS)`: there is no `bindat`. The path can
//! be longer than the 107 bytes that fit into an address.
#![allow(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use dmabuf::errno::describe;
use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, Stat, chmod, fchmod, flock, fstat, linkat, mkdirat, open,
    openat, renameat, renameat_with, stat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use rustix::process::{fchdir, geteuid, umask};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::support::foreign;

/// How long a server waits for another one that is made or removed at the same path, which takes
/// a millisecond.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// Connections that the kernel keeps for the server to accept.
const BACKLOG: i32 = 128;
/// The socket's name in the private folder, before it is moved to its place.
const FRESH: &str = "socket";
/// The name in the private folder of what was taken from the place.
const TAKEN: &str = "taken";

/// Which file it is. While a socket is open its inode is not used again.
type Identity = (u64, u64);

/// A listening socket, and where it is.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: OwnedFd,
    folder: OwnedFd,
    name: OsString,
    identity: Identity,
}

/// What [`Listener::bind`] has just done; tests change the folder then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    MadeFolder,
    Bound,
    Found,
    Ready,
    Placed,
}

impl Listener {
    /// Listens at a path; other users may connect if they are allowed to by `mode`.
    ///
    /// # Errors
    /// A reason to append to the path.
    pub(super) fn bind(path: &Path, mode: Mode) -> Result<Self, String> {
        Listener::bind_step_by_step(path, mode, &mut |_| {})
    }

    fn bind_step_by_step(path: &Path, mode: Mode, after: &mut dyn FnMut(Step)) -> Result<Self, String> {
        let (folder, name) = open_folder(path)?;
        let private = PrivateFolder::enter(&folder, &name)?;
        after(Step::MadeFolder);
        let socket = new_socket().map_err(cannot("make a socket"))?;
        // The mode that it is born with, less the umask, which belongs to the whole process.
        fchmod(&socket, mode).map_err(cannot("set the mode of a socket"))?;
        private.bind(&socket).map_err(cannot("bind a socket"))?;
        after(Step::Bound);
        let file = openat(&private.fd, FRESH, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let file = file.map_err(cannot("find the socket that was bound"))?;
        let found = fstat(&file).map_err(cannot("find the socket that was bound"))?;
        // Only a file system that lies shows something else in a private folder.
        if !is_socket(&found) || found.st_uid != geteuid().as_raw() {
            return Err("cannot bind a socket: this file system shows another file in its place".to_owned());
        }
        after(Step::Found);
        if Mode::from_raw_mode(found.st_mode) & Mode::from_raw_mode(0o777) != mode {
            // By the descriptor: this is the file that was looked at, and no link.
            chmod(proc_path(&file), mode).map_err(cannot("set the socket's mode"))?;
        }
        listen(&socket, BACKLOG).map_err(cannot("listen"))?;
        after(Step::Ready);
        private.place()?;
        after(Step::Placed);
        let identity = identity(&found);
        drop(private);
        Ok(Listener { socket, folder, name, identity })
    }

    /// Whether a server could be bound at this path now.
    ///
    /// # Errors
    /// A reason to append to the path.
    pub(super) fn check(path: &Path) -> Result<(), String> {
        let (folder, name) = open_folder(path)?;
        PrivateFolder::enter(&folder, &name)?.look_at_place().map(|_| ())
    }

    /// Removes the socket, unless another one has taken its place.
    fn remove(&self) -> Result<(), String> {
        if !self.is_in_place() {
            return Ok(());
        }
        let private = PrivateFolder::enter(&self.folder, &self.name)?;
        if self.is_in_place() {
            private.take(self.identity)?;
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
                tracing::warn!(socket = ?self.name, reason, "a server leaves its socket behind");
            });
        }
    }
}

/// Connects to the socket at a path of any length.
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

fn identity(found: &Stat) -> Identity {
    #[allow(clippy::useless_conversion, reason = "their types depend on the architecture")]
    (found.st_dev.into(), found.st_ino.into())
}

fn is_socket(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::Socket
}

fn new_socket() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

/// Opens the folder that a path is in. From here on the path is not used.
fn open_folder(path: &Path) -> Result<(OwnedFd, OsString), String> {
    let name = path.file_name().ok_or("cannot make a socket there: the path has no file name")?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    Ok((folder.map_err(cannot("open the folder of the socket"))?, name.to_owned()))
}

/// The file of a descriptor, as a path that the kernel resolves to that file, whatever its name
/// is now.
fn proc_path(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Whether [`proc_path`] leads to the file: procfs is mounted, and is of this process.
fn has_proc(file: &OwnedFd) -> bool {
    fstat(file).is_ok_and(|own| stat(proc_path(file)).is_ok_and(|seen| identity(&seen) == identity(&own)))
}

/// Runs `task` in a thread whose working directory is this folder, and whose umask is empty: its
/// own, not the process's.
fn in_folder(folder: &OwnedFd, task: impl FnOnce() -> Result<(), Errno> + Send) -> Result<(), Errno> {
    let body = || {
        // SAFETY: only the working directory, the root and the umask become the thread's own;
        // descriptors stay shared.
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

/// A folder beside the socket that only this user can change, and that only one server has at a
/// time.
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
                Err(errno) => return Err(cannot("make a private folder beside the socket")(errno)),
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match openat(parent, &name, flags, Mode::empty()) {
                Ok(fd) => {
                    let found = fstat(&fd).map_err(cannot("look at the private folder"))?;
                    if found.st_uid != geteuid().as_raw() || found.st_mode & 0o077 != 0 {
                        return Err(format!("cannot use {name:?} beside the socket: it is not a folder of this user alone"));
                    }
                    if lock(&fd)? && is_same(parent, &name, &found) {
                        let private = PrivateFolder { parent, socket, name, fd };
                        private.clear()?;
                        return Ok(private);
                    }
                }
                // The server that had it has removed it.
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(format!("cannot use {name:?} beside the socket: {}", describe(errno))),
            }
            if Instant::now() >= deadline {
                return Err(format!("cannot lock {name:?} beside the socket: another server has held it for {LOCK_PATIENCE:?}"));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Removes the sockets that a server left which was killed in here.
    fn clear(&self) -> Result<(), String> {
        for name in [FRESH, TAKEN] {
            match statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(found) if is_socket(&found) => {
                    unlinkat(&self.fd, name, AtFlags::empty()).map_err(cannot("clear the private folder"))?;
                }
                Ok(_) => return Err(format!("cannot use {:?} beside the socket: it holds a file, {name:?}", self.name)),
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(cannot("look into the private folder")(errno)),
            }
        }
        Ok(())
    }

    fn bind(&self, socket: &OwnedFd) -> Result<(), Errno> {
        if has_proc(&self.fd) {
            return bind(socket, &SocketAddrUnix::new(format!("{}/{FRESH}", proc_path(&self.fd)))?);
        }
        let address = SocketAddrUnix::new(FRESH)?;
        in_folder(&self.fd, || bind(socket, &address))
    }

    /// Moves the fresh socket to its place.
    fn place(&self) -> Result<(), String> {
        // More than one server after another would have to be killed meanwhile.
        for _ in 0..8 {
            match self.move_to_place(FRESH) {
                Ok(()) => return Ok(()),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(cannot("move the socket to its place")(errno)),
            }
            if let Some(dead) = self.look_at_place()? {
                self.take(dead)?;
            }
        }
        Err("cannot move the socket to its place: something else is put there again and again".to_owned())
    }

    /// Moves a file from here to the socket's place.
    fn move_to_place(&self, name: &str) -> Result<(), Errno> {
        match renameat_with(&self.fd, name, self.parent, self.socket, RenameFlags::NOREPLACE) {
            // Not every file system can, but a link replaces nothing either.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                linkat(&self.fd, name, self.parent, self.socket, AtFlags::empty())?;
                unlinkat(&self.fd, name, AtFlags::empty())
            }
            moved => moved,
        }
    }

    /// Which dead socket is at the place; `None` where nothing is.
    ///
    /// # Errors
    /// What else is there.
    fn look_at_place(&self) -> Result<Option<Identity>, String> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(self.parent, self.socket, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(cannot("look at what is there")(errno)),
        };
        let found = fstat(&file).map_err(cannot("look at what is there"))?;
        if !is_socket(&found) {
            return Err("cannot make a socket there: a file that is no socket has this name".to_owned());
        }
        let socket = new_socket().map_err(cannot("make a socket"))?;
        let connected = if has_proc(&file) {
            SocketAddrUnix::new(proc_path(&file)).and_then(|address| connect(&socket, &address))
        } else {
            SocketAddrUnix::new(Path::new(self.socket)).and_then(|address| in_folder(self.parent, || connect(&socket, &address)))
        };
        match connected {
            Err(Errno::CONNREFUSED) => Ok(Some(identity(&found))),
            // Of another type, or with a full queue.
            Ok(()) | Err(Errno::PROTOTYPE | Errno::AGAIN) => Err("another process listens there".to_owned()),
            Err(errno) => Err(cannot("find out whether another process listens there")(errno)),
        }
    }

    /// Removes what is at the place if it is this file. It is looked at after it was moved in
    /// here, so that nothing else is removed even if programs that know nothing of the lock
    /// change the place.
    fn take(&self, expected: Identity) -> Result<(), String> {
        match renameat(self.parent, self.socket, &self.fd, TAKEN) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(cannot("move away what is there")(errno)),
        }
        let found = statat(&self.fd, TAKEN, AtFlags::SYMLINK_NOFOLLOW).map_err(cannot("look at what was there"))?;
        if identity(&found) == expected {
            return unlinkat(&self.fd, TAKEN, AtFlags::empty()).map_err(cannot("remove a socket"));
        }
        self.move_to_place(TAKEN).map_err(|errno| {
            format!("cannot move back what another process had put there, it is in {:?} now: {}", self.name, describe(errno))
        })
    }
}

impl Drop for PrivateFolder<'_> {
    fn drop(&mut self) {
        // Left over only where something failed.
        let _ = unlinkat(&self.fd, FRESH, AtFlags::empty());
        // The lock ends with the descriptor, which outlives this.
        if let Err(errno) = unlinkat(self.parent, &self.name, AtFlags::REMOVEDIR) {
            foreign::emit(|| tracing::debug!(folder = ?self.name, errno = %describe(errno), "a private folder is left behind"));
        }
    }
}

/// Whether the lock was free.
fn lock(fd: &OwnedFd) -> Result<bool, String> {
    match flock(fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(false),
        Err(errno) => Err(cannot("lock the private folder")(errno)),
    }
}

/// Whether the name still is that of this file.
fn is_same(folder: &OwnedFd, name: &OsStr, file: &Stat) -> bool {
    statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|found| identity(&found) == identity(file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
    use std::os::unix::net::{UnixDatagram, UnixListener};
    use std::path::PathBuf;

    fn own() -> Mode {
        Mode::from_raw_mode(0o600)
    }

    fn all() -> Mode {
        Mode::from_raw_mode(0o666)
    }

    fn mode_of(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn is_served(path: &Path) -> bool {
        connect_to(&new_socket().unwrap(), path).is_ok()
    }

    fn dead_socket(path: &Path) {
        let socket = new_socket().unwrap();
        bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    }

    /// What the owner of a folder can do to the names in it, whoever's they are.
    fn steal(folder: &Path, target: &Path) {
        for (number, name) in names(folder).into_iter().enumerate() {
            if !name.starts_with("stolen") {
                fs::rename(folder.join(&name), folder.join(format!("stolen{number}{name}"))).unwrap();
                symlink(target, folder.join(&name)).unwrap();
            }
        }
        for name in ["socket", ".socket.dmaload"] {
            let _ = symlink(target, folder.join(name));
        }
    }

    #[test]
    fn owner_of_the_folder_redirects_nothing_at_any_step() {
        for mode in [own(), all()] {
            for thief_at in [Step::MadeFolder, Step::Bound, Step::Found, Step::Ready, Step::Placed] {
                for target_is_folder in [false, true] {
                    let place = tempfile::tempdir().unwrap();
                    let (folder, victims) = (place.path().join("thief's"), place.path().join("victim's"));
                    fs::create_dir(&folder).unwrap();
                    fs::create_dir(&victims).unwrap();
                    fs::set_permissions(&victims, fs::Permissions::from_mode(0o700)).unwrap();
                    let victim = victims.join("secret");
                    fs::write(&victim, "kept").unwrap();
                    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
                    let target = if target_is_folder { &victims } else { &victim };
                    let mut steps = Vec::new();
                    let listener = Listener::bind_step_by_step(&folder.join("socket"), mode, &mut |step| {
                        steps.push(step);
                        if step == thief_at {
                            steal(&folder, target);
                        }
                    });
                    assert!(steps.contains(&thief_at), "{steps:?}");
                    let bound = listener.is_ok();
                    drop(listener);
                    let case = format!("{mode:?} {thief_at:?} {target_is_folder} {bound}");
                    assert_eq!((mode_of(&victim), mode_of(&victims)), (0o600, 0o700), "{case}");
                    assert_eq!(names(&victims), ["secret"], "{case}");
                    assert_eq!(fs::read_to_string(&victim).unwrap(), "kept", "{case}");
                }
            }
        }
    }

    /// A file system that lies shows other files in the private folder.
    #[test]
    fn another_file_in_the_place_of_the_bound_socket_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let victim = place.path().join("secret");
        fs::write(&victim, "kept").unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
        let lies: [fn(&Path, &Path); 3] = [
            |victim, fresh| symlink(victim, fresh).unwrap(),
            |victim, fresh| fs::hard_link(victim, fresh).unwrap(),
            |_, fresh| {
                dead_socket(fresh);
                // Of another user, where there can be one.
                if geteuid().is_root() {
                    std::os::unix::fs::chown(fresh, Some(12345), None).unwrap();
                } else {
                    fs::remove_file(fresh).unwrap();
                }
            },
        ];
        for (lie, lie_at) in lies.into_iter().flat_map(|lie| [(lie, Step::Bound), (lie, Step::Found)]) {
            let mode = all();
            let listener = Listener::bind_step_by_step(&place.path().join("socket"), mode, &mut |step| {
                if step == lie_at {
                    let fresh = place.path().join(".socket.dmaload").join(FRESH);
                    fs::remove_file(&fresh).unwrap();
                    lie(&victim, &fresh);
                }
            });
            assert!(lie_at == Step::Found || listener.is_err(), "{listener:?}");
            assert_eq!((mode_of(&victim), fs::read_to_string(&victim).unwrap().as_str()), (0o600, "kept"));
            drop(listener);
            let _ = fs::remove_file(place.path().join("socket"));
            assert_eq!(names(place.path()), ["secret"]);
        }
    }

    #[test]
    fn socket_has_its_mode_before_it_is_in_its_place() {
        for mode in [own(), all()] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("socket");
            let mut seen = Vec::new();
            let listener = Listener::bind_step_by_step(&path, mode, &mut |step| {
                let private = folder.path().join(".socket.dmaload");
                assert_eq!(mode_of(&private), 0o700, "{step:?}");
                assert_eq!(step == Step::Placed, path.exists(), "{step:?}");
                if step == Step::Bound || step == Step::Ready {
                    seen.push((step, mode_of(&private.join(FRESH)) & !0o022));
                }
                // Whoever sees it can connect.
                assert!(step != Step::Placed || (mode_of(&path) == mode.as_raw_mode() && is_served(&path)));
            });
            assert_eq!(seen.len(), 2);
            assert_eq!(seen.last(), Some(&(Step::Ready, mode.as_raw_mode() & !0o022)));
            assert_eq!(names(folder.path()), ["socket"]);
            drop(listener.unwrap());
            assert_eq!(names(folder.path()), [""; 0]);
        }
    }

    #[test]
    fn only_dead_sockets_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        dead_socket(&at("seqpacket"));
        drop(UnixListener::bind(at("stream")).unwrap());
        drop(UnixDatagram::bind(at("datagram")).unwrap());
        for name in ["seqpacket", "stream", "datagram", "none"] {
            Listener::check(&at(name)).unwrap();
            let listener = Listener::bind(&at(name), own()).unwrap();
            assert!(is_served(&at(name)), "{name}");
            drop(listener);
            assert!(!at(name).exists(), "{name}");
        }
        fs::write(at("file"), "kept").unwrap();
        fs::create_dir(at("folder")).unwrap();
        symlink(at("file"), at("link")).unwrap();
        symlink(at("nothing"), at("dangling")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, own(), 0).unwrap();
        let alive = (
            UnixListener::bind(at("alive stream")).unwrap(),
            UnixDatagram::bind(at("alive datagram")).unwrap(),
            Listener::bind(&at("alive"), own()).unwrap(),
        );
        symlink(at("alive"), at("link to alive")).unwrap();
        let before = names(folder.path());
        for name in &before {
            let expected = if name.starts_with("alive") { "another process listens there" } else { "no socket" };
            for refused in [Listener::bind(&at(name), own()).map(|_| ()), Listener::check(&at(name))] {
                let reason = refused.unwrap_err();
                assert!(reason.contains(expected), "{name}: {reason}");
            }
        }
        assert_eq!(names(folder.path()), before);
        assert!(is_served(&at("alive")) && fs::symlink_metadata(at("fifo")).unwrap().file_type().is_fifo());
        drop(alive);
    }

    #[test]
    fn server_that_ends_leaves_the_socket_of_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        type Change = fn(&Path);
        let changes: [Change; 3] = [
            |path| fs::remove_file(path).unwrap(),
            |path| fs::rename(path, path.with_file_name("moved")).unwrap(),
            |path| {
                dead_socket(&path.with_file_name("dead"));
                fs::rename(path.with_file_name("dead"), path).unwrap();
            },
        ];
        for change in changes {
            let first = Listener::bind(&path, own()).unwrap();
            change(&path);
            let second = Listener::bind(&path, own()).unwrap();
            drop(first);
            assert!(is_served(&path));
            drop(second);
            assert!(!path.exists());
            let _ = fs::remove_file(path.with_file_name("moved"));
        }
        let first = Listener::bind(&path, own()).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "kept").unwrap();
        drop(first);
        assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
    }

    /// Each round two servers end while two others take the place: whatever the order, the last
    /// one bound is there.
    #[test]
    fn servers_that_end_and_begin_at_once_keep_the_last_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for _ in 0..100 {
            let first = Listener::bind(&path, own()).unwrap();
            fs::remove_file(&path).unwrap();
            let second = thread::scope(|scope| {
                let second = scope.spawn(|| Listener::bind(&path, own()));
                drop(first);
                second.join().unwrap()
            });
            assert!(is_served(&path));
            drop(second.unwrap());
            // A dead socket that two find at once: one has it.
            dead_socket(&path);
            let both = thread::scope(|scope| {
                let other = scope.spawn(|| Listener::bind(&path, own()));
                (Listener::bind(&path, own()), other.join().unwrap())
            });
            assert!(is_served(&path));
            let one = match both {
                (Ok(one), Err(reason)) | (Err(reason), Ok(one)) => {
                    assert!(reason.contains("another process listens there"), "{reason}");
                    one
                }
                both => panic!("{both:?}"),
            };
            drop(one);
            assert_eq!(names(folder.path()), [""; 0]);
        }
    }

    #[test]
    fn what_is_not_the_expected_file_is_put_back() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("socket");
        let (folder, name) = open_folder(&path).unwrap();
        let private = PrivateFolder::enter(&folder, &name).unwrap();
        let makers: [fn(&Path); 3] = [dead_socket, |path| fs::write(path, "kept").unwrap(), |path| fs::create_dir(path).unwrap()];
        for make in makers {
            make(&path);
            let before = identity(&stat(&path).unwrap());
            private.take((before.0, before.1 + 1)).unwrap();
            assert_eq!(identity(&stat(&path).unwrap()), before);
            if path.is_dir() {
                fs::remove_dir(&path).unwrap();
            } else {
                private.take(before).unwrap();
            }
            assert!(!path.exists());
        }
        private.take((0, 0)).unwrap();
    }

    #[test]
    fn private_folder_is_taken_over_from_the_killed_and_from_no_stranger() {
        let folder = tempfile::tempdir().unwrap();
        let (path, private) = (folder.path().join("socket"), folder.path().join(".socket.dmaload"));
        let make = |mode: u32| {
            fs::create_dir(&private).unwrap();
            fs::set_permissions(&private, fs::Permissions::from_mode(mode)).unwrap();
        };
        make(0o700);
        dead_socket(&private.join(FRESH));
        dead_socket(&private.join(TAKEN));
        drop(Listener::bind(&path, own()).unwrap());
        assert_eq!(names(folder.path()), [""; 0]);
        let refused = |expected: &str| {
            let reason = Listener::bind(&path, all()).unwrap_err();
            assert!(reason.contains(expected), "{reason}");
            assert!(!path.exists());
        };
        make(0o700);
        fs::write(private.join(TAKEN), "kept").unwrap();
        refused("it holds a file");
        assert_eq!(fs::read_to_string(private.join(TAKEN)).unwrap(), "kept");
        fs::remove_dir_all(&private).unwrap();
        for mode in [0o701, 0o710, 0o770, 0o777] {
            make(mode);
            refused("not a folder of this user alone");
            fs::remove_dir(&private).unwrap();
        }
        if geteuid().is_root() {
            make(0o700);
            std::os::unix::fs::chown(&private, Some(12345), None).unwrap();
            refused("not a folder of this user alone");
            fs::remove_dir(&private).unwrap();
        }
        let target = tempfile::tempdir().unwrap();
        fs::set_permissions(target.path(), fs::Permissions::from_mode(0o700)).unwrap();
        symlink(target.path(), &private).unwrap();
        refused("ENOTDIR");
    }

    #[test]
    fn one_server_at_a_time_has_the_private_folder() {
        let place = tempfile::tempdir().unwrap();
        let (folder, name) = open_folder(&place.path().join("socket")).unwrap();
        let inside = std::sync::atomic::AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let private = PrivateFolder::enter(&folder, &name).unwrap();
                        assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        thread::yield_now();
                        inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        drop(private);
                    }
                });
            }
        });
    }

    #[test]
    fn long_paths_and_their_limits() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("d".repeat(200)).join("e".repeat(200));
        fs::create_dir_all(&deep).unwrap();
        let path = deep.join("n".repeat(240));
        let listener = Listener::bind(&path, all()).unwrap();
        assert!(is_served(&path) && mode_of(&path) == 0o666);
        assert!(Listener::bind(&path, own()).unwrap_err().contains("another process listens there"));
        drop(listener);
        assert!(!path.exists());
        let refused = |path: PathBuf, expected: &str| {
            let reason = Listener::bind(&path, own()).unwrap_err();
            assert!(reason.contains(expected), "{reason}");
        };
        refused(deep.join("n".repeat(250)), "ENAMETOOLONG");
        refused(deep.join("..").join(".."), "no file name");
        refused(PathBuf::from("/"), "no file name");
        refused(PathBuf::new(), "no file name");
        refused(deep.join("missing").join("socket"), "ENOENT");
    }

    /// As [`Listener::bind`] does without procfs.
    #[test]
    fn thread_of_its_own_binds_where_the_process_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let opened = open(folder.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let before = std::env::current_dir().unwrap();
        let socket = new_socket().unwrap();
        fchmod(&socket, all()).unwrap();
        let address = SocketAddrUnix::new("here").unwrap();
        in_folder(&opened, || bind(&socket, &address)).unwrap();
        assert_eq!(mode_of(&folder.path().join("here")), 0o666, "the umask of that thread is empty");
        assert_eq!(std::env::current_dir().unwrap(), before);
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert_ne!(mode_of(&file), 0o666, "the umask of the process is as it was");
    }
}
