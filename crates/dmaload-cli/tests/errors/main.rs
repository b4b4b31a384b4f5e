//! Tests for error messages. Each message names what can't be loaded and the errno, and says what
//! to do. The exit status is 1 for a failed load and 2 for a usage error. Standard output stays
//! empty or, with `--json`, contains one object. The command never panics or hangs.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

#[path = "../common/mod.rs"]
mod common;
mod contents;
mod limits;
mod usage;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{MIB, allow, dmaload, file, folder, is_root, random_file, run, safetensors, sha256sum, skip};
use limits::unprivileged;

fn load(path: &Path) -> Command {
    let mut command = dmaload(["load", "--json", "--cache", "bypass"]);
    command.arg(path);
    command
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Asserts that `load`, `cat` and `inspect` fail, and that their errors contain the path and these
/// words.
#[track_caller]
fn every_command_fails(path: &Path, words: &[&str]) {
    for arguments in [&["load", "--json"][..], &["load"], &["load", "--quiet"], &["cat"], &["inspect"], &["inspect", "--json"]] {
        run(dmaload(arguments).arg(path)).fails(1, &[&[text(path)], words].concat());
    }
}

#[test]
fn missing_file_is_named_with_its_errno_and_a_hint() {
    let folder = folder();
    every_command_fails(&folder.path().join("none.safetensors"), &["ENOENT", "check the path"]);
}

#[test]
fn path_below_a_file_is_enotdir_and_a_link_loop_is_eloop() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 1);
    every_command_fails(&path.join("below"), &["ENOTDIR"]);
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&link, &link).unwrap();
    every_command_fails(&link, &["ELOOP"]);
}

#[test]
fn folder_without_a_model_is_an_error() {
    let folder = folder();
    every_command_fails(folder.path(), &["a directory"]);
}

/// Opening a FIFO for reading would block until a writer opens it.
#[test]
fn fifo_is_refused_without_waiting_for_a_writer() {
    let folder = folder();
    let path = folder.path().join("fifo");
    run(Command::new("mkfifo").arg(&path)).succeeds();
    every_command_fails(&path, &["a FIFO"]);
}

#[test]
fn character_device_is_refused() {
    every_command_fails(Path::new("/dev/null"), &["a character device"]);
    every_command_fails(Path::new("/dev/zero"), &["a character device"]);
}

#[test]
fn range_of_a_fifo_device_or_folder_is_refused() {
    let folder = folder();
    let fifo = folder.path().join("fifo");
    run(Command::new("mkfifo").arg(&fifo)).succeeds();
    let missing = folder.path().join("none.bin");
    for (path, words) in [
        (fifo.as_path(), ["a FIFO", "save it to a file first"]),
        (Path::new("/dev/zero"), ["a character device", "to a file first"]),
        (folder.path(), ["a directory", ""]),
        (&missing, ["ENOENT", "check the path"]),
    ] {
        run(dmaload(["load", "--inside", "0..9"]).arg(path)).fails(1, &[&[text(path)], &words[..]].concat());
    }
}

#[test]
fn error_of_a_dangling_link_names_its_target() {
    let folder = folder();
    for (name, target) in [("m.safetensors", "blobs/gone"), ("m.gguf", "/nonexistent/x"), ("raw", "gone")] {
        let link = folder.path().join(name);
        std::os::unix::fs::symlink(target, &link).unwrap();
        every_command_fails(&link, &["ENOENT", "a symbolic link to", target]);
    }
    let inside = folder.path().join("model");
    fs::create_dir(&inside).unwrap();
    let index = inside.join("model.safetensors.index.json");
    std::os::unix::fs::symlink("../blobs/gone", &index).unwrap();
    every_command_fails(&index, &["ENOENT", "a symbolic link to ../blobs/gone"]);
    every_command_fails(&inside, &["ENOENT", "a symbolic link to ../blobs/gone"]);
}

#[test]
fn folder_named_like_a_model_is_not_a_model() {
    let header = br#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    for name in ["m.gguf", "a.safetensors", "model.safetensors", "m.safetensors.index.json"] {
        let folder = folder();
        let inner = folder.path().join(name);
        fs::create_dir(&inner).unwrap();
        safetensors(&inner, "w.safetensors", header, 4);
        every_command_fails_but_cat(folder.path(), &["without a model", &format!("there are models in \"{name}/\"")]);
        safetensors(folder.path(), "b.safetensors", header, 4);
        let other = folder.path().join("linked.safetensors");
        std::os::unix::fs::symlink(&inner, &other).unwrap();
        let json = run(&mut load(folder.path())).succeeds().json();
        assert_eq!(json["files"][0]["path"], text(&folder.path().join("b.safetensors")), "{name}");
    }
}

