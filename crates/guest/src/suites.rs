//! Which suite runs on which kernel.

/// A program with tests in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// The unit tests of a package's library.
    Lib(&'static str),
    /// A package's integration test of that name.
    Test(&'static str, &'static str),
}

/// One line of the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Suite {
    /// What users call it; no spaces.
    pub(crate) name: &'static str,
    pub(crate) program: Program,
    pub(crate) kernels: &'static [&'static str],
    /// Runs only tests whose name contains one of these; all when empty.
    pub(crate) only: &'static [&'static str],
    /// Never runs tests whose name contains one of these.
    pub(crate) skip: &'static [&'static str],
    /// A suite that runs longer is killed.
    pub(crate) seconds_max: u32,
}

impl Suite {
    const fn new(name: &'static str, program: Program, kernels: &'static [&'static str]) -> Self {
        Self { name, program, kernels, only: &[], skip: &[], seconds_max: 120 }
    }
}

const ALL: &[&str] = &["6.12-cloud", "6.12-full", "6.1-cloud"];
const NEWER: &[&str] = &["6.12-cloud", "6.12-full"];
const CLOUD: &[&str] = &["6.12-cloud"];
const OLDER: &[&str] = &["6.1-cloud"];
const UNITS: &[&str] = &["6.12-cloud", "6.1-cloud"];

/// Unit tests of pure logic make no system calls, so they say nothing about a kernel. They run on the
/// host.
const PURE: &[&str] = &[
    "budget::",
    "engine::jobs",
    // Of texts; one reads the sources.
    "error::",
    "glob::",
    "lent::",
    "model::",
    "options::",
    "plan::",
    "ring::order",
    "ring::sim",
    "ring::slots",
    "route::",
    "schedule::",
    "select::",
    "settings::",
    "verify::",
    "window::",
];

/// A suite of this package, which needs a `[[test]]` in Cargo.toml too.
const fn guest(name: &'static str, kernels: &'static [&'static str]) -> Suite {
    Suite::new(name, Program::Test("dmaload-guest", name), kernels)
}

pub(crate) const SUITES: &[Suite] = &[
    guest("smoke", ALL),
    guest("selftests", NEWER),
    Suite { seconds_max: 240, ..guest("dma_bufs", CLOUD) },
    Suite { seconds_max: 240, ..guest("faults", CLOUD) },
    Suite { seconds_max: 240, ..guest("capi", CLOUD) },
    guest("importers", &["6.12-full"]),
    guest("older", OLDER),
    guest("doctor", ALL),
    Suite::new("dmabuf", Program::Lib("dmabuf"), UNITS),
    Suite { skip: PURE, seconds_max: 240, ..Suite::new("dmaload", Program::Lib("dmaload"), UNITS) },
    Suite::new("load", Program::Test("dmaload", "load"), UNITS),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::kernels::KERNELS;

    #[test]
    fn names_are_unique_words_and_kernels_are_known() {
        let names = SUITES.iter().map(|suite| suite.name).collect::<BTreeSet<_>>();
        assert_eq!(names.len(), SUITES.len());
        for suite in SUITES {
            assert!(!suite.name.contains(char::is_whitespace) && !suite.name.contains('/'), "{}", suite.name);
            for kernel in suite.kernels {
                assert!(KERNELS.iter().any(|known| known.id == *kernel), "{}: {kernel}", suite.name);
            }
        }
    }
}
