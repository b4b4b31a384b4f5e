//! Tests for loads into dma-bufs that fail because of missing permissions, an unknown heap, too
//! little memory or a bad sector. Errors must say what failed, and all memory and descriptors must
//! be released.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]
#![allow(clippy::unwrap_used, reason = "a failure here should fail the test")]

mod common;

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{
    LARGE, MIB, assert_descriptors_are_closed, assert_dma_bufs, assert_memory_is_released, assert_same, available_bytes,
    block_on, file, heap, load, original, settle_descriptors, shut_down, sparse_file,
};
use dmaload::{Cache, Errno, Error, Layout, LoadOptions, Loader, Route};
use dmaload_guest::{BadDisk, SECTOR, bad_bytes, record_row, run_dmaload};

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn assert_fails(output: &Output, words: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
}

#[test]
fn devices_without_permission_are_reported_with_their_mode() {
    let path = file(4097);
    let as_nobody = |arguments: &[&str]| {
        let path = path.to_str().unwrap();
        Command::new("/bin/dmaload").arg("load").arg(path).args(arguments).uid(65534).gid(65534).output().unwrap()
    };
    assert_fails(&as_nobody(&["--heap", "udmabuf"]), &["/dev/udmabuf", "EACCES", "mode is 0600", "owner 0", "setfacl"]);
    assert_fails(&as_nobody(&["--heap", "dma-heap:system"]), &["/dev/dma_heap/system", "EACCES", "mode is 0600"]);
    // `--dma-buf` does not silently fall back to a memfd.
    assert_fails(
        &as_nobody(&["--dma-buf"]),
        &["no heap on this machine provides dma-bufs", "udmabuf: ", "dma-heap:system: ", "EACCES", "doctor"],
    );
    assert!(as_nobody(&[]).status.success(), "a load into a memfd must not need permission for a device");
}

#[test]
fn error_of_an_unknown_heap_lists_the_known_ones() {
    let path = file(4097);
    let output = run_dmaload(&["load", "--heap", "dma-heap:nope", path.to_str().unwrap()]);
    assert_fails(&output, &["/dev/dma_heap/nope", "ENOENT", "available heaps", "system"]);
    let output = run_dmaload(&["load", "--heap", "dma-heap:../udmabuf", path.to_str().unwrap()]);
    assert_fails(&output, &["EINVAL", "by its name, not by a path"]);
}

/// If the system heap were asked for too much memory, it would invoke the OOM killer instead of
/// failing.
#[test]
fn heap_is_never_asked_for_more_than_the_machine_has() {
    let path = sparse_file("too-large.bin", 8 << 30);
    assert_memory_is_released(|| {
        for heap in ["dma-heap:system", "udmabuf"] {
            for layout in ["segmented", "single"] {
                let output = run_dmaload(&["load", "--heap", heap, "--layout", layout, path.to_str().unwrap()]);
                // The available memory is checked before udmabuf's size limit, which the layout
                // `single` would exceed.
                assert_fails(&output, &["8589934592 more bytes are needed", "MemAvailable"]);
            }
        }
    });
    std::fs::remove_file(path).unwrap();
}

/// The consumer of a stream keeps all segments, until memory runs out.
#[test]
fn load_that_runs_out_of_memory_releases_everything() {
    let path = sparse_file("half-way.bin", 3 << 30);
    for name in ["dma-heap:system", "udmabuf"] {
        let descriptors = settle_descriptors();
        assert_memory_is_released(|| run_out_of_memory(name, &path));
        assert_descriptors_are_closed(descriptors);
        record_row("faults", &[name, "memory runs out in mid-load", "OutOfMemory; all memory is released"]);
    }
    std::fs::remove_file(path).unwrap();
}

fn run_out_of_memory(name: &str, path: &Path) {
    let loader = Loader::builder().heap(heap(name)).build().unwrap();
    let mut kept = Vec::new();
    let error = block_on(async {
        let mut segments = loader.load(path).segments();
        loop {
            match segments.next().await {
                Some(Ok(segment)) => kept.push(segment),
                Some(Err(error)) => return error,
                None => panic!("{name}: a load of 3 GiB succeeded"),
            }
        }
    });
    assert!(matches!(&error, Error::OutOfMemory { limit, .. } if limit.contains("MemAvailable")), "{name}: {error}");
    let loaded: usize = kept.iter().map(dmaload::Segment::len).sum();
    assert!(loaded > 256 * MIB, "{name}: only {loaded} bytes were loaded before memory ran out");
    drop(kept);
    // The loader can still load another file.
    let image = load(&loader, &file(4097), loader.load_options()).unwrap();
    assert_dma_bufs(image.segments(), &original()[..4097], name);
    drop(image);
    shut_down(loader);
}

