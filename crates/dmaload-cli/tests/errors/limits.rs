//! Tests for errors caused by limits on a process or on the machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;

use crate::common::{self, MIB, as_nobody, dmaload, file, folder, is_root, limited, random_file, run, sha256sum, skip};
use crate::{load, text};

/// Makes a command run as an unprivileged user. Does nothing unless the current user is root.
pub(crate) fn unprivileged(command: Command) -> Result<Command, &'static str> {
    if is_root() { as_nobody(command) } else { Ok(command) }
}

/// Creates a sparse file of this length.
fn sparse_file(folder: &Path, bytes: u64) -> std::path::PathBuf {
    let path = file(folder, "sparse.bin", &[]);
    fs::File::options().write(true).open(&path).unwrap().set_len(bytes).unwrap();
    path
}

/// With 4 to 6 descriptors, the file can't be opened. With 7 to 16, there are too few for all of
/// the segments.
#[test]
fn open_file_limit_is_named_wherever_it_is_hit() {
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
fn memory_limit_applies_to_each_command_that_loads() {
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

/// Each file is opened only when it is read and closed once it has been checked, and small files
/// share allocations.
#[test]
fn model_with_more_files_than_descriptors_can_be_loaded() {
    let folder = folder();
    let parts = |name: &str, count: usize, bytes: u64| -> Vec<_> {
        let inner = folder.path().join(name);
        std::fs::create_dir(&inner).unwrap();
        let path = |number| inner.join(format!("{number:05}.bin"));
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
    // A requested segment size is not enlarged; the advice is to raise the limit.
    let mut command = load(&large[0]);
    command.args(&large[1..]).args(["--segment-size", "64MiB"]);
    run(&mut limited(&command, "-n 32")).fails(1, &["EMFILE", "raise it (ulimit -n)"]);
}

/// For every selection, and with each layout that has several segments, the advice is to raise the
/// limit. The advice must not name an option of the command.
#[test]
fn advice_on_few_descriptors_is_the_same_for_every_load() {
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
    // With --no-pack, each small file has its own descriptor.
    let small: Vec<_> = (0..40).map(|number| random_file(folder.path(), &format!("{number}.bin"), 5000)).collect();
    let mut command = load(&small[0]);
    command.args(&small[1..]).arg("--no-pack");
    let done = run(&mut limited(&command, "-n 30")).fails(1, &["EMFILE", "raise it (ulimit -n)"]);
    assert!(!done.stderr.contains("--"), "{done}");
    run(&mut limited(&command, "-n 128")).succeeds();
}

#[test]
fn single_segment_needs_few_descriptors() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 64 * MIB);
    let mut command = load(&path);
    command.args(common::SMALL_SEGMENTS).args(["--layout", "single"]);
    run(&mut limited(&command, "-n 16")).succeeds();
}

/// The smallest limit leaves room only for the program, and the largest for everything except the
/// file.
#[test]
fn address_space_limit_is_reported_without_a_panic() {
    const KIB: u64 = 1 << 10;
    let folder = folder();
    let path = sparse_file(folder.path(), 1 << 30);
    for mib in [64, 128, 256, 512, 1000, 1024] {
        for heap in ["memfd", "anon"] {
            let mut command = load(&path);
            command.args(["--heap", heap]);
            run(&mut limited(&command, &format!("-v {}", mib * KIB))).fails(1, &[text(&path), "ENOMEM", "ulimit -v"]);
        }
    }
}

/// These limits leave no room for the stacks of some or all threads.
#[test]
fn load_explains_its_failure_at_any_address_space_limit() {
    let folder = folder();
    let path = sparse_file(folder.path(), 1 << 30);
    let mut reported = false;
    for mib in 8..=40 {
        let done = run(&mut limited(&load(&path), &format!("-v {}", mib << 10)));
        if done.code == Some(127) {
            // The dynamic linker had no room for the program itself.
            continue;
        }
        let nothing_left = ["memory allocation of", "Fatal glibc error"].iter().any(|words| done.stderr.contains(words));
        if done.signal == Some(Signal::ABORT.as_raw()) && nothing_left {
            // The standard library and the C library abort if small allocations fail.
            continue;
        }
        if done.signal == Some(Signal::SEGV.as_raw()) && !reported && done.stderr.is_empty() {
            // The stack can't grow enough for an unoptimized build to parse the command line.
            continue;
        }
        let done = done.fails(1, &["dmaload: "]);
        assert!(["ENOMEM", "EAGAIN"].iter().any(|errno| done.stderr.contains(errno)), "{done}");
        reported = true;
    }
    assert!(reported, "at least one load should report the limit");
}

/// The file is 4 TiB long, more than the memory of any machine that runs this test.
#[test]
fn file_larger_than_memory_is_refused_before_it_is_read() {
    let folder = folder();
    let path = sparse_file(folder.path(), 1 << 42);
    if fs::metadata(&path).unwrap().len() != 1 << 42 {
        return skip("this file system does not support files of 4 TiB");
    }
    for heap in ["memfd", "anon"] {
        for layout in ["segmented", "single"] {
            let done = run(load(&path).args(["--heap", heap, "--layout", layout])).fails(1, &[text(&path)]);
            assert!(done.stderr.contains("available") || done.stderr.contains("ENOMEM"), "{done}");
        }
    }
}

/// The 80 TiB file fits into the address space and the larger files do not, but the error must be
/// the same.
#[test]
fn file_larger_than_the_address_space_exceeds_memory() {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return skip("there is no /dev/shm") };
    for bytes in [80 << 40, 200 << 40, 7 << 60] {
        let path = sparse_file(folder.path(), bytes);
        let socket = folder.path().join("socket");
        let commands = [
            (load(&path), "available"),
            (dmaload(["serve", text(&socket), text(&path)]), "available"),
            (dmaload(["cat", text(&path)]), "pieces"),
        ];
        for (mut command, words) in commands {
            let done = run(&mut command).fails(1, &[words]);
            let names_address_space = ["ENOMEM", "ulimit -v", "max_map_count"].iter().any(|words| done.stderr.contains(words));
            assert!(!names_address_space, "{bytes} bytes: {done}");
        }
    }
}

