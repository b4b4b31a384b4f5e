//! Tests that a load that would exceed the limit of its memory cgroup fails with an error before
//! the kernel kills it.
//!
//! Requires root and a cgroup file system, v2 or v1; otherwise the tests are skipped.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{MIB, dmaload, finish, folder, random_file, run, skip};

struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(limit: usize) -> Result<Self, String> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("dmaload-test-{}-{number}", std::process::id());
        let places = [
            ("/sys/fs/cgroup", "memory.max"),
            ("/sys/fs/cgroup/unified", "memory.max"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ];
        let mut reasons = Vec::new();
        for (parent, file) in places {
            let group = Path::new(parent).join(&name);
            let limit_file = group.join(file);
            let made = fs::create_dir(&group).map(|()| MemoryGroup(group));
            // Only a cgroup file system creates the limit file. The test must not create the file,
            // because in any other folder, a file with this name limits nothing.
            let written = |made: MemoryGroup| {
                fs::OpenOptions::new().write(true).open(&limit_file)?.write_all(limit.to_string().as_bytes())?;
                Ok(made)
            };
            match made.and_then(written) {
                Ok(group) => return Ok(group),
                Err(error) => reasons.push(format!("{}: {error}", limit_file.display())),
            }
        }
        Err(reasons.join("; "))
    }

    /// Returns the number of processes that the kernel has killed because of the limit. Before
    /// Linux 4.13, the kernel does not report the number, and the result is always 0.
    fn count_kills(&self) -> u64 {
        let counts =
            ["memory.events", "memory.oom_control"].into_iter().find_map(|name| fs::read_to_string(self.0.join(name)).ok());
        let counts = counts.unwrap_or_default();
        counts.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Returns a command that runs the given command inside the group.
    fn inside(&self, command: &Command) -> Command {
        let script = format!("echo $$ > '{}/cgroup.procs' && exec \"$@\"", self.0.display());
        let mut shell = Command::new("sh");
        shell.args(["-c", &script, "sh"]).arg(command.get_program()).args(command.get_args());
        shell
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn only_loads_above_the_limit_of_the_group_are_refused() {
    let folder = folder();
    let large = random_file(folder.path(), "large.bin", 200 * MIB);
    let small = random_file(folder.path(), "small.bin", 20 * MIB);
    let group = match MemoryGroup::new(120 * MIB) {
        Ok(group) => group,
        Err(reason) => return skip(reason),
    };
    let load = |path: &Path| group.inside(dmaload(["load", "--json"]).arg(path));
    for _ in 0..2 {
        run(&mut load(&large)).fails(1, &["large.bin", "more bytes are needed", "/memory."]);
        run(&mut load(&small)).succeeds();
    }
    // `cat` streams, so it fails only if a single piece of the file does not fit under the limit.
    // All pieces of this file fit.
    let cat = group.inside(dmaload(["cat"]).arg(&small));
    assert_eq!(run(&mut { cat }).succeeds().stdout.len(), 20 * MIB);
}

/// Each load finds enough memory when it begins, but there is not enough for all of them.
#[test]
fn concurrent_loads_above_the_limit_fail_and_are_not_killed() {
    let folder = folder();
    let path = folder.path().join("model.bin");
    fs::File::create(&path).unwrap().set_len(600 * MIB as u64).unwrap();
    let (mut succeeded, mut failed) = (0, 0);
    for (loads, options) in
        [(4, &[][..]), (4, &["--heap", "anon"]), (6, &["--segment-size", "2MiB"]), (4, &["--layout", "single"])]
    {
        let group = match MemoryGroup::new(900 * MIB) {
            Ok(group) => group,
            Err(reason) => return skip(reason),
        };
        let load = || {
            let mut command = group.inside(dmaload(["load"]).args(options).arg(&path));
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let running: Vec<_> = (0..loads).map(|_| load()).collect();
        let done: Vec<_> = running.into_iter().map(|load| finish(format!("{options:?}"), load)).collect();
        assert_eq!(group.count_kills(), 0, "{options:?}: the kernel killed a load");
        for load in done {
            assert_eq!(load.signal, None, "{options:?}");
            if load.code == Some(0) {
                succeeded += 1;
            } else {
                load.fails(1, &["model.bin", "more bytes are needed", "/memory."]);
                failed += 1;
            }
        }
    }
    println!("{succeeded} loads succeeded, {failed} failed");
    assert!(succeeded > 0, "at least one load should succeed, because loads that fail make room for others");
}

#[test]
fn cat_with_a_slow_reader_fits_a_small_group() {
    use std::io::Read;
    let folder = folder();
    let path = common::large_file(folder.path(), "large.bin", 300 * MIB as u64);
    for options in [&[][..], &["--memory-limit", "32MiB"]] {
        let group = match MemoryGroup::new(150 * MIB) {
            Ok(group) => group,
            Err(reason) => return skip(reason),
        };
        let mut cat = group.inside(dmaload(["cat"]).args(options).arg(&path));
        let mut cat = cat.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdout = cat.stdout.take().unwrap();
        let mut written = vec![0; MIB];
        stdout.read_exact(&mut written).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        stdout.read_to_end(&mut written).unwrap();
        finish(format!("cat {options:?}"), cat).succeeds();
        assert!(written == fs::read(&path).unwrap(), "{options:?}: the output ({} bytes) differs from the file", written.len());
        assert_eq!(group.count_kills(), 0);
    }
}
