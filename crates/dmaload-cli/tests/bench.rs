//! Tests that `dmaload bench` measures every mode, reports failures, and leaves nothing behind.
//! Speeds are not checked.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use common::{MIB, NOBODY, as_nobody, dmaload, finish, folder, is_root, random_file, run, skip};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const MODES: [&str; 9] =
    ["normal", "normal_io", "direct_io", "direct_io_check", "limit", "mmap", "tokio-fs", "pread-direct", "no-overlap"];

fn names(json: &Value) -> Vec<&str> {
    json["modes"].as_array().unwrap().iter().map(|mode| mode["name"].as_str().unwrap()).collect()
}

fn mode<'a>(json: &'a Value, name: &str) -> &'a Value {
    json["modes"].as_array().unwrap().iter().find(|mode| mode["name"] == name).unwrap_or_else(|| panic!("no {name}: {json:#}"))
}

#[track_caller]
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

#[track_caller]
fn assert_close(left: f64, right: f64) {
    assert!((left - right).abs() <= 1e-9 * left.abs().max(right.abs()), "{left} is not close to {right}");
}

/// Returns why this machine, or the file's file system, can't run modes that need io_uring or
/// direct reads; `None` if it can.
fn why_unmeasurable(file: &Path) -> Option<String> {
    let done = run(dmaload(["bench", "--rounds", "1", "--modes", "limit,pread-direct", "--json"]).arg(file));
    (done.code != Some(0)).then(|| done.to_string())
}

fn bench_json(file: &Path, arguments: &[&str]) -> Value {
    run(dmaload(["bench", "--json"]).args(arguments).arg(file)).succeeds().json()
}

#[test]
fn every_mode_is_measured_and_the_numbers_of_one_round_agree() {
    let folder = folder();
    let file = random_file(folder.path(), "model.bin", 9 * MIB + 777);
    if let Some(reason) = why_unmeasurable(&file) {
        return skip(reason);
    }
    let json = bench_json(&file, &["--rounds", "1"]);
    assert_eq!(names(&json), MODES);
    assert_eq!((&json["rounds"], &json["file_bytes"]), (&1.into(), &(9 * MIB + 777).into()));
    assert!(json["page_size_bytes"].as_u64().unwrap() >= 4096);
    let seconds = |name: &str| number(&mode(&json, name)["seconds"]["median"]);
    assert_close(number(&json["limit_bytes_per_second"]), (9 * MIB + 777) as f64 / seconds("limit"));
    for name in MODES {
        let mode = mode(&json, name);
        assert!(seconds(name) > 0.0);
        for (key, reference) in [("ratio_to_normal", "normal"), ("share_of_limit", "limit")] {
            for statistic in ["median", "min", "max"] {
                assert_close(number(&mode[key][statistic]), seconds(reference) / seconds(name));
            }
        }
        assert!(number(&mode["cpu_seconds_per_gib"]) >= 0.0);
        assert!(["4k", "2m", "16k", "64k"].contains(&mode["pages"].as_str().unwrap()), "{mode:#}");
        assert_eq!(mode["first_segment_share"].is_number(), name.starts_with("direct_io") || name == "pread-direct", "{mode:#}");
        assert_eq!(mode["peak_extra_bytes"].is_number(), name != "limit", "{mode:#}");
        assert_eq!(mode["runs"].as_array().unwrap().len(), 1);
        assert_eq!(mode["failures"], serde_json::json!([]));
    }
    assert!(number(&mode(&json, "direct_io")["overlap"]["median"]) > 0.0);
    assert_ne!(mode(&json, "normal")["pages"], "2m", "the baseline should not be on 2 MiB pages");
}

#[test]
fn ratios_pair_within_rounds_and_files_form_one_load() {
    let folder = folder();
    let files = [random_file(folder.path(), "a.bin", 3 * MIB), random_file(folder.path(), "b.bin", 2 * MIB + 1)];
    if let Some(reason) = why_unmeasurable(&files[0]) {
        return skip(reason);
    }
    let json = run(dmaload(["bench", "--rounds", "3", "--modes", "direct_io_check", "--json"]).args(&files)).succeeds().json();
    assert_eq!(names(&json), ["normal", "direct_io_check", "limit"]);
    assert_eq!(json["file_bytes"], 5 * MIB + 1);
    let seconds = |name: &str| -> Vec<f64> {
        mode(&json, name)["runs"].as_array().unwrap().iter().map(|run| number(&run["seconds"])).collect()
    };
    let mut ratios: Vec<f64> =
        seconds("normal").iter().zip(seconds("direct_io_check")).map(|(normal, mode)| normal / mode).collect();
    ratios.sort_unstable_by(f64::total_cmp);
    let reported = &mode(&json, "direct_io_check")["ratio_to_normal"];
    for (statistic, expected) in [("min", ratios[0]), ("median", ratios[1]), ("max", ratios[2])] {
        assert_close(number(&reported[statistic]), expected);
    }
}

