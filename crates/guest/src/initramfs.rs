//! Packs the guest's initramfs: busybox, the init script, programs, kernel modules, and the lists
//! that the script reads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::compile::Built;
use crate::cpio::CpioArchive;
use crate::disks::Disks;
use crate::kernels::Kernel;
use crate::modules::Module;
use crate::run;
use crate::suites::Suite;

/// Describes one boot: the kernel, its modules, and the suites to run.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) kernel: &'a Kernel,
    /// The booted kernel's id. Differs from `kernel.id` if the archive no longer has that release
    /// line.
    pub(crate) id: String,
    pub(crate) modules: &'a [Module],
    /// The text of the kernel's `.config`.
    pub(crate) config: &'a str,
    pub(crate) suites: &'a [&'a Suite],
    /// The value of `--filter`, which replaces each suite's `only`.
    pub(crate) filter: Option<&'a str>,
}

impl Plan<'_> {
    /// Returns the root file systems that the guest's suites need: their names and images.
    pub(crate) fn roots<'d>(&self, disks: &'d Disks) -> impl Iterator<Item = &'d (&'static str, PathBuf)> {
        disks.roots.iter().filter(|(name, _)| self.suites.iter().any(|suite| suite.name == *name))
    }
}

/// Packs the initramfs for one boot.
pub(crate) fn pack(plan: &Plan<'_>, built: &Built, disks: &Disks) -> Result<Vec<u8>> {
    let mut archive = CpioArchive::default();
    for folder in ["bin", "dev", "etc", "etc/guest", "modules", "suites"] {
        archive.add_folder(folder);
    }
    // The kernel opens this device for process 1, before devtmpfs is mounted.
    archive.add_device("dev/console", (5, 1));
    let busybox = run::find("busybox").context("cannot find busybox")?;
    archive.add_file("bin/busybox", &read(&busybox)?, true);
    archive.add_file("bin/dmaload", &read(&built.command)?, true);
    for program in &built.c_programs {
        let name = program.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        archive.add_file(&format!("bin/{name}"), &read(program)?, true);
    }
    archive.add_file("init", include_bytes!("init.sh"), true);
    archive.add_file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n", false);
    archive.add_file("etc/group", b"root:x:0:\nnogroup:x:65534:\n", false);

    let mut modules = String::new();
    for module in plan.modules {
        let name = module.file.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        archive.add_file(&format!("modules/{name}"), &read(&module.file)?, false);
        modules.push_str(&format!("{name} {}\n", module.parameters));
    }
    archive.add_file("etc/guest/modules", modules.as_bytes(), false);

    let mut suites = String::new();
    let mut packed = BTreeSet::new();
    for suite in plan.suites {
        let program =
            built.suites.get(suite.name).with_context(|| format!("cannot find the program of the suite {}", suite.name))?;
        let name = program.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        // Several suites may share a program.
        if packed.insert(name.clone()) {
            archive.add_file(&format!("suites/{name}"), &read(program)?, true);
        }
        suites.push_str(&format_suite(suite, &name, plan.filter));
    }
    archive.add_file("etc/guest/suites", suites.as_bytes(), false);
    archive.add_file("etc/guest/disks", disk_lines(plan, disks).as_bytes(), false);
    archive.add_file("etc/guest/env", environment(plan, built, disks).as_bytes(), false);
    Ok(archive.finish())
}

/// Formats a line for each disk: its serial number, its mount point and its mount options. The
/// guest finds the disk by its serial number.
fn disk_lines(plan: &Plan<'_>, disks: &Disks) -> String {
    let mut lines = String::from("disk /disk rw\n");
    for (name, _) in plan.roots(disks) {
        lines.push_str(&format!("{name} /{name} ro\n"));
    }
    if plan.kernel.bad_disks {
        lines.push_str("bad-nvme /bad-nvme ro\nbad-virtio /bad-virtio ro\n");
    }
    lines
}

/// Formats a suite's line: its name, its program, its time limit in seconds, and arguments for
/// libtest.
fn format_suite(suite: &Suite, program: &str, filter: Option<&str>) -> String {
    let mut words = vec![suite.name.to_owned(), program.to_owned(), suite.seconds_max.to_string()];
    for skip in suite.skip {
        words.extend(["--skip".to_owned(), (*skip).to_owned()]);
    }
    match filter {
        Some(filter) => words.push(filter.to_owned()),
        None => words.extend(suite.only.iter().map(|&only| only.to_owned())),
    }
    words.join(" ") + "\n"
}

fn environment(plan: &Plan<'_>, built: &Built, disks: &Disks) -> String {
    let mut variables = BTreeMap::from([
        ("DMALOAD_GUEST", "1".to_owned()),
        (dmaload_guest::KERNEL, plan.id.clone()),
        (dmaload_guest::ROWS, "/tmp/rows".to_owned()),
        ("DMALOAD_SIM_SEEDS", "20".to_owned()),
        ("GUEST_TESTS_FOLDER", built.tests_folder.display().to_string()),
        ("GUEST_UNIT_TESTS_FOLDER", built.unit_tests_folder.display().to_string()),
        ("GUEST_COMMAND", built.command.display().to_string()),
    ]);
    if plan.kernel.bad_disks {
        variables.insert(dmaload_guest::BAD_OFFSET, disks.bad_offset.to_string());
    }
    let quoted = |value: &str| format!("'{}'", value.replace('\'', r"'\''"));
    variables.iter().map(|(name, value)| format!("export {name}={}\n", quoted(value))).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suites::Program;

    #[test]
    fn users_filter_replaces_only_but_not_skip() {
        let suite = Suite {
            name: "load",
            program: Program::Lib("a"),
            runs_on: |_, _| true,
            only: &["one", "two"],
            skip: &["three"],
            seconds_max: 9,
            by_default: true,
        };
        assert_eq!(format_suite(&suite, "load-1", None), "load load-1 9 --skip three one two\n");
        assert_eq!(format_suite(&suite, "load-1", Some("x")), "load load-1 9 --skip three x\n");
    }
}
