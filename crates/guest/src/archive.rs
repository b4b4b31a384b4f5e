//! Downloads packages from Debian's archive. Each [`Archive`] represents one of its suites, such
//! as `trixie`.
//!
//! Each suite has its own folder for apt's lists. Packages therefore never come from another
//! suite, regardless of which suites this machine is configured to install from.
//!
//! ```text
//! target/guest/apt/trixie-backports/{sources.list,status,lists,cache,renewed}
//! ```
//!
//! Requires apt, and takes the address of a Debian mirror from apt's configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::progress;
use crate::run;

/// Package lists older than this are fetched again. Debian updates its archive every 6 hours.
const LISTS_AGE_MAX: Duration = Duration::from_secs(6 * 3600);
/// The keyring with which apt verifies every suite, including suites newer than this machine's
/// release.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const SECURITY: &str = "-security";

#[derive(Debug, Clone)]
pub(crate) struct Archive {
    suite: String,
    folder: PathBuf,
}

impl Archive {
    /// Opens a suite. Its files are kept in a subfolder of `folder` with the suite's name. Fetches
    /// its package lists if they are missing or old.
    ///
    /// If there are old lists and new ones cannot be fetched, prints a warning and uses the old
    /// ones.
    pub(crate) fn open(folder: &Path, suite: &str) -> Result<Self> {
        let archive = Archive { suite: suite.to_owned(), folder: folder.join(suite) };
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(archive.folder.join(part))
                .with_context(|| format!("cannot create {}", archive.folder.display()))?;
        }
        let fresh = archive
            .stamp()
            .metadata()
            .and_then(|stamp| stamp.modified())
            .is_ok_and(|renewed| renewed.elapsed().is_ok_and(|age| age < LISTS_AGE_MAX));
        if !fresh && let Err(error) = archive.renew() {
            if !archive.stamp().exists() {
                return Err(error);
            }
            progress::print(&format!("guest: {suite}: using old package lists, because new ones cannot be fetched: {error:#}"));
        }
        Ok(archive)
    }

    pub(crate) fn suite(&self) -> &str {
        &self.suite
    }

    pub(crate) fn renew(&self) -> Result<()> {
        let mirror = configured_mirror(&self.suite)?;
        // Guests are always amd64, regardless of this machine's architecture.
        let source = format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {} main\n", self.suite);
        fs::write(self.folder.join("sources.list"), source)?;
        fs::write(self.folder.join("status"), "")?;
        // By default, apt only warns about a failed download.
        run::output(self.apt("apt-get").args(["-q", "update", "-o", "APT::Update::Error-Mode=any"]))
            .with_context(|| format!("cannot fetch the package lists of {}", self.suite))?;
        fs::write(self.stamp(), "").map_err(Into::into)
    }

    /// Returns the path of a file whose modification time is that of the last successful
    /// [`renew`](Self::renew).
    fn stamp(&self) -> PathBuf {
        self.folder.join("renewed")
    }

    /// Lists the packages whose names begin with `prefix`.
    pub(crate) fn list_names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = run::output(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Lists the packages that a package depends on.
    pub(crate) fn list_dependencies(&self, package: &str) -> Result<Vec<String>> {
        let depends = run::output(self.apt("apt-cache").args(["depends", "--important", package]))?;
        let names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(names.map(str::to_owned).collect())
    }

    /// Downloads a package into `folder`.
    pub(crate) fn download(&self, package: &str, folder: &Path) -> Result<()> {
        let mut command = self.apt("apt-get");
        command.args(["-q", "download", package]).current_dir(folder);
        run::output(&mut command).with_context(|| format!("cannot download {package} from {}", self.suite)).map(drop)
    }

    /// Downloads packages and their dependencies, and returns the paths of the package files.
    pub(crate) fn download_all(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        // The cache may contain other versions of these packages, or packages that are no longer
        // needed.
        run::output(self.apt("apt-get").args(["-q", "clean"]))
            .with_context(|| format!("cannot remove earlier downloads from {}", self.suite))?;
        let mut command = self.apt("apt-get");
        command.args(["-q", "-y", "--download-only", "--no-install-recommends", "install"]).args(packages);
        run::output(&mut command).with_context(|| format!("cannot download {packages:?} from {}", self.suite))?;
        let mut files = Vec::new();
        for entry in fs::read_dir(self.folder.join("cache/archives"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                files.push(path);
            }
        }
        Ok(files)
    }

    /// Returns a command that runs one of apt's programs. The program sees only this suite.
    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C");
        let folder = self.folder.display();
        for setting in [
            // The first two settings keep apt from reading this machine's configuration, which may
            // name other indices to fetch.
            format!("Dir::Etc::parts={folder}"),
            format!("Dir::Etc::main={folder}/none"),
            format!("Dir::Etc::sourcelist={folder}/sources.list"),
            format!("Dir::Etc::sourceparts={folder}/none"),
            format!("Dir::Etc::preferencesparts={folder}/none"),
            format!("Dir::State::status={folder}/status"),
            format!("Dir::State::lists={folder}/lists"),
            format!("Dir::Cache={folder}/cache"),
            "APT::Architecture=amd64".to_owned(),
            "APT::Sandbox::User=".to_owned(),
            "Acquire::Languages=none".to_owned(),
        ] {
            command.args(["-o", &setting]);
        }
        command
    }
}

