//! Fetches the newest kernel of a release line, such as 6.12, from Debian's archive. The names of
//! Debian's packages contain the release:
//!
//! ```text
//! linux-image-6.12.117+deb12-cloud-amd64        one package, before Linux 6.19
//! linux-image-7.2.12+deb13-amd64                empty, and depends on
//!   linux-binary-7.2.12+deb13-amd64               vmlinuz
//!   linux-modules-7.2.12+deb13-amd64              the modules
//!   linux-base-7.2.12+deb13-amd64                 the configuration, the list of built-in modules
//! ```
//!
//! If the archive no longer has a release line, the next later line that it has is used instead.
//!
//! A fetched release is cached in a folder, such as
//! `target/guest/kernels/7.2-full/7.2.12+deb13-amd64/`. If a kernel cannot be fetched, its newest
//! cached release is used.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use dmaload_guest::Line;

use crate::archive::Archive;
use crate::kernels::{Flavor, Kernel};
use crate::progress;

/// A kernel's downloaded packages.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) line: Line,
    /// The folder that contains this release's packages, and no others.
    pub(crate) folder: PathBuf,
}

/// The name of the file that marks a complete download.
const COMPLETE: &str = "complete";

/// Fetches the newest release of a kernel's line into a folder below `kernels`. apt's package
/// lists are kept in `lists`.
pub(crate) fn fetch(kernel: &Kernel, kernels: &Path, lists: &Path) -> Result<Fetched> {
    let folder = kernels.join(kernel.id);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    match fetch_newest(kernel, &folder, lists) {
        Ok(fetched) => Ok(fetched),
        Err(error) => {
            let Some(fetched) = find_newest_cached(&folder)? else {
                return Err(error.context(format!("cannot fetch kernel {}, and none is cached", kernel.id)));
            };
            progress::print(&format!(
                "guest: {}: using the cached {}, because fetching failed: {error:#}",
                kernel.id,
                fetched.folder.display()
            ));
            Ok(fetched)
        }
    }
}

fn fetch_newest(kernel: &Kernel, folder: &Path, lists: &Path) -> Result<Fetched> {
    let mut releases = Vec::new();
    for suite in kernel.suites {
        let archive = Archive::open(lists, suite)?;
        let names = archive.list_names("linux-image-")?;
        let found = names.iter().filter_map(|package| Release::parse(package, kernel.flavor));
        releases.extend(found.map(|release| (release, archive.clone())));
        // Later suites are searched only for lines that the earlier suites lack.
        if releases.iter().any(|(release, _)| release.line() == kernel.line) {
            break;
        }
    }
    let chosen = choose(releases.iter().map(|(release, _)| release), kernel.line);
    let chosen =
        chosen.with_context(|| format!("cannot find kernel {} or a later line in {}", kernel.id, kernel.suites.join(", ")))?;
    let (release, archive) = releases.iter().find(|(release, _)| release == chosen).context("cannot find the chosen release")?;
    let (folder, complete) = (folder.join(&release.name), folder.join(&release.name).join(COMPLETE));
    if !complete.exists() {
        download(release, archive, &folder)?;
        fs::write(&complete, "")?;
        remove_others(&folder)?;
    }
    Ok(Fetched { line: release.line(), folder })
}

fn download(release: &Release, archive: &Archive, folder: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder)?;
    progress::print(&format!("guest: downloading Linux {} from {}", release.name, archive.suite()));
    let image = format!("linux-image-{}", release.name);
    let fetch = || {
        let depends = archive.list_dependencies(&image)?;
        // Because the names end with the release, they do not match the unrelated package
        // `linux-base`.
        let parts = ["linux-binary-", "linux-modules-", "linux-base-"].map(|part| format!("{part}{}", release.name));
        let is_split = depends.contains(&parts[0]);
        let packages = if is_split { parts.to_vec() } else { vec![image.clone()] };
        packages.iter().try_for_each(|package| archive.download(package, folder))
    };
    // Outdated lists may name packages that the archive no longer has. Renew the lists and try
    // again.
    fetch().or_else(|_| archive.renew().and_then(|()| fetch()))
}

