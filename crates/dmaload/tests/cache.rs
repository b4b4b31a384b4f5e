//! Files that are in the page cache: copied from there only where that was allowed, only wholly, and never silently.
#![allow(clippy::unwrap_used, reason = "a test that can't build its loaders has failed")]

mod common;

use std::fs::File;
use std::path::Path;

use common::{assert_same, file, folder, random_bytes};
use dmaload::{Cache, Image, LoadOptions, Loader, Route, probe};

const LEN: usize = 9 << 20;

/// Only whole pages are forgotten, and only clean ones: `file` has synced it.
fn forget(path: &Path, offset: u64, len: Option<std::num::NonZeroU64>) {
    rustix::fs::fadvise(File::open(path).unwrap(), offset, len, rustix::fs::Advice::DontNeed).unwrap();
}

async fn load(loader: &Loader, path: &Path, options: LoadOptions) -> (Image, bool) {
    let image = loader.load_with([path], options).await.unwrap();
    let told = image.report().notes.iter().any(|note| note.contains(&format!("{LEN} bytes were in the page cache")));
    (image, told)
}

#[tokio::test]
async fn a_file_that_is_wholly_cached_is_copied_from_there_where_that_is_allowed() {
    let folder = folder();
    let expected = random_bytes(LEN, 1);
    let path = file(folder.path(), "model.bin", &expected);
    // Whatever evicted it meanwhile: it is read in again.
    assert_same(&std::fs::read(&path).unwrap(), &expected, "the file");
    let open = File::open(&path).unwrap();
    let Ok(cached) = probe::cached_bytes(&open) else {
        eprintln!("skipped: this kernel does not tell what is cached");
        return;
    };
    assert!(cached >= LEN as u64, "{cached} bytes are cached");
    let loader = Loader::new().unwrap();
    let direct = load(&loader, &path, loader.options().route(Route::PreadDirect)).await.0.report().route;
    if direct == Route::Buffered {
        eprintln!("skipped: no O_DIRECT here");
        return;
    }
    let auto = || loader.options().route(Route::PreadDirect).cache(Cache::Auto);
    let (image, told) = load(&loader, &path, auto()).await;
    assert_eq!((image.report().route, told), (Route::Buffered, true));
    assert_eq!(image.report().fallbacks, [], "a choice is no fallback");
    assert_same(&image.files()[0].bytes().unwrap(), &expected, "from the cache");
    for options in [loader.options().route(Route::PreadDirect), auto().strict(true)] {
        let (image, told) = load(&loader, &path, options).await;
        assert_eq!((image.report().route, told), (Route::PreadDirect, false));
    }
    // One page is missing.
    forget(&path, 4 << 20, std::num::NonZeroU64::new(4096));
    let cached = probe::cached_bytes(&open).unwrap();
    if cached < LEN as u64 {
        let (image, told) = load(&loader, &path, auto()).await;
        assert_eq!((image.report().route, told), (Route::PreadDirect, false), "{cached} bytes are cached");
    }
    forget(&path, 0, None);
    let (image, told) = load(&loader, &path, auto()).await;
    assert_eq!((image.report().route, told), (Route::PreadDirect, false));
    assert_same(&image.files()[0].bytes().unwrap(), &expected, "from storage");
}
