//! Tests for kernels whose importers see wrong bytes in a udmabuf backed by huge pages. On these
//! kernels, the heap must not use huge pages, regardless of how memory is filled and how
//! transparent huge pages are configured.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use dmabuf::{Pages, Populated, Udmabuf};
use dmaload::heap::{Heap, HeapHooks, Hooked, UdmabufHeap};
use dmaload::{Image, Loader, Route};
use dmaload_guest::record_row;

use crate::common::{MIB, PAGE, ThpSettings, assert_dma_bufs, block_on, file, heap, original, shut_down};
use crate::vivid::Loopback;
use crate::{HUGE, LEN, Way, cache_first_bytes, count_folios, load_and_pass, ways, wrong_pages};

/// Demonstrates the bug that the default avoids. If this test fails because the pages are right,
/// the kernel has been fixed, and `Udmabuf::huge_pages_show_wrong_bytes` needs to be updated.
#[test]
fn importers_see_wrong_bytes_on_huge_pages() {
    assert!(Udmabuf::huge_pages_show_wrong_bytes());
    let mut loopback = Loopback::open().unwrap();
    let despite = Arc::new(UdmabufHeap::open_despite_bug(Pages::Huge).unwrap());
    let (image, frame) = load_and_pass(&mut loopback, despite, LEN, |options| options);
    assert_eq!(count_folios(&image).compound, 4);
    assert!(image.report().notes.iter().any(|note| note.contains("wrong bytes")), "{:?}", image.report().notes);
    let wrong = wrong_pages(&frame);
    for (page, seen) in frame.chunks(PAGE).enumerate() {
        let folio = page / (HUGE / PAGE) * HUGE;
        assert_eq!(seen, &original()[folio..folio + seen.len()], "page {page} does not show the first page of its folio");
    }
    let seen = format!("vivid: {} of {} pages wrong, each the first page of its folio", wrong.len(), frame.len().div_ceil(PAGE));
    assert!(wrong.len() > 600, "{seen}");
    record_row("importers", &["udmabuf", "2 MiB (--despite-udmabuf-bug)", &seen]);
}

fn assert_default_avoids_the_bug(settings: &[(&str, &str)]) {
    let changed = ThpSettings::set(settings);
    let mut loopback = Loopback::open().unwrap();
    let (image, frame) = load_and_pass(&mut loopback, heap("udmabuf"), LEN, |options| options);
    assert_eq!(wrong_pages(&frame), [0; 0], "{settings:?}");
    assert_eq!(count_folios(&image).compound_pages, 0, "{settings:?}");
    drop(changed);
    let settings = settings.iter().map(|(file, value)| format!("{file}={value}")).collect::<Vec<_>>().join(", ");
    record_row("importers", &["udmabuf", &format!("4 KiB (default), with {settings}"), "vivid: right bytes; no compound page"]);
}

#[test]
fn default_avoids_the_bug_with_shmem_always() {
    assert_default_avoids_the_bug(&[("shmem_enabled", "always"), ("enabled", "always")]);
}

#[test]
fn default_avoids_the_bug_with_shmem_force() {
    assert_default_avoids_the_bug(&[("shmem_enabled", "force"), ("enabled", "always")]);
}

#[test]
fn default_avoids_the_bug_with_multi_size_thp() {
    let sizes = ["hugepages-16kB", "hugepages-32kB", "hugepages-64kB", "hugepages-256kB", "hugepages-1024kB"];
    let files: Vec<_> = sizes.iter().map(|size| format!("{size}/shmem_enabled")).collect();
    let settings: Vec<_> = files.iter().map(|file| (file.as_str(), "always")).collect();
    assert_default_avoids_the_bug(&settings);
}

/// Records the ranges that a heap is asked to populate.
#[derive(Debug, Default)]
struct PopulateRequests(Mutex<Mappings>);

/// The requested ranges of each mapping, keyed by the mapping's start and end addresses.
type Mappings = BTreeMap<(usize, usize), Vec<Range<usize>>>;

impl HeapHooks for PopulateRequests {
    fn before_populate(&self, mapped: Range<usize>, part: Range<usize>) -> Result<(), dmabuf::Error> {
        self.0.lock().unwrap().entry((mapped.start, mapped.end)).or_default().push(part);
        Ok(())
    }

    fn after_populate(&self, _: Range<usize>, result: Result<&Populated, &dmabuf::Error>) {
        // The heap checks which page sizes the memory has. None of the pages should be huge.
        assert_eq!(result.unwrap().pages.map(|pages| pages.huge_bytes), Some(0));
    }
}

