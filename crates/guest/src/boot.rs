//! What came of booting one kernel.

use crate::initramfs::Plan;
use crate::machine::Outcome;
use crate::transcript::SuiteRun;

/// A boot and what came of it.
#[derive(Debug)]
pub(crate) struct Boot<'a> {
    pub(crate) plan: Plan<'a>,
    /// None, if it could not be started.
    pub(crate) outcome: Option<Outcome>,
    /// Why this is no success.
    pub(crate) problems: Vec<String>,
}

impl Boot<'_> {
    pub(crate) fn suites(&self) -> &[SuiteRun] {
        self.outcome.as_ref().map_or(&[], |outcome| &outcome.transcript.suites)
    }
}
