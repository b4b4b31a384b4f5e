//! Tests for multi-file models. They check which files are loaded, which of several tensors with
//! the same name is used, and that an incomplete model is never loaded as if it were complete.
//! Most tests run twice: with packed files, whose headers are read together with their data, and
//! with unpacked files, whose headers are read during planning.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(clippy::type_complexity, reason = "tables of test cases have complex types")]

#[path = "../common/mod.rs"]
mod common;
mod index;
mod parts;

use std::fs;
use std::path::{Path, PathBuf};

use dmaload::{Error, Format, Image, Layout, LoadOptions, Loader, Result};

use common::folder;

/// Returns a safetensors file. Each of its tensors consists of 64 bytes with the given value.
fn st(tensors: &[(&str, u8)]) -> Vec<u8> {
    let entry = |(at, (name, _)): (usize, &(&str, u8))| {
        format!(r#""{name}":{{"dtype":"U8","shape":[64],"data_offsets":[{},{}]}}"#, 64 * at, 64 * at + 64)
    };
    let header = format!("{{{}}}", tensors.iter().enumerate().map(entry).collect::<Vec<_>>().join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    tensors.iter().for_each(|&(_, value)| bytes.extend([value; 64]));
    bytes
}

fn index(map: &[(&str, &str)]) -> Vec<u8> {
    let pairs: Vec<_> = map.iter().map(|(tensor, file)| format!("{tensor:?}:{file:?}")).collect();
    format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{{{}}}}}"#, pairs.join(",")).into_bytes()
}

/// Returns a GGUF file with these metadata keys, whose values are U16. Each of its tensors
/// consists of 64 bytes with the given value.
fn gguf(keys: &[(&str, u16)], tensors: &[(&str, u8)]) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let mut bytes = [&b"GGUF"[..], &3u32.to_le_bytes()].concat();
    bytes.extend([tensors.len() as u64, keys.len() as u64].map(u64::to_le_bytes).concat());
    for (key, value) in keys {
        bytes.extend([text(key), 2u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat());
    }
    for ((name, _), at) in tensors.iter().zip(0u64..) {
        bytes.extend([text(name), 1u32.to_le_bytes().to_vec(), 64u64.to_le_bytes().to_vec()].concat());
        bytes.extend([24u32.to_le_bytes().to_vec(), (64 * at).to_le_bytes().to_vec()].concat());
    }
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    tensors.iter().for_each(|&(_, value)| bytes.extend([value; 64]));
    bytes
}

/// Returns one part of a split GGUF model. `number` starts at 0. The part's metadata claims that
/// the model has `count` parts and `all` tensors.
fn part(number: u16, count: u16, all: u16, tensors: &[(&str, u8)]) -> Vec<u8> {
    gguf(&[("split.no", number), ("split.count", count), ("split.tensors.count", all)], tensors)
}

