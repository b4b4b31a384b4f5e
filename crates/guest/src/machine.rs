//! Boots one kernel in QEMU, and reads the guest's output until the guest finishes, dies, hangs or
//! exceeds its time limit.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::disks::Disks;
use crate::kernels::Kernel;
use crate::run;
use crate::transcript::{Event, Transcript};

/// A guest that prints nothing for this long is considered hung.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// How often the console and the time limits are checked while no results arrive.
const TICK: Duration = Duration::from_millis(200);

/// The kernel's command line. To speed up the boot, some parameters turn off mitigations,
/// self-tests and clock calibration. An oops causes a panic, and a panic causes a reboot, which
/// makes QEMU exit (`-no-reboot`). Other parameters enable the second serial port, and reserve
/// memory for a CMA heap.
const APPEND: &str = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nokaslr cryptomgr.notests tsc=reliable \
                      no_timer_check 8250.nr_uarts=2 rcupdate.rcu_expedited=1 cma=64M";

/// The outcome of a boot.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) transcript: Transcript,
    /// Why the guest did not finish. `None` if it did.
    pub(crate) trouble: Option<String>,
    /// The console's output since power-on.
    pub(crate) console: String,
    pub(crate) seconds: f64,
}

impl Outcome {
    /// Returns whether the guest crashed because of a bug in QEMU.
    ///
    /// The kernel uses breakpoints to patch its code, mostly while it boots. In QEMU 7.2, one of
    /// the guest's two processors occasionally executes a breakpoint that the other processor has
    /// already removed. The resulting panic is unrelated to the tests.
    pub(crate) fn is_emulator_fault(&self) -> bool {
        // `[#1]` marks the first oops. Older kernels print `int3: 0000 [#1]`, newer ones `Oops:
        // int3: 0000 [#1]`.
        let first = self.console.lines().find(|line| line.contains("[#1]"));
        self.trouble.is_some() && first.is_some_and(|line| line.contains("int3: "))
    }
}

/// The kernel, files and disks for one boot.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) image: &'a Path,
    pub(crate) initramfs: &'a Path,
    pub(crate) disks: &'a Disks,
    /// The root file systems that the guest's suites need: their names and images.
    pub(crate) roots: Vec<&'a (&'static str, PathBuf)>,
    /// The file that QEMU writes the console's output to.
    pub(crate) console: PathBuf,
}

