//! What can't be loaded is told: what, where, why by the errno's name, and what to do. Status 1 for a load that failed,
//! 2 for wrong usage; nothing on standard output, or with `--json` one object; never a panic or a hang.
#![allow(clippy::unwrap_used, reason = "a test that can't make its file has failed")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{MIB, allow, as_nobody, dmaload, file, folder, is_root, limited, random_file, run, safetensors, sha256sum, skip};
use rustix::process::Signal;
use serde_json::Value;

fn load(path: &Path) -> Command {
    let mut command = dmaload(["load", "--json", "--cache", "bypass"]);
    command.arg(path);
    command
}

/// Run by somebody without any rights, who this user perhaps is already.
fn unprivileged(command: Command) -> Result<Command, &'static str> {
    if is_root() { as_nobody(command) } else { Ok(command) }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A file of this length that takes no room.
fn sparse(folder: &Path, bytes: u64) -> std::path::PathBuf {
    let path = file(folder, "sparse.bin", &[]);
    fs::File::options().write(true).open(&path).unwrap().set_len(bytes).unwrap();
    path
}

/// Every command that opens a file says the same about it.
#[track_caller]
fn every_command_fails(path: &Path, words: &[&str]) {
    for arguments in [&["load", "--json"][..], &["load"], &["load", "--quiet"], &["cat"], &["inspect"], &["inspect", "--json"]] {
        run(dmaload(arguments).arg(path)).fails(1, &[&[text(path)], words].concat());
    }
}

#[test]
fn a_missing_file_is_named_with_its_errno_and_a_hint() {
    let folder = folder();
    every_command_fails(&folder.path().join("none.safetensors"), &["ENOENT", "check the path"]);
}

#[test]
fn a_path_through_a_file_is_enotdir_and_a_loop_of_links_is_eloop() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 1);
    every_command_fails(&path.join("below"), &["ENOTDIR"]);
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&link, &link).unwrap();
    every_command_fails(&link, &["ELOOP"]);
}

#[test]
fn a_folder_is_no_file() {
    let folder = folder();
    every_command_fails(folder.path(), &["a directory"]);
}

/// Opening a FIFO for reading waits for its writer, and none comes.
#[test]
fn a_fifo_is_refused_without_waiting_for_a_writer() {
    let folder = folder();
    let path = folder.path().join("fifo");
    run(Command::new("mkfifo").arg(&path)).succeeds();
    every_command_fails(&path, &["a FIFO"]);
}

#[test]
fn a_device_is_no_file() {
    every_command_fails(Path::new("/dev/null"), &["a character device"]);
    every_command_fails(Path::new("/dev/zero"), &["a character device"]);
}

