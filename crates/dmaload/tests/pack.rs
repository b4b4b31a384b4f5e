//! Tests for the small files in a load, which share memory. Each file has the right bytes in the
//! right place, and none is handed out before all files in the same memory have been checked.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{ROUTES, assert_same, file, folder, random_bytes};

use dmaload::heap::{AnonHeap, Pages};
use dmaload::{Error, Image, Layout, LoadOptions, Loader, Observer, Rejection, Segment};

/// Files of up to a quarter of this size, which is 2 MiB, are packed as small files.
const SEGMENT: u64 = 8 << 20;

fn loader() -> Loader {
    Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT)).build().unwrap()
}

/// Returns file contents of various lengths. Some lengths are close to the page size, some are
/// close to the limit for small files, and some are zero.
fn contents() -> Vec<Vec<u8>> {
    let mut lengths = vec![1, 4095, 4096, 4097, 0, 2 << 20, (2 << 20) + 1, 700_001, 0, 1_999_999, 9 << 20, 3, 5];
    lengths.extend((0..40).map(|number| 65_536 + number * 9973));
    lengths.iter().zip(0..).map(|(&len, seed)| random_bytes(len, seed)).collect()
}

fn write_files(folder: &Path, contents: &[Vec<u8>]) -> Vec<PathBuf> {
    contents.iter().enumerate().map(|(index, bytes)| file(folder, &format!("{index}.bin"), bytes)).collect()
}

fn assert_files(image: &Image, contents: &[Vec<u8>], what: &str) {
    for (index, bytes) in contents.iter().enumerate() {
        assert_same(&image.files()[index].bytes().unwrap(), bytes, &format!("{what}, file {index}"));
    }
}

#[tokio::test]
async fn small_files_share_memory_and_load_by_every_route() {
    let (folder, contents) = (folder(), contents());
    let paths = write_files(folder.path(), &contents);
    let loader = loader();
    let anon = Loader::builder()
        .load_options(LoadOptions::new().segment_bytes(SEGMENT))
        .heap(AnonHeap { pages: Pages::Small })
        .build()
        .unwrap();
    for route in ROUTES {
        for (heap, loader) in [("memfd", &loader), ("anon", &anon)] {
            let what = format!("{heap}, {route}");
            let image = loader.load(&paths).options(loader.load_options().route(route)).await.unwrap();
            assert_files(&image, &contents, &what);
            let report = image.report();
            assert_eq!((report.segments, report.memories), (52, 7), "{what}");
            assert_eq!(report.bytes, contents.iter().map(|bytes| bytes.len() as u64).sum::<u64>(), "{what}");
            let (mut place, mut memories) = (None::<&Segment>, 1);
            for segment in image.segments() {
                let expected = match place.filter(|last| last.shares_memory_with(segment)) {
                    Some(last) => last.memory_offset() + last.memory_bytes(),
                    None => 0,
                };
                memories += usize::from(expected == 0 && place.is_some());
                assert_eq!((segment.memory_offset(), segment.memory_offset() % 4096), (expected, 0), "{what}: {segment:?}");
                if segment.shares_memory_with(&image.segments()[0]) {
                    assert!(segment.file_index() < 6, "{segment:?}");
                }
                place = Some(segment);
            }
            assert_eq!(memories, report.memories, "{what}");
        }
    }
    let apart = loader.load(&paths).options(loader.load_options().packed(false)).await.unwrap();
    assert_files(&apart, &contents, "apart");
    assert_eq!(apart.report().memories, apart.report().segments);
    let single = loader.load(&paths).options(loader.load_options().layout(Layout::Single)).await.unwrap();
    assert_files(&single, &contents, "single");
    assert_eq!(single.report().memories, 51, "each non-empty file must have its own allocation");
}

#[tokio::test]
async fn shared_memfd_holds_each_file_with_a_zero_tail() {
    let (folder, contents) = (folder(), contents());
    let paths = write_files(folder.path(), &contents);
    let image = loader().load(&paths).await.unwrap();
    for segment in image.segments() {
        let mut memory = vec![0xEE; segment.memory_bytes()];
        rustix::io::pread(segment.hand_out_memfd().unwrap(), &mut memory, segment.memory_offset() as u64).unwrap();
        let range = segment.file_range();
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        assert_same(&memory[..segment.len()], &contents[segment.file_index()][range], &format!("{segment:?}"));
        assert!(memory[segment.len()..].iter().all(|&byte| byte == 0), "the tail of {segment:?} must be zero");
    }
}

#[tokio::test]
async fn shared_memory_lives_as_long_as_any_of_its_segments() {
    let (folder, contents) = (folder(), contents());
    let paths = write_files(folder.path(), &contents);
    let loader = loader();
    let mut segments = loader.load(&paths).segments();
    let (mut index, mut kept) = (0, Vec::new());
    while let Some(segment) = segments.next().await {
        let segment = segment.unwrap();
        assert_eq!(segment.index(), index);
        if index % 7 == 3 {
            kept.push(segment);
        }
        index += 1;
    }
    drop(segments);
    loader.shutdown().await.unwrap();
    for segment in kept {
        let range = segment.file_range();
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        assert_same(&segment.bytes().unwrap(), &contents[segment.file_index()][range], &format!("{segment:?}"));
    }
}

