//! `dmaload serve` and `dmaload attach`: one process loads, others have its memory.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

use common::{digest_of, dmaload, folder, random_file, run, sha256sum};
use rustix::process::{Pid, Signal, kill_process};

/// A server that has said that it serves.
fn serving(arguments: &[&str], socket: &Path, paths: &[&Path]) -> Child {
    let mut command = dmaload(["serve"]);
    let mut server = command.args(arguments).arg(socket).args(paths).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("serving ")), "it ended before it served");
    server
}

fn end(mut server: Child, socket: &Path) {
    kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
    assert!(server.wait().unwrap().success());
    assert!(!socket.exists(), "the socket is left behind");
}

#[test]
fn what_is_served_is_attached_to_with_the_right_digest() {
    let folder = folder();
    let socket = folder.path().join("socket");
    let paths = [random_file(folder.path(), "a.bin", 5_000_001), random_file(folder.path(), "b.bin", 77)];
    let server = serving(&[], &socket, &[&paths[0], &paths[1]]);
    for _ in 0..3 {
        let json = run(dmaload(["attach", "--json", "--digest", "sha256"]).arg(&socket)).succeeds().json();
        assert_eq!(digest_of(&json), sha256sum(&paths[0]));
        assert_eq!(json["files"][1]["digest"]["hex"], sha256sum(&paths[1]));
        assert_eq!((json["process"].as_u64(), json["heap"].as_str()), (Some(server.id().into()), Some("shared memfd")));
    }
    let text = run(dmaload(["attach", "--name", "model"]).arg(&socket)).succeeds().text();
    assert!(text.contains("attached to") && text.contains("shared memfd"), "{text}");
    run(dmaload(["attach", "--name", "other"]).arg(&socket)).fails(1, &["no image \"other\""]);
    run(dmaload(["serve"]).arg(&socket).arg(&paths[0])).fails(1, &["listens there"]);
    end(server, &socket);
    run(dmaload(["attach"]).arg(&socket)).fails(1, &["ENOENT"]);
}

#[test]
fn a_load_that_fails_leaves_no_socket_behind() {
    let folder = folder();
    let socket = folder.path().join("socket");
    run(dmaload(["serve"]).arg(&socket).arg(folder.path().join("missing"))).fails(1, &["missing", "ENOENT"]);
    assert!(!socket.exists());
    run(dmaload(["serve", "--share-dma-bufs"]).arg(&socket).arg("x")).fails(2, &["--dma-buf"]);
}
