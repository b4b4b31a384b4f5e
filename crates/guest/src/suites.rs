//! Lists the test suites, and defines which kernels each of them runs on.

use dmaload_guest::{Line, line_has_udmabuf_bug, line_makes_dma_bufs};

use crate::kernels::{Flavor, Kernel};

/// A test program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// The unit tests of a package's library.
    Lib(&'static str),
    /// An integration test, identified by its package's name and its own name.
    Test(&'static str, &'static str),
}

/// A function that returns whether a suite runs on a kernel. The [`Line`] is the release line that
/// is actually booted. It is later than [`Kernel::line`] if the archive no longer has that line.
type Condition = fn(&Kernel, Line) -> bool;

/// A test suite, and how to run it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Suite {
    /// The name that `--only` accepts. It contains no spaces.
    pub(crate) name: &'static str,
    pub(crate) program: Program,
    pub(crate) runs_on: Condition,
    /// Only tests whose names contain one of these strings run. If empty, all tests run.
    pub(crate) only: &'static [&'static str],
    /// Tests whose names contain one of these strings are skipped.
    pub(crate) skip: &'static [&'static str],
    /// The time limit in seconds. A suite that exceeds it is killed.
    pub(crate) seconds_max: u32,
    /// Whether this suite runs if `--only` is not given.
    pub(crate) by_default: bool,
}

impl Suite {
    const fn new(name: &'static str, program: Program, runs_on: Condition) -> Self {
        Self { name, program, runs_on, only: &[], skip: &[], seconds_max: 120, by_default: true }
    }
}

fn every_kernel(_: &Kernel, _: Line) -> bool {
    true
}

fn makes_dma_bufs(_: &Kernel, line: Line) -> bool {
    line_makes_dma_bufs(line)
}

fn lacks_dma_bufs(_: &Kernel, line: Line) -> bool {
    !line_makes_dma_bufs(line)
}

fn has_importers(kernel: &Kernel, line: Line) -> bool {
    kernel.flavor == Flavor::Full && line_makes_dma_bufs(line)
}

/// Returns whether the kernel has importers that see wrong bytes in a udmabuf backed by huge
/// pages.
fn has_udmabuf_bug(kernel: &Kernel, line: Line) -> bool {
    has_importers(kernel, line) && line_has_udmabuf_bug(line)
}

fn lacks_udmabuf_bug(kernel: &Kernel, line: Line) -> bool {
    has_importers(kernel, line) && !line_has_udmabuf_bug(line)
}

fn has_bad_disks(kernel: &Kernel, line: Line) -> bool {
    kernel.bad_disks && line_makes_dma_bufs(line)
}

/// Selects the oldest and newest default kernels, because their system calls differ most. Also
/// selects kernels that are later than the newest default kernel.
fn oldest_or_newest(_: &Kernel, line: Line) -> bool {
    !line_makes_dma_bufs(line) || line >= (7, 2)
}

/// Unit tests that do not depend on the kernel, and therefore run only on the host.
const PURE: &[&str] = &[
    "budget::",
    "engine::jobs",
    // A test in this module reads source files, which guests don't have.
    "error::",
    "glob::",
    "lent::",
    "model::",
    // Parsers of random texts.
    "never_panic",
    "once_value::",
    "options::",
    "plan::",
    "pool_replaces_its_oldest_in_constant_time",
    "ring::order",
    "ring::pace",
    "ring::sim",
    "ring::slots",
    "route::",
    "schedule::",
    "select::",
    "settings::",
    "share::protocol",
    "takes_linear_time",
    "telemetry::",
    "verify::",
    "window::",
];

/// Returns a suite for the integration test with this name in this package. The test also needs a
/// `[[test]]` entry in Cargo.toml.
const fn guest(name: &'static str, runs_on: Condition) -> Suite {
    Suite::new(name, Program::Test("dmaload-guest", name), runs_on)
}

/// Returns a suite that runs the test program `importers`, except for the modules in `skip`.
const fn importers(name: &'static str, runs_on: Condition, skip: &'static [&'static str]) -> Suite {
    Suite { skip, ..Suite::new(name, Program::Test("dmaload-guest", "importers"), runs_on) }
}

/// The suite that runs CPython, in a root file system with the Python package.
pub(crate) const PYTHON: &str = "python";
/// The suite that runs a Vulkan driver, in a root file system of its own.
pub(crate) const VULKAN: &str = "vulkan";

pub(crate) const SUITES: &[Suite] = &[
    guest("smoke", every_kernel),
    guest("selftests", makes_dma_bufs),
    Suite { seconds_max: 240, ..guest("dma_bufs", makes_dma_bufs) },
    Suite { seconds_max: 240, ..guest("faults", has_bad_disks) },
    Suite { seconds_max: 240, ..guest("capi", makes_dma_bufs) },
    importers("importers", has_importers, &["small::", "huge::"]),
    importers("importers_small", has_udmabuf_bug, &["every::", "huge::"]),
    importers("importers_huge", lacks_udmabuf_bug, &["every::", "small::"]),
    guest("offers", every_kernel),
    guest("older", lacks_dma_bufs),
    Suite { by_default: false, seconds_max: 240, ..guest(PYTHON, has_importers) },
    Suite { by_default: false, ..guest(VULKAN, has_importers) },
    guest("doctor", every_kernel),
    Suite::new("dmabuf", Program::Lib("dmabuf"), oldest_or_newest),
    Suite { skip: PURE, seconds_max: 240, ..Suite::new("dmaload", Program::Lib("dmaload"), oldest_or_newest) },
    Suite::new("load", Program::Test("dmaload", "load"), oldest_or_newest),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::kernels::KERNELS;

    #[test]
    fn suites_have_unique_names_and_a_kernel() {
        let names = SUITES.iter().map(|suite| suite.name).collect::<BTreeSet<_>>();
        assert_eq!(names.len(), SUITES.len());
        for suite in SUITES {
            assert!(!suite.name.contains(char::is_whitespace) && !suite.name.contains('/'), "{}", suite.name);
            let runs = KERNELS.iter().any(|kernel| kernel.by_default && (suite.runs_on)(kernel, kernel.line));
            assert!(runs, "{} runs on no default kernel", suite.name);
        }
    }

    #[test]
    fn suites_follow_the_line_that_is_booted() {
        let kernel = KERNELS.iter().find(|kernel| kernel.id == "6.12-full").unwrap();
        let names = |line| {
            let suites = SUITES.iter().filter(|suite| (suite.runs_on)(kernel, line));
            suites.map(|suite| suite.name).filter(|name| name.starts_with("importers_")).collect::<Vec<_>>()
        };
        assert_eq!((names((6, 12)), names((6, 18))), (vec!["importers_small"], vec!["importers_huge"]));
    }
}
