//! Tests which users may attach to a server, and which servers a client trusts.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dmaload::share::{Server, ServerOptions, attach_blocking};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use sha2::{Digest, Sha256};

use crate::common::{assert_same, file, folder, random_bytes};
use crate::roles::{ALICE, ALL, BOB, MALLORY, NOBODY, Role, Serving, as_user, is_root, open_folder};
use crate::{default_options, hex, load, write_model};

#[tokio::test]
async fn other_users_are_refused_unless_they_are_allowed() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can run as another user");
        return;
    }
    let folder = folder();
    let path = write_model(folder.path());
    let image = load(&[&path]).await;
    // The sockets are in a folder that other users can enter.
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let run_as = |user: u32, socket: &Path| {
        let script = "import socket,sys\ns=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET)\ns.connect(sys.argv[1])\ns.send(b'dmaload\\0\\1\\0\\0\\0\\1\\0\\0\\0')\nm=s.recvmsg(64,4096)\nprint(m[0][12], len(m[1]))";
        let mut command = Command::new("python3");
        command.args(["-c", script]).arg(socket);
        command.uid(user);
        let output = command.output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    let closed = place.path().join("closed");
    let server = Server::bind(&closed, ServerOptions::default()).unwrap();
    server.publish("model", image.clone()).unwrap();
    assert_eq!(run_as(65534, &closed), "", "only the owner should be able to connect");
    let open = place.path().join("open");
    let server = Server::bind(&open, ServerOptions::default().allow_user(65533)).unwrap();
    server.publish("model", image).unwrap();
    assert_eq!(run_as(65534, &open), "3 0", "the user should be refused and receive no descriptors");
    assert_eq!(run_as(65533, &open), "0 1", "the user should be allowed to attach");
    assert_eq!(fs::metadata(&closed).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn connection_error_suggests_a_remedy() {
    let folder = open_folder();
    let refused = |name: &str| attach_blocking(folder.path().join(name), &default_options()).unwrap_err().to_string();
    let _server = Server::bind(folder.path().join("own"), ServerOptions::default()).unwrap();
    drop(std::os::unix::net::UnixListener::bind(folder.path().join("dead")).unwrap());
    let _other = std::os::unix::net::UnixListener::bind(folder.path().join("other")).unwrap();
    assert!(refused("missing").contains("ENOENT") && refused("missing").contains("appears with the image"));
    assert!(refused("dead").contains("the server that created this socket has exited"), "{}", refused("dead"));
    assert!(refused("other").contains("the socket belongs to another program"), "{}", refused("other"));
    if is_root() {
        let error = as_user(BOB, || refused("own"));
        assert!(error.contains("EACCES") && error.contains("(ServerOptions::allow_user)"), "{error}");
    }
}

/// In a user namespace, the kernel reports the id that the peer's user has in that namespace. All
/// unmapped users have the overflow id, 65534.
#[test]
fn clients_trust_their_own_user_and_those_they_name() {
    if !is_root() {
        return;
    }
    let folder = open_folder();
    let model = file(folder.path(), "model.bin", &random_bytes(5_000_000, 3));
    let expected = format!("digest {}", hex(&Sha256::digest(fs::read(&model).unwrap())));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let image = runtime.block_on(load(&[&model]));
    // Each case has the server's user, the client's user, the client's uid map, the users that the
    // client trusts, and the result: either the client attaches, or its error names this user.
    type Case<'a> = (u32, u32, Option<&'a str>, &'a [u32], Result<(), u32>);
    let cases: &[Case<'_>] = &[
        (ALICE, ALICE, None, &[], Ok(())),
        (BOB, ALICE, None, &[], Err(BOB)),
        (BOB, ALICE, None, &[MALLORY], Err(BOB)),
        (BOB, ALICE, None, &[BOB], Ok(())),
        (0, ALICE, None, &[], Ok(())),
        (BOB, 0, None, &[], Err(BOB)),
        (NOBODY, NOBODY, None, &[], Ok(())),
        (NOBODY, ALICE, None, &[], Err(NOBODY)),
        // No user is mapped: the client sees itself and all others as the overflow id.
        (BOB, ALICE, Some(""), &[], Err(NOBODY)),
        (ALICE, ALICE, Some(""), &[], Err(NOBODY)),
        (0, ALICE, Some(""), &[], Err(NOBODY)),
        (BOB, ALICE, Some(""), &[BOB], Err(NOBODY)),
        (BOB, ALICE, Some(""), &[NOBODY], Ok(())),
        // The client is mapped to the overflow id; others have that id because they are unmapped.
        (BOB, ALICE, Some("65534 4001 1"), &[], Err(NOBODY)),
        (BOB, ALICE, Some("65534 4001 1"), &[NOBODY], Ok(())),
        (BOB, ALICE, Some("0 0 4001\n65534 4001 1"), &[], Err(NOBODY)),
        // Some users are mapped.
        (ALICE, ALICE, Some("1000 4001 1"), &[], Ok(())),
        (BOB, ALICE, Some("1000 4001 1"), &[], Err(NOBODY)),
        (BOB, ALICE, Some("1000 4001 2"), &[], Err(1001)),
        (BOB, ALICE, Some("1000 4001 2"), &[1001], Ok(())),
        (BOB, ALICE, Some("0 4002 1\n1000 4001 1"), &[], Ok(())),
        // All users are mapped: the overflow id is a user like any other, as in many containers.
        (NOBODY, NOBODY, Some(ALL), &[], Ok(())),
        (BOB, NOBODY, Some(ALL), &[], Err(BOB)),
        (ALICE, ALICE, Some(ALL), &[], Ok(())),
    ];
    let mut wrong = Vec::new();
    for (number, &(server, client, map, named, expectation)) in cases.iter().enumerate() {
        let socket = folder.path().join(format!("socket{number}"));
        let options = ServerOptions::default().allow_user(client);
        let served = as_user(server, || Server::bind(&socket, options)).unwrap();
        served.publish("model", image.clone()).unwrap();
        let role = Role { name: "the_client", user: client, map, named, variables: Vec::new() };
        let outcome = role.outcome(&socket);
        let case = format!("server {server}, client {client}, map {map:?}, trusts {named:?}: {outcome}");
        let as_expected = match expectation {
            Ok(()) => outcome == expected,
            Err(user) => outcome.contains(&format!("AttachOptions::trust_user({user}))")),
        };
        if !as_expected {
            wrong.push(case);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn servers_serve_their_own_user_and_those_they_allow() {
    if !is_root() {
        return;
    }
    let folder = open_folder();
    let model = file(folder.path(), "model.bin", &random_bytes(5_000_000, 3));
    // Each case has the server's user, the server's uid map, the users that the server allows, the
    // client's user, and the result: either the client attaches, or it is refused as this user. A
    // server that allows another user (here, user 9) has a socket that all users can connect to,
    // so the server itself refuses the users that it does not allow.
    type Case<'a> = (u32, Option<&'a str>, &'a [u32], u32, Result<(), u32>);
    let cases: &[Case<'_>] = &[
        (ALICE, None, &[9], ALICE, Ok(())),
        (ALICE, None, &[9], BOB, Err(BOB)),
        (ALICE, None, &[BOB], BOB, Ok(())),
        (ALICE, None, &[BOB], MALLORY, Err(MALLORY)),
        (ALICE, None, &[9], 0, Err(0)),
        (NOBODY, None, &[9], NOBODY, Ok(())),
        (ALICE, Some(""), &[9], BOB, Err(NOBODY)),
        (ALICE, Some(""), &[9], ALICE, Err(NOBODY)),
        (ALICE, Some(""), &[NOBODY], BOB, Ok(())),
        (ALICE, Some("65534 4001 1"), &[9], BOB, Err(NOBODY)),
        (ALICE, Some("65534 4001 1"), &[NOBODY], BOB, Ok(())),
        (ALICE, Some("1000 4001 1"), &[9], ALICE, Ok(())),
        (ALICE, Some("1000 4001 1"), &[9], BOB, Err(NOBODY)),
        (ALICE, Some("1000 4001 2"), &[9], BOB, Err(1001)),
        (ALICE, Some("1000 4001 2"), &[1001], BOB, Ok(())),
        (NOBODY, Some(ALL), &[9], NOBODY, Ok(())),
        (NOBODY, Some(ALL), &[9], BOB, Err(BOB)),
    ];
    let mut wrong = Vec::new();
    for (number, &(server, map, named, client, expectation)) in cases.iter().enumerate() {
        let socket = folder.path().join(format!("socket{number}"));
        let variables = vec![("DMALOAD_TEST_MODEL", model.to_string_lossy().into_owned())];
        let (serving, first) = Serving::start(&Role { name: "the_server", user: server, map, named, variables }, &socket);
        let case = format!("server {server}, map {map:?}, allows {named:?}, client {client}");
        assert!(first.starts_with("ready"), "{case}: {first}");
        let attached = as_user(client, || attach_blocking(&socket, &default_options().trust_user(server)));
        match (attached, expectation) {
            (Ok(attached), Ok(())) => {
                assert_same(&attached.image.files()[0].bytes().unwrap(), &fs::read(&model).unwrap(), &case);
            }
            (Err(error), Err(user)) if error.to_string().contains(&format!("ServerOptions::allow_user({user}))")) => {}
            (attached, _) => wrong.push(format!("{case}: {:?}", attached.map(|_| "attached"))),
        }
        drop(serving);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn socket_has_its_mode_despite_the_umask() {
    if !is_root() {
        return;
    }
    let folder = open_folder();
    let model = file(folder.path(), "model.bin", &random_bytes(100_000, 3));
    for mask in ["0", "22", "77", "777"] {
        for (named, mode) in [(&[][..], 0o600), (&[BOB], 0o666)] {
            let socket = folder.path().join(format!("socket{mask}{mode}"));
            let variables =
                vec![("DMALOAD_TEST_MODEL", model.to_string_lossy().into_owned()), ("DMALOAD_TEST_UMASK", mask.to_owned())];
            let role = Role { name: "the_server", user: 0, map: None, named, variables };
            let (serving, first) = Serving::start(&role, &socket);
            assert_eq!(first, format!("ready {mask}"));
            assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o7777, mode, "umask {mask}");
            attach_blocking(&socket, &default_options()).unwrap();
            drop(serving);
            assert!(!socket.exists());
        }
    }
}

#[test]
fn servers_and_clients_work_without_procfs() {
    if !is_root() {
        return;
    }
    let folder = open_folder();
    let model = file(folder.path(), "model.bin", &random_bytes(100_000, 3));
    let socket = folder.path().join("socket");
    let run = |role: &str, socket: &Path| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--", "sh", "-c", r#"mount -t tmpfs none /proc && exec "$@""#, "sh"]);
        command.arg(std::env::current_exe().unwrap()).args(["--ignored", "--exact", role, "--nocapture", "--quiet"]);
        command.env("DMALOAD_TEST_SOCKET", socket).env("DMALOAD_TEST_MODEL", &model).env("DMALOAD_TEST_ALLOW", "4002");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
    };
    for _ in 0..2 {
        let mut server = run("the_server", &socket);
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
        assert!(lines.by_ref().any(|line| line.unwrap().starts_with("ready")), "the server ended before it was ready");
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o7777, 0o666);
        let client = run("the_client", &socket).wait_with_output().unwrap();
        assert!(String::from_utf8_lossy(&client.stdout).contains("digest"), "{client:?}");
        // The killed server leaves its socket behind, which the next round replaces.
        server.kill().unwrap();
        server.wait().unwrap();
        assert!(socket.exists());
    }
}

/// The owner of a folder replaces each file that appears in it with a link to a file that belongs
/// to root, as fast as possible.
#[test]
fn folder_owner_cannot_redirect_a_server_run_by_root() {
    if !is_root() {
        return;
    }
    let place = open_folder();
    let (folder, victim) = (place.path().join("thief's"), place.path().join("victim"));
    fs::create_dir(&folder).unwrap();
    std::os::unix::fs::chown(&folder, Some(MALLORY), None).unwrap();
    fs::write(&victim, "secret").unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let socket = folder.join("socket");
    let (until, done) = (Instant::now() + Duration::from_secs(3), std::sync::atomic::AtomicBool::new(false));
    let (mut bound, mut refused) = (0, 0);
    let steal = |name: &str| {
        let (link, name) = (folder.join(format!("link for {name}")), folder.join(name));
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            std::os::unix::fs::symlink(&victim, &link).unwrap();
            // Exchange the link and the file in one system call, as soon as the file appears.
            while renameat_with(CWD, &link, CWD, &name, RenameFlags::EXCHANGE).is_err() {
                if done.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
            }
            std::thread::sleep(Duration::from_micros(300));
            // Make room for the next server.
            let _ = fs::remove_file(&name);
            let _ = fs::remove_file(&link);
            let _ = fs::rename(&link, folder.join("away"));
        }
    };
    std::thread::scope(|scope| {
        for name in ["socket", ".socket.dmaload"] {
            scope.spawn(move || as_user(MALLORY, || steal(name)));
        }
        while Instant::now() < until {
            match Server::bind(&socket, ServerOptions::default().allow_user(MALLORY)) {
                Ok(_) => bound += 1,
                Err(_) => refused += 1,
            }
            if fs::metadata(&victim).unwrap().permissions().mode() & 0o7777 != 0o600 {
                break;
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    println!("{bound} servers bound, {refused} refused");
    assert_eq!(fs::metadata(&victim).unwrap().permissions().mode() & 0o7777, 0o600, "after {bound} servers, {refused} refused");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "secret");
    assert!(bound > 0 && refused > 0, "{bound} servers bound, {refused} refused");
}
