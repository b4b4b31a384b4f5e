//! Tests that `dmaload demo` loads, verifies and compares, and leaves nothing behind.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use common::{dmaload, finish, folder, run};
use rustix::process::{Pid, Signal, kill_process};

fn count_files(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

#[test]
fn demo_verifies_compares_and_removes_its_file() {
    let folder = folder();
    let done = run(dmaload(["demo", "--size", "64MiB", "--rounds", "1", "--dir"]).arg(folder.path())).succeeds();
    for word in ["64.0 MiB", "route", "every byte", "normal", "times as fast"] {
        assert!(done.text().contains(word), "{word:?} is missing: {done}");
    }
    assert_eq!(count_files(folder.path()), 0, "{done}");
}

#[test]
fn interrupted_demo_removes_its_file() {
    let folder = folder();
    let mut demo = dmaload(["demo", "--size", "512MiB", "--dir"]);
    let demo = demo.arg(folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while count_files(folder.path()) == 0 {
        assert!(Instant::now() < deadline, "the demo should have created its file by now");
        thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&demo), Signal::INT).unwrap();
    let done = finish("dmaload demo, interrupted".to_owned(), demo);
    assert_eq!(done.signal, Some(Signal::INT.as_raw()), "the signal did not end the process: {done}");
    assert_eq!(count_files(folder.path()), 0, "{done}");
}

#[test]
fn invalid_or_too_small_size_is_refused() {
    run(&mut dmaload(["demo", "--size", "much"])).fails(2, &["much"]);
    run(&mut dmaload(["demo", "--size", "10"])).fails(1, &["4096"]);
}
