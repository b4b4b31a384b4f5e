//! Real importers: drivers of the kernel that take a dma-buf and use its memory themselves.
//!
//! **vivid** puts a frame out of the dma-buf, sends it through its loopback and captures it again: what its own mapping of the
//! dma-buf has shown comes back as bytes. **vgem** attaches by PRIME, as a GPU driver does.
#![allow(clippy::disallowed_methods, reason = "what is shown here has names of its own making only")]
#![allow(clippy::unwrap_used, reason = "what fails here has failed the test")]
#![allow(unsafe_code, reason = "ioctls of drivers, and their mappings")]

#[path = "../common/mod.rs"]
mod common;
mod vgem;
mod vivid;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{MIB, assert_dma_bufs, file, heap, load, original, shut_down};
use dmabuf::{Pages, Populated, Udmabuf};
use dmaload::heap::{Heap, HeapHooks, Hooked, UdmabufHeap};
use dmaload::{Image, Layout, LoadOptions, Loader, Route};
use dmaload_guest::row;
use rustix::fs::{Advice, fadvise};
use vivid::Loopback;

const PAGE: usize = 4096;
const HUGE: usize = 2 * MIB;
/// Larger than a frame and than two huge pages, and no multiple of either.
const LEN: usize = 9 * MIB + 777;

/// One dma-buf that holds the file, and what vivid sees of it.
fn seen_by_vivid(loopback: &mut Loopback, heap: impl Heap, options: impl FnOnce(LoadOptions) -> LoadOptions) -> (Image, Vec<u8>) {
    let loader = Loader::builder().heap(heap).load_options(LoadOptions::new().layout(Layout::Single)).build().unwrap();
    let image = load(&loader, &file(LEN), options(loader.load_options())).unwrap();
    shut_down(loader);
    let segment = &image.segments()[0];
    let frame = loopback.pass(segment.hand_out_dma_buf().unwrap(), segment.memory_bytes()).unwrap();
    assert_eq!(frame.len(), loopback.frame_bytes());
    assert!(frame.len() > HUGE && frame.len() < LEN);
    vgem::attach(segment.hand_out_dma_buf().unwrap()).unwrap();
    // Its own mapping is right in every case.
    assert_dma_bufs(image.segments(), &original()[..LEN], "the dma-buf's own mapping");
    (image, frame)
}

/// The pages of a frame that are not what the file has there.
fn wrong_pages(frame: &[u8]) -> Vec<usize> {
    let pages = frame.chunks(PAGE).zip(original().chunks(PAGE)).enumerate();
    pages.filter(|(_, (seen, expected))| *seen != &expected[..seen.len()]).map(|(page, _)| page).collect()
}

/// How many pages of an image belong to compound pages: asked of the page tables, which only root may do.
fn compound_pages(image: &Image) -> usize {
    use std::os::unix::fs::FileExt;
    const COMPOUND: u64 = 1 << 15 | 1 << 16;
    let pagemap = fs::File::open("/proc/self/pagemap").unwrap();
    let flags = fs::File::open("/proc/kpageflags").unwrap();
    let word = |file: &fs::File, index: u64| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, index * 8).unwrap();
        u64::from_ne_bytes(word)
    };
    let mut seen = 0;
    for segment in image.segments() {
        let access = segment.cpu_access().unwrap();
        let first = access.address().addr().get() / PAGE;
        for page in first..first + segment.memory_bytes() / PAGE {
            let entry = word(&pagemap, page as u64);
            assert!(entry >> 63 == 1, "the page is there");
            let frame = entry & ((1 << 55) - 1);
            assert_ne!(frame, 0, "root sees page frame numbers");
            seen += usize::from(word(&flags, frame) & COMPOUND != 0);
        }
    }
    seen
}

const THP: &str = "/sys/kernel/mm/transparent_hugepage";

/// Sets switches of transparent huge pages, until it is dropped.
struct Switched(Vec<(String, String)>);

impl Switched {
    fn to(settings: &[(&str, &str)]) -> Self {
        let mut before = Vec::new();
        for (file, value) in settings {
            let file = format!("{THP}/{file}");
            let text = fs::read_to_string(&file).unwrap();
            let (_, rest) = text.split_once('[').unwrap();
            before.push((file.clone(), rest.split(']').next().unwrap().to_owned()));
            fs::write(&file, value).unwrap();
        }
        Switched(before)
    }
}

