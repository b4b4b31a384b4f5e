//! Tests that `dmaload load` loads exactly the bytes of the file, and that its report contains
//! everything that docs/cli.md documents.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{MIB, ROUTES, SMALL_SEGMENTS, digest_of, dmaload, folder, large_file, load_json, random_file, run, sha256sum, skip};
use serde_json::Value;

const SEGMENT: usize = 2 * MIB;
const SIZES: [usize; 11] = [0, 1, 511, 512, 4095, 4096, 4097, SEGMENT - 1, SEGMENT, SEGMENT + 1, 5 * SEGMENT + 1];
const SHA256: [&str; 2] = ["--digest", "sha256"];

/// Returns the combinations of heap and layout to test.
fn shapes() -> impl Iterator<Item = (&'static str, &'static str)> {
    ["memfd", "anon"].into_iter().flat_map(|heap| ["segmented", "single"].map(|layout| (heap, layout)))
}

/// Loads files of all sizes through this route only, into all combinations of heap and layout.
/// Asserts that each loaded file has the digest that coreutils computes.
fn check_every_size_and_shape(route: &str) {
    let folder = folder();
    if let Some(reason) = common::unavailable(route, folder.path()) {
        return skip(reason);
    }
    for size in SIZES {
        let path = random_file(folder.path(), "model.bin", size);
        let expected = sha256sum(&path);
        for (heap, layout) in shapes() {
            let wanted = ["--strict", "--route", route, "--heap", heap, "--layout", layout];
            let json = load_json(&path, &[&wanted[..], &SMALL_SEGMENTS, &SHA256].concat());
            assert_eq!(digest_of(&json), expected, "{size} bytes through {route} into {heap}, {layout}: {json:#}");
            assert_report(&json, size, route, heap, layout);
        }
    }
}

/// Asserts that the report shows the requested options, and that its segments cover the file.
fn assert_report(json: &Value, size: usize, route: &str, heap: &str, layout: &str) {
    assert_eq!(json["bytes"], size, "{json:#}");
    for (key, expected) in [("route", route), ("heap", heap), ("layout", layout)] {
        assert_eq!(json[key], expected, "{key}: {json:#}");
    }
    assert_eq!(json["files"][0]["route"], route, "{json:#}");
    assert_eq!(json["fallbacks"], Value::Array(vec![]), "{json:#}");
    let segments = json["segments"].as_array().unwrap();
    let expected = if layout == "single" { size.min(1) } else { size.div_ceil(SEGMENT) };
    assert_eq!(segments.len(), expected, "{json:#}");
    let mut end = 0;
    for (index, segment) in segments.iter().enumerate() {
        assert_eq!((&segment["index"], &segment["file"]), (&index.into(), &0.into()), "{json:#}");
        assert_eq!((&segment["file_offset"], &segment["dma_buf"]), (&end.into(), &false.into()), "{json:#}");
        end += segment["bytes"].as_u64().unwrap();
    }
    assert_eq!(end, size as u64, "{json:#}");
}

#[test]
fn every_size_and_shape_by_uring_fixed_direct_equals_sha256sum() {
    check_every_size_and_shape("uring-fixed-direct");
}

#[test]
fn every_size_and_shape_by_uring_direct_equals_sha256sum() {
    check_every_size_and_shape("uring-direct");
}

#[test]
fn every_size_and_shape_by_pread_direct_equals_sha256sum() {
    check_every_size_and_shape("pread-direct");
}

#[test]
fn every_size_and_shape_by_bounce_equals_sha256sum() {
    check_every_size_and_shape("bounce");
}

#[test]
fn every_size_and_shape_by_the_page_cache_equals_sha256sum() {
    check_every_size_and_shape("buffered");
}

#[test]
fn every_size_and_shape_by_uring_buffered_equals_sha256sum() {
    check_every_size_and_shape("uring-buffered");
}

#[test]
fn sizes_around_a_segment_equal_sha256sum_by_default() {
    let folder = folder();
    for size in [0, 1, 4097, 64 * MIB - 1, 64 * MIB, 64 * MIB + 1, 3 * 64 * MIB + 1] {
        let path = large_file(folder.path(), "model.bin", size as u64);
        let json = load_json(&path, &SHA256);
        assert_eq!(digest_of(&json), sha256sum(&path), "{size} bytes: {json:#}");
        assert_eq!(json["segments"].as_array().map(Vec::len), Some(size.div_ceil(64 * MIB)), "{json:#}");
    }
}

