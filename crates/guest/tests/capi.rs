//! C programs on real dma-bufs: the one of the kernel series, and the C suite.
#![allow(clippy::unwrap_used, reason = "what fails here has failed the test")]
#![allow(clippy::print_stdout, reason = "what the programs say")]

mod common;

use std::process::{Command, Output};

use common::{LARGE, RaisedLimit, disk, file, told};
use dmaload_guest::row;

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    print!("{}", String::from_utf8_lossy(&output.stdout));
    output
}

/// All modes of the program on this heap; each is one dma-buf of the whole file.
fn every_mode(heap: &str) {
    let path = file(LARGE);
    for mode in ["normal", "normal_io", "direct_io", "direct_io_check"] {
        let output = run("/bin/dmabuf-heap-file-read", &[heap, mode, path.to_str().unwrap()]);
        let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{heap} {mode}: {error}");
        assert!(said.contains("total cost") && said.contains(&format!("for {LARGE} bytes")), "{heap} {mode}: {said}");
        let checked = said.contains("every byte matches the file");
        assert_eq!(checked, mode == "direct_io_check", "{heap} {mode}: {said}");
        row("capi", &[heap, mode, &told(&[LARGE]), "one", if checked { "equal" } else { "done" }]);
    }
}

#[test]
fn the_program_of_the_kernel_series_runs_on_the_system_heap() {
    every_mode("system");
}

#[test]
fn the_program_of_the_kernel_series_runs_on_udmabuf() {
    let _raised = RaisedLimit::to(256);
    every_mode("udmabuf");
}

#[test]
fn a_file_that_udmabuf_has_no_room_for_says_which_limit() {
    let output = run("/bin/dmabuf-heap-file-read", &["udmabuf", "direct_io", file(LARGE).to_str().unwrap()]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("size_limit_mb") && error.contains("File too large"), "{error}");
}

#[test]
fn what_c_can_do_right_and_wrong() {
    let output = run("/bin/capi-suite", &[disk().to_str().unwrap()]);
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{error}");
    for device in ["/dev/udmabuf", "/dev/dma_heap/system"] {
        assert!(said.contains(&format!("{device}: ok")), "{said}");
    }
}
