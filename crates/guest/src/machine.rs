//! Boots one kernel in QEMU, and follows what it prints until it is done, dead, silent or late.

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

/// A guest that prints nothing for so long hangs.
const SILENCE_MAX: Duration = Duration::from_secs(120);
const TICK: Duration = Duration::from_millis(200);

/// Fast boots and plain faults: no mitigations, no self tests, no waiting for clocks, reboot on panic (which ends
/// QEMU), also where only a process would die. Two serial ports.
const APPEND: &str = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nokaslr cryptomgr.notests tsc=reliable \
                      no_timer_check 8250.nr_uarts=2 rcupdate.rcu_expedited=1";

/// What a boot left.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) transcript: Transcript,
    /// Why the guest did not come to its end.
    pub(crate) trouble: Option<String>,
    /// The console, from power on.
    pub(crate) console: String,
    pub(crate) seconds: f64,
}

impl Outcome {
    /// Whether the emulator is to blame. With QEMU 7.2, one processor now and then runs a breakpoint that the other has
    /// already patched away again, as the kernel often does while it boots. That takes the guest down, and says nothing
    /// about what was tested.
    pub(crate) fn is_the_emulators(&self) -> bool {
        // The kernel numbers its faults; newer ones write `Oops: int3: 0000 [#1]`.
        let first = self.console.lines().find(|line| line.contains("[#1]"));
        self.trouble.is_some() && first.is_some_and(|line| line.contains("int3: "))
    }
}

/// The files of one boot.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) image: &'a Path,
    pub(crate) initramfs: &'a Path,
    pub(crate) disks: &'a Disks,
    /// Where QEMU writes the console.
    pub(crate) console: PathBuf,
}

/// Boots, and calls `watch` for each event, with the time since power on.
pub(crate) fn boot(parts: &Parts<'_>, mut watch: impl FnMut(&Transcript, &Event, Duration)) -> Result<Outcome> {
    File::create(&parts.console).with_context(|| format!("can't make {}", parts.console.display()))?;
    let mut command = qemu(parts);
    let begin = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut machine = Machine(child.with_context(|| format!("can't run `{}`", run::shown(&command)))?);
    let (sender, lines) = mpsc::channel();
    let output = machine.0.stdout.take().context("QEMU has no output")?;
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
    let mut heard = Instant::now();
    let trouble = loop {
        let line = lines.recv_timeout(TICK);
        if console.read(&mut transcript)? || line.is_ok() {
            heard = Instant::now();
        }
        match line {
            Ok(line) => {
                if let Some(event) = transcript.line(&line) {
                    watch(&transcript, &event, begin.elapsed());
                }
                if transcript.is_done() {
                    break None;
                }
            }
            Err(RecvTimeoutError::Disconnected) => break Some(machine.epitaph()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if begin.elapsed() > Duration::from_secs(parts.kernel.seconds_max) {
            break Some(format!("the guest ran for more than {} s", parts.kernel.seconds_max));
        }
        if heard.elapsed() > SILENCE_MAX {
            break Some(format!("the guest said nothing for {} s", SILENCE_MAX.as_secs()));
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
    command.arg("-serial").arg(format!("file:{}", option(&parts.console)));
    command.args(["-chardev", "stdio,id=results,signal=off", "-serial", "chardev:results"]);
    let disks = parts.disks;
    let drive = format!("if=none,id=disk,file={},format=raw,{},snapshot=on", option(&disks.empty), disks.cache);
    command.args(["-drive", &drive, "-device", "nvme,drive=disk,serial=disk"]);
    if parts.kernel.bad_disks {
        command.args(["-blockdev", &bad_blockdev("bad0", disks), "-device", "nvme,drive=bad0,serial=bad-nvme"]);
        let device = "virtio-blk-pci,drive=bad1,serial=bad-virtio,rerror=report,werror=report";
        command.args(["-blockdev", &bad_blockdev("bad1", disks), "-device", device]);
    }
    command
}

/// An image of which one sector can't be read, ever.
fn bad_blockdev(node: &str, disks: &Disks) -> String {
    let sector = disks.bad_sector;
    let error = format!("event=read_aio,errno=5,sector={sector},once=off,immediately=off");
    let error = error.split(',').map(|setting| format!("file.inject-error.0.{setting}")).collect::<Vec<_>>().join(",");
    format!(
        "driver=raw,node-name={node},read-only=on,file.driver=blkdebug,file.read-only=on,{error},file.image.driver=file,\
         file.image.read-only=on,file.image.filename={}",
        option(&disks.bad)
    )
}

/// A path as part of a QEMU option, where a comma ends a value unless doubled.
fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A running QEMU, ended when dropped.
#[derive(Debug)]
struct Machine(Child);

impl Machine {
    /// Why it ended by itself.
    fn epitaph(&mut self) -> String {
        let status = self.0.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        let mut said = String::new();
        if let Some(mut stderr) = self.0.stderr.take() {
            let _ = stderr.read_to_string(&mut said);
        }
        let said = if said.trim().is_empty() { String::new() } else { format!(": {}", said.trim()) };
        format!("the guest died: QEMU ended with {status}{said}")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The file that QEMU writes the console to.
#[derive(Debug)]
struct Console {
    file: File,
    text: String,
}

impl Console {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("can't open {}", path.display()))?;
        Ok(Self { file, text: String::new() })
    }

    /// Reads what is new, and says whether there was any.
    fn read(&mut self, transcript: &mut Transcript) -> Result<bool> {
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes).context("can't read the console")?;
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        transcript.console(&text);
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
    fn only_a_death_by_a_stale_breakpoint_is_the_emulators() {
        assert!(outcome(true, "[ 1.0] Oops: int3: 0000 [#1] PREEMPT SMP\n").is_the_emulators());
        assert!(outcome(true, "[ 1.0] int3: 0000 [#1] PREEMPT SMP\n").is_the_emulators());
        assert!(!outcome(false, "[ 1.0] Oops: int3: 0000 [#1] PREEMPT SMP\n").is_the_emulators());
        assert!(!outcome(true, "[ 1.0] Oops: 0002 [#1] SMP\n[ 1.1] Oops: int3: 0000 [#2]\n").is_the_emulators());
        assert!(!outcome(true, "").is_the_emulators());
    }

    #[test]
    fn a_comma_in_a_path_does_not_end_the_option() {
        assert_eq!(option(Path::new("/a,b")), "/a,,b");
    }
}
