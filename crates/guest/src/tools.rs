//! The programs that the harness calls. Missing ones are installed where that is possible.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::run;
use crate::say;

/// Programs and the packages that have them.
const TOOLS: [(&str, &str); 7] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("depmod", "kmod"),
    ("modprobe", "kmod"),
    ("mkfs.ext4", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("xz", "xz-utils"),
    ("dpkg-deb", "dpkg"),
];

/// Makes sure that all is there.
pub(crate) fn ensure() -> Result<()> {
    let missing = missing();
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    if !root() || run::find("apt-get").is_none() {
        bail!("these packages are needed: {packages}; install them: `apt-get install --no-install-recommends {packages}`");
    }
    say::line(&format!("guest: installs {packages}"));
    if install(&missing).is_err() {
        run::output(Command::new("apt-get").args(["-q", "update"]))?;
        install(&missing)?;
    }
    let missing = self::missing();
    if !missing.is_empty() {
        bail!("{packages} were installed, but still missing is what these packages should have: {}", missing.join(" "));
    }
    Ok(())
}

/// Whether packages can be installed.
pub(crate) fn root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

fn install(packages: &[&str]) -> Result<String> {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    run::output(command.args(["-q", "-y", "install", "--no-install-recommends"]).args(packages))
}

fn missing() -> Vec<&'static str> {
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

/// Whether a program runs without a dynamic linker, of which there is none in the guest. Its name is among the
/// first bytes of programs that need it.
fn is_static(program: &Path) -> bool {
    let mut head = Vec::new();
    let read = File::open(program).and_then(|file| file.take(4096).read_to_end(&mut head));
    read.is_ok() && !head.windows(6).any(|window| window == b"/ld-li")
}

/// A compiler that knows where libc.a is prints its whole path, else its name.
fn has_static_libc() -> bool {
    run::output(Command::new("cc").arg("-print-file-name=libc.a")).is_ok_and(|path| Path::new(path.trim()).is_absolute())
}
