//! Tests for partial loads: selected tensors, byte ranges and shards. A shard can be selected with
//! the environment variables that launchers set. Also tests loading a model's folder.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{dmaload, file, folder, random_bytes, random_file, run};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::Value;

/// Writes a model with three tensors of a million bytes each.
fn model(folder: &Path, name: &str, names: [&str; 3]) -> PathBuf {
    let data = random_bytes(1_000_000, 3);
    let view = |name: &str| (name.to_owned(), TensorView::new(Dtype::U8, vec![1000, 1000], &data).unwrap());
    file(folder, name, &serialize(names.map(view), None).unwrap())
}

/// Returns the `load` command, without the variables that a launcher of these tests may have set.
fn load() -> Command {
    let mut command = dmaload(["load", "--json"]);
    command.env_remove("RANK").env_remove("WORLD_SIZE");
    command
}

/// Returns the numbers of wanted bytes, of loaded bytes and of tensors in the report.
fn numbers(json: &Value) -> (u64, u64, u64) {
    let number = |key: &str| json[key].as_u64().unwrap();
    (number("wanted_bytes"), number("bytes"), number("tensors"))
}

#[test]
fn tensors_and_byte_ranges_are_selected_by_options() {
    let folder = folder();
    let path = model(folder.path(), "m.safetensors", ["a", "b", "c"]);
    let (wanted, read, tensors) = numbers(&run(load().args(["--tensors", "{a,c}"]).arg(&path)).succeeds().json());
    assert_eq!((wanted, tensors), (2_000_000, 2));
    assert!(read < 2_020_000, "{read}");
    let json = run(load().args(["--range", "1MiB..1100000"]).arg(&path)).succeeds().json();
    assert_eq!(numbers(&json).0, 1_100_000 - (1 << 20));
    assert_eq!(json["segments"][0]["file_offset"], 1 << 20);
    let inner = std::fs::read(&path).unwrap();
    let container = file(folder.path(), "app.apk", &[random_bytes(1234, 1), inner.clone(), vec![9; 99]].concat());
    let inside = format!("1234..{}", 1234 + inner.len());
    let (wanted, _, tensors) = numbers(&run(load().args(["--inside", &inside]).arg(&container)).succeeds().json());
    assert_eq!((wanted, tensors), (inner.len() as u64, 3));
    run(load().args(["--inside", "0..99999999"]).arg(&container)).fails(1, &["which has", container.to_str().unwrap()]);
    run(load().args(["--tensors", "z"]).arg(&path)).fails(1, &["\"z\""]);
    run(load().args(["--tensors", "{a"]).arg(&path)).fails(2, &["unclosed {"]);
    run(load().args(["--range", "9..3"]).arg(&path)).fails(2, &["invalid byte range"]);
    run(load().args(["--tensors", "a", "--digest", "sha256"]).arg(&path)).fails(2, &["--digest needs whole files"]);
    let text = run(dmaload(["load", "--tensors", "b"]).arg(&path)).succeeds().text();
    assert!(text.contains("wanted") && text.contains("read with them"), "{text}");
}

#[test]
fn model_inside_a_file_is_reported_by_the_path_of_the_file() {
    let folder = folder();
    let path = model(folder.path(), "m.safetensors", ["a", "b", "c"]);
    let link = folder.path().join("link.bin");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    for path in [&path, &link] {
        let json = run(load().args(["--inside", "0..9"]).arg(path)).succeeds().json();
        assert_eq!(json["files"][0]["path"], path.to_str().unwrap());
        assert_eq!(numbers(&json), (9, 4096, 0), "{json}");
        let done = run(load().args(["--inside", "0..9", "--format", "gguf"]).arg(path)).fails(1, &[path.to_str().unwrap()]);
        assert!(!done.stderr.contains("/proc/"), "{done}");
    }
    let whole = format!("0..{}", std::fs::metadata(&path).unwrap().len());
    assert_eq!(numbers(&run(load().args(["--inside", &whole]).arg(&path)).succeeds().json()).2, 3);
}