#[test]
fn digest_of_a_3_gib_file_equals_sha256sum() {
    const SIZE: u64 = 3 << 30;
    let folder = folder();
    if let Some(reason) = common::no_room(folder.path(), SIZE + (1 << 30), SIZE + (1 << 30)) {
        return skip(reason);
    }
    let path = large_file(folder.path(), "model.bin", SIZE);
    // The load and sha256sum run in parallel, because both take many seconds.
    let (json, expected) = std::thread::scope(|scope| {
        let expected = scope.spawn(|| sha256sum(&path));
        (load_json(&path, &SHA256), expected.join().unwrap())
    });
    assert_eq!(digest_of(&json), expected, "{json:#}");
    assert_eq!(json["bytes"], SIZE, "{json:#}");
}

/// The settings include chunk sizes that do not divide the segment size evenly, and a queue that
/// holds a single read.
#[test]
fn chunk_size_and_queue_depth_do_not_affect_the_bytes() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 9 * MIB + 777);
    let expected = sha256sum(&path);
    for (chunk, depth) in [("64KiB", "1"), ("64KiB", "256"), ("192KiB", "3"), ("1GiB", "32")] {
        let json = load_json(&path, &[&["--chunk-size", chunk, "--queue-depth", depth][..], &SMALL_SEGMENTS, &SHA256].concat());
        assert_eq!(digest_of(&json), expected, "chunks of {chunk}, {depth} in flight: {json:#}");
    }
}

#[test]
fn both_page_sizes_hold_the_same_bytes() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 6 * MIB + 1);
    let expected = sha256sum(&path);
    for (pages, size) in [("4k", Some(rustix::param::page_size())), ("auto", None)] {
        let json = load_json(&path, &[&["--pages", pages][..], &SHA256].concat());
        assert_eq!(digest_of(&json), expected, "pages {pages}: {json:#}");
        assert!(size.is_none_or(|size| json["page_size_bytes"] == size), "pages {pages}: {json:#}");
    }
}

#[test]
fn every_digest_equals_that_of_another_implementation() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 3 * SEGMENT + 5);
    let bytes = fs::read(&path).unwrap();
    let expected = [
        ("sha256", sha256sum(&path)),
        ("blake3", blake3::hash(&bytes).to_hex().to_string()),
        ("crc32c", format!("{:08x}", crc32c::crc32c(&bytes))),
        ("xxh3", format!("{:016x}", twox_hash::XxHash3_64::oneshot(&bytes))),
    ];
    for (algorithm, hex) in expected {
        let json = load_json(&path, &["--digest", algorithm]);
        assert_eq!(json["files"][0]["digest"]["algorithm"], algorithm, "{json:#}");
        assert_eq!(digest_of(&json), hex, "{algorithm}");
        let text = run(dmaload(["load", "--digest", algorithm]).arg(&path)).succeeds().text();
        assert!(text.contains(&hex), "{algorithm} {hex} is missing in:\n{text}");
    }
}

#[test]
fn several_files_are_reported_in_the_order_given() {
    let folder = folder();
    let sizes = [3 * SEGMENT + 1, 0, 1, SEGMENT];
    let paths: Vec<PathBuf> = (0..).zip(sizes).map(|(i, size)| random_file(folder.path(), &format!("{i}.bin"), size)).collect();
    for (heap, layout) in shapes() {
        let arguments = [&["--heap", heap, "--layout", layout][..], &SMALL_SEGMENTS, &SHA256].concat();
        let json = run(dmaload(["load", "--json"]).args(arguments).args(&paths)).succeeds().json();
        assert_eq!(json["bytes"], sizes.iter().sum::<usize>(), "{json:#}");
        let files = json["files"].as_array().unwrap();
        assert_eq!(files.len(), paths.len(), "{json:#}");
        for ((file, path), size) in files.iter().zip(&paths).zip(sizes) {
            assert_eq!(file["path"], path.to_str().unwrap(), "{json:#}");
            assert_eq!(file["bytes"], size, "{json:#}");
            assert_eq!(file["digest"]["hex"], sha256sum(path), "{json:#}");
        }
        for (index, size) in sizes.into_iter().enumerate() {
            assert_eq!(bytes_of_file(&json, index), size as u64, "segments of file {index}: {json:#}");
        }
    }
}

fn bytes_of_file(json: &Value, index: usize) -> u64 {
    let segments = json["segments"].as_array().unwrap().iter();
    segments.filter(|segment| segment["file"] == index).map(|segment| segment["bytes"].as_u64().unwrap()).sum()
}

#[test]
fn file_that_is_named_twice_is_loaded_twice() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", SEGMENT + 1);
    let json = run(dmaload(["load", "--json"]).args(SHA256).args([&path, &path])).succeeds().json();
    let expected = sha256sum(&path);
    for file in [&json["files"][0], &json["files"][1]] {
        assert_eq!(file["digest"]["hex"], expected, "{json:#}");
    }
}