#[test]
fn a_part_of_what_is_no_file_is_refused_without_waiting() {
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
fn a_link_to_nothing_says_so() {
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
fn a_folder_named_like_a_model_is_none() {
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

/// `cat` is of one file.
#[track_caller]
fn every_command_fails_but_cat(path: &Path, words: &[&str]) {
    for arguments in [&["load", "--json"][..], &["load"], &["inspect"]] {
        run(dmaload(arguments).arg(path)).fails(1, &[&[text(path)], words].concat());
    }
}

#[test]
fn a_page_in_another_encoding_is_a_page() {
    let folder = folder();
    let utf16: Vec<u8> = "<html><body>gelöscht".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for page in [&b"<!DOCTYPE html><title>gel\xf6scht</title>"[..], b"<html>\0<body>", &utf16] {
        for name in ["m.safetensors", "m.gguf"] {
            every_command_fails(&file(folder.path(), name, page), &["an HTML page", "download it again"]);
        }
    }
}

#[test]
fn a_model_by_the_wrong_format_is_not_advised_the_name_it_has() {
    let folder = folder();
    let path = safetensors(folder.path(), "m.safetensors", br#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 4);
    let done = run(dmaload(["load", "--format", "gguf"]).arg(&path))
        .fails(1, &["a safetensors file", "(--format safetensors)", "--format auto does so where"]);
    assert!(!done.stderr.contains("give it a name"), "{done}");
}

#[test]
fn a_block_device_says_how_to_go_on() {
    let names = fs::read_dir("/sys/class/block").map(|entries| entries.map(|entry| entry.unwrap().file_name()));
    let devices = names.into_iter().flatten().map(|name| Path::new("/dev").join(name));
    let Some(device) = devices.into_iter().find(|device| device.exists()) else { return skip("no block device") };
    every_command_fails(&device, &["a block device", "could not be noticed", &format!("dd if={} of=", text(&device))]);
}

#[test]
fn a_file_that_has_bytes_and_no_length_is_not_empty() {
    for path in ["/proc/self/status", "/proc/version"] {
        every_command_fails(Path::new(path), &["its length is said to be 0", &format!("cat {path} > COPY")]);
    }
}

#[test]
fn a_file_that_may_not_be_read_is_eacces() {
    let folder = folder();
    let path = random_file(folder.path(), "secret.bin", 5000);
    allow(&path, 0o000);
    match unprivileged(load(&path)) {
        Ok(mut command) => drop(run(&mut command).fails(1, &[text(&path), "EACCES", "permissions"])),
        Err(reason) => skip(reason),
    }
}

#[test]
fn one_bad_file_among_good_ones_fails_the_load_and_is_the_one_named() {
    let folder = folder();
    let good = random_file(folder.path(), "good.bin", 3 * MIB);
    let bad = folder.path().join("bad.bin");
    let done = run(dmaload(["load", "--json"]).args([&good, &bad, &good])).fails(1, &[text(&bad), "ENOENT"]);
    assert!(!done.stderr.contains(text(&good)), "{done}");
}

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

/// Settings are wrong whatever the file is like: they are looked at first.
#[test]
fn wrong_usage_comes_before_a_missing_file() {
    run(&mut dmaload(["load", "--window", "2MiB", "/nonexistent"])).fails(2, &["smaller than a segment"]);
}

#[test]
fn help_and_version_are_no_errors() {
    for arguments in [&["--help"][..], &["--version"], &["load", "--help"], &["demo", "--help"]] {
        let done = run(&mut dmaload(arguments)).succeeds();
        assert!(done.text().contains("dmaload"), "{done}");
    }
}

#[test]
fn the_largest_legal_settings_load() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 3 * MIB + 1);
    let most =
        ["--segment-size", "1GiB", "--window", "1GiB", "--chunk-size", "1GiB", "--queue-depth", "4096", "--digest", "sha256"];
    let json = common::load_json(&path, &most);
    assert_eq!(common::digest_of(&json), sha256sum(&path), "{json:#}");
}

/// A header with one tensor, as it should be or not.
fn header(entry: &str) -> Vec<u8> {
    format!(r#"{{"w":{entry}}}"#).into_bytes()
}

/// Headers that lie about 16 bytes of data, and a word of what is said about each.
fn lies() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let good = r#"{"dtype":"U8","shape":[16],"data_offsets":[0,16]}"#;
    let two = |second: &str| format!(r#"{{"a":{{"dtype":"U8","shape":[8],"data_offsets":[0,8]}},"b":{second}}}"#).into_bytes();
    let mut not_utf8 = header(good);
    not_utf8[2] = 0xFF;
    vec![
        ("past the end", header(r#"{"dtype":"U8","shape":[17],"data_offsets":[0,17]}"#), "cut short"),
        ("trailing bytes", header(r#"{"dtype":"U8","shape":[15],"data_offsets":[0,15]}"#), "belong to no tensor"),
        ("a hole at the start", header(r#"{"dtype":"U8","shape":[8],"data_offsets":[8,16]}"#), "belong to no tensor"),
        ("a wrong length", header(r#"{"dtype":"F32","shape":[16],"data_offsets":[0,16]}"#), "needs 64"),
        ("reversed offsets", header(r#"{"dtype":"U8","shape":[16],"data_offsets":[16,0]}"#), "begin after their end"),
        ("an unknown dtype", header(r#"{"dtype":"Q4","shape":[16],"data_offsets":[0,16]}"#), "unknown dtype"),
        ("negative offsets", header(r#"{"dtype":"U8","shape":[16],"data_offsets":[-16,0]}"#), "-16"),
        (
            "a shape beyond 64 bits",
            header(r#"{"dtype":"U8","shape":[4294967296,4294967296,16],"data_offsets":[0,16]}"#),
            "64-bit",
        ),
        ("overlapping tensors", two(r#"{"dtype":"U8","shape":[12],"data_offsets":[4,16]}"#), "before tensor"),
        ("a hole in the middle", two(r#"{"dtype":"U8","shape":[4],"data_offsets":[12,16]}"#), "belong to no tensor"),
        ("a tensor twice", format!(r#"{{"w":{good},"w":{good}}}"#).into_bytes(), "twice"),
        ("no UTF-8", not_utf8, "not UTF-8"),
        ("no JSON", b"{\"w\":}".to_vec(), "not valid JSON"),
        ("no object", b"[1,2,3]".to_vec(), "expected '{'"),
        ("a missing key", header(r#"{"dtype":"U8","shape":[16]}"#), "data_offsets"),
    ]
}

#[test]
fn a_header_that_lies_is_told_and_the_same_file_loads_as_raw_bytes() {
    let folder = folder();
    for (what, header, word) in lies() {
        println!("{what}");
        let path = safetensors(folder.path(), "lie.safetensors", &header, 16);
        let advice = if word == "cut short" { "fetch the file again" } else { "--format raw" };
        every_command_fails(&path, &[word, advice]);
        assert_loads_as_raw(&path);
    }
}

#[track_caller]
fn assert_loads_as_raw(path: &Path) {
    let json = common::load_json(path, &["--format", "raw", "--digest", "sha256"]);
    assert_eq!(common::digest_of(&json), sha256sum(path), "{json:#}");
    assert_eq!(json["tensors"], 0, "{json:#}");
}

#[test]
fn a_header_length_that_lies_is_told_and_the_same_file_loads_as_raw_bytes() {
    let folder = folder();
    for (length, word) in
        [(u64::MAX, "more than"), (200_000_000, "more than"), (1_000_000, "has only"), (1, "shortest"), (0, "shortest")]
    {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        bytes.resize(5000, b' ');
        let path = file(folder.path(), "length.safetensors", &bytes);
        every_command_fails(&path, &[word]);
        assert_loads_as_raw(&path);
    }
    let short = file(folder.path(), "short.safetensors", b"12345");
    every_command_fails(&short, &["5 bytes"]);
    assert_loads_as_raw(&short);
}

/// What lies in the place of models, under the names of models; a word of what it is, and of what to do about it.
fn in_place_of_models() -> Vec<(&'static str, Vec<u8>, &'static str, &'static str)> {
    let safetensors = |length: [u8; 8]| [&length[..], br#"{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}  ab"#].concat();
    let gguf = |version: u32, to_bytes: fn(u32) -> [u8; 4]| [b"GGUF", &to_bytes(version)[..], &[0; 64]].concat();
    let mut cut_gguf = gguf(3, u32::to_le_bytes);
    cut_gguf.truncate(20);
    let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345678901\n".to_vec();
    let text = |text: &str| text.as_bytes().to_vec();
    vec![
        ("lfs.safetensors", lfs.clone(), "12345678901 bytes", "git lfs pull"),
        ("lfs.gguf", lfs.clone(), "Git LFS pointer", "git lfs pull"),
        ("model.safetensors.index.json", lfs, "Git LFS pointer", "git lfs pull"),
        ("page.safetensors", text("<!DOCTYPE html>\n<html><title>Sign in</title></html>"), "HTML", "download it again"),
        ("page.gguf", text("  <html><body>429</body></html>"), "HTML", "download it again"),
        ("x.safetensors.index.json", text("<html>502</html>"), "HTML", "download it again"),
        ("denied.safetensors", text("<?xml version=\"1.0\"?><Error><Code>AccessDenied"), "XML", "download it again"),
        ("json.safetensors", text("{\"error\":\"Repository not found\"}"), "Repository not found", "download it again"),
        ("text.safetensors", text("Entry not found"), "Entry not found", "download it again"),
        ("text.gguf", text("Not Found"), "Not Found", "download it again"),
        ("zip.safetensors", [b"PK\x03\x04".as_slice(), &[7; 500]].concat(), "zip", "convert it to safetensors"),
        ("pickle.safetensors", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(), "pickle", "convert it to safetensors"),
        ("gzip.gguf", b"\x1f\x8b\x08\0\0\0\0\0\0\x03ab".to_vec(), "gzip", "unpack"),
        ("zeros.safetensors", vec![0; 100_000], "zeros", "download is not finished"),
        ("zeros.gguf", vec![0; 5000], "zeros", "download is not finished"),
        ("other.gguf", safetensors(53_u64.to_le_bytes()), "a safetensors file", "--format safetensors"),
        ("order.safetensors", safetensors(53_u64.to_be_bytes()), "big-endian", "big-endian machine"),
        ("order.gguf", gguf(3, u32::to_be_bytes), "big-endian", "convert it to little-endian"),
        ("new.gguf", gguf(4, u32::to_le_bytes), "version 4", "newer than this"),
        ("old.gguf", gguf(1, u32::to_le_bytes), "version 1", "older than"),
        ("cut.gguf", cut_gguf, "at least 4 bytes are missing", "fetch the file again"),
        (
            "cut.safetensors",
            safetensors(1_000_000_u64.to_le_bytes()),
            "at least 999943 bytes are missing",
            "fetch the file again",
        ),
        ("long.safetensors", safetensors(200_000_000_u64.to_le_bytes()), "100000000", "--format raw"),
    ]
}

#[test]
fn what_is_in_place_of_a_model_is_told_with_its_own_advice() {
    let folder = folder();
    for (name, bytes, what, advice) in in_place_of_models() {
        let path = file(folder.path(), name, &bytes);
        // `cat` writes an index as the file that it is.
        if name.ends_with(".index.json") {
            run(dmaload(["inspect", "--json"]).arg(&path)).fails(1, &[text(&path), what, advice]);
        } else {
            every_command_fails(&path, &[what, advice]);
        }
        let done = run(dmaload(["load", "--json", "--no-pack"]).arg(&path)).fails(1, &[what, advice]);
        let has_raw = done.stderr.contains("--format raw");
        assert!(!has_raw || ["newer", "older", "raw"].iter().any(|word| advice.contains(word)), "{done}");
        assert!(!done.stderr.contains("--layout"), "{done}");
        assert_loads_as_raw(&path);
    }
}

/// What was forgotten says how much: of all tensors, not only of the first that is not there.
#[test]
fn what_is_missing_of_a_file_is_counted() {
    let folder = folder();
    let entry = |from: u64, to: u64| format!(r#"{{"dtype":"U8","shape":[{}],"data_offsets":[{from},{to}]}}"#, to - from);
    let header = format!(r#"{{"a":{},"b":{},"c":{}}}"#, entry(0, 100), entry(100, 900), entry(900, 1000));
    let path = safetensors(folder.path(), "m.safetensors", header.as_bytes(), 40);
    every_command_fails(&path, &["at least 960 bytes are missing", "fetch the file again"]);
}

#[test]
fn pipes_sockets_and_standard_input_say_to_save_them_first() {
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
fn a_socket_that_can_not_be_attached_to_has_its_own_advice() {
    let folder = folder();
    let socket = folder.path().join("s");
    run(dmaload(["attach", "--json"]).arg(&socket)).fails(1, &["ENOENT", "whether the server has loaded"]);
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    run(dmaload(["attach"]).arg(&socket)).fails(1, &["ECONNREFUSED", "has ended"]);
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
fn a_checksum_without_its_name_is_taken_or_explained() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5000);
    let sum = sha256sum(&path);
    for text in [sum.clone(), format!("{sum}  model.bin"), format!("SHA256 (model.bin) = {sum}")] {
        let json = common::load_json(&path, &["--verify", &text]);
        assert_eq!(json["verified"], "sha256 of the file", "{json:#}");
    }
    let wrong = sum.replace(|c: char| c.is_ascii_digit(), "e");
    run(load(&path).args(["--verify", &wrong])).fails(1, &["corrupt", "fetch the file again"]);
    run(load(&path).args(["--verify", &sum[..32]])).fails(2, &["MD5"]);
    run(load(&path).args(["--verify", &sum[..8]])).fails(2, &["crc32c:HEX"]);
    let sums = file(folder.path(), "SHA256SUMS", format!("{sum}  model.bin\n").as_bytes());
    run(load(&path).arg("--verify").arg(&sums)).fails(1, &["list of checksums", "sha256:HEX", "invalid manifest"]);
}

#[test]
fn under_json_each_error_is_one_object_on_standard_output() {
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
    // There is one object: the load's, and its command could not be run.
    let done = run(load(&path).args(["--exec", missing])).exits(1);
    assert_eq!(done.json()["bytes"], 5000, "{done}");
    assert!(done.stderr.contains("ENOENT"), "{done}");
}

/// A name from the file reaches the terminal only with its control characters disarmed.
#[test]
fn a_hostile_name_in_a_header_does_not_reach_the_terminal() {
    let folder = folder();
    let lie = br#"{"\u001b[2Jgone":{"dtype":"U8","shape":[17],"data_offsets":[0,17]}}"#;
    let path = safetensors(folder.path(), "hostile.safetensors", lie, 16);
    let done = run(&mut load(&path)).fails(1, &[text(&path), "gone"]);
    assert!(!done.stderr.contains('\u{1b}'), "{done}");
}

#[test]
fn a_dma_buf_that_can_not_be_had_is_never_replaced_by_something_else() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5000);
    run(load(&path).arg("--dma-buf")).fails(1, &[text(&path), "dma-buf"]);
    run(dmaload(["cat", "--dma-buf"]).arg(&path)).fails(1, &[text(&path), "dma-buf"]);
    for heap in ["memfd", "anon"] {
        run(load(&path).args(["--dma-buf", "--heap", heap])).fails(2, &["dma-buf"]);
    }
}

/// At 4 the ring, at 6 the file, from 7 on the segments find no descriptor left.
#[test]
fn the_limit_of_open_files_is_told_wherever_it_is_met() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 64 * MIB);
    let mut command = load(&path);
    command.args(common::SMALL_SEGMENTS);
    for files in 4..=16 {
        let limited = &mut limited(&command, &format!("-n {files}"));
        let done = run(limited).fails(1, &[text(&path), "EMFILE", "ulimit -n"]);
        assert!(!done.stderr.contains("--layout"), "{done}");
    }
    run(&mut limited(&load(&path), "-n 64")).succeeds();
}

#[test]
fn memory_limit_holds_for_each_command_that_loads() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 40 * MIB);
    let words = ["41943040 bytes", "33554432", "--memory-limit"];
    run(load(&path).args(["--memory-limit", "32MiB"])).fails(1, &words);
    let socket = folder.path().join("socket");
    run(dmaload(["serve", "--memory-limit", "32MiB"]).arg(&socket).arg(&path)).fails(1, &words);
    run(load(&path).args(["--memory-limit", "48MiB"])).succeeds();
    let written = run(dmaload(["cat", "--memory-limit", "16MiB"]).arg(&path)).succeeds().stdout;
    assert!(written == std::fs::read(&path).unwrap());
    run(load(&path).args(["--memory-limit", "1MiB"])).fails(2, &["1048576"]);
}

/// Files are opened when their turn comes and closed when they were checked, and memories are as few as descriptors.
#[test]
fn model_of_more_files_than_descriptors_loads() {
    let folder = folder();
    let parts = |name: &str, count: usize, bytes: u64| -> Vec<_> {
        let of = folder.path().join(name);
        std::fs::create_dir(&of).unwrap();
        let path = |number| of.join(format!("{number:05}.bin"));
        let make = |number| std::fs::File::create(path(number)).unwrap().set_len(bytes + number as u64).unwrap();
        (0..count).for_each(make);
        (0..count).map(path).collect()
    };
    let small = parts("small", 300, 100_000);
    let medium = parts("medium", 300, 2 << 20);
    let large = parts("large", 70, 18 << 20);
    for (paths, descriptors) in [(&small, 24), (&small, 128), (&medium, 48), (&medium, 128), (&large, 32), (&large, 64)] {
        let mut command = dmaload(["load", "--json"]);
        command.args(paths);
        let done = run(&mut limited(&command, &format!("-n {descriptors}"))).succeeds();
        let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
        let bytes: u64 = paths.iter().map(|path| path.metadata().unwrap().len()).sum();
        assert_eq!(report["bytes"].as_u64(), Some(bytes), "{descriptors} descriptors");
    }
    // What was asked for by its size stays so, and the advice is the one that helps.
    let mut command = load(&large[0]);
    command.args(&large[1..]).args(["--segment-size", "64MiB"]);
    run(&mut limited(&command, "-n 32")).fails(1, &["EMFILE", "raise it (ulimit -n)"]);
}

/// Whatever is loaded, and however it is laid out: the advice is the limit itself, for no other option helps.
#[test]
fn few_descriptors_have_the_same_advice_for_every_way_to_load() {
    let folder = folder();
    let tensors: Vec<_> = (0..32).map(|number| (format!("t{number}"), number << 21)).collect();
    let entry = |(name, at): &(String, usize)| {
        format!(r#""{name}":{{"dtype":"U8","shape":[{}],"data_offsets":[{at},{}]}}"#, 2 << 20, at + (2 << 20))
    };
    let header = format!("{{{}}}", tensors.iter().map(entry).collect::<Vec<_>>().join(","));
    let path = common::safetensors(folder.path(), "model.safetensors", header.as_bytes(), 64 * MIB);
    for options in [
        &["--layout", "tensors"][..],
        &["--no-pack"],
        &["--tensors", "{t?,t1?,t2?}"],
        &["--tensors", "t*", "--layout", "tensors"],
        &["--range", "1MiB..60MiB"],
        &["--rank", "0", "--world-size", "2"],
        &["--rank", "1", "--world-size", "2", "--shard-dim", "0"],
    ] {
        let mut command = load(&path);
        command.args(common::SMALL_SEGMENTS).args(options);
        for files in [4, 6, 8, 11, 14] {
            let done =
                run(&mut limited(&command, &format!("-n {files}"))).fails(1, &[text(&path), "EMFILE", "raise it (ulimit -n)"]);
            let advice: Vec<_> = done.stderr.split_whitespace().filter(|word| word.starts_with("--")).collect();
            assert!(advice.is_empty() && !done.stderr.contains("segment"), "{done}");
        }
        run(&mut limited(&command, "-n 128")).succeeds();
    }
    // Each small file has a descriptor of its own.
    let small: Vec<_> = (0..40).map(|number| random_file(folder.path(), &format!("{number}.bin"), 5000)).collect();
    let mut command = load(&small[0]);
    command.args(&small[1..]).arg("--no-pack");
    let done = run(&mut limited(&command, "-n 30")).fails(1, &["EMFILE", "raise it (ulimit -n)"]);
    assert!(!done.stderr.contains("--"), "{done}");
    run(&mut limited(&command, "-n 128")).succeeds();
}

/// All segments of one memfd need one descriptor: the hint's way out is one.
#[test]
fn a_single_segment_needs_few_descriptors() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 64 * MIB);
    let mut command = load(&path);
    command.args(common::SMALL_SEGMENTS).args(["--layout", "single"]);
    run(&mut limited(&command, "-n 16")).succeeds();
}

/// From a limit that leaves room for the program to one that leaves room for all but the file.
#[test]
fn the_limit_of_addresses_is_told_and_nothing_panics() {
    const KIB: u64 = 1 << 10;
    let folder = folder();
    let path = sparse(folder.path(), 1 << 30);
    for mib in [64, 128, 256, 512, 1000, 1024] {
        for heap in ["memfd", "anon"] {
            let mut command = load(&path);
            command.args(["--heap", heap]);
            run(&mut limited(&command, &format!("-v {}", mib * KIB))).fails(1, &[text(&path), "ENOMEM", "ulimit -v"]);
        }
    }
}

/// Where it begins: the threads' stacks are refused one after the other. Whatever happens, it is told.
#[test]
fn however_few_addresses_there_are_a_load_fails_in_words() {
    let folder = folder();
    let path = sparse(folder.path(), 1 << 30);
    let mut told = false;
    for mib in 8..=40 {
        let done = run(&mut limited(&load(&path), &format!("-v {}", mib << 10)));
        if done.code == Some(127) {
            continue; // The dynamic linker found no room for the program itself.
        }
        let nothing_left = ["memory allocation of", "Fatal glibc error"].iter().any(|words| done.stderr.contains(words));
        if done.signal == Some(Signal::ABORT.as_raw()) && nothing_left {
            continue; // The standard library or the C library found no room for a few bytes, and has no other answer.
        }
        if done.signal == Some(Signal::SEGV.as_raw()) && !told && done.stderr.is_empty() {
            continue; // The stack can't grow by the few hundred KiB that reading the command line takes unoptimised.
        }
        let done = done.fails(1, &["dmaload: "]);
        assert!(["ENOMEM", "EAGAIN"].iter().any(|errno| done.stderr.contains(errno)), "{done}");
        told = true;
    }
    assert!(told, "no limit was told");
}

/// More memory than any machine has.
#[test]
fn a_file_larger_than_memory_is_refused_before_it_is_read() {
    let folder = folder();
    let path = sparse(folder.path(), 1 << 42);
    if fs::metadata(&path).unwrap().len() != 1 << 42 {
        return skip("this file system has no file of 4 TiB");
    }
    for heap in ["memfd", "anon"] {
        for layout in ["segmented", "single"] {
            let done = run(load(&path).args(["--heap", heap, "--layout", layout])).fails(1, &[text(&path)]);
            assert!(done.stderr.contains("available") || done.stderr.contains("ENOMEM"), "{done}");
        }
    }
}

/// An ordinary user's limit of locked memory (8 MiB by default, 64 KiB before Linux 5.16).
#[test]
fn a_small_memlock_limit_takes_the_next_route_and_says_which_limit() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 100 * MIB + 1);
    if let Some(reason) = common::unavailable("uring-direct", folder.path()) {
        return skip(reason);
    }
    for kib in ["64", "8192"] {
        let limit = format!("-l {kib}");
        let mut lenient = load(&path);
        lenient.args(["--digest", "sha256"]);
        let mut strict = load(&path);
        strict.arg("--strict");
        let (lenient, strict) = match (unprivileged(limited(&lenient, &limit)), unprivileged(limited(&strict, &limit))) {
            (Ok(lenient), Ok(strict)) => (lenient, strict),
            (Err(reason), _) | (_, Err(reason)) => return skip(reason),
        };
        memlock_is_told(lenient, strict, &path);
    }
}

fn memlock_is_told(mut lenient: Command, mut strict: Command, path: &Path) {
    let json = run(&mut lenient).succeeds().json();
    assert_eq!(common::digest_of(&json), sha256sum(path), "{json:#}");
    assert_eq!(json["route"], "uring-direct", "{json:#}");
    let fallbacks = json["fallbacks"].as_array().unwrap();
    let [step] = fallbacks.as_slice() else { panic!("one step: {json:#}") };
    let expected = [("from", "uring-fixed-direct"), ("to", "uring-direct"), ("errno", "ENOMEM")];
    assert!(expected.iter().all(|&(key, value)| step[key] == value), "{step:#}");
    let reason = step["reason"].as_str().unwrap();
    assert!(reason.contains("locked memory") && reason.contains("MEMLOCK"), "{reason}");
    run(&mut strict).fails(1, &[text(path), "uring-fixed-direct", "ENOMEM", "strict", "ulimit -l"]);
}

/// The route bounce registers its staging buffers, which a limit may refuse: a step of its own.
#[test]
fn staging_beyond_the_memlock_limit_is_told_and_refused_to_a_strict_load() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 40 * MIB + 1);
    if let Some(reason) = common::unavailable("uring-direct", folder.path()) {
        return skip(reason);
    }
    let bounced = |arguments: &[&str]| {
        let mut command = load(&path);
        command.args(["--route", "bounce", "--digest", "sha256"]).args(arguments);
        unprivileged(limited(&command, "-l 64"))
    };
    let (mut lenient, mut strict) = match (bounced(&[]), bounced(&["--strict"])) {
        (Ok(lenient), Ok(strict)) => (lenient, strict),
        (Err(reason), _) | (_, Err(reason)) => return skip(reason),
    };
    let json = run(&mut lenient).succeeds().json();
    assert_eq!((&json["route"], common::digest_of(&json)), (&"bounce".into(), sha256sum(&path).as_str()), "{json:#}");
    let fallbacks = json["fallbacks"].as_array().unwrap();
    let [step] = fallbacks.as_slice() else { panic!("one step: {json:#}") };
    assert_eq!((&step["to"], &step["errno"]), (&"uring-direct".into(), &"ENOMEM".into()), "{json:#}");
    assert!(step["reason"].as_str().unwrap().contains("staging"), "{json:#}");
    run(&mut strict).fails(1, &[text(&path), "bounce", "staging", "ENOMEM", "ulimit -l"]);
}

/// The same file, loaded without a limit: the test above would else prove nothing about the limit.
#[test]
fn without_a_memlock_limit_root_takes_the_best_route() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 20 * MIB);
    if !is_root() {
        return skip("only root is without the limit");
    }
    if let Some(reason) = common::unavailable("uring-fixed-direct", folder.path()) {
        return skip(reason);
    }
    let json = run(&mut limited(&load(&path), "-l 64")).succeeds().json();
    assert_eq!((&json["route"], &json["fallbacks"]), (&"uring-fixed-direct".into(), &Value::Array(vec![])), "{json:#}");
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

/// The runtime opens /dev/null in the place of what was closed: what is written there would be lost without a word.
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
    // Nothing is written, so nothing is lost.
    run(closing(&["load", "--quiet"]).arg(&path)).exits(0);
    // Who wants it nowhere says so.
    for nowhere in [">/dev/null", "1<>/dev/null"] {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("exec \"$@\" {nowhere}"), "sh", env!("CARGO_BIN_EXE_dmaload"), "cat"]);
        run(shell.arg(&path)).succeeds();
    }
}

/// The kernel's own answer is SIGXFSZ, which ends a process.
#[test]
fn the_limit_of_file_sizes_is_told_by_name() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5 * MIB);
    run(&mut limited(&load(&path), "-f 1000")).fails(1, &[text(&path), "EFBIG", "ulimit -f"]);
    let mut anon = load(&path);
    anon.args(["--heap", "anon"]);
    run(&mut limited(&anon, "-f 1000")).succeeds();
}

/// Small files are opened when their turn comes, a bounded number at a time.
#[test]
fn thousands_of_files_need_few_descriptors() {
    let folder = folder();
    let paths: Vec<_> = (0..1500).map(|number| random_file(folder.path(), &format!("{number}.bin"), 1 + number)).collect();
    let mut command = dmaload(["load", "--json"]);
    command.args(&paths);
    let done = run(&mut limited(&command, "-n 200")).succeeds();
    let report: serde_json::Value = serde_json::from_str(&done.text()).unwrap();
    assert_eq!((report["segments"].as_array().unwrap().len(), report["memories"].as_u64().unwrap()), (1500, 1));
}
