use super::*;
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::PathBuf;

fn bind_listener(path: &Path, mode: Mode) -> Result<Listener, String> {
    Listener::bind(new_socket().unwrap(), path, mode)
}

fn owner_only() -> Mode {
    Mode::from_raw_mode(0o600)
}

fn everyone() -> Mode {
    Mode::from_raw_mode(0o666)
}

fn mode_of(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn list_names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn is_served(path: &Path) -> bool {
    connect_to(&new_socket().unwrap(), path).is_ok()
}

fn create_dead_socket(path: &Path) {
    let socket = new_socket().unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
}

/// Replaces each file in a folder with a link, as the folder's owner could.
fn replace_with_links(folder: &Path, target: &Path) {
    for (number, name) in list_names(folder).into_iter().enumerate() {
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
fn folder_owner_cannot_redirect_anything_at_any_step() {
    for mode in [owner_only(), everyone()] {
        for thief_at in [BindStep::MadeFolder, BindStep::Bound, BindStep::Found, BindStep::Ready, BindStep::Placed] {
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
                let listener = Listener::bind_step_by_step(new_socket().unwrap(), &folder.join("socket"), mode, &mut |step| {
                    steps.push(step);
                    if step == thief_at {
                        replace_with_links(&folder, target);
                    }
                });
                assert!(steps.contains(&thief_at), "{steps:?}");
                let bound = listener.is_ok();
                drop(listener);
                let case = format!("{mode:?} {thief_at:?} {target_is_folder} {bound}");
                assert_eq!((mode_of(&victim), mode_of(&victims)), (0o600, 0o700), "{case}");
                assert_eq!(list_names(&victims), ["secret"], "{case}");
                assert_eq!(fs::read_to_string(&victim).unwrap(), "kept", "{case}");
            }
        }
    }
}

/// Simulates a malicious file system, which shows other files in the private folder.
#[test]
fn file_in_place_of_the_bound_socket_is_left_alone() {
    let place = tempfile::tempdir().unwrap();
    let victim = place.path().join("secret");
    fs::write(&victim, "kept").unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let lies: [fn(&Path, &Path); 3] = [
        |victim, fresh| symlink(victim, fresh).unwrap(),
        |victim, fresh| fs::hard_link(victim, fresh).unwrap(),
        |_, fresh| {
            create_dead_socket(fresh);
            // Give the socket to another user if this process may do that. Otherwise, remove it.
            if geteuid().is_root() {
                std::os::unix::fs::chown(fresh, Some(12345), None).unwrap();
            } else {
                fs::remove_file(fresh).unwrap();
            }
        },
    ];
    for (lie, lie_at) in lies.into_iter().flat_map(|lie| [(lie, BindStep::Bound), (lie, BindStep::Found)]) {
        let mode = everyone();
        let listener = Listener::bind_step_by_step(new_socket().unwrap(), &place.path().join("socket"), mode, &mut |step| {
            if step == lie_at {
                let fresh = place.path().join(".socket.dmaload").join(FRESH);
                fs::remove_file(&fresh).unwrap();
                lie(&victim, &fresh);
            }
        });
        assert!(lie_at == BindStep::Found || listener.is_err(), "{listener:?}");
        assert_eq!((mode_of(&victim), fs::read_to_string(&victim).unwrap().as_str()), (0o600, "kept"));
        drop(listener);
        let _ = fs::remove_file(place.path().join("socket"));
        assert_eq!(list_names(place.path()), ["secret"]);
    }
}

#[test]
fn socket_has_its_mode_before_it_is_in_its_place() {
    for mode in [owner_only(), everyone()] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let mut seen = Vec::new();
        let listener = Listener::bind_step_by_step(new_socket().unwrap(), &path, mode, &mut |step| {
            let private = folder.path().join(".socket.dmaload");
            assert_eq!(mode_of(&private), 0o700, "{step:?}");
            assert_eq!(step == BindStep::Placed, path.exists(), "{step:?}");
            if step == BindStep::Bound || step == BindStep::Ready {
                seen.push((step, mode_of(&private.join(FRESH)) & !0o022));
            }
            // As soon as the socket is visible, clients can connect.
            assert!(step != BindStep::Placed || (mode_of(&path) == mode.as_raw_mode() && is_served(&path)));
        });
        assert_eq!(seen.len(), 2);
        assert_eq!(seen.last(), Some(&(BindStep::Ready, mode.as_raw_mode() & !0o022)));
        assert_eq!(list_names(folder.path()), ["socket"]);
        drop(listener.unwrap());
        assert_eq!(list_names(folder.path()), [""; 0]);
    }
}

#[test]
fn only_dead_sockets_are_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    create_dead_socket(&at("seqpacket"));
    drop(UnixListener::bind(at("stream")).unwrap());
    drop(UnixDatagram::bind(at("datagram")).unwrap());
    for name in ["seqpacket", "stream", "datagram", "none"] {
        Listener::check(&at(name)).unwrap();
        let listener = bind_listener(&at(name), owner_only()).unwrap();
        assert!(is_served(&at(name)), "{name}");
        drop(listener);
        assert!(!at(name).exists(), "{name}");
    }
    fs::write(at("file"), "kept").unwrap();
    fs::create_dir(at("folder")).unwrap();
    symlink(at("file"), at("link")).unwrap();
    symlink(at("nothing"), at("dangling")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, owner_only(), 0).unwrap();
    let alive = (
        UnixListener::bind(at("alive stream")).unwrap(),
        UnixDatagram::bind(at("alive datagram")).unwrap(),
        bind_listener(&at("alive"), owner_only()).unwrap(),
    );
    symlink(at("alive"), at("link to alive")).unwrap();
    let before = list_names(folder.path());
    for name in &before {
        let expected = if name.starts_with("alive") { "another process is listening there" } else { "not a socket" };
        for refused in [bind_listener(&at(name), owner_only()).map(|_| ()), Listener::check(&at(name))] {
            let reason = refused.unwrap_err();
            assert!(reason.contains(expected), "{name}: {reason}");
        }
    }
    assert_eq!(list_names(folder.path()), before);
    assert!(is_served(&at("alive")) && fs::symlink_metadata(at("fifo")).unwrap().file_type().is_fifo());
    drop(alive);
}

