//! Tests with real importers: kernel drivers that access a dma-buf's memory themselves.
//!
//! **vivid** outputs a frame from the dma-buf, sends it through its loopback and captures it
//! again, so the captured bytes are those that the driver sees in its mapping of the dma-buf.
//! **vgem** imports the dma-buf through PRIME, as a GPU driver does.
//!
//! The `every` module runs on all kernels with importers. In addition, `small` runs on kernels
//! whose importers see wrong bytes on huge pages, and `huge` runs on the other kernels (see
//! `src/suites.rs`).
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]
#![allow(clippy::unwrap_used, reason = "a failure here should fail the test")]
#![allow(unsafe_code, reason = "calls ioctls of drivers, and accesses their mappings")]

#[path = "../common/mod.rs"]
mod common;
mod every;
mod huge;
mod small;
mod vgem;
mod vivid;

use std::fs;
use std::path::Path;

use common::{Folios, MIB, PAGE, assert_dma_bufs, file, load, original, shut_down};
use dmaload::heap::Heap;
use dmaload::{Image, Layout, LoadOptions, Loader, Route};
use rustix::fs::{Advice, fadvise};
use vivid::Loopback;

const HUGE: usize = 2 * MIB;
/// The length of the file to load, in bytes. The file is larger than a frame and larger than four
/// huge pages, and its length is not a multiple of the page size.
const LEN: usize = 9 * MIB + 777;

/// Loads a file of `len` bytes into one dma-buf, passes the dma-buf through vivid and attaches it
/// to vgem. Returns the image and the frame that vivid captured.
fn load_and_pass(
    loopback: &mut Loopback,
    heap: impl Heap,
    len: usize,
    options: impl FnOnce(LoadOptions) -> LoadOptions,
) -> (Image, Vec<u8>) {
    let loader = Loader::builder().heap(heap).load_options(LoadOptions::new().layout(Layout::Single)).build().unwrap();
    let image = load(&loader, &file(len), options(loader.load_options())).unwrap();
    shut_down(loader);
    let segment = &image.segments()[0];
    let frame = loopback.pass(segment.hand_out_dma_buf().unwrap(), segment.memory_bytes()).unwrap();
    assert_eq!(frame.len(), loopback.frame_bytes());
    assert!(frame.len() > HUGE && frame.len() <= len);
    vgem::attach(segment.hand_out_dma_buf().unwrap()).unwrap();
    // The dma-buf's own mapping shows the right bytes even if an importer sees wrong ones.
    assert_dma_bufs(image.segments(), &original()[..len], "the dma-buf's own mapping");
    (image, frame)
}

/// Returns the numbers of the pages in which a frame differs from the file.
fn wrong_pages(frame: &[u8]) -> Vec<usize> {
    let pages = frame.chunks(PAGE).zip(original().chunks(PAGE)).enumerate();
    pages.filter(|(_, (seen, expected))| *seen != &expected[..seen.len()]).map(|(page, _)| page).collect()
}

/// Counts the folios that back an image's memory.
fn count_folios(image: &Image) -> Folios {
    let mut seen = Folios::default();
    for segment in image.segments() {
        let access = segment.cpu_access().unwrap();
        seen.add(access.address().addr().get(), segment.memory_bytes());
    }
    seen
}

/// A way of filling a udmabuf: through a certain route, from the page cache, or both.
struct Way {
    name: &'static str,
    options: fn(LoadOptions) -> LoadOptions,
    /// The number of halves of the file (0 to 2) that are in the page cache before the load.
    cached_halves: usize,
    /// The route that the report must name. `None` if nothing is read from storage.
    route: Option<Route>,
}

impl Way {
    fn cached_bytes(&self, len: usize) -> usize {
        len / 2 * self.cached_halves + len % 2 * (self.cached_halves / 2)
    }
}

/// Returns every way of filling a udmabuf. If a way sets a route, the load is strict, so that it
/// fails instead of falling back to another route. `default` is the route that the loader is
/// expected to choose by default.
const fn ways(default: Route) -> [Way; 9] {
    const fn by_route(name: &'static str, options: fn(LoadOptions) -> LoadOptions, route: Route) -> Way {
        Way { name, options, cached_halves: 0, route: Some(route) }
    }
    [
        by_route("uring-fixed-direct", |options| options.route(Route::UringFixedDirect).strict(true), Route::UringFixedDirect),
        by_route("uring-direct", |options| options.route(Route::UringDirect).strict(true), Route::UringDirect),
        by_route("pread-direct", |options| options.route(Route::PreadDirect).strict(true), Route::PreadDirect),
        by_route("bounce", |options| options.route(Route::Bounce).strict(true), Route::Bounce),
        by_route("uring-buffered", |options| options.route(Route::UringBuffered).strict(true), Route::UringBuffered),
        by_route("buffered", |options| options.route(Route::Buffered).strict(true), Route::Buffered),
        by_route("default route", |options| options, default),
        Way { name: "from the page cache", options: |options| options, cached_halves: 2, route: None },
        Way { name: "half from the page cache", options: |options| options, cached_halves: 1, route: Some(default) },
    ]
}

/// Puts the first bytes of a file, and no others, into the page cache.
fn cache_first_bytes(path: &Path, bytes: usize) {
    let cached = fs::File::open(path).unwrap();
    cached.sync_all().unwrap();
    fadvise(&cached, 0, None, Advice::DontNeed).unwrap();
    fadvise(&cached, 0, None, Advice::Random).unwrap();
    let mut seen = vec![0; bytes];
    std::os::unix::fs::FileExt::read_exact_at(&cached, &mut seen, 0).unwrap();
}
