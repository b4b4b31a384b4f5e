//! Makes a root file system with CPython and the Python package, which `.ci/python` builds.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::roots::{self, Folders};
use crate::run;

const PACKAGES: [&str; 1] = ["python3.13"];

pub(crate) fn make_root(folders: &Folders<'_>) -> Result<PathBuf> {
    let root = roots::unpack(folders, &PACKAGES, |_| Ok(()))?;
    let mut build = Command::new(folders.workspace.join(".ci/python"));
    run::output(build.arg("--no-run").current_dir(folders.workspace))?;
    let wheels = folders.target.join("python/wheels");
    let wheel = fs::read_dir(&wheels).with_context(|| format!("cannot read {}", wheels.display()))?;
    let wheel = wheel.last().with_context(|| format!("cannot find a wheel in {}", wheels.display()))??.path();
    let packages = root.join("packages");
    let _ = fs::remove_dir_all(&packages);
    run::output(run::tool("python3").args(["-m", "zipfile", "-e"]).args([&wheel, &packages]))?;
    Ok(root)
}
