//! Tests that a file's length alone does not cost memory, because a sparse file can be terabytes
//! long and contain no data. Plans and allocations are bounded, and loads that do not fit into
//! memory are refused before they are planned.
//!
//! One test measures the memory usage of its whole process, so these tests have their own file.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(clippy::print_stdout, reason = "measurements are printed")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::folder;
use dmaload::{Error, Layout, LoadOptions, Loader};

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

/// Returns the peak resident memory since the previous call, in bytes, and resets it.
fn take_peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    fs::write("/proc/self/clear_refs", "5").unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

/// Creates a sparse file: a safetensors file with one tensor if `header` is set, and otherwise a
/// raw file.
fn create_sparse(folder: &Path, bytes: u64, header: bool) -> PathBuf {
    let path = folder.join(if header { "sparse.safetensors" } else { "sparse.bin" });
    let file = fs::File::create(&path).unwrap();
    if header {
        // 200 bytes precede the data: the length prefix of 8 bytes and a header padded to 192.
        let text = |data: u64| format!(r#"{{"t":{{"dtype":"U8","shape":[{data}],"data_offsets":[0,{data}]}}}}"#);
        let data = bytes - 200;
        let text = format!("{:192}", text(data));
        fs::write(&path, [&192_u64.to_le_bytes()[..], text.as_bytes()].concat()).unwrap();
    }
    file.set_len(bytes).unwrap();
    path
}

/// Loads the file as an image if `kept` is set, and otherwise receives the first eight segments of
/// a stream. Returns the error, if any.
async fn try_load(loader: &Loader, path: &Path, options: LoadOptions, kept: bool) -> Option<Error> {
    if kept {
        return loader.load(path).options(options).await.err();
    }
    let mut segments = loader.load(path).options(options).segments();
    for _ in 0..8 {
        if let Err(error) = segments.next().await.unwrap() {
            return Some(error);
        }
    }
    None
}

#[tokio::test]
async fn sparse_files_of_terabytes_take_bounded_memory() {
    let folder = folder();
    let small = Loader::builder().window_bytes(16 << 20).load_options(LoadOptions::new().segment_bytes(2 << 20)).build().unwrap();
    let large =
        Loader::builder().window_bytes(64 << 20).load_options(LoadOptions::new().segment_bytes(64 << 20)).build().unwrap();
    let limited = Loader::builder().memory_limit_bytes(256 << 20).build().unwrap();
    let (mut streamed, mut refused) = (0, 0);
    for bytes in [TIB / 2, 3 * TIB, 7 * TIB, 15 * TIB] {
        for header in [false, true] {
            let path = create_sparse(folder.path(), bytes, header);
            for (loader, what) in [(&small, "2 MiB"), (&large, "64 MiB"), (&limited, "limited")] {
                for layout in [Layout::Segmented, Layout::Single, Layout::Tensors] {
                    for kept in [true, false] {
                        let what = format!("{bytes} bytes, header {header}, {what}, {layout}, kept {kept}");
                        // Wait until the previous load's memory is freed. Otherwise it would be
                        // measured, too.
                        let deadline = Instant::now() + Duration::from_secs(20);
                        while loader.memory_bytes() > 0 {
                            assert!(
                                Instant::now() < deadline,
                                "{what}: {} bytes of the previous load have not been freed",
                                loader.memory_bytes()
                            );
                            tokio::time::sleep(Duration::from_millis(2)).await;
                        }
                        take_peak_bytes();
                        let (before, start) = (take_peak_bytes(), Instant::now());
                        let error = try_load(loader, &path, loader.load_options().layout(layout), kept).await;
                        let grown = take_peak_bytes().saturating_sub(before);
                        println!("{what}: {} MiB, {:?}: {error:?}", grown / MIB, start.elapsed());
                        let most = match &error {
                            Some(Error::OutOfMemory { .. } | Error::OverLimit { .. } | Error::TooManyPieces { .. }) => 64 * MIB,
                            Some(error) => panic!("{what}: {error}"),
                            None if kept => panic!("{what}: the file was loaded"),
                            // This covers the plan, the window, and segments that are being freed.
                            None => 400 * MIB,
                        };
                        assert!(grown <= most, "{what}: {} MiB", grown / MIB);
                        assert!(start.elapsed() < Duration::from_secs(20), "{what}: {:?}", start.elapsed());
                        *if error.is_some() { &mut refused } else { &mut streamed } += 1;
                    }
                }
            }
        }
    }
    println!("{streamed} streamed, {refused} refused");
    assert!(streamed >= 8 && refused >= 40);
}

/// A length beyond a process's address space is refused with the same errors as one that only
/// exceeds memory.
#[tokio::test]
async fn length_beyond_the_address_space_is_refused_as_too_large() {
    // tmpfs allows files of these lengths; ext4 does not.
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return println!("skipped: no /dev/shm") };
    let loader =
        Loader::builder().window_bytes(64 << 20).load_options(LoadOptions::new().segment_bytes(64 << 20)).build().unwrap();
    let limited = Loader::builder().memory_limit_bytes(256 << 20).build().unwrap();
    for bytes in [80 * TIB, 200 * TIB, 7 << 60] {
        let path = create_sparse(folder.path(), bytes, false);
        for layout in [Layout::Segmented, Layout::Single] {
            let error = try_load(&loader, &path, loader.load_options().layout(layout), true).await;
            let Some(Error::OutOfMemory { wanted_bytes, .. }) = error else { panic!("{bytes}, {layout}: {error:?}") };
            assert_eq!(wanted_bytes, bytes, "{layout}");
            let error = try_load(&limited, &path, limited.load_options().layout(layout), true).await;
            assert!(matches!(error, Some(Error::OverLimit { .. })), "{bytes}, {layout}: {error:?}");
        }
        let error = try_load(&loader, &path, loader.load_options(), false).await;
        assert!(matches!(error, Some(Error::TooManyPieces { .. })), "{bytes}: {error:?}");
    }
}
