//! Tests that a load that is killed while it runs leaves no memory and no file behind, and that
//! the next load returns the right bytes.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{MIB, digest_of, dmaload, folder, large_file, load_json, sha256sum};

/// Returns the amount of shared memory on the whole machine, including memfds, in bytes.
fn shared_memory_bytes() -> u64 {
    dmaload_testing::meminfo_bytes("Shmem")
}

/// Returns how many bytes of its memfds a process has populated so far.
fn allocated_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
}

#[test]
fn killed_load_leaves_nothing_behind() {
    let folder = folder();
    let path = large_file(folder.path(), "model.bin", 768 * MIB as u64);
    let expected = sha256sum(&path);
    for arguments in [&["--route", "auto"][..], &["--route", "pread-direct"], &["--route", "bounce"], &["--route", "buffered"]] {
        let before = shared_memory_bytes();
        let mut command: Command = dmaload(["load", "--quiet", "--digest", "sha256"]);
        let mut child = command.args(arguments).arg(&path).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while allocated_bytes(child.id()) < 100 * MIB as u64 {
            assert!(child.try_wait().unwrap().is_none(), "{arguments:?}: the load finished before it was killed");
            assert!(Instant::now() < deadline, "{arguments:?}: the load should have allocated 100 MiB by now");
            sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "{arguments:?}: {status}");
        // The kernel tears rings down in the background.
        while shared_memory_bytes() > before + 64 * MIB as u64 {
            assert!(
                Instant::now() < deadline,
                "{arguments:?}: {} bytes of shared memory are left",
                shared_memory_bytes() - before
            );
            sleep(Duration::from_millis(10));
        }
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["model.bin"], "{arguments:?}");
    }
    assert_eq!(digest_of(&load_json(&path, &["--digest", "sha256"])), expected);
}
