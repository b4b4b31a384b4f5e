//! Tests for kernels without devices that create dma-bufs. Memfds must work, and errors must name
//! the missing devices.
#![allow(clippy::unwrap_used, reason = "a failure here should fail the test")]

mod common;

use common::{LARGE, MIB, assert_same, file, format_sizes, load, original, shut_down};
use dmaload::{Error, Layout, LoadOptions, Loader, Route};
use dmaload_guest::{record_row, run_dmaload};

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
            record_row("matrix", &["memfd", layout.name(), route.name(), route.name(), &format_sizes(&SIZES), "equal"]);
        }
    }
}

/// This kernel lacks `cachestat(2)`, so loads find cached chunks by probing.
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
        record_row("matrix", &["memfd", layout.name(), "not set", "the page cache", &format_sizes(&SIZES), "equal"]);
    }
}

#[test]
fn required_dma_buf_fails_and_names_both_devices() {
    let Err(Error::NoDmaBuf { tried }) = Loader::builder().dma_buf(true).build().map(|_| ()) else {
        panic!("building a loader must fail on this kernel")
    };
    assert!(tried[0].contains("/dev/udmabuf: ENOENT") && tried[1].contains("/dev/dma_heap/system: ENOENT"), "{tried:?}");
    let output = run_dmaload(&["load", "--dma-buf", file(4097).to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("/dev/udmabuf") && text.contains("CONFIG_DMABUF_HEAPS") && text.contains("doctor"), "{text}");
    record_row("missing", &["load --dma-buf", "exit 1, names both devices"]);
}