/// The type of a JSON value.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Count,
    Seconds,
    Text,
    Bool,
}

#[track_caller]
fn assert_kinds(object: &Value, kinds: &[(&str, Kind)]) {
    for &(key, kind) in kinds {
        let value = object.get(key).unwrap_or_else(|| panic!("{key} is missing in {object:#}"));
        let has_type = match kind {
            Kind::Count => value.is_u64(),
            Kind::Seconds => value.as_f64().is_some_and(|seconds| seconds.is_finite() && seconds >= 0.0),
            Kind::Text => value.as_str().is_some_and(|text| !text.is_empty()),
            Kind::Bool => value.is_boolean(),
        };
        assert!(has_type, "{key} is {value}, not a {kind:?}");
    }
}

fn assert_contract(json: &Value) {
    use Kind::{Bool, Count, Seconds, Text};
    let whole = [("bytes", Count), ("peak_resident_bytes", Count), ("page_size_bytes", Count), ("tensors", Count)];
    let times = ["seconds", "throughput_bytes_per_second", "allocate_seconds", "read_seconds", "cpu_seconds"];
    assert_kinds(json, &whole);
    assert_kinds(json, &times.map(|key| (key, Seconds)));
    assert_kinds(json, &["heap", "layout", "route"].map(|key| (key, Text)));
    for fallback in json["fallbacks"].as_array().unwrap() {
        assert_kinds(fallback, &["from", "to", "reason", "errno"].map(|key| (key, Text)));
    }
    for segment in json["segments"].as_array().unwrap() {
        assert_kinds(segment, &[("index", Count), ("file", Count), ("file_offset", Count), ("bytes", Count), ("dma_buf", Bool)]);
    }
    for file in json["files"].as_array().unwrap() {
        assert_kinds(file, &[("path", Text), ("bytes", Count), ("route", Text)]);
        assert!(file.get("digest").is_some(), "{file:#}");
    }
}

#[test]
fn json_has_every_documented_key_with_its_type() {
    let folder = folder();
    let header = br#"{"w":{"dtype":"U8","shape":[2000,1000],"data_offsets":[0,2000000]}}"#;
    let path = common::safetensors(folder.path(), "model.safetensors", header, 2_000_000);
    let json = load_json(&path, &["--digest", "crc32c"]);
    assert_contract(&json);
    assert_kinds(&json, &[("first_segment_seconds", Kind::Seconds)]);
    assert_kinds(&json["files"][0]["digest"], &[("algorithm", Kind::Text), ("hex", Kind::Text)]);
    assert_eq!(json["tensors"], 1, "{json:#}");
    assert_times_are_consistent(&json);

    let without = load_json(&path, &["--format", "raw"]);
    assert_contract(&without);
    assert_eq!((&without["tensors"], &without["files"][0]["digest"]), (&0.into(), &Value::Null), "{without:#}");
}

fn assert_times_are_consistent(json: &Value) {
    let number = |key: &str| json[key].as_f64().unwrap();
    let total = number("seconds");
    for key in ["allocate_seconds", "read_seconds", "first_segment_seconds"] {
        assert!(number(key) > 0.0 && number(key) <= total, "{key}: {json:#}");
    }
    let rate = number("bytes") / total;
    assert!((number("throughput_bytes_per_second") / rate - 1.0).abs() < 0.001, "{rate}: {json:#}");
    assert!(number("peak_resident_bytes") >= number("bytes"), "{json:#}");
    assert!([4096, 16384, 65536, 2 << 20].map(Value::from).contains(&json["page_size_bytes"]), "{json:#}");
}

#[test]
fn empty_file_loads_without_segments() {
    let folder = folder();
    let json = load_json(&random_file(folder.path(), "empty", 0), &[]);
    assert_contract(&json);
    assert_eq!((&json["bytes"], &json["segments"]), (&0.into(), &Value::Array(vec![])), "{json:#}");
    assert_eq!(json.get("first_segment_seconds"), Some(&Value::Null), "{json:#}");
}

#[test]
fn load_takes_the_requested_route() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", SEGMENT + 1);
    for route in ROUTES {
        if let Some(reason) = common::unavailable(route, folder.path()) {
            skip(reason);
            continue;
        }
        assert_eq!(load_json(&path, &["--route", route])["route"], route);
    }
}

