//! Tests that `dmaload cat` writes exactly the bytes of the file.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{MIB, ROUTES, SMALL_SEGMENTS, dmaload, file, finish, folder, random_file, run, sha256sum};

#[test]
fn cat_writes_the_bytes_of_the_file_by_every_route() {
    let folder = folder();
    for size in [0, 1, 4095, 4097, 2 * MIB, 9 * MIB + 777] {
        let path = random_file(folder.path(), "model.bin", size);
        for route in ROUTES {
            let mut cat = dmaload(["cat", "--route", route]);
            let mut cat = cat.args(SMALL_SEGMENTS).arg(&path).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            let mut cmp = Command::new("cmp");
            let cmp = cmp.arg("-").arg(&path).stdin(cat.stdout.take().unwrap()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let cmp = cmp.spawn().unwrap();
            finish(format!("dmaload cat, {size} bytes by {route}"), cat).succeeds();
            finish(format!("cmp, {size} bytes by {route}"), cmp).succeeds();
        }
    }
}

#[test]
fn reader_that_closes_its_pipe_is_not_an_error() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 64 * MIB);
    let mut cat = dmaload(["cat"]).arg(&path).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let head = Command::new("head").args(["-c", "10"]).stdin(cat.stdout.take().unwrap()).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(finish("head".to_owned(), head).stdout.len(), 10);
    finish("dmaload cat | head".to_owned(), cat).succeeds();
}

#[test]
fn missing_file_is_an_error_and_nothing_is_written() {
    run(dmaload(["cat"]).arg("/nonexistent/model.bin")).fails(1, &["/nonexistent/model.bin", "ENOENT"]);
}

