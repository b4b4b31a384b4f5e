//! Fetches kernels: the newest package behind a meta-package, kept in a cache folder.
//!
//! ```text
//! target/guest/kernels/6.12-cloud/linux-image-6.12.117+deb12-cloud-amd64_6.12.117-1~deb12u1_amd64.deb
//! ```
//!
//! Without a network, or without package lists, what is in the cache will do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use crate::kernels::Kernel;
use crate::run;
use crate::say;
use crate::tools;

/// The kernel's package file in `folder`, which is downloaded when it isn't there.
pub(crate) fn fetch(kernel: &Kernel, folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("can't make {}", folder.display()))?;
    match newest(kernel, folder) {
        Ok(path) => Ok(path),
        Err(error) => {
            let cached = latest_cached(folder)?;
            let Some(path) = cached else {
                return Err(error.context(format!("kernel {} is neither cached nor to be had", kernel.id)));
            };
            say::line(&format!("guest: {}: takes the cached {}: {error:#}", kernel.id, path.display()));
            Ok(path)
        }
    }
}

fn newest(kernel: &Kernel, folder: &Path) -> Result<PathBuf> {
    match candidate(kernel.package).and_then(|(package, version)| cached_or_download(&package, &version, folder)) {
        Ok(path) => Ok(path),
        // Lists that are missing, or older than the archive.
        Err(error) if tools::root() => {
            run::output(Command::new("apt-get").args(["-q", "update"]))
                .with_context(|| format!("package lists can't be renewed, after: {error:#}"))?;
            let (package, version) = candidate(kernel.package)?;
            cached_or_download(&package, &version, folder)
        }
        Err(error) => Err(error.context("`apt-get update`, by root, may help")),
    }
}

/// The real package and its version.
fn candidate(meta: &str) -> Result<(String, String)> {
    let unknown = || format!("apt knows no package {meta}; Debian 12 with its security suite has it");
    let depends = run::output(Command::new("apt-cache").args(["depends", "--important", meta])).with_context(unknown)?;
    let package = real_package(&depends).with_context(unknown)?;
    let policy = run::output(Command::new("apt-cache").env("LC_ALL", "C").args(["policy", &package]))?;
    let version = candidate_version(&policy).with_context(|| format!("apt has no version of {package}"))?;
    Ok((package, version))
}

/// The first kernel in what `apt-cache depends` prints.
fn real_package(depends: &str) -> Option<String> {
    let mut names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    names.find(|name| name.starts_with("linux-image-")).map(str::to_owned)
}

/// The version in what `apt-cache policy` prints.
fn candidate_version(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

fn cached_or_download(package: &str, version: &str, folder: &Path) -> Result<PathBuf> {
    let path = folder.join(format!("{package}_{}_amd64.deb", version.replace(':', "%3a")));
    if path.exists() {
        return Ok(path);
    }
    say::line(&format!("guest: downloads {package} {version}"));
    // Into a folder of its own: half a file must not look like a cached one.
    let partial = folder.join("partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial)?;
    let mut command = Command::new("apt-get");
    command.args(["-q", "-o", "APT::Sandbox::User=root", "download"]).arg(format!("{package}={version}"));
    run::output(command.current_dir(&partial))?;
    let downloaded = packages_in(&partial)?.pop().with_context(|| format!("apt-get left no file of {package}"))?;
    for old in packages_in(folder)? {
        let _ = fs::remove_file(old);
    }
    fs::rename(&downloaded, &path)?;
    let _ = fs::remove_dir_all(&partial);
    Ok(path)
}

fn latest_cached(folder: &Path) -> Result<Option<PathBuf>> {
    let modified = |path: &PathBuf| path.metadata().and_then(|data| data.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    Ok(packages_in(folder)?.into_iter().max_by_key(modified))
}

fn packages_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("can't list {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            paths.push(path);
        }
    }
    Ok(paths)
}

/// Unpacks the members that match `patterns` into `folder`.
pub(crate) fn unpack(package: &Path, folder: &Path, patterns: &[&str]) -> Result<()> {
    if folder.exists() {
        bail!("{} is in the way", folder.display());
    }
    fs::create_dir_all(folder)?;
    let mut reader = Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package).stdout(std::process::Stdio::piped()).spawn()?;
    let Some(archive) = reader.stdout.take() else { bail!("dpkg-deb has no output") };
    let mut tar = Command::new("tar");
    tar.args(["-x", "--wildcards", "-C"]).arg(folder).args(patterns).stdin(archive);
    let (unpacked, read) = (tar.status(), reader.wait());
    if !unpacked.context("can't run tar")?.success() || !read?.success() {
        bail!("can't unpack {}; remove it to have it downloaded again", package.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_package_is_what_the_meta_package_depends_on() {
        let depends = "linux-image-6.12-amd64\n  Depends: linux-base\n  Depends: linux-image-6.12.1+deb12-amd64\n";
        assert_eq!(real_package(depends).as_deref(), Some("linux-image-6.12.1+deb12-amd64"));
        assert_eq!(real_package("linux-image-6.12-amd64\n"), None);
    }

    #[test]
    fn a_package_without_a_candidate_has_no_version() {
        assert_eq!(candidate_version("a:\n  Installed: (none)\n  Candidate: 6.12-1\n").as_deref(), Some("6.12-1"));
        assert_eq!(candidate_version("a:\n  Installed: (none)\n  Candidate: (none)\n"), None);
    }
}