/// Beyond the payload, the peak consists of staging, the rings and the program itself.
#[test]
fn the_peak_beyond_the_payload_stays_under_48_mib() {
    const SIZE: u64 = 512 << 20;
    let folder = folder();
    if let Some(reason) = common::no_room(folder.path(), SIZE + (1 << 30), SIZE + (1 << 30)) {
        return skip(reason);
    }
    let path = large_file(folder.path(), "model.bin", SIZE);
    for (heap, layout) in shapes() {
        let json = load_json(&path, &["--heap", heap, "--layout", layout]);
        let peak = json["peak_resident_bytes"].as_u64().unwrap();
        let beyond = peak.checked_sub(SIZE).unwrap_or_else(|| panic!("a peak of {peak} can't hold the payload: {json:#}"));
        println!("{heap}, {layout}: {beyond} bytes beyond the payload");
        assert!(beyond < 48 << 20, "{heap}, {layout}: {beyond} bytes beyond the payload: {json:#}");
    }
    // Each limit includes the memory that the option allows for staging.
    for (staging, most) in [("4MiB", 36 << 20), ("64MiB", 112 << 20)] {
        let json = load_json(&path, &["--route", "bounce", "--strict", "--staging", staging]);
        let beyond = json["peak_resident_bytes"].as_u64().unwrap() - SIZE;
        println!("bounce, {staging}: {beyond} bytes beyond the payload");
        assert!(beyond < most, "{staging}: {beyond} bytes beyond the payload: {json:#}");
    }
}

#[test]
fn trace_accounts_for_every_byte_of_each_route() {
    let folder = folder();
    let size = 9 * MIB + 777;
    let path = random_file(folder.path(), "model.bin", size);
    for route in ["uring-fixed-direct", "pread-direct", "bounce"] {
        if let Some(reason) = common::unavailable(route, folder.path()) {
            skip(reason);
            continue;
        }
        let out = folder.path().join("trace.json");
        let arguments = ["--trace", out.to_str().unwrap(), "--route", route, "--strict"];
        let json = load_json(&path, &[&arguments[..], &SMALL_SEGMENTS].concat());
        let trace: Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
        let events: Vec<_> = trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == "X").collect();
        let of_kind = |kind: &str| events.iter().filter(|event| event["cat"] == kind).copied().collect::<Vec<_>>();
        let bytes = |kind: &str| of_kind(kind).iter().map(|event| event["args"]["bytes"].as_u64().unwrap()).sum::<u64>();
        assert_eq!(bytes("read"), size as u64, "{route}");
        assert_eq!(bytes("hand over"), size as u64, "{route}");
        assert_eq!(bytes("allocate"), size.next_multiple_of(4096) as u64, "{route}");
        assert_eq!(bytes("copy"), if route == "bounce" { size as u64 } else { 0 }, "{route}");
        assert_eq!(of_kind("register").len(), if route == "uring-fixed-direct" { 5 } else { 0 }, "{route}");
        let segments: Vec<_> = of_kind("hand over").iter().map(|event| event["args"]["segment"].as_u64().unwrap()).collect();
        assert_eq!(segments, [0, 1, 2, 3, 4], "{route}: the segments should be in order");
        let total = json["seconds"].as_f64().unwrap() * 1e6;
        for event in &events {
            let (start, length) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
            assert!(start >= 0.0 && length >= 0.0 && start + length <= total, "{route}: {event} ends after {total}");
        }
        // No segment is delivered to the caller before all of it has been read.
        for segment in 0..5 {
            let of_segment =
                |kind: &str| of_kind(kind).into_iter().filter(|event| event["args"]["segment"] == segment).collect::<Vec<_>>();
            let handed_over = of_segment("hand over")[0]["ts"].as_f64().unwrap();
            let read = of_segment("read");
            assert!(!read.is_empty());
            assert!(
                read.iter().all(|read| read["ts"].as_f64().unwrap() + read["dur"].as_f64().unwrap() <= handed_over),
                "{route}"
            );
        }
        // Events in one row do not overlap.
        for (number, event) in events.iter().enumerate() {
            let end = |event: &Value| event["ts"].as_f64().unwrap() + event["dur"].as_f64().unwrap();
            let clash = events[..number].iter().find(|other| {
                other["tid"] == event["tid"]
                    && end(other) > event["ts"].as_f64().unwrap() + 0.01
                    && end(event) > other["ts"].as_f64().unwrap() + 0.01
            });
            assert!(clash.is_none(), "{event} overlaps {}", clash.unwrap());
        }
    }
}

