//! What `dmaload cat` writes is the file.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod common;

use std::process::{Command, Stdio};

use common::{MIB, ROUTES, SMALL_SEGMENTS, dmaload, finish, folder, random_file, run};

#[test]
fn cmp_finds_no_difference_between_the_file_and_what_cat_writes() {
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
fn a_reader_that_has_seen_enough_is_no_error() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 64 * MIB);
    let mut cat = dmaload(["cat"]).arg(&path).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let head = Command::new("head").args(["-c", "10"]).stdin(cat.stdout.take().unwrap()).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(finish("head".to_owned(), head).stdout.len(), 10);
    finish("dmaload cat | head".to_owned(), cat).succeeds();
}

#[test]
fn a_missing_file_writes_nothing() {
    run(dmaload(["cat"]).arg("/nonexistent/model.bin")).fails(1, &["/nonexistent/model.bin", "ENOENT"]);
}

/// Reads a little from `cat`, then nothing until it has nothing more to do; what it has resident then; then all the rest.
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
fn slow_reader_makes_cat_hold_no_more_than_its_window_and_segments() {
    /// The program itself, its ring and its threads.
    const OWN: usize = 32 * MIB;
    let folder = folder();
    let path = common::large_file(folder.path(), "model.bin", (480 * MIB) as u64);
    let expected = std::fs::read(&path).unwrap();
    let small = ["--segment-size", "8MiB", "--window", "32MiB"];
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
        assert!(written == expected, "{options:?}: {} bytes, or others than the file's", written.len());
        println!("{options:?}: {} MiB resident, {most_mib} and the program's own allowed", resident / MIB);
        assert!(resident <= most_mib * MIB + OWN, "{options:?}: {} MiB were resident", resident / MIB);
    }
}
