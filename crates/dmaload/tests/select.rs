//! Tests loads of selected tensors, of ranges and shards, of multi-file models, and of models
//! inside other files. Some of these loads use the `tensors` layout or an importer's limits. The
//! results are compared with what the `safetensors` crate reads, or with the file itself.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]
#![allow(unsafe_code, reason = "reads the memory past the end of a tensor")]

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{ROUTES, assert_same, file, folder, random_bytes};
use dmaload::model::DType;
use dmaload::{Error, Format, Image, ImporterLimits, Layout, LoadOptions, Loader, LoaderBuilder, Shard, Source};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};

const SEGMENT: usize = 2 << 20;

fn options() -> LoadOptions {
    LoadOptions::new().segment_bytes(SEGMENT as u64)
}

fn loader() -> LoaderBuilder {
    Loader::builder().load_options(options())
}

/// Writes a model with the given BF16 tensors, filled with random bytes.
fn write_model(path: &Path, tensors: &[(&str, &[usize])]) -> PathBuf {
    let bytes: Vec<_> =
        tensors.iter().zip(1..).map(|((_, shape), seed)| random_bytes(2 * shape.iter().product::<usize>(), seed)).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape), bytes)| (name.to_string(), TensorView::new(Dtype::BF16, shape.to_vec(), bytes).unwrap()));
    let all = serialize(views.collect::<Vec<_>>(), None).unwrap();
    file(path.parent().unwrap(), path.file_name().unwrap().to_str().unwrap(), &all)
}

/// Writes a model with four layers of one large and two small tensors, and a tensor that is larger
/// than a segment.
fn write_layers(folder: &Path) -> PathBuf {
    let names: Vec<_> = (0..4).flat_map(|layer| ["q", "k", "norm"].map(|name| format!("layers.{layer}.{name}"))).collect();
    let shapes: [&[usize]; 3] = [&[512, 600], &[100, 30], &[77]];
    let mut tensors: Vec<(&str, &[usize])> = names.iter().map(String::as_str).zip(shapes.iter().copied().cycle()).collect();
    tensors.push(("embed", &[2000, 800]));
    write_model(&folder.join("model.safetensors"), &tensors)
}

fn assert_tensors(image: &Image, path: &Path, what: &str) {
    let bytes = fs::read(path).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    for tensor in image.tensors() {
        let view = theirs.tensor(tensor.name()).unwrap();
        assert_same(&tensor.bytes().unwrap(), view.data(), &format!("{what}: {}", tensor.name()));
        assert_eq!(tensor.shape(), view.shape());
    }
}

