//! One run, from the tools to the closing line.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::Options;
use crate::boot::Boot;
use crate::compile::{self, Built};
use crate::debian;
use crate::disks::{self, Disks};
use crate::initramfs::{self, Plan};
use crate::kernels::{KERNELS, Kernel};
use crate::machine::{self, Outcome, Parts};
use crate::modules::{self, Unpacked};
use crate::report;
use crate::rows::{self, Row};
use crate::say;
use crate::suites::{SUITES, Suite};
use crate::tools;
use crate::transcript::{Event, SuiteRun};

/// How often a kernel is booted when the emulator gets in the way.
const BOOTS_MAX: usize = 4;

/// Runs what the options choose, and says whether all went well.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let begin = Instant::now();
    let kernels = chosen_kernels(options)?;
    let suites = chosen_suites(options, &kernels)?;
    let folder = target_folder()?.join("guest");
    fs::create_dir_all(&folder).with_context(|| format!("can't make {}", folder.display()))?;
    let lock = File::create(folder.join("lock"))?;
    lock.try_lock().with_context(|| format!("another run uses {}; wait for it, or set CARGO_TARGET_DIR", folder.display()))?;
    let scratch = Scratch::make(folder.join("run"), options.keep)?;

    say::step("tools", tools::ensure)?;
    let unpacked = say::step("kernels", || unpack(&kernels, &folder.join("kernels")))?;
    let built = say::step("build", || compile::build(&workspace()?, &folder.join("build"), &suites))?;
    let disks = say::step("disks", || disks::make(&scratch.folder))?;

    let plans = kernels.iter().zip(&unpacked).filter_map(|(kernel, unpacked)| {
        let suites = suites.iter().filter(|suite| suite.kernels.contains(&kernel.id)).copied().collect::<Vec<_>>();
        (!suites.is_empty()).then_some((*kernel, unpacked, suites))
    });
    let plans = plans.collect::<Vec<_>>();
    let work = Work { options, built: &built, disks: &disks, folder: &scratch.folder };
    let boots = in_parallel(usize::from(options.jobs), plans.len(), |index| {
        let (kernel, unpacked, suites) = &plans[index];
        work.boot(kernel, unpacked, suites)
    });

    finish(options, &boots, &folder, begin)
}

/// Writes down and tells what came of it all.
fn finish(options: &Options, boots: &[Boot<'_>], folder: &Path, begin: Instant) -> Result<bool> {
    let mut all: Vec<Row> = Vec::new();
    let mut problems = Vec::new();
    let (mut ran, mut failed) = (0, 0);
    for boot in boots {
        if let Some(outcome) = &boot.outcome {
            all.extend(rows::parse(boot.plan.kernel.id, &outcome.transcript.rows));
        }
        for suite in boot.suites() {
            ran += suite.ran();
            failed += suite.failures();
        }
        problems.extend(boot.problems.iter().map(|problem| format!("{}: {problem}", boot.plan.kernel.id)));
    }
    if ran == 0 {
        problems.push("no test ran at all; `guest list` tells the suites of each kernel".to_owned());
    }
    fs::write(folder.join("report.md"), report::markdown(boots, &all)).context("can't write the report")?;
    if let Some(file) = options.write.as_ref().filter(|_| problems.is_empty())
        && let Err(error) = write_tables(file, &all)
    {
        problems.push(format!("{error:#}"));
    }

    for problem in &problems {
        say::line(&format!("guest: {problem}"));
    }
    let seconds = begin.elapsed().as_secs();
    say::line(&format!("guest: {} kernels, {ran} tests, {failed} failed, {seconds} s", boots.len()));
    Ok(problems.is_empty())
}

fn write_tables(file: &Path, all: &[Row]) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("can't read {}", file.display()))?;
    let filled = rows::fill(&text, all).with_context(|| format!("{} stays as it was", file.display()))?;
    fs::write(file, filled).with_context(|| format!("can't write {}", file.display()))
}

/// What all boots share.
struct Work<'a> {
    options: &'a Options,
    built: &'a Built,
    disks: &'a Disks,
    folder: &'a Path,
}

