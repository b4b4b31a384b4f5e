//! Parses the output that a guest prints on its second serial port. It consists of libtest's
//! output, between lines that init.sh prints:
//!
//! ```text
//! @@problem cannot mount the disk vulkan
//! @@ready
//! @@begin smoke
//! test io_uring_works ... ok
//! test result: ok. 1 passed; 0 failed; 0 ignored; …
//! @@end smoke status=0 seconds=1
//! @@rows           followed by the lines that dmaload_guest::record_row wrote
//! @@kernel         followed by warnings from the kernel
//! @@done
//! ```
//!
//! A guest may die at any point, so the output may be incomplete. [`Transcript::problems`] reports
//! what is missing.

/// The outcome of one test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Ok,
    Failed,
    Ignored,
}

impl Verdict {
    fn parse(text: &str) -> Option<Self> {
        match text.trim() {
            "ok" => Some(Self::Ok),
            "FAILED" => Some(Self::Failed),
            "ignored" => Some(Self::Ignored),
            // libtest appends the reason if the test gives one.
            text if text.starts_with("ignored, ") => Some(Self::Ignored),
            _ => None,
        }
    }

    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "FAILED",
            Self::Ignored => "ignored",
        }
    }
}

/// One suite's part of the transcript.
#[derive(Debug, Default)]
pub(crate) struct SuiteRun {
    pub(crate) name: String,
    pub(crate) tests: Vec<(String, Verdict)>,
    /// All lines between `@@begin` and `@@end`.
    pub(crate) output: Vec<String>,
    /// The console's output from the start of this suite to the start of the next one.
    pub(crate) console: String,
    /// The exit status and the duration in seconds, once the suite has finished.
    pub(crate) end: Option<(i32, u64)>,
    /// The test that has started but not finished.
    pending: Option<String>,
    /// The total number of passed, failed and ignored tests, according to libtest's summary.
    counted: Option<usize>,
}

/// An event that a caller can report while the guest is running.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Ready,
    Test { suite: String, name: String, verdict: Verdict },
    Ended { suite: String },
    Done,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Part {
    #[default]
    Boot,
    Suite,
    Between,
    Rows,
    Kernel,
    Done,
}

/// Everything that has been parsed so far.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    pub(crate) suites: Vec<SuiteRun>,
    pub(crate) rows: Vec<String>,
    /// Kernel messages that indicate a bug.
    pub(crate) warnings: Vec<String>,
    problems: Vec<String>,
    part: Part,
}

impl Transcript {
    /// Parses the next line, without its line feed.
    pub(crate) fn parse_line(&mut self, line: &str) -> Option<Event> {
        let line = line.trim_end_matches('\r');
        if let Some(mark) = line.strip_prefix("@@") {
            return self.parse_mark(mark);
        }
        match self.part {
            Part::Boot | Part::Between | Part::Done => None,
            Part::Rows => {
                if !line.is_empty() {
                    self.rows.push(line.to_owned());
                }
                None
            }
            Part::Kernel => {
                self.warnings.push(line.to_owned());
                None
            }
            Part::Suite => {
                let suite = self.suites.last_mut()?;
                suite.output.push(line.to_owned());
                let (name, verdict) = suite.parse_libtest(line)?;
                Some(Event::Test { suite: suite.name.clone(), name, verdict })
            }
        }
    }

    fn parse_mark(&mut self, mark: &str) -> Option<Event> {
        let (verb, rest) = mark.split_once(' ').unwrap_or((mark, ""));
        match verb {
            "ready" => {
                self.part = Part::Between;
                Some(Event::Ready)
            }
            "begin" => {
                self.part = Part::Suite;
                self.suites.push(SuiteRun { name: rest.to_owned(), ..SuiteRun::default() });
                None
            }
            "end" => {
                self.part = Part::Between;
                let mut words = rest.split(' ');
                let name = words.next()?.to_owned();
                let status = words.next()?.strip_prefix("status=")?.parse().ok()?;
                let seconds = words.next()?.strip_prefix("seconds=")?.parse().ok()?;
                self.suites.last_mut().filter(|suite| suite.name == name)?.end = Some((status, seconds));
                Some(Event::Ended { suite: name })
            }
            "rows" => {
                self.part = Part::Rows;
                None
            }
            "kernel" => {
                self.part = Part::Kernel;
                None
            }
            "done" => {
                self.part = Part::Done;
                Some(Event::Done)
            }
            "problem" => {
                self.problems.push(rest.to_owned());
                None
            }
            _ => {
                self.problems.push(format!("the guest printed an unknown line: @@{mark}"));
                None
            }
        }
    }

