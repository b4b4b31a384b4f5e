//! Tests for errors in the command line, and in writing to standard output.

use std::fs;
use std::process::Command;

use crate::common::{self, MIB, dmaload, folder, random_file, run, sha256sum};
use crate::{load, text};

#[test]
fn wrong_usage_is_status_2_and_says_what_is_wrong() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5000);
    let cases: [(&[&str], &str); 16] = [
        (&["--window", "32MiB"], "smaller than a segment"),
        (&["--segment-size", "3MiB"], "multiple of 2 MiB"),
        (&["--segment-size", "0"], "multiple of 2 MiB"),
        (&["--segment-size", "2GiB", "--window", "2GiB"], "at most 1 GiB"),
        (&["--chunk-size", "1000"], "multiple of 64 KiB"),
        (&["--queue-depth", "0"], "queue depth"),
        (&["--queue-depth", "5000"], "queue depth"),
        (&["--segment-size", "much"], "much"),
        (&["--window", "-1"], "-1"),
        (&["--route", "scenic"], "pread-direct"),
        (&["--heap", "attic"], "memfd"),
        (&["--layout", "spiral"], "segmented"),
        (&["--format", "poem"], "safetensors"),
        (&["--digest", "md5"], "sha256"),
        (&["--dma-buf", "--heap", "memfd"], "dma-buf"),
        (&["--quiet", "--json"], "--quiet"),
    ];
    for (arguments, word) in cases {
        run(dmaload(["load"]).args(arguments).arg(&path)).fails(2, &[word]);
    }
    run(&mut dmaload(["load"])).fails(2, &["PATH"]);
    run(&mut dmaload(["unload"])).fails(2, &["unload"]);
    run(dmaload(["load", "--frobnicate"]).arg(&path)).fails(2, &["--frobnicate"]);
}

/// Settings do not depend on the file, so they are checked first.
#[test]
fn wrong_usage_is_reported_before_a_missing_file() {
    run(&mut dmaload(["load", "--window", "2MiB", "/nonexistent"])).fails(2, &["smaller than a segment"]);
}

#[test]
fn help_and_version_are_not_errors() {
    for arguments in [&["--help"][..], &["--version"], &["load", "--help"], &["demo", "--help"]] {
        let done = run(&mut dmaload(arguments)).succeeds();
        assert!(done.text().contains("dmaload"), "{done}");
    }
}

#[test]
fn file_loads_with_the_largest_allowed_settings() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 3 * MIB + 1);
    let most =
        ["--segment-size", "1GiB", "--window", "1GiB", "--chunk-size", "1GiB", "--queue-depth", "4096", "--digest", "sha256"];
    let json = common::load_json(&path, &most);
    assert_eq!(common::digest_of(&json), sha256sum(&path), "{json:#}");
}

#[test]
fn with_json_each_error_is_one_object_on_standard_output() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5000);
    let missing = folder.path().join("missing");
    let missing = text(&missing);
    for (arguments, code) in [
        (&["load", "--json", missing][..], 1),
        (&["inspect", "--json", missing], 1),
        (&["doctor", "--json", missing], 1),
        (&["attach", "--json", missing], 1),
        (&["bench", "--json", missing], 1),
        (&["load", "--json", text(&path), "--window", "1"], 2),
        (&["load", "--json", "--frobnicate"], 2),
        (&["load", "--json"], 2),
    ] {
        let json = run(&mut dmaload(arguments)).fails(code, &[]).json();
        assert_eq!(json.as_object().unwrap().len(), 3, "{json:#}");
        assert!(json["error"].as_str().is_some_and(|error| !error.is_empty()), "{json:#}");
    }
    // The load has already written its object, so a failure to run the program is reported only on
    // standard error.
    let done = run(load(&path).args(["--exec", missing])).exits(1);
    assert_eq!(done.json()["bytes"], 5000, "{done}");
    assert!(done.stderr.contains("ENOENT"), "{done}");
}

#[test]
fn a_full_standard_output_is_an_error() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", MIB);
    for command in
        [&["load", "--json"][..], &["load"], &["cat"], &["inspect"], &["inspect", "--json"], &["manifest"], &["doctor"]]
    {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let child = dmaload(command).arg(&path).stdout(full).stderr(std::process::Stdio::piped()).spawn().unwrap();
        common::finish(format!("dmaload {command:?} > /dev/full"), child).fails(1, &["cannot write to standard output: ENOSPC"]);
    }
}

/// The Rust runtime replaces a closed standard output with /dev/null, where output would be lost
/// silently.
#[test]
fn a_closed_standard_output_is_an_error() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", MIB);
    let closing = |arguments: &[&str]| {
        let command = dmaload(arguments);
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec \"$@\" >&-", "sh"]).arg(command.get_program()).args(command.get_args());
        shell
    };
    for command in [&["load"][..], &["cat"], &["inspect"], &["manifest"], &["doctor"]] {
        run(closing(command).arg(&path)).fails(1, &["cannot write to standard output: EBADF"]);
        let mut json = closing(command);
        let done = run(json.arg("--json").arg(&path));
        assert!(done.stderr.contains("EBADF") || done.code == Some(2), "{done}");
        run(dmaload(command).arg(&path)).succeeds();
    }
    run(&mut closing(&["--help"])).exits(1);
    // With --quiet, nothing is written, so nothing is lost.
    run(closing(&["load", "--quiet"]).arg(&path)).exits(0);
    // Redirecting to /dev/null discards output explicitly, which is not an error.
    for redirection in [">/dev/null", "1<>/dev/null"] {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("exec \"$@\" {redirection}"), "sh", env!("CARGO_BIN_EXE_dmaload"), "cat"]);
        run(shell.arg(&path)).succeeds();
    }
}
