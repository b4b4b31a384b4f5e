//! Makes a root file system with a software Vulkan driver (Mesa's lavapipe) and
//! `examples/gpu-import`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::roots::{self, Folders};
use crate::run;

const PACKAGES: [&str; 2] = ["mesa-vulkan-drivers", "libvulkan1"];
/// The driver to keep. The package's other drivers are for real devices.
const DRIVER: &str = "libvulkan_lvp.so";

pub(crate) fn make_root(folders: &Folders<'_>) -> Result<PathBuf> {
    let root = roots::unpack(folders, &PACKAGES, keep_one_driver)?;
    let program = build_example(folders.workspace, &folders.kept)?;
    fs::copy(&program, root.join("gpu-import")).with_context(|| format!("cannot copy {}", program.display()))?;
    Ok(root)
}

fn keep_one_driver(root: &Path) -> Result<()> {
    let drivers = root.join("usr/lib/x86_64-linux-gnu");
    for entry in fs::read_dir(&drivers).context("cannot find libraries in the packages")? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("libvulkan_") && name != DRIVER {
            fs::remove_file(&path)?;
        }
    }
    let about = format!(
        "{{\"file_format_version\": \"1.0.0\", \"ICD\": {{\"library_path\": \"{DRIVER}\", \"api_version\": \"1.3.0\"}}}}\n"
    );
    fs::write(root.join("lavapipe.json"), about).map_err(Into::into)
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
