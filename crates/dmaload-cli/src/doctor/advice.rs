//! Ranks the changes to the machine that would make loads possible or faster.
//!
//! The ranking is based on measurements of a 1 GiB file on a machine with 2 cores and a disk that
//! reads 1.8 GB/s. A load through the page cache takes up to twice as long as a direct one, and
//! fills the cache. A load into 4 KiB pages takes nearly twice as long as one into 2 MiB pages.
//! Four threads that `pread` keep up with io_uring on such a disk, but fall behind on faster
//! disks. Registering memory makes no measurable difference on 2 MiB pages. dma-bufs do not make
//! loads faster, so advice about them comes last.

use std::path::Path;

use dmabuf::{HUGE_PAGE_BYTES, Udmabuf, printable};
use dmaload::{Attempt, Errno};
use dmaload_text::bytes;

use super::cause::Cause;
use super::facts::Facts;
use super::system::SHMEM_ENABLED;
use super::trial::{DMA_HEAP, HeapTrial, Loaded};
use super::verdict::{direct_refused, memlock_suffices, path_file, too_large};

/// Maximum number of entries to show.
pub(crate) const SHOWN: usize = 3;
/// Doctor advises freeing memory if less than this is available. It is twice the default window,
/// so that a load leaves half of it to other processes.
const LITTLE_MEMORY_BYTES: u64 = 256 << 20;
/// The size of a realistic model. If no file is given, the advised limits leave room for such a
/// model.
const MODEL_BYTES: u64 = 1 << 30;

/// A change to the machine, a command that makes the change or helps to make it, and the gain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Advice {
    pub(crate) change: String,
    pub(crate) command: String,
    pub(crate) gain: String,
}

impl Advice {
    fn new(change: impl Into<String>, command: impl Into<String>, gain: impl Into<String>) -> Self {
        Advice { change: change.into(), command: command.into(), gain: gain.into() }
    }
}

/// Returns everything that would help, largest gain first.
pub(crate) fn ranked(facts: &Facts) -> Vec<Advice> {
    let rules = [memory, direct, pages, ring, registering, permission, device, size_limit, bug];
    rules.into_iter().filter_map(|rule| rule(facts)).collect()
}

fn memory(facts: &Facts) -> Option<Advice> {
    let memory = facts.memory.as_ref()?;
    let change = match too_large(facts) {
        Some((wanted, _)) => format!("free {} of memory, or raise the limit ({})", bytes(wanted - memory.bytes), memory.limit),
        None if memory.bytes < LITTLE_MEMORY_BYTES => {
            format!("free memory: only {} is available ({})", bytes(memory.bytes), memory.limit)
        }
        None => return None,
    };
    let command = match memory.limit.split_once(" is ") {
        Some((file, _)) if file.starts_with('/') => format!("echo {} > {file}", MODEL_BYTES.max(2 * needed(facts))),
        _ => "ps -eo rss,comm --sort=-rss | head".to_owned(),
    };
    Some(Advice::new(
        change,
        command,
        "a load that works; loads that do not fit in memory are refused, so that the OOM killer is not invoked",
    ))
}

fn needed(facts: &Facts) -> u64 {
    path_file(facts).map_or(0, |file| file.bytes)
}

const LOCAL: &str = "a local file system (ext4, xfs, btrfs)";
const LOCAL_FILE_SYSTEMS: &str = "findmnt -t ext4,xfs,btrfs -o TARGET,FSTYPE,AVAIL";
/// Shows disks and what they are attached to; network devices have no transport.
const DISKS: &str = "lsblk -o NAME,TYPE,TRAN,SIZE,MOUNTPOINT";

fn direct(facts: &Facts) -> Option<Advice> {
    let Some(errno) = direct_refused(facts) else {
        let (attempt, errno) = path_file(facts)?.ring_refused.filter(|_| facts.io_uring.setup.is_ok())?;
        let (change, command) = allow_ring_on_file(attempt, errno);
        return Some(Advice::new(change, command, "reads through io_uring instead of with threads"));
    };
    let mount = facts.path.as_ref().and_then(|path| path.mount.as_ref());
    let kind = mount.map_or("this file system", |mount| mount.file_system.as_str());
    Some(Advice::new(
        format!("keep models where O_DIRECT works (ext4, xfs, btrfs): {kind} refuses it: {}", errno.describe()),
        LOCAL_FILE_SYSTEMS,
        "loads take as little as half the time: no page cache, no copy, and nothing else is evicted from memory",
    ))
}

