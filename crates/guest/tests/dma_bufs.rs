//! Tests that dma-bufs contain the file's bytes, for every heap, layout, route and size. Other
//! tests share the dma-bufs, hand them out, or let another process inherit them. To read the
//! bytes, the tests map the dma-bufs.
#![allow(clippy::unwrap_used, reason = "a failure here should fail the test")]

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

use common::{
    LARGE, MIB, SizeLimit, assert_dma_bufs, assert_same, block_on, disk, file, format_sizes, heap, load, original, shut_down,
    with_mapping,
};
use dmabuf::Pages;
use dmaload::heap::FromDescriptors;
use dmaload::share::{AttachOptions, Server, ServerOptions, attach_blocking};
use dmaload::{Attempt, Cache, Errno, Error, Layout, LoadOptions, Loader, Route};
use dmaload_guest::{has_udmabuf_bug, record_row, run_dmaload};

const SEGMENT: usize = 8 * MIB;

fn sizes() -> [usize; 9] {
    [0, 1, 4095, 4096, 4097, SEGMENT - 1, SEGMENT, SEGMENT + 1, LARGE]
}

/// Returns the route that a load is expected to take if it requests the route `requested`. The
/// kernel refuses direct reads into the system heap, so such loads fall back to `bounce`.
fn expected_route(heap: &str, requested: Route) -> Route {
    if heap == "dma-heap:system" && requested < Route::Bounce { Route::Bounce } else { requested }
}

