//! Tests for kernels whose importers see the right bytes in a udmabuf backed by huge pages. On
//! these kernels, the udmabuf heap uses huge pages by default. The tests compare every page of
//! every folio, for every way of filling a udmabuf and for several folio sizes.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

use dmabuf::{Pages, Udmabuf};
use dmaload::heap::{FromDescriptors, Heap, UdmabufHeap};
use dmaload::{Cache, Layout, LoadOptions, Loader, Route};
use dmaload_guest::record_row;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::common::{Folios, MIB, PAGE, ThpSettings, create_udmabuf, disk, fault_in, file, heap, load, original, shut_down};
use crate::vivid::Loopback;
use crate::{HUGE, Way, cache_first_bytes, count_folios, load_and_pass, ways, wrong_pages};

/// The size in pixels of a frame that covers a whole dma-buf. The dma-buf consists of two folios
/// of 2 MiB, and of small pages for the remaining 2,026,496 bytes.
const FRAME: (u32, u32) = (1920, 1080);
const LEN: usize = 1920 * 1080 * 3;
const HUGE_FOLIOS: usize = LEN / HUGE;
const SMALL_PAGES: usize = (LEN % HUGE).div_ceil(PAGE);

fn open_loopback() -> Loopback {
    let loopback = Loopback::with_frames_of(FRAME.0, FRAME.1).unwrap();
    assert_eq!(loopback.frame_bytes(), LEN, "a frame must be as long as the file");
    loopback
}

/// The folios that back a udmabuf of [`LEN`] bytes by default.
const EXPECTED: Folios = Folios { pages: SMALL_PAGES, compound_pages: HUGE_FOLIOS * HUGE / PAGE, compound: HUGE_FOLIOS };

#[test]
fn importers_see_every_page_of_every_folio() {
    assert!(!Udmabuf::huge_pages_show_wrong_bytes());
    let mut loopback = open_loopback();
    for way in ways(Route::UringFixedDirect) {
        let Way { name, options, route, .. } = way;
        let cached = way.cached_bytes(LEN);
        cache_first_bytes(&file(LEN), cached);
        let (image, frame) = load_and_pass(&mut loopback, heap("udmabuf"), LEN, options);
        assert_eq!((wrong_pages(&frame), count_folios(&image)), (vec![], EXPECTED), "{name}");
        let report = image.report();
        assert_eq!((report.page_size_bytes(), report.notes.as_slice()), (HUGE, &[] as &[String]), "{name}");
        // Chunks that are only partly cached are read from storage.
        let expected = if cached == LEN { LEN } else { cached / HUGE * HUGE };
        assert_eq!(report.cached_bytes, expected as u64, "{name}");
        assert!(route.is_none_or(|route| report.route == route), "{name}: {}", report.route);
        assert_eq!(report.fallbacks, [], "{name}");
        let seen = format!("vivid: right bytes of {}", EXPECTED.describe());
        record_row("importers", &["udmabuf", &format!("2 MiB (default), filled: {name}"), &seen]);
    }
}

#[test]
fn importers_see_the_latest_load_in_memory_of_the_pool() {
    let mut loopback = open_loopback();
    let other: Vec<u8> = original()[..LEN].iter().rev().copied().collect();
    let path = disk().join("reversed");
    std::fs::write(&path, &other).unwrap();
    let options = LoadOptions::new().layout(Layout::Single).cache(Cache::Bypass);
    let loader = Loader::builder().heap(heap("udmabuf")).load_options(options).pool_bytes(64 << 20).build().unwrap();
    for _ in 0..3 {
        // The image is dropped without handing out its dma-buf, so the pool takes its memory.
        drop(load(&loader, &file(LEN), loader.load_options()).unwrap());
        while loader.pooled_bytes() == 0 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let image = load(&loader, &path, loader.load_options()).unwrap();
        assert!(image.report().reused_bytes > 0, "no memory was reused");
        let segment = &image.segments()[0];
        let frame = loopback.pass(segment.hand_out_dma_buf().unwrap(), segment.memory_bytes()).unwrap();
        assert!(frame == other, "the frame must show the bytes of the latest load");
        assert_eq!(count_folios(&image), EXPECTED);
    }
    shut_down(loader);
    std::fs::remove_file(&path).unwrap();
    record_row(
        "importers",
        &["udmabuf", "2 MiB (default), reused from the pool", &format!("vivid: right bytes of {}", EXPECTED.describe())],
    );
}

