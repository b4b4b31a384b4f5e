//! Tests for sandboxes. Containers often refuse io_uring with a seccomp filter, so these tests
//! refuse its system calls with several errnos. A load must fall back to a slower route, report
//! the fallback, and load the right bytes. A strict load must fail.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use common::{MIB, digest_of, dmaload, folder, random_file, run, sha256sum};
use dmaload_testing::seccomp::refusing;

/// System call numbers of io_uring, which are the same on x86-64 and arm64.
const SETUP: u32 = 425;
const ENTER: u32 = 426;
const REGISTER: u32 = 427;

#[test]
fn refused_io_uring_steps_down_and_loads_the_same_bytes() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", 9 * MIB + 777);
    let load = |arguments: &[&str]| {
        let mut command = dmaload(["load", "--json", "--cache", "bypass", "--digest", "sha256"]);
        command.args(arguments).arg(&path);
        command
    };
    for (calls, route, reason) in [
        (&[SETUP][..], "pread-direct", "setting up io_uring"),
        (&[SETUP, ENTER, REGISTER], "pread-direct", "setting up io_uring"),
        (&[ENTER], "pread-direct", "setting up io_uring"),
        (&[REGISTER], "uring-direct", "registering memory"),
    ] {
        for (errno, name) in [(libc::EPERM, "EPERM"), (libc::ENOSYS, "ENOSYS"), (libc::EACCES, "EACCES")] {
            let json = run(&mut refusing(load(&[]), calls, errno)).succeeds().json();
            assert_eq!(digest_of(&json), sha256sum(&path));
            assert_eq!(json["route"], route, "{calls:?} {name}: {json:#}");
            let fallback = &json["fallbacks"][0];
            assert_eq!((fallback["from"].as_str(), fallback["to"].as_str()), (Some("uring-fixed-direct"), Some(route)));
            assert_eq!(fallback["errno"], name);
            assert!(fallback["reason"].as_str().unwrap().contains(reason), "{fallback}");
            run(&mut refusing(load(&["--strict"]), calls, errno)).fails(1, &["model.bin", "uring-fixed-direct", name, "strict"]);
            // The route bounce is kept, but its reads into staging fall back to a slower route.
            let bounced = run(&mut refusing(load(&["--route", "bounce"]), calls, errno)).succeeds().json();
            assert_eq!((digest_of(&bounced), &bounced["route"]), (sha256sum(&path).as_str(), &"bounce".into()));
            let step = &bounced["fallbacks"][0];
            assert_eq!((&step["to"], &step["errno"]), (&route.into(), &name.into()), "{bounced:#}");
            run(&mut refusing(load(&["--route", "bounce", "--strict"]), calls, errno))
                .fails(1, &["model.bin", "bounce", name, "strict"]);
            // The slower route needs none of the refused calls.
            let lower = run(&mut refusing(load(&["--route", route, "--strict"]), calls, errno)).succeeds().json();
            assert_eq!((lower["route"].as_str(), lower["fallbacks"].as_array().map(Vec::len)), (Some(route), Some(0)));
        }
    }
}

/// The error for a failed allocation, in contrast, names the file: see `errors/limits.rs`.
#[test]
fn loader_that_cannot_start_names_no_file() {
    let folder = folder();
    let path = random_file(folder.path(), "model.bin", MIB);
    let eventfd = u32::try_from(libc::SYS_eventfd2).unwrap();
    for verb in ["load", "cat", "manifest"] {
        let command = &mut refusing(dmaload([verb, path.to_str().unwrap()]), &[eventfd], libc::EMFILE);
        let done = run(command).fails(1, &["cannot start a loader", "EMFILE", "ulimit -n"]);
        assert!(!done.stderr.contains("model.bin"), "{done}");
    }
}

/// If prlimit(2) is refused, limits are read from procfs.
#[test]
fn loads_work_in_a_sandbox_that_refuses_prlimit() {
    let folder = folder();
    let call = u32::try_from(libc::SYS_prlimit64).unwrap();
    let large = random_file(folder.path(), "model.bin", 9 * MIB + 777);
    let many: Vec<_> = (0..100).map(|number| random_file(folder.path(), &format!("{number}.bin"), 5000 + number)).collect();
    for errno in [libc::EPERM, libc::ENOSYS] {
        for paths in [std::slice::from_ref(&large), &many] {
            let load = |arguments: &[&str]| {
                let mut command = dmaload(["load", "--json", "--cache", "bypass", "--digest", "sha256"]);
                command.args(arguments).args(paths);
                command
            };
            for arguments in [&[][..], &["--no-pack"]] {
                let json = run(&mut refusing(load(arguments), &[call], errno)).succeeds().json();
                for (file, path) in json["files"].as_array().unwrap().iter().zip(paths) {
                    assert_eq!(file["digest"]["hex"], sha256sum(path));
                }
                assert_eq!(json["fallbacks"].as_array().map(Vec::len), Some(0), "{json:#}");
            }
        }
    }
}
