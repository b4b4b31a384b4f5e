//! Tests that a verified load never hands out bytes that do not match its manifest or checksum.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::verify::{Algorithm, Digest, Manifest, Recorder, digest};
use dmaload::{Error, Layout, LoadOptions, Loader};

const SEGMENT: usize = 2 << 20;
const CHUNK: usize = 64 << 10;

fn loader() -> Loader {
    Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT as u64)).window_bytes(8 << 20).build().unwrap()
}

async fn manifest_of(loader: &Loader, paths: &[PathBuf], algorithm: Algorithm) -> Manifest {
    let recorder = Arc::new(Recorder::new(algorithm, CHUNK as u64));
    let image = loader.load(paths).options(loader.load_options().observer(recorder.clone())).await.unwrap();
    recorder.manifest(image.report())
}

fn flip_bit(path: &Path, at: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// Returns a model with one tensor for each letter. Each tensor has `bytes` bytes.
fn model(letters: &str, bytes: usize) -> Vec<u8> {
    let tensor = |(index, name): (usize, char)| {
        format!(r#""{name}":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[{},{}]}}"#, index * bytes, (index + 1) * bytes)
    };
    let header = format!("{{{}}}", letters.chars().enumerate().map(tensor).collect::<Vec<_>>().join(","));
    let mut model = (header.len() as u64).to_le_bytes().to_vec();
    model.extend_from_slice(header.as_bytes());
    model.extend(random_bytes(bytes * letters.len(), 9));
    model
}

#[tokio::test]
async fn manifest_has_the_checksums_of_its_chunks() {
    let folder = folder();
    let contents = [random_bytes(3 * SEGMENT + 777, 1), Vec::new(), random_bytes(CHUNK, 2), random_bytes(1, 3)];
    let paths: Vec<_> = contents.iter().enumerate().map(|(n, bytes)| file(folder.path(), &n.to_string(), bytes)).collect();
    let loader = loader();
    for algorithm in Algorithm::ALL {
        let manifest = manifest_of(&loader, &paths, algorithm).await;
        // Compare the JSON, which other programs read.
        let json: serde_json::Value = serde_json::from_str(&manifest.to_json()).unwrap();
        for (entry, bytes) in json["files"].as_array().unwrap().iter().zip(&contents) {
            let expected: Vec<_> = bytes.chunks(CHUNK).map(|chunk| digest(algorithm, chunk).hex()).collect();
            assert_eq!(entry["chunks"], serde_json::json!(expected));
            assert_eq!(entry["sha256"], digest(Algorithm::Sha256, bytes).hex());
            assert_eq!(entry["bytes"], bytes.len());
        }
        assert_eq!(Manifest::parse(manifest.to_json().as_bytes()).unwrap(), manifest);
        for route in ROUTES {
            for layout in [Layout::Segmented, Layout::Single] {
                let options = loader.load_options().route(route).layout(layout).verify(manifest.clone());
                let image = loader.load(&paths).options(options).await.unwrap();
                for (file, bytes) in image.files().iter().zip(&contents) {
                    assert_same(&file.bytes().unwrap(), bytes, &format!("{algorithm} {route} {layout}"));
                }
                assert_eq!(image.report().verified, Some(format!("{algorithm} of each {CHUNK} bytes")));
            }
        }
    }
}

/// Streams a file until the load fails. Returns how many bytes were handed out, and the error.
async fn load_until_error(loader: &Loader, path: &Path, options: LoadOptions) -> (u64, Error) {
    let (mut handed_out, mut segments) = (0, loader.load(path).options(options).segments());
    loop {
        match segments.next().await.expect("the load should fail before yielding all segments") {
            Ok(segment) => handed_out = segment.file_range().end,
            Err(error) => return (handed_out, error),
        }
    }
}

#[tokio::test]
async fn flipped_bit_is_located_before_it_is_handed_out() {
    let folder = folder();
    let bytes = model("abcdef", SEGMENT - 12_345);
    let path = file(folder.path(), "model.safetensors", &bytes);
    let loader = loader();
    for algorithm in Algorithm::ALL {
        let manifest = manifest_of(&loader, std::slice::from_ref(&path), algorithm).await;
        for route in ROUTES {
            let length = bytes.len() as u64;
            for at in [600, SEGMENT as u64 - 1, SEGMENT as u64, 2 * SEGMENT as u64 + 4096, length - 1] {
                flip_bit(&path, at);
                let options = loader.load_options().route(route).verify(manifest.clone());
                let (handed_out, error) = load_until_error(&loader, &path, options).await;
                assert!(handed_out <= at, "{algorithm} {route}: the corrupt byte at {at} was handed out");
                let Error::Corrupt { offset, bytes: long, expected, found, tensors, path: named } = &error else {
                    panic!("{error}")
                };
                let start = at / CHUNK as u64 * CHUNK as u64;
                assert_eq!((*offset, *long, named), (start, (CHUNK as u64).min(length - start), &path), "{error}");
                assert!(expected != found && expected.starts_with(algorithm.name()), "{error}");
                let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
                let tensor_at =
                    |at: u64| "abcdef".chars().nth(usize::try_from(at.saturating_sub(data)).unwrap() / (SEGMENT - 12_345));
                let (first, last) = (tensor_at(start).unwrap(), tensor_at(offset + long - 1).unwrap());
                let names: Vec<_> = (first..=last).map(String::from).collect();
                assert_eq!(*tensors, names, "{error}");
                assert!(error.to_string().contains(&format!("{:?}", names[0])), "{error}");
                flip_bit(&path, at);
            }
            loader.load(&path).options(loader.load_options().route(route).verify(manifest.clone())).await.unwrap();
        }
    }
}

#[tokio::test]
async fn whole_file_checksum_withholds_the_last_segment() {
    let folder = folder();
    let bytes = random_bytes(2 * SEGMENT + 99, 4);
    let path = file(folder.path(), "model.bin", &bytes);
    let empty = file(folder.path(), "empty", b"");
    let loader = loader();
    for algorithm in Algorithm::ALL {
        let expected = digest(algorithm, &bytes);
        let image = loader.load(&path).options(loader.load_options().verify(expected)).await.unwrap();
        assert_eq!(image.report().verified, Some(format!("{algorithm} of the file")));
        let other = digest(algorithm, b"another file");
        let (handed_out, error) = load_until_error(&loader, &path, loader.load_options().verify(other)).await;
        assert!(handed_out <= 2 * SEGMENT as u64, "the last segment was handed out");
        let Error::Corrupt { expected: reported, found, .. } = &error else { panic!("{error}") };
        assert_eq!((reported, found), (&other.to_string(), &expected.to_string()));
        loader.load(&empty).options(loader.load_options().verify(digest(algorithm, b""))).await.unwrap();
        let error = loader.load(&empty).options(loader.load_options().verify(other)).await.unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        let error = loader.load([&path, &empty]).options(loader.load_options().verify(other)).await.unwrap_err();
        assert!(matches!(error, Error::Config(_)), "{error}");
    }
}

#[tokio::test]
async fn wrong_length_or_unlisted_file_fails_before_any_read() {
    let folder = folder();
    let [a, b] = ["a", "b"].map(|name| file(folder.path(), name, &random_bytes(SEGMENT + 1, 5)));
    let loader = loader();
    let manifest = manifest_of(&loader, std::slice::from_ref(&a), Algorithm::Xxh3).await;
    // If the load has one file and the manifest has one entry, the file's name may differ from the
    // name in the entry.
    loader.load(&b).options(loader.load_options().verify(manifest.clone())).await.unwrap();
    let read_bytes = loader.metrics().read_bytes;
    assert_eq!(read_bytes, 2 * (SEGMENT as u64 + 1));
    let error = loader.load([&a, &b]).options(loader.load_options().verify(manifest.clone())).await.unwrap_err();
    assert_eq!(error, Error::NotInManifest { path: b.clone() });
    std::fs::OpenOptions::new().write(true).open(&a).unwrap().set_len(SEGMENT as u64).unwrap();
    let error = loader.load(&a).options(loader.load_options().verify(manifest)).await.unwrap_err();
    assert_eq!(error, Error::WrongLength { path: a, bytes: SEGMENT as u64, expected_bytes: SEGMENT as u64 + 1 });
    assert_eq!(loader.metrics().read_bytes, read_bytes, "refused loads must read nothing");
}

#[tokio::test]
async fn each_small_file_in_shared_memory_is_verified() {
    let folder = folder();
    let contents: Vec<_> =
        (0..40).map(|n| if n % 2 == 0 { random_bytes(30_000 + n, n as u64) } else { model("xyz", 40_000) }).collect();
    let name = |n: usize| if n.is_multiple_of(2) { format!("{n}.bin") } else { format!("{n}.safetensors") };
    let paths: Vec<_> = contents.iter().enumerate().map(|(n, bytes)| file(folder.path(), &name(n), bytes)).collect();
    let loader = loader();
    let manifest = Arc::new(manifest_of(&loader, &paths, Algorithm::Crc32c).await);
    loader.load(&paths).options(loader.load_options().verify(Arc::clone(&manifest))).await.unwrap();
    flip_bit(&paths[17], 100_000);
    let error = loader.load(&paths).options(loader.load_options().verify(Arc::clone(&manifest))).await.unwrap_err();
    let Error::Corrupt { path, tensors, .. } = &error else { panic!("{error}") };
    assert_eq!((path, tensors.as_slice()), (&paths[17], &["y".to_owned(), "z".to_owned()][..]));
    // The loader still works.
    let digest: Digest = digest(Algorithm::Blake3, &contents[3]);
    loader.load(&paths[3]).options(loader.load_options().verify(digest)).await.unwrap();
}