#[test]
fn dropped_server_does_not_remove_its_successors_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    type Change = fn(&Path);
    let changes: [Change; 3] = [
        |path| fs::remove_file(path).unwrap(),
        |path| fs::rename(path, path.with_file_name("moved")).unwrap(),
        |path| {
            create_dead_socket(&path.with_file_name("dead"));
            fs::rename(path.with_file_name("dead"), path).unwrap();
        },
    ];
    for change in changes {
        let first = bind_listener(&path, owner_only()).unwrap();
        change(&path);
        let second = bind_listener(&path, owner_only()).unwrap();
        drop(first);
        assert!(is_served(&path));
        drop(second);
        assert!(!path.exists());
        let _ = fs::remove_file(path.with_file_name("moved"));
    }
    let first = bind_listener(&path, owner_only()).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "kept").unwrap();
    drop(first);
    assert_eq!(fs::read_to_string(&path).unwrap(), "kept");
}

/// In each round, a server stops while another one binds, and two servers race for a dead socket.
#[test]
fn racing_servers_leave_exactly_one_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    for _ in 0..100 {
        let first = bind_listener(&path, owner_only()).unwrap();
        fs::remove_file(&path).unwrap();
        let second = thread::scope(|scope| {
            let second = scope.spawn(|| bind_listener(&path, owner_only()));
            drop(first);
            second.join().unwrap()
        });
        assert!(is_served(&path));
        drop(second.unwrap());
        // Two servers find a dead socket at once. One of them replaces it.
        create_dead_socket(&path);
        let both = thread::scope(|scope| {
            let other = scope.spawn(|| bind_listener(&path, owner_only()));
            (bind_listener(&path, owner_only()), other.join().unwrap())
        });
        assert!(is_served(&path));
        let one = match both {
            (Ok(one), Err(reason)) | (Err(reason), Ok(one)) => {
                assert!(reason.contains("another process is listening there"), "{reason}");
                one
            }
            both => panic!("{both:?}"),
        };
        drop(one);
        assert_eq!(list_names(folder.path()), [""; 0]);
    }
}