#[test]
fn rank_from_a_launcher_loads_its_shard() {
    let folder = folder();
    let path = model(folder.path(), "m.safetensors", ["a", "b", "c"]);
    let explicit = run(load().args(["--rank", "1", "--world-size", "4", "--shard-dim", "0"]).arg(&path)).succeeds().json();
    assert_eq!(numbers(&explicit).0, 750_000);
    let launched = |rank: &str, world_size: &str| {
        let mut command = load();
        command.env("RANK", rank).env("WORLD_SIZE", world_size).args(["--rank", "env"]);
        command
    };
    let json = run(launched("1", "4").args(["--shard-dim", "0"]).arg(&path)).succeeds().json();
    assert_eq!((numbers(&json), &json["notes"]), (numbers(&explicit), &explicit["notes"]));
    assert!(explicit["notes"].to_string().contains("rank 1 of 4 has read its share of each tensor"), "{}", explicit["notes"]);
    let even: u64 = (0..3).map(|rank| numbers(&run(launched(&rank.to_string(), "3").arg(&path)).succeeds().json()).1).sum();
    assert_eq!(even, std::fs::metadata(&path).unwrap().len());
    // --world-size overrides the launcher's variable.
    let json = run(launched("1", "9").args(["--world-size", "4", "--shard-dim", "0"]).arg(&path)).succeeds().json();
    assert_eq!(numbers(&json), numbers(&explicit));
    assert_eq!(numbers(&run(launched("0", "1").arg(&path)).succeeds().json()).1, even);
    run(launched("4", "4").arg(&path)).fails(2, &["invalid rank 4 of 4"]);
    run(launched("x", "4").arg(&path)).fails(2, &["RANK", "not a number"]);
    run(launched("", "4").arg(&path)).fails(2, &["RANK is not set"]);
    run(launched("1", "").arg(&path)).fails(2, &["WORLD_SIZE is not set"]);
    run(load().args(["--rank", "env"]).arg(&path)).fails(2, &["RANK is not set"]);
    run(load().args(["--rank", "ENV"]).arg(&path)).fails(2, &["invalid rank"]);
    run(load().args(["--shard-dim", "1"]).arg(&path)).fails(2, &["--world-size"]);
    run(load().env("RANK", "1").env("WORLD_SIZE", "4").args(["--shard-dim", "1"]).arg(&path)).fails(2, &["--rank env"]);
    run(load().env("WORLD_SIZE", "4").args(["--rank", "1"]).arg(&path)).fails(2, &["--world-size"]);
}

/// Training pods and data-parallel replicas have both variables set, but need the whole model.
#[test]
fn variables_of_a_launcher_are_ignored_unless_requested() {
    let folder = folder();
    let path = model(folder.path(), "m.safetensors", ["a", "b", "c"]);
    let all = std::fs::metadata(&path).unwrap().len();
    let variables = [Some("0"), Some("1"), Some("7"), Some(""), Some("x\u{1b}[2J"), None];
    for rank in variables {
        for world_size in variables {
            let loading = |mut command: Command| {
                rank.map(|rank| command.env("RANK", rank));
                world_size.map(|world_size| command.env("WORLD_SIZE", world_size));
                run(command.arg(&path)).succeeds()
            };
            let json = loading(load()).json();
            assert_eq!((numbers(&json).0, numbers(&json).1, numbers(&json).2), (all, all, 3), "{rank:?} {world_size:?}");
            let both = [rank, world_size].iter().all(|set| set.is_some_and(|text| !text.is_empty()));
            let is_ignored = |notes: &str| notes.contains("ignored") && notes.contains("--rank env");
            assert_eq!(is_ignored(&json["notes"].to_string()), both, "{rank:?} {world_size:?}: {json:#}");
            let mut plain = dmaload(["load"]);
            plain.env_remove("RANK").env_remove("WORLD_SIZE");
            assert_eq!(is_ignored(&loading(plain).text()), both, "{rank:?} {world_size:?}");
        }
    }
    let mut explicit = load();
    explicit.env("RANK", "1").env("WORLD_SIZE", "4").args(["--rank", "0", "--world-size", "2"]);
    let json = run(explicit.arg(&path)).succeeds().json();
    assert!(!json["notes"].to_string().contains("ignored"), "{json:#}");
}

