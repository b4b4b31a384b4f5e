//! The guest's root: busybox, the init script, the programs, and lists that the script works through.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::compile::Built;
use crate::cpio::Archive;
use crate::disks::Disks;
use crate::kernels::Kernel;
use crate::modules::Module;
use crate::run;
use crate::suites::Suite;

/// One boot: what is to run, and on what.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) modules: &'a [Module],
    pub(crate) suites: &'a [&'a Suite],
    /// What the user asked for instead of the table's `only`.
    pub(crate) filter: Option<&'a str>,
}

/// Packs the root for one boot.
pub(crate) fn pack(plan: &Plan<'_>, built: &Built, disks: &Disks) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "etc", "etc/guest", "modules", "suites"] {
        archive.folder(folder);
    }
    // The kernel opens it for process 1 before anything is mounted.
    archive.device("dev/console", (5, 1));
    let busybox = run::find("busybox").context("busybox has gone")?;
    archive.file("bin/busybox", &read(&busybox)?, true);
    archive.file("bin/dmaload", &read(&built.command)?, true);
    for program in &built.c_programs {
        let name = program.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        archive.file(&format!("bin/{name}"), &read(program)?, true);
    }
    archive.file("init", include_bytes!("init.sh"), true);
    archive.file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n", false);
    archive.file("etc/group", b"root:x:0:\nnogroup:x:65534:\n", false);

    let mut modules = String::new();
    for module in plan.modules {
        let name = module.file.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        archive.file(&format!("modules/{name}"), &read(&module.file)?, false);
        modules.push_str(&format!("{name} {}\n", module.parameters));
    }
    archive.file("etc/guest/modules", modules.as_bytes(), false);

    let mut suites = String::new();
    for suite in plan.suites {
        let program = built.suites.get(suite.name).with_context(|| format!("{} was not built", suite.name))?;
        archive.file(&format!("suites/{}", suite.name), &read(program)?, true);
        suites.push_str(&suite_line(suite, plan.filter));
    }
    archive.file("etc/guest/suites", suites.as_bytes(), false);
    archive.file("etc/guest/disks", disk_lines(plan.kernel).as_bytes(), false);
    archive.file("etc/guest/env", environment(plan.kernel, built, disks).as_bytes(), false);
    Ok(archive.finish())
}

/// The serial number of each disk, by which the guest finds it, its folder, and how it is mounted.
fn disk_lines(kernel: &Kernel) -> String {
    let mut lines = String::from("disk /disk rw\n");
    if kernel.bad_disks {
        lines.push_str("bad-nvme /bad-nvme ro\nbad-virtio /bad-virtio ro\n");
    }
    lines
}

/// The suite's name, its time limit, and libtest's arguments.
fn suite_line(suite: &Suite, filter: Option<&str>) -> String {
    let mut words = vec![suite.name.to_owned(), suite.seconds_max.to_string()];
    for skip in suite.skip {
        words.extend(["--skip".to_owned(), (*skip).to_owned()]);
    }
    match filter {
        Some(filter) => words.push(filter.to_owned()),
        None => words.extend(suite.only.iter().map(|&only| only.to_owned())),
    }
    words.join(" ") + "\n"
}

fn environment(kernel: &Kernel, built: &Built, disks: &Disks) -> String {
    let mut variables = BTreeMap::from([
        ("DMALOAD_GUEST", "1".to_owned()),
        (dmaload_guest::KERNEL, kernel.id.to_owned()),
        (dmaload_guest::ROWS, "/tmp/rows".to_owned()),
        ("DMALOAD_SIM_SEEDS", "20".to_owned()),
        ("GUEST_TESTS_FOLDER", built.tests_folder.display().to_string()),
        ("GUEST_UNIT_TESTS_FOLDER", built.unit_tests_folder.display().to_string()),
        ("GUEST_COMMAND", built.command.display().to_string()),
    ]);
    if kernel.bad_disks {
        variables.insert(dmaload_guest::BAD_OFFSET, disks.bad_offset.to_string());
    }
    let quoted = |value: &str| format!("'{}'", value.replace('\'', r"'\''"));
    variables.iter().map(|(name, value)| format!("export {name}={}\n", quoted(value))).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("can't read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suites::Program;

    #[test]
    fn the_users_filter_replaces_the_tables_but_not_its_skips() {
        let suite = Suite {
            name: "load",
            program: Program::Lib("a"),
            kernels: &[],
            only: &["one", "two"],
            skip: &["three"],
            seconds_max: 9,
        };
        assert_eq!(suite_line(&suite, None), "load 9 --skip three one two\n");
        assert_eq!(suite_line(&suite, Some("x")), "load 9 --skip three x\n");
    }
}
