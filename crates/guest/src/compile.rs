//! Builds statically linked executables: the command, the suites and the C programs. The paths of
//! the executables are taken from cargo's messages.
//!
//! Uses a separate target folder. If builds with different flags shared a folder, each of them
//! would rebuild the workspace.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::run;
use crate::suites::{Program, Suite};

/// The target to build for. If a target is named explicitly, cargo does not apply `RUSTFLAGS` to
/// procedural macros, which cannot be linked statically.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Settings of the cargo profile for everything that runs in guests. The code is optimized,
/// because emulation is slow, but keeps all debug checks. A higher optimization level would add
/// more time to the build than it saves in the guests.
const PROFILE: [&str; 6] = [
    "profile.guest.inherits=\"dev\"",
    "profile.guest.opt-level=1",
    "profile.guest.incremental=false",
    "profile.guest.debug=false",
    "profile.guest.strip=\"symbols\"",
    "profile.guest.package.\"*\".opt-level=1",
];

/// Options that select the packages that contain the command and the suites.
const PACKAGES: [&str; 8] = ["-p", "dmabuf", "-p", "dmaload", "-p", "dmaload-cli", "-p", "dmaload-guest"];

#[derive(Debug)]
pub(crate) struct Built {
    /// The path of the program `dmaload`.
    pub(crate) command: PathBuf,
    /// The path of each suite's program, keyed by the suite's name.
    pub(crate) suites: BTreeMap<&'static str, PathBuf>,
    /// The paths of the C programs, which are linked with the static `libdmaload_capi.a`.
    pub(crate) c_programs: Vec<PathBuf>,
    /// The `CARGO_TARGET_TMPDIR` that was compiled into the integration tests.
    pub(crate) tests_folder: PathBuf,
    /// The folder in which unit tests create files. Its absolute path was compiled into them.
    pub(crate) unit_tests_folder: PathBuf,
}

/// Builds the command, the given suites and the C programs.
pub(crate) fn build(workspace: &Path, target_dir: &Path, suites: &[&Suite]) -> Result<Built> {
    let cargo = || {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(workspace).env_remove("CARGO_ENCODED_RUSTFLAGS");
        command.env("RUSTFLAGS", "-C target-feature=+crt-static");
        command
    };
    let build = |command: &mut Command| {
        command.args(["--quiet", "--message-format=json-render-diagnostics", "--target", TARGET, "--profile", "guest"]);
        command.arg("--target-dir").arg(target_dir);
        for setting in PROFILE {
            command.args(["--config", setting]);
        }
        let text = run_cargo(command)?;
        Ok::<_, anyhow::Error>(parse_artifacts(&text))
    };

    // This build selects the same packages as the build of the unit tests below. Dependencies
    // therefore have the same features in both builds, and are compiled only once.
    let programs = build(cargo().arg("build").args(PACKAGES).args(["--bin", "dmaload"]).args(select_tests(suites)))?;
    let command = programs.iter().find(|artifact| artifact.is("dmaload-cli", "bin", "dmaload"));
    let command = command.context("cannot find dmaload among the executables that cargo built")?.executable.clone();

    let unit_tests = if suites.iter().any(|suite| matches!(suite.program, Program::Lib(_))) {
        build(cargo().args(["test", "--no-run", "--lib"]).args(PACKAGES))?
    } else {
        Vec::new()
    };
    let mut found = BTreeMap::new();
    for suite in suites {
        let artifact = match suite.program {
            Program::Lib(package) => unit_tests.iter().find(|artifact| artifact.is(package, "lib", &package.replace('-', "_"))),
            Program::Test(package, name) => programs.iter().find(|artifact| artifact.is(package, "test", name)),
        };
        let Some(artifact) = artifact else {
            bail!("cannot find the suite {} among the executables that cargo built: {:?}", suite.name, suite.program)
        };
        found.insert(suite.name, artifact.executable.clone());
    }
    // Build only the static library, because a shared library cannot be linked with these flags.
    build(cargo().args(["rustc", "-p", "dmaload-capi", "--crate-type", "staticlib"]))?;
    let folder = target_dir.join(TARGET);
    let c_programs = C_PROGRAMS.map(|(name, source)| compile_c(workspace, &folder.join("guest"), name, source));
    let c_programs = c_programs.into_iter().collect::<Result<Vec<_>>>()?;
    let (tests_folder, unit_tests_folder) = (folder.join("tmp"), workspace.join("target/tmp"));
    Ok(Built { command, suites: found, c_programs, tests_folder, unit_tests_folder })
}