#[test]
fn pages_have_the_requested_size() {
    let folder = folder();
    let file = random_file(folder.path(), "model.bin", 8 * MIB);
    if let Some(reason) = why_unmeasurable(&file) {
        return skip(reason);
    }
    let modes = ["--rounds", "1", "--modes", "normal_io,direct_io,no-overlap"];
    let small = bench_json(&file, &[&modes[..], &["--pages", "4k"]].concat());
    for name in ["normal", "normal_io", "direct_io", "no-overlap"] {
        assert_ne!(mode(&small, name)["pages"], "2m");
    }
    let done = run(dmaload(["bench", "--json", "--pages", "2m"]).args(modes).arg(&file));
    let huge = done.json();
    if done.code == Some(0) {
        for name in ["normal_io", "direct_io", "no-overlap", "limit"] {
            assert_eq!(mode(&huge, name)["pages"], "2m");
        }
        assert_ne!(mode(&huge, "normal")["pages"], "2m");
        assert_eq!(huge["page_size_bytes"], 2 * MIB);
    } else {
        // If 2 MiB pages are unavailable, the results contain the reason instead of a time for the
        // mode.
        let failure = &mode(&huge, "direct_io")["failures"][0]["reason"];
        assert!(failure.as_str().unwrap().contains("2 MiB"), "{done}");
        assert_eq!(mode(&huge, "direct_io")["seconds"], Value::Null);
    }
}

#[test]
fn wrong_usage_is_reported_before_anything_is_measured() {
    let folder = folder();
    let file = random_file(folder.path(), "model.bin", 5000);
    let wrong = |arguments: &[&str], words: &[&str]| {
        run(dmaload(["bench"]).args(arguments).arg(&file)).fails(2, words);
    };
    wrong(&["--modes", "normal,fast"], &["fast", "direct_io_check"]);
    wrong(&["--rounds", "0"], &["rounds"]);
    wrong(&["--pressure", "flood:1GiB"], &["flood", "hog:all-but:SIZE"]);
    wrong(&["--json", "--md"], &["--md"]);
    wrong(&["--size", "1MiB"], &["--size"]);
    wrong(&["--window", "2MiB"], &["window"]);
    wrong(&["--peer", "same=true", "--peer", "other=true", "--peer", "same=false"], &["--peer", "several", "\"same\""]);
    run(&mut dmaload(["bench"])).fails(2, &["PATH"]);
    run(&mut dmaload(["bench", "/nonexistent/x"])).fails(1, &["/nonexistent/x", "ENOENT"]);
    run(dmaload(["bench"]).arg(folder.path())).fails(1, &["is not a file"]);
    if let Ok(mut command) = as_nobody(dmaload(["bench", "--user", "1", "--size", "1MiB"])) {
        run(&mut command).fails(2, &["--user", "root"]);
    }
}

#[test]
fn other_users_get_the_usual_locked_memory_limit() {
    if !is_root() {
        return skip("only root can run a process as another user");
    }
    let folder = folder();
    let file = random_file(folder.path(), "model.bin", 80 * MIB);
    if let Some(reason) = why_unmeasurable(&file) {
        return skip(reason);
    }
    let json = bench_json(&file, &["--rounds", "1", "--modes", "direct_io", "--user", &NOBODY.to_string()]);
    assert_eq!(json["user"], NOBODY);
    let notes = mode(&json, "direct_io")["notes"].to_string();
    assert!(!notes.contains("uring-fixed-direct"), "80 MiB can't all be registered under a limit of 8 MiB: {notes}");
    // Even with --user, the mode limit is measured as root.
    assert_eq!(mode(&json, "limit")["failures"], serde_json::json!([]));
    // If the user can't read the file, each mode fails, and the results say why.
    common::allow(&file, 0o600);
    let done = run(dmaload(["bench", "--json", "--rounds", "1", "--modes", "mmap", "--user", &NOBODY.to_string()]).arg(&file));
    let json = done.exits(1).json();
    assert!(mode(&json, "mmap")["failures"][0]["reason"].as_str().unwrap().contains("EACCES"), "{json:#}");
}

