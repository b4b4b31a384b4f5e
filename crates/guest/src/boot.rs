//! The outcome of booting one kernel.

use crate::initramfs::Plan;
use crate::machine::Outcome;
use crate::transcript::SuiteRun;

#[derive(Debug)]
pub(crate) struct Boot<'a> {
    pub(crate) plan: Plan<'a>,
    /// `None` if the harness could not start the guest or read its output.
    pub(crate) outcome: Option<Outcome>,
    /// Why the boot or its suites failed; empty on success.
    pub(crate) problems: Vec<String>,
}

impl Boot<'_> {
    pub(crate) fn suites(&self) -> &[SuiteRun] {
        self.outcome.as_ref().map_or(&[], |outcome| &outcome.transcript.suites)
    }

    /// Returns commands that rerun the failed tests. If a suite failed although none of its tests
    /// did, its command reruns the whole suite.
    pub(crate) fn replays(&self) -> Vec<String> {
        let mut commands = Vec::new();
        for suite in self.suites().iter().filter(|suite| suite.failed(self.plan.filter.is_some())) {
            // This is the id of the requested kernel. If another line was booted instead,
            // `KERNELS` may not contain that line's id, and `--kernel` would not accept it.
            let command = format!("just guest-test --kernel {} --only {}", self.plan.kernel.id, suite.name);
            let tests = suite.failed_tests();
            commands.extend(tests.iter().map(|test| format!("{command} --filter {test}")));
            if tests.is_empty() {
                commands.push(command);
            }
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::KERNELS;
    use crate::transcript::Transcript;

    #[test]
    fn replay_names_kernel_suite_and_test() {
        let mut transcript = Transcript::default();
        let lines = "@@begin a\ntest one ... FAILED\ntest two ... ok\n\
                     test result: FAILED. 1 passed; 1 failed; 0 ignored\n@@end a status=101 seconds=1\n\
                     @@begin b\n@@end b status=134 seconds=1\n";
        lines.lines().for_each(|line| drop(transcript.parse_line(line)));
        let plan = Plan { kernel: &KERNELS[0], id: "6.18-full".to_owned(), modules: &[], config: "", suites: &[], filter: None };
        let outcome = Outcome { transcript, trouble: None, console: String::new(), seconds: 1.0 };
        let boot = Boot { plan, outcome: Some(outcome), problems: Vec::new() };
        let command = format!("just guest-test --kernel {}", KERNELS[0].id);
        assert_eq!(boot.replays(), [format!("{command} --only a --filter one"), format!("{command} --only b")]);
    }
}
