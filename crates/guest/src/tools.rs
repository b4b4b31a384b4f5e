//! Installs the programs that the harness runs.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::progress;
use crate::run;

/// Required programs, each with the Debian package that contains it.
const TOOLS: [(&str, &str); 7] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("modinfo", "kmod"),
    ("mkfs.ext4", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("xz", "xz-utils"),
    ("dpkg-deb", "dpkg"),
    ("cc", "gcc"),
];

/// Installs the packages that contain missing programs and libraries. If this process does not run
/// as root, or if apt is missing, fails with an error that names the packages.
pub(crate) fn ensure() -> Result<()> {
    let missing = list_missing_packages();
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    if !is_root() || run::find("apt-get").is_none() {
        bail!("cannot find files from the packages {packages}; run `apt-get install --no-install-recommends {packages}`");
    }
    progress::print(&format!("guest: installing {packages}"));
    if install(&missing).is_err() {
        run::output(Command::new("apt-get").args(["-q", "update"]))?;
        install(&missing)?;
    }
    let missing = list_missing_packages();
    if !missing.is_empty() {
        bail!("cannot find files from the packages {} after installing {packages}", missing.join(" "));
    }
    Ok(())
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

fn install(packages: &[&str]) -> Result<String> {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    run::output(command.args(["-q", "-y", "install", "--no-install-recommends"]).args(packages))
}

fn list_missing_packages() -> Vec<&'static str> {
    let mut packages = Vec::new();
    for (program, package) in TOOLS {
        if run::find(program).is_none() && !packages.contains(&package) {
            packages.push(package);
        }
    }
    if !run::find("busybox").is_some_and(|path| is_static(&path)) {
        packages.push("busybox-static");
    }
    if !has_static_libc() {
        packages.push("libc6-dev");
    }
    packages
}

/// Returns whether a program is statically linked. Guests have no dynamic linker. A dynamically
/// linked program contains the linker's path in its first 4 KiB.
fn is_static(program: &Path) -> bool {
    let mut head = Vec::new();
    let read = File::open(program).and_then(|file| file.take(4096).read_to_end(&mut head));
    read.is_ok() && !head.windows(6).any(|window| window == b"/ld-li")
}

/// Returns whether the C compiler finds libc.a. The compiler prints an absolute path if it finds
/// the file, and only the file's name otherwise.
fn has_static_libc() -> bool {
    run::output(Command::new("cc").arg("-print-file-name=libc.a")).is_ok_and(|path| Path::new(path.trim()).is_absolute())
}