#[test]
fn report_notes_split_tensors_and_empty_shards() {
    let folder = folder();
    let path = model(folder.path(), "m.safetensors", ["a", "b", "c"]);
    let notes = |arguments: &[&str]| run(load().args(arguments).arg(&path)).succeeds().json()["notes"].to_string();
    // With two shards, both contain bytes of `b`. With four, the second contains the end of one
    // tensor and the beginning of another.
    for (rank, world_size, split) in
        [("0", "2", "tensor \\\"b\\\" is split"), ("1", "2", "tensor \\\"b\\\" is split"), ("1", "4", "2 tensors")]
    {
        let notes = notes(&["--rank", rank, "--world-size", world_size]);
        assert!(notes.contains(split), "{rank} of {world_size}: {notes}");
    }
    assert!(!notes(&["--rank", "1", "--world-size", "2", "--format", "raw"]).contains("split"));
    assert!(!notes(&["--rank", "1", "--world-size", "2", "--shard-dim", "0"]).contains("split between"));
    // There are 1000 rows for 3000 ranks, so two out of three ranks get none.
    let nothing = (0..6).filter(|rank| {
        notes(&["--rank", &rank.to_string(), "--world-size", "3000", "--shard-dim", "0"]).contains("no part of 3 tensors")
    });
    assert_eq!(nothing.count(), 4);
    // If a file has fewer blocks than there are ranks, the first ranks get all of its bytes.
    for (name, header) in
        [("small.bin", None), ("small.safetensors", Some(br#"{"w":{"dtype":"U8","shape":[16],"data_offsets":[0,16]}}"#))]
    {
        let small = match header {
            Some(header) => common::safetensors(folder.path(), name, header, 16),
            None => random_file(folder.path(), name, 100),
        };
        for (rank, has_nothing) in [("0", false), ("1", true), ("8", true)] {
            let json = run(load().args(["--rank", rank, "--world-size", "9"]).arg(&small)).succeeds().json();
            let noted = json["notes"].to_string().contains("gets no weights from one file");
            assert_eq!((noted, numbers(&json).1 == 0), (has_nothing, has_nothing), "{rank}: {json:#}");
        }
    }
    assert!(!notes(&["--rank", "1", "--world-size", "4"]).contains("contains no"));
    // A damaged model is an error even if only a shard is loaded.
    let damaged =
        common::safetensors(folder.path(), "d.safetensors", br#"{"w":{"dtype":"U8","shape":[17],"data_offsets":[0,17]}}"#, 16);
    run(load().args(["--rank", "0", "--world-size", "2"]).arg(&damaged)).fails(1, &["cut short"]);
}

#[test]
fn load_and_inspect_accept_the_folder_of_a_model() {
    let folder = folder();
    model(folder.path(), "m-00001-of-00002.safetensors", ["a", "b", "c"]);
    model(folder.path(), "m-00002-of-00002.safetensors", ["d", "e", "f"]);
    let json = run(load().arg(folder.path())).succeeds().json();
    assert_eq!((numbers(&json).2, json["files"].as_array().unwrap().len()), (6, 2));
    let json = run(dmaload(["inspect", "--json"]).arg(folder.path())).succeeds().json();
    assert_eq!(json["files"][1]["tensors"][0]["name"], "d");
    let text = run(dmaload(["inspect"]).arg(folder.path())).succeeds().text();
    assert_eq!(text.matches("3 tensors").count(), 2, "{text}");
}

#[test]
fn layout_tensors_cuts_between_tensors() {
    let folder = folder();
    let path = model(folder.path(), "m.safetensors", ["a", "b", "c"]);
    let arguments = ["--layout", "tensors", "--segment-size", "2MiB", "--window", "4MiB", "--no-pack"];
    let json = run(load().args(arguments).arg(&path)).succeeds().json();
    let segments = json["segments"].as_array().unwrap();
    assert_eq!(segments.len(), 2);
    let end = segments[0]["file_offset"].as_u64().unwrap() + segments[0]["bytes"].as_u64().unwrap();
    assert!(segments[1]["file_offset"].as_u64().unwrap() < end, "the block at the cut should be in both segments");
    let json = run(load().args(["--layout", "tensors", "--align", "4KiB"]).arg(&path)).succeeds().json();
    assert_eq!(json["copied_bytes"], 3_000_000);
    assert!(json["segments"].as_array().unwrap().iter().all(|segment| segment["memory_offset"].as_u64().unwrap() % 4096 == 0));
    run(load().args(["--layout", "tensors", "--align", "4KiB", "--no-copy"]).arg(&path)).fails(1, &["copying is not allowed"]);
    run(load().args(["--align", "4KiB"]).arg(&path)).fails(2, &["4096 bytes requires --layout tensors"]);
    let raw = random_file(folder.path(), "raw.bin", 3 << 20);
    run(load().args(arguments).arg(&raw)).succeeds();
}
