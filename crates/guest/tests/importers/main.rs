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

use std::fs;
use std::sync::Arc;

use common::{MIB, assert_dma_bufs, file, heap, load, original, shut_down};
use dmabuf::{Pages, Udmabuf};
use dmaload::heap::{Heap, UdmabufHeap};
use dmaload::{Image, Layout, Loader};
use dmaload_guest::row;
use vivid::Loopback;

const PAGE: usize = 4096;
const HUGE: usize = 2 * MIB;
/// Larger than a frame and than two huge pages, and no multiple of either.
const LEN: usize = 9 * MIB + 777;

/// One dma-buf that holds the file, and what vivid sees of it.
fn seen_by_vivid(loopback: &mut Loopback, heap: Arc<dyn Heap>) -> (Image, Vec<u8>) {
    let loader = Loader::builder().heap(heap).layout(Layout::Single).build().unwrap();
    let image = load(&loader, &file(LEN), loader.options()).unwrap();
    shut_down(loader);
    let segment = &image.segments()[0];
    let frame = loopback.pass(segment.dma_buf().unwrap(), segment.memory_bytes()).unwrap();
    assert_eq!(frame.len(), loopback.frame_bytes());
    assert!(frame.len() > HUGE && frame.len() < LEN);
    vgem::attach(segment.dma_buf().unwrap()).unwrap();
    // Its own mapping is right in every case.
    assert_dma_bufs(image.segments(), &original()[..LEN], "the dma-buf's own mapping");
    (image, frame)
}

/// The pages of a frame that are not what the file has there.
fn wrong_pages(frame: &[u8]) -> Vec<usize> {
    let pages = frame.chunks(PAGE).zip(original().chunks(PAGE)).enumerate();
    pages.filter(|(_, (seen, expected))| *seen != &expected[..seen.len()]).map(|(page, _)| page).collect()
}

/// Whether any page of this range belongs to a compound page: asked of the page tables, which only root may do.
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
    let segment = &image.segments()[0];
    let access = segment.cpu_access().unwrap();
    let first = access.address().addr().get() / PAGE;
    let pages = first..first + segment.memory_bytes() / PAGE;
    let mut seen = 0;
    for page in pages {
        let entry = word(&pagemap, page as u64);
        assert!(entry >> 63 == 1, "the page is there");
        let frame = entry & ((1 << 55) - 1);
        assert_ne!(frame, 0, "root sees page frame numbers");
        seen += usize::from(word(&flags, frame) & COMPOUND != 0);
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
        let (_image, frame) = seen_by_vivid(&mut loopback, heap("dma-heap:system"));
        assert_eq!(wrong_pages(&frame), [0; 0]);
    }
    row("importers", &["dma-heap:system", "its own", "vivid: right bytes; vgem: attached"]);
}

#[test]
fn vivid_and_vgem_see_the_right_bytes_of_a_udmabuf_by_default() {
    let mut loopback = Loopback::open().unwrap();
    for _ in 0..3 {
        let (image, frame) = seen_by_vivid(&mut loopback, heap("udmabuf"));
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
    let (image, frame) = seen_by_vivid(&mut loopback, despite);
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
    let (image, frame) = seen_by_vivid(&mut loopback, heap("udmabuf"));
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
    let loader = Loader::builder().layout(Layout::Single).build().unwrap();
    let image = load(&loader, &file(MIB), loader.options()).unwrap();
    assert!(compound_pages(&image) > 0, "multi-size THP is on");
    shut_down(loader);
}