#[test]
fn dropped_loads_release_everything() {
    file(64 * MIB);
    for name in ["dma-heap:system", "udmabuf"] {
        let descriptors = settle_descriptors();
        assert_memory_is_released(|| drop_loads(name));
        assert_descriptors_are_closed(descriptors);
    }
}

fn drop_loads(name: &str) {
    let loader = Loader::builder().heap(heap(name)).load_options(LoadOptions::new().segment_bytes(8 << 20)).build().unwrap();
    for round in 0..20 {
        let mut load = loader.load(file(64 * MIB)).start();
        let segment = block_on(async { if round % 2 == 0 { load.next().await } else { None } });
        drop(load);
        if let Some(segment) = segment {
            assert_dma_bufs(&[segment.unwrap()], &original()[..8 * MIB], name);
        }
    }
    shut_down(loader);
}

/// Loads a file with a bad sector into every heap through every route. Asserts that the load fails
/// with an error that names the offset of the failed read, that the segments before the bad sector
/// have the right bytes, and that the next load succeeds.
fn assert_bad_sector_fails_the_load(disk: &BadDisk, how: &str) {
    let (expected, bad) = (bad_bytes(), disk.offset);
    for name in ["memfd", "udmabuf", "dma-heap:system"] {
        for route in Route::ALL {
            // Each route needs a new loader, because a loader remembers which routes were refused.
            let loader = Loader::builder()
                .heap(heap(name))
                .load_options(LoadOptions::new().segment_bytes(2 << 20))
                .window_bytes(4 << 20)
                .build()
                .unwrap();
            let what = format!("{name}, {route}");
            let mut segments =
                loader.load(&disk.file).options(loader.load_options().route(route).cache(Cache::Bypass)).segments();
            let (seen, error) = block_on(async {
                let mut seen = 0;
                loop {
                    match segments.next().await {
                        Some(Ok(segment)) => {
                            let range = segment.file_range();
                            assert!(
                                range.end <= bad || bad + SECTOR as u64 <= range.start,
                                "{what}: the bad sector must not be in {range:?}"
                            );
                            let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                            assert_same(&segment.bytes().unwrap(), &expected[range], &what);
                            seen += 1;
                        }
                        Some(Err(error)) => return (seen, error),
                        None => panic!("{what}: the load of a file with a bad sector succeeded"),
                    }
                }
            });
            // For a read through the page cache, the kernel reports every error as EIO.
            let errno = if route.is_direct() { Errno::from_raw_os_error(disk.errno) } else { Errno::EIO };
            let Error::Read { path, offset, bytes, errno: reported, .. } = &error else { panic!("{what}: {error}") };
            assert_eq!((path, *reported), (&disk.file, errno), "{what}: {error}");
            assert!((*offset..offset + bytes).contains(&bad), "{what}: {error}");
            assert!(error.hint().unwrap().contains("storage"), "{what}");
            // Segments are yielded in order, so none after the bad sector may have been yielded.
            assert!(seen <= bad / (2 << 20), "{what}: {seen} segments");
            let image = load(&loader, &file(4 * MIB), loader.load_options().cache(Cache::Bypass)).unwrap();
            for (segment, part) in image.segments().iter().zip(original()[..4 * MIB].chunks(2 * MIB)) {
                assert_same(&segment.bytes().unwrap(), part, &what);
            }
            shut_down(loader);
        }
        record_row("faults", &[name, how, "the load fails with file, offset and errno by every route; the next one works"]);
    }
}

#[test]
fn bad_sector_under_nvme_fails_the_load_with_enodata() {
    assert_bad_sector_fails_the_load(&BadDisk::nvme(), "a bad sector under nvme (ENODATA)");
}

#[test]
fn bad_sector_under_virtio_fails_the_load_with_eio() {
    assert_bad_sector_fails_the_load(&BadDisk::virtio(), "a bad sector under virtio-blk (EIO)");
}

#[test]
fn command_names_file_and_offset_of_a_bad_sector() {
    let disk = BadDisk::nvme();
    let path = disk.file.to_str().unwrap();
    let output = run_dmaload(&["load", "--dma-buf", "--layout", "single", path]);
    assert_fails(&output, &[path, "ENODATA", "at offset", "dmesg"]);
    assert!(output.stdout.is_empty());
}

