//! Tests that control characters in untrusted text never reach a terminal unescaped. The text
//! includes names of files, folders, tensors and keys, and the contents of an index.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use common::{Done, dmaload, file, folder, run, safetensors};
use serde_json::{Value, json};

/// Hostile file names. They contain, in this order: a sequence that sets the window title; line
/// breaks; right-to-left text; C1 control sequences with a byte order mark; bytes that are not
/// UTF-8.
const HOSTILE: [&[u8]; 5] = [
    b"\x1b]0;owned\x07",
    b"a\nb\rc\td",
    "\u{202e}gpj\u{2066}".as_bytes(),
    "\u{9b}2J\u{feff}\u{7f}".as_bytes(),
    b"\xff\x1b[31m\x9b",
];

fn hostile_text() -> String {
    HOSTILE.iter().map(|name| String::from_utf8_lossy(name)).collect()
}

/// Returns whether a character must not appear in output. A line break may appear, because the
/// output has several lines.
fn is_hidden(c: char) -> bool {
    c != '\n' && (c.is_control() || "\u{202e}\u{2066}\u{feff}\u{2028}\u{200b}".contains(c))
}

#[track_caller]
fn assert_harmless(done: &Done) {
    for (what, text) in [("error", done.stderr.as_bytes()), ("output", &done.stdout)] {
        let text = std::str::from_utf8(text).unwrap_or_else(|error| panic!("standard {what}: {error}: {done}"));
        assert!(!text.contains(is_hidden), "standard {what} of {done:}\n{text:?}");
        // After an unescaped line break in a name, the rest of the name would begin a line.
        assert!(!text.lines().any(|line| line.starts_with('b') && line.contains("\\r")), "{text:?}");
    }
    assert!(!done.stderr.contains("panicked"), "{done}");
}

#[track_caller]
fn run_harmlessly<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Done {
    let mut command = dmaload(arguments);
    command.env("DMALOAD_LOG", "debug").env("NO_COLOR", "1");
    let done = run(&mut command);
    assert_harmless(&done);
    if done.command.contains("\"--json\"") {
        done.json();
    }
    done
}

fn hostile_folders(parent: &Path) -> Vec<PathBuf> {
    let folders = HOSTILE.iter().map(|name| parent.join(OsStr::from_bytes(name)));
    folders.inspect(|folder| fs::create_dir(folder).unwrap()).collect()
}

fn header(name: &str, end: usize) -> Vec<u8> {
    let entry = json!({ "dtype": "U8", "shape": [end], "data_offsets": [0, end] });
    json!({ "__metadata__": { name: name }, name: entry }).to_string().into_bytes()
}

const COMMANDS: [&[&str]; 8] = [
    &["load"],
    &["load", "--json"],
    &["load", "--digest", "sha256"],
    &["inspect"],
    &["inspect", "--json"],
    &["doctor"],
    &["doctor", "--json"],
    &["manifest"],
];

#[test]
fn hostile_names_never_reach_the_terminal_unescaped() {
    let folder = folder();
    for hostile in hostile_folders(folder.path()) {
        let name = hostile_text();
        let mut file_name = hostile.file_name().unwrap().to_owned();
        file_name.push(".safetensors");
        let good = hostile.join(&file_name);
        fs::copy(safetensors(folder.path(), "good", &header(&name, 16), 16), &good).unwrap();
        for arguments in COMMANDS {
            let done = run_harmlessly(arguments.iter().map(OsStr::new).chain([good.as_os_str()]));
            assert_eq!(done.code, Some(0), "{done}");
        }
        let listed = run_harmlessly([OsStr::new("inspect"), good.as_os_str()]).text();
        assert!(listed.contains("\\u{1b}]0;owned"), "the escaped names are missing: {listed}");
        let bad = hostile.join([OsStr::new("bad"), file_name.as_os_str()].into_iter().collect::<OsString>());
        fs::copy(safetensors(folder.path(), "bad", &header(&name, 17), 16), &bad).unwrap();
        let missing = hostile.join("missing");
        for path in [&bad, &missing, &hostile.join(&file_name).join("below")] {
            for arguments in COMMANDS.iter().chain(&[&["cat"][..]]) {
                let done = run_harmlessly(arguments.iter().map(OsStr::new).chain([path.as_os_str()]));
                assert_eq!(done.code, Some(1), "{done}");
            }
        }
        for wrong in [&["load", "--tensors"][..], &["load", "--rank"], &["load", "--heap"], &["load", "--verify"], &["attach"]] {
            let done = run_harmlessly(wrong.iter().map(OsStr::new).chain([good.as_os_str(), good.as_os_str()]));
            assert_ne!(done.code, Some(0), "{done}");
        }
    }
}