fn assert_every_route_and_size(name: &str, layout: Layout) {
    let _raised = SizeLimit::set_mib(256);
    for route in Route::ALL {
        // Each route needs a new loader, because a loader remembers which routes were refused.
        let loader = Loader::builder()
            .heap(heap(name))
            .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
            .window_bytes(32 << 20)
            .build()
            .unwrap();
        let expected = expected_route(name, route);
        let options = loader.load_options().layout(layout).route(route).strict(expected == route).cache(Cache::Bypass);
        for len in sizes() {
            let what = format!("{name}, {layout}, {route}, {len} bytes");
            let image = load(&loader, &file(len), options.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
            let segments = if layout == Layout::Single { len.min(1) } else { len.div_ceil(SEGMENT) };
            assert_eq!(image.segments().len(), segments, "{what}");
            assert_dma_bufs(image.segments(), &original()[..len], &what);
            let report = image.report();
            if len > 0 {
                assert_eq!(report.route, expected, "{what}");
            }
            let is_one_allocation = report.notes.iter().any(|note| note.contains("single allocation"));
            assert_eq!(is_one_allocation, name != "udmabuf" && layout == Layout::Single, "{what}: {:?}", report.notes);
            assert_eq!(report.cached_bytes, 0, "{what}");
            let is_reported = report.fallbacks.iter().any(|step| step.to == Route::Bounce && step.errno == Errno::EFAULT);
            assert_eq!(is_reported, expected != route && len > 0, "{what}: {:?}", report.fallbacks);
        }
        record_row("matrix", &[name, layout.name(), route.name(), expected.name(), &format_sizes(&sizes()), "equal"]);
        shut_down(loader);
    }
    assert_every_size_from_the_page_cache(name, layout);
}

/// Asserts that cached bytes are copied from the page cache, even into memory that cannot be
/// pinned.
fn assert_every_size_from_the_page_cache(name: &str, layout: Layout) {
    let loader = Loader::builder()
        .heap(heap(name))
        .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
        .window_bytes(32 << 20)
        .build()
        .unwrap();
    for len in sizes() {
        let what = format!("{name}, {layout}, from the page cache, {len} bytes");
        std::fs::read(file(len)).unwrap();
        let image =
            load(&loader, &file(len), loader.load_options().layout(layout)).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_dma_bufs(image.segments(), &original()[..len], &what);
        let report = image.report();
        assert_eq!((report.cached_bytes, report.fallbacks.as_slice()), (len as u64, [].as_slice()), "{what}");
    }
    record_row("matrix", &[name, layout.name(), "not set", "the page cache", &format_sizes(&sizes()), "equal"]);
    shut_down(loader);
}

#[test]
fn udmabuf_segmented_equals_the_file() {
    assert_every_route_and_size("udmabuf", Layout::Segmented);
}

#[test]
fn udmabuf_single_equals_the_file() {
    assert_every_route_and_size("udmabuf", Layout::Single);
}

#[test]
fn system_heap_segmented_equals_the_file() {
    assert_every_route_and_size("dma-heap:system", Layout::Segmented);
}

#[test]
fn system_heap_single_equals_the_file() {
    assert_every_route_and_size("dma-heap:system", Layout::Single);
}

#[test]
fn pooled_udmabuf_shows_what_was_loaded_last() {
    let loader = Loader::builder()
        .heap(heap("udmabuf"))
        .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
        .window_bytes(32 << 20);
    let loader = loader.pool_bytes(64 << 20).build().unwrap();
    let len = 2 * SEGMENT + 777;
    let other: Vec<u8> = original()[..len].iter().rev().copied().collect();
    let path = disk().join("reversed");
    std::fs::write(&path, &other).unwrap();
    for _ in 0..3 {
        // The image is dropped without handing out its dma-bufs, so the pool takes its memory.
        drop(load(&loader, &file(len), loader.load_options()).unwrap());
        while loader.pooled_bytes() == 0 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let image = load(&loader, &path, loader.load_options()).unwrap();
        assert!(image.report().reused_bytes > 0, "no memory was reused");
        assert_dma_bufs(image.segments(), &other, "reused memory");
    }
    std::fs::remove_file(&path).unwrap();
    shut_down(loader);
}

#[test]
fn load_above_udmabufs_limit_says_how_to_raise_it() {
    let path = file(LARGE);
    let limited = SizeLimit::set_mib(64);
    let loader = Loader::builder().heap(heap("udmabuf")).build().unwrap();
    let error = load(&loader, &path, loader.load_options().layout(Layout::Single)).unwrap_err();
    let text = error.to_string();
    for words in [path.to_str().unwrap(), "size_limit_mb is 64", "67108864"] {
        assert!(text.contains(words), "{words} is not in: {text}");
    }
    assert!(error.hint().unwrap().contains("echo 73 > /sys/module/udmabuf/parameters/size_limit_mb"), "{:?}", error.hint());
    // The default segment size adapts to the limit, but a segment size that is set explicitly does
    // not.
    drop(limited);
    let _lowered = SizeLimit::set_mib(9);
    let chosen = load(&loader, &path, loader.load_options().segment_bytes(64 << 20)).unwrap_err();
    assert!(matches!(chosen, Error::TooLarge { .. }), "{chosen}");
    let image = load(&loader, &path, loader.load_options()).unwrap();
    assert_eq!(image.segments()[0].len(), 8 * MIB);
    assert_dma_bufs(image.segments(), original(), "smaller segments");
    shut_down(loader);
}

#[test]
fn refusal_of_a_heap_is_remembered_and_reported() {
    let loader = Loader::builder().heap(heap("dma-heap:system")).build().unwrap();
    for round in 0..3 {
        let image = load(&loader, &file(4097), loader.load_options().cache(Cache::Bypass)).unwrap();
        let report = image.report();
        // Later loads do not try the direct route again, but they also report the fallback.
        let steps: Vec<_> = report.fallbacks.iter().map(|step| (step.from, step.to, step.attempt, step.errno)).collect();
        let expected = [(Route::UringFixedDirect, Route::Bounce, Attempt::RegisterBuffer, Errno::EFAULT)];
        assert_eq!(steps, expected, "load {round}");
    }
    // A strict load tries the direct route again, and fails with the errno that the kernel
    // returns.
    let error = load(&loader, &file(4097), loader.load_options().strict(true)).unwrap_err();
    assert!(matches!(error, Error::Refused { errno: Errno::EFAULT, .. }), "{error}");
    shut_down(loader);
}

#[test]
fn auto_takes_udmabuf_for_required_dma_bufs_and_says_why() {
    let loader = Loader::builder().dma_buf(true).build().unwrap();
    let image = load(&loader, &file(4097), loader.load_options()).unwrap();
    let report = image.report();
    assert_eq!(report.heap, "udmabuf");
    assert!(report.notes[0].contains("dma-bufs are required"), "{:?}", report.notes);
    assert_eq!(dmabuf::Udmabuf::huge_pages_show_wrong_bytes(), report.notes.len() == 2, "{:?}", report.notes);
    shut_down(loader);
    // A loader that does not require dma-bufs allocates memfds.
    let loader = Loader::new().unwrap();
    let image = load(&loader, &file(4097), loader.load_options()).unwrap();
    assert_eq!(image.report().heap, "memfd");
    assert!(matches!(image.segments()[0].hand_out_dma_buf(), Err(Error::NoDescriptor { .. })));
    shut_down(loader);
    let error = Loader::builder().heap(heap("memfd")).dma_buf(true).build().unwrap_err();
    assert!(matches!(error, Error::Config(_)), "{error}");
}

#[test]
fn segment_with_views_is_not_handed_out_and_vice_versa() {
    for name in ["udmabuf", "dma-heap:system"] {
        let loader = Loader::builder().heap(heap(name)).build().unwrap();
        let image = load(&loader, &file(SEGMENT + 1), loader.load_options()).unwrap();
        let segment = &image.segments()[0];
        let bytes = segment.bytes().unwrap();
        let other = bytes.slice(7..9);
        assert_same(&bytes, &original()[..SEGMENT + 1], name);
        drop(bytes);
        assert!(matches!(segment.hand_out_dma_buf(), Err(Error::Viewed { views: 1, .. })), "{name}");
        drop(other);
        segment.hand_out_dma_buf().unwrap();
        assert!(matches!(segment.bytes(), Err(Error::HandedOut { .. })), "{name}");
        assert!(matches!(image.files()[0].bytes(), Err(Error::HandedOut { .. })), "{name}");
        let mut seen = vec![0; 100];
        let access = segment.cpu_access().unwrap();
        assert_eq!(access.read_at(&mut seen, SEGMENT - 49), 50, "{name}: the read must stop at the segment's end");
        assert_same(&seen[..50], &original()[SEGMENT - 49..SEGMENT + 1], name);
        drop(access);
        shut_down(loader);
    }
}

#[test]
fn memfd_of_a_udmabuf_refuses_writes_and_holes() {
    let loader = Loader::builder().heap(heap("udmabuf")).build().unwrap();
    let image = load(&loader, &file(SEGMENT), loader.load_options()).unwrap();
    let segment = &image.segments()[0];
    let memfd = segment.hand_out_memfd().unwrap();
    assert_eq!(rustix::io::pwrite(memfd, b"x", 0), Err(rustix::io::Errno::PERM));
    let hole = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    assert_eq!(rustix::fs::fallocate(memfd, hole, 0, 4096), Err(rustix::io::Errno::PERM));
    assert_dma_bufs(image.segments(), &original()[..SEGMENT], "after the refused changes");
    shut_down(loader);
}

#[test]
fn memory_is_shared_read_only_or_as_dma_bufs() {
    let len = 2 * SEGMENT + 777;
    for (name, dma_bufs) in [("udmabuf", false), ("udmabuf", true), ("dma-heap:system", true)] {
        let what = format!("{name}, as dma-bufs: {dma_bufs}");
        let loader =
            Loader::builder().heap(heap(name)).load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).build().unwrap();
        let image = load(&loader, &file(len), loader.load_options()).unwrap();
        let socket = disk().join("socket");
        let server = Server::bind(&socket, ServerOptions::default().dma_bufs(dma_bufs)).unwrap();
        server.publish("model", image.clone()).unwrap();
        let attached = attach_blocking(&socket, &AttachOptions::default()).unwrap();
        let theirs = &attached.image;
        assert_eq!(theirs.segments().len(), image.segments().len(), "{what}");
        if dma_bufs {
            assert_dma_bufs(theirs.segments(), &original()[..len], &what);
            assert!(matches!(image.segments()[0].bytes(), Err(Error::HandedOut { .. })), "{what}");
        } else {
            assert_same(&theirs.files()[0].bytes().unwrap(), &original()[..len], &what);
            for segment in image.segments() {
                // Drivers ignore seals, so dmaload refuses to hand out the dma-buf while its
                // memory is shared read-only.
                assert!(matches!(segment.hand_out_owned_dma_buf(), Err(Error::Viewed { .. })), "{what}");
            }
        }
        record_row(
            "handing",
            &[name, if dma_bufs { "shared as dma-bufs" } else { "shared read-only" }, "another process's mappings", "equal"],
        );
        drop((attached, server, image));
        shut_down(loader);
    }
}

