//! One run of the harness, from installing tools to printing the summary.

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
use crate::config;
use crate::debian::{self, Fetched};
use crate::disks::{self, Disks};
use crate::initramfs::{self, Plan};
use crate::kernels::{KERNELS, Kernel};
use crate::machine::{self, Outcome, Parts};
use crate::modules::{self, Unpacked};
use crate::progress;
use crate::python;
use crate::report;
use crate::roots::{self, Folders};
use crate::rows::{self, Row};
use crate::suites::{PYTHON, SUITES, Suite, VULKAN};
use crate::tools;
use crate::transcript::{Event, SuiteRun};
use crate::vulkan;

/// Maximum number of differing lines to print.
const DIFFERENCE_MAX: usize = 40;
/// The number of kernels to unpack at a time. Each of them keeps one processor busy.
const UNPACK_JOBS: usize = 2;
/// Maximum number of times to boot a kernel whose guest keeps crashing because of bugs in QEMU.
const BOOTS_MAX: usize = 4;

/// A function that makes a root file system, and returns its folder.
type MakeRoot = fn(&Folders<'_>) -> Result<PathBuf>;

/// The suites that need a root file system. Each finds it on a disk that has the suite's name as
/// its serial number, mounted at a folder with that name.
const ROOTS: [(&str, MakeRoot); 2] = [(PYTHON, python::make_root), (VULKAN, vulkan::make_root)];

/// Runs the chosen suites on the chosen kernels. Returns `true` if there were no problems.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let begin = Instant::now();
    let kernels = choose_kernels(options)?;
    check_suite_names(options)?;
    let folder = target_folder()?.join("guest");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let lock = File::create(folder.join("lock"))?;
    lock.try_lock().with_context(|| {
        format!("cannot lock {}: another run uses this folder; wait until it finishes, or set CARGO_TARGET_DIR", folder.display())
    })?;
    let scratch = Scratch::make(folder.join("run"), options.keep)?;

    progress::time_step("tools", tools::ensure)?;
    let booted = progress::time_step("kernels", || unpack(&kernels, &folder))?;
    let suites = choose_suites(options, &booted)?;
    let built = progress::time_step("build", || compile::build(&workspace()?, &folder.join("build"), &suites))?;
    if options.no_run {
        return Ok(true);
    }
    let mut disks = progress::time_step("disks", || disks::make(&scratch.folder))?;
    for (name, make_root) in ROOTS {
        if suites.iter().any(|suite| suite.name == name) {
            let (workspace, target, lists) = (workspace()?, target_folder()?, folder.join("apt"));
            let folders = Folders { workspace: &workspace, target: &target, kept: folder.join(name), lists: &lists };
            let image = || roots::make_image(name, &make_root(&folders)?, &scratch.folder);
            disks.roots.push((name, progress::time_step(name, image)?));
        }
    }

    let plans = booted.iter().filter_map(|booted| {
        let suites = suites.iter().filter(|suite| booted.runs(suite)).copied().collect::<Vec<_>>();
        (!suites.is_empty()).then_some((booted, suites))
    });
    let plans = plans.collect::<Vec<_>>();
    let work = Work { options, built: &built, disks: &disks, folder: &scratch.folder };
    let boots = in_parallel(usize::from(options.jobs), plans.len(), |index| {
        let (booted, suites) = &plans[index];
        work.boot(booted, suites)
    });

    finish(options, boots, &folder, begin)
}

/// Writes the report, writes or checks the tables, and prints problems and the summary.
fn finish(options: &Options, mut boots: Vec<Boot<'_>>, folder: &Path, begin: Instant) -> Result<bool> {
    // Tables list kernels by release line, not in the order they were booted.
    boots.sort_by_key(|boot| boot.plan.kernel.line);
    let mut problems = Vec::new();
    let (mut ran, mut failed) = (0, 0);
    for boot in &boots {
        for suite in boot.suites() {
            ran += suite.ran();
            failed += suite.failed_tests().len();
        }
        problems.extend(boot.problems.iter().map(|problem| format!("{}: {problem}", boot.plan.id)));
        problems.extend(boot.replays().iter().map(|replay| format!("{}: to rerun: {replay}", boot.plan.id)));
    }
    let all = collect_rows(&boots, |boot| &boot.plan.id);
    if ran == 0 {
        problems.push("no test ran; `cargo run -p dmaload-guest -- list` lists the suites for each kernel".to_owned());
    }
    fs::write(folder.join("report.md"), report::format_report(&boots, &all)).context("cannot write the report")?;
    if problems.is_empty() {
        let written = options.write.as_ref().map_or(Ok(()), |file| write_tables(file, &all));
        let checked = options.check.as_ref().map_or(Ok(()), |file| check_tables(file, &boots));
        problems.extend([written, checked].into_iter().filter_map(Result::err).map(|error| format!("{error:#}")));
    }

    for problem in &problems {
        progress::print(&format!("guest: {problem}"));
    }
    let seconds = begin.elapsed().as_secs();
    // A run can fail without a failed test, for example if a guest does not boot.
    let hint = if problems.is_empty() { "" } else { "; this run failed, see above" };
    progress::print(&format!("guest: kernels: {}, tests: {ran}, failed: {failed}, {seconds} s{hint}", boots.len()));
    Ok(problems.is_empty())
}

