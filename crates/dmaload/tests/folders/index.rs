//! Tests for models with an index, which maps each tensor to a file.

use dmaload::share::{AttachOptions, Server, ServerOptions, attach};
use dmaload::{Error, Format, Layout, Result};

use crate::common::{self, folder};
use crate::{A, B, INDEX, index, loaders, names, st, value_of, write_files};

/// Returns test cases. Each has the files in a folder, the value of the tensor `w` that the index
/// selects, and the names of all tensors. In each case, several of the files contain a tensor `w`.
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
async fn index_decides_between_two_tensors_of_one_name() {
    for (files, value, all) in overlays() {
        let folder = folder();
        write_files(folder.path(), &files);
        for loader in loaders() {
            let whole = loader.load(folder.path()).await.unwrap();
            let by_tensors = loader.load(folder.path()).options(loader.load_options().layout(Layout::Tensors)).await.unwrap();
            let chosen = loader.load(folder.path()).options(loader.load_options().tensors(["w", "*"])).await.unwrap();
            for image in [&whole, &by_tensors, &chosen] {
                assert_eq!((value_of(image, "w"), names(image)), (value, all.iter().map(|&name| name.to_owned()).collect()));
                for other in ["a", "b", "extra"].into_iter().filter(|name| all.contains(name)) {
                    assert_eq!(value_of(image, other), 9, "{other}");
                }
                let own = image.files().iter().filter_map(|file| file.tensor("w")).count();
                assert_eq!(own, 1, "only the file that the index names for `w` must provide this tensor");
            }
            let load = loader.load(folder.path()).start();
            for name in all.iter().rev() {
                let tensor = load.tensor(name).await.unwrap();
                let expected = if *name == "w" { value } else { 9 };
                assert_eq!(tensor.bytes().unwrap(), vec![expected; 64], "{name}");
            }
            let w = loader.load(folder.path()).options(loader.load_options().tensors(["w"])).await.unwrap();
            assert_eq!((value_of(&w, "w"), w.tensors().count(), w.report().wanted_bytes), (value, 1, 64));
            let options = loader.load_options();
            for (options, expected) in
                [(options.clone(), all), (options.clone().tensors(["*"]), all), (options.tensor_names(["w"]), &["w"][..])]
            {
                let mut tensors = loader.load(folder.path()).options(options).tensors();
                let mut seen = Vec::new();
                while let Some(tensor) = tensors.next().await {
                    let tensor = tensor.unwrap();
                    if tensor.name() == "w" {
                        assert_eq!(tensor.bytes().unwrap(), vec![value; 64]);
                    }
                    seen.push(tensor.name().to_owned());
                }
                seen.sort();
                assert_eq!(seen, expected, "each tensor must be yielded exactly once");
            }
        }
    }
}

#[tokio::test]
async fn shared_and_inspected_tensors_follow_the_index() {
    for (files, value, all) in overlays() {
        let folder = folder();
        write_files(folder.path(), &files);
        for loader in loaders() {
            let socket = folder.path().join("socket");
            let server = Server::bind(&socket, ServerOptions::default()).unwrap();
            server.publish("model", loader.load(folder.path()).await.unwrap()).unwrap();
            let attached = attach(&socket, AttachOptions::default()).await.unwrap().image;
            assert_eq!((value_of(&attached, "w"), names(&attached)), (value, all.iter().map(|&name| name.to_owned()).collect()));
            drop(server);
        }
        let inspected = dmaload::inspect_model(folder.path(), Format::Auto).await.unwrap();
        let maps = inspected.iter().map(|file| file.tensors.as_ref().unwrap());
        let mut seen: Vec<_> = maps.flatten().map(|info| info.name.as_str()).collect();
        seen.sort_unstable();
        assert_eq!(seen, all);
    }
}