#[test]
fn unexpected_file_is_put_back() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("socket");
    let (folder, name) = open_folder(&path).unwrap();
    let private = PrivateFolder::enter(&folder, &name).unwrap();
    let makers: [fn(&Path); 3] =
        [create_dead_socket, |path| fs::write(path, "kept").unwrap(), |path| fs::create_dir(path).unwrap()];
    for make in makers {
        make(&path);
        let before = identity(&stat(&path).unwrap());
        private.remove_if((before.0, before.1 + 1)).unwrap();
        assert_eq!(identity(&stat(&path).unwrap()), before);
        if path.is_dir() {
            fs::remove_dir(&path).unwrap();
        } else {
            private.remove_if(before).unwrap();
        }
        assert!(!path.exists());
    }
    private.remove_if((0, 0)).unwrap();
}

#[test]
fn private_folder_is_taken_over_only_from_killed_servers() {
    let folder = tempfile::tempdir().unwrap();
    let (path, private) = (folder.path().join("socket"), folder.path().join(".socket.dmaload"));
    let make = |mode: u32| {
        fs::create_dir(&private).unwrap();
        fs::set_permissions(&private, fs::Permissions::from_mode(mode)).unwrap();
    };
    make(0o700);
    create_dead_socket(&private.join(FRESH));
    create_dead_socket(&private.join(TAKEN));
    drop(bind_listener(&path, owner_only()).unwrap());
    assert_eq!(list_names(folder.path()), [""; 0]);
    let refused = |expected: &str| {
        let reason = bind_listener(&path, everyone()).unwrap_err();
        assert!(reason.contains(expected), "{reason}");
        assert!(!path.exists());
    };
    make(0o700);
    fs::write(private.join(TAKEN), "kept").unwrap();
    refused("it contains a file");
    assert_eq!(fs::read_to_string(private.join(TAKEN)).unwrap(), "kept");
    fs::remove_dir_all(&private).unwrap();
    for mode in [0o701, 0o710, 0o770, 0o777] {
        make(mode);
        refused("not a private folder owned by this user");
        fs::remove_dir(&private).unwrap();
    }
    if geteuid().is_root() {
        make(0o700);
        std::os::unix::fs::chown(&private, Some(12345), None).unwrap();
        refused("not a private folder owned by this user");
        fs::remove_dir(&private).unwrap();
    }
    let target = tempfile::tempdir().unwrap();
    fs::set_permissions(target.path(), fs::Permissions::from_mode(0o700)).unwrap();
    symlink(target.path(), &private).unwrap();
    refused("ENOTDIR");
}

#[test]
fn one_server_at_a_time_holds_the_private_folder() {
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
fn long_path_works_until_its_name_exceeds_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let deep = folder.path().join("d".repeat(200)).join("e".repeat(200));
    fs::create_dir_all(&deep).unwrap();
    let path = deep.join("n".repeat(240));
    let listener = bind_listener(&path, everyone()).unwrap();
    assert!(is_served(&path) && mode_of(&path) == 0o666);
    assert!(bind_listener(&path, owner_only()).unwrap_err().contains("another process is listening there"));
    drop(listener);
    assert!(!path.exists());
    let refused = |path: PathBuf, expected: &str| {
        let reason = bind_listener(&path, owner_only()).unwrap_err();
        assert!(reason.contains(expected), "{reason}");
    };
    refused(deep.join("n".repeat(250)), "ENAMETOOLONG");
    refused(deep.join("..").join(".."), "no file name");
    refused(PathBuf::from("/"), "no file name");
    refused(PathBuf::new(), "no file name");
    refused(deep.join("missing").join("socket"), "ENOENT");
}

/// This is how [`Listener::bind`] binds a socket if procfs is not available.
#[test]
fn separate_thread_binds_in_another_folder() {
    let folder = tempfile::tempdir().unwrap();
    let opened = open(folder.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let before = std::env::current_dir().unwrap();
    let socket = new_socket().unwrap();
    fchmod(&socket, everyone()).unwrap();
    let address = SocketAddrUnix::new("here").unwrap();
    run_in_folder(&opened, || bind(&socket, &address)).unwrap();
    assert_eq!(mode_of(&folder.path().join("here")), 0o666, "the umask should be empty on that thread");
    assert_eq!(std::env::current_dir().unwrap(), before);
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert_ne!(mode_of(&file), 0o666, "the umask of the process should not change");
}
