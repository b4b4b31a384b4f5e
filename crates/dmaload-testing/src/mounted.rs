//! Mounts file systems, most of them on loop devices. Requires root, and the `mkfs` program for
//! each type of file system.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The size of a file system image. `mkfs.xfs` refuses images smaller than 300 MiB.
const IMAGE_BYTES: u64 = 400 << 20;

/// A mounted file system, unmounted on drop.
#[derive(Debug)]
pub struct Mounted(pub PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Unmount lazily, because a failed test may still have a file mapped.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// The type, the `mkfs` command and the `mount` options of each file system.
const KINDS: [(&str, &[&str], &str); 5] = [
    ("ext4", &["mkfs.ext4", "-q"], "loop"),
    ("ext4", &["mkfs.ext4", "-q", "-b", "1024"], "loop"),
    ("xfs", &["mkfs.xfs", "-q"], "loop"),
    ("btrfs", &["mkfs.btrfs", "-q"], "loop"),
    ("btrfs", &["mkfs.btrfs", "-q"], "loop,compress-force=zstd"),
];

/// Mounts ext4, xfs and btrfs file systems under `folder`, one after the other, and calls `check`
/// with a description and the mount point of each. Skips file systems that cannot be mounted on
/// this machine, and prints the reason. In a guest, calls `check` first with `folder` itself,
/// which is on ext4 there.
#[allow(clippy::print_stdout, reason = "reports skipped file systems")]
pub fn on_each(folder: &Path, mut check: impl FnMut(&str, &Path)) {
    if std::env::var_os("DMALOAD_GUEST").is_some() {
        check("the guest's disk", folder);
    }
    for (number, (kind, mkfs, options)) in KINDS.into_iter().enumerate() {
        let what = format!("{} -o {options}", mkfs.join(" "));
        match on_loop_device(&folder.join(number.to_string()), kind, mkfs, options) {
            Ok(mounted) => check(&what, &mounted.0),
            Err(reason) => println!("skipped: {what}: {reason}"),
        }
    }
}

/// Creates a file system with `mkfs` in a sparse image next to `at`, and mounts it at `at`.
/// `options` are passed to `mount` and must include `loop`.
///
/// # Errors
/// Returns the error from [`tool`] if `mkfs` or `mount` fails.
pub fn on_loop_device(at: &Path, kind: &str, mkfs: &[&str], options: &str) -> Result<Mounted, String> {
    let image = at.with_extension("img");
    fs::File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
    let (program, arguments) = mkfs.split_first().unwrap();
    tool(Command::new(program).args(arguments).arg(&image))?;
    mount(kind, options, image, at)
}

/// Mounts a tmpfs at `at`. `size` is the value of the `size` mount option, such as `64m`.
///
/// # Errors
/// Returns the error from [`tool`] if `mount` fails.
pub fn tmpfs(at: &Path, size: &str) -> Result<Mounted, String> {
    mount("tmpfs", &format!("size={size}"), "tmpfs", at)
}

/// Mounts `source`, a file system of type `kind`, at the folder `at`. Creates the folder if it
/// does not exist.
///
/// # Errors
/// Returns the error from [`tool`] if `mount` fails, for example because only root can mount.
pub fn mount(kind: &str, options: &str, source: impl AsRef<OsStr>, at: &Path) -> Result<Mounted, String> {
    fs::create_dir_all(at).unwrap();
    tool(Command::new("mount").args(["-t", kind, "-o", options]).arg(source).arg(at))?;
    Ok(Mounted(at.to_owned()))
}

/// Runs a program and waits until it exits.
///
/// # Errors
/// Returns the command with the reason why it could not be started or, if it failed, with its
/// standard error output.
pub fn tool(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())) }
}
