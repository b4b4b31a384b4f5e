//! Mounts file systems, most of them on loop devices. Requires root, and the `mkfs` program of
//! each kind.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The size of an image. `mkfs.xfs` refuses less than 300 MiB.
const IMAGE_BYTES: u64 = 400 << 20;

/// A mounted file system, unmounted on drop.
#[derive(Debug)]
pub struct Mounted(pub PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Unmounts lazily, because a failed test may still map a file.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// For each file system: its name, its `mkfs` command, and its `mount` options.
const KINDS: [(&str, &[&str], &str); 5] = [
    ("ext4", &["mkfs.ext4", "-q"], "loop"),
    ("ext4", &["mkfs.ext4", "-q", "-b", "1024"], "loop"),
    ("xfs", &["mkfs.xfs", "-q"], "loop"),
    ("btrfs", &["mkfs.btrfs", "-q"], "loop"),
    ("btrfs", &["mkfs.btrfs", "-q"], "loop,compress-force=zstd"),
];

/// Mounts ext4, xfs and btrfs file systems under `folder`, one after the other, and calls `check`
/// with the description and the mount point of each. In a guest, calls `check` first with `folder`
/// itself, which is on ext4. If a file system cannot be mounted on this machine, prints why.
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
/// `options` are those of `mount`, and contain `loop`.
///
/// # Errors
/// The error of the program that failed: see [`tool`].
pub fn on_loop_device(at: &Path, kind: &str, mkfs: &[&str], options: &str) -> Result<Mounted, String> {
    let image = at.with_extension("img");
    fs::File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
    let (program, arguments) = mkfs.split_first().unwrap();
    tool(Command::new(program).args(arguments).arg(&image))?;
    mount(kind, options, image, at)
}

/// Mounts a tmpfs at `at`. `size` is the value of its mount option, such as `64m`.
///
/// # Errors
/// The error of `mount`: see [`tool`].
pub fn tmpfs(at: &Path, size: &str) -> Result<Mounted, String> {
    mount("tmpfs", &format!("size={size}"), "tmpfs", at)
}

/// Mounts a file system of `kind` at `at`. Creates that folder if it does not exist.
///
/// # Errors
/// The error of `mount`, for example that only root can mount: see [`tool`].
pub fn mount(kind: &str, options: &str, source: impl AsRef<OsStr>, at: &Path) -> Result<Mounted, String> {
    fs::create_dir_all(at).unwrap();
    tool(Command::new("mount").args(["-t", kind, "-o", options]).arg(source).arg(at))?;
    Ok(Mounted(at.to_owned()))
}

/// Runs a program.
///
/// # Errors
/// The command, with what it printed to standard error or why it could not be started.
pub fn tool(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())) }
}
