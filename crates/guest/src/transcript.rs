//! Reads what a guest prints on its second serial port: the protocol of init.sh around libtest's output.
//!
//! ```text
//! @@ready
//! @@begin smoke
//! test devices_are_there ... ok
//! test result: ok. 1 passed; 0 failed; 0 ignored; …
//! @@end smoke status=0 seconds=1
//! @@rows           lines of dmaload_guest::row
//! @@kernel         what the kernel complained of
//! @@done
//! ```
//!
//! A transcript that stops anywhere tells what is missing: see [`Transcript::problems`].

/// What came of one test.
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
            // A reason follows.
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
    /// All lines, for the user of a failing suite.
    pub(crate) output: Vec<String>,
    /// What came from the console meanwhile.
    pub(crate) console: String,
    /// Exit status and seconds, once it has ended.
    pub(crate) end: Option<(i32, u64)>,
    /// A test that has begun.
    pending: Option<String>,
    /// Passed, failed and ignored, as libtest itself counts.
    counted: Option<usize>,
}

/// What a line meant for somebody who watches.
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

/// All that was read so far.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    pub(crate) suites: Vec<SuiteRun>,
    pub(crate) rows: Vec<String>,
    /// Kernel messages that mean a bug somewhere.
    pub(crate) complaints: Vec<String>,
    problems: Vec<String>,
    part: Part,
}

impl Transcript {
    /// Takes the next line, without its line feed.
    pub(crate) fn line(&mut self, line: &str) -> Option<Event> {
        let line = line.trim_end_matches('\r');
        if let Some(mark) = line.strip_prefix("@@") {
            return self.mark(mark);
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
                self.complaints.push(line.to_owned());
                None
            }
            Part::Suite => {
                let suite = self.suites.last_mut()?;
                suite.output.push(line.to_owned());
                let (name, verdict) = suite.libtest(line)?;
                Some(Event::Test { suite: suite.name.clone(), name, verdict })
            }
        }
    }

    fn mark(&mut self, mark: &str) -> Option<Event> {
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
                self.problems.push(format!("the guest printed a line that isn't understood: @@{mark}"));
                None
            }
        }
    }

    /// Takes what came from the console: for the suite that runs, or has just ended.
    pub(crate) fn console(&mut self, text: &str) {
        if let Some(suite) = self.suites.last_mut() {
            suite.console.push_str(text);
        }
    }

    /// Whether the guest has come to its end.
    pub(crate) fn is_done(&self) -> bool {
        self.part == Part::Done
    }

    /// The suite that has begun and not ended.
    pub(crate) fn running(&self) -> Option<&SuiteRun> {
        self.suites.last().filter(|suite| suite.end.is_none())
    }

    /// All that makes this run a failure, given the suites that should have run. With a filter, a suite may have no
    /// test that fits.
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
    /// How many tests began, ignored ones left aside.
    pub(crate) fn ran(&self) -> usize {
        let told = self.tests.iter().filter(|(_, verdict)| *verdict != Verdict::Ignored).count();
        told + usize::from(self.pending.is_some())
    }

    /// How many tests failed. One that never came to a verdict did.
    pub(crate) fn failures(&self) -> usize {
        let told = self.tests.iter().filter(|(_, verdict)| *verdict == Verdict::Failed).count();
        told + usize::from(self.pending.is_some())
    }

    /// Whether its output is worth the user's attention.
    pub(crate) fn failed(&self, filtered: bool) -> bool {
        !self.problems(filtered).is_empty()
    }

    /// Reads a line of libtest's. What a test prints by itself may come between its name and its verdict.
    fn libtest(&mut self, line: &str) -> Option<(String, Verdict)> {
        if let Some(result) = line.strip_prefix("test result: ") {
            self.counted = count(result);
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
            None => problems.push(format!("{name}: the guest stopped in it{during}")),
            // Failed tests, which were told.
            Some((101, _)) if !problems.is_empty() => {}
            Some((0, _)) => {}
            Some((137, seconds)) => {
                problems.push(format!(
                    "{name}: killed after {seconds} s, by its time limit or for want of memory (see the console){during}"
                ));
            }
            Some((status, _)) => problems.push(format!("{name}: ended with status {status}{during}")),
        }
        if self.end.is_some_and(|(status, _)| status == 0 || status == 101) && self.counted != Some(self.tests.len()) {
            let counted = self.counted.map_or("nothing".to_owned(), |counted| format!("{counted} tests"));
            problems.push(format!("{name}: libtest counts {counted}, but {} were seen", self.tests.len()));
        }
        if self.ran() == 0 && !filtered {
            problems.push(format!("{name}: no test ran"));
        }
        problems
    }
}