/// Removes this kernel's other releases from the cache.
fn remove_others(folder: &Path) -> Result<()> {
    let parent = folder.parent().context("cannot find the folder that contains the releases")?;
    for entry in fs::read_dir(parent)? {
        let path = entry?.path();
        if path != folder && path.is_dir() {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Finds the newest release whose download is complete.
fn find_newest_cached(folder: &Path) -> Result<Option<Fetched>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(release) = Release::from_name(name).filter(|_| entry.path().join(COMPLETE).exists()) {
            found.push((release, entry.path()));
        }
    }
    let newest = found.into_iter().max_by(|(one, _), (other, _)| one.numbers.cmp(&other.numbers));
    Ok(newest.map(|(release, folder)| Fetched { line: release.line(), folder }))
}

/// A kernel release, as `uname -r` prints it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Release {
    name: String,
    /// All numbers in the name, except for the one in the architecture (`amd64`). Releases are
    /// ordered by these numbers.
    numbers: Vec<u32>,
}

impl Release {
    /// Parses the release from a package's name. Returns `None` unless the package is a signed
    /// kernel of this flavor.
    fn parse(package: &str, flavor: Flavor) -> Option<Self> {
        let name = package.strip_prefix("linux-image-")?;
        let version = name.strip_suffix("-amd64")?;
        let is_cloud = version.strip_suffix("-cloud");
        let version = match flavor {
            Flavor::Cloud => is_cloud?,
            Flavor::Full => Some(version).filter(|_| is_cloud.is_none())?,
        };
        // A word such as `rt` marks another flavor. A name without a version belongs to a
        // metapackage.
        let is_plain =
            version.split(['.', '+', '-']).all(|part| part.starts_with(|c: char| c.is_ascii_digit()) || part.starts_with("deb"));
        Self::from_name(name.to_owned()).filter(|_| is_plain)
    }

    fn from_name(name: String) -> Option<Self> {
        let version = name.strip_suffix("-amd64")?.trim_end_matches("-cloud");
        let numbers: Vec<u32> = version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect();
        (numbers.len() >= 2).then_some(Release { name, numbers })
    }

    fn line(&self) -> Line {
        (self.numbers[0], self.numbers[1])
    }
}

/// Chooses the newest release of `line`. If there is none, chooses the newest release of the next
/// later line that has one.
fn choose<'a>(releases: impl Iterator<Item = &'a Release> + Clone, line: Line) -> Option<&'a Release> {
    let first = releases.clone().map(Release::line).filter(|&found| found >= line).min()?;
    releases.filter(|release| release.line() == first).max_by(|one, other| one.numbers.cmp(&other.numbers))
}

/// Lists the packages in a release's folder.
pub(crate) fn list_packages(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        bail!("cannot find packages in {}: remove the folder to download them again", folder.display());
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGES: [&str; 12] = [
        "linux-image-6.1.0-56-cloud-amd64",
        "linux-image-6.12.117+deb12-amd64",
        "linux-image-6.18.9+deb13-cloud-amd64",
        "linux-image-6.18.15+deb13-cloud-amd64",
        "linux-image-6.18.15+deb13-cloud-amd64-unsigned",
        "linux-image-6.18.15+deb13-cloud-amd64-dbg",
        "linux-image-6.18.15+deb13-rt-amd64",
        "linux-image-6.18.16+deb13-amd64",
        "linux-image-7.2.12+deb13-cloud-amd64",
        "linux-image-7.2.12+deb13.1-cloud-amd64",
        "linux-image-cloud-amd64",
        "linux-image-6.12-cloud-amd64",
    ];

    fn newest(line: Line, flavor: Flavor) -> Option<String> {
        let releases: Vec<_> = PACKAGES.iter().filter_map(|package| Release::parse(package, flavor)).collect();
        choose(releases.iter(), line).map(|release| release.name.clone())
    }

    #[test]
    fn newest_release_of_a_line_is_found_by_its_numbers() {
        for (line, flavor, expected) in [
            ((6, 1), Flavor::Cloud, "6.1.0-56-cloud-amd64"),
            ((6, 12), Flavor::Full, "6.12.117+deb12-amd64"),
            ((6, 18), Flavor::Cloud, "6.18.15+deb13-cloud-amd64"),
            ((6, 18), Flavor::Full, "6.18.16+deb13-amd64"),
            ((7, 2), Flavor::Cloud, "7.2.12+deb13.1-cloud-amd64"),
        ] {
            assert_eq!(newest(line, flavor).as_deref(), Some(expected), "{line:?}");
        }
    }

    #[test]
    fn line_that_has_left_is_replaced_by_the_next() {
        assert_eq!(newest((6, 17), Flavor::Cloud).as_deref(), Some("6.18.15+deb13-cloud-amd64"));
        assert_eq!(newest((6, 19), Flavor::Cloud).as_deref(), Some("7.2.12+deb13.1-cloud-amd64"));
        assert_eq!(newest((7, 3), Flavor::Cloud), None);
    }
}