/// Collects the rows from all boots. `name` returns the kernel id to list a boot's rows under.
fn collect_rows<'a>(boots: &'a [Boot<'a>], name: impl Fn(&'a Boot<'a>) -> &'a str) -> Vec<Row> {
    let rows = boots.iter().flat_map(|boot| {
        let recorded = boot.outcome.as_ref().map_or(&[][..], |outcome| &outcome.transcript.rows);
        [config::rows(name(boot), boot.plan.config), rows::parse(name(boot), recorded)].concat()
    });
    rows.collect()
}

/// Returns a file's current text, and the same text with its tables filled from `all`.
fn read_and_fill(file: &Path, all: &[Row]) -> Result<(String, String)> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let filled = rows::fill_tables(&text, all).with_context(|| format!("cannot fill the tables in {}", file.display()))?;
    Ok((text, filled))
}

fn write_tables(file: &Path, all: &[Row]) -> Result<()> {
    let (_, filled) = read_and_fill(file, all)?;
    fs::write(file, filled).with_context(|| format!("cannot write {}", file.display()))
}

/// Compares the tables in a file with the recorded rows. If another release line was booted
/// instead of the requested one, the tables may name either of them.
fn check_tables(file: &Path, boots: &[Boot<'_>]) -> Result<()> {
    let (_, renamed) = read_and_fill(file, &collect_rows(boots, |boot| &boot.plan.id))?;
    let (text, filled) = read_and_fill(file, &collect_rows(boots, |boot| boot.plan.kernel.id))?;
    if text == filled || text == renamed {
        return Ok(());
    }
    let difference = rows::list_differences(&text, &filled);
    let shown = difference.iter().take(DIFFERENCE_MAX).cloned().collect::<Vec<_>>().join("\n");
    bail!(
        "the tables in {} differ from what this run recorded (differing lines: {}; if 0, their order differs); find out \
         why, then rewrite them with `just kernels-md`\n{shown}",
        file.display(),
        difference.len()
    );
}

/// A kernel that is ready to boot.
#[derive(Debug)]
struct Booted {
    kernel: &'static Kernel,
    unpacked: Unpacked,
    /// The booted kernel's id. Differs from `kernel.id` if the archive no longer has that release
    /// line.
    id: String,
}

impl Booted {
    fn runs(&self, suite: &Suite) -> bool {
        (suite.runs_on)(self.kernel, self.unpacked.line)
    }
}

/// The options, programs and files that all boots share.
struct Work<'a> {
    options: &'a Options,
    built: &'a Built,
    disks: &'a Disks,
    folder: &'a Path,
}

