//! Tests that run on every kernel with importers.

use std::sync::Arc;

use dmabuf::Pages;
use dmaload::heap::UdmabufHeap;
use dmaload::{Layout, LoadOptions, Loader};
use dmaload_guest::{has_udmabuf_bug, record_row};

use crate::common::{MIB, PAGE, ThpSettings, file, heap, load, shut_down};
use crate::vivid::Loopback;
use crate::{HUGE, LEN, count_folios, load_and_pass, wrong_pages};

#[test]
fn importers_see_the_right_bytes_of_the_system_heap() {
    let mut loopback = Loopback::open().unwrap();
    for _ in 0..3 {
        let (_image, frame) = load_and_pass(&mut loopback, heap("dma-heap:system"), LEN, |options| options);
        assert_eq!(wrong_pages(&frame), [0; 0]);
    }
    record_row("importers", &["dma-heap:system", "the heap's", "vivid: right bytes; vgem: attached"]);
}

#[test]
fn importers_see_the_right_bytes_of_a_udmabuf_by_default() {
    let mut loopback = Loopback::open().unwrap();
    let (page, pages) = if has_udmabuf_bug() { (PAGE, "4 KiB (default)") } else { (HUGE, "2 MiB (default)") };
    for _ in 0..3 {
        let (image, frame) = load_and_pass(&mut loopback, heap("udmabuf"), LEN, |options| options);
        assert_eq!(wrong_pages(&frame), [0; 0]);
        assert_eq!((image.report().page_size_bytes(), count_folios(&image).compound > 0), (page, page == HUGE));
    }
    record_row("importers", &["udmabuf", pages, "vivid: right bytes; vgem: attached"]);
}

#[test]
fn importers_see_the_right_bytes_of_a_udmabuf_on_small_pages() {
    let mut loopback = Loopback::open().unwrap();
    let small = Arc::new(UdmabufHeap::open(Pages::Small).unwrap());
    let (image, frame) = load_and_pass(&mut loopback, small, LEN, |options| options);
    assert_eq!(wrong_pages(&frame), [0; 0]);
    assert_eq!((image.report().page_size_bytes(), count_folios(&image).compound_pages), (PAGE, 0));
    record_row("importers", &["udmabuf", "4 KiB (--pages 4k)", "vivid: right bytes; vgem: attached"]);
}

/// Checks that the setting has an effect. If it had none, tests that find no large folios despite
/// the setting would prove nothing.
#[test]
fn multi_size_thp_gives_memfds_large_folios() {
    let _settings = ThpSettings::set(&[("hugepages-64kB/shmem_enabled", "always")]);
    let loader = Loader::builder().load_options(LoadOptions::new().layout(Layout::Single)).build().unwrap();
    let image = load(&loader, &file(MIB), loader.load_options()).unwrap();
    assert!(count_folios(&image).compound > 0, "multi-size THP is on, but the memfd has no large folio");
    shut_down(loader);
}

/// Checks that the setting has an effect. If it had none, tests that find no huge pages despite
/// the setting would prove nothing.
#[test]
fn shmem_always_gives_memfds_huge_pages() {
    let _settings = ThpSettings::set(&[("shmem_enabled", "always"), ("enabled", "always")]);
    let memory = dmabuf::Memory::Memfd(dmabuf::Memfd::create("test", HUGE).unwrap());
    let mapping = dmabuf::AddressRange::reserve(HUGE).unwrap().map(&memory, 0, HUGE).unwrap();
    let start = mapping.address();
    // SAFETY: the mapping is writable, and only this test uses it.
    unsafe { start.as_ptr().write(1) };
    let start = start.addr().get();
    assert_eq!(dmabuf::huge_bytes_in(start..start + HUGE).huge_bytes, HUGE as u64);
}