/// Finds the mirror that apt is configured to use for suites of this kind, which are either
/// security suites or all others.
fn configured_mirror(suite: &str) -> Result<String> {
    let format = "$(REPO_URI) $(RELEASE)";
    let targets = run::output(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))?;
    find_mirror(&targets, suite).with_context(|| {
        format!("cannot find a mirror for {suite} in apt's configuration; add Debian's sources (`deb …`) to /etc/apt")
    })
}

/// Finds a mirror in lines of the form `URI SUITE`. Security suites have separate mirrors.
fn find_mirror(targets: &str, suite: &str) -> Option<String> {
    let debian = ["bookworm", "trixie", "forky", "sid", "stable", "oldstable", "testing", "unstable"];
    let mut known = targets.lines().filter_map(|line| line.split_once(' '));
    let is_same_kind = |release: &str| {
        let base = release.split('-').next().unwrap_or(release);
        debian.contains(&base) && release.ends_with(SECURITY) == suite.ends_with(SECURITY)
    };
    known.find(|(_, release)| is_same_kind(release)).map(|(uri, _)| uri.to_owned())
}

/// Unpacks a package into `folder`, except for its `/usr/share`. Keeps other files that are
/// already in the folder.
pub(crate) fn unpack(package: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let mut reader = Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package).stdout(Stdio::piped()).spawn()?;
    let Some(archive) = reader.stdout.take() else { bail!("cannot read the output of dpkg-deb") };
    let mut tar = Command::new("tar");
    tar.args(["-x", "--exclude=./usr/share", "-C"]).arg(folder).stdin(archive);
    let (unpacked, read) = (tar.status(), reader.wait());
    if !unpacked.context("cannot run tar")?.success() || !read?.success() {
        bail!("cannot unpack {}: remove its folder to download it again", package.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: &str = "http://other/nodistro/ nodistro\nhttp://mirror/debian/ bookworm\n\
                           http://mirror/debian/ bookworm-updates\nhttp://mirror/security/ bookworm-security\n";

    #[test]
    fn suite_comes_from_the_mirror_of_its_kind() {
        assert_eq!(find_mirror(TARGETS, "trixie-backports").as_deref(), Some("http://mirror/debian/"));
        assert_eq!(find_mirror(TARGETS, "bookworm-security").as_deref(), Some("http://mirror/security/"));
        assert_eq!(find_mirror("http://other/ubuntu/ noble\n", "trixie"), None);
    }
}