impl<'a> Work<'a> {
    fn boot(&self, booted: &'a Booted, suites: &'a [&'a Suite]) -> Boot<'a> {
        let filter = self.options.filter.as_deref();
        let Booted { kernel, unpacked, id } = booted;
        let plan = Plan { kernel, id: id.clone(), modules: &unpacked.modules, config: &unpacked.config, suites, filter };
        let mut result = self.run_guest(&plan, &unpacked.image);
        for _ in 1..BOOTS_MAX {
            let Some(outcome) = result.as_ref().ok().filter(|outcome| outcome.is_emulator_fault()) else { break };
            let line = outcome.console.lines().find(|line| line.contains("[#1]")).unwrap_or_default();
            progress::print(&format!("guest: {id}: booting again, because a bug in QEMU crashed the guest: {line}"));
            result = self.run_guest(&plan, &unpacked.image);
        }
        match result {
            Ok(outcome) => {
                let expected = suites.iter().map(|suite| suite.name).collect::<Vec<_>>();
                let mut problems = outcome.transcript.problems(&expected, filter.is_some());
                if let Some(trouble) = &outcome.trouble {
                    progress::print(&format_tail(&plan.id, "console", &outcome.console, 120));
                    problems.push(trouble.clone());
                }
                for warning in &outcome.transcript.warnings {
                    progress::print(&format!("{}  the kernel warned: {warning}", plan.id));
                }
                Boot { plan, outcome: Some(outcome), problems }
            }
            Err(error) => Boot { plan, outcome: None, problems: vec![format!("{error:#}")] },
        }
    }

    /// Boots a guest, and prints its progress.
    fn run_guest(&self, plan: &Plan<'_>, image: &Path) -> Result<Outcome> {
        let id = plan.id.as_str();
        let initramfs = self.folder.join(format!("{id}.cpio"));
        fs::write(&initramfs, initramfs::pack(plan, self.built, self.disks)?).context("cannot write the initramfs")?;
        let console = self.folder.join(format!("{id}.console"));
        let parts = Parts {
            kernel: plan.kernel,
            image,
            initramfs: &initramfs,
            disks: self.disks,
            roots: plan.roots(self.disks).collect(),
            console,
        };
        let filtered = plan.filter.is_some();
        let outcome = machine::boot(&parts, |transcript, event, since| match event {
            Event::Ready => progress::print(&format!("guest: {id} is ready after {:.1} s", since.as_secs_f64())),
            Event::Test { suite, name, verdict } => progress::print(&format!("{id}  {suite}  {name}  {}", verdict.word())),
            Event::Ended { suite } => {
                let Some(run) = transcript.suites.iter().find(|run| run.name == *suite) else { return };
                if run.failed(filtered) {
                    progress::print(&format_tail(id, suite, &without_passed_tests(run), 400));
                    progress::print(&format_tail(id, "console", &run.console, 100));
                }
                let seconds = run.end.map_or(0, |(_, seconds)| seconds);
                progress::print(&format!("guest: {id}: {suite}: tests: {}, {seconds} s", run.ran()));
            }
            Event::Done => {}
        })?;
        if let Some(run) = outcome.transcript.running() {
            progress::print(&format_tail(id, &run.name, &without_passed_tests(run), 400));
        }
        progress::print(&format!("guest: {id} ran for {:.1} s", outcome.seconds));
        Ok(outcome)
    }
}

/// Returns a suite's output without the lines for passed tests, which were already printed.
fn without_passed_tests(run: &SuiteRun) -> String {
    let printed = |line: &str| line.trim().is_empty() || (line.starts_with("test ") && line.ends_with(" ... ok"));
    run.output.iter().map(String::as_str).filter(|line| !printed(line)).collect::<Vec<_>>().join("\n")
}

/// Formats the last lines of a text, each prefixed with its source.
fn format_tail(id: &str, what: &str, text: &str, lines_max: usize) -> String {
    let lines = text.trim_end().lines().collect::<Vec<_>>();
    let skipped = lines.len().saturating_sub(lines_max);
    let mut shown = Vec::new();
    if skipped > 0 {
        shown.push(format!("{id}  {what} | … {skipped} earlier lines"));
    }
    shown.extend(lines[skipped..].iter().map(|line| format!("{id}  {what} | {line}")));
    shown.join("\n")
}

/// Calls `work` for each index below `count`, on up to `jobs` threads. Returns the results in the
/// order of the indices.
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
        workers.into_iter().flat_map(|worker| worker.join().expect("workers should not panic")).collect::<Vec<_>>()
    });
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, result)| result).collect()
}

/// Fetches and unpacks kernels. If the archive no longer has a kernel's release line, a later line
/// is used instead. If two kernels then turn out to be the same, only the first of them is kept.
fn unpack(kernels: &[&'static Kernel], folder: &Path) -> Result<Vec<Booted>> {
    let (kept, lists) = (folder.join("kernels"), folder.join("apt"));
    // Download one kernel at a time, because downloads share the network.
    let fetched = kernels.iter().map(|&kernel| Ok((kernel, debian::fetch(kernel, &kept, &lists)?)));
    let fetched = distinct_boots(fetched.collect::<Result<Vec<_>>>()?);
    let unpacked = in_parallel(UNPACK_JOBS, fetched.len(), |index| modules::unpack(fetched[index].0, &fetched[index].1));
    let booted =
        fetched.into_iter().zip(unpacked).map(|((kernel, _, id), unpacked)| Ok(Booted { kernel, unpacked: unpacked?, id }));
    booted.collect()
}

/// Returns the fetched kernels with their ids. If several have the same id, keeps only the first.
fn distinct_boots(fetched: Vec<(&'static Kernel, Fetched)>) -> Vec<(&'static Kernel, Fetched, String)> {
    let mut distinct: Vec<(&'static Kernel, Fetched, String)> = Vec::new();
    for (kernel, fetched) in fetched {
        let id = kernel.flavor.id(fetched.line);
        if id != kernel.id {
            progress::print(&format!("guest: {} is no longer in the archive: booting {id} instead", kernel.id));
        }
        if distinct.iter().any(|(_, _, known)| *known == id) {
            progress::print(&format!("guest: {id} was chosen more than once, but is booted only once"));
        } else {
            distinct.push((kernel, fetched, id));
        }
    }
    distinct
}

fn choose_kernels(options: &Options) -> Result<Vec<&'static Kernel>> {
    if let Some(unknown) = options.kernel.iter().find(|id| !KERNELS.iter().any(|kernel| kernel.id == **id)) {
        let known = KERNELS.map(|kernel| kernel.id).join(", ");
        bail!("unknown kernel {unknown:?}; known kernels are {known}");
    }
    let named = |kernel: &Kernel| options.kernel.iter().any(|id| id == kernel.id);
    let chosen = |kernel: &&Kernel| if options.kernel.is_empty() { kernel.by_default } else { named(kernel) };
    Ok(KERNELS.iter().filter(chosen).collect())
}

fn check_suite_names(options: &Options) -> Result<()> {
    if let Some(unknown) = options.only.iter().find(|name| !SUITES.iter().any(|suite| suite.name == **name)) {
        let known = SUITES.iter().map(|suite| suite.name).collect::<Vec<_>>().join(", ");
        bail!("unknown suite {unknown:?}; known suites are {known}");
    }
    Ok(())
}

fn choose_suites(options: &Options, booted: &[Booted]) -> Result<Vec<&'static Suite>> {
    let chosen = |suite: &&Suite| {
        let named = options.only.iter().any(|name| name == suite.name) || (options.only.is_empty() && suite.by_default);
        named && booted.iter().any(|booted| booted.runs(suite))
    };
    let suites = SUITES.iter().filter(chosen).collect::<Vec<_>>();
    if suites.is_empty() {
        bail!(
            "none of the chosen suites runs on any chosen kernel; `cargo run -p dmaload-guest -- list` lists the suites for each kernel"
        );
    }
    Ok(suites)
}

fn workspace() -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    path.canonicalize().with_context(|| format!("cannot find the workspace in {}", path.display()))
}