/// Boots a kernel. Calls `on_event` for each event, with the time since QEMU was started.
pub(crate) fn boot(parts: &Parts<'_>, mut on_event: impl FnMut(&Transcript, &Event, Duration)) -> Result<Outcome> {
    File::create(&parts.console).with_context(|| format!("cannot create {}", parts.console.display()))?;
    let mut command = qemu(parts);
    let begin = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut machine = Machine(child.with_context(|| format!("cannot run `{}`", run::describe(&command)))?);
    let (sender, lines) = mpsc::channel();
    let output = machine.0.stdout.take().context("QEMU's standard output is not a pipe")?;
    let reader = thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });

    let mut console = Console::open(&parts.console)?;
    let mut transcript = Transcript::default();
    let mut last_output = Instant::now();
    let trouble = loop {
        let line = lines.recv_timeout(TICK);
        if console.read(&mut transcript)? || line.is_ok() {
            last_output = Instant::now();
        }
        match line {
            Ok(line) => {
                if let Some(event) = transcript.parse_line(&line) {
                    on_event(&transcript, &event, begin.elapsed());
                }
                if transcript.is_done() {
                    break None;
                }
            }
            Err(RecvTimeoutError::Disconnected) => break Some(machine.describe_end()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if begin.elapsed() > Duration::from_secs(parts.kernel.seconds_max) {
            break Some(format!("the guest ran for more than {} s", parts.kernel.seconds_max));
        }
        if last_output.elapsed() > SILENCE_MAX {
            break Some(format!("the guest printed nothing for {} s", SILENCE_MAX.as_secs()));
        }
    };
    drop(machine);
    let _ = reader.join();
    console.read(&mut transcript)?;
    Ok(Outcome { transcript, trouble, console: console.text, seconds: begin.elapsed().as_secs_f64() })
}

fn qemu(parts: &Parts<'_>) -> Command {
    let mut command = run::tool("qemu-system-x86_64");
    command.args(["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm", "-M", "q35", "-smp", "2", "-m"]);
    command.arg(parts.kernel.memory_mib.to_string());
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    command.arg("-kernel").arg(parts.image).arg("-initrd").arg(parts.initramfs).args(["-append", APPEND]);
    command.arg("-serial").arg(format!("file:{}", escape_commas(&parts.console)));
    command.args(["-chardev", "stdio,id=results,signal=off", "-serial", "chardev:results"]);
    let disks = parts.disks;
    let drive = format!("if=none,id=disk,file={},format=raw,{},snapshot=on", escape_commas(&disks.empty), disks.cache);
    command.args(["-drive", &drive, "-device", "nvme,drive=disk,serial=disk"]);
    for (name, image) in &parts.roots {
        let drive = format!("if=none,id={name},file={},format=raw,readonly=on", escape_commas(image));
        command.args(["-drive", &drive, "-device", &format!("nvme,drive={name},serial={name}")]);
    }
    if parts.kernel.bad_disks {
        command.args(["-blockdev", &bad_blockdev("bad0", disks), "-device", "nvme,drive=bad0,serial=bad-nvme"]);
        let device = "virtio-blk-pci,drive=bad1,serial=bad-virtio,rerror=report,werror=report";
        command.args(["-blockdev", &bad_blockdev("bad1", disks), "-device", device]);
    }
    command
}

/// Formats QEMU's `-blockdev` options for a bad disk. They make every read of its bad sector fail.
fn bad_blockdev(node: &str, disks: &Disks) -> String {
    let sector = disks.bad_sector;
    let error = format!("event=read_aio,errno=5,sector={sector},once=off,immediately=off");
    let error = error.split(',').map(|setting| format!("file.inject-error.0.{setting}")).collect::<Vec<_>>().join(",");
    format!(
        "driver=raw,node-name={node},read-only=on,file.driver=blkdebug,file.read-only=on,{error},file.image.driver=file,\
         file.image.read-only=on,file.image.filename={}",
        escape_commas(&disks.bad)
    )
}

/// Formats a path for a QEMU option. Commas are doubled, because a single comma would end the
/// value.
fn escape_commas(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A running QEMU process. Dropping this value kills it.
#[derive(Debug)]
struct Machine(Child);

impl Machine {
    /// Waits for QEMU to exit after it has closed its output. Returns a description of how it
    /// exited.
    fn describe_end(&mut self) -> String {
        let status = self.0.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        let mut stderr_text = String::new();
        if let Some(mut stderr) = self.0.stderr.take() {
            let _ = stderr.read_to_string(&mut stderr_text);
        }
        let said = stderr_text.trim();
        let separator = if said.is_empty() { "" } else { ": " };
        format!("the guest died: QEMU stopped with {status}{separator}{said}")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The open console file, and the text read from it.
#[derive(Debug)]
struct Console {
    file: File,
    text: String,
}

impl Console {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { file, text: String::new() })
    }

    /// Reads new output, and returns whether there was any.
    fn read(&mut self, transcript: &mut Transcript) -> Result<bool> {
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes).context("cannot read the console")?;
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        transcript.add_console(&text);
        self.text.push_str(&text);
        Ok(!bytes.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(trouble: bool, console: &str) -> Outcome {
        let trouble = trouble.then(|| "died".to_owned());
        Outcome { transcript: Transcript::default(), trouble, console: console.to_owned(), seconds: 1.0 }
    }

    #[test]
    fn only_a_stale_breakpoint_is_a_fault_of_the_emulator() {
        assert!(outcome(true, "[ 1.0] Oops: int3: 0000 [#1] PREEMPT SMP\n").is_emulator_fault());
        assert!(outcome(true, "[ 1.0] int3: 0000 [#1] PREEMPT SMP\n").is_emulator_fault());
        assert!(!outcome(false, "[ 1.0] Oops: int3: 0000 [#1] PREEMPT SMP\n").is_emulator_fault());
        assert!(!outcome(true, "[ 1.0] Oops: 0002 [#1] SMP\n[ 1.1] Oops: int3: 0000 [#2]\n").is_emulator_fault());
        assert!(!outcome(true, "").is_emulator_fault());
    }

    #[test]
    fn comma_in_a_path_does_not_end_the_option() {
        assert_eq!(escape_commas(Path::new("/a,b")), "/a,,b");
    }
}
