//! Builds the command and the suites, statically linked, and finds out from cargo where they are.
//!
//! Everything goes to a target folder of its own, so that neither these flags nor the usual ones cause the other
//! builds to start over.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::run;
use crate::suites::{Program, Suite};

/// Named, so that procedural macros, which are built for the host, are not linked statically too.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Emulation is slow: optimised, but with all checks of a debug build.
const PROFILE: [&str; 5] = [
    "profile.guest.inherits=\"dev\"",
    "profile.guest.opt-level=2",
    "profile.guest.debug=false",
    "profile.guest.strip=\"symbols\"",
    "profile.guest.package.\"*\".opt-level=1",
];

/// What was built.
#[derive(Debug)]
pub(crate) struct Built {
    /// The command.
    pub(crate) command: PathBuf,
    /// Each suite's program, by the suite's name.
    pub(crate) suites: BTreeMap<&'static str, PathBuf>,
    /// Programs in C, on the static library.
    pub(crate) c_programs: Vec<PathBuf>,
    /// What integration tests were compiled to take for their folder: an absolute path.
    pub(crate) tests_folder: PathBuf,
    /// What unit tests take for theirs: an absolute path.
    pub(crate) unit_tests_folder: PathBuf,
}

/// Builds the command and these suites.
pub(crate) fn build(workspace: &Path, target_dir: &Path, suites: &[&Suite]) -> Result<Built> {
    let cargo = || {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(workspace).env_remove("CARGO_ENCODED_RUSTFLAGS");
        command.env("RUSTFLAGS", "-C target-feature=+crt-static");
        command
    };
    let built = |command: &mut Command| {
        command.args(["--quiet", "--message-format=json-render-diagnostics", "--target", TARGET, "--profile", "guest"]);
        command.arg("--target-dir").arg(target_dir);
        for setting in PROFILE {
            command.args(["--config", setting]);
        }
        let text = run_cargo(command)?;
        Ok::<_, anyhow::Error>(artifacts(&text))
    };

    let commands = built(cargo().args(["build", "-p", "dmaload-cli", "--bin", "dmaload"]))?;
    let command = commands.iter().find(|artifact| artifact.is("dmaload-cli", "bin", "dmaload"));
    let command = command.context("cargo built no dmaload")?.executable.clone();

    let tests = built(cargo().args(["test", "--no-run"]).args(selection(suites)))?;
    let mut found = BTreeMap::new();
    for suite in suites {
        let artifact = tests.iter().find(|artifact| match suite.program {
            Program::Lib(package) => artifact.is(package, "lib", &package.replace('-', "_")),
            Program::Test(package, name) => artifact.is(package, "test", name),
        });
        let Some(artifact) = artifact else { bail!("cargo built nothing for the suite {}: {:?}", suite.name, suite.program) };
        found.insert(suite.name, artifact.executable.clone());
    }
    // Without the shared library, which can't be linked statically.
    built(cargo().args(["rustc", "-p", "dmaload-capi", "--crate-type", "staticlib"]))?;
    let folder = target_dir.join(TARGET);
    let c_programs = C_PROGRAMS.map(|(name, source)| compile_c(workspace, &folder.join("guest"), name, source));
    let c_programs = c_programs.into_iter().collect::<Result<Vec<_>>>()?;
    let (tests_folder, unit_tests_folder) = (folder.join("tmp"), workspace.join("target/tmp"));
    Ok(Built { command, suites: found, c_programs, tests_folder, unit_tests_folder })
}

/// Programs in C, and their sources.
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
    let shown = run::shown(command);
    // What the compiler says goes to the user as it comes.
    let output =
        command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().with_context(|| format!("can't run `{shown}`"))?;
    if !output.status.success() {
        bail!("`{shown}` ended with {}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The options by which cargo builds all these suites in one go. It may build more.
fn selection(suites: &[&Suite]) -> Vec<String> {
    let mut options: Vec<String> = Vec::new();
    let mut add = |option: &[&str]| {
        if !options.chunks(option.len()).any(|known| known == option) {
            options.extend(option.iter().map(|&word| word.to_owned()));
        }
    };
    for suite in suites {
        match suite.program {
            Program::Lib(package) | Program::Test(package, _) => add(&["-p", package]),
        }
    }
    for suite in suites {
        if let Program::Test(_, name) = suite.program {
            add(&["--test", name]);
        }
    }
    if suites.iter().any(|suite| matches!(suite.program, Program::Lib(_))) {
        options.push("--lib".to_owned());
    }
    options
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

/// The executables in cargo's messages.
fn artifacts(messages: &str) -> Vec<Artifact> {
    messages.lines().filter_map(|line| artifact(&serde_json::from_str(line).ok()?)).collect()
}

fn artifact(message: &Value) -> Option<Artifact> {
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    Some(Artifact {
        package: package_name(message["package_id"].as_str()?).to_owned(),
        kind: message["target"]["kind"][0].as_str()?.to_owned(),
        name: message["target"]["name"].as_str()?.to_owned(),
        executable: message["executable"].as_str()?.into(),
    })
}

/// A package's name in its id: `…/guest#dmaload-guest@0.1.0`, or `…/dmaload#0.1.0` when its folder has its name.
fn package_name(id: &str) -> &str {
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
        let found = artifacts(messages);
        assert_eq!(found.len(), 1);
        assert!(found[0].is("dmaload-guest", "test", "smoke"));
        assert_eq!(package_name("path+file:///w/crates/dmaload#0.1.0"), "dmaload");
    }
}