impl Drop for Switched {
    fn drop(&mut self) {
        for (file, value) in &self.0 {
            fs::write(file, value).unwrap();
        }
    }
}

#[test]
fn vivid_and_vgem_see_the_right_bytes_of_the_system_heap() {
    let mut loopback = Loopback::open().unwrap();
    for _ in 0..3 {
        let (_image, frame) = seen_by_vivid(&mut loopback, heap("dma-heap:system"), |options| options);
        assert_eq!(wrong_pages(&frame), [0; 0]);
    }
    row("importers", &["dma-heap:system", "its own", "vivid: right bytes; vgem: attached"]);
}

#[test]
fn vivid_and_vgem_see_the_right_bytes_of_a_udmabuf_by_default() {
    let mut loopback = Loopback::open().unwrap();
    for _ in 0..3 {
        let (image, frame) = seen_by_vivid(&mut loopback, heap("udmabuf"), |options| options);
        assert_eq!(wrong_pages(&frame), [0; 0]);
        assert_eq!((image.report().page_size_bytes(), compound_pages(&image)), (PAGE, 0));
    }
    row("importers", &["udmabuf", "4 KiB (default)", "vivid: right bytes; vgem: attached"]);
}

/// The bug that the default avoids. When this fails, the kernel was mended: look at `Udmabuf::huge_pages_show_wrong_bytes`.
#[test]
fn on_huge_pages_this_kernel_shows_importers_wrong_bytes() {
    assert!(Udmabuf::huge_pages_show_wrong_bytes());
    let mut loopback = Loopback::open().unwrap();
    let despite = Arc::new(UdmabufHeap::open_despite_bug(Pages::Huge).unwrap());
    let (image, frame) = seen_by_vivid(&mut loopback, despite, |options| options);
    assert!(compound_pages(&image) >= 4 * HUGE / PAGE);
    assert!(image.report().notes.iter().any(|note| note.contains("wrong bytes")), "{:?}", image.report().notes);
    let wrong = wrong_pages(&frame);
    for (page, seen) in frame.chunks(PAGE).enumerate() {
        let folio = page / (HUGE / PAGE) * HUGE;
        assert_eq!(seen, &original()[folio..folio + seen.len()], "page {page} shows the first page of its folio");
    }
    let told = format!("vivid: {} of {} pages wrong, each the first page of its folio", wrong.len(), frame.len().div_ceil(PAGE));
    assert!(wrong.len() > 600, "{told}");
    row("importers", &["udmabuf", "2 MiB (--despite-udmabuf-bug)", &told]);
}

fn the_default_avoids_the_bug(settings: &[(&str, &str)]) {
    let switched = Switched::to(settings);
    let mut loopback = Loopback::open().unwrap();
    let (image, frame) = seen_by_vivid(&mut loopback, heap("udmabuf"), |options| options);
    assert_eq!(wrong_pages(&frame), [0; 0], "{settings:?}");
    assert_eq!(compound_pages(&image), 0, "{settings:?}");
    drop(switched);
    let told = settings.iter().map(|(file, value)| format!("{file}={value}")).collect::<Vec<_>>().join(", ");
    row("importers", &["udmabuf", &format!("4 KiB (default), with {told}"), "vivid: right bytes; no compound page"]);
}

#[test]
fn the_default_avoids_the_bug_with_shmem_always() {
    the_default_avoids_the_bug(&[("shmem_enabled", "always"), ("enabled", "always")]);
}

#[test]
fn the_default_avoids_the_bug_with_shmem_force() {
    the_default_avoids_the_bug(&[("shmem_enabled", "force"), ("enabled", "always")]);
}

#[test]
fn the_default_avoids_the_bug_with_multi_size_thp() {
    let sizes = ["hugepages-16kB", "hugepages-32kB", "hugepages-64kB", "hugepages-256kB", "hugepages-1024kB"];
    let files: Vec<_> = sizes.iter().map(|size| format!("{size}/shmem_enabled")).collect();
    let settings: Vec<_> = files.iter().map(|file| (file.as_str(), "always")).collect();
    the_default_avoids_the_bug(&settings);
}

