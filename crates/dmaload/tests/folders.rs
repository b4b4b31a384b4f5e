//! Models of several files: which of them are loaded, which tensor counts of those of one name,
//! and that no half of a model is taken for a whole one. Small files, which share memory and have
//! their headers read late, and the same ones each with a memory of its own, whose headers are
//! read when the load is planned.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]
#![allow(clippy::type_complexity, reason = "tables of cases")]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use common::folder;
use dmaload::share::{AttachOptions, Server, ServerOptions, attach};
use dmaload::{Error, Format, Image, Layout, LoadOptions, Loader, Result, Shard};

/// A safetensors file whose tensors are of 64 bytes of one value each.
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

/// A GGUF file with these keys, of U16, and tensors of 64 bytes of one value.
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

/// A part of a split model, from 0 on, of a model of so many tensors.
fn part(number: u16, count: u16, all: u16, tensors: &[(&str, u8)]) -> Vec<u8> {
    gguf(&[("split.no", number), ("split.count", count), ("split.tensors.count", all)], tensors)
}

type Files<'a> = &'a [(&'a str, Vec<u8>)];

fn written(folder: &Path, files: Files<'_>) {
    for (name, bytes) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// Loaders that read headers late and early.
fn loaders() -> [Loader; 2] {
    let loader = |packed| Loader::builder().options(LoadOptions::default().packed(packed)).build().unwrap();
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

/// Folders whose tensor `w` is in several files, its value, and all names.
fn overlays() -> Vec<(Vec<(&'static str, Vec<u8>)>, u8, &'static [&'static str])> {
    let (over, sub) = ("model-overlay-00001.safetensors", "sub/a.safetensors");
    vec![
        (
            vec![
                (A, st(&[("a", 9), ("w", 1)])),
                (B, st(&[("b", 9)])),
                (over, st(&[("w", 2)])),
                (INDEX, index(&[("a", A), ("b", B), ("w", over)])),
            ],
            2,
            &["a", "b", "w"],
        ),
        (
            vec![(A, st(&[("a", 9), ("w", 1)])), (B, st(&[("b", 9), ("w", 2)])), (INDEX, index(&[("a", A), ("b", B), ("w", B)]))],
            2,
            &["a", "b", "w"],
        ),
        (vec![(A, st(&[("w", 1)])), (B, st(&[("w", 2), ("b", 9)])), (INDEX, index(&[("w", A), ("b", B)]))], 1, &["b", "w"]),
        (
            vec![
                (A, st(&[("w", 1), ("a", 9)])),
                (B, st(&[("extra", 9), ("w", 2), ("b", 9)])),
                (sub, st(&[("a", 5), ("b", 6), ("w", 3)])),
                (INDEX, index(&[("a", A), ("b", B), ("w", "./sub//a.safetensors")])),
            ],
            3,
            &["a", "b", "extra", "w"],
        ),
    ]
}

#[tokio::test]
async fn the_index_decides_which_of_two_tensors_counts() {
    for (files, value, all) in overlays() {
        let folder = folder();
        written(folder.path(), &files);
        for loader in loaders() {
            let whole = loader.load(folder.path()).await.unwrap();
            let by_tensors = loader.load_with([folder.path()], loader.options().layout(Layout::Tensors)).await.unwrap();
            let chosen = loader.load_with([folder.path()], loader.options().tensors(["w", "*"])).await.unwrap();
            for image in [&whole, &by_tensors, &chosen] {
                assert_eq!((value_of(image, "w"), names(image)), (value, all.iter().map(|&name| name.to_owned()).collect()));
                for other in ["a", "b", "extra"].into_iter().filter(|name| all.contains(name)) {
                    assert_eq!(value_of(image, other), 9, "{other}");
                }
                let own = image.files().iter().filter_map(|file| file.tensor("w")).count();
                assert_eq!(own, 1, "files have theirs only where the index says so");
            }
            let w = loader.load_with([folder.path()], loader.options().tensors(["w"])).await.unwrap();
            assert_eq!((value_of(&w, "w"), w.tensors().count(), w.report().wanted_bytes), (value, 1, 64));
            for options in [loader.options(), loader.options().tensors(["*"]), loader.options().tensor_names(["w"])] {
                let mut tensors = loader.stream_with([folder.path()], options).tensors();
                let mut seen = Vec::new();
                while let Some(tensor) = tensors.next().await {
                    let tensor = tensor.unwrap();
                    if tensor.name() == "w" {
                        assert_eq!(tensor.bytes().unwrap(), vec![value; 64]);
                    }
                    seen.push(tensor.name().to_owned());
                }
                seen.sort();
                assert!(seen == *all || seen == ["w"], "each once: {seen:?}");
            }
        }
    }
}

#[tokio::test]
async fn what_is_shared_and_inspected_is_what_the_index_says() {
    for (files, value, all) in overlays() {
        let folder = folder();
        written(folder.path(), &files);
        for loader in loaders() {
            let socket = folder.path().join("socket");
            let server = Server::bind(&socket, ServerOptions::default()).unwrap();
            server.publish("model", loader.load(folder.path()).await.unwrap()).unwrap();
            let attached = attach(&socket, AttachOptions::default()).await.unwrap().image;
            assert_eq!((value_of(&attached, "w"), names(&attached)), (value, all.iter().map(|&name| name.to_owned()).collect()));
            drop(server);
        }
        let inspected = dmaload::inspect_model(folder.path(), Format::Auto).unwrap();
        let maps = inspected.iter().map(|(_, file)| file.tensors.as_ref().unwrap());
        let mut seen: Vec<_> = maps.flatten().map(|info| info.name.as_str()).collect();
        seen.sort_unstable();
        assert_eq!(seen, all);
    }
}

#[tokio::test]
async fn an_index_is_one_by_any_of_its_names() {
    for name in [
        INDEX,
        "model.safetensors.index.fp16.json",
        "model.safetensors.fp16.index.json",
        "model.fp16.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.non_ema.json",
        "model.index.fp16.json",
    ] {
        for values in [[A, B], ["./model-00001-of-00002.safetensors", ".//x/../model-00002-of-00002.safetensors"]] {
            let folder = folder();
            let files = [(A, st(&[("a", 1)])), (B, st(&[("b", 2)])), (name, index(&[("a", values[0]), ("b", values[1])]))];
            written(folder.path(), &files);
            for loader in loaders() {
                for path in [folder.path().to_owned(), folder.path().join(name)] {
                    let image = loader.load(&path).await.unwrap();
                    assert_eq!((value_of(&image, "a"), value_of(&image, "b"), image.files().len()), (1, 2, 2), "{name}");
                }
            }
        }
    }
    // One that is not named so would be loaded as its own text, and one of pickled files, too.
    let folder = folder();
    let other = index(&[("a", "pytorch_model-00001-of-00001.bin")]);
    let files = [("blob", index(&[("a", A)])), ("pytorch_model.bin.index.json", other), ("free.index.json", b"{}".to_vec())];
    written(folder.path(), &files);
    for loader in loaders() {
        for name in ["blob", "pytorch_model.bin.index.json"] {
            let error = loader.load(folder.path().join(name)).await.unwrap_err();
            assert!(matches!(error, Error::NoModel { .. }), "{error}");
            let raw = loader.load_with([folder.path().join(name)], loader.options().format(Format::Raw)).await.unwrap();
            assert_eq!(raw.tensors().count(), 0);
        }
        assert_eq!(loader.load(folder.path().join("free.index.json")).await.unwrap().files()[0].bytes().unwrap(), &b"{}"[..]);
    }
}

#[tokio::test]
async fn an_index_that_leaves_its_folder_is_refused() {
    let folder = folder();
    written(folder.path(), &[("s.safetensors", st(&[("a", 1)])), ("m/x", Vec::new())]);
    let outside = folder.path().join("s.safetensors").to_str().unwrap().to_owned();
    for value in ["../s.safetensors", "./../s.safetensors", "x/../../s.safetensors", outside.as_str()] {
        written(folder.path(), &[("m/model.safetensors.index.json", index(&[("a", value)]))]);
        for loader in loaders() {
            let error = loader.load(folder.path().join("m")).await.unwrap_err();
            assert!(error.to_string().contains("not within its folder"), "{value}: {error}");
        }
    }
}

#[tokio::test]
async fn a_name_in_two_files_without_an_index_is_an_error() {
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
        // The index says nothing of it.
        (
            "x",
            vec![(A, st(&[("a", 1), ("x", 1)])), (B, st(&[("b", 2), ("x", 2)])), (INDEX, index(&[("a", A), ("b", B)]))],
            [A, B],
        ),
        ("w", vec![(g1, part(0, 2, 2, &[("w", 1)])), (g2, part(1, 2, 2, &[("w", 2)]))], [g1, g2]),
    ];
    for (tensor, files, both) in cases {
        let folder = folder();
        written(folder.path(), &files);
        for loader in loaders() {
            for options in [loader.options(), loader.options().tensors(["*"]), loader.options().layout(Layout::Tensors)] {
                let error = loader.load_with([folder.path()], options).await.unwrap_err();
                assert!(matches!(&error, Error::DuplicateTensor { tensor: found, .. } if found == tensor), "{error}");
                assert!(both.iter().all(|name| error.to_string().contains(name)), "{error}");
            }
        }
        let inspected = dmaload::inspect_model(folder.path(), Format::Auto).unwrap_err();
        assert!(matches!(inspected, Error::DuplicateTensor { .. }), "{inspected}");
        // Each alone is a model of its own, unless it is a part.
        if tensor == "a" {
            for (name, _) in &files {
                assert_eq!(loaders()[0].load(folder.path().join(name)).await.unwrap().tensors().count(), 1);
            }
        }
    }
}

#[tokio::test]
async fn named_files_may_share_names_and_only_lookups_fail() {
    let folder = folder();
    let files = [
        ("base.safetensors", st(&[("w", 1), ("b", 3)])),
        ("lora.safetensors", st(&[("w", 2)])),
        ("l.gguf", gguf(&[], &[("w", 4)])),
    ];
    written(folder.path(), &files);
    written(folder.path(), &[("m/model.safetensors", st(&[("w", 5)]))]);
    for asked in [
        &["base.safetensors", "lora.safetensors"][..],
        &["lora.safetensors", "base.safetensors", "l.gguf"],
        &["base.safetensors", "m"],
    ] {
        let paths: Vec<PathBuf> = asked.iter().map(|name| folder.path().join(name)).collect();
        for loader in loaders() {
            for options in [loader.options(), loader.options().tensors(["w", "b"])] {
                let image = loader.load_with(&paths, options).await.unwrap();
                assert_eq!(value_of(&image, "b"), 3, "a name that one file has");
                let error = image.tensor("w").unwrap_err();
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

async fn both_ways(loader: &Loader, path: &Path) -> (Result<Image>, Result<Image>) {
    let allowed = loader.load_with([path], loader.options().allow_missing(true)).await;
    (loader.load(path).await, allowed)
}

#[tokio::test]
async fn missing_parts_are_named_unless_they_may_be_missing() {
    let g = |number| format!("m-0000{number}-of-00003.gguf");
    let (g1, g2, g3) = (g(1), g(2), g(3));
    let (a3, c3) = ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors");
    let two = index(&[("a", A), ("b", B)]);
    // The files, dangling links, what the error says, and how many tensors are there.
    let cases: [(Vec<(&str, Vec<u8>)>, &[(&str, &str)], &[&str], usize); 14] = [
        (vec![(a3, st(&[("a", 1)])), (c3, st(&[("c", 1)]))], &[], &["1 is missing", "model-00002-of-00003.safetensors"], 2),
        (vec![(A, st(&[("a", 1)]))], &[], &["1 is missing", B], 1),
        (vec![(A, st(&[("a", 1)])), ("model-00002-of-00002.safetensors.incomplete", vec![1])], &[], &[B, "unfinished"], 1),
        (vec![(A, st(&[("a", 1)])), ("model-00002-of-00002.safetensors.part", vec![1])], &[], &[B, "unfinished"], 1),
        (vec![(A, st(&[("a", 1)])), (B, Vec::new())], &[], &[B, "0 bytes"], 1),
        (vec![("a.safetensors", st(&[("a", 1)])), ("b.safetensors", Vec::new())], &[], &["b.safetensors", "0 bytes"], 1),
        (vec![("a.safetensors", st(&[("a", 1)]))], &[("b.safetensors", "nowhere")], &["b.safetensors", "nowhere"], 1),
        (vec![(INDEX, two.clone()), (A, st(&[("a", 1)]))], &[], &["the index names 2 files, 1 is missing", B], 1),
        (vec![(INDEX, two.clone()), (A, st(&[("a", 1)])), (B, Vec::new())], &[], &["names 2 files, 1 is missing", B], 1),
        (
            vec![(INDEX, two.clone()), (A, st(&[("a", 1)])), ("blobs/b.incomplete", vec![1])],
            &[(B, "blobs/b")],
            &[B, "b.incomplete"],
            1,
        ),
        (
            vec![
                (INDEX, two.clone()),
                (A, st(&[("a", 1)])),
                (".cache/huggingface/download/model-00002-of-00002.safetensors.x.incomplete", vec![1]),
            ],
            &[],
            &[B, "unfinished"],
            1,
        ),
        (vec![(&g1, part(0, 3, 3, &[("a", 1)])), (&g3, part(2, 3, 3, &[("c", 1)]))], &[], &["2 of 3", "1 is missing", &g2], 2),
        (vec![(&g2, part(1, 3, 3, &[("a", 1)])), (&g1, Vec::new())], &[(&g3, "gone")], &["2 are missing", &g1, &g3, "gone"], 1),
        (vec![("m_1_of_2.safetensors", st(&[("a", 1)]))], &[], &["m_2_of_2.safetensors"], 1),
    ];
    for (files, links, says, there) in cases {
        let folder = folder();
        written(folder.path(), &files);
        links.iter().for_each(|(name, target)| symlink(target, folder.path().join(name)).unwrap());
        for loader in loaders() {
            let (error, allowed) = both_ways(&loader, folder.path()).await;
            let error = error.unwrap_err();
            assert!(matches!(error, Error::Incomplete { .. }), "{error}");
            assert!(says.iter().all(|text| error.to_string().contains(text)), "{says:?}: {error}");
            let allowed = allowed.unwrap();
            assert_eq!(allowed.tensors().count(), there, "{says:?}");
            let notes = allowed.report().notes.join("\n");
            assert!(notes.contains("not complete") && notes.contains("missing"), "{notes}");
        }
        let inspected = dmaload::inspect_model(folder.path(), Format::Auto).unwrap_err();
        assert!(matches!(inspected, Error::Incomplete { .. }), "{inspected}");
    }
}

#[tokio::test]
async fn what_is_whole_loads_beside_unfinished_downloads() {
    let gg = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
    let cases: [Vec<(&str, Vec<u8>)>; 8] = [
        vec![(A, st(&[("a", 1)])), (B, st(&[("b", 1)])), ("model-00002-of-00002.safetensors.incomplete", vec![1])],
        vec![("model.safetensors", st(&[("a", 1), ("b", 1)])), ("model.safetensors.part", vec![1])],
        vec![("x-00000-of-00002.safetensors", st(&[("a", 1)])), ("x-00001-of-00002.safetensors", st(&[("b", 1)]))],
        vec![("x-00001-of-000002.safetensors", st(&[("a", 1)])), ("x-00002-of-000002.safetensors", st(&[("b", 1)]))],
        vec![("x.fp16-00001-of-00001.safetensors", st(&[("a", 1), ("b", 1)]))],
        vec![(gg[0], part(0, 2, 2, &[("a", 1)])), (gg[1], part(1, 2, 2, &[("b", 1)])), ("m.gguf.part", vec![1])],
        vec![(gg[0], gguf(&[], &[("a", 1)])), (gg[1], gguf(&[], &[("b", 1)]))],
        vec![("consolidated.safetensors", st(&[("c", 1)])), (A, st(&[("a", 1)]))],
    ];
    for (number, files) in cases.iter().enumerate() {
        let folder = folder();
        written(folder.path(), files);
        // Of the last one a part is missing; the parts before it are not.
        for loader in loaders() {
            let image = loader.load(folder.path()).await;
            if number == cases.len() - 1 {
                assert!(image.unwrap_err().to_string().contains(B));
            } else {
                assert_eq!(names(&image.unwrap()), ["a", "b"]);
            }
        }
    }
}

#[tokio::test]
async fn a_shard_loads_alone_by_its_own_path() {
    let folder = folder();
    written(folder.path(), &[(A, st(&[("a", 1)])), (INDEX, index(&[("a", A), ("b", B)]))]);
    let part_alone = folder.path().join("m-00002-of-00003.gguf");
    fs::write(&part_alone, part(1, 3, 3, &[("c", 1)])).unwrap();
    for loader in loaders() {
        assert_eq!(names(&loader.load(folder.path().join(A)).await.unwrap()), ["a"]);
        let error = loader.load(&part_alone).await.unwrap_err();
        assert!(error.to_string().contains("m-00001-of-00003.gguf"), "{error}");
        let alone = loader.load_with([&part_alone], loader.options().as_one_file(true)).await.unwrap();
        assert_eq!(names(&alone), ["c"]);
        let error = loader.load(folder.path().join("x-00001-of-00002.gguf")).await.unwrap_err();
        assert!(matches!(error, Error::File { .. }), "a wrong path is not a missing part: {error}");
    }
}

#[tokio::test]
async fn chosen_tensors_need_only_the_files_of_the_index() {
    let c = "model-00003-of-00003.safetensors";
    let map = index(&[("a.w", A), ("b.w", B), ("c.w", c)]);
    // Without it, without bytes, or with others.
    for (number, second) in [None, Some(Vec::new()), Some(b"<html>".to_vec())].into_iter().enumerate() {
        let folder = folder();
        written(folder.path(), &[(A, st(&[("a.w", 1), ("extra", 4)])), (c, st(&[("c.w", 3)])), (INDEX, map.clone())]);
        second.iter().for_each(|bytes| written(folder.path(), &[(B, bytes.clone())]));
        for loader in loaders() {
            for patterns in [&["a.w"][..], &["c.w", "a.w"], &["{a,c}.*"], &["a.?"]] {
                let options = loader.options().tensors(patterns.iter().copied());
                let image = loader.load_with([folder.path()], options).await.unwrap();
                assert_eq!(value_of(&image, "a.w"), 1);
                let error = image.tensor("b.w").unwrap_err();
                assert!(matches!(&error, Error::NotSelected { path, .. } if path.ends_with(B)), "{error}");
                assert!(matches!(image.tensor("d.w"), Err(Error::NoSuchTensor(_))));
            }
            let by_name = loader.load_with([folder.path()], loader.options().tensor_names(["c.w"])).await.unwrap();
            assert_eq!((value_of(&by_name, "c.w"), by_name.files().len()), (3, 1));
            assert!(loader.load_with([folder.path()], loader.options().tensors(["*.w"])).await.is_err());
            assert!(loader.load(folder.path()).await.is_err());
            // What the index does not know may be in any file that is there.
            if number < 2 {
                let extra = loader.load_with([folder.path()], loader.options().tensors(["extra"])).await.unwrap();
                assert_eq!(value_of(&extra, "extra"), 4);
                let error = loader.load_with([folder.path()], loader.options().tensors(["none"])).await.unwrap_err();
                assert!(matches!(error, Error::NoSuchTensor(_)), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn names_with_characters_of_patterns_are_names() {
    let folder = folder();
    let all = ["layers[0].w", "layers.{0}.w", "a*b", "a,b", "a?b", "axb", ""];
    written(folder.path(), &[("m.safetensors", st(&all.map(|name| (name, 7))))]);
    for loader in loaders() {
        for name in all {
            let options = loader.options().tensor_names([name]);
            let image = loader.load_with([folder.path().join("m.safetensors")], options).await.unwrap();
            assert_eq!(names(&image), [name]);
        }
    }
}

#[tokio::test]
async fn parts_of_a_split_gguf_model_are_checked() {
    let name = |number: usize, count: usize| format!("m-{number:05}-of-{count:05}.gguf");
    let other = |mut keys: Vec<(&'static str, u16)>, value| {
        keys.push(("other", value));
        keys
    };
    // Parts by their order, and what is said; nothing where they are whole.
    let cases: Vec<(Vec<Vec<u8>>, &str)> = vec![
        (vec![part(0, 2, 2, &[("a", 1)]), part(1, 2, 2, &[("b", 1)])], ""),
        // A first part without tensors, also where the second counts otherwise; no tensors at all.
        (vec![part(0, 2, 1, &[]), part(1, 2, 1, &[("b", 1)])], ""),
        (
            vec![part(0, 2, 1, &[]), part(1, 2, 2, &[("b", 1)])],
            "note: split.tensors.count is 2 in \"m-00002-of-00002.gguf\", but 1 in",
        ),
        (vec![gguf(&[("split.no", 0), ("split.count", 2)], &[]), part(1, 2, 1, &[("b", 1)])], ""),
        (vec![gguf(&[("split.no", 0), ("split.count", 2)], &[]), part(1, 2, 5, &[("b", 1)])], "split.tensors.count is 5"),
        (vec![part(0, 2, 0, &[]), part(1, 2, 0, &[])], ""),
        (
            vec![
                gguf(&[("split.no", 0), ("split.count", 2)], &[("a", 1)]),
                gguf(&[("split.no", 1), ("split.count", 2)], &[("b", 1)]),
            ],
            "note: \"m-00001-of-00002.gguf\" has no split.tensors.count",
        ),
        (vec![part(1, 2, 2, &[("b", 1)]), part(0, 2, 2, &[("a", 1)])], "its name says that it is part 1 of 2"),
        (vec![part(0, 2, 2, &[("a", 1)]), part(0, 2, 2, &[("a", 1)])], "its name says that it is part 2 of 2"),
        (vec![part(0, 2, 2, &[("a", 1)]), part(1, 3, 2, &[("b", 1)])], "part 2 of 3"),
        (vec![part(0, 2, 2, &[("a", 1)]), part(1, 2, 3, &[("b", 1)])], "split.tensors.count is 3"),
        (
            vec![part(0, 2, 3, &[("a", 1)]), part(1, 2, 3, &[("b", 1)])],
            "the 2 parts have 2 tensors, but split.tensors.count is 3",
        ),
        (vec![part(0, 2, 1, &[]), part(1, 2, 1, &[])], "the 2 parts have 0 tensors"),
        (vec![part(0, 2, 2, &[("a", 1)]), gguf(&[], &[("b", 1)])], "no split.count"),
        (vec![part(0, 2, 2, &[("a", 1)]), part(2, 2, 2, &[("b", 1)])], "part 3 of 2"),
        (vec![part(0, 2, 2, &[("a", 1)]), gguf(&[("split.count", 2)], &[("b", 1)])], "no split.no"),
        (
            vec![part(0, 3, 3, &[("a", 1)]), part(1, 3, 3, &[("b", 1)]), gguf(&other(vec![("split.no", 2)], 0), &[("c", 1)])],
            "no split.count",
        ),
    ];
    for (parts, says) in cases {
        let folder = folder();
        let files: Vec<_> = parts.iter().enumerate().map(|(at, bytes)| (name(at + 1, parts.len()), bytes.clone())).collect();
        let paths: Vec<_> = files.iter().map(|(name, _)| folder.path().join(name)).collect();
        files.iter().for_each(|(name, bytes)| written(folder.path(), &[(name.as_str(), bytes.clone())]));
        for loader in loaders() {
            let last = paths.last().unwrap();
            for asked in [vec![folder.path()], vec![last.as_path()], paths.iter().map(PathBuf::as_path).collect()] {
                for options in [loader.options(), loader.options().tensors(["*"])] {
                    let loaded = loader.load_with(&asked, options.clone()).await;
                    match loaded {
                        Ok(image) => {
                            let notes = image.report().notes.join("\n");
                            let noted = says.strip_prefix("note: ");
                            assert!(says.is_empty() || noted.is_some(), "{says}: {} tensors", image.tensors().count());
                            assert!(notes.contains(noted.unwrap_or_default()), "{says:?}: {notes}");
                            assert_eq!(notes.contains("split.tensors.count"), noted.is_some(), "{says:?}: {notes}");
                        }
                        // A pattern that means no tensor of none.
                        Err(Error::NoSuchTensor(_)) if options != loader.options() => {}
                        Err(error) => assert!(!says.is_empty() && error.to_string().contains(says), "{says:?}: {error}"),
                    }
                }
            }
            let raw = loader.load_with(&paths, loader.options().format(Format::Raw)).await.unwrap();
            assert_eq!(raw.files().len(), parts.len());
        }
    }
}

/// The name of the file says nothing of what is inside.
#[tokio::test]
async fn a_model_inside_a_file_is_checked_as_a_whole_one() {
    let folder = folder();
    let inner = part(0, 2, 2, &[("a", 1)]);
    let whole = gguf(&[], &[("a", 1)]);
    let container = |bytes: &[u8]| [&[9; 5000][..], bytes, &[7; 3000]].concat();
    written(folder.path(), &[("app.apk", container(&inner)), ("m-00001-of-00002.gguf", container(&whole))]);
    for loader in loaders() {
        for shard in
            [None, Some(Shard { rank: 0, world_size: 2, dim: None }), Some(Shard { rank: 0, world_size: 2, dim: Some(0) })]
        {
            let options = |format| {
                let options = loader.options().format(format);
                shard.map_or(options.clone(), |shard| options.shard(shard))
            };
            let inside = |name: &str, bytes: &[u8], options| {
                loader.load_inside(folder.path().join(name), 5000..5000 + bytes.len() as u64, options)
            };
            let error = inside("app.apk", &inner, options(Format::Auto)).await.unwrap_err();
            assert!(matches!(error, Error::Incomplete { .. }), "{shard:?}: {error}");
            assert!(error.to_string().contains("part 1 of 2"), "{shard:?}: {error}");
            inside("app.apk", &inner, options(Format::Auto).allow_missing(true)).await.unwrap();
            inside("m-00001-of-00002.gguf", &whole, options(Format::Auto)).await.unwrap();
        }
        let raw = loader.load_inside(folder.path().join("app.apk"), 0..100, loader.options().format(Format::Raw)).await.unwrap();
        assert_eq!(raw.report().wanted_bytes, 100);
    }
}

/// llama.cpp finds the parts of a model by names with five digits only, and otherwise goes by what the files say.
#[tokio::test]
async fn parts_numbered_otherwise_are_never_taken_for_the_whole() {
    for end in ["1-of-2", "0001-of-0002", "1_of_2", "00001-of-2"] {
        let second = end.replacen('1', "2", 1);
        let (first, second) = (format!("m-{end}.gguf"), format!("m-{second}.gguf"));
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        written(folder.path(), &[(first.as_str(), part(0, 2, 2, &[("a", 1)])), (second.as_str(), part(1, 2, 2, &[("b", 1)]))]);
        for loader in loaders() {
            let error = loader.load(folder.path()).await.unwrap_err();
            assert!(matches!(error, Error::NoModel { .. }), "{error}");
            assert!(error.to_string().contains("NAME-00001-of-00002.gguf"), "{error}");
            for name in [&first, &second] {
                let (error, allowed) = both_ways(&loader, &at(name)).await;
                assert!(matches!(error.unwrap_err(), Error::Incomplete { .. }));
                assert_eq!(allowed.unwrap().tensors().count(), 1);
            }
            let both = loader.load_with([at(&second), at(&first)], loader.options()).await.unwrap();
            assert_eq!(names(&both), ["a", "b"]);
        }
        fs::remove_file(at(&second)).unwrap();
        for loader in loaders() {
            let (error, _) = both_ways(&loader, folder.path()).await;
            assert!(matches!(error.unwrap_err(), Error::Incomplete { .. }));
        }
        // What says that it is whole is loaded, with a note on its name.
        written(folder.path(), &[(first.as_str(), gguf(&[], &[("a", 1)]))]);
        for loader in loaders() {
            for path in [folder.path().to_owned(), at(&first)] {
                let notes = loader.load(path).await.unwrap().report().notes.join("\n");
                assert!(notes.contains("is named as part 1 of 2, and says that it is a whole model"), "{notes}");
            }
        }
    }
}

#[tokio::test]
async fn a_part_under_a_name_that_says_nothing_is_a_part() {
    let folder = folder();
    let both = [part(0, 2, 2, &[("a", 1)]), part(1, 2, 2, &[("b", 1)])];
    written(folder.path(), &[("blobs/b0", both[0].clone()), ("blobs/b1", both[1].clone()), ("two.gguf", both.concat())]);
    written(folder.path(), &[("three.gguf", part(0, 3, 3, &[("a", 1)])), ("m.safetensors", st(&[("s", 1)]))]);
    let whole = [
        ("zero.gguf", gguf(&[("split.count", 0)], &[("a", 1)])),
        ("one.gguf", part(0, 1, 1, &[("a", 1)])),
        ("vocabulary.gguf", gguf(&[("k", 1)], &[])),
    ];
    written(folder.path(), &whole);
    fs::create_dir(folder.path().join("snapshot")).unwrap();
    for number in 0..2 {
        let link = folder.path().join(format!("snapshot/m-{:05}-of-00002.gguf", number + 1));
        symlink(format!("../blobs/b{number}"), link).unwrap();
    }
    let at = |name: &str| folder.path().join(name);
    for loader in loaders() {
        for (name, says) in
            [("blobs/b1", "part 2 of 2"), ("blobs/b0", "part 1 of 2"), ("two.gguf", "part 1 of 2"), ("three.gguf", "part 1 of 3")]
        {
            let (error, allowed) = both_ways(&loader, &at(name)).await;
            let error = error.unwrap_err();
            assert!(matches!(error, Error::Incomplete { .. }) && error.to_string().contains(says), "{error}");
            let allowed = allowed.unwrap();
            assert_eq!(allowed.tensors().count(), 1);
            assert!(allowed.report().notes.join("\n").contains(says), "{:?}", allowed.report().notes);
        }
        // Named one by one, in any order, and with others beside them.
        let paths = [at("blobs/b1"), at("m.safetensors"), at("blobs/b0")];
        assert_eq!(names(&loader.load_with(&paths, loader.options()).await.unwrap()), ["a", "b", "s"]);
        let twice = loader.load_with([at("blobs/b1"), at("blobs/b1")], loader.options()).await.unwrap_err();
        assert!(twice.to_string().contains("and so is"), "{twice}");
        assert_eq!(names(&loader.load(at("snapshot")).await.unwrap()), ["a", "b"]);
        assert_eq!(names(&loader.load(at("snapshot/m-00002-of-00002.gguf")).await.unwrap()), ["a", "b"]);
        for (name, _) in &whole {
            loader.load(at(name)).await.unwrap();
        }
    }
}

#[tokio::test]
async fn an_empty_file_named_as_a_model_is_an_error_unless_raw() {
    let folder = folder();
    let names = ["m.safetensors", "m.gguf", "M.SAFETENSORS", "m.GGUF", "m.bin", "m"];
    names.iter().for_each(|name| written(folder.path(), &[(name, Vec::new())]));
    for loader in loaders() {
        for (number, name) in names.into_iter().enumerate() {
            let path = [folder.path().join(name)];
            let by = |format| loader.load_with(&path, loader.options().format(format));
            assert_eq!(by(Format::Auto).await.is_ok(), number >= 4, "{name}");
            assert!(by(Format::Safetensors).await.is_err() && by(Format::Gguf).await.is_err(), "{name}");
            assert_eq!(by(Format::Raw).await.unwrap().report().bytes, 0);
            let tensors = loader.load_with(&path, loader.options().layout(Layout::Tensors)).await;
            assert_eq!(tensors.is_ok(), number >= 4, "{name}");
        }
    }
}

#[tokio::test]
async fn a_folder_without_a_model_says_where_one_is() {
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
        (vec![("model.safetensors.part", vec![1])], &["not finished", "model.safetensors.part"]),
        (vec![("flux.sft", st(&[("a", 1)]))], &["flux.sft", "look like models"]),
        (vec![("sha256-aaaa", gguf(&[], &[("a", 1)]))], &["sha256-aaaa"]),
        (vec![("README.md", vec![1])], &["no *.safetensors, *.safetensors.index.json or *.gguf"]),
    ];
    for (files, says) in cases {
        let folder = folder();
        written(folder.path(), &files);
        let error = loaders()[0].load(folder.path()).await.unwrap_err();
        assert!(matches!(error, Error::NoModel { .. }), "{error}");
        assert!(says.iter().all(|text| error.to_string().contains(text)), "{says:?}: {error}");
    }
}

#[tokio::test]
async fn a_stale_index_and_what_is_passed_over_are_told() {
    let folder = folder();
    written(folder.path(), &[("model.safetensors", st(&[("a", 1)])), (INDEX, index(&[("a", A), ("b", B)]))]);
    for loader in loaders() {
        let error = loader.load(folder.path()).await.unwrap_err().to_string();
        assert!(
            error.contains("2 are missing") && error.contains("left over") && error.contains("\"model.safetensors\""),
            "{error}"
        );
    }
    written(folder.path(), &[(A, st(&[("a", 1)])), (B, st(&[("b", 1)]))]);
    written(folder.path(), &[("model.safetensors.index.fp16.json", index(&[("a", A)]))]);
    for loader in loaders() {
        let image = loader.load(folder.path()).await.unwrap();
        let notes = image.report().notes.join("\n");
        assert_eq!(names(&image), ["a", "b"]);
        assert!(notes.contains("not in the index, and not loaded: \"model.safetensors\""), "{notes}");
        assert!(notes.contains("model.safetensors.index.fp16.json"), "{notes}");
    }
    written(folder.path(), &[("x.safetensors.index.json", index(&[("a", A)]))]);
    let error = loaders()[0].load(folder.path()).await.unwrap_err().to_string();
    assert!(error.contains("\"model.safetensors.index.json\"") && error.contains("\"x.safetensors.index.json\""), "{error}");
}

#[tokio::test]
async fn names_that_are_not_text_are_loaded() {
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
async fn a_rank_whose_bytes_are_cut_checks_the_whole_model() {
    let (g1, g2) = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf");
    let [first, second] = [part(0, 2, 2, &[("a", 1)]), part(1, 2, 2, &[("b", 2)])];
    let cases: [(&str, Vec<(&str, Vec<u8>)>); 4] = [
        ("part 2", vec![("x.gguf", first.clone())]),
        ("its name says", vec![(g1, second.clone()), (g2, first.clone())]),
        ("\"w\"", vec![(A, st(&[("a", 1), ("w", 1)])), (B, st(&[("b", 2), ("w", 2)]))]),
        ("", vec![(g1, first), (g2, second)]),
    ];
    for (says, files) in cases {
        let folder = folder();
        written(folder.path(), &files);
        for loader in loaders() {
            for rank in [0, 1] {
                let options = loader.options().shard(Shard { rank, world_size: 2, dim: None });
                let loaded = loader.load_with([folder.path()], options).await.map_err(|error| error.to_string());
                match loaded {
                    Ok(_) => assert_eq!(says, ""),
                    Err(error) => assert!(!says.is_empty() && error.contains(says), "{says}: {error}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn an_index_whose_name_says_little_is_one_in_a_folder() {
    let name = "model.index.fp16.json";
    let folder = folder();
    written(folder.path(), &[(A, st(&[("a", 1)])), ("fp16.safetensors", st(&[("z", 1)]))]);
    written(folder.path(), &[(name, index(&[("a", A), ("b", "other.safetensors")])), ("z.index.json", b"{}".to_vec())]);
    for loader in loaders() {
        for path in [folder.path().to_owned(), folder.path().join(name)] {
            for format in [Format::Auto, Format::Safetensors] {
                let error = loader.load_with([&path], loader.options().format(format)).await.unwrap_err();
                assert!(error.to_string().contains("\"other.safetensors\""), "{error}");
            }
        }
    }
    written(folder.path(), &[("other.safetensors", st(&[("b", 2)]))]);
    for loader in loaders() {
        for path in [folder.path().to_owned(), folder.path().join(name)] {
            let image = loader.load_with([&path], loader.options().format(Format::Safetensors)).await.unwrap();
            assert_eq!(names(&image), ["a", "b"]);
        }
    }
    // One that is broken is not passed over; JSON of another kind is.
    for (broken, is_other) in [
        (&b"{\"weight_map\":{\"a\":\"a.safeten"[..], false),
        (b"", false),
        (b"version https://git-lfs.github.com/spec/v1\n", false),
        (b"{\"weight_map\":{\"a\":\"../a.safetensors\"}}", false),
        (b"{\"weight_map\":7}", false),
        (b"{\"documents\":[]}", true),
        (b"[1, 2]", true),
    ] {
        let folder = common::folder();
        written(
            folder.path(),
            &[("a.safetensors", st(&[("a", 1)])), ("z.safetensors", st(&[("z", 1)])), (name, broken.to_vec())],
        );
        for loader in loaders() {
            let all = loader.load(folder.path()).await;
            let own = loader.load(folder.path().join(name)).await;
            assert_eq!(all.as_ref().map(names).ok(), is_other.then(|| vec!["a".into(), "z".into()]), "{all:?}");
            let errors: Vec<_> = [all, own].into_iter().filter_map(Result::err).map(|error| error.to_string()).collect();
            assert_eq!(errors.len(), if is_other { 0 } else { 2 }, "{errors:?}");
            assert!(errors.iter().all(|error| error.contains(name)), "{errors:?}");
        }
    }
    // The usual name, and an index of the usual name, still count before it.
    written(folder.path(), &[("model.safetensors", st(&[("whole", 1)]))]);
    assert_eq!(names(&loaders()[0].load(folder.path()).await.unwrap()), ["whole"]);
    written(folder.path(), &[(INDEX, index(&[("b", "other.safetensors")]))]);
    assert_eq!(names(&loaders()[0].load(folder.path()).await.unwrap()), ["b"]);
}

#[tokio::test]
async fn names_of_a_series_are_seen_however_they_are_written() {
    for name in [
        "00001-of-00002.safetensors",
        "1-of-2.safetensors",
        "model00001-of-00002.safetensors",
        "MODEL-00001-OF-00002.safetensors",
        "model-00001-of-00002-one-of-many.safetensors",
        "model-00001-of-4294967295.safetensors",
    ] {
        let folder = folder();
        written(folder.path(), &[(name, st(&[("a", 1)]))]);
        for loader in loaders() {
            let error = loader.load(folder.path()).await.unwrap_err();
            assert!(matches!(error, Error::Incomplete { loadable: 1, .. }), "{name}: {error}");
        }
    }
    // Names that only look alike.
    for name in ["v2-of-3.safetensors", "one-of-2.safetensors", "model-3-of-2.safetensors", "lora1-of-many.safetensors"] {
        let folder = folder();
        written(folder.path(), &[(name, st(&[("a", 1)]))]);
        assert_eq!(names(&loaders()[0].load(folder.path()).await.unwrap()), ["a"], "{name}");
    }
}

#[tokio::test]
async fn hints_on_models_that_are_not_whole_can_be_followed() {
    for (files, says, hints) in [
        (vec![(INDEX, index(&[("a", A)]))], "1 is missing", "fetch the model again"),
        (vec![(A, st(&[("a", 1)])), (INDEX, index(&[("a", A), ("b", B)]))], "1 is missing", "allow_missing"),
        (
            vec![(INDEX, br#"{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}"#.to_vec())],
            "tensor \"a\" is in the index twice",
            "the index is damaged",
        ),
    ] {
        let folder = folder();
        written(folder.path(), &files);
        for loader in loaders() {
            let error = loader.load(folder.path()).await.unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
            let hint = error.hint().unwrap();
            assert!(hint.contains(hints) && hint.contains("allow_missing") == (hints == "allow_missing"), "{hint}");
        }
    }
    let folder = folder();
    let pickle = [&b"PK\x03\x04"[..], &[0; 200]].concat();
    written(folder.path(), &[("pytorch_model.bin", pickle), (INDEX, index(&[("a", "pytorch_model.bin")]))]);
    for loader in loaders() {
        let error = loader.load(folder.path()).await.unwrap_err().to_string();
        assert!(error.contains("pytorch_model.bin") && error.contains("pickled weights"), "{error}");
    }
}

#[tokio::test]
async fn gguf_files_beside_safetensors_files_are_noted() {
    for files in [vec![("model.safetensors", st(&[("a", 1)]))], vec![(A, st(&[("a", 1)])), (INDEX, index(&[("a", A)]))]] {
        let folder = folder();
        written(folder.path(), &files);
        let load = async |format| {
            let loader = &loaders()[0];
            let image = loader.load_with([folder.path()], loader.options().format(format)).await.unwrap();
            image.report().notes.join("\n")
        };
        assert_eq!(load(Format::Auto).await, "");
        written(folder.path(), &[("m.gguf", gguf(&[], &[("a", 1)]))]);
        let notes = load(Format::Auto).await;
        assert!(notes.contains("not loaded, beside safetensors files: \"m.gguf\""), "{notes}");
        assert_eq!(load(Format::Safetensors).await, "", "the caller chose");
    }
}

#[tokio::test]
async fn one_part_beside_other_paths_stands_for_all_parts() {
    let folder = folder();
    let (g1, g2) = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf");
    let other = "other.gguf";
    written(folder.path(), &[(g1, part(0, 2, 2, &[("a", 1)])), (g2, part(1, 2, 2, &[("b", 2)]))]);
    written(folder.path(), &[(other, gguf(&[], &[("o", 3)]))]);
    let dotted = |name: &str| folder.path().join(".").join(name);
    let plain = |name: &str| folder.path().join(name);
    // A dot in front is kept in the parts of a path, unlike one in its middle.
    let up = "../".repeat(std::env::current_dir().unwrap().components().count() - 1);
    let relative = |dot: &str, name: &str| PathBuf::from(format!("{dot}{up}")).join(plain(name).strip_prefix("/").unwrap());
    for loader in loaders() {
        for (paths, all) in [
            (vec![plain(g1), plain(other)], &["a", "b", "o"][..]),
            (vec![plain(other), dotted(g2)], &["a", "b", "o"]),
            (vec![plain(g1), plain(g2), plain(other)], &["a", "b", "o"]),
            (vec![plain(g1), dotted(g2)], &["a", "b"]),
            (vec![relative("./", g1), relative("", g2)], &["a", "b"]),
        ] {
            let image = loader.load_with(&paths, loader.options()).await.unwrap();
            assert_eq!((names(&image), image.files().len()), (all.iter().map(|&n| n.to_owned()).collect(), all.len()));
        }
    }
    fs::remove_file(plain(g2)).unwrap();
    for loader in loaders() {
        let error = loader.load_with([plain(g1), plain(other)], loader.options()).await.unwrap_err();
        assert!(matches!(error, Error::Incomplete { loadable: 1, .. }) && error.to_string().contains(g2), "{error}");
    }
}

#[tokio::test]
async fn files_that_patterns_pass_over_by_the_index_are_noted() {
    let folder = folder();
    written(folder.path(), &[(A, st(&[("w1", 1)])), (B, st(&[("b", 2), ("w2", 2)]))]);
    written(folder.path(), &[(INDEX, index(&[("w1", A), ("b", B)]))]);
    for loader in loaders() {
        for (pattern, is_noted) in [("w*", true), ("w?", true), ("{w*,b}", false), ("w1", false), ("*", false)] {
            let image = loader.load_with([folder.path()], loader.options().tensors([pattern])).await.unwrap();
            let notes = image.report().notes.join("\n");
            assert_eq!(notes.contains("1 of its 2 files"), is_noted, "{pattern}: {notes}");
        }
        let image = loader.load_with([folder.path()], loader.options().tensor_names(["w1"])).await.unwrap();
        assert!(image.report().notes.is_empty(), "{:?}", image.report().notes);
    }
}