/// Returns the change that lets io_uring read the file, and the command for this change.
fn allow_ring_on_file(attempt: Attempt, errno: Errno) -> (String, &'static str) {
    let (place, command, why) = match (attempt, errno) {
        (Attempt::RingOnDevice, Errno::EOPNOTSUPP) => {
            ("a local disk", DISKS, "a block device that may stop answering (nbd, rbd, a loop device over FUSE)")
        }
        (Attempt::RingOnDevice, _) => {
            let change = "mount sysfs at /sys, and keep the file of a loop device where its path can be reached: without that, \
                          the backing of the block device can't be determined";
            return (change.to_owned(), "findmnt /sys; losetup --list");
        }
        (Attempt::RingOnFuse, _) => (LOCAL, LOCAL_FILE_SYSTEMS, "FUSE"),
        (Attempt::RingOnStacked, _) => (LOCAL, LOCAL_FILE_SYSTEMS, "a file system that stacks on others (overlayfs)"),
        _ => (LOCAL, LOCAL_FILE_SYSTEMS, "a file system that is not known to be local"),
    };
    (format!("keep models on {place}: io_uring can't be trusted with {why}"), command)
}

/// Returns the trial's load into the default heap, if it worked.
fn loaded(facts: &Facts) -> Option<&Loaded> {
    facts.trial.heap("memfd")?.outcome.as_ref().ok()
}

fn has_small_pages(facts: &Facts) -> bool {
    loaded(facts).and_then(|loaded| loaded.page_bytes).is_some_and(|bytes| bytes < HUGE_PAGE_BYTES as u64)
}

fn pages(facts: &Facts) -> Option<Advice> {
    if !has_small_pages(facts) {
        return None;
    }
    let (change, command) = match facts.huge_pages.shmem_enabled.as_deref() {
        _ if facts.huge_pages.denied_to_process => (
            "start dmaload from a process that is allowed huge pages (PR_SET_THP_DISABLE is set)".to_owned(),
            "grep THP_enabled /proc/$PPID/status".to_owned(),
        ),
        None => ("boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE".to_owned(), "uname -r".to_owned()),
        Some("never" | "deny") => ("enable 2 MiB pages for memfds".to_owned(), format!("echo advise > {SHMEM_ENABLED}")),
        Some(_) => {
            ("make room for 2 MiB pages: free memory is fragmented".to_owned(), "echo 1 > /proc/sys/vm/compact_memory".to_owned())
        }
    };
    Some(Advice::new(change, command, "loads take about half the time: 1/512 as many pages to allocate, clear and pin"))
}

const CALLS: &str = "io_uring_setup, io_uring_enter and io_uring_register";

fn ring(facts: &Facts) -> Option<Advice> {
    facts.io_uring.setup.err()?;
    let gain = "32 reads in flight from one thread instead of 4 to 32 threads: faster on fast disks, less CPU";
    let (change, command) = allow_ring(facts.cause.as_ref());
    Some(Advice::new(change, command, gain))
}

/// Returns the change that allows io_uring, and the command for this change.
fn allow_ring(cause: Option<&Cause>) -> (String, String) {
    match cause {
        Some(Cause::Sysctl(1)) => {
            ("allow io_uring for this user's group".to_owned(), "sysctl -w kernel.io_uring_group=$(id -g)".to_owned())
        }
        Some(Cause::Sysctl(_)) => ("allow io_uring".to_owned(), "sysctl -w kernel.io_uring_disabled=0".to_owned()),
        Some(Cause::Seccomp) => (
            format!("allow {CALLS} in the container's seccomp profile"),
            "docker run --security-opt seccomp=PROFILE.json …".to_owned(),
        ),
        Some(Cause::Lsm(name)) => {
            let command = match name.as_deref() {
                Some("selinux") => "ausearch -m AVC -ts recent | audit2allow -M io_uring && semodule -i io_uring.pp",
                Some("apparmor") => "journalctl -k -g apparmor=.DENIED",
                _ => "journalctl -k -g denied",
            };
            let name = name.as_deref().unwrap_or("security module's");
            (format!("allow io_uring in the {name} policy"), command.to_owned())
        }
        Some(Cause::Kernel) => ("boot Linux 5.6 or later, built with CONFIG_IO_URING".to_owned(), "uname -r".to_owned()),
        Some(Cause::Memlock) => ("raise the locked memory limit".to_owned(), "ulimit -l unlimited".to_owned()),
        Some(Cause::Unknown) | None => (
            format!("find out what refuses {CALLS}"),
            "strace -fe io_uring_setup,io_uring_enter,io_uring_register dmaload doctor".to_owned(),
        ),
    }
}

