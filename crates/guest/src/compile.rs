//! Builds the command, the suites and C programs, statically linked. The executables are those
//! that cargo's messages name.
//!
//! Uses a separate target folder, because alternating flags would rebuild the workspace each time.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::run;
use crate::suites::{Program, Suite};

/// The target to build for. Because it is named explicitly, `RUSTFLAGS` do not apply to procedural
/// macros, which cannot be linked statically.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The profile of everything that runs in guests: optimized, because emulation is slow, but with
/// all debug checks. More optimization would add more time to the build than it saves in the
/// guests.
const PROFILE: [&str; 6] = [
    "profile.guest.inherits=\"dev\"",
    "profile.guest.opt-level=1",
    "profile.guest.incremental=false",
    "profile.guest.debug=false",
    "profile.guest.strip=\"symbols\"",
    "profile.guest.package.\"*\".opt-level=1",
];

/// Options that select the packages of the command and of all suites.
const PACKAGES: [&str; 8] = ["-p", "dmabuf", "-p", "dmaload", "-p", "dmaload-cli", "-p", "dmaload-guest"];

#[derive(Debug)]
pub(crate) struct Built {
    /// The program `dmaload`.
    pub(crate) command: PathBuf,
    /// Each suite's program, by the suite's name.
    pub(crate) suites: BTreeMap<&'static str, PathBuf>,
    /// C programs, linked with the static library.
    pub(crate) c_programs: Vec<PathBuf>,
    /// The `CARGO_TARGET_TMPDIR` that was compiled into the integration tests.
    pub(crate) tests_folder: PathBuf,
    /// The folder in which unit tests make files. Its absolute path was compiled into them.
    pub(crate) unit_tests_folder: PathBuf,
}

/// Builds the command, these suites and the C programs.
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

    // This build and that of the unit tests name the same packages, so that the dependencies have
    // the same features and are compiled once.
    let programs = build(cargo().arg("build").args(PACKAGES).args(["--bin", "dmaload"]).args(select_tests(suites)))?;
    let command = programs.iter().find(|artifact| artifact.is("dmaload-cli", "bin", "dmaload"));
    let command = command.context("cannot find dmaload among what cargo built")?.executable.clone();

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
            bail!("cannot find the suite {} among what cargo built: {:?}", suite.name, suite.program)
        };
        found.insert(suite.name, artifact.executable.clone());
    }
    // Builds only the static library, because a shared one cannot be linked with these flags.
    build(cargo().args(["rustc", "-p", "dmaload-capi", "--crate-type", "staticlib"]))?;
    let folder = target_dir.join(TARGET);
    let c_programs = C_PROGRAMS.map(|(name, source)| compile_c(workspace, &folder.join("guest"), name, source));
    let c_programs = c_programs.into_iter().collect::<Result<Vec<_>>>()?;
    let (tests_folder, unit_tests_folder) = (folder.join("tmp"), workspace.join("target/tmp"));
    Ok(Built { command, suites: found, c_programs, tests_folder, unit_tests_folder })
}

/// The names of the C programs, and their sources.
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
    // The compiler's messages go straight to the user.
    let output =
        command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().with_context(|| format!("cannot run `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` ended with {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns cargo's options that select the integration tests among these suites.
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

/// Finds the executables in cargo's messages.
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

/// Parses the package's name in its id: `…/guest#dmaload-guest@0.1.0`, or `…/dmaload#0.1.0` if the
/// package's folder has the same name.
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