#[test]
fn large_buffered_load_warns_about_the_page_cache() {
    let folder = folder();
    if let Some(reason) = common::no_room(folder.path(), 0, 3 << 30) {
        return skip(reason);
    }
    let path = folder.path().join("sparse.bin");
    let file = fs::File::create(&path).unwrap();
    for (len, expected) in [((1 << 30) - 1, false), (1 << 30, true)] {
        file.set_len(len).unwrap();
        let reported = |route| load_json(&path, &["--route", route])["notes"].to_string().contains("read through the page cache");
        assert_eq!(reported("buffered"), expected, "{len} bytes");
        assert_eq!(reported("uring-buffered"), expected, "{len} bytes");
        assert!(!reported("pread-direct"));
    }
}

#[test]
fn quiet_prints_nothing() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", SEGMENT + 1);
    let done = run(dmaload(["load", "--quiet"]).args(SHA256).arg(&path)).succeeds();
    assert_eq!(done.text(), "");
}

#[test]
fn summary_shows_size_route_memory_and_digest() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", SEGMENT + 1);
    let text = run(dmaload(["load"]).args(SHA256).arg(&path)).succeeds().text();
    for word in ["2.00 MiB", "route", "direct", "memfd, segmented (1 segment)", &sha256sum(&path), path.to_str().unwrap()] {
        let excused = word == "direct" && common::unavailable(ROUTES[0], folder.path()).is_some();
        assert!(text.contains(word) || excused, "{word:?} is missing in:\n{text}");
    }
}

/// File names are arbitrary bytes on Linux.
#[test]
fn file_whose_path_is_not_utf_8_is_loaded() {
    use std::os::unix::ffi::OsStrExt;
    let folder = folder();
    let plain = random_file(folder.path(), "plain", 4097);
    let odd = folder.path().join(Path::new(std::ffi::OsStr::from_bytes(b"a\xFFb\nc")));
    fs::rename(plain, &odd).unwrap();
    assert_eq!(digest_of(&load_json(&odd, &SHA256)), sha256sum(&odd));
}

#[test]
fn symlink_is_followed_and_reported_by_the_given_path() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 4097);
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let json = load_json(&link, &SHA256);
    assert_eq!(digest_of(&json), sha256sum(&path), "{json:#}");
    assert_eq!(json["files"][0]["path"], link.to_str().unwrap(), "{json:#}");
}

/// In a terminal, which script(1) provides, the bar appears even if the load is fast.
#[test]
fn terminal_shows_a_bar_before_the_first_segment() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5000);
    let mut script = std::process::Command::new("script");
    let command = format!("'{}' load '{}'", env!("CARGO_BIN_EXE_dmaload"), path.to_str().unwrap());
    script.args(["-qec", &command, "/dev/null"]).env("TERM", "xterm");
    if !std::process::Command::new("script").arg("--version").output().is_ok_and(|output| output.status.success()) {
        return common::skip("script(1) is not installed");
    }
    let shown = run(&mut script).exits(0).text();
    assert!(shown.contains("loading") && shown.contains("B/s"), "{shown:?}");
}

#[test]
fn bytes_from_the_page_cache_are_reported() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 20 * MIB + 1);
    let number = |json: &serde_json::Value| json["cached_bytes"].as_u64().unwrap();
    let load = |arguments: &[&str]| run(dmaload(["load", "--json"]).args(arguments).arg(&path)).succeeds().json();
    assert_eq!(std::fs::read(&path).unwrap().len(), 20 * MIB + 1);
    // The kernel can evict or lock any page, so not every load finds the whole file cached.
    let attempts: Vec<_> = (0..5).map(|_| load(&[])).collect();
    if attempts.iter().all(|json| number(json) == 0) {
        return common::skip("loads do not use the page cache here");
    }
    let warm = attempts
        .iter()
        .find(|json| json["cached_bytes"] == json["bytes"])
        .expect("at least one load should find the whole file cached");
    assert_eq!(number(warm), 20 << 20 | 1);
    assert!(warm["cache_bytes_per_second"].as_f64().unwrap() > 0.0 && warm["storage_bytes_per_second"].is_null(), "{warm}");
    assert_eq!(digest_of(&load(&["--digest", "sha256"])), sha256sum(&path));
    let shown: Vec<_> = (0..5).map(|_| run(dmaload(["load"]).arg(&path)).succeeds().text()).collect();
    let shows_cached = |shown: &String| shown.contains("cached") && shown.contains("20.0 MiB copied from the page cache");
    assert!(shown.iter().any(shows_cached), "{shown:?}");
    for arguments in [&["--cache", "bypass"][..], &["--strict", "--route", "pread-direct"], &["--route", "buffered"]] {
        assert_eq!(number(&load(arguments)), 0, "{arguments:?}");
    }
    assert!(number(&load(&["--strict", "--cache", "auto", "--route", "pread-direct"])) > 0);
}