/// This environment variable is set in child processes of these tests. Its value is the name of
/// the heap.
const ROLE: &str = "DMALOAD_GUEST_ROLE";

fn child_command(test: &str, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(ROLE, role).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A process loads a file, drops the loader and the image, sends the dma-buf to another process
/// and exits. The other process must find the file's bytes in the dma-buf.
#[test]
fn dma_buf_survives_its_loader_and_its_process() {
    let socket = disk().join("socket");
    if let Ok(name) = std::env::var(ROLE) {
        let loader = Loader::builder().heap(heap(&name)).build().unwrap();
        let image = load(&loader, &file(SEGMENT + 1), loader.load_options()).unwrap();
        let dma_buf = image.segments()[0].hand_out_owned_dma_buf().unwrap();
        shut_down(loader);
        drop(image);
        send(&UnixStream::connect(&socket).unwrap(), &dma_buf);
        return;
    }
    for name in ["udmabuf", "dma-heap:system"] {
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let sender = child_command("dma_buf_survives_its_loader_and_its_process", name).spawn().unwrap();
        let (stream, _) = listener.accept().unwrap();
        let output = sender.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        // The sender has exited, but its message is still in the socket.
        let dma_buf = receive(&stream);
        with_mapping(dma_buf, |seen| assert_same(&seen[..SEGMENT + 1], &original()[..SEGMENT + 1], name));
        record_row("handing", &[name, "loader dropped, process ended", "another process maps it", "equal"]);
    }
}

fn send(stream: &UnixStream, fd: &OwnedFd) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(stream, &[std::io::IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
}

fn receive(stream: &UnixStream) -> OwnedFd {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(stream, &mut [std::io::IoSliceMut::new(&mut [0])], &mut control, RecvFlags::empty()).unwrap();
    let message = control.drain().next().unwrap();
    let RecvAncillaryMessage::ScmRights(mut fds) = message else { panic!("the message has no descriptor") };
    fds.next().unwrap()
}

/// If small files share a dma-buf, handing it out gives access to all of these files.
#[test]
fn small_files_that_share_a_dma_buf_are_handed_out_together() {
    let paths: Vec<_> = [700_001, 1, 4097, 2 * MIB + 5].into_iter().map(file).collect();
    for name in ["udmabuf", "dma-heap:system"] {
        for route in Route::ALL {
            let loader = Loader::builder().heap(heap(name)).build().unwrap();
            let what = format!("{name}, {route}");
            let options = loader.load_options().route(route).cache(Cache::Bypass);
            let image = block_on(async { loader.load(&paths).options(options).await }).unwrap();
            assert_eq!((image.report().segments, image.report().memories), (4, 1), "{what}");
            let [first, second, ..] = image.segments() else { panic!("{what}: not four segments") };
            let view = second.bytes().unwrap();
            let error = first.hand_out_dma_buf().unwrap_err();
            assert!(matches!(error, Error::Viewed { .. }), "{what}: {error}");
            drop(view);
            with_mapping(first.hand_out_owned_dma_buf().unwrap(), |seen| {
                for segment in image.segments() {
                    let part = &seen[segment.memory_offset()..][..segment.memory_bytes()];
                    assert_same(&part[..segment.len()], &original()[..segment.len()], &format!("{what}, {segment:?}"));
                    assert!(
                        part[segment.len()..].iter().all(|&byte| byte == 0),
                        "{what}: the bytes after {segment:?} must be zero"
                    );
                }
            });
            let error = second.bytes().unwrap_err();
            assert!(matches!(error, Error::HandedOut { .. }), "{what}: {error}");
            drop(image);
            shut_down(loader);
        }
        record_row("handing", &[name, "small files that share a dma-buf", "a mapping, each at its offset", "equal"]);
    }
}

/// `dmaload load --exec` starts a program that inherits the dma-bufs' descriptors. Environment
/// variables describe these descriptors to the program.
#[test]
fn program_started_by_exec_inherits_the_dma_bufs() {
    if std::env::var(ROLE).is_ok() {
        check_inherited_dma_bufs();
        return;
    }
    let path = file(LARGE);
    let program = std::env::current_exe().unwrap();
    for heap in ["udmabuf", "dma-heap:system"] {
        let output = Command::new("/bin/dmaload")
            .args(["load", path.to_str().unwrap(), "--quiet", "--heap", heap, "--exec", program.to_str().unwrap()])
            .args(["--exact", "program_started_by_exec_inherits_the_dma_bufs", "--nocapture"])
            .env(ROLE, heap)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        record_row("handing", &[heap, "dmaload load --exec", "the program maps its descriptors", "equal"]);
    }
    let output = run_dmaload(&["load", path.to_str().unwrap(), "--quiet", "--dma-buf", "--exec", "sh", "-c", "exit 37"]);
    assert_eq!(output.status.code(), Some(37), "dmaload must exit with the program's status");
}

fn check_inherited_dma_bufs() {
    use std::os::fd::{BorrowedFd, RawFd};
    let segments: serde_json::Value = serde_json::from_str(&std::env::var("DMALOAD_SEGMENTS").unwrap()).unwrap();
    let files: Vec<String> = serde_json::from_str(&std::env::var("DMALOAD_FILES").unwrap()).unwrap();
    assert_eq!(files, [file(LARGE).to_str().unwrap()]);
    let segments = segments.as_array().unwrap();
    assert_eq!(std::env::var("DMALOAD_FDS").unwrap(), segments.len().to_string());
    let mut at = 0;
    for (number, segment) in (3..).zip(segments) {
        assert_eq!(segment["fd"].as_i64(), Some(number));
        assert_eq!((segment["dma_buf"].as_bool(), segment["file"].as_i64()), (Some(true), Some(0)));
        assert_eq!(segment["file_offset"].as_u64(), Some(at as u64));
        let len = usize::try_from(segment["bytes"].as_u64().unwrap()).unwrap();
        #[allow(unsafe_code)]
        // SAFETY: the descriptor was inherited, stays open until this process exits, and is only
        // duplicated here.
        let fd = unsafe { BorrowedFd::borrow_raw(RawFd::try_from(number).unwrap()) };
        with_mapping(fd.try_clone_to_owned().unwrap(), |seen| {
            assert_same(&seen[..len], &original()[at..at + len], "an inherited segment");
        });
        at += len;
    }
    assert_eq!(at, LARGE);
}

/// Allocates a dma-buf as a vendor's library would, and returns only its descriptor.
fn allocate_descriptor(source: &str, bytes: usize) -> Result<OwnedFd, Errno> {
    let dma_buf = match source {
        "udmabuf" => {
            let memfd = dmabuf::Memfd::create("vendor", bytes).map_err(|error| error.errno)?;
            dmabuf::Udmabuf::open().unwrap().create(dmabuf::Part { memfd: &memfd, offset: 0, bytes })
        }
        name => dmabuf::DmaHeap::open(name).unwrap().allocate(bytes),
    };
    Ok(dma_buf.map_err(|error| error.errno)?.into())
}

#[test]
fn vendors_dma_bufs_by_descriptor_equal_the_file() {
    for source in ["udmabuf", "system"] {
        // SAFETY: each dma-buf is backed by new memory. Nothing else has mapped or opened this
        // memory, because `allocate_descriptor` closes the memfd of a udmabuf before it returns.
        // udmabuf and the system heap keep the pages of a dma-buf as long as it exists.
        #[allow(unsafe_code)]
        let heap = unsafe { FromDescriptors::new(format!("vendor-{source}"), move |bytes| allocate_descriptor(source, bytes)) };
        let loader = Loader::builder()
            .heap(heap)
            .load_options(LoadOptions::new().segment_bytes(SEGMENT as u64))
            .dma_buf(true)
            .build()
            .unwrap();
        for layout in [Layout::Segmented, Layout::Single] {
            for len in [1, SEGMENT + 1, 3 * SEGMENT] {
                let what = format!("{source}, {layout}, {len} bytes");
                let options = loader.load_options().layout(layout).cache(Cache::Bypass);
                let image = load(&loader, &file(len), options).unwrap();
                assert_same(&image.files()[0].bytes().unwrap(), &original()[..len], &what);
                assert_dma_bufs(image.segments(), &original()[..len], &what);
                let report = image.report();
                assert_eq!((report.heap.as_str(), report.route), (format!("vendor-{source}").as_str(), Route::Bounce), "{what}");
            }
        }
        shut_down(loader);
        let name = format!("descriptors of {source}");
        record_row("handing", &[&name, "a vendor's allocator (FromDescriptors)", "a mapping", "equal"]);
    }
}

#[test]
fn invalid_vendor_dma_buf_fails_the_load_and_names_the_heap() {
    type Allocate = fn(usize) -> Result<OwnedFd, Errno>;
    let allocators: [(Allocate, &str); 5] = [
        (|bytes| allocate_descriptor("system", bytes - dmabuf::page_bytes()), "cannot use a dma-buf that is too short"),
        (|bytes| Ok(dmabuf::Memfd::create("vendor", bytes).unwrap().as_fd().try_clone_to_owned().unwrap()), "ENOTTY"),
        (
            // The dma-buf's descriptor is not writable.
            |bytes| Ok(dmabuf::DmaHeap::open("system").unwrap().allocate_with(bytes, 0, 0).unwrap().into()),
            "EACCES",
        ),
        (|_| Err(Errno::ENOSYS), "cannot allocate a dma-buf"),
        (|_| Ok(std::fs::File::open("/dev/null").unwrap().into()), "vendor: cannot"),
    ];
    for (allocate, expected) in allocators {
        // SAFETY: loads into these dma-bufs fail, so no segment is handed out.
        #[allow(unsafe_code)]
        let heap = unsafe { FromDescriptors::new("vendor", allocate) };
        let loader = Loader::builder().heap(heap).load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).build().unwrap();
        let error = load(&loader, &file(3 * SEGMENT), loader.load_options()).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("vendor: ") && text.contains(expected), "{expected}: {text}");
        shut_down(loader);
    }
}

/// On kernels without the udmabuf bug, requests for huge pages succeed.
#[test]
fn huge_pages_are_refused_if_importers_see_wrong_bytes() {
    assert_eq!(dmabuf::Udmabuf::huge_pages_show_wrong_bytes(), has_udmabuf_bug());
    let output = run_dmaload(&["load", "--json", "--heap", "udmabuf", "--pages", "2m", file(SEGMENT).to_str().unwrap()]);
    if has_udmabuf_bug() {
        let error = dmaload::heap::UdmabufHeap::open(Pages::Huge).unwrap_err();
        assert!(matches!(&error, Error::Config(text) if text.contains("wrong bytes")), "{error}");
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    } else {
        dmaload::heap::UdmabufHeap::open(Pages::Huge).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((output.status.code(), report["page_size_bytes"].as_u64()), (Some(0), Some(2 << 20)), "{report:#}");
    }
}
