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
    let told = image.report().cached_bytes == LEN as u64;
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

/// Neither its header nor asking what is cached starts readahead.
#[tokio::test]
async fn cold_load_leaves_next_to_nothing_of_its_file_cached() {
    const LEN: u64 = 256 << 20;
    let folder = folder();
    let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}}}}"#, LEN - 1000);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(usize::try_from(LEN).unwrap() - 1000 + bytes.len(), 7);
    let path = file(folder.path(), "model.safetensors", &bytes);
    forget(&path, 0, None);
    let cached = || probe::cached_bytes(File::open(&path).unwrap());
    match cached() {
        Ok(0) => {}
        Ok(bytes) => return eprintln!("skipped: {bytes} bytes stay cached"),
        Err(errno) => return eprintln!("skipped: cachestat: {errno}"),
    }
    let image = Loader::new().unwrap().load(&path).await.unwrap();
    if image.report().route != Route::Buffered {
        let cached = cached().unwrap();
        assert!(cached <= LEN / 100, "{cached} bytes of {LEN} are cached");
    }
}