    /// Adds console output to the last suite that has started.
    pub(crate) fn add_console(&mut self, text: &str) {
        if let Some(suite) = self.suites.last_mut() {
            suite.console.push_str(text);
        }
    }

    /// Returns whether the guest has printed `@@done`, its last line.
    pub(crate) fn is_done(&self) -> bool {
        self.part == Part::Done
    }

    /// Returns the suite that has started but not finished.
    pub(crate) fn running(&self) -> Option<&SuiteRun> {
        self.suites.last().filter(|suite| suite.end.is_none())
    }

    /// Lists everything that makes this run a failure. `expected` contains the names of the suites
    /// that should have run. If `filtered` is set, a suite in which no test ran is not a problem.
    pub(crate) fn problems(&self, expected: &[&str], filtered: bool) -> Vec<String> {
        let mut problems = self.problems.clone();
        for name in expected {
            match self.suites.iter().find(|suite| suite.name == *name) {
                Some(suite) => problems.extend(suite.problems(filtered)),
                None => problems.push(format!("{name}: never began")),
            }
        }
        problems
    }
}

impl SuiteRun {
    /// Returns the number of tests that have started, not counting ignored tests.
    pub(crate) fn ran(&self) -> usize {
        let ended = self.tests.iter().filter(|(_, verdict)| *verdict != Verdict::Ignored).count();
        ended + usize::from(self.pending.is_some())
    }

    /// Returns the tests that failed, including a test that started but never finished.
    pub(crate) fn failed_tests(&self) -> Vec<&str> {
        let failed = self.tests.iter().filter(|(_, verdict)| *verdict == Verdict::Failed).map(|(name, _)| name);
        failed.chain(&self.pending).map(String::as_str).collect()
    }

    pub(crate) fn failed(&self, filtered: bool) -> bool {
        !self.problems(filtered).is_empty()
    }

    /// Parses a line of libtest's output. A test's own output may appear between its name and its
    /// verdict.
    fn parse_libtest(&mut self, line: &str) -> Option<(String, Verdict)> {
        if let Some(result) = line.strip_prefix("test result: ") {
            self.counted = parse_counts(result);
            self.pending = None;
            return None;
        }
        let (name, verdict) = match line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... ")) {
            Some((name, rest)) => match Verdict::parse(rest) {
                Some(verdict) => (name.to_owned(), verdict),
                None => {
                    self.pending = Some(name.to_owned());
                    return None;
                }
            },
            None => {
                let verdict = Verdict::parse(line)?;
                (self.pending.take()?, verdict)
            }
        };
        self.pending = None;
        let name = name.trim_end_matches(" - should panic").to_owned();
        self.tests.push((name.clone(), verdict));
        Some((name, verdict))
    }

    fn problems(&self, filtered: bool) -> Vec<String> {
        let name = &self.name;
        let mut problems = Vec::new();
        for (test, verdict) in &self.tests {
            if *verdict == Verdict::Failed {
                problems.push(format!("{name}: {test} failed"));
            }
        }
        let during = self.pending.as_ref().map(|test| format!(", during {test}")).unwrap_or_default();
        match self.end {
            None => problems.push(format!("{name}: the guest stopped{during}")),
            // 101 is libtest's status for failed tests, which are already listed.
            Some((101, _)) if !problems.is_empty() => {}
            Some((0, _)) => {}
            Some((137, seconds)) => {
                problems.push(format!(
                    "{name}: killed after {seconds} s, by its time limit or by the OOM killer (see the console){during}"
                ));
            }
            Some((status, _)) => problems.push(format!("{name}: exited with status {status}{during}")),
        }
        if self.end.is_some_and(|(status, _)| status == 0 || status == 101) && self.counted != Some(self.tests.len()) {
            let counted = self.counted.map_or("unknown".to_owned(), |counted| counted.to_string());
            problems
                .push(format!("{name}: tests in libtest's summary: {counted}, verdicts that were parsed: {}", self.tests.len()));
        }
        if self.ran() == 0 && !filtered {
            problems.push(format!("{name}: no test ran"));
        }
        problems
    }
}