/// Like [`every_command_fails`], but runs only `load` and `inspect`.
#[track_caller]
fn every_command_fails_but_cat(path: &Path, words: &[&str]) {
    for arguments in [&["load", "--json"][..], &["load"], &["inspect"]] {
        run(dmaload(arguments).arg(path)).fails(1, &[&[text(path)], words].concat());
    }
}

#[test]
fn block_device_is_refused_with_advice() {
    let names = fs::read_dir("/sys/class/block").map(|entries| entries.map(|entry| entry.unwrap().file_name()));
    let devices = names.into_iter().flatten().map(|name| Path::new("/dev").join(name));
    let Some(device) = devices.into_iter().find(|device| device.exists()) else { return skip("no block device") };
    every_command_fails(&device, &["a block device", "could not be detected", &format!("dd if={} of=", text(&device))]);
}

#[test]
fn file_with_contents_but_a_length_of_0_is_an_error() {
    for path in ["/proc/self/status", "/proc/version"] {
        every_command_fails(Path::new(path), &["its reported length is 0", &format!("cat {path} > COPY")]);
    }
}

#[test]
fn unreadable_file_is_eacces() {
    let folder = folder();
    let path = random_file(folder.path(), "secret.bin", 5000);
    allow(&path, 0o000);
    match unprivileged(load(&path)) {
        Ok(mut command) => drop(run(&mut command).fails(1, &[text(&path), "EACCES", "permissions"])),
        Err(reason) => skip(reason),
    }
}

#[test]
fn bad_file_among_good_ones_is_named() {
    let folder = folder();
    let good = random_file(folder.path(), "good.bin", 3 * MIB);
    let bad = folder.path().join("bad.bin");
    let done = run(dmaload(["load", "--json"]).args([&good, &bad, &good])).fails(1, &[text(&bad), "ENOENT"]);
    assert!(!done.stderr.contains(text(&good)), "{done}");
}

#[test]
fn pipes_and_sockets_advise_saving_to_a_file_first() {
    let folder = folder();
    run(dmaload(["load", "-"]).current_dir(folder.path())).fails(1, &["ENOENT", "save it to a file first"]);
    run(dmaload(["load", "--json", "-"]).current_dir(folder.path())).fails(1, &["save it to a file first"]);
    let fifo = folder.path().join("fifo");
    run(Command::new("mkfifo").arg(&fifo)).succeeds();
    every_command_fails(&fifo, &["a FIFO", "save it to a file first"]);
    let socket = folder.path().join("s");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    every_command_fails(&socket, &["socket", "dmaload attach"]);
}

#[test]
fn socket_that_cannot_be_attached_to_gets_specific_advice() {
    let folder = folder();
    let socket = folder.path().join("s");
    run(dmaload(["attach", "--json"]).arg(&socket)).fails(1, &["ENOENT", "whether the server has finished loading"]);
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    run(dmaload(["attach"]).arg(&socket)).fails(1, &["ECONNREFUSED", "has exited"]);
    fs::remove_file(&socket).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    allow(folder.path(), 0o755);
    allow(&socket, 0o600);
    let mut attach = dmaload(["attach"]);
    attach.arg(&socket);
    match unprivileged(attach) {
        Ok(mut command) if is_root() => drop(run(&mut command).fails(1, &["EACCES", "--allow-user"])),
        Ok(_) => skip("the owner may attach"),
        Err(reason) => skip(reason),
    }
}

#[test]
fn checksum_without_algorithm_is_accepted_or_explained() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5000);
    let sum = sha256sum(&path);
    for text in [sum.clone(), format!("{sum}  model.bin"), format!("SHA256 (model.bin) = {sum}")] {
        let json = common::load_json(&path, &["--verify", &text]);
        assert_eq!(json["verified"], "sha256 of the file", "{json:#}");
    }
    let wrong = sum.replace(|c: char| c.is_ascii_digit(), "e");
    run(load(&path).args(["--verify", &wrong])).fails(1, &["corrupt", "download the file again"]);
    run(load(&path).args(["--verify", &sum[..32]])).fails(2, &["MD5"]);
    run(load(&path).args(["--verify", &sum[..8]])).fails(2, &["crc32c:HEX"]);
    let sums = file(folder.path(), "SHA256SUMS", format!("{sum}  model.bin\n").as_bytes());
    run(load(&path).arg("--verify").arg(&sums)).fails(1, &["list of checksums", "sha256:HEX", "invalid manifest"]);
}

#[test]
fn required_dma_buf_is_never_replaced_by_other_memory() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5000);
    run(load(&path).arg("--dma-buf")).fails(1, &[text(&path), "dma-buf"]);
    run(dmaload(["cat", "--dma-buf"]).arg(&path)).fails(1, &[text(&path), "dma-buf"]);
    for heap in ["memfd", "anon"] {
        run(load(&path).args(["--dma-buf", "--heap", heap])).fails(2, &["dma-buf"]);
    }
}