/// Reads 1 MiB from `cat`, waits until its memory stops growing, then reads the rest. Returns the
/// peak of its resident memory during the wait, all of its output, and its result.
fn read_slowly(mut cat: std::process::Child) -> (usize, Vec<u8>, common::Done) {
    use std::io::Read;
    let mut stdout = cat.stdout.take().unwrap();
    let mut written = vec![0; MIB];
    stdout.read_exact(&mut written).unwrap();
    let status = format!("/proc/{}/status", cat.id());
    let resident = || {
        let text = std::fs::read_to_string(&status).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() << 10
    };
    let (mut most, mut same) = (0, 0);
    for _ in 0..1000 {
        let now = resident();
        same = if now > most { 0 } else { same + 1 };
        most = most.max(now);
        if same == 100 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    stdout.read_to_end(&mut written).unwrap();
    (most, written, finish("dmaload cat".to_owned(), cat))
}

#[test]
fn cat_with_a_slow_reader_uses_a_bounded_amount_of_memory() {
    /// How much memory the program itself, its ring and its threads may occupy.
    const OWN: usize = 32 * MIB;
    let folder = folder();
    let path = common::large_file(folder.path(), "model.bin", (480 * MIB) as u64);
    let expected = std::fs::read(&path).unwrap();
    let small = ["--segment-size", "8MiB", "--window", "32MiB"];
    // Each case has options, and the number of MiB of memory that the load itself may occupy.
    // Without a memory limit, this covers the window, the segment that is being written and the
    // next one. The route bounce also needs its staging buffers.
    let cases: [(&[&str], usize); 7] = [
        (&[], 128 + 2 * 64),
        (&small, 32 + 2 * 8),
        (&["--segment-size", "8MiB", "--window", "32MiB", "--heap", "anon"], 32 + 2 * 8),
        (&["--segment-size", "8MiB", "--window", "32MiB", "--route", "bounce"], 32 + 2 * 8 + 22),
        (&["--segment-size", "8MiB", "--window", "32MiB", "--route", "buffered"], 32 + 2 * 8),
        (&["--memory-limit", "96MiB"], 96),
        (&["--memory-limit", "32MiB"], 32),
    ];
    for (options, most_mib) in cases {
        let cat = dmaload(["cat"]).args(options).arg(&path).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (resident, written, done) = read_slowly(cat);
        done.succeeds();
        assert!(written == expected, "{options:?}: the output ({} bytes) differs from the file", written.len());
        println!("{options:?}: {} MiB resident, at most {} allowed", resident / MIB, most_mib + OWN / MIB);
        assert!(resident <= most_mib * MIB + OWN, "{options:?}: {} MiB were resident", resident / MIB);
    }
}

/// Writes a safetensors file. A tensor is given by its name, its length in bytes, and the value of
/// every byte.
fn model(folder: &Path, name: &str, tensors: &[(&str, usize, u8)]) {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, bytes, value) in tensors {
        let at = data.len();
        entries.push(format!(r#""{name}":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[{at},{}]}}"#, at + bytes));
        data.resize(at + bytes, *value);
    }
    let header = format!("{{{}}}", entries.join(","));
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    file(folder, name, &bytes);
}

/// Writes a part of a split GGUF model. The part contains one tensor.
fn part(folder: &Path, name: &str, number: u16, count: u16, tensor: &str) -> PathBuf {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let mut bytes = [&b"GGUF"[..], &3u32.to_le_bytes(), &1u64.to_le_bytes(), &2u64.to_le_bytes()].concat();
    for (key, value) in [("split.no", number), ("split.count", count)] {
        bytes.extend([text(key), 2u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat());
    }
    bytes.extend([text(tensor), 1u32.to_le_bytes().to_vec(), 64u64.to_le_bytes().to_vec()].concat());
    bytes.extend([&24u32.to_le_bytes()[..], &0u64.to_le_bytes()].concat());
    bytes.resize(bytes.len().next_multiple_of(32) + 64, u8::try_from(number).unwrap() + 1);
    file(folder, name, &bytes)
}

fn parts(folder: &Path) -> [PathBuf; 3] {
    [0, 1, 2].map(|number| part(folder, &format!("m-{:05}-of-00003.gguf", number + 1), number, 3, &format!("w{number}")))
}

#[test]
fn cat_of_a_part_reads_no_other_file() {
    let folder = folder();
    let all = parts(folder.path());
    let index = file(folder.path(), "m.safetensors.index.json", br#"{"weight_map":{"a":"missing.safetensors"}}"#);
    let swapped = part(folder.path(), "s-00001-of-00002.gguf", 1, 2, "w");
    for path in all.iter().chain([&index, &swapped]) {
        let written = run(dmaload(["cat"]).arg(path)).succeeds().stdout;
        assert_eq!(written, fs::read(path).unwrap(), "{path:?}");
    }
    fs::remove_file(&all[0]).unwrap();
    fs::write(&all[2], "").unwrap();
    assert_eq!(run(dmaload(["cat"]).arg(&all[1])).succeeds().stdout, fs::read(&all[1]).unwrap());
    run(dmaload(["cat"]).arg(&all[2])).fails(1, &["m-00003-of-00003.gguf", "the file is empty"]);
    run(dmaload(["cat", "--format", "raw"]).arg(&all[2])).succeeds();
    run(dmaload(["load"]).arg(&all[1]))
        .fails(1, &["2 are missing", "m-00001-of-00003.gguf", "m-00003-of-00003.gguf", "--allow-missing"]);
    let loaded = run(dmaload(["load", "--json", "--allow-missing"]).arg(&all[1])).succeeds().json();
    assert_eq!((loaded["tensors"].as_u64(), loaded["files"].as_array().map(Vec::len)), (Some(1), Some(1)));
    assert!(loaded["notes"].to_string().contains("m-00003-of-00003.gguf"), "{loaded}");
}

#[test]
fn checksum_verifies_the_named_part_while_all_are_loaded() {
    let folder = folder();
    let all = parts(folder.path());
    for (number, path) in all.iter().enumerate() {
        let own = format!("sha256:{}", sha256sum(path));
        let verified = run(dmaload(["load", "--json", "--verify", &own]).arg(path)).succeeds().json();
        assert_eq!((verified["tensors"].as_u64(), verified["files"].as_array().map(Vec::len)), (Some(3), Some(3)));
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(verified["notes"].to_string().contains(name), "{verified}");
        let other = &all[(number + 1) % 3];
        run(dmaload(["load", "--verify", &own]).arg(other)).fails(1, &[other.to_str().unwrap(), "corrupt"]);
        assert_eq!(run(dmaload(["cat", "--verify", &own]).arg(path)).succeeds().stdout, fs::read(path).unwrap());
        run(dmaload(["cat", "--verify", &own]).arg(other)).fails(1, &["corrupt"]);
    }
    // For a folder or several files, the checksum could belong to any file.
    let own = format!("sha256:{}", sha256sum(&all[0]));
    run(dmaload(["load", "--verify", &own]).arg(folder.path())).fails(2, &["one file, not 3"]);
    run(dmaload(["load", "--verify", &own]).args(&all)).fails(2, &["one file, not 3"]);
}

#[test]
fn tensor_is_written_from_the_file_that_the_index_names() {
    let folder = folder();
    let name = folder.path();
    model(name, "1.safetensors", &[("a", 3 * MIB + 5, 1), ("w", 70_000, 1), ("a*b", 9, 5), ("empty", 0, 0)]);
    model(name, "2.safetensors", &[("w", 70_000, 2), ("layers[0].w", 3, 6)]);
    let map =
        r#"{"weight_map":{"a":"1.safetensors","w":"2.safetensors","z":"gone.safetensors","layers[0].w":"./2.safetensors"}}"#;
    let index = file(name, "model.safetensors.index.json", map.as_bytes());
    let cat = |path: &Path, tensor: &str| run(dmaload(["cat", "--tensor", tensor]).args(SMALL_SEGMENTS).arg(path));
    for path in [name, &index] {
        for (tensor, bytes, value) in
            [("a", 3 * MIB + 5, 1), ("w", 70_000, 2), ("layers[0].w", 3, 6), ("a*b", 9, 5), ("empty", 0, 0)]
        {
            assert_eq!(cat(path, tensor).succeeds().stdout, vec![value; bytes], "{tensor}");
        }
        cat(path, "z").fails(1, &["gone.safetensors", "1 is missing"]);
        cat(path, "none").fails(1, &["no tensor named", "none"]);
        cat(path, "*").fails(1, &["no tensor named"]);
    }
    assert_eq!(cat(&name.join("1.safetensors"), "w").succeeds().stdout, vec![1; 70_000]);
    let split = parts(name);
    assert_eq!(cat(&split[0], "w2").succeeds().stdout, vec![3; 64]);
    cat(&file(name, "raw.bin", &[1; 100]), "w").fails(1, &["no tensors to select"]);
    run(dmaload(["cat", "--tensor", "w", "--verify", "crc32c:00000000"]).arg(name)).fails(2, &["--verify"]);
}

#[test]
fn cat_of_one_tensor_reads_little_else() {
    let folder = folder();
    model(folder.path(), "1.safetensors", &[("large", 40 * MIB, 1), ("w", 4096, 2)]);
    model(folder.path(), "2.safetensors", &[("other", 40 * MIB, 3)]);
    let map = r#"{"weight_map":{"large":"1.safetensors","w":"1.safetensors","other":"2.safetensors"}}"#;
    file(folder.path(), "model.safetensors.index.json", map.as_bytes());
    let mut cat = Command::new("strace");
    cat.args([
        "-f",
        "-e",
        "trace=?open,openat,pread64",
        env!("CARGO_BIN_EXE_dmaload"),
        "cat",
        "--tensor",
        "w",
        "--route",
        "buffered",
    ]);
    let Ok(traced) = cat.arg(folder.path()).output() else { return common::skip("strace is not installed") };
    let trace = String::from_utf8_lossy(&traced.stderr);
    assert_eq!(traced.stdout, vec![2; 4096], "{trace}");
    assert!(trace.contains("1.safetensors") && !trace.contains("2.safetensors"), "{trace}");
    let read = |line: &str| line.rsplit_once("= ").and_then(|(_, bytes)| bytes.trim().parse::<usize>().ok()).unwrap_or(0);
    let bytes: usize = trace.lines().filter(|line| line.contains("pread64(")).map(read).sum();
    assert!((4096..MIB).contains(&bytes), "{bytes} bytes were read");
}

#[test]
fn folder_that_is_not_one_model_is_refused() {
    let folder = folder();
    let st = |name: &str| {
        let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}}}"#);
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[7; 8]].concat()
    };
    fs::write(folder.path().join("a.safetensors"), st("w")).unwrap();
    fs::write(folder.path().join("b.safetensors"), st("w")).unwrap();
    run(dmaload(["cat"]).arg(folder.path())).fails(1, &["\"w\"", "a.safetensors", "b.safetensors"]);
    // A single file is written unchanged.
    run(dmaload(["cat"]).arg(folder.path().join("b.safetensors"))).succeeds();
    fs::write(folder.path().join("b.safetensors"), st("v")).unwrap();
    run(dmaload(["cat"]).arg(folder.path())).succeeds();
}