/// A memory cgroup (cgroup v2). Dropping this value removes the group.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(parent: &Path, name: &str, limits: &[(&str, usize)]) -> Self {
        let group = MemoryGroup(parent.join(name));
        std::fs::create_dir(&group.0).unwrap();
        for (file, bytes) in limits {
            std::fs::write(group.0.join(file), bytes.to_string()).unwrap();
        }
        group
    }

    fn load(&self, options: &[&str], path: &Path) -> Command {
        let script = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", self.0.display());
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script, "sh", "/bin/dmaload", "load"]).args(options).arg(path);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Asserts that the OOM killer has not killed any process in the group.
    #[track_caller]
    fn assert_none_was_killed(&self) {
        let events = std::fs::read_to_string(self.0.join("memory.events")).unwrap();
        assert!(events.lines().any(|line| line == "oom_kill 0"), "{events}");
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

const GROUPS: &str = "/sys/fs/cgroup";

/// The kernel enforces `memory.max` with SIGKILL, and `memory.high` by slowing the load to a
/// crawl. The lowest limit of a group and its ancestors applies.
#[test]
fn load_above_a_cgroup_v2_limit_fails_before_allocating() {
    let (large, small) = (sparse_file("above-the-limit.bin", 200 << 20), file(20 * MIB));
    for (above, own, limit) in [
        (&[][..], &[("memory.max", 120 * MIB)][..], "limit/own/memory.max is 125829120"),
        (&[], &[("memory.high", 120 * MIB), ("memory.max", 400 * MIB)], "limit/own/memory.high is 125829120"),
        (&[("memory.max", 120 * MIB)], &[], "limit/memory.max is 125829120"),
        (&[("memory.high", 120 * MIB)], &[("memory.max", 400 * MIB)], "limit/memory.high is 125829120"),
    ] {
        let outer = MemoryGroup::new(Path::new(GROUPS), "limit", above);
        std::fs::write(outer.0.join("cgroup.subtree_control"), "+memory").unwrap();
        let group = MemoryGroup::new(&outer.0, "own", own);
        for heap in ["memfd", "udmabuf"] {
            assert_fails(&group.load(&["--heap", heap], &large).output().unwrap(), &["more bytes are needed", limit]);
            let output = group.load(&["--heap", heap], &small).output().unwrap();
            assert!(output.status.success(), "{limit}: {}", stderr(&output));
        }
        group.assert_none_was_killed();
    }
    // Memory that is used by another process in the group is not available.
    let group = MemoryGroup::new(Path::new(GROUPS), "limit", &[("memory.max", 200 * MIB)]);
    let path = file(64 * MIB);
    let mut holder = group.load(&["--quiet"], &path);
    let mut holder = holder.args(["--exec", "sh", "-c", "echo held; read -r line"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(holder.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    let larger = sparse_file("beside-another.bin", 120 << 20);
    assert_fails(&group.load(&[], &larger).output().unwrap(), &["more bytes are needed", "limit/memory.max is 209715200"]);
    drop(holder.stdin.take());
    holder.wait().unwrap();
    let output = group.load(&[], &larger).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    group.assert_none_was_killed();
    std::fs::remove_file(larger).unwrap();
    std::fs::remove_file(large).unwrap();
}

/// Each load fits into the cgroup on its own, but all of them together do not.
#[test]
fn concurrent_loads_in_a_cgroup_v2_fail_without_being_killed() {
    let paths = [120_u64, 150, 180, 200].map(|mib| sparse_file(&format!("{mib}-mib.bin"), mib << 20));
    let (mut succeeded, mut failed) = (0, 0);
    for options in [&["--heap", "memfd"][..], &["--heap", "udmabuf"], &["--heap", "anon", "--segment-size", "2MiB"]] {
        let group = MemoryGroup::new(Path::new(GROUPS), "at-once", &[("memory.max", 300 * MIB)]);
        let running: Vec<_> = paths.iter().map(|path| group.load(options, path).spawn().unwrap()).collect();
        let done: Vec<_> = running.into_iter().map(|load| load.wait_with_output().unwrap()).collect();
        group.assert_none_was_killed();
        for output in &done {
            if output.status.success() {
                succeeded += 1;
            } else {
                assert_fails(output, &["more bytes are needed", "at-once/memory.max is 314572800"]);
                failed += 1;
            }
        }
    }
    assert!(succeeded > 0 && failed > 0, "{succeeded} loads succeeded, {failed} failed");
    // Each file can be loaded on its own.
    let group = MemoryGroup::new(Path::new(GROUPS), "at-once", &[("memory.max", 300 * MIB)]);
    for path in &paths {
        let output = group.load(&[], path).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        std::fs::remove_file(path).unwrap();
    }
    group.assert_none_was_killed();
    record_row(
        "faults",
        &[
            "memfd, udmabuf, anon",
            "four loads in a cgroup with room for one or two",
            "loads without room fail and say how much is missing; none is killed",
        ],
    );
}

#[test]
fn dma_buf_of_the_system_heap_takes_its_size_and_is_freed() {
    assert_memory_is_released(|| {
        let before = available_bytes();
        let loader = Loader::builder()
            .heap(heap("dma-heap:system"))
            .load_options(LoadOptions::new().layout(Layout::Single))
            .build()
            .unwrap();
        for _ in 0..3 {
            let image = load(&loader, &file(LARGE), loader.load_options()).unwrap();
            let taken = before.saturating_sub(available_bytes());
            assert!(taken < 2 * LARGE as u64, "a dma-buf of {LARGE} bytes used {taken} bytes of memory");
            drop(image);
        }
        shut_down(loader);
    });
}

/// Either of two loads fits into memory alone, but the two together do not.
#[test]
fn concurrent_loads_do_not_invoke_the_oom_killer() {
    let before = count_oom_kills();
    assert_memory_is_released(fill_memory);
    assert_eq!(count_oom_kills(), before, "the OOM killer has killed a process");
    record_row(
        "faults",
        &[
            "dma-heap:system",
            "two loads, each of 60 % of the memory",
            "each succeeds or fails with OutOfMemory; no process is killed",
        ],
    );
}

/// Returns how many processes the OOM killer has killed since the machine started.
fn count_oom_kills() -> u64 {
    let counters = std::fs::read_to_string("/proc/vmstat").unwrap();
    counters.lines().find_map(|line| line.strip_prefix("oom_kill ")).unwrap().parse().unwrap()
}

fn fill_memory() {
    let path = sparse_file("most.bin", available_bytes() / 10 * 6);
    let loader =
        Loader::builder().heap(heap("dma-heap:system")).load_options(LoadOptions::new().layout(Layout::Single)).build().unwrap();
    let (first, second) = block_on(async {
        let (first, second) = (loader.load(&path).start(), loader.load(&path).start());
        (first.finish().await.map(drop), second.finish().await.map(drop))
    });
    for outcome in [&first, &second] {
        assert!(matches!(outcome, Ok(()) | Err(Error::OutOfMemory { .. })), "{outcome:?}");
    }
    shut_down(loader);
    // This loader uses segments of 1 GiB, several of which fit into its window of 3 GiB.
    let loader = Loader::builder()
        .heap(heap("dma-heap:system"))
        .load_options(LoadOptions::new().segment_bytes(1 << 30))
        .window_bytes(3 << 30)
        .build()
        .unwrap();
    let path = sparse_file("half-way.bin", 6 << 30);
    let error = block_on(async {
        let mut segments = loader.load(&path).segments();
        let mut kept = Vec::new();
        loop {
            match segments.next().await {
                Some(Ok(segment)) => kept.push(segment),
                Some(Err(error)) => return error,
                None => panic!("a load of 6 GiB succeeded"),
            }
        }
    });
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    shut_down(loader);
    for name in ["most.bin", "half-way.bin"] {
        std::fs::remove_file(common::disk().join(name)).unwrap();
    }
}

/// Segment sizes are usually multiples of 2 MiB, but if udmabuf's size limit is 1 MiB, segments
/// are 1 MiB. If the limit is 0, a load into udmabufs fails, and `--dma-buf` uses the system heap.
#[test]
fn low_size_limit_leads_to_smaller_segments_or_another_heap() {
    let path = file(4 * MIB);
    let lowered = common::SizeLimit::set_mib(1);
    let loader = Loader::builder().dma_buf(true).build().unwrap();
    let image = load(&loader, &path, loader.load_options()).unwrap();
    assert_eq!((image.report().heap.as_str(), image.segments()[0].len()), ("udmabuf", MIB));
    assert_dma_bufs(image.segments(), &original()[..4 * MIB], "segments of 1 MiB");
    shut_down(loader);
    drop(lowered);
    let _lowered = common::SizeLimit::set_mib(0);
    let output = run_dmaload(&["load", "--heap", "udmabuf", path.to_str().unwrap()]);
    assert_fails(&output, &["make a udmabuf", "EINVAL", "size_limit_mb"]);
    let output = run_dmaload(&["load", "--dma-buf", path.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("dma-heap:system") && text.contains("EINVAL"), "{text}{}", stderr(&output));
}