/// The name of each C program, and its source file.
const C_PROGRAMS: [(&str, &str); 2] =
    [("dmabuf-heap-file-read", "examples/c/dmabuf-heap-file-read.c"), ("capi-suite", "crates/dmaload-capi/tests/c/suite.c")];

fn compile_c(workspace: &Path, folder: &Path, name: &str, source: &str) -> Result<PathBuf> {
    let program = folder.join(name);
    let mut cc = Command::new("cc");
    cc.current_dir(workspace).args(["-std=gnu99", "-O2", "-static", "-pthread", "-Icrates/dmaload-capi/include", source]);
    cc.arg(folder.join("libdmaload_capi.a")).args(["-lm", "-o"]).arg(&program);
    run::output(&mut cc)?;
    Ok(program)
}

fn run_cargo(command: &mut Command) -> Result<String> {
    let shown = run::describe(command);
    // The user sees the compiler's messages directly, because cargo inherits stderr.
    let output =
        command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().with_context(|| format!("cannot run `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` failed with {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns cargo options that select the integration tests among these suites.
fn select_tests(suites: &[&Suite]) -> Vec<&'static str> {
    let names = suites.iter().filter_map(|suite| match suite.program {
        Program::Test(_, name) => Some(name),
        Program::Lib(_) => None,
    });
    names.collect::<BTreeSet<_>>().into_iter().flat_map(|name| ["--test", name]).collect()
}

/// An executable that cargo built.
#[derive(Debug, PartialEq, Eq)]
struct Artifact {
    package: String,
    kind: String,
    name: String,
    executable: PathBuf,
}

impl Artifact {
    fn is(&self, package: &str, kind: &str, name: &str) -> bool {
        self.package == package && self.kind == kind && self.name == name
    }
}

/// Extracts the executables from cargo's JSON messages.
fn parse_artifacts(messages: &str) -> Vec<Artifact> {
    messages.lines().filter_map(|line| parse_artifact(&serde_json::from_str(line).ok()?)).collect()
}

fn parse_artifact(message: &Value) -> Option<Artifact> {
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    Some(Artifact {
        package: parse_package_name(message["package_id"].as_str()?).to_owned(),
        kind: message["target"]["kind"][0].as_str()?.to_owned(),
        name: message["target"]["name"].as_str()?.to_owned(),
        executable: message["executable"].as_str()?.into(),
    })
}

/// Extracts a package's name from its id, for example `…/guest#dmaload-guest@0.1.0`. The id has
/// the form `…/dmaload#0.1.0` if the package has the same name as its folder.
fn parse_package_name(id: &str) -> &str {
    let (path, fragment) = id.rsplit_once('#').unwrap_or((id, ""));
    match fragment.split_once('@') {
        Some((name, _)) => name,
        None => path.rsplit('/').next().unwrap_or(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_in_cargos_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","package_id":"path+file:///w/crates/dmaload#0.1.0","#,
            r#""target":{"kind":["lib"],"name":"dmaload"},"executable":null}"#,
            "\nnot json\n",
            r#"{"reason":"compiler-artifact","package_id":"path+file:///w/crates/guest#dmaload-guest@0.1.0","#,
            r#""target":{"kind":["test"],"name":"smoke"},"executable":"/t/smoke-1"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        let found = parse_artifacts(messages);
        assert_eq!(found.len(), 1);
        assert!(found[0].is("dmaload-guest", "test", "smoke"));
        assert_eq!(parse_package_name("path+file:///w/crates/dmaload#0.1.0"), "dmaload");
    }
}