#[test]
fn hostile_index_never_reaches_the_terminal_unescaped() {
    let folder = folder();
    let name = hostile_text();
    let maps: [Value; 4] = [
        json!({ "weight_map": { name.clone(): name } }),
        json!({ "weight_map": { "a": format!("../{name}") } }),
        json!({ "weight_map": { name.clone(): 5 } }),
        json!({ name.clone(): name }),
    ];
    for (number, map) in maps.iter().enumerate() {
        let model = folder.path().join(number.to_string());
        fs::create_dir(&model).unwrap();
        file(&model, "model.safetensors.index.json", map.to_string().as_bytes());
        for arguments in COMMANDS {
            let done = run_harmlessly(arguments.iter().map(OsStr::new).chain([model.as_os_str()]));
            assert_eq!(done.code, Some(1), "{done}");
        }
    }
}

#[test]
fn hostile_text_never_reaches_the_terminal_unescaped() {
    let folder = folder();
    let text = hostile_text().replace('\n', " ");
    for (name, bytes) in [("t.safetensors", text.clone()), ("t.gguf", text.clone()), ("j.safetensors", format!("{{\"{text}"))] {
        let path = file(folder.path(), name, bytes.as_bytes());
        for arguments in [&["load"][..], &["load", "--json"], &["doctor"]] {
            let done = run_harmlessly(arguments.iter().map(OsStr::new).chain([path.as_os_str()]));
            assert_eq!(done.code, Some(1), "{done}");
        }
    }
}

#[test]
fn gguf_keys_never_reach_the_terminal_unescaped() {
    let folder = folder();
    let text = |text: &str| [(text.len() as u64).to_le_bytes().as_slice(), text.as_bytes()].concat();
    let mut gguf = [b"GGUF".as_slice(), &3_u32.to_le_bytes(), &0_u64.to_le_bytes(), &1_u64.to_le_bytes()].concat();
    gguf.extend(text(&hostile_text()));
    gguf.extend(8_u32.to_le_bytes());
    gguf.extend(text(&hostile_text()));
    gguf.resize(gguf.len().next_multiple_of(32), 0);
    let path = file(folder.path(), "m.gguf", &gguf);
    for arguments in [&["inspect"][..], &["inspect", "--json"], &["load"]] {
        let done = run_harmlessly(arguments.iter().map(OsStr::new).chain([path.as_os_str()]));
        assert_eq!(done.code, Some(0), "{done}");
    }
}

#[test]
fn manifest_verifies_files_whose_names_are_not_utf_8() {
    let folder = folder();
    let names = [&b"\xff.bin"[..], b"\xfe.bin", "\u{fffd}.bin".as_bytes(), b"\x1b]0;x\x07.bin"];
    let paths = names.map(|name| folder.path().join(OsString::from_vec(name.to_vec())));
    for (number, path) in paths.iter().enumerate() {
        fs::write(path, vec![u8::try_from(number).unwrap(); 5000]).unwrap();
    }
    let done = run_harmlessly([OsStr::new("manifest")].into_iter().chain(paths.iter().map(|path| path.as_os_str())));
    let manifest = file(folder.path(), "m.json", &done.stdout);
    let verify = |path: &Path| {
        run_harmlessly([OsStr::new("load"), OsStr::new("--json"), OsStr::new("--verify"), manifest.as_os_str(), path.as_os_str()])
    };
    for path in &paths {
        assert_eq!(verify(path).code, Some(0), "{path:?}");
    }
    // Each file is compared with its own checksums.
    fs::copy(&paths[0], &paths[1]).unwrap();
    for (path, code) in paths.iter().zip([0, 1, 0, 0]) {
        assert_eq!(verify(path).code, Some(code), "{path:?}");
    }
}
