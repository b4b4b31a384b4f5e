//! Runs C programs that use real dma-bufs: `examples/c/dmabuf-heap-file-read.c`, and the test
//! suite for the C library.
#![allow(clippy::unwrap_used, reason = "a failure here should fail the test")]
#![allow(clippy::print_stdout, reason = "prints the programs' output")]

mod common;

use std::process::{Command, Output};

use common::{LARGE, SizeLimit, disk, file, format_sizes};
use dmaload_guest::record_row;

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    print!("{}", String::from_utf8_lossy(&output.stdout));
    output
}

/// Runs the example in all modes except `bench`. Each mode loads the whole file into one dma-buf.
fn run_every_mode(heap: &str) {
    let path = file(LARGE);
    for mode in ["normal", "normal_io", "direct_io", "direct_io_check"] {
        let output = run("/bin/dmabuf-heap-file-read", &[heap, mode, path.to_str().unwrap()]);
        let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{heap} {mode}: {error}");
        assert!(said.contains("total cost") && said.contains(&format!("for {LARGE} bytes")), "{heap} {mode}: {said}");
        let checked = said.contains("every byte matches the file");
        assert_eq!(checked, mode == "direct_io_check", "{heap} {mode}: {said}");
        record_row("capi", &[heap, mode, &format_sizes(&[LARGE]), "one", if checked { "equal" } else { "done" }]);
    }
}

#[test]
fn c_example_runs_in_each_mode_on_the_system_heap() {
    run_every_mode("system");
}

#[test]
fn c_example_runs_in_each_mode_on_udmabuf() {
    let _raised = SizeLimit::set_mib(256);
    run_every_mode("udmabuf");
}

#[test]
fn file_above_udmabufs_limit_fails_and_names_the_limit() {
    let _limited = SizeLimit::set_mib(64);
    let output = run("/bin/dmabuf-heap-file-read", &["udmabuf", "direct_io", file(LARGE).to_str().unwrap()]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("size_limit_mb") && error.contains("File too large"), "{error}");
}

#[test]
fn c_suite_passes_on_both_devices() {
    let output = run("/bin/capi-suite", &[disk().to_str().unwrap()]);
    let (said, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{error}");
    for device in ["/dev/udmabuf", "/dev/dma_heap/system"] {
        assert!(said.contains(&format!("{device}: ok")), "{said}");
    }
}