#[tokio::test]
async fn index_is_recognized_by_any_of_its_names() {
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
            write_files(folder.path(), &files);
            for loader in loaders() {
                for path in [folder.path().to_owned(), folder.path().join(name)] {
                    let image = loader.load(&path).await.unwrap();
                    assert_eq!((value_of(&image, "a"), value_of(&image, "b"), image.files().len()), (1, 2, 2), "{name}");
                }
            }
        }
    }
    // Loading an index that has an unrelated name, or one that lists pickled files, is an error.
    // Otherwise, its text would be loaded as raw bytes.
    let folder = folder();
    let other = index(&[("a", "pytorch_model-00001-of-00001.bin")]);
    let files = [("blob", index(&[("a", A)])), ("pytorch_model.bin.index.json", other), ("free.index.json", b"{}".to_vec())];
    write_files(folder.path(), &files);
    for loader in loaders() {
        for name in ["blob", "pytorch_model.bin.index.json"] {
            let error = loader.load(folder.path().join(name)).await.unwrap_err();
            assert!(matches!(error, Error::NoModel { .. }), "{error}");
            let raw = loader.load(folder.path().join(name)).options(loader.load_options().format(Format::Raw)).await.unwrap();
            assert_eq!(raw.tensors().count(), 0);
        }
        assert_eq!(loader.load(folder.path().join("free.index.json")).await.unwrap().files()[0].bytes().unwrap(), &b"{}"[..]);
    }
}

#[tokio::test]
async fn index_that_points_outside_its_folder_is_refused() {
    let folder = folder();
    write_files(folder.path(), &[("s.safetensors", st(&[("a", 1)])), ("m/x", Vec::new())]);
    let outside = folder.path().join("s.safetensors").to_str().unwrap().to_owned();
    for value in ["../s.safetensors", "./../s.safetensors", "x/../../s.safetensors", outside.as_str()] {
        write_files(folder.path(), &[("m/model.safetensors.index.json", index(&[("a", value)]))]);
        for loader in loaders() {
            let error = loader.load(folder.path().join("m")).await.unwrap_err();
            assert!(error.to_string().contains("not within the index's folder"), "{value}: {error}");
        }
    }
}