impl PopulateRequests {
    /// Asserts that the heap was asked to populate all of the image's memory, and none of it
    /// twice. If a page were missing, udmabuf itself would allocate it, possibly as a huge page.
    /// Returns the number of ranges.
    fn assert_cover(&self, image: &Image, what: &str) -> usize {
        let mut requested = std::mem::take(&mut *self.0.lock().unwrap());
        for (&(start, end), parts) in &mut requested {
            parts.sort_by_key(|part| part.start);
            let populated = parts.iter().try_fold(0, |end, part| (part.start == end).then_some(part.end));
            assert_eq!(populated, Some(end - start), "{what}: {parts:?}");
        }
        let memory_bytes: usize = image.segments().iter().map(dmaload::Segment::memory_bytes).sum();
        assert_eq!(requested.keys().map(|(start, end)| end - start).sum::<usize>(), memory_bytes, "{what}");
        requested.values().map(Vec::len).sum()
    }
}

/// For every way of filling memory, the heap must populate the memory first, without huge pages.
#[test]
fn no_way_of_filling_a_udmabuf_lets_huge_pages_in() {
    let _settings = ThpSettings::set(&[("shmem_enabled", "always"), ("enabled", "always")]);
    assert!(Udmabuf::huge_pages_show_wrong_bytes());
    let mut loopback = Loopback::open().unwrap();
    for way in ways(Route::Bounce) {
        let Way { name, options, route, .. } = way;
        let in_the_cache = way.cached_bytes(LEN);
        cache_first_bytes(&file(LEN), in_the_cache);
        let requests = Arc::new(PopulateRequests::default());
        let heap = Hooked::new(UdmabufHeap::open(Pages::Auto).unwrap(), Arc::clone(&requests));
        let (image, frame) = load_and_pass(&mut loopback, heap, LEN, options);
        assert_eq!((wrong_pages(&frame), count_folios(&image).compound_pages), (vec![], 0), "{name}");
        let parts = requests.assert_cover(&image, name);
        // Before ring reads and direct reads, the whole piece is populated at once. Threads that
        // copy, or that read through the page cache, populate extents as they need them.
        let by_extents = route.is_none_or(|route| matches!(route, Route::Bounce | Route::Buffered));
        assert_eq!(parts > 1, by_extents, "{name}: {parts}");
        let report = image.report();
        // Chunks that are only partly cached are read from storage.
        let cached = if in_the_cache == LEN { LEN } else { in_the_cache / HUGE * HUGE };
        assert_eq!(report.cached_bytes, cached as u64, "{name}");
        assert!(route.is_none_or(|route| report.route == route), "{name}: {}", report.route);
        assert_eq!(report.fallbacks, [], "{name}");
        let seen = format!("vivid: right bytes; no compound page in {} MiB", image.segments()[0].memory_bytes() / MIB);
        record_row("importers", &["udmabuf", &format!("4 KiB (default), with shmem_enabled=always, filled: {name}"), &seen]);
    }
}

/// A load that is large enough to measure both direct and staged reads uses both to fill memory.
#[test]
fn load_that_measures_both_ways_lets_no_huge_pages_in() {
    const COUNT: usize = 9;
    let _settings = ThpSettings::set(&[("shmem_enabled", "always"), ("enabled", "always")]);
    let path = file(64 * MIB);
    cache_first_bytes(&path, 0);
    let requests = Arc::new(PopulateRequests::default());
    let heap = Hooked::new(UdmabufHeap::open(Pages::Auto).unwrap(), Arc::clone(&requests));
    let loader = Loader::builder().heap(heap).build().unwrap();
    let image = block_on(async { loader.load(vec![&path; COUNT]).await }).unwrap();
    let report = image.report();
    assert!(report.measured.is_some() && report.cached_bytes == 0, "{report:?}");
    requests.assert_cover(&image, "direct and staged reads");
    for segments in image.segments().chunks(image.segments().len() / COUNT) {
        assert_dma_bufs(segments, &original()[..64 * MIB], "direct and staged reads");
    }
    assert_eq!(count_folios(&image).compound_pages, 0);
    shut_down(loader);
}

#[test]
fn memory_that_was_not_populated_is_never_exported() {
    let heap = UdmabufHeap::open(Pages::Auto).unwrap();
    let memory = heap.allocate(2 * PAGE).unwrap();
    let mapping = dmabuf::AddressRange::reserve(2 * PAGE).unwrap().map(&memory, 0, 2 * PAGE).unwrap();
    for populated in [0..PAGE, PAGE..2 * PAGE] {
        assert_eq!(heap.export(&memory).unwrap_err().errno, dmaload::Errno::EINVAL);
        heap.populate(&mapping, &memory, populated).unwrap();
    }
    heap.export(&memory).unwrap();
}
