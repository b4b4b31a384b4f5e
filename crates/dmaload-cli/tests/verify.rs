//! Tests for `manifest` and `--verify`: intact files pass, errors name the files that differ, and
//! no wrong bytes are written.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{MIB, SMALL_SEGMENTS, digest_of, dmaload, file, folder, load_json, random_file, run, safetensors, sha256sum};
use serde_json::Value;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Writes a manifest of these files.
fn manifest(folder: &Path, paths: &[&Path], arguments: &[&str]) -> PathBuf {
    let done = run(dmaload(["manifest"]).args(arguments).args(paths)).succeeds();
    file(folder, "manifest.json", &done.stdout)
}

fn flip_bit(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn manifest_accepts_its_files_and_reports_changes() {
    let folder = folder();
    let header = br#"{"layer.0":{"dtype":"U8","shape":[3000000],"data_offsets":[0,3000000]},"layer.1":{"dtype":"U8","shape":[3000000],"data_offsets":[3000000,6000000]}}"#;
    let model = safetensors(folder.path(), "model.safetensors", header, 6_000_000);
    let other = random_file(folder.path(), "other.bin", 5 * MIB + 1);
    for algorithm in ["crc32c", "xxh3", "blake3", "sha256"] {
        let manifest = manifest(folder.path(), &[&model, &other], &["--algorithm", algorithm, "--chunk", "64KiB"]);
        let json: Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
        assert_eq!(json["files"][0]["sha256"], sha256sum(&model));
        assert_eq!(json["files"][1]["chunks"].as_array().unwrap().len(), 81);
        let load = || {
            let mut load = dmaload(["load", "--json", "--verify", text(&manifest)]);
            load.args(SMALL_SEGMENTS).args([&model, &other]);
            load
        };
        let verified = run(&mut load()).succeeds().json();
        assert_eq!(verified["verified"], format!("{algorithm} of each 65536 bytes"));
        flip_bit(&model, 4_500_000);
        run(&mut load())
            .fails(1, &["model.safetensors", "65536 bytes at offset 4456448", algorithm, "in tensor \"layer.1\"", "again"]);
        flip_bit(&model, 4_500_000);
        run(&mut load()).succeeds();
    }
    let summary = run(dmaload(["load", "--verify", text(&manifest(folder.path(), &[&model], &[]))]).arg(&model)).succeeds();
    assert!(summary.text().contains("crc32c of each 1048576 bytes"), "{summary}");
    assert_eq!(load_json(&model, &[])["verified"], Value::Null);
}

#[test]
fn misspelled_checksums_are_accepted_or_explained() {
    let folder = folder();
    let path = random_file(folder.path(), "a.bin", MIB);
    let hex = sha256sum(&path);
    let verify = |against: &str| run(dmaload(["load", "--quiet", "--verify", against]).arg(&path));
    for against in [format!("SHA256:{hex}"), format!("sha256-{hex}"), format!("Sha256={}", hex.to_uppercase())] {
        verify(&against).succeeds();
    }
    for (against, words) in [
        (format!("sha512:{hex}{hex}"), ["sha512", "use sha256, blake3"]),
        (format!("md5:{}", &hex[32..]), ["md5", "use sha256, blake3"]),
        (hex[1..].to_owned(), ["63 hexadecimal digits", "a sha256 has 64"]),
        (format!("SHA256:{}", &hex[1..]), ["sha256 checksum has 64", "hexadecimal digits"]),
    ] {
        verify(&against).fails(2, &words);
    }
    verify(&format!("{}/sha256-{}", text(folder.path()), &hex[1..])).fails(1, &["ENOENT"]);
}

#[test]
fn cat_writes_only_verified_bytes() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 9 * MIB);
    let manifest = manifest(folder.path(), &[&path], &[]);
    let cat = || {
        let mut cat = dmaload(["cat", "--verify", text(&manifest)]);
        cat.args(SMALL_SEGMENTS).arg(&path);
        cat
    };
    assert_eq!(run(&mut cat()).succeeds().stdout, fs::read(&path).unwrap());
    flip_bit(&path, 5 * MIB as u64);
    let done = run(&mut cat()).exits(1);
    assert!(done.stdout.len() <= 4 * MIB && done.stdout == fs::read(&path).unwrap()[..done.stdout.len()], "{done}");
    assert!(done.stderr.contains("model.bin: 1048576 bytes at offset 5242880 are corrupt"), "{done}");
}

#[test]
fn published_checksum_verifies_a_file() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 3 * MIB + 5);
    let right = format!("sha256:{}", sha256sum(&path));
    let json = load_json(&path, &["--verify", &right, "--digest", "sha256"]);
    assert_eq!((&json["verified"], digest_of(&json)), (&"sha256 of the file".into(), sha256sum(&path).as_str()));
    let wrong = format!("sha256:{}", "0".repeat(64));
    run(dmaload(["load", "--verify", &wrong]).arg(&path)).fails(1, &["model.bin", &wrong, &right]);
}

#[test]
fn unusable_checksums_are_explained() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", MIB);
    let others = random_file(folder.path(), "other.bin", MIB);
    let load = |against: &str, paths: &[&Path]| run(dmaload(["load", "--verify", against]).args(paths));
    load("sha256:12", &[&path]).fails(2, &["64 hexadecimal digits"]);
    load("nothing.json", &[&path]).fails(1, &["nothing.json", "ENOENT"]);
    load(text(&path), &[&path]).fails(1, &["model.bin", "invalid manifest"]);
    load(&format!("sha256:{}", "0".repeat(64)), &[&path, &others]).fails(2, &["a single checksum", "not 2"]);
    let manifest = manifest(folder.path(), &[&path], &[]);
    load(text(&manifest), &[&path, &others]).fails(1, &["other.bin", "not in the manifest"]);
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1000).unwrap();
    load(text(&manifest), &[&path]).fails(1, &["model.bin", "1000 bytes long, expected 1048576"]);
    run(dmaload(["manifest", "--chunk", "3MiB"]).arg(&path)).fails(2, &["power of two"]);
    run(dmaload(["manifest", "--algorithm", "md5"]).arg(&path)).fails(2, &["sha256, blake3, crc32c or xxh3"]);
    run(&mut dmaload(["manifest", "/nonexistent"])).fails(1, &["/nonexistent", "ENOENT"]);
}
