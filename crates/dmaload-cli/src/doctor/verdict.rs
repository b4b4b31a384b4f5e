//! Works out what a load would do, given the facts.

use dmaload::{Attempt, Errno, LoadOptions, LoaderBuilder, Route, Way, probe};
use dmaload_text::bytes;

use super::facts::Facts;
use super::trial::Loaded;

/// The default window. It limits how much memory loads with the default options register for
/// pieces at the same time. Staging buffers are registered in addition, and are not included here.
const REGISTERED_BYTES_MAX: u64 = LoaderBuilder::WINDOW_BYTES;
/// The default segment size; each segment is a memfd.
const SEGMENT_BYTES: u64 = LoadOptions::SEGMENT_BYTES;

/// A reason begins with these words if doctor could not determine whether a load would work.
pub(crate) const UNKNOWN: &str = "doctor can't tell";

/// Returns whether a load would work, for JSON; `None` if doctor could not determine it.
pub(crate) fn works<T>(verdict: &Result<T, String>) -> Option<bool> {
    match verdict {
        Ok(_) => Some(true),
        Err(reason) if reason.starts_with(UNKNOWN) => None,
        Err(_) => Some(false),
    }
}

/// The expected outcome of a load that works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) route: Route,
    pub(crate) page_bytes: Option<u64>,
    /// Why the route differs from the one that the trial used.
    pub(crate) because: Option<String>,
    /// The ways of reading that the load measures on successive ranges of the file to choose the
    /// fastest. Empty if the load does not measure.
    pub(crate) measured: Vec<Way>,
}

/// Returns what `dmaload load` would do with the path, or with a large file if no path is given;
/// or why it would fail.
pub(crate) fn load(facts: &Facts) -> Result<Expected, String> {
    on_heap(facts, "memfd")
}

/// Like [`load`], for `dmaload load --dma-buf`.
pub(crate) fn load_dma_buf(facts: &Facts) -> Result<Expected, String> {
    match &facts.dma_buf.heap {
        Some(heap) => on_heap(facts, heap),
        None if facts.dma_buf.reason.contains("EMFILE") => Err(format!("{UNKNOWN}: {}", facts.dma_buf.reason)),
        None => Err(facts.dma_buf.reason.clone()),
    }
}

fn on_heap(facts: &Facts, heap: &str) -> Result<Expected, String> {
    // Checked before the trial's result: the trial may run out of descriptors, which says nothing
    // about the path.
    if let Some(Err(reason)) = facts.path.as_ref().map(|path| &path.load) {
        return Err(reason.clone());
    }
    let tried = facts.trial.heap(heap).ok_or_else(|| format!("{heap} was not tried"))?;
    let loaded = tried.outcome.as_ref().map_err(|reason| match reason.contains("EMFILE") {
        // The trial file and other open files use descriptors that a load does not need.
        true => {
            format!("{UNKNOWN}: the trial of `doctor` needs more open files than the limit (ulimit -n) allows: {heap}: {reason}")
        }
        false => format!("{heap}: {reason}"),
    })?;
    let segment_bytes = path_file(facts).map_or(SEGMENT_BYTES, |file| file.bytes.min(SEGMENT_BYTES));
    if let Some(limit) = facts.file_size_limit.filter(|&limit| limit < segment_bytes && matches!(heap, "memfd" | "udmabuf")) {
        return Err(format!("the file size limit (ulimit -f) is {}, and also applies to memfds", bytes(limit)));
    }
    if let Some(errno) = path_file(facts).and_then(probe::File::unreadable) {
        return Err(format!("cannot read the file's first block: {}", errno.describe()));
    }
    if let (Some(room), Some(wanted)) = (facts.address_room, wanted_bytes(facts))
        && wanted > room
    {
        let (wanted, room) = (bytes(wanted), bytes(room));
        return Err(format!("{wanted} does not fit into the {room} that the address space limit (ulimit -v) leaves"));
    }
    if let Some((wanted, memory)) = too_large(facts) {
        return Err(format!("{} does not fit into the {} available ({})", bytes(wanted), bytes(memory.bytes), memory.limit));
    }
    // A dma-heap populates memory while allocating it, so memory is always populated before it is
    // read into, and the load does not measure.
    let is_allocated_at_once = heap.starts_with("dma-heap");
    Ok(Expected { measured: if is_allocated_at_once { Vec::new() } else { measured(facts) }, ..expected(facts, loaded) })
}