/// How many tests there were, in `ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; …`.
fn count(result: &str) -> Option<usize> {
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

    fn read(text: &str) -> (Transcript, Vec<Event>) {
        let mut transcript = Transcript::default();
        let events = text.lines().filter_map(|line| transcript.line(line)).collect();
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
    fn a_good_run_has_verdicts_and_rows_and_no_problems() {
        let (transcript, events) = read(GOOD);
        assert_eq!(transcript.problems(&["smoke"], false), Vec::<String>::new());
        assert_eq!(transcript.rows, ["heaps | system"]);
        assert!(transcript.is_done());
        let tests = &transcript.suites[0].tests;
        let expected = [("a::one", Verdict::Ok), ("two", Verdict::Ok), ("three", Verdict::Ignored)];
        assert_eq!(*tests, expected.map(|(name, verdict)| (name.to_owned(), verdict)));
        assert_eq!((events.len(), transcript.suites[0].ran()), (6, 2));
    }

    #[test]
    fn a_suite_that_never_began_is_a_problem() {
        let (transcript, _) = read(GOOD);
        assert_eq!(transcript.problems(&["smoke", "faults"], false), ["faults: never began"]);
    }

    #[test]
    fn what_a_test_prints_does_not_hide_its_verdict() {
        let text = "@@begin s\ntest one ... hello\nworld\nok\ntest two ... test two has been running for over 60 seconds\nFAILED\n\
                    test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured\n@@end s status=101 seconds=1\n";
        let (transcript, _) = read(text);
        assert_eq!(transcript.problems(&["s"], false), ["s: two failed"]);
        assert_eq!(transcript.suites[0].tests[0], ("one".to_owned(), Verdict::Ok));
    }

    #[test]
    fn a_verdict_that_was_lost_is_a_problem() {
        let text = "@@begin s\ntest one ... noiseok\ntest two ... ok\n\
                    test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\n@@end s status=0 seconds=1\n";
        let (transcript, _) = read(text);
        assert_eq!(transcript.problems(&["s"], false), ["s: libtest counts 2 tests, but 1 were seen"]);
    }

    #[test]
    fn a_suite_that_is_killed_names_the_test() {
        let text = "@@begin s\ntest one ... ok\ntest two ... \n@@end s status=137 seconds=60\n";
        let (transcript, _) = read(text);
        assert_eq!(
            transcript.problems(&["s"], false),
            ["s: killed after 60 s, by its time limit or for want of memory (see the console), during two"]
        );
    }

    #[test]
    fn a_guest_that_dies_is_a_problem_of_its_suite() {
        let (transcript, _) = read("@@begin s\ntest one ... ok\ntest two ... ");
        assert_eq!(transcript.problems(&["s"], false), ["s: the guest stopped in it, during two"]);
        assert_eq!(transcript.running().map(|suite| suite.name.as_str()), Some("s"));
    }

    #[test]
    fn a_suite_without_tests_is_a_problem_unless_filtered() {
        let text = "@@begin s\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured\n@@end s status=0 seconds=0\n";
        let (transcript, _) = read(text);
        assert_eq!(transcript.problems(&["s"], false), ["s: no test ran"]);
        assert_eq!(transcript.problems(&["s"], true), Vec::<String>::new());
    }

    #[test]
    fn other_statuses_and_complaints_of_init_are_problems() {
        let text = "@@problem disk disk can't be mounted\n@@begin s\ntest one ... ok\n\
                    test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured\n@@end s status=134 seconds=0\n";
        let (transcript, _) = read(text);
        assert_eq!(transcript.problems(&["s"], false), ["disk disk can't be mounted", "s: ended with status 134"]);
    }
}