type Files<'a> = &'a [(&'a str, Vec<u8>)];

fn write_files(folder: &Path, files: Files<'_>) {
    for (name, bytes) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// Returns a loader that packs small files, and one that does not.
fn loaders() -> [Loader; 2] {
    let loader = |packed| Loader::builder().load_options(LoadOptions::default().packed(packed)).build().unwrap();
    [loader(true), loader(false)]
}

fn value_of(image: &Image, name: &str) -> u8 {
    let bytes = image.tensor(name).unwrap().bytes().unwrap();
    assert!(bytes.len() == 64 && bytes.iter().all(|byte| *byte == bytes[0]), "{name}");
    bytes[0]
}

fn names(image: &Image) -> Vec<String> {
    let mut names: Vec<_> = image.tensors().map(|tensor| tensor.name().to_owned()).collect();
    names.sort();
    names
}

const A: &str = "model-00001-of-00002.safetensors";
const B: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[tokio::test]
async fn unindexed_tensor_in_two_files_is_an_error() {
    let (one, two) = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors");
    let (g1, g2) = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf");
    let cases: [(&str, Vec<(&str, Vec<u8>)>, [&str; 2]); 6] = [
        ("w", vec![(A, st(&[("a", 1), ("w", 1)])), (B, st(&[("b", 2), ("w", 2)]))], [A, B]),
        ("a", vec![(one, st(&[("a", 1)])), (two, st(&[("a", 2)]))], [one, two]),
        (
            "a",
            vec![("model-rank-0-part-0.safetensors", st(&[("a", 1)])), ("model-rank-1-part-0.safetensors", st(&[("a", 1)]))],
            ["rank-0", "rank-1"],
        ),
        (
            "z",
            vec![("1.safetensors", st(&[("z", 1)])), ("2.safetensors", st(&[("b", 1)])), ("3.safetensors", st(&[("z", 1)]))],
            ["1.", "3."],
        ),
        // The index does not list `x`.
        (
            "x",
            vec![(A, st(&[("a", 1), ("x", 1)])), (B, st(&[("b", 2), ("x", 2)])), (INDEX, index(&[("a", A), ("b", B)]))],
            [A, B],
        ),
        ("w", vec![(g1, part(0, 2, 2, &[("w", 1)])), (g2, part(1, 2, 2, &[("w", 2)]))], [g1, g2]),
    ];
    for (tensor, files, both) in cases {
        let folder = folder();
        write_files(folder.path(), &files);
        for loader in loaders() {
            for options in
                [loader.load_options(), loader.load_options().tensors(["*"]), loader.load_options().layout(Layout::Tensors)]
            {
                let error = loader.load(folder.path()).options(options.clone()).await.unwrap_err();
                assert!(matches!(&error, Error::DuplicateTensor { tensor: found, .. } if found == tensor), "{error}");
                let load = loader.load(folder.path()).options(options).start();
                assert_eq!(load.tensor(tensor).await.unwrap_err(), error, "neither tensor must be returned");
                assert!(both.iter().all(|name| error.to_string().contains(name)), "{error}");
            }
        }
        let inspected = dmaload::inspect_model(folder.path(), Format::Auto).await.unwrap_err();
        assert!(matches!(inspected, Error::DuplicateTensor { .. }), "{inspected}");
        // Each of these files can be loaded on its own.
        if tensor == "a" {
            for (name, _) in &files {
                assert_eq!(loaders()[0].load(folder.path().join(name)).await.unwrap().tensors().count(), 1);
            }
        }
    }
}

#[tokio::test]
async fn files_listed_by_path_may_share_tensor_names() {
    let folder = folder();
    let files = [
        ("base.safetensors", st(&[("w", 1), ("b", 3)])),
        ("lora.safetensors", st(&[("w", 2)])),
        ("l.gguf", gguf(&[], &[("w", 4)])),
    ];
    write_files(folder.path(), &files);
    write_files(folder.path(), &[("m/model.safetensors", st(&[("w", 5)]))]);
    for asked in [
        &["base.safetensors", "lora.safetensors"][..],
        &["lora.safetensors", "base.safetensors", "l.gguf"],
        &["base.safetensors", "m"],
    ] {
        let paths: Vec<PathBuf> = asked.iter().map(|name| folder.path().join(name)).collect();
        for loader in loaders() {
            for options in [loader.load_options(), loader.load_options().tensors(["w", "b"])] {
                let load = loader.load(&paths).options(options).start();
                let (by_name, both) = (load.tensor("b").await.unwrap(), load.tensor("w").await);
                assert_eq!(by_name.bytes().unwrap(), vec![3; 64]);
                let image = load.await.unwrap();
                assert_eq!(value_of(&image, "b"), 3, "the only tensor with this name must be returned");
                let error = image.tensor("w").unwrap_err();
                assert_eq!(both.unwrap_err(), error);
                assert!(matches!(&error, Error::AmbiguousTensor { paths: found, .. } if found.len() == asked.len()), "{error}");
                assert!(paths.iter().all(|path| error.to_string().contains(path.to_str().unwrap())), "{error}");
                let mut values: Vec<u8> =
                    image.files().iter().map(|file| file.tensor("w").unwrap().bytes().unwrap()[0]).collect();
                values.sort_unstable();
                assert!(values.windows(2).all(|pair| pair[0] != pair[1]), "{values:?}");
                assert_eq!(image.tensors().count(), asked.len() + 1);
            }
        }
    }
}

/// Loads a model without `allow_missing` and with it. Returns the results in this order.
async fn load_refusing_and_allowing_missing(loader: &Loader, path: &Path) -> (Result<Image>, Result<Image>) {
    let allowed = loader.load(path).options(loader.load_options().allow_missing(true)).await;
    (loader.load(path).await, allowed)
}

#[tokio::test]
async fn safetensors_file_loads_alone_but_gguf_part_does_not() {
    let folder = folder();
    write_files(folder.path(), &[(A, st(&[("a", 1)])), (INDEX, index(&[("a", A), ("b", B)]))]);
    let part_alone = folder.path().join("m-00002-of-00003.gguf");
    fs::write(&part_alone, part(1, 3, 3, &[("c", 1)])).unwrap();
    for loader in loaders() {
        assert_eq!(names(&loader.load(folder.path().join(A)).await.unwrap()), ["a"]);
        let error = loader.load(&part_alone).await.unwrap_err();
        assert!(error.to_string().contains("m-00001-of-00003.gguf"), "{error}");
        let alone = loader.load(&part_alone).options(loader.load_options().as_one_file(true)).await.unwrap();
        assert_eq!(names(&alone), ["c"]);
        let error = loader.load(folder.path().join("x-00001-of-00002.gguf")).await.unwrap_err();
        assert!(matches!(error, Error::File { .. }), "a wrong path must not be reported as a missing part: {error}");
    }
}

#[tokio::test]
async fn empty_file_with_a_model_name_is_an_error_unless_raw() {
    let folder = folder();
    let names = ["m.safetensors", "m.gguf", "M.SAFETENSORS", "m.GGUF", "m.bin", "m"];
    names.iter().for_each(|name| write_files(folder.path(), &[(name, Vec::new())]));
    for loader in loaders() {
        for (number, name) in names.into_iter().enumerate() {
            let path = [folder.path().join(name)];
            let by = |format| loader.load(&path).options(loader.load_options().format(format)).start();
            assert_eq!(by(Format::Auto).await.is_ok(), number >= 4, "{name}");
            assert!(by(Format::Safetensors).await.is_err() && by(Format::Gguf).await.is_err(), "{name}");
            assert_eq!(by(Format::Raw).await.unwrap().report().bytes, 0);
            let tensors = loader.load(&path).options(loader.load_options().layout(Layout::Tensors)).await;
            assert_eq!(tensors.is_ok(), number >= 4, "{name}");
        }
    }
}

#[tokio::test]
async fn error_for_a_folder_without_a_model_lists_alternatives() {
    let cases: [(Vec<(&str, Vec<u8>)>, &[&str]); 8] = [
        (
            vec![
                ("refs/main", b"r2\n".to_vec()),
                ("snapshots/r1/model.safetensors", st(&[("a", 1)])),
                ("snapshots/r2/x", vec![1]),
            ],
            &["snapshots/r2"],
        ),
        (
            vec![("unet/m.safetensors", st(&[("a", 1)])), ("vae/m.gguf", gguf(&[], &[])), ("docs/x", vec![1])],
            &["\"unet/\", \"vae/\""],
        ),
        (vec![("org/model/model.safetensors", st(&[("a", 1)]))], &["\"org/model/\""]),
        (vec![("pytorch_model.bin", b"PK\x03\x04".to_vec()), ("config.json", b"{}".to_vec())], &["pytorch_model.bin", "pickled"]),
        (vec![("model.safetensors.part", vec![1])], &["unfinished downloads", "model.safetensors.part"]),
        (vec![("flux.sft", st(&[("a", 1)]))], &["flux.sft", "look like models"]),
        (vec![("sha256-aaaa", gguf(&[], &[("a", 1)]))], &["sha256-aaaa"]),
        (vec![("README.md", vec![1])], &["no *.safetensors, *.safetensors.index.json or *.gguf"]),
    ];
    for (files, says) in cases {
        let folder = folder();
        write_files(folder.path(), &files);
        let error = loaders()[0].load(folder.path()).await.unwrap_err();
        assert!(matches!(error, Error::NoModel { .. }), "{error}");
        assert!(says.iter().all(|text| error.to_string().contains(text)), "{says:?}: {error}");
    }
}

#[tokio::test]
async fn files_with_non_utf8_names_are_loaded() {
    use std::os::unix::ffi::OsStrExt;
    let folder = folder();
    let name = |bytes: &'static [u8]| folder.path().join(std::ffi::OsStr::from_bytes(bytes));
    fs::write(name(b"m\xff.safetensors"), st(&[("a", 1)])).unwrap();
    fs::write(name(b"n.safetensors"), st(&[("b", 2)])).unwrap();
    for loader in loaders() {
        let image = loader.load(folder.path()).await.unwrap();
        assert_eq!((names(&image), value_of(&image, "a")), (vec!["a".to_owned(), "b".to_owned()], 1));
    }
}

#[tokio::test]
async fn gguf_files_ignored_alongside_safetensors_are_noted() {
    for files in [vec![("model.safetensors", st(&[("a", 1)]))], vec![(A, st(&[("a", 1)])), (INDEX, index(&[("a", A)]))]] {
        let folder = folder();
        write_files(folder.path(), &files);
        let load = async |format| {
            let loader = &loaders()[0];
            let image = loader.load(folder.path()).options(loader.load_options().format(format)).await.unwrap();
            image.report().notes.join("\n")
        };
        assert_eq!(load(Format::Auto).await, "");
        write_files(folder.path(), &[("m.gguf", gguf(&[], &[("a", 1)]))]);
        let notes = load(Format::Auto).await;
        assert!(notes.contains("not loaded, because the folder has safetensors files: \"m.gguf\""), "{notes}");
        assert_eq!(load(Format::Safetensors).await, "", "no note is needed if the caller chose the format");
    }
}
