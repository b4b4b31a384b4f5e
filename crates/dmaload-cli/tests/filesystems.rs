//! Tests that loads return the right bytes from every file system and through every route, even if
//! the file system refuses some operations.
//!
//! Uses real file systems on loop devices, which requires root, `mkfs.xfs` (package xfsprogs),
//! `mkfs.btrfs` (btrfs-progs) and `mksquashfs` (squashfs-tools). Otherwise the tests are skipped.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a setup error should fail the test, and the routes used are printed"
)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{MIB, ROUTES, SMALL_SEGMENTS, digest_of, folder, load_json, random_file, run, sha256sum, skip};
use dmaload_testing::mounted::{self, Mounted, mount, tmpfs, tool};
use serde_json::Value;

const SIZES: [usize; 7] = [0, 1, 4095, 4096, 4097, 2 * MIB + 1, 9 * MIB + 777];

/// Creates a file system of this kind on a loop device, and mounts it at a folder named after the
/// kind.
fn loop_mounted(folder: &Path, kind: &str, mkfs: &[&str]) -> Result<Mounted, String> {
    mounted::on_loop_device(&folder.join(kind), kind, mkfs, "loop")
}

fn create_files(folder: &Path) -> Vec<PathBuf> {
    SIZES.iter().map(|&size| random_file(folder, &format!("{size}.bin"), size)).collect()
}

/// Part of the reason that a fallback reports if io_uring is not used because of the file system.
const BY_THREADS: &str = "with io_uring from a file system";

/// Loads each cached file with the default options. A load copies a file from the page cache only
/// on file systems where every change to cached bytes also updates the file's modification time.
/// `is_witness` says whether this is such a file system.
fn check_cached(what: &str, files: &[PathBuf], is_witness: bool) {
    for (path, size) in files.iter().zip(SIZES).filter(|&(_, size)| size > 0) {
        let digest = sha256sum(path);
        let json =
            run(common::dmaload(["load", "--json", "--digest", "sha256"]).args(SMALL_SEGMENTS).arg(path)).succeeds().json();
        assert_eq!(digest_of(&json), digest, "{what}, {size} bytes, default");
        let expected = if is_witness { size } else { 0 };
        assert_eq!(json["cached_bytes"], expected, "{what}, {size} bytes: {}", json["fallbacks"]);
    }
}

/// Returns the route that a load starts with if the caller requests none.
fn best_route(what: &str) -> &'static str {
    if what == "tmpfs" { "pread-direct" } else { ROUTES[0] }
}

/// Loads each file through each route, and checks the bytes and the reported fallbacks. io_uring
/// must read only local files, and `doctor` must report the route that the load takes.
fn check(what: &str, files: &[PathBuf], is_local: bool) {
    for route in ["auto"].into_iter().chain(ROUTES) {
        let mut seen = Vec::new();
        for (path, size) in files.iter().zip(SIZES) {
            let json = load_json(path, &[&SMALL_SEGMENTS[..], &["--digest", "sha256", "--route", route]].concat());
            assert_eq!(digest_of(&json), sha256sum(path), "{what}, {size} bytes, {route}");
            let first = if route == "auto" { best_route(what) } else { route };
            assert_every_step_is_reported(first, &json, &format!("{what}, {size} bytes"));
            if size > 0 {
                seen.push(json);
            }
        }
        let last = seen.last().unwrap();
        println!("{what}: {route} gave {} {}", last["route"], last["fallbacks"]);
        let path = files.last().unwrap();
        let steps = last["fallbacks"].to_string();
        // Without direct reads, io_uring would not be tried anyway.
        let uses_ring = !matches!(route, "pread-direct" | "buffered") && !steps.contains("opening with O_DIRECT");
        assert_eq!(steps.contains(BY_THREADS), !is_local && uses_ring, "{what}, {route}: {steps}");
        if route == "auto" {
            let doctor = run(common::dmaload(["doctor", "--json"]).arg(path)).succeeds().json();
            assert_eq!(doctor["load"]["route"], last["route"], "{what}: {}", doctor["load"]);
            assert_every_step_is_logged(path);
        }
        // A strict load uses the requested route or fails.
        let mut strict = common::dmaload(["load", "--json", "--strict", "--route", route]);
        let strict = run(strict.arg(path));
        if last["fallbacks"].as_array().unwrap().is_empty() {
            assert_eq!(strict.succeeds().json()["route"], last["route"], "{what}");
        } else {
            strict.fails(1, &["strict", path.to_str().unwrap()]);
        }
    }
}

fn assert_every_step_is_logged(path: &Path) {
    // With small segments, the file is large: it is opened while the load is planned.
    let mut command = common::dmaload(["load", "--json"]);
    command.args(SMALL_SEGMENTS);
    let done = run(command.env("DMALOAD_LOG", "warn").env("NO_COLOR", "1").arg(path));
    assert_eq!(done.code, Some(0), "{done}");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    for step in done.json()["fallbacks"].as_array().unwrap() {
        let parts = [path.to_str().unwrap().to_owned(), format!("to={}", text(&step["to"])), text(&step["errno"])];
        let is_logged = done.stderr.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        assert!(is_logged, "no line has {parts:?}: {}", done.stderr);
    }
}