fn registering(facts: &Facts) -> Option<Advice> {
    let by_threads = path_file(facts).is_some_and(|file| file.ring_refused.is_some() || file.in_memory);
    if facts.io_uring.setup.is_err() || by_threads || direct_refused(facts).is_some() || memlock_suffices(facts) {
        return None;
    }
    let gain = if has_small_pages(facts) {
        "the route uring-fixed-direct: pages are pinned once per piece, not once per read"
    } else {
        "little on 2 MiB pages: the route uring-fixed-direct instead of uring-direct"
    };
    let (change, command) = match facts.io_uring.register {
        Ok(()) | Err(Errno::ENOMEM) => (
            "raise the locked memory limit (services: LimitMEMLOCK=infinity; or setcap cap_ipc_lock+ep)".to_owned(),
            "ulimit -l unlimited".to_owned(),
        ),
        Err(Errno::EINVAL) => ("boot Linux 5.19 or later (sparse buffer tables)".to_owned(), "uname -r".to_owned()),
        Err(_) => allow_ring(facts.cause.as_ref()),
    };
    Some(Advice::new(change, command, gain))
}

fn heap<'a>(facts: &'a Facts, name: &str) -> Option<&'a HeapTrial> {
    facts.trial.heap(name)
}

/// Returns advice on a device that exists but can't be opened, unless the `udmabuf` heap works.
fn permission(facts: &Facts) -> Option<Advice> {
    if heap(facts, "udmabuf").is_some_and(|heap| heap.outcome.is_ok()) {
        return None;
    }
    let refused = facts.trial.heaps.iter().filter_map(|heap| heap.device.as_ref());
    let (path, errno) = refused
        .filter(|(_, errno)| matches!(*errno, Errno::EACCES | Errno::EPERM))
        .min_by_key(|(path, _)| (path.as_path() != Path::new(Udmabuf::PATH), !path.ends_with("system")))?;
    let path = printable::path(&path);
    Some(Advice::new(
        format!("give this user access to {path} ({}; to make this permanent, add a udev rule)", errno.describe()),
        format!("sudo setfacl -m u:$USER:rw {path}"),
        "load --dma-buf works: drivers can import the memory",
    ))
}

fn device(facts: &Facts) -> Option<Advice> {
    let (_, errno) = heap(facts, "udmabuf")?.device.as_ref()?;
    if !matches!(*errno, Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) {
        return None;
    }
    let others = facts.trial.heaps.iter().any(|heap| heap.name.starts_with(DMA_HEAP) && heap.outcome.is_ok());
    let gain = if others {
        "load --dma-buf without a copy"
    } else {
        "load --dma-buf works without a copy, and drivers can import the memory"
    };
    let lacks_udmabuf = facts.modules.known && !facts.modules.udmabuf;
    if lacks_udmabuf && facts.modules.system_heap && !others {
        let gain = "load --dma-buf works, with one copy, and drivers can import the memory";
        return Some(Advice::new("load the module of the dma-heap named system", "sudo modprobe system_heap", gain));
    }
    let (change, command) = if lacks_udmabuf {
        ("boot a kernel with CONFIG_UDMABUF, or CONFIG_DMABUF_HEAPS_SYSTEM", "uname -r")
    } else {
        (
            "load the module udmabuf (if there is none, boot a kernel with CONFIG_UDMABUF or CONFIG_DMABUF_HEAPS_SYSTEM)",
            "sudo modprobe udmabuf",
        )
    };
    Some(Advice::new(change, command, gain))
}

fn size_limit(facts: &Facts) -> Option<Advice> {
    let limit = heap(facts, "udmabuf").filter(|heap| heap.outcome.is_ok())?.limit_bytes?;
    let wanted = path_file(facts).map_or(MODEL_BYTES, |file| file.bytes);
    (limit < wanted).then(|| {
        Advice::new(
            format!("allow a udmabuf larger than {}", bytes(limit)),
            format!("echo {} > {}/size_limit_mb", wanted.div_ceil(1 << 20), Udmabuf::PARAMETERS),
            "load --dma-buf --layout single can put the whole file in one dma-buf",
        )
    })
}

fn bug(facts: &Facts) -> Option<Advice> {
    let usable = heap(facts, "udmabuf").is_some_and(|heap| heap.outcome.is_ok());
    (usable && facts.udmabuf_bug).then(|| {
        Advice::new(
            "boot Linux 6.16 or later: 6.11 to 6.15 show drivers wrong bytes in a udmabuf on 2 MiB pages",
            "uname -r",
            "load --dma-buf uses 2 MiB pages, so allocating and reading take about half as long",
        )
    })
}