/// Creates and populates a memfd of `bytes` bytes, rounded up to a multiple of 2 MiB. Returns the
/// memfd and its folios.
fn create_vendors_memfd(bytes: usize, flags: MemfdFlags) -> (OwnedFd, Folios) {
    let memfd = memfd_create("vendor", flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let whole = bytes.next_multiple_of(HUGE);
    ftruncate(&memfd, whole as u64).unwrap();
    let folios = fault_in(&memfd, whole);
    fcntl_add_seals(memfd.as_fd(), SealFlags::SHRINK).unwrap();
    (memfd, folios)
}

/// Creates a udmabuf as a vendor's library would, from a memfd with these flags. Loads a file into
/// the udmabuf, and passes the udmabuf through vivid. Returns the memfd's folios and the captured
/// frame. The folios are counted in a mapping of the memfd, because a mapping of the dma-buf does
/// not show them.
fn pass_vendors_udmabuf(loopback: &mut Loopback, name: &str, flags: MemfdFlags) -> (Folios, Vec<u8>) {
    let seen = Arc::new(Mutex::new(Folios::default()));
    let folios = Arc::clone(&seen);
    let allocate = move |bytes| {
        let (memfd, populated) = create_vendors_memfd(bytes, flags);
        *folios.lock().unwrap() = populated;
        create_udmabuf(&memfd, bytes)
    };
    // SAFETY: each dma-buf is backed by new memory, whose memfd is closed and no longer mapped
    // when the dma-buf is returned. udmabuf keeps the pages as long as the dma-buf exists.
    let heap = unsafe { FromDescriptors::new(name, allocate) };
    let (_image, frame) = load_and_pass(loopback, heap, LEN, |options| options.cache(Cache::Bypass));
    let folios = *seen.lock().unwrap();
    (folios, frame)
}

/// Huge pages that are reserved for hugetlb. Dropping this value releases them.
struct ReservedPages;

impl ReservedPages {
    const SETTING: &str = "/proc/sys/vm/nr_hugepages";

    fn reserve(count: usize) -> Self {
        std::fs::write("/proc/sys/vm/compact_memory", "1").unwrap();
        std::fs::write(Self::SETTING, count.to_string()).unwrap();
        let reserved = ReservedPages;
        assert_eq!(std::fs::read_to_string(Self::SETTING).unwrap().trim(), count.to_string());
        reserved
    }
}

impl Drop for ReservedPages {
    fn drop(&mut self) {
        std::fs::write(Self::SETTING, "0").unwrap();
    }
}

#[test]
fn importers_see_every_page_of_hugetlb() {
    let _reserved = ReservedPages::reserve(8);
    let mut loopback = open_loopback();
    let (folios, frame) = pass_vendors_udmabuf(&mut loopback, "hugetlb", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
    assert_eq!(wrong_pages(&frame), [0; 0]);
    // The dma-buf ends within the last huge page.
    let whole = LEN.next_multiple_of(HUGE);
    let expected = Folios { pages: 0, compound_pages: whole / PAGE, compound: whole / HUGE };
    assert_eq!(folios, expected);
    record_row(
        "importers",
        &["descriptors of udmabuf", "hugetlb, 2 MiB", &format!("vivid: right bytes of {}", expected.describe())],
    );
}

#[test]
fn importers_see_every_page_of_multi_size_thp() {
    for (kib, name) in [(64, "hugepages-64kB/shmem_enabled"), (1024, "hugepages-1024kB/shmem_enabled")] {
        let _settings = ThpSettings::set(&[(name, "always")]);
        let mut loopback = open_loopback();
        let (folios, frame) = pass_vendors_udmabuf(&mut loopback, "multi-size", MemfdFlags::empty());
        assert_eq!(wrong_pages(&frame), [0; 0], "{kib}");
        let whole = LEN.next_multiple_of(HUGE);
        let expected = Folios { pages: 0, compound_pages: whole / PAGE, compound: whole / (kib << 10) };
        assert_eq!(folios, expected, "{kib}");
        let seen = format!("vivid: right bytes of {} folios", expected.compound);
        record_row("importers", &["descriptors of udmabuf", &format!("multi-size THP, {kib} KiB"), &seen]);
    }
}

/// Returns the number of read requests that the disk has completed, according to
/// `/sys/block/NAME/stat`.
fn count_read_requests() -> u64 {
    let stat = std::fs::read_to_string("/sys/block/nvme0n1/stat").unwrap();
    stat.split_whitespace().next().unwrap().parse().unwrap()
}

/// Demonstrates the benefit of huge pages by counting folios and read requests, because times on
/// an emulated machine are meaningless.
#[test]
fn huge_pages_take_fewer_folios_and_no_more_requests() {
    let len = 64 * MIB;
    let path = file(len);
    let mut seen = Vec::new();
    for (pages, name) in [(Pages::Small, "4 KiB"), (Pages::Auto, "2 MiB")] {
        let heap: Arc<dyn Heap> = Arc::new(UdmabufHeap::open(pages).unwrap());
        let options = LoadOptions::new().layout(Layout::Single).route(Route::UringFixedDirect).strict(true).cache(Cache::Bypass);
        let loader = Loader::builder().heap(heap).load_options(options).build().unwrap();
        let count_load = || {
            let before = count_read_requests();
            let image = load(&loader, &path, loader.load_options()).unwrap();
            let requests = count_read_requests() - before;
            image.segments()[0].hand_out_dma_buf().unwrap();
            let folios = count_folios(&image);
            (folios.pages + folios.compound, requests)
        };
        // The file system may read metadata during a load, which adds requests. The test therefore
        // uses the lowest of several counts.
        let (folios, requests) = (0..5).map(|_| count_load()).min().unwrap();
        seen.push((folios, requests));
        record_row("counts", &[name, "64 MiB", &folios.to_string(), &requests.to_string()]);
        shut_down(loader);
    }
    assert_eq!((seen[0].0, seen[1].0), (len / PAGE, len / HUGE));
    assert!(seen[1].1 <= seen[0].1, "{seen:?}");
}