fn expected(facts: &Facts, loaded: &Loaded) -> Expected {
    let (mut route, mut because) = (loaded.route, None);
    if let Some(errno) = path_file(facts).and_then(probe::File::direct_refused) {
        route = Route::Buffered;
        because = Some(format!("the file system refuses O_DIRECT: {}", errno.describe()));
    } else if let Some((attempt, errno)) =
        path_file(facts).and_then(|file| file.ring_refused).filter(|_| route <= Route::PreadDirect)
    {
        route = Route::PreadDirect;
        because = Some(format!("{attempt} is never tried: {}", attempt.hint(errno).unwrap_or_default()));
    } else if path_file(facts).is_some_and(|file| file.in_memory) && route <= Route::PreadDirect {
        route = Route::PreadDirect;
        because =
            Some("the file is in memory, so a direct read is a copy, and several threads copy faster than one ring".to_owned());
    } else if route == Route::UringFixedDirect && !memlock_suffices(facts) {
        route = Route::UringDirect;
        because = Some("the locked memory limit is too low for uring-fixed-direct".to_owned());
    }
    Expected { route, page_bytes: loaded.page_bytes.map(|bytes| pages_of(facts, bytes)), because, measured: Vec::new() }
}

/// Returns the page size that a load of the path would get. This is `page_bytes`, the page size of
/// the trial, unless the file is smaller than such a page.
fn pages_of(facts: &Facts, page_bytes: u64) -> u64 {
    let small = dmabuf::page_bytes() as u64;
    let is_smaller = path_file(facts).is_some_and(|file| file.bytes.next_multiple_of(small) < page_bytes);
    if is_smaller { small } else { page_bytes }
}

fn measured(facts: &Facts) -> Vec<Way> {
    let Some(file) = path_file(facts) else { return Vec::new() };
    // The threshold applies to the memory, which consists of whole blocks.
    let measures = |bytes: u64| bytes.next_multiple_of(file.alignment_bytes) >= probe::MEASURED_BYTES_MIN;
    if file.in_memory || !wanted_bytes(facts).is_some_and(measures) {
        return Vec::new();
    }
    [Way::Direct, Way::Staged].into_iter().chain(file.buffered_by_ring.then_some(Way::Buffered)).collect()
}

/// The file at the path; `None` without a path, or for a folder.
pub(crate) fn path_file(facts: &Facts) -> Option<&probe::File> {
    facts.path.as_ref()?.file.as_ref()
}

/// Returns how many bytes of memory are needed and how many are available, if the model at the
/// path does not fit.
pub(crate) fn too_large(facts: &Facts) -> Option<(u64, &probe::MemoryAvailable)> {
    let (wanted, memory) = (wanted_bytes(facts)?, facts.memory.as_ref()?);
    (wanted > memory.bytes).then_some((wanted, memory))
}

/// Returns the number of bytes that a load of the path would read; for a model that can't be
/// loaded, the length of the given file.
fn wanted_bytes(facts: &Facts) -> Option<u64> {
    let path = facts.path.as_ref()?;
    let named = || path.file.as_ref().map(|file| file.bytes);
    path.load.as_ref().ok().copied().or_else(named)
}

/// Returns whether a load can register as much memory at once as it needs: the whole file, or the
/// window if the file is larger or no file is given. The trial file is too small to show this.
pub(crate) fn memlock_suffices(facts: &Facts) -> bool {
    let wanted = path_file(facts).map_or(REGISTERED_BYTES_MAX, |file| file.bytes.min(REGISTERED_BYTES_MAX));
    let allowed = facts.memlock.cap_ipc_lock || facts.memlock.soft_bytes.is_none_or(|limit| wanted <= limit);
    allowed && facts.io_uring.registrable_bytes >= wanted.min(probe::PIECE_BYTES_MAX)
}