#[cfg(test)]
mod tests {
    use dmaload::probe::{File, IoUring, MemoryAvailable};
    use dmaload::{Attempt, Route};

    use super::*;
    use crate::doctor::facts::PathFacts;
    use crate::doctor::system::Modules;
    use crate::doctor::trial::Step;

    type Change = fn(&mut Facts);

    fn advice_after(changes: &[Change]) -> Vec<Advice> {
        let mut facts = Facts::best();
        changes.iter().for_each(|change| change(&mut facts));
        ranked(&facts)
    }

    fn memfd(facts: &mut Facts) -> &mut Loaded {
        facts.trial.heaps[0].outcome.as_mut().unwrap()
    }

    fn udmabuf(facts: &mut Facts, errno: Errno) {
        facts.trial.heaps[1].outcome = Err("cannot open".to_owned());
        facts.trial.heaps[1].device = Some((Udmabuf::PATH.into(), errno));
    }

    const GIB: u64 = 1 << 30;

    fn path(facts: &mut Facts, bytes: u64, open_direct: Result<(), Errno>) {
        let file = File {
            bytes,
            alignment_bytes: 4096,
            open_direct,
            first_read: Ok(1),
            ring_refused: None,
            buffered_by_ring: false,
            in_memory: false,
        };
        facts.path = Some(PathFacts { path: "m".into(), mount: None, file: Some(file), load: Ok(file.bytes) });
    }

    fn refuse_ring(facts: &mut Facts, attempt: Attempt, errno: Errno) {
        path(facts, GIB, Ok(()));
        facts.path.as_mut().and_then(|path| path.file.as_mut()).unwrap().ring_refused = Some((attempt, errno));
    }

    const LITTLE: Change = |facts| facts.memory = Some(MemoryAvailable { bytes: 100 << 20, limit: "MemAvailable".to_owned() });
    const BUFFERED: Change = |facts| path(facts, GIB, Err(Errno::EINVAL));
    const ON_FUSE: Change = |facts| refuse_ring(facts, Attempt::RingOnFuse, Errno::EOPNOTSUPP);
    const ON_NETWORK_DEVICE: Change = |facts| refuse_ring(facts, Attempt::RingOnDevice, Errno::EOPNOTSUPP);
    const ON_UNKNOWN_DEVICE: Change = |facts| refuse_ring(facts, Attempt::RingOnDevice, Errno::ENOENT);
    const SMALL_PAGES: Change = |facts| memfd(facts).page_bytes = Some(4096);
    const NO_RING: Change = |facts| {
        let no = Err(Errno::EPERM);
        facts.io_uring =
            IoUring { setup: no, deferred_task_run: no, buffer_table: no, file_table: no, register: no, registrable_bytes: 0 };
        facts.cause = Some(Cause::Sysctl(2));
    };
    const SMALL_MEMLOCK: Change = |facts| {
        facts.memlock.soft_bytes = Some(8 << 20);
        facts.memlock.cap_ipc_lock = false;
        facts.io_uring.register = Err(Errno::ENOMEM);
        facts.io_uring.registrable_bytes = 8 << 20;
    };
    const NO_RIGHT: Change = |facts| udmabuf(facts, Errno::EACCES);
    const NO_DEVICE: Change = |facts| udmabuf(facts, Errno::ENOENT);
    const ONLY_HEAP_IS_A_MODULE: Change = |facts| {
        udmabuf(facts, Errno::ENOENT);
        facts.modules = Modules { udmabuf: false, system_heap: true, known: true };
    };
    const NO_MODULE: Change = |facts| {
        udmabuf(facts, Errno::ENOENT);
        facts.modules = Modules { udmabuf: false, system_heap: false, known: true };
    };
    const SMALL_UDMABUFS: Change = |facts| facts.trial.heaps[1].limit_bytes = Some(64 << 20);
    const BUG: Change = |facts| facts.udmabuf_bug = true;