/// Parses `ok. 5 passed; 0 failed; 1 ignored; 0 measured; …`, and returns the sum of the first
/// three numbers.
fn parse_counts(result: &str) -> Option<usize> {
    let (_, counts) = result.split_once(". ")?;
    let mut sum = 0;
    for part in counts.split("; ").take(3) {
        sum += part.split(' ').next()?.parse::<usize>().ok()?;
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (Transcript, Vec<Event>) {
        let mut transcript = Transcript::default();
        let events = text.lines().filter_map(|line| transcript.parse_line(line)).collect();
        (transcript, events)
    }

    const GOOD: &str = "noise\r
@@ready
@@begin smoke

running 3 tests
test a::one ... ok\r
test two - should panic ... ok
test three ... ignored, no such device

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.01s


@@end smoke status=0 seconds=2
@@rows
heaps | system
@@kernel
@@done
";

    #[test]
    fn complete_run_has_verdicts_rows_and_no_problems() {
        let (transcript, events) = parse(GOOD);
        assert_eq!(transcript.problems(&["smoke"], false), Vec::<String>::new());
        assert_eq!(transcript.rows, ["heaps | system"]);
        assert!(transcript.is_done());
        let tests = &transcript.suites[0].tests;
        let expected = [("a::one", Verdict::Ok), ("two", Verdict::Ok), ("three", Verdict::Ignored)];
        assert_eq!(*tests, expected.map(|(name, verdict)| (name.to_owned(), verdict)));
        assert_eq!((events.len(), transcript.suites[0].ran()), (6, 2));
    }

    #[test]
    fn suite_that_never_began_is_a_problem() {
        let (transcript, _) = parse(GOOD);
        assert_eq!(transcript.problems(&["smoke", "faults"], false), ["faults: never began"]);
    }

    #[test]
    fn output_of_a_test_does_not_hide_its_verdict() {
        let text = "@@begin s\ntest one ... hello\nworld\nok\ntest two ... test two has been running for over 60 seconds\nFAILED\n\
                    test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured\n@@end s status=101 seconds=1\n";
        let (transcript, _) = parse(text);
        assert_eq!(transcript.problems(&["s"], false), ["s: two failed"]);
        assert_eq!(transcript.suites[0].tests[0], ("one".to_owned(), Verdict::Ok));
    }

    #[test]
    fn lost_verdict_is_a_problem() {
        let text = "@@begin s\ntest one ... noiseok\ntest two ... ok\n\
                    test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\n@@end s status=0 seconds=1\n";
        let (transcript, _) = parse(text);
        assert_eq!(transcript.problems(&["s"], false), ["s: tests in libtest's summary: 2, verdicts that were parsed: 1"]);
    }

    #[test]
    fn killed_suite_names_the_running_test() {
        let text = "@@begin s\ntest one ... ok\ntest two ... \n@@end s status=137 seconds=60\n";
        let (transcript, _) = parse(text);
        assert_eq!(
            transcript.problems(&["s"], false),
            ["s: killed after 60 s, by its time limit or by the OOM killer (see the console), during two"]
        );
    }

    #[test]
    fn guest_that_dies_fails_the_running_suite_and_test() {
        let (transcript, _) = parse("@@begin s\ntest one ... ok\ntest two ... ");
        assert_eq!(transcript.problems(&["s"], false), ["s: the guest stopped, during two"]);
        assert_eq!(transcript.suites[0].failed_tests(), ["two"]);
        assert_eq!(transcript.running().map(|suite| suite.name.as_str()), Some("s"));
    }

    #[test]
    fn suite_without_tests_is_a_problem_unless_filtered() {
        let text = "@@begin s\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured\n@@end s status=0 seconds=0\n";
        let (transcript, _) = parse(text);
        assert_eq!(transcript.problems(&["s"], false), ["s: no test ran"]);
        assert_eq!(transcript.problems(&["s"], true), Vec::<String>::new());
    }

    #[test]
    fn other_statuses_and_problems_of_init_are_problems() {
        let text = "@@problem cannot mount the disk disk\n@@begin s\ntest one ... ok\n\
                    test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured\n@@end s status=134 seconds=0\n";
        let (transcript, _) = parse(text);
        assert_eq!(transcript.problems(&["s"], false), ["cannot mount the disk disk", "s: exited with status 134"]);
    }
}