#[tokio::test]
async fn selection_needs_only_the_files_its_index_names() {
    let c = "model-00003-of-00003.safetensors";
    let map = index(&[("a.w", A), ("b.w", B), ("c.w", c)]);
    // The second file is missing, empty, or not a model.
    for (number, second) in [None, Some(Vec::new()), Some(b"<html>".to_vec())].into_iter().enumerate() {
        let folder = folder();
        write_files(folder.path(), &[(A, st(&[("a.w", 1), ("extra", 4)])), (c, st(&[("c.w", 3)])), (INDEX, map.clone())]);
        second.iter().for_each(|bytes| write_files(folder.path(), &[(B, bytes.clone())]));
        for loader in loaders() {
            for patterns in [&["a.w"][..], &["c.w", "a.w"], &["{a,c}.*"], &["a.?"]] {
                let options = loader.load_options().tensors(patterns.iter().copied());
                let image = loader.load(folder.path()).options(options).await.unwrap();
                assert_eq!(value_of(&image, "a.w"), 1);
                let error = image.tensor("b.w").unwrap_err();
                assert!(matches!(&error, Error::NotSelected { path, .. } if path.ends_with(B)), "{error}");
                assert!(matches!(image.tensor("d.w"), Err(Error::NoSuchTensor(_))));
            }
            let by_name = loader.load(folder.path()).options(loader.load_options().tensor_names(["c.w"])).await.unwrap();
            assert_eq!((value_of(&by_name, "c.w"), by_name.files().len()), (3, 1));
            assert!(loader.load(folder.path()).options(loader.load_options().tensors(["*.w"])).await.is_err());
            assert!(loader.load(folder.path()).await.is_err());
            // A tensor that the index does not list may be in any file, so all files are read.
            // These checks are therefore skipped if the second file is not a model.
            if number < 2 {
                let extra = loader.load(folder.path()).options(loader.load_options().tensors(["extra"])).await.unwrap();
                assert_eq!(value_of(&extra, "extra"), 4);
                let error = loader.load(folder.path()).options(loader.load_options().tensors(["none"])).await.unwrap_err();
                assert!(matches!(error, Error::NoSuchTensor(_)), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn tensor_names_with_glob_characters_match_literally() {
    let folder = folder();
    let all = ["layers[0].w", "layers.{0}.w", "a*b", "a,b", "a?b", "axb", ""];
    write_files(folder.path(), &[("m.safetensors", st(&all.map(|name| (name, 7))))]);
    for loader in loaders() {
        for name in all {
            let options = loader.load_options().tensor_names([name]);
            let image = loader.load(folder.path().join("m.safetensors")).options(options).await.unwrap();
            assert_eq!(names(&image), [name]);
        }
    }
}

#[tokio::test]
async fn stale_index_and_ignored_files_are_reported() {
    let folder = folder();
    write_files(folder.path(), &[("model.safetensors", st(&[("a", 1)])), (INDEX, index(&[("a", A), ("b", B)]))]);
    for loader in loaders() {
        let error = loader.load(folder.path()).await.unwrap_err().to_string();
        assert!(
            error.contains("2 are missing") && error.contains("left over") && error.contains("\"model.safetensors\""),
            "{error}"
        );
    }
    write_files(folder.path(), &[(A, st(&[("a", 1)])), (B, st(&[("b", 1)]))]);
    write_files(folder.path(), &[("model.safetensors.index.fp16.json", index(&[("a", A)]))]);
    for loader in loaders() {
        let image = loader.load(folder.path()).await.unwrap();
        let notes = image.report().notes.join("\n");
        assert_eq!(names(&image), ["a", "b"]);
        assert!(notes.contains("not loaded, because the index does not list them: \"model.safetensors\""), "{notes}");
        assert!(notes.contains("model.safetensors.index.fp16.json"), "{notes}");
    }
    write_files(folder.path(), &[("x.safetensors.index.json", index(&[("a", A)]))]);
    let error = loaders()[0].load(folder.path()).await.unwrap_err().to_string();
    assert!(error.contains("\"model.safetensors.index.json\"") && error.contains("\"x.safetensors.index.json\""), "{error}");
}

#[tokio::test]
async fn index_with_an_unusual_name_is_recognized_in_a_folder() {
    let name = "model.index.fp16.json";
    let folder = folder();
    write_files(folder.path(), &[(A, st(&[("a", 1)])), ("fp16.safetensors", st(&[("z", 1)]))]);
    write_files(folder.path(), &[(name, index(&[("a", A), ("b", "other.safetensors")])), ("z.index.json", b"{}".to_vec())]);
    for loader in loaders() {
        for path in [folder.path().to_owned(), folder.path().join(name)] {
            for format in [Format::Auto, Format::Safetensors] {
                let error = loader.load(&path).options(loader.load_options().format(format)).await.unwrap_err();
                assert!(error.to_string().contains("\"other.safetensors\""), "{error}");
            }
        }
    }
    write_files(folder.path(), &[("other.safetensors", st(&[("b", 2)]))]);
    for loader in loaders() {
        for path in [folder.path().to_owned(), folder.path().join(name)] {
            let image = loader.load(&path).options(loader.load_options().format(Format::Safetensors)).await.unwrap();
            assert_eq!(names(&image), ["a", "b"]);
        }
    }
    // A damaged index is an error; other JSON files are ignored.
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
        write_files(
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
    // `model.safetensors`, and an index with the usual name, still take precedence.
    write_files(folder.path(), &[("model.safetensors", st(&[("whole", 1)]))]);
    assert_eq!(names(&loaders()[0].load(folder.path()).await.unwrap()), ["whole"]);
    write_files(folder.path(), &[(INDEX, index(&[("b", "other.safetensors")]))]);
    assert_eq!(names(&loaders()[0].load(folder.path()).await.unwrap()), ["b"]);
}

#[tokio::test]
async fn files_skipped_by_patterns_and_index_are_noted() {
    let folder = folder();
    write_files(folder.path(), &[(A, st(&[("w1", 1)])), (B, st(&[("b", 2), ("w2", 2)]))]);
    write_files(folder.path(), &[(INDEX, index(&[("w1", A), ("b", B)]))]);
    for loader in loaders() {
        for (pattern, is_noted) in [("w*", true), ("w?", true), ("{w*,b}", false), ("w1", false), ("*", false)] {
            let image = loader.load(folder.path()).options(loader.load_options().tensors([pattern])).await.unwrap();
            let notes = image.report().notes.join("\n");
            assert_eq!(notes.contains("1 of its 2 files"), is_noted, "{pattern}: {notes}");
        }
        let image = loader.load(folder.path()).options(loader.load_options().tensor_names(["w1"])).await.unwrap();
        assert!(image.report().notes.is_empty(), "{:?}", image.report().notes);
    }
}