/// Tests the locked memory limits of ordinary users: 8 MiB by default, 64 KiB before Linux 5.16.
#[test]
fn small_memlock_limit_steps_down_and_is_named() {
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
        assert_memlock_is_reported(lenient, strict, &path);
    }
}

fn assert_memlock_is_reported(mut lenient: Command, mut strict: Command, path: &Path) {
    let json = run(&mut lenient).succeeds().json();
    assert_eq!(common::digest_of(&json), sha256sum(path), "{json:#}");
    assert_eq!(json["route"], "uring-direct", "{json:#}");
    let fallbacks = json["fallbacks"].as_array().unwrap();
    let [step] = fallbacks.as_slice() else { panic!("expected one fallback: {json:#}") };
    let expected = [("from", "uring-fixed-direct"), ("to", "uring-direct"), ("errno", "ENOMEM")];
    assert!(expected.iter().all(|&(key, value)| step[key] == value), "{step:#}");
    let reason = step["reason"].as_str().unwrap();
    assert!(reason.contains("locked memory") && reason.contains("MEMLOCK"), "{reason}");
    run(&mut strict).fails(1, &[text(path), "uring-fixed-direct", "ENOMEM", "strict", "ulimit -l"]);
}

/// The route bounce registers its staging buffers. If the limit is too small for them, the reads
/// into staging fall back to a slower route, and a strict load fails.
#[test]
fn staging_beyond_the_memlock_limit_fails_a_strict_load() {
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
    let [step] = fallbacks.as_slice() else { panic!("expected one fallback: {json:#}") };
    assert_eq!((&step["to"], &step["errno"]), (&"uring-direct".into(), &"ENOMEM".into()), "{json:#}");
    assert!(step["reason"].as_str().unwrap().contains("staging"), "{json:#}");
    run(&mut strict).fails(1, &[text(&path), "bounce", "staging", "ENOMEM", "ulimit -l"]);
}

/// The limit does not apply to root, so the load must use the best route. This shows that the
/// limit causes the fallbacks in the tests above.
#[test]
fn memlock_limit_does_not_affect_the_route_of_root() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 20 * MIB);
    if !is_root() {
        return skip("the limit applies to every user except root");
    }
    if let Some(reason) = common::unavailable("uring-fixed-direct", folder.path()) {
        return skip(reason);
    }
    let json = run(&mut limited(&load(&path), "-l 64")).succeeds().json();
    assert_eq!((&json["route"], &json["fallbacks"]), (&"uring-fixed-direct".into(), &Value::Array(vec![])), "{json:#}");
}

/// The kernel would kill a process that exceeds the limit (SIGXFSZ).
#[test]
fn file_size_limit_is_named() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5 * MIB);
    run(&mut limited(&load(&path), "-f 1000")).fails(1, &[text(&path), "EFBIG", "ulimit -f"]);
    let mut anon = load(&path);
    anon.args(["--heap", "anon"]);
    run(&mut limited(&anon, "-f 1000")).succeeds();
}

/// Small files share memory, and only a limited number of them are open at a time.
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