    #[test]
    fn each_problem_has_advice_and_the_best_machine_has_none() {
        assert_eq!(advice_after(&[]), []);
        for (change, command) in [
            (LITTLE, "ps -eo rss"),
            (BUFFERED, "findmnt"),
            (ON_FUSE, "findmnt"),
            (ON_NETWORK_DEVICE, "lsblk"),
            (ON_UNKNOWN_DEVICE, "losetup"),
            (SMALL_PAGES, "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            (NO_RING, "sysctl -w kernel.io_uring_disabled=0"),
            (SMALL_MEMLOCK, "ulimit -l unlimited"),
            (NO_RIGHT, "sudo setfacl -m u:$USER:rw /dev/udmabuf"),
            (NO_DEVICE, "sudo modprobe udmabuf"),
            (ONLY_HEAP_IS_A_MODULE, "sudo modprobe system_heap"),
            (NO_MODULE, "uname -r"),
            (SMALL_UDMABUFS, "echo 1024 > /sys/module/udmabuf/parameters/size_limit_mb"),
            (BUG, "uname -r"),
        ] {
            let advice = advice_after(&[change]);
            assert_eq!(advice.len(), 1, "{command}: {advice:#?}");
            assert!(advice[0].command.contains(command), "{command}: {advice:#?}");
        }
    }

    #[test]
    fn refused_block_device_is_not_blamed_on_its_file_system() {
        for (change, start) in
            [(ON_NETWORK_DEVICE, "keep models on a local disk: "), (ON_UNKNOWN_DEVICE, "mount sysfs at /sys, ")]
        {
            let advice = advice_after(&[change]);
            assert!(advice[0].change.starts_with(start) && !advice[0].change.contains("ext4"), "{advice:#?}");
        }
        assert!(advice_after(&[ON_FUSE])[0].change.contains("ext4"));
    }

    #[test]
    fn largest_gain_comes_first() {
        let commands = |advice: Vec<Advice>| advice.into_iter().map(|advice| advice.command).collect::<Vec<_>>();
        let all = commands(advice_after(&[BUFFERED, LITTLE, SMALL_PAGES, NO_RING, NO_DEVICE, SMALL_MEMLOCK]));
        let order = ["ps ", "findmnt", "echo advise", "sysctl", "sudo modprobe"];
        // Without direct reads, registered memory gains nothing.
        assert_eq!(all.len(), order.len(), "{all:#?}");
        assert!(all.iter().zip(order).all(|(command, start)| command.starts_with(start)), "{all:#?}");
        let others = commands(advice_after(&[SMALL_UDMABUFS, BUG, SMALL_MEMLOCK]));
        assert_eq!(others[0], "ulimit -l unlimited");
        assert_eq!(others.len(), 3, "{others:#?}");
    }

    #[test]
    fn small_memlock_limit_matters_little_on_huge_pages() {
        assert!(advice_after(&[SMALL_MEMLOCK])[0].gain.starts_with("little"));
        let both = advice_after(&[SMALL_PAGES, SMALL_MEMLOCK]);
        assert!(!both[1].gain.contains("little"), "{both:#?}");
        // The limit does not affect a file that is smaller than the limit.
        assert_eq!(advice_after(&[SMALL_MEMLOCK, |facts| path(facts, 4 << 20, Ok(()))]), []);
        // The limit does not affect a file that io_uring can't read, either.
        assert_eq!(advice_after(&[SMALL_MEMLOCK, ON_FUSE]).len(), 1);
    }

    #[test]
    fn refused_registration_is_not_blamed_on_the_limit() {
        let advice = advice_after(&[|facts| {
            facts.io_uring.register = Err(Errno::EPERM);
            facts.io_uring.registrable_bytes = 0;
            facts.cause = Some(Cause::Seccomp);
        }]);
        assert!(advice[0].change.contains("seccomp"), "{advice:#?}");
    }

    #[test]
    fn enabled_huge_pages_need_unfragmented_memory() {
        let advice = advice_after(&[SMALL_PAGES, |facts| facts.huge_pages.shmem_enabled = Some("advise".to_owned())]);
        assert!(advice[0].command.contains("compact_memory"), "{advice:#?}");
        let advice = advice_after(&[SMALL_PAGES, |facts| facts.huge_pages.denied_to_process = true]);
        assert!(advice[0].change.contains("PR_SET_THP_DISABLE"), "{advice:#?}");
    }

    #[test]
    fn file_that_does_not_fit_comes_first() {
        let advice = advice_after(&[SMALL_PAGES, |facts| path(facts, 1 << 50, Ok(()))]);
        assert!(advice[0].change.starts_with("free "), "{advice:#?}");
    }

    #[test]
    fn without_a_path_advice_uses_the_trial_files_o_direct_error() {
        let advice = advice_after(&[|facts| {
            let (from, to, reason) = (Route::UringFixedDirect, Route::Buffered, String::new());
            memfd(facts).steps = vec![Step { from, to, attempt: Attempt::OpenDirect, reason, errno: Errno::EINVAL }];
        }]);
        assert!(advice[0].change.contains("EINVAL"), "{advice:#?}");
    }
}
