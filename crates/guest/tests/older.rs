//! A kernel without any device that makes dma-bufs: memfds work as ever, and what is missing is said.
#![allow(clippy::unwrap_used, reason = "what fails here has failed the test")]

mod common;

use common::{LARGE, MIB, assert_same, file, load, original, shut_down, told};
use dmaload::{Error, Layout, LoadOptions, Loader, Route};
use dmaload_guest::{command, row};

const SIZES: [usize; 9] = [0, 1, 4095, 4096, 4097, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, LARGE];

#[test]
fn memfds_hold_the_file_by_every_route_layout_and_size() {
    for layout in [Layout::Segmented, Layout::Single] {
        for route in Route::ALL {
            let loader = Loader::builder()
                .load_options(LoadOptions::new().layout(layout).route(route).strict(true).segment_bytes(8 << 20))
                .build()
                .unwrap();
            for len in SIZES {
                let image = load(&loader, &file(len), loader.load_options()).unwrap();
                assert_same(&image.files()[0].bytes().unwrap(), &original()[..len], &format!("{layout}, {route}, {len} bytes"));
            }
            shut_down(loader);
            row("matrix", &["memfd", layout.name(), route.name(), route.name(), &told(&SIZES), "equal"]);
        }
    }
}

/// This kernel has no `cachestat(2)`: what is cached is found out by probes.
#[test]
fn memfds_hold_the_file_from_the_page_cache() {
    for layout in [Layout::Segmented, Layout::Single] {
        let loader = Loader::builder().load_options(LoadOptions::new().layout(layout).segment_bytes(8 << 20)).build().unwrap();
        for len in SIZES {
            std::fs::read(file(len)).unwrap();
            let image = load(&loader, &file(len), loader.load_options()).unwrap();
            assert_same(&image.files()[0].bytes().unwrap(), &original()[..len], &format!("{layout}, cached, {len} bytes"));
            assert_eq!(image.report().cached_bytes, len as u64, "{layout}, {len} bytes");
        }
        shut_down(loader);
        row("matrix", &["memfd", layout.name(), "left open", "the page cache", &told(&SIZES), "equal"]);
    }
}

#[test]
fn a_dma_buf_that_is_required_is_an_error_that_says_what_is_missing() {
    let Err(Error::NoDmaBuf { tried }) = Loader::builder().dma_buf(true).build().map(|_| ()) else { panic!("it was built") };
    assert!(tried[0].contains("/dev/udmabuf: ENOENT") && tried[1].contains("/dev/dma_heap/system: ENOENT"), "{tried:?}");
    let output = command(&["load", "--dma-buf", file(4097).to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("/dev/udmabuf") && text.contains("CONFIG_DMABUF_HEAPS") && text.contains("doctor"), "{text}");
    row("missing", &["load --dma-buf", "exit 1, names both devices"]);
}
