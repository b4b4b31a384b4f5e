//! A memory cgroup's limit is refused before it is met: the kernel's own answer would be SIGKILL.
//!
//! Takes root and a cgroup file system, v2 or v1; else the reason is printed.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{MIB, dmaload, folder, random_file, run, skip};

struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(limit: usize) -> Result<Self, String> {
        let name = format!("dmaload-test-{}", std::process::id());
        let places = [
            ("/sys/fs/cgroup", "memory.max"),
            ("/sys/fs/cgroup/unified", "memory.max"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ];
        let mut reasons = Vec::new();
        for (parent, file) in places {
            let group = Path::new(parent).join(&name);
            // A cgroup file system makes the files; in a folder that is none, writing one would limit nothing.
            let limit_file = group.join(file);
            let made = fs::create_dir(&group).map(|()| MemoryGroup(group));
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

    /// The same command, inside the group.
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
fn a_load_larger_than_the_groups_limit_is_refused_and_a_smaller_one_is_not() {
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
    // A stream is refused at the piece that does not fit.
    let cat = group.inside(dmaload(["cat"]).arg(&small));
    assert_eq!(run(&mut { cat }).succeeds().stdout.len(), 20 * MIB);
}