#[test]
fn created_file_is_removed_and_table_and_chart_are_written() {
    let folder = folder();
    let chart = folder.path().join("out.svg");
    let scratch = common::folder();
    let arguments = ["bench", "--size", "6MiB", "--rounds", "2", "--modes", "direct_io,mmap", "--md", "--dir"];
    let done = run(dmaload(arguments).arg(scratch.path()).arg("--plot").arg(&chart));
    if done.code != Some(0) {
        return skip(done);
    }
    let done = done.succeeds();
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    for words in ["| mode | pages |", "| direct_io | ", "| mmap | ", "direct_io is ", "of the device's limit", "2 rounds"] {
        assert!(done.text().contains(words), "{words:?} is missing: {done}");
    }
    let svg = fs::read_to_string(chart).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains(">direct_io<"), "{svg}");
    let done =
        run(dmaload(["bench", "--size", "6MiB", "--rounds", "1", "--modes", "mmap", "--dir"]).arg(scratch.path())).succeeds();
    assert!(done.text().contains("\nmmap"), "{done}");
}

fn groups_of(id: u32) -> Vec<PathBuf> {
    let name = format!("dmaload-bench-{id}");
    let find = |root: PathBuf| {
        let mut found = Vec::new();
        let mut left = vec![root];
        while let Some(folder) = left.pop() {
            let inside = fs::read_dir(folder).into_iter().flatten().flatten();
            let folders = inside.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path());
            let (own, others): (Vec<_>, Vec<_>) = folders.partition(|folder| folder.ends_with(&name));
            found.extend(own);
            left.extend(others);
        }
        found
    };
    find("/sys/fs/cgroup".into())
}

#[test]
fn cgroup_limits_memory_and_its_kills_are_reported() {
    let folder = folder();
    let file = random_file(folder.path(), "model.bin", 40 * MIB);
    let bench = |pressure: &str, modes: &str| {
        run(dmaload(["bench", "--json", "--rounds", "1", "--modes", modes, "--pressure", pressure]).arg(&file))
    };
    let done = bench("cgroup:300MiB", "direct_io_check");
    if done.code != Some(0) {
        assert!(done.stderr.contains("cannot create a memory cgroup"), "{done}");
        return skip(done);
    }
    for pressure in ["cgroup:300MiB,clean", "cgroup:300MiB,dirty"] {
        let json = bench(pressure, "direct_io_check").succeeds().json();
        assert!(json["pressure"].as_str().unwrap().contains("page cache"));
        assert_eq!(mode(&json, "direct_io_check")["failures"], serde_json::json!([]));
    }
    // The limit is below the size of the file, so no mode that keeps the whole file in memory can
    // succeed.
    let json = bench("cgroup:24MiB", "direct_io,tokio-fs").succeeds().json();
    for (name, reason) in [("normal", "killed"), ("tokio-fs", "killed"), ("direct_io", "more bytes are needed")] {
        let mode = mode(&json, name);
        assert!(mode["failures"][0]["reason"].as_str().unwrap().contains(reason), "{mode:#}");
        assert_eq!((&mode["seconds"], &mode["ratio_to_normal"]), (&Value::Null, &Value::Null));
    }
}

#[test]
fn modes_run_while_a_hog_occupies_memory() {
    let folder = folder();
    let file = random_file(folder.path(), "model.bin", 4 * MIB);
    if let Some(reason) = why_unmeasurable(&file) {
        return skip(reason);
    }
    let json = bench_json(&file, &["--rounds", "1", "--modes", "direct_io", "--pressure", "hog:64MiB"]);
    assert!(json["pressure"].as_str().unwrap().contains("64.0 MiB"), "{json:#}");
}

#[test]
fn interrupted_bench_leaves_no_file_process_or_group() {
    let folder = folder();
    // Only root can create a memory cgroup. Without root, this test uses a hog, which needs none.
    let pressure = if is_root() { "cgroup:512MiB,clean" } else { "hog:64MiB" };
    let mut bench = dmaload(["bench", "--size", "128MiB", "--rounds", "1000", "--pressure", pressure, "--dir"]);
    let bench = bench.arg(folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let id = bench.id();
    let children = || fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut seen = String::new();
    while seen.is_empty() && Instant::now() < deadline && Path::new(&format!("/proc/{id}/exe")).exists() {
        thread::sleep(Duration::from_millis(5));
        seen = children();
    }
    kill_process(Pid::from_child(&bench), Signal::INT).unwrap();
    let done = finish("dmaload bench, interrupted".to_owned(), bench);
    if done.code.is_some() {
        return skip(done);
    }
    assert_eq!(done.signal, Some(Signal::INT.as_raw()), "{done}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{done}");
    assert_eq!(groups_of(id), Vec::<PathBuf>::new());
    for child in seen.split_whitespace() {
        let name = fs::read_to_string(format!("/proc/{child}/cmdline")).unwrap_or_default();
        assert!(!name.contains("bench-child"), "process {child} is still running: {name:?}");
    }
}
