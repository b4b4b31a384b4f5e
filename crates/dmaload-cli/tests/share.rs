//! Tests for `dmaload serve` and `dmaload attach`: one process loads files, and others map its
//! memory.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{KilledOnDrop, digest_of, dmaload, folder, is_root, random_file, run, sha256sum, skip};
use rustix::process::{Pid, Signal, kill_process};

/// Starts a server and waits until clients can attach to it.
fn start_server(arguments: &[&str], socket: &Path, paths: &[&Path]) -> KilledOnDrop {
    let mut command = dmaload(["serve"]);
    let mut server = KilledOnDrop::spawn(command.args(arguments).arg(socket).args(paths).stdout(Stdio::piped()));
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("serving ")), "the server exited without serving");
    server
}

fn stop_server(mut server: KilledOnDrop, socket: &Path) {
    kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
    assert!(server.wait().unwrap().success());
    assert!(!socket.exists(), "the socket was left behind");
}

#[test]
fn attached_image_has_the_digest_of_the_file() {
    let folder = folder();
    let socket = folder.path().join("socket");
    let paths = [random_file(folder.path(), "a.bin", 5_000_001), random_file(folder.path(), "b.bin", 77)];
    let server = start_server(&[], &socket, &[&paths[0], &paths[1]]);
    for _ in 0..3 {
        let json = run(dmaload(["attach", "--json", "--digest", "sha256"]).arg(&socket)).succeeds().json();
        assert_eq!(digest_of(&json), sha256sum(&paths[0]));
        assert_eq!(json["files"][1]["digest"]["hex"], sha256sum(&paths[1]));
        assert_eq!((json["process"].as_u64(), json["heap"].as_str()), (Some(server.id().into()), Some("shared memfd")));
    }
    let text = run(dmaload(["attach", "--name", "model"]).arg(&socket)).succeeds().text();
    assert!(text.contains("attached to") && text.contains("shared memfd"), "{text}");
    // The client reads no files, so it reports no throughput.
    assert!(!text.contains("B/s") && !text.contains("unknown size"), "{text}");
    run(dmaload(["attach", "--name", "other"]).arg(&socket)).fails(1, &["not share an image \"other\", but \"model\""]);
    run(dmaload(["serve"]).arg(&socket).arg(&paths[0])).fails(1, &["is listening there"]);
    stop_server(server, &socket);
    run(dmaload(["attach"]).arg(&socket)).fails(1, &["ENOENT"]);
}

#[test]
fn failed_load_leaves_no_socket_behind() {
    let folder = folder();
    let socket = folder.path().join("socket");
    run(dmaload(["serve"]).arg(&socket).arg(folder.path().join("missing"))).fails(1, &["missing", "ENOENT"]);
    assert!(!socket.exists());
    run(dmaload(["serve", "--share-dma-bufs"]).arg(&socket).arg("x")).fails(2, &["--dma-buf"]);
}

#[test]
fn attached_memory_has_the_page_size_of_the_load() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 20 << 20);
    for (number, arguments) in [&["--pages", "4k"][..], &[]].into_iter().enumerate() {
        let socket = folder.path().join(number.to_string());
        let loaded = common::load_json(&path, arguments);
        let server = start_server(arguments, &socket, &[&path]);
        let json = run(dmaload(["attach", "--json"]).arg(&socket)).succeeds().json();
        assert_eq!(json["throughput_bytes_per_second"], serde_json::Value::Null, "{json:#}");
        assert_eq!(json["page_size_bytes"], loaded["page_size_bytes"], "{json:#}");
        assert_eq!(json["huge_page_bytes"].as_u64() > Some(0), loaded["huge_page_bytes"].as_u64() > Some(0), "{json:#}");
        stop_server(server, &socket);
    }
}

/// Clients that connect as soon as the socket exists never see a server without an image.
#[test]
fn client_can_attach_as_soon_as_the_socket_exists() {
    let folder = folder();
    let path = random_file(folder.path(), "a.bin", 150_000_001);
    for round in 0..3 {
        let socket = folder.path().join(format!("socket{round}"));
        let mut server = KilledOnDrop::spawn(dmaload(["serve"]).arg(&socket).arg(&path).stdout(Stdio::null()));
        let deadline = Instant::now() + Duration::from_secs(60);
        while !socket.exists() {
            assert!(server.try_wait().unwrap().is_none() && Instant::now() < deadline, "the server created no socket");
        }
        let json = run(dmaload(["attach", "--json"]).arg(&socket)).succeeds().json();
        assert_eq!(json["files"][0]["bytes"].as_u64(), Some(150_000_001));
        stop_server(server, &socket);
    }
}

/// A second server is refused before it loads, and a server that is stopped during its load leaves
/// nothing behind.
#[test]
fn servers_that_cannot_serve_end_early_and_cleanly() {
    let folder = folder();
    let path = random_file(folder.path(), "a.bin", 1000);
    let socket = folder.path().join("socket");
    let server = start_server(&[], &socket, &[&path]);
    let missing = folder.path().join("missing");
    run(dmaload(["serve"]).arg(&socket).arg(&missing)).fails(1, &["another process is listening there"]);
    run(dmaload(["serve"]).arg(&path).arg(&missing)).fails(1, &["a file that is not a socket has this name"]);
    run(dmaload(["serve"]).arg(missing.join("socket")).arg(&missing)).fails(1, &["ENOENT", "folder of the socket"]);
    // When a server exits, it does not remove a socket that another server has created at the same
    // path.
    std::fs::remove_file(&socket).unwrap();
    let second = start_server(&[], &socket, &[&path]);
    kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
    assert!({ server }.wait().unwrap().success());
    run(dmaload(["attach"]).arg(&socket)).succeeds();
    stop_server(second, &socket);
    let large = random_file(folder.path(), "large.bin", 150_000_000);
    for delay in [0, 3, 10, 30, 60, 100] {
        let mut server = KilledOnDrop::spawn(dmaload(["serve"]).arg(&socket).arg(&large).stdout(Stdio::null()));
        std::thread::sleep(Duration::from_millis(delay));
        kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
        server.wait().unwrap();
        let names = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = names.filter(|name| name != "a.bin" && name != "large.bin").collect();
        assert!(left.is_empty(), "{left:?} after {delay} ms");
    }
}

/// By default, a client in a user namespace does not trust unmapped users.
#[test]
fn server_of_an_unmapped_user_must_be_trusted_explicitly() {
    if !is_root() {
        return skip("only root can allow unmapped users");
    }
    let folder = folder();
    let path = random_file(folder.path(), "a.bin", 1000);
    let socket = folder.path().join("socket");
    let server = start_server(&["--allow-user", "65534"], &socket, &[&path]);
    let attach = |trusted: &[&str]| {
        let mut command = std::process::Command::new("unshare");
        command.arg("--user").arg("--").arg(env!("CARGO_BIN_EXE_dmaload")).arg("attach").args(trusted).arg(&socket);
        run(&mut command)
    };
    attach(&[]).fails(1, &["user 65534", "all unmapped users share in this user namespace", "--trust-user 65534"]);
    attach(&["--trust-user", "65534"]).succeeds();
    stop_server(server, &socket);
}
