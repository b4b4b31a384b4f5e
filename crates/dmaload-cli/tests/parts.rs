//! Parts of models from the command line: tensors, ranges, ranks (also as a launcher gives them), folders.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{dmaload, file, folder, random_bytes, random_file, run};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::Value;

/// `a`, `b`, `c` of a million bytes each.
fn model(folder: &Path, name: &str, names: [&str; 3]) -> PathBuf {
    let data = random_bytes(1_000_000, 3);
    let view = |name: &str| (name.to_owned(), TensorView::new(Dtype::U8, vec![1000, 1000], &data).unwrap());
    file(folder, name, &serialize(names.map(view), None).unwrap())
}

/// Without what a launcher of this test may have set.
fn load() -> Command {
    let mut command = dmaload(["load", "--json"]);
    command.env_remove("RANK").env_remove("WORLD_SIZE");
    command
}

fn numbers(json: &Value) -> (u64, u64, u64) {
    let number = |key: &str| json[key].as_u64().unwrap();
    (number("wanted_bytes"), number("bytes"), number("tensors"))
}

#[test]
fn tensors_by_pattern_and_ranges_of_bytes() {
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
    run(load().args(["--inside", "0..99999999"]).arg(&container)).fails(1, &["which has"]);
    run(load().args(["--tensors", "z"]).arg(&path)).fails(1, &["\"z\""]);
    run(load().args(["--tensors", "{a"]).arg(&path)).fails(2, &["without its }"]);
    run(load().args(["--range", "9..3"]).arg(&path)).fails(2, &["no range of bytes"]);
    run(load().args(["--tensors", "a", "--digest", "sha256"]).arg(&path)).fails(2, &["parts of files"]);
    let text = run(dmaload(["load", "--tensors", "b"]).arg(&path)).succeeds().text();
    assert!(text.contains("wanted") && text.contains("read along"), "{text}");
}

#[test]
fn a_rank_loads_its_part_also_when_a_launcher_says_which() {
    let folder = folder();
    let path = model(folder.path(), "m.safetensors", ["a", "b", "c"]);
    let asked = run(load().args(["--rank", "1", "--world-size", "4", "--shard-dim", "0"]).arg(&path)).succeeds().json();
    assert_eq!(numbers(&asked).0, 750_000);
    let launched = run(load().env("RANK", "1").env("WORLD_SIZE", "4").args(["--shard-dim", "0"]).arg(&path)).succeeds().json();
    assert_eq!((numbers(&launched), &launched["notes"]), (numbers(&asked), &asked["notes"]));
    assert!(asked["notes"].to_string().contains("part 1 of 4 of each tensor along dimension 0"), "{}", asked["notes"]);
    let even: u64 = (0..3)
        .map(|rank| {
            let json = run(load().env("RANK", rank.to_string()).env("WORLD_SIZE", "3").arg(&path)).succeeds().json();
            numbers(&json).1
        })
        .sum();
    assert_eq!(even, std::fs::metadata(&path).unwrap().len());
    // One process of one, or a variable that is somebody else's, is no part.
    for (rank, world_size) in [(Some("0"), Some("1")), (Some("5"), None), (None, Some("7"))] {
        let mut command = load();
        rank.map(|rank| command.env("RANK", rank));
        world_size.map(|world_size| command.env("WORLD_SIZE", world_size));
        let (wanted, read, _) = numbers(&run(command.arg(&path)).succeeds().json());
        assert_eq!((wanted, read), (even, even));
    }
    run(load().env("RANK", "4").env("WORLD_SIZE", "4").arg(&path)).fails(2, &["no rank 4 of 4"]);
    run(load().env("RANK", "x").env("WORLD_SIZE", "4").arg(&path)).fails(2, &["RANK", "no number"]);
    run(load().args(["--shard-dim", "1"]).arg(&path)).fails(2, &["--world-size"]);
}

#[test]
fn a_folder_is_a_model_for_load_and_inspect() {
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
fn layout_tensors_cuts_between_them() {
    let folder = folder();
    let path = model(folder.path(), "m.safetensors", ["a", "b", "c"]);
    let arguments = ["--layout", "tensors", "--segment-size", "2MiB", "--window", "4MiB", "--no-pack"];
    let json = run(load().args(arguments).arg(&path)).succeeds().json();
    let segments = json["segments"].as_array().unwrap();
    assert_eq!(segments.len(), 2);
    let end = segments[0]["file_offset"].as_u64().unwrap() + segments[0]["bytes"].as_u64().unwrap();
    assert!(segments[1]["file_offset"].as_u64().unwrap() < end, "both have the block between them");
    let json = run(load().args(["--layout", "tensors", "--align", "4KiB"]).arg(&path)).succeeds().json();
    assert_eq!(json["copied_bytes"], 3_000_000);
    assert!(json["segments"].as_array().unwrap().iter().all(|segment| segment["memory_offset"].as_u64().unwrap() % 4096 == 0));
    run(load().args(["--layout", "tensors", "--align", "4KiB", "--no-copy"]).arg(&path)).fails(1, &["copying is refused"]);
    run(load().args(["--align", "4KiB"]).arg(&path)).fails(2, &["the layout tensors"]);
    let raw = random_file(folder.path(), "raw.bin", 3 << 20);
    run(load().args(arguments).arg(&raw)).succeeds();
}
