//! Tests for `dmaload load --exec`: the program inherits the segments' descriptors and a
//! description of each segment.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use common::{MIB, SMALL_SEGMENTS, dmaload, folder, random_bytes, random_file, run};

#[test]
fn program_reads_the_segments_from_its_descriptors() {
    let folder = folder();
    let sizes = [5 * MIB + 7, 0, 3 * MIB];
    let paths = ["a", "b", "c"].iter().zip(sizes).map(|(name, len)| random_file(folder.path(), name, len));
    let paths: Vec<_> = paths.collect();
    // The script prints the segments in the order of their descriptors. Together they contain the
    // files, each padded with zeros to a whole page.
    let script = r#"
        printf '%s|%s|%s|' "$DMALOAD_FDS" "$DMALOAD_FILES" "$DMALOAD_SEGMENTS"
        for fd in 3 4 5 6 7; do cat <&$fd; done
        [ -e /proc/self/fd/8 ] && printf 'one too many'
        exit 0
    "#;
    let mut command = dmaload(["load", "--quiet"]);
    command.args(SMALL_SEGMENTS).args(&paths).args(["--exec", "sh", "-c", script]);
    let done = run(&mut command).succeeds();
    let mut parts = done.stdout.splitn(4, |&byte| byte == b'|');
    let mut next = || parts.next().unwrap();
    assert_eq!(next(), b"5");
    let files: Vec<String> = serde_json::from_slice(next()).unwrap();
    assert_eq!(files, paths.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>());
    let segments: serde_json::Value = serde_json::from_slice(next()).unwrap();
    let described: Vec<_> = segments.as_array().unwrap().iter().collect();
    let reported = |key: &str| described.iter().map(|segment| segment[key].as_u64().unwrap()).collect::<Vec<_>>();
    let mib = MIB as u64;
    assert_eq!(reported("fd"), [3, 4, 5, 6, 7]);
    assert_eq!(reported("file"), [0, 0, 0, 2, 2]);
    assert_eq!(reported("file_offset"), [0, 2 * mib, 4 * mib, 0, 2 * mib]);
    assert_eq!(reported("bytes"), [2 * mib, 2 * mib, mib + 7, 2 * mib, mib]);
    assert!(described.iter().all(|segment| segment["dma_buf"] == false));
    // A memfd is as long as its memory: zeros follow the file's last bytes up to the end of the
    // page.
    let memory = next();
    let padded = (5 * MIB + 7).next_multiple_of(4096);
    assert_eq!(memory.len(), padded + 3 * MIB);
    assert!(memory[..sizes[0]] == random_bytes(sizes[0], sizes[0] as u64), "the first file has wrong bytes");
    assert!(memory[sizes[0]..padded].iter().all(|&byte| byte == 0), "the memory after the first file should be zero");
    assert!(memory[padded..] == random_bytes(sizes[2], sizes[2] as u64), "the third file has wrong bytes");
}

#[test]
fn small_files_share_a_descriptor_unless_not_packed() {
    let folder = folder();
    let paths: Vec<_> = (0..3).map(|number| random_file(folder.path(), &number.to_string(), 5000 + number)).collect();
    let script = r#"printf '%s|%s|' "$DMALOAD_FDS" "$DMALOAD_SEGMENTS"; cat <&3"#;
    let loaded = |more: &[&str]| {
        let mut command = dmaload(["load", "--quiet"]);
        command.args(more).args(&paths).args(["--exec", "sh", "-c", script]);
        let stdout = run(&mut command).succeeds().stdout;
        let parts: Vec<_> = stdout.splitn(3, |&byte| byte == b'|').map(<[u8]>::to_vec).collect();
        let segments: serde_json::Value = serde_json::from_slice(&parts[1]).unwrap();
        let segments = segments.as_array().unwrap().clone();
        let reported = |key: &str| segments.iter().map(|segment| segment[key].as_u64().unwrap()).collect::<Vec<_>>();
        (parts[0].clone(), reported("fd"), reported("offset"), parts[2].clone())
    };
    let (fds, fd, offset, memory) = loaded(&[]);
    assert_eq!((&*fds, &*fd, &*offset), (&b"1"[..], &[3, 3, 3][..], &[0, 8192, 16384][..]));
    assert_eq!(memory.len(), 3 * 8192);
    for (number, &offset) in offset.iter().enumerate() {
        let (part, bytes) = (&memory[usize::try_from(offset).unwrap()..][..8192], 5000 + number);
        assert!(part[..bytes] == random_bytes(bytes, bytes as u64), "file {number} has wrong bytes");
        assert!(part[bytes..].iter().all(|&byte| byte == 0), "the memory after file {number} should be zero");
    }
    let (fds, fd, offset, memory) = loaded(&["--no-pack"]);
    assert_eq!((&*fds, &*fd, &*offset, memory.len()), (&b"3"[..], &[3, 4, 5][..], &[0, 0, 0][..], 8192));
}

#[test]
fn exit_status_is_that_of_the_program() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5000);
    let exec = |script: &str| {
        let mut command = dmaload(["load", "--quiet"]);
        command.arg(&path).args(["--exec", "sh", "-c", script]);
        run(&mut command)
    };
    exec("exit 0").succeeds();
    exec("exit 37").exits(37);
    exec("kill -TERM $$").exits(128 + 15);
    // The report is printed before the program runs.
    let mut command = dmaload(["load", "--json"]);
    command.arg(&path).args(["--exec", "echo", "--flag-of-the-program"]);
    let done = run(&mut command).succeeds();
    let text = done.text();
    let (json, printed) = text.rsplit_once("}\n").unwrap();
    assert!(serde_json::from_str::<serde_json::Value>(&format!("{json}}}")).is_ok(), "{text}");
    assert_eq!(printed, "--flag-of-the-program\n");
}

#[test]
fn exec_without_descriptors_or_program_is_an_error() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 5000);
    let name = path.to_str().unwrap();
    run(&mut dmaload(["load", "--quiet", name, "--exec", "/nonexistent/program"])).fails(1, &["/nonexistent/program"]);
    run(&mut dmaload(["load", "--quiet", "--heap", "anon", name, "--exec", "true"])).fails(2, &["--exec", "anon"]);
    // In the first case, the descriptions are too long for an environment variable. In the second,
    // there are more descriptors than the limit on open files allows.
    let many: Vec<_> = (0..3000).map(|_| name).collect();
    run(dmaload(["load", "--quiet"]).args(&many).args(["--exec", "true"])).fails(1, &["--exec", "3000 segments", "fewer files"]);
    let mut some = dmaload(["load", "--quiet"]);
    some.arg("--no-pack").args(&many[..40]).args(["--exec", "true"]);
    run(&mut common::limited(&some, "-n 75")).fails(1, &[name, "EMFILE", "ulimit -n"]);
    run(&mut dmaload(["load", name, "--despite-udmabuf-bug"])).fails(2, &["udmabuf"]);
    // The program does not run if the load fails.
    let missing = folder.path().join("missing.bin");
    run(&mut dmaload(["load", "--quiet", missing.to_str().unwrap(), "--exec", "echo", "ran"]))
        .fails(1, &["missing.bin", "ENOENT"]);
    run(&mut dmaload(["load", name, "--exec"])).fails(2, &["--exec"]);
}