/// A descriptor exposes all files in its memory, so none is handed out if one of them has changed.
#[tokio::test]
async fn changed_small_file_withholds_all_that_share_its_memory() {
    let folder = folder();
    let contents: Vec<_> = (0..20).map(|seed| random_bytes(100_000, seed)).collect();
    let paths = write_files(folder.path(), &contents);
    let loader = loader();
    let options = loader.load_options().observer(Arc::new(Replacing { number: 19, path: paths[19].clone() }));
    let mut segments = loader.load(&paths).options(options).segments();
    let first = segments.next().await.unwrap();
    let error = first.expect_err("a segment was handed out");
    assert!(matches!(&error, Error::Changed { path, .. } if *path == paths[19]), "{error}");
}

/// An observer that replaces a file once it has been read.
#[derive(Debug)]
struct Replacing {
    number: usize,
    path: PathBuf,
}

impl Observer for Replacing {
    fn bytes(&self, file_index: usize, _offset: u64, _bytes: &[u8]) -> Result<(), Rejection> {
        if file_index == self.number {
            let new = self.path.with_extension("new");
            fs::write(&new, random_bytes(100_000, 99)).unwrap();
            fs::rename(&new, &self.path).unwrap();
        }
        Ok(())
    }
}

#[tokio::test]
async fn headers_of_small_models_are_read_from_their_memory() {
    let folder = folder();
    let model = |name: &str| {
        let header = r#"{"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(name.as_bytes());
        bytes
    };
    let paths = ["abc", "def"].map(|name| file(folder.path(), &format!("{name}.safetensors"), &model(name)));
    let loader = loader();
    let image = loader.load(&paths).await.unwrap();
    for (file, data) in image.files().iter().zip(["abc", "def"]) {
        assert_eq!(file.tensor("w").unwrap().bytes().unwrap(), data.as_bytes());
        let [part] = &*file.tensor("w").unwrap().parts() else { panic!("the tensor is not in one segment") };
        let mut memory = [0; 3];
        rustix::io::pread(part.segment.hand_out_memfd().unwrap(), &mut memory, part.memory_offset() as u64).unwrap();
        assert_eq!(memory, data.as_bytes(), "the bytes at the tensor's offset in the shared memory");
    }
    let short = file(folder.path(), "short.safetensors", &model("xy"));
    let error = loader.load([&paths[0], &short, &paths[1]]).await.unwrap_err();
    assert!(matches!(&error, Error::Model { path, .. } if *path == short), "{error}");
    let stump = file(folder.path(), "stump.safetensors", b"123");
    let error = loader.load(&stump).await.unwrap_err();
    assert!(matches!(&error, Error::Model { path, .. } if *path == stump), "{error}");
}

#[tokio::test]
async fn missing_small_file_among_many_is_named() {
    let folder = folder();
    let contents: Vec<_> = (0..200).map(|seed| random_bytes(5000, seed)).collect();
    let mut paths = write_files(folder.path(), &contents);
    paths.insert(150, folder.path().join("missing.bin"));
    let loader = loader();
    let error = loader.load(&paths).await.unwrap_err();
    assert!(error.to_string().contains("missing.bin: cannot open: ENOENT"), "{error}");
}

#[tokio::test]
async fn second_load_reuses_the_memory_of_the_first_load() {
    let (folder, contents) = (folder(), contents());
    let paths = write_files(folder.path(), &contents);
    let loader = Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT)).pool_bytes(1 << 30).build().unwrap();
    let memory = |image: &Image| image.segments().iter().map(|segment| segment.memory_bytes() as u64).sum::<u64>();
    let first = loader.load(&paths).await.unwrap();
    let bytes = memory(&first);
    drop(first);
    while loader.pooled_bytes() < bytes {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let mut shuffled: Vec<_> = paths.iter().cloned().zip(contents).collect();
    shuffled[0..4].rotate_left(1);
    let (paths, contents): (Vec<_>, Vec<_>) = shuffled.into_iter().unzip();
    let second = loader.load(&paths).await.unwrap();
    assert_files(&second, &contents, "the second load");
    assert_eq!(second.report().reused_bytes, bytes);
}

/// An observer that appends a byte to a file once it has been read.
#[derive(Debug)]
struct Appending {
    number: usize,
    path: PathBuf,
}

impl Observer for Appending {
    fn bytes(&self, file_index: usize, _offset: u64, _bytes: &[u8]) -> Result<(), Rejection> {
        if file_index == self.number {
            use std::io::Write;
            fs::OpenOptions::new().append(true).open(&self.path).unwrap().write_all(b"x").unwrap();
        }
        Ok(())
    }
}

#[tokio::test]
async fn loading_a_growing_small_file_fails() {
    let header = r#"{"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#;
    let model = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), b"abc"].concat();
    let gguf = [&b"GGUF"[..], &3u32.to_le_bytes(), &[0; 16], &[0; 8]].concat();
    for (name, bytes) in [("m.safetensors", &model), ("unnamed", &model), ("m.gguf", &gguf), ("m.bin", &vec![7; 5000])] {
        for (number, others) in [(0, 0), (0, 3), (2, 3)] {
            let folder = folder();
            let mut contents: Vec<_> = (0..others).map(|seed| random_bytes(5000, seed)).collect();
            contents.insert(number, bytes.clone());
            let mut paths = write_files(folder.path(), &contents);
            let grown = folder.path().join(name);
            fs::rename(&paths[number], &grown).unwrap();
            paths[number].clone_from(&grown);
            let loader = loader();
            let options = loader.load_options().observer(Arc::new(Appending { number, path: grown.clone() }));
            let error = loader.load(&paths).options(options).await.unwrap_err();
            let grew = matches!(&error, Error::Changed { path, change: "it grew" } if *path == grown);
            assert!(grew, "{name} number {number} beside {others}: {error}");
        }
    }
}