#[tokio::test]
async fn only_selected_tensors_are_read() {
    let folder = folder();
    let path = write_layers(folder.path());
    let file_bytes = fs::metadata(&path).unwrap().len();
    for route in ROUTES {
        let loader = loader().load_options(options().route(route)).build().unwrap();
        let options = loader.load_options().tensors(["layers.{1..2}.*", "embed"]);
        let image = loader.load(&path).options(options).await.unwrap();
        assert_eq!(image.tensors().count(), 7, "{route}");
        assert_tensors(&image, &path, &route.to_string());
        let report = image.report();
        let wanted = 2 * (2 * (512 * 600 + 100 * 30 + 77) + 2000 * 800);
        assert_eq!(report.wanted_bytes, wanted);
        assert!(report.bytes >= wanted && report.bytes < file_bytes - 1_000_000, "{} of {file_bytes}", report.bytes);
        let read: u64 = image.segments().iter().map(|segment| segment.len() as u64).sum();
        assert_eq!(read, report.bytes, "the report must count the bytes of all segments");
        let Err(Error::NotLoaded { range, .. }) = image.tensor("layers.0.q") else {
            panic!("a tensor that was not selected is not reported as `NotLoaded`")
        };
        assert_eq!(range.end - range.start, 2 * 512 * 600);
        assert!(matches!(image.tensor("missing"), Err(Error::NoSuchTensor(_))));
        assert!(matches!(image.files()[0].bytes(), Err(Error::NotLoaded { .. })));
        loader.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn unmatched_patterns_and_impossible_ranges_are_errors() {
    let folder = folder();
    let path = write_layers(folder.path());
    let loader = loader().build().unwrap();
    let missed = loader.load(&path).options(loader.load_options().tensors(["embed", "layers.9.*"])).await.unwrap_err();
    assert!(matches!(&missed, Error::NoSuchTensor(pattern) if pattern == "layers.9.*"), "{missed}");
    let raw = file(folder.path(), "raw", &random_bytes(100_000, 1));
    let error = loader.load(&raw).options(loader.load_options().tensors(["*"])).await.unwrap_err();
    assert!(matches!(error, Error::Selection { .. }), "{error}");
    let beyond = loader.load(&raw).options(loader.load_options().range(5..100_001)).await.unwrap_err();
    assert!(beyond.to_string().contains("it has 100000"), "{beyond}");
}

#[tokio::test]
async fn tensors_arrive_complete_in_the_requested_order() {
    let folder = folder();
    let path = write_layers(folder.path());
    let loader = loader().build().unwrap();
    let by_file: Vec<String> = loader.load(&path).await.unwrap().tensors().map(|tensor| tensor.name().to_owned()).collect();
    let bytes = fs::read(&path).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    for patterns in [&["*"][..], &["layers.3.*", "embed", "*.norm", "*"]] {
        let mut tensors = loader.load(&path).options(loader.load_options().tensors(patterns.iter().copied())).tensors();
        let mut names = Vec::new();
        while let Some(tensor) = tensors.next().await {
            let tensor = tensor.unwrap();
            assert_same(&tensor.bytes().unwrap(), theirs.tensor(tensor.name()).unwrap().data(), tensor.name());
            names.push(tensor.name().to_owned());
        }
        let first = names.first().unwrap().as_str();
        assert!(tensors.report().is_some());
        let mut all = names.clone();
        if patterns.len() > 1 {
            assert!(first.starts_with("layers.3."), "{names:?}");
            assert_eq!(names.iter().position(|name| name == "embed"), Some(3), "{names:?}");
            all.sort_by_key(|name| by_file.iter().position(|other| other == name));
        }
        assert_eq!(all, by_file, "each tensor must be yielded exactly once");
    }
    // Requesting a tensor by name does not remove segments from a load.
    let mut load = loader.load(&path).start();
    assert_eq!(load.tensor(&by_file[0]).await.unwrap().name(), by_file[0]);
    assert_eq!(load.next().await.unwrap().unwrap().index(), 0);
    assert_tensors(&load.await.unwrap(), &path, "kept");
}

#[tokio::test]
async fn stream_includes_empty_tensors_and_small_files() {
    let folder = folder();
    let small = write_model(&folder.path().join("small.safetensors"), &[("a", &[3]), ("empty", &[0, 4])]);
    let large = write_layers(folder.path());
    let loader = loader().build().unwrap();
    for (options, expected) in [
        (loader.load_options(), 15),
        (loader.load_options().tensors(["empty"]), 1),
        (loader.load_options().tensors(["a", "empty", "embed"]), 3),
    ] {
        let mut tensors = loader.load([&small, &large]).options(options).tensors();
        let mut count = 0;
        while let Some(tensor) = tensors.next().await {
            let tensor = tensor.unwrap();
            assert_eq!(tensor.bytes().unwrap().len(), 2 * tensor.shape().iter().product::<usize>());
            count += 1;
        }
        assert_eq!(count, expected);
    }
}

#[tokio::test]
async fn ranks_together_load_the_whole_model() {
    let folder = folder();
    let path = write_layers(folder.path());
    let bytes = fs::read(&path).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    let loader = loader().build().unwrap();
    for dim in [0, 1] {
        let mut parts: HashMap<String, Vec<Vec<u8>>> = HashMap::new();
        for rank in 0..3 {
            let options =
                loader.load_options().tensors(["layers.0.*", "embed"]).shard(Shard { rank, world_size: 3, dim: Some(dim) });
            let image = loader.load(&path).options(options).await.unwrap();
            assert!(image.report().notes.iter().any(|note| note.contains(&format!("rank {rank} of 3"))));
            for tensor in image.tensors() {
                let copy = tensor.to_vec().unwrap();
                match tensor.bytes() {
                    Ok(bytes) => assert_same(&bytes, &copy, tensor.name()),
                    Err(Error::NotContiguous { rows, .. }) => {
                        assert!(dim == 1 && rows == tensor.shape()[0] as u64, "{}", tensor.name());
                    }
                    Err(error) => panic!("{error}"),
                }
                let by_parts: usize = tensor.parts().iter().map(|part| part.len).sum();
                assert_eq!(by_parts, copy.len());
                parts.entry(tensor.name().to_owned()).or_default().push(copy);
            }
        }
        for (name, parts) in parts {
            let view = theirs.tensor(&name).unwrap();
            if view.shape().len() <= dim {
                parts.iter().for_each(|bytes| assert_same(bytes, view.data(), &name));
                continue;
            }
            let rows: usize = view.shape()[..dim].iter().product();
            let mut joined = Vec::new();
            for row in 0..rows {
                for bytes in &parts {
                    let len = bytes.len() / rows;
                    joined.extend_from_slice(&bytes[row * len..(row + 1) * len]);
                }
            }
            assert_same(&joined, view.data(), &name);
        }
    }
}

#[tokio::test]
async fn ranges_and_shards_match_the_bytes_of_the_file() {
    let folder = folder();
    let bytes = random_bytes(3 * SEGMENT + 777, 9);
    let path = file(folder.path(), "raw", &bytes);
    for route in ROUTES {
        let loader = loader().load_options(options().route(route)).build().unwrap();
        let mut joined = Vec::new();
        for rank in 0..5 {
            let options = loader.load_options().shard(Shard { rank, world_size: 5, dim: None });
            let image = loader.load(&path).options(options).await.unwrap();
            image.segments().iter().for_each(|segment| joined.extend_from_slice(&segment.bytes().unwrap()));
        }
        assert_same(&joined, &bytes, &route.to_string());
        for range in [0..1, 4095..4097, SEGMENT - 5..2 * SEGMENT + 5, bytes.len() - 1..bytes.len()] {
            let wanted = range.start as u64..range.end as u64;
            let image = loader.load(&path).options(loader.load_options().range(wanted.clone())).await.unwrap();
            let held = image.segments()[0].file_range().start..image.segments().last().unwrap().file_range().end;
            assert!(held.start <= wanted.start && wanted.end <= held.end && held.start % 4096 == 0);
            for segment in image.segments() {
                let at = segment.file_range();
                let at = usize::try_from(at.start).unwrap()..usize::try_from(at.end).unwrap();
                assert_same(&segment.bytes().unwrap(), &bytes[at], &route.to_string());
            }
            assert_eq!(image.report().wanted_bytes, wanted.end - wanted.start);
        }
        loader.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn layout_tensors_keeps_a_tensor_in_one_segment() {
    let folder = folder();
    let path = write_layers(folder.path());
    for route in ROUTES {
        let loader = loader().load_options(options().route(route).layout(Layout::Tensors)).build().unwrap();
        let image = loader.load(&path).await.unwrap();
        assert_tensors(&image, &path, &route.to_string());
        assert!(image.tensors().all(|tensor| tensor.parts().len() == 1), "{route}: a tensor was split");
        let small = ImporterLimits { max_segment_bytes: SEGMENT as u64, ..ImporterLimits::default() };
        let image = loader.load(&path).options(loader.load_options().importer(small)).await.unwrap();
        assert_tensors(&image, &path, &route.to_string());
        let straddlers: Vec<_> = image.tensors().filter(|tensor| tensor.parts().len() > 1).map(|t| t.name().to_owned()).collect();
        assert_eq!(straddlers, ["embed"], "only the 3.2 MB tensor should be split across 2 MiB segments");
        loader.shutdown().await.unwrap();
    }
    let loader = Loader::builder().load_options(LoadOptions::new().layout(Layout::Tensors)).build().unwrap();
    let image = loader.load(&path).await.unwrap();
    assert!(image.tensors().all(|tensor| tensor.parts().len() == 1));
}

#[tokio::test]
async fn importer_limits_are_met_or_the_load_fails() {
    let folder = folder();
    let path = write_layers(folder.path());
    let loader = Loader::builder().build().unwrap();
    let limits =
        |max_segment_bytes, max_segments| ImporterLimits { max_segment_bytes, max_segments, ..ImporterLimits::default() };
    let options = loader.load_options().layout(Layout::Tensors).importer(limits(4 << 20, 8));
    let image = loader.load(&path).options(options.clone()).await.unwrap();
    assert!(image.segments().iter().all(|segment| segment.memory_bytes() <= 4 << 20));
    assert!(image.tensors().all(|tensor| tensor.parts().len() == 1));
    assert_tensors(&image, &path, "limited");
    let error = loader.load(&path).options(options.importer(limits(4 << 20, 1))).await.unwrap_err();
    assert!(matches!(error, Error::Importer { max_segments: 1, .. }), "{error}");
    let single = loader.load_options().layout(Layout::Single).importer(limits(4 << 20, 8));
    let error = loader.load(&path).options(single).await.unwrap_err();
    assert!(matches!(error, Error::Importer { segments: 1, .. }), "{error}");
}

/// Writes a two-file model with an index, and returns the paths of the two files. The second path
/// is a symbolic link.
fn write_snapshot(folder: &Path) -> Vec<PathBuf> {
    let blobs = folder.join("blobs");
    let snapshot = folder.join("snapshot");
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    let first = write_model(&snapshot.join("model-00001-of-00002.safetensors"), &[("a", &[900_000]), ("b", &[10])]);
    write_model(&blobs.join("0123"), &[("c", &[700_001])]);
    let second = snapshot.join("model-00002-of-00002.safetensors");
    std::os::unix::fs::symlink("../blobs/0123", &second).unwrap();
    let index = r#"{"metadata":{"total_size":1},"weight_map":{"a":"model-00001-of-00002.safetensors","c":"model-00002-of-00002.safetensors","b":"model-00001-of-00002.safetensors"}}"#;
    fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();
    vec![first, second]
}

#[tokio::test]
async fn hub_snapshot_folder_is_one_model() {
    let folder = folder();
    let files = write_snapshot(folder.path());
    let snapshot = folder.path().join("snapshot");
    let loader = loader().build().unwrap();
    for asked in [snapshot.clone(), snapshot.join("model.safetensors.index.json")] {
        let image = loader.load(asked).await.unwrap();
        let paths: Vec<_> = image.files().iter().map(|file| file.path().to_owned()).collect();
        assert_eq!(paths, files);
        for (file, path) in image.files().iter().zip(&files) {
            assert_same(&file.bytes().unwrap(), &fs::read(path).unwrap(), "whole");
        }
        assert_eq!(image.tensor("c").unwrap().shape(), [700_001]);
    }
    // The requested order applies across files.
    let mut tensors = loader.load(&snapshot).options(loader.load_options().tensors(["c", "b"])).tensors();
    assert_eq!(tensors.next().await.unwrap().unwrap().name(), "c");
    assert_eq!(tensors.next().await.unwrap().unwrap().name(), "b");
    assert!(tensors.next().await.is_none());
}

#[tokio::test]
async fn index_that_contradicts_its_files_is_an_error() {
    let folder = folder();
    write_snapshot(folder.path());
    let snapshot = folder.path().join("snapshot");
    // Large files are compared with the index during planning, and small ones, which share memory,
    // after they are read.
    for loader in [loader().build().unwrap(), Loader::builder().build().unwrap()] {
        let index = |weights: &str| {
            fs::write(snapshot.join("model.safetensors.index.json"), format!(r#"{{"weight_map":{weights}}}"#)).unwrap();
        };
        index(r#"{"zzz":"model-00001-of-00002.safetensors"}"#);
        let error = loader.load(&snapshot).await.unwrap_err();
        assert!(error.to_string().contains("lists tensor \"zzz\" for this file"), "{error}");
        index(r#"{"a":"../../etc/passwd"}"#);
        let error = loader.load(&snapshot).await.unwrap_err();
        assert!(error.to_string().contains("not within the index's folder"), "{error}");
        // An interrupted download can leave an empty file.
        fs::write(snapshot.join("empty.safetensors"), "").unwrap();
        index(r#"{"a":"model-00001-of-00002.safetensors","z":"empty.safetensors"}"#);
        let error = loader.load(&snapshot).await.unwrap_err();
        assert!(matches!(error, Error::Incomplete { .. }) && error.to_string().contains("0 bytes"), "{error}");
        index(r#"{"a":"missing.safetensors"}"#);
        let error = loader.load(&snapshot).await.unwrap_err();
        assert!(matches!(error, Error::Incomplete { .. }), "{error}");
        assert!(error.to_string().contains("1 is missing: \"missing.safetensors\""), "{error}");
    }
    // An index that is a FIFO must not block the load.
    let fifo = folder.path().join("fifo");
    fs::create_dir(&fifo).unwrap();
    let made = std::process::Command::new("mkfifo").arg(fifo.join("model.safetensors.index.json")).status().unwrap();
    assert!(made.success());
    let error =
        tokio::time::timeout(std::time::Duration::from_secs(20), loader().build().unwrap().load(&fifo).into_future()).await;
    assert!(matches!(error.unwrap().unwrap_err(), Error::NotAFile { kind: "a FIFO", .. }));
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let error = loader().build().unwrap().load(&empty).await.unwrap_err();
    assert!(matches!(error, Error::NoModel { .. }), "{error}");
}

/// Writes a GGUF file with a Q8_0 tensor and an F32 tensor. Returns the bytes of each tensor.
fn write_gguf(path: &Path, [first, second]: [&str; 2], blocks: usize) -> [Vec<u8>; 2] {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let data = [random_bytes(34 * blocks, 1), random_bytes(400, 2)];
    let mut bytes = [&b"GGUF"[..], &3u32.to_le_bytes(), &2u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
    bytes.extend([text("general.architecture"), 8u32.to_le_bytes().to_vec(), text("llama")].concat());
    let after = data[0].len().next_multiple_of(32) as u64;
    for (name, dim, kind, offset) in [(first, 32 * blocks as u64, 8u32, 0), (second, 100, 0, after)] {
        bytes.extend([text(name), 1u32.to_le_bytes().to_vec(), dim.to_le_bytes().to_vec()].concat());
        bytes.extend([&kind.to_le_bytes()[..], &offset.to_le_bytes()].concat());
    }
    for part in &data {
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(part);
    }
    file(path.parent().unwrap(), path.file_name().unwrap().to_str().unwrap(), &bytes);
    data
}

#[tokio::test]
async fn gguf_tensors_load_whole_selected_or_sharded() {
    let folder = folder();
    let loader = loader().build().unwrap();
    // First with large files, then with files that are small enough to share memory.
    for blocks in [200_000, 100] {
        let parts = [1, 2].map(|part| folder.path().join(format!("m{blocks}-0000{part}-of-00002.gguf")));
        let data = write_gguf(&parts[0], ["q", "n"], blocks);
        write_gguf(&parts[1], ["q2", "n2"], blocks);
        let image = loader.load(&parts[0]).await.unwrap();
        assert_eq!(image.files().len(), 2, "the other part must be loaded as well");
        let q = image.tensor("q").unwrap();
        assert_eq!((q.dtype(), q.shape()), (DType::Q8_0, &[32 * blocks][..]));
        assert_same(&q.bytes().unwrap(), &data[0], "q");
        assert_same(&image.tensor("n").unwrap().bytes().unwrap(), &data[1], "n");
        let map = image.files()[0].tensor_map().unwrap();
        assert_eq!(map.gguf().unwrap().get("general.architecture").unwrap().to_string(), "llama");
        let n = loader.load([&parts[0], &parts[1]]).options(loader.load_options().tensors(["n"])).await.unwrap();
        assert_same(&n.tensor("n").unwrap().bytes().unwrap(), &data[1], "n alone");
        let half = loader.load_options().shard(Shard { rank: 1, world_size: 2, dim: Some(0) });
        let half = loader.load(&parts[0]).options(half).await.unwrap();
        assert_same(&half.tensor("q").unwrap().bytes().unwrap(), &data[0][34 * (blocks / 2)..], "half of q");
        let raw = loader.load(&parts[0]).options(loader.load_options().format(Format::Raw)).await.unwrap();
        assert_eq!((raw.files().len(), raw.tensors().count()), (1, 0));
    }
    let broken = file(folder.path(), "broken.gguf", b"GGML\x00\x01\xff\xfe\x02000000000");
    let error = loader.load(&broken).await.unwrap_err();
    assert!(error.to_string().contains("does not begin with \"GGUF\""), "{error}");
}

/// Application packages can contain uncompressed models, at any offset.
#[tokio::test]
async fn model_inside_an_open_file_is_loaded() {
    let folder = folder();
    let path = write_layers(folder.path());
    let inner = fs::read(&path).unwrap();
    for lead in [0, 777, 4096, 8193] {
        let mut bytes = random_bytes(lead, 1);
        bytes.extend(&inner);
        bytes.extend(random_bytes(5000, 2));
        let container = file(folder.path(), "container.apk", &bytes);
        let open = fs::File::open(&container).unwrap();
        // From here on, the file has no path.
        fs::remove_file(&container).unwrap();
        let part = lead as u64..(lead + inner.len()) as u64;
        for route in ROUTES {
            let loader = loader().load_options(options().route(route)).build().unwrap();
            let whole = |options| loader.load(Source::file(open.try_clone().unwrap()).range(part.clone())).options(options);
            let image = whole(loader.load_options()).await.unwrap();
            let what = format!("{route} at {lead}");
            assert_eq!((image.files()[0].len(), image.files()[0].file_range()), (inner.len() as u64, part.clone()));
            assert_same(&image.files()[0].bytes().unwrap(), &inner, &what);
            assert_eq!(image.tensors().count(), 13);
            assert_tensors(&image, &path, &what);
            assert_eq!(image.report().wanted_bytes, inner.len() as u64);
            let chosen = whole(loader.load_options().tensors(["layers.2.*"])).await.unwrap();
            assert_eq!(chosen.tensors().count(), 3);
            assert_tensors(&chosen, &path, &what);
            assert!(chosen.report().bytes < 700_000);
            let range = whole(loader.load_options().range(8..20)).await.unwrap();
            assert_eq!(range.segments()[0].file_range().start, (lead as u64 + 8) / 4096 * 4096);
            let mut joined = Vec::new();
            for rank in 0..3 {
                let options = loader.load_options().shard(Shard { rank, world_size: 3, dim: None });
                let image = whole(options).await.unwrap();
                let held = image.segments().iter().map(|segment| segment.len()).sum::<usize>() as u64;
                assert!(held >= image.report().wanted_bytes);
                joined.push(image.report().wanted_bytes);
            }
            assert_eq!(joined.iter().sum::<u64>(), inner.len() as u64, "{what}");
            loader.shutdown().await.unwrap();
        }
        let loader = loader().build().unwrap();
        let whole = loader.load(open.try_clone().unwrap()).options(loader.load_options().format(Format::Raw)).await.unwrap();
        assert_same(&whole.files()[0].bytes().unwrap(), &bytes, "the whole container");
        let beyond = Source::file(open.try_clone().unwrap()).range(0..bytes.len() as u64 + 1);
        let error = loader.load(beyond).await.unwrap_err();
        assert!(matches!(&error, Error::Selection { reason, .. } if reason.contains("which has")), "{error}");
    }
}

#[tokio::test]
async fn gguf_model_inside_an_open_file_is_loaded() {
    let folder = folder();
    let data = write_gguf(&folder.path().join("m.gguf"), ["q", "n"], 1000);
    let inner = fs::read(folder.path().join("m.gguf")).unwrap();
    let bytes = [random_bytes(100, 1), inner.clone()].concat();
    let open = fs::File::open(file(folder.path(), "container", &bytes)).unwrap();
    let loader = loader().build().unwrap();
    let image = loader.load(Source::file(open).range(100..bytes.len() as u64)).await.unwrap();
    assert_same(&image.tensor("q").unwrap().bytes().unwrap(), &data[0], "q");
    assert_same(&image.tensor("n").unwrap().bytes().unwrap(), &data[1], "n");
}

/// Tensors in a safetensors file can start at any offset. If an importer requires an alignment,
/// unaligned tensors are copied and counted in the report, or the load fails if copying is not
/// allowed.
#[tokio::test]
async fn tensors_are_aligned_for_an_importer() {
    let folder = folder();
    let path = write_layers(folder.path());
    let file_bytes = fs::metadata(&path).unwrap().len();
    for route in ROUTES {
        for alignment_bytes in [1, 64, 4096, 1 << 16, 2 << 20] {
            let loader = Loader::builder()
                .load_options(LoadOptions::new().segment_bytes(4 << 20).route(route).layout(Layout::Tensors))
                .build()
                .unwrap();
            let importer = ImporterLimits { alignment_bytes, ..ImporterLimits::default() };
            let image = loader.load(&path).options(loader.load_options().importer(importer)).await.unwrap();
            let what = format!("{route}, {alignment_bytes}");
            assert_eq!(image.tensors().count(), 13);
            assert_tensors(&image, &path, &what);
            for tensor in image.tensors() {
                let parts = tensor.parts();
                assert_eq!(parts.len(), 1, "{what}");
                let place = parts[0].memory_offset() as u64;
                assert!(place.is_multiple_of(alignment_bytes), "{what}: {} is at {place}", tensor.name());
                // If a tensor was copied to an aligned place, the bytes after it are zero.
                if alignment_bytes >= 4096 {
                    let access = parts[0].segment.cpu_access().unwrap();
                    // SAFETY: the mapping has `memory_bytes` bytes, and a loaded segment is not
                    // written to.
                    let after = unsafe { std::slice::from_raw_parts(access.address().as_ptr(), parts[0].segment.memory_bytes()) };
                    let end = parts[0].offset + parts[0].len;
                    let moved = tensor.file_range().start % 4096 != 0;
                    assert!(
                        !moved || after[end..].iter().all(|&byte| byte == 0),
                        "{what}: bytes after {} are not zero",
                        tensor.name()
                    );
                }
            }
            let moved: u64 = image.report().copied_bytes;
            assert_eq!(moved > 0, alignment_bytes >= 64, "{what}: {moved} bytes were copied");
            assert!(moved < file_bytes);
            let refused = ImporterLimits { may_copy: false, ..importer };
            let refused = loader.load(&path).options(loader.load_options().importer(refused)).await;
            match refused {
                Ok(_) => assert_eq!(alignment_bytes, 1),
                Err(error) => assert!(matches!(&error, Error::Unaligned { why, .. } if why.contains("not allowed")), "{error}"),
            }
            loader.shutdown().await.unwrap();
        }
    }
    // A tensor that is larger than the largest segment that the importer accepts cannot be copied
    // into a segment.
    let loader = loader().load_options(options().layout(Layout::Tensors)).build().unwrap();
    let importer = ImporterLimits { alignment_bytes: 4096, max_segment_bytes: SEGMENT as u64, ..ImporterLimits::default() };
    let error = loader.load(&path).options(loader.load_options().importer(importer)).await.unwrap_err();
    assert!(matches!(&error, Error::Unaligned { tensor, .. } if tensor == "embed"), "{error}");
    let other = loader.load_options().layout(Layout::Segmented).importer(importer);
    assert!(matches!(loader.load(&path).options(other).await, Err(Error::Config(_))));
}
