//! Makes disk images with root file systems for programs that are linked dynamically.
//!
//! The guest's own root file system has no dynamic linker. A program's Debian packages and their
//! dependencies are therefore unpacked into a separate root file system, and a suite uses `chroot`
//! to run the program in it. The packages are unpacked but not installed, so none of their scripts
//! run.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::archive::{self, Archive};
use crate::progress;
use crate::run;

/// The archive suite from which packages are downloaded.
const SUITE: &str = "trixie";
/// The length of an image in bytes. The unpacked packages and the programs must fit into it.
const IMAGE_LEN: u64 = 512 << 20;

/// The folders that making a root file system reads and writes.
#[derive(Debug)]
pub(crate) struct Folders<'a> {
    pub(crate) workspace: &'a Path,
    /// The folder for build output.
    pub(crate) target: &'a Path,
    /// The folder for files that later runs use again.
    pub(crate) kept: PathBuf,
    pub(crate) lists: &'a Path,
}

/// Makes the image of a root file system in `scratch`.
pub(crate) fn make_image(name: &str, root: &Path, scratch: &Path) -> Result<PathBuf> {
    let image = scratch.join(format!("{name}.img"));
    fs::File::create(&image)?.set_len(IMAGE_LEN)?;
    let mut command = run::tool("mkfs.ext4");
    command.args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-d"]).arg(root).arg(&image);
    run::output(&mut command)?;
    Ok(image)
}

/// Unpacks packages and their dependencies into `folders.kept`, unless an earlier run has done so,
/// and returns the folder. Calls `finish` with the folder after unpacking.
pub(crate) fn unpack(folders: &Folders<'_>, packages: &[&str], finish: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let root = folders.kept.join("root");
    if root.join("complete").exists() {
        return Ok(root);
    }
    progress::print(&format!("guest: downloading {} from {SUITE}", packages.join(", ")));
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(&root)?;
    let archive = Archive::open(folders.lists, SUITE)?;
    for package in archive.download_all(packages)? {
        archive::unpack(&package, &root)?;
    }
    for (folder, target) in [("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        symlink(target, root.join(folder)).with_context(|| format!("cannot create {folder} in {}", root.display()))?;
    }
    for folder in ["dev", "proc", "sys", "disk", "tmp"] {
        fs::create_dir_all(root.join(folder))?;
    }
    finish(&root)?;
    fs::write(root.join("complete"), "")?;
    Ok(root)
}