fn target_folder() -> Result<PathBuf> {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => Ok(std::path::absolute(folder)?),
        None => Ok(workspace()?.join("target")),
    }
}

/// The folder for this run's disk images, initramfs archives and console output. Dropping this
/// value removes the folder, unless `keep` is set.
struct Scratch {
    folder: PathBuf,
    keep: bool,
}

impl Scratch {
    fn make(folder: PathBuf, keep: bool) -> Result<Self> {
        // An interrupted run may have left the folder behind.
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { folder, keep })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.keep {
            progress::print(&format!("guest: disk images and console output are in {}", self.folder.display()));
        } else {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transcript::Transcript;

    fn find_kernel(id: &str) -> &'static Kernel {
        KERNELS.iter().find(|kernel| kernel.id == id).unwrap()
    }

    #[test]
    fn replaced_line_boots_under_its_id_and_once() {
        let fetched = |id: &str, line| (find_kernel(id), Fetched { line, folder: PathBuf::new() });
        let boots =
            distinct_boots(vec![fetched("6.12-full", (6, 18)), fetched("6.18-full", (6, 18)), fetched("7.2-full", (7, 4))]);
        let ids = boots.iter().map(|(kernel, _, id)| (kernel.id, id.as_str())).collect::<Vec<_>>();
        assert_eq!(ids, [("6.12-full", "6.18-full"), ("7.2-full", "7.4-full")]);
    }

    /// A boot of Linux 7.4 in place of 7.2, with one recorded row.
    fn replaced_boot() -> Boot<'static> {
        let kernel = find_kernel("7.2-full");
        let plan = Plan { kernel, id: "7.4-full".to_owned(), modules: &[], config: "", suites: &[], filter: None };
        let mut transcript = Transcript::default();
        transcript.rows.push("heaps | system".to_owned());
        let outcome = Outcome { transcript, trouble: None, console: String::new(), seconds: 1.0 };
        Boot { plan, outcome: Some(outcome), problems: Vec::new() }
    }

    #[test]
    fn tables_may_name_a_replaced_line_or_its_replacement() {
        let boots = [replaced_boot()];
        let empty = "<!-- rows kernels: Kernel | 1 | 2 | 3 | 4 | 5 -->\n<!-- end kernels -->\n\
                     <!-- rows heaps: Kernel | Heap -->\n<!-- end heaps -->\n";
        let file = tempfile::NamedTempFile::new().unwrap();
        for id in ["7.2-full", "7.4-full"] {
            fs::write(file.path(), rows::fill_tables(empty, &collect_rows(&boots, |_| id)).unwrap()).unwrap();
            check_tables(file.path(), &boots).unwrap();
        }
        fs::write(file.path(), rows::fill_tables(empty, &collect_rows(&boots, |_| "6.1-cloud")).unwrap()).unwrap();
        let error = check_tables(file.path(), &boots).unwrap_err().to_string();
        assert!(error.contains("- | 6.1-cloud | system |") && error.contains("+ | 7.2-full | system |"), "{error}");
    }
}