impl<'a> Work<'a> {
    fn boot(&self, kernel: &'a Kernel, unpacked: &'a Unpacked, suites: &'a [&'a Suite]) -> Boot<'a> {
        let filter = self.options.filter.as_deref();
        let plan = Plan { kernel, modules: &unpacked.modules, suites, filter };
        let mut followed = self.follow(&plan, &unpacked.image);
        for _ in 1..BOOTS_MAX {
            let Some(outcome) = followed.as_ref().ok().filter(|outcome| outcome.is_the_emulators()) else { break };
            let line = outcome.console.lines().find(|line| line.contains("[#1]")).unwrap_or_default();
            say::line(&format!("guest: {} boots again, for a fault of the emulator: {line}", kernel.id));
            followed = self.follow(&plan, &unpacked.image);
        }
        match followed {
            Ok(outcome) => {
                let expected = suites.iter().map(|suite| suite.name).collect::<Vec<_>>();
                let mut problems = outcome.transcript.problems(&expected, filter.is_some());
                if let Some(trouble) = &outcome.trouble {
                    say::line(&tail(kernel.id, "console", &outcome.console, 120));
                    problems.push(trouble.clone());
                }
                for complaint in &outcome.transcript.complaints {
                    say::line(&format!("{}  the kernel complained: {complaint}", kernel.id));
                }
                Boot { plan, outcome: Some(outcome), problems }
            }
            Err(error) => Boot { plan, outcome: None, problems: vec![format!("{error:#}")] },
        }
    }

    /// Boots, and tells what happens as it happens.
    fn follow(&self, plan: &Plan<'_>, image: &Path) -> Result<Outcome> {
        let id = plan.kernel.id;
        let initramfs = self.folder.join(format!("{id}.cpio"));
        fs::write(&initramfs, initramfs::pack(plan, self.built, self.disks)?).context("can't write the initramfs")?;
        let console = self.folder.join(format!("{id}.console"));
        let parts = Parts { kernel: plan.kernel, image, initramfs: &initramfs, disks: self.disks, console };
        let filtered = plan.filter.is_some();
        let outcome = machine::boot(&parts, |transcript, event, since| match event {
            Event::Ready => say::line(&format!("guest: {id} is ready: {:.1} s", since.as_secs_f64())),
            Event::Test { suite, name, verdict } => say::line(&format!("{id}  {suite}  {name}  {}", verdict.word())),
            Event::Ended { suite } => {
                let Some(run) = transcript.suites.iter().find(|run| run.name == *suite) else { return };
                if run.failed(filtered) {
                    say::line(&tail(id, suite, &told(run), 400));
                    say::line(&tail(id, "console", &run.console, 100));
                }
                let seconds = run.end.map_or(0, |(_, seconds)| seconds);
                say::line(&format!("guest: {id}: {suite}: {} tests: {seconds} s", run.ran()));
            }
            Event::Done => {}
        })?;
        if let Some(run) = outcome.transcript.running() {
            say::line(&tail(id, &run.name, &told(run), 400));
        }
        say::line(&format!("guest: {id} in all: {:.1} s", outcome.seconds));
        Ok(outcome)
    }
}

/// What a suite printed, but for what was told already: the tests that went well.
fn told(run: &SuiteRun) -> String {
    let old = |line: &str| line.trim().is_empty() || (line.starts_with("test ") && line.ends_with(" ... ok"));
    run.output.iter().map(String::as_str).filter(|line| !old(line)).collect::<Vec<_>>().join("\n")
}

/// The last lines of a text, each with where it is from.
fn tail(id: &str, what: &str, text: &str, lines_max: usize) -> String {
    let lines = text.trim_end().lines().collect::<Vec<_>>();
    let skipped = lines.len().saturating_sub(lines_max);
    let mut shown = Vec::new();
    if skipped > 0 {
        shown.push(format!("{id}  {what} | … {skipped} lines before"));
    }
    shown.extend(lines[skipped..].iter().map(|line| format!("{id}  {what} | {line}")));
    shown.join("\n")
}

/// Does `count` pieces of work, `jobs` at a time, and gives the results in order.
fn in_parallel<T: Send>(jobs: usize, count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return done;
            }
            done.push((index, work(index)));
        }
    };
    let mut all = thread::scope(|scope| {
        let workers = (0..jobs.min(count)).map(|_| scope.spawn(worker)).collect::<Vec<_>>();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker does not panic")).collect::<Vec<_>>()
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, result)| result).collect()
}

fn unpack(kernels: &[&Kernel], folder: &Path) -> Result<Vec<Unpacked>> {
    let unpack = |kernel: &&Kernel| modules::unpack(kernel, &debian::fetch(kernel, &folder.join(kernel.id))?);
    kernels.iter().map(unpack).collect()
}

fn chosen_kernels(options: &Options) -> Result<Vec<&'static Kernel>> {
    if let Some(unknown) = options.kernel.iter().find(|id| !KERNELS.iter().any(|kernel| kernel.id == **id)) {
        let known = KERNELS.map(|kernel| kernel.id).join(", ");
        bail!("there is no kernel {unknown}; there are {known}");
    }
    let chosen = |kernel: &&Kernel| options.kernel.is_empty() || options.kernel.iter().any(|id| id == kernel.id);
    Ok(KERNELS.iter().filter(chosen).collect())
}

fn chosen_suites(options: &Options, kernels: &[&Kernel]) -> Result<Vec<&'static Suite>> {
    if let Some(unknown) = options.only.iter().find(|name| !SUITES.iter().any(|suite| suite.name == **name)) {
        let known = SUITES.iter().map(|suite| suite.name).collect::<Vec<_>>().join(", ");
        bail!("there is no suite {unknown}; there are {known}");
    }
    let chosen = |suite: &&Suite| {
        let named = options.only.is_empty() || options.only.iter().any(|name| name == suite.name);
        named && kernels.iter().any(|kernel| suite.kernels.contains(&kernel.id))
    };
    let suites = SUITES.iter().filter(chosen).collect::<Vec<_>>();
    if suites.is_empty() {
        bail!("none of these suites runs on these kernels; `guest list` tells which do");
    }
    Ok(suites)
}

fn workspace() -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    path.canonicalize().with_context(|| format!("the workspace is no longer in {}", path.display()))
}

fn target_folder() -> Result<PathBuf> {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => Ok(std::path::absolute(folder)?),
        None => Ok(workspace()?.join("target")),
    }
}

/// The folder of this run's images, removed at its end.
struct Scratch {
    folder: PathBuf,
    keep: bool,
}

impl Scratch {
    fn make(folder: PathBuf, keep: bool) -> Result<Self> {
        // Of a run that was interrupted.
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).with_context(|| format!("can't make {}", folder.display()))?;
        Ok(Self { folder, keep })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.keep {
            say::line(&format!("guest: images and consoles are in {}", self.folder.display()));
        } else {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}
