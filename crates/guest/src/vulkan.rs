//! Makes a disk image with a software Vulkan driver (Mesa's lavapipe) and `examples/gpu-import`.
//!
//! The guest's root file system has no dynamic linker. The driver's Debian packages and their
//! dependencies are therefore unpacked into a separate root file system. The suite uses `chroot`
//! to run the example in it. The packages are unpacked but not installed, so none of their scripts
//! run.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::archive::{self, Archive};
use crate::progress;
use crate::run;

/// The archive suite from which Mesa is downloaded.
const SUITE: &str = "trixie";
const PACKAGES: [&str; 2] = ["mesa-vulkan-drivers", "libvulkan1"];
/// The driver to keep. The package's other drivers are for real devices.
const DRIVER: &str = "libvulkan_lvp.so";
/// The length of the image in bytes. The unpacked packages and the example must fit into it.
const IMAGE_LEN: u64 = 512 << 20;

/// Makes the image `vulkan.img` in `scratch`. The unpacked packages and the built example are kept
/// in `kept`, for later runs.
pub(crate) fn make_image(workspace: &Path, kept: &Path, lists: &Path, scratch: &Path) -> Result<PathBuf> {
    let root = kept.join("root");
    if !root.join("complete").exists() {
        make_root(&root, lists)?;
    }
    let program = build_example(workspace, kept)?;
    fs::copy(&program, root.join("gpu-import")).with_context(|| format!("cannot copy {}", program.display()))?;
    let image = scratch.join("vulkan.img");
    fs::File::create(&image)?.set_len(IMAGE_LEN)?;
    let mut command = run::tool("mkfs.ext4");
    command.args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-d"]).arg(&root).arg(&image);
    run::output(&mut command)?;
    Ok(image)
}

fn make_root(root: &Path, lists: &Path) -> Result<()> {
    progress::print(&format!("guest: downloading Mesa's lavapipe from {SUITE}"));
    let _ = fs::remove_dir_all(root);
    fs::create_dir_all(root)?;
    let archive = Archive::open(lists, SUITE)?;
    for package in archive.download_all(&PACKAGES)? {
        archive::unpack(&package, root)?;
    }
    for (folder, target) in [("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        symlink(target, root.join(folder)).with_context(|| format!("cannot make {folder} in {}", root.display()))?;
    }
    let drivers = root.join("usr/lib/x86_64-linux-gnu");
    for entry in fs::read_dir(&drivers).context("cannot find libraries in the packages")? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("libvulkan_") && name != DRIVER {
            fs::remove_file(&path)?;
        }
    }
    for folder in ["dev", "proc", "sys", "disk", "tmp"] {
        fs::create_dir_all(root.join(folder))?;
    }
    let about = format!(
        "{{\"file_format_version\": \"1.0.0\", \"ICD\": {{\"library_path\": \"{DRIVER}\", \"api_version\": \"1.3.0\"}}}}\n"
    );
    fs::write(root.join("lavapipe.json"), about)?;
    fs::write(root.join("complete"), "").map_err(Into::into)
}

/// Builds the example. It is linked dynamically, because it opens the Vulkan loader at run time.
fn build_example(workspace: &Path, kept: &Path) -> Result<PathBuf> {
    let target = kept.join("build");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace).env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo
        .args(["build", "--quiet", "--locked", "--manifest-path", "examples/gpu-import/Cargo.toml", "--target-dir"])
        .arg(&target);
    // Emulation is slow, so dmaload itself is optimized. The other crates do little work.
    cargo.args(["--config", "profile.dev.package.dmaload.opt-level=2", "--config", "profile.dev.debug=false"]);
    run::output(&mut cargo)?;
    Ok(target.join("debug/dmaload-gpu-import"))
}