/// Returns why direct reads are refused, for the given file or, if there is none, for the trial
/// file.
pub(crate) fn direct_refused(facts: &Facts) -> Option<Errno> {
    if let Some(file) = path_file(facts) {
        return file.direct_refused();
    }
    let loaded = facts.trial.heap("memfd")?.outcome.as_ref().ok()?;
    let refused = loaded
        .steps
        .iter()
        .find(|step| step.to == Route::Buffered && matches!(step.attempt, Attempt::OpenDirect | Attempt::Read));
    refused.map(|step| step.errno)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::facts::PathFacts;

    fn facts_about(file: probe::File) -> Facts {
        let path = PathFacts { path: "m".into(), mount: None, file: Some(file), load: Ok(file.bytes) };
        Facts { path: Some(path), ..Facts::best() }
    }

    const FILE: probe::File = probe::File {
        bytes: 1 << 30,
        alignment_bytes: 4096,
        open_direct: Ok(()),
        first_read: Ok(4096),
        ring_refused: None,
        buffered_by_ring: false,
        in_memory: false,
    };
    const ON_FUSE: Option<(Attempt, Errno)> = Some((Attempt::RingOnFuse, Errno::EOPNOTSUPP));

    #[test]
    fn route_is_that_of_the_trial_unless_the_file_refuses_it() {
        let route = |file| load(&facts_about(file)).map(|expected| expected.route);
        assert_eq!(route(FILE), Ok(Route::UringFixedDirect));
        assert_eq!(route(probe::File { open_direct: Err(Errno::EINVAL), ..FILE }), Ok(Route::Buffered));
        assert_eq!(route(probe::File { first_read: Err(Errno::EINVAL), ..FILE }), Ok(Route::Buffered));
        assert_eq!(route(probe::File { ring_refused: ON_FUSE, ..FILE }), Ok(Route::PreadDirect));
        assert_eq!(route(probe::File { ring_refused: ON_FUSE, open_direct: Err(Errno::EINVAL), ..FILE }), Ok(Route::Buffered));
        assert_eq!(route(probe::File { in_memory: true, ..FILE }), Ok(Route::PreadDirect));
        assert!(route(probe::File { first_read: Err(Errno::EIO), ..FILE }).unwrap_err().contains("EIO"));
        assert!(route(probe::File { bytes: 1 << 50, ..FILE }).unwrap_err().contains("does not fit"));
    }

    #[test]
    fn hint_on_a_refused_device_depends_on_its_errno() {
        for (errno, words) in [(Errno::EOPNOTSUPP, "keep models on a local disk"), (Errno::ENOENT, "mount sysfs at /sys")] {
            let file = probe::File { ring_refused: Some((Attempt::RingOnDevice, errno)), ..FILE };
            let because = load(&facts_about(file)).unwrap().because.unwrap();
            assert!(because.contains(words), "{because}");
        }
    }

    #[test]
    fn files_smaller_than_a_huge_page_get_small_pages() {
        let pages = |bytes| load(&facts_about(probe::File { bytes, ..FILE })).unwrap().page_bytes;
        assert_eq!([1, (2 << 20) - 4096, (2 << 20) - 1, 1 << 30].map(pages), [4096, 4096, 2 << 20, 2 << 20].map(Some));
    }

    #[test]
    fn large_network_files_also_measure_buffered_reads() {
        let measured = |file| load(&facts_about(file)).unwrap().measured;
        assert_eq!(measured(FILE), [Way::Direct, Way::Staged]);
        assert_eq!(measured(probe::File { bytes: probe::MEASURED_BYTES_MIN - 4096, ..FILE }), []);
        assert_eq!(measured(probe::File { in_memory: true, ..FILE }), []);
        let on_nfs =
            probe::File { ring_refused: Some((Attempt::RingOnOther, Errno::EOPNOTSUPP)), buffered_by_ring: true, ..FILE };
        assert_eq!(measured(on_nfs), [Way::Direct, Way::Staged, Way::Buffered]);
    }

    #[test]
    fn small_memlock_limit_affects_only_large_files() {
        let route = |bytes| {
            let mut facts = facts_about(probe::File { bytes, ..FILE });
            facts.memlock.cap_ipc_lock = false;
            facts.io_uring.registrable_bytes = 8 << 20;
            load(&facts).unwrap().route
        };
        assert_eq!(
            [4 << 20, 8 << 20, 9 << 20].map(route),
            [Route::UringFixedDirect, Route::UringFixedDirect, Route::UringDirect]
        );
    }

    #[test]
    fn without_a_successful_trial_no_load_works() {
        let mut facts = Facts::best();
        facts.trial.heaps[0].outcome = Err("refused".to_owned());
        assert_eq!(load(&facts), Err("memfd: refused".to_owned()));
        // The trial of the other heap succeeded.
        assert!(load_dma_buf(&facts).is_ok());
        let limited = Facts { file_size_limit: Some(1 << 20), ..Facts::best() };
        assert!(load(&limited).unwrap_err().contains("ulimit -f"));
        assert!(load(&Facts { file_size_limit: Some(64 << 20), ..Facts::best() }).is_ok());
    }
}