fn assert_every_step_is_reported(first: &str, json: &Value, what: &str) {
    let place = |name: &str| ROUTES.iter().position(|&route| route == name).unwrap();
    let mut at = place(first);
    for fallback in json["fallbacks"].as_array().unwrap() {
        let (from, to) = (place(fallback["from"].as_str().unwrap()), place(fallback["to"].as_str().unwrap()));
        // A fallback that affects only the reads into staging is reported as a separate step.
        if first == "bounce" && to < place("bounce") {
            continue;
        }
        assert!(
            from == at && to > from,
            "{what}: each fallback should start from the route that the previous one led to: {}",
            json["fallbacks"]
        );
        at = to;
    }
    assert_eq!(json["route"], ROUTES[at], "{what}: the route should be that of the last fallback: {}", json["fallbacks"]);
}

fn check_mounted(what: &str, mounted: Result<Mounted, String>) {
    match mounted {
        Ok(mounted) => {
            let files = create_files(&mounted.0);
            check(what, &files, true);
            check_cached(what, &files, what != "tmpfs");
        }
        Err(reason) => skip(reason),
    }
}

#[test]
fn every_route_loads_from_ext4() {
    let folder = folder();
    check_mounted("ext4", loop_mounted(folder.path(), "ext4", &["mkfs.ext4", "-q"]));
}

#[test]
fn every_route_loads_from_ext4_with_1_kib_blocks() {
    let folder = folder();
    check_mounted("ext4 with 1 KiB blocks", loop_mounted(folder.path(), "ext4", &["mkfs.ext4", "-q", "-b", "1024"]));
}

#[test]
fn every_route_loads_from_xfs() {
    let folder = folder();
    check_mounted("xfs", loop_mounted(folder.path(), "xfs", &["mkfs.xfs", "-q"]));
}

#[test]
fn every_route_loads_from_btrfs() {
    let folder = folder();
    check_mounted("btrfs", loop_mounted(folder.path(), "btrfs", &["mkfs.btrfs", "-q"]));
}

#[test]
fn every_route_loads_from_tmpfs() {
    let folder = folder();
    check_mounted("tmpfs", tmpfs(&folder.path().join("tmpfs"), "64m"));
}

/// Mounts an overlay whose lower layer is `lower`.
fn overlay(folder: &Path, lower: &Path) -> Result<Mounted, String> {
    let (upper, work) = (folder.join("upper"), folder.join("work"));
    fs::create_dir_all(&upper).unwrap();
    fs::create_dir_all(&work).unwrap();
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    mount("overlay", &options, "overlay", &folder.join("merged"))
}

#[test]
fn every_route_loads_from_both_layers_of_overlayfs() {
    let folder = folder();
    let ext4 = match loop_mounted(folder.path(), "ext4", &["mkfs.ext4", "-q"]) {
        Ok(ext4) => ext4,
        Err(reason) => return skip(reason),
    };
    let lower = ext4.0.join("lower");
    fs::create_dir(&lower).unwrap();
    let names = create_files(&lower);
    match overlay(&ext4.0, &lower) {
        Ok(merged) => {
            let below: Vec<_> = names.iter().map(|path| merged.0.join(path.file_name().unwrap())).collect();
            check("overlayfs, lower layer", &below, false);
            check_cached("overlayfs, lower layer", &below, false);
            fs::create_dir(merged.0.join("new")).unwrap();
            check("overlayfs, upper layer", &create_files(&merged.0.join("new")), false);
        }
        Err(reason) => skip(reason),
    }
}

#[test]
fn every_route_loads_from_overlayfs_over_squashfs() {
    let folder = folder();
    let sources = folder.path().join("sources");
    fs::create_dir(&sources).unwrap();
    let names = create_files(&sources);
    let image = folder.path().join("squashfs.img");
    let squashed = tool(Command::new("mksquashfs").args([&sources, &image]).args(["-quiet", "-no-progress"]));
    let squashed = squashed.and_then(|()| mount("squashfs", "loop", &image, &folder.path().join("squashfs")));
    let squashed = match squashed {
        Ok(squashed) => squashed,
        Err(reason) => return skip(reason),
    };
    // The upper layer of an overlay can't be on an overlay, so it is on a tmpfs.
    let layers = tmpfs(&folder.path().join("layers"), "16m");
    // Declared in this order, because the overlay must be unmounted before its layers.
    match layers.and_then(|layers| overlay(&layers.0, &squashed.0).map(|merged| (layers, merged))) {
        Ok((_layers, merged)) => {
            let paths: Vec<_> = names.iter().map(|path| merged.0.join(path.file_name().unwrap())).collect();
            check("overlayfs over squashfs", &paths, false);
            check_cached("overlayfs over squashfs", &paths, false);
        }
        Err(reason) => skip(reason),
    }
}