/// Without the default's care the switch does give large folios: the tests above could fail.
#[test]
fn a_memfd_does_get_large_folios_with_multi_size_thp() {
    let _switched = Switched::to(&[("hugepages-64kB/shmem_enabled", "always")]);
    let loader = Loader::builder().load_options(LoadOptions::new().layout(Layout::Single)).build().unwrap();
    let image = load(&loader, &file(MIB), loader.load_options()).unwrap();
    assert!(compound_pages(&image) > 0, "multi-size THP is on");
    shut_down(loader);
}

/// A way for bytes to get into a udmabuf, and how much of the file is in the page cache before.
struct Filled {
    what: &'static str,
    options: fn(LoadOptions) -> LoadOptions,
    in_the_cache: usize,
    /// The route that the report names, where anything was read from storage.
    route: Option<Route>,
}

/// Every way. Those of one route are strict, so no other one stands in.
const WAYS: [Filled; 9] = {
    const fn by(what: &'static str, options: fn(LoadOptions) -> LoadOptions, route: Route) -> Filled {
        Filled { what, options, in_the_cache: 0, route: Some(route) }
    }
    [
        by("uring-fixed-direct", |options| options.route(Route::UringFixedDirect).strict(true), Route::UringFixedDirect),
        by("uring-direct", |options| options.route(Route::UringDirect).strict(true), Route::UringDirect),
        by("pread-direct", |options| options.route(Route::PreadDirect).strict(true), Route::PreadDirect),
        by("bounce", |options| options.route(Route::Bounce).strict(true), Route::Bounce),
        by("uring-buffered", |options| options.route(Route::UringBuffered).strict(true), Route::UringBuffered),
        by("buffered", |options| options.route(Route::Buffered).strict(true), Route::Buffered),
        by("route left open", |options| options, Route::Bounce),
        Filled { what: "from the page cache", options: |options| options, in_the_cache: LEN, route: None },
        Filled {
            what: "half of it from the page cache",
            options: |options| options,
            in_the_cache: LEN / 2,
            route: Some(Route::Bounce),
        },
    ]
};

/// What a heap was asked to populate.
#[derive(Debug, Default)]
struct Asked(Mutex<Mappings>);

/// The first address and the end of each mapping, and parts of it.
type Mappings = BTreeMap<(usize, usize), Vec<Range<usize>>>;

impl HeapHooks for Asked {
    fn before_populate(&self, mapped: Range<usize>, part: Range<usize>) -> Result<(), dmabuf::Error> {
        self.0.lock().unwrap().entry((mapped.start, mapped.end)).or_default().push(part);
        Ok(())
    }

    fn after_populate(&self, _: Range<usize>, result: Result<&Populated, &dmabuf::Error>) {
        // The heap has looked at the pages' sizes, and has seen no huge one.
        assert_eq!(result.unwrap().pages.map(|pages| pages.huge_bytes), Some(0));
    }
}

impl Asked {
    /// All memory of the load's was populated by the heap, each part once. A page that was not there when it was exported
    /// would have been allocated by the driver, of any size. Returns the number of parts.
    fn assert_all_of(&self, image: &Image, what: &str) -> usize {
        let mut asked = std::mem::take(&mut *self.0.lock().unwrap());
        for (&(start, end), parts) in &mut asked {
            parts.sort_by_key(|part| part.start);
            let populated = parts.iter().try_fold(0, |end, part| (part.start == end).then_some(part.end));
            assert_eq!(populated, Some(end - start), "{what}: {parts:?}");
        }
        let memory_bytes: usize = image.segments().iter().map(dmaload::Segment::memory_bytes).sum();
        assert_eq!(asked.keys().map(|(start, end)| end - start).sum::<usize>(), memory_bytes, "{what}");
        asked.values().map(Vec::len).sum()
    }
}

/// Leaves the first bytes of a file in the page cache, and no others.
fn cache(path: &Path, bytes: usize) {
    let cached = fs::File::open(path).unwrap();
    cached.sync_all().unwrap();
    fadvise(&cached, 0, None, Advice::DontNeed).unwrap();
    fadvise(&cached, 0, None, Advice::Random).unwrap();
    let mut seen = vec![0; bytes];
    std::os::unix::fs::FileExt::read_exact_at(&cached, &mut seen, 0).unwrap();
}

/// Whoever brings memory into being does it by the heap, which keeps large pages out, whatever the machine's settings are.
#[test]
fn no_way_of_filling_a_udmabuf_lets_huge_pages_in() {
    let _switched = Switched::to(&[("shmem_enabled", "always"), ("enabled", "always")]);
    assert!(Udmabuf::huge_pages_show_wrong_bytes());
    let mut loopback = Loopback::open().unwrap();
    for Filled { what, options, in_the_cache, route } in WAYS {
        cache(&file(LEN), in_the_cache);
        let asked = Arc::new(Asked::default());
        let heap = Hooked::new(UdmabufHeap::open(Pages::Auto).unwrap(), Arc::clone(&asked));
        let (image, frame) = seen_by_vivid(&mut loopback, heap, options);
        assert_eq!((wrong_pages(&frame), compound_pages(&image)), (vec![], 0), "{what}");
        let parts = asked.assert_all_of(&image, what);
        // Ahead of a ring's and of direct reads all at once; by threads that copy, or read, extent by extent.
        let by_extents = route.is_none_or(|route| matches!(route, Route::Bounce | Route::Buffered));
        assert_eq!(parts > 1, by_extents, "{what}: {parts}");
        let report = image.report();
        // Chunks that are cached in part are read from storage.
        let cached = if in_the_cache == LEN { LEN } else { in_the_cache / HUGE * HUGE };
        assert_eq!(report.cached_bytes, cached as u64, "{what}");
        assert!(route.is_none_or(|route| report.route == route), "{what}: {}", report.route);
        assert_eq!(report.fallbacks, [], "{what}");
        let told = format!("vivid: right bytes; no compound page in {} MiB", image.segments()[0].memory_bytes() / MIB);
        row("importers", &["udmabuf", &format!("4 KiB (default), with shmem_enabled=always, filled: {what}"), &told]);
    }
}

/// A load that is long enough to find out which way is faster fills some memories by each, and one perhaps by both.
#[test]
fn a_load_that_measures_both_ways_lets_no_huge_pages_in() {
    const COUNT: usize = 9;
    let _switched = Switched::to(&[("shmem_enabled", "always"), ("enabled", "always")]);
    let path = file(64 * MIB);
    cache(&path, 0);
    let asked = Arc::new(Asked::default());
    let heap = Hooked::new(UdmabufHeap::open(Pages::Auto).unwrap(), Arc::clone(&asked));
    let loader = Loader::builder().heap(heap).build().unwrap();
    let image = common::block_on(async { loader.load(vec![&path; COUNT]).await }).unwrap();
    let report = image.report();
    assert!(report.measured.is_some() && report.cached_bytes == 0, "{report:?}");
    asked.assert_all_of(&image, "both ways");
    for segments in image.segments().chunks(image.segments().len() / COUNT) {
        assert_dma_bufs(segments, &original()[..64 * MIB], "both ways");
    }
    assert_eq!(compound_pages(&image), 0);
    shut_down(loader);
}

#[test]
fn memory_that_was_not_populated_becomes_no_udmabuf() {
    let heap = UdmabufHeap::open(Pages::Auto).unwrap();
    let memory = heap.allocate(2 * PAGE).unwrap();
    let mapping = dmabuf::AddressRange::reserve(2 * PAGE).unwrap().map(&memory, 0, 2 * PAGE).unwrap();
    for populated in [0..PAGE, PAGE..2 * PAGE] {
        assert_eq!(heap.export(&memory).unwrap_err().errno, dmaload::Errno::EINVAL);
        heap.populate(&mapping, &memory, populated).unwrap();
    }
    heap.export(&memory).unwrap();
}

/// The switch of the tests above does give huge pages to whoever does not keep them out.
#[test]
fn a_memory_file_does_get_huge_pages_with_shmem_always() {
    let _switched = Switched::to(&[("shmem_enabled", "always"), ("enabled", "always")]);
    let memory = dmabuf::Memory::Memfd(dmabuf::Memfd::create("test", HUGE).unwrap());
    let mapping = dmabuf::AddressRange::reserve(HUGE).unwrap().map(&memory, 0, HUGE).unwrap();
    let start = mapping.address();
    // SAFETY: the mapping is writable, and only this test knows it.
    unsafe { start.as_ptr().write(1) };
    let start = start.addr().get();
    assert_eq!(dmabuf::huge_bytes_in(start..start + HUGE).huge_bytes, HUGE as u64);
}
