//! Tests for split models: which files belong together, and which are missing.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use dmaload::{Error, Format, Shard, Source};

use crate::common::folder;
use crate::{A, B, INDEX, gguf, index, load_refusing_and_allowing_missing, loaders, names, part, st, write_files};

#[tokio::test]
async fn missing_parts_are_an_error_unless_allowed() {
    let g = |number| format!("m-0000{number}-of-00003.gguf");
    let (g1, g2, g3) = (g(1), g(2), g(3));
    let (a3, c3) = ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors");
    let two = index(&[("a", A), ("b", B)]);
    // Each case has files, dangling links, texts that the error contains, and the number of
    // tensors in the files.
    let cases: [(Vec<(&str, Vec<u8>)>, &[(&str, &str)], &[&str], usize); 14] = [
        (vec![(a3, st(&[("a", 1)])), (c3, st(&[("c", 1)]))], &[], &["1 is missing", "model-00002-of-00003.safetensors"], 2),
        (vec![(A, st(&[("a", 1)]))], &[], &["1 is missing", B], 1),
        (vec![(A, st(&[("a", 1)])), ("model-00002-of-00002.safetensors.incomplete", vec![1])], &[], &[B, "unfinished"], 1),
        (vec![(A, st(&[("a", 1)])), ("model-00002-of-00002.safetensors.part", vec![1])], &[], &[B, "unfinished"], 1),
        (vec![(A, st(&[("a", 1)])), (B, Vec::new())], &[], &[B, "0 bytes"], 1),
        (vec![("a.safetensors", st(&[("a", 1)])), ("b.safetensors", Vec::new())], &[], &["b.safetensors", "0 bytes"], 1),
        (vec![("a.safetensors", st(&[("a", 1)]))], &[("b.safetensors", "nowhere")], &["b.safetensors", "nowhere"], 1),
        (vec![(INDEX, two.clone()), (A, st(&[("a", 1)]))], &[], &["the index lists 2 files; 1 is missing", B], 1),
        (vec![(INDEX, two.clone()), (A, st(&[("a", 1)])), (B, Vec::new())], &[], &["lists 2 files; 1 is missing", B], 1),
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
    for (files, links, says, loadable) in cases {
        let folder = folder();
        write_files(folder.path(), &files);
        links.iter().for_each(|(name, target)| symlink(target, folder.path().join(name)).unwrap());
        for loader in loaders() {
            let (error, allowed) = load_refusing_and_allowing_missing(&loader, folder.path()).await;
            let error = error.unwrap_err();
            assert!(matches!(error, Error::Incomplete { .. }), "{error}");
            assert!(says.iter().all(|text| error.to_string().contains(text)), "{says:?}: {error}");
            let allowed = allowed.unwrap();
            assert_eq!(allowed.tensors().count(), loadable, "{says:?}");
            let notes = allowed.report().notes.join("\n");
            assert!(
                notes.contains("loading an incomplete model, because this was allowed") && notes.contains("missing"),
                "{notes}"
            );
        }
        let inspected = dmaload::inspect_model(folder.path(), Format::Auto).await.unwrap_err();
        assert!(matches!(inspected, Error::Incomplete { .. }), "{inspected}");
    }
}

#[tokio::test]
async fn whole_models_load_alongside_unfinished_downloads() {
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
        write_files(folder.path(), files);
        // The last model lacks a file; the others are complete.
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
async fn parts_of_a_split_gguf_model_are_checked() {
    let name = |number: usize, count: usize| format!("m-{number:05}-of-{count:05}.gguf");
    let other = |mut keys: Vec<(&'static str, u16)>, value| {
        keys.push(("other", value));
        keys
    };
    // Each case has the parts in order and an expected text. If the text is empty, the model
    // loads, and no note mentions `split.tensors.count`. If the text starts with `note: `, the
    // model loads, and a note must contain the rest of the text. Otherwise, the load fails, and
    // the error must contain the text.
    let cases: Vec<(Vec<Vec<u8>>, &str)> = vec![
        (vec![part(0, 2, 2, &[("a", 1)]), part(1, 2, 2, &[("b", 1)])], ""),
        // Models whose first part has no tensors, with equal, differing and missing tensor counts,
        // and a model without any tensors.
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
        (vec![part(1, 2, 2, &[("b", 1)]), part(0, 2, 2, &[("a", 1)])], "its name says part 1 of 2"),
        (vec![part(0, 2, 2, &[("a", 1)]), part(0, 2, 2, &[("a", 1)])], "its name says part 2 of 2"),
        (vec![part(0, 2, 2, &[("a", 1)]), part(1, 3, 2, &[("b", 1)])], "part 2 of 3"),
        (vec![part(0, 2, 2, &[("a", 1)]), part(1, 2, 3, &[("b", 1)])], "split.tensors.count is 3"),
        (
            vec![part(0, 2, 3, &[("a", 1)]), part(1, 2, 3, &[("b", 1)])],
            "split.tensors.count is 3, but the number of tensors in all parts is 2",
        ),
        (vec![part(0, 2, 1, &[]), part(1, 2, 1, &[])], "the number of tensors in all parts is 0"),
        (vec![part(0, 2, 2, &[("a", 1)]), gguf(&[], &[("b", 1)])], "split.count is missing"),
        (vec![part(0, 2, 2, &[("a", 1)]), part(2, 2, 2, &[("b", 1)])], "part 3 of 2"),
        (vec![part(0, 2, 2, &[("a", 1)]), gguf(&[("split.count", 2)], &[("b", 1)])], "but split.no is not"),
        (
            vec![part(0, 3, 3, &[("a", 1)]), part(1, 3, 3, &[("b", 1)]), gguf(&other(vec![("split.no", 2)], 0), &[("c", 1)])],
            "split.count is missing",
        ),
    ];
    for (parts, says) in cases {
        let folder = folder();
        let files: Vec<_> = parts.iter().enumerate().map(|(at, bytes)| (name(at + 1, parts.len()), bytes.clone())).collect();
        let paths: Vec<_> = files.iter().map(|(name, _)| folder.path().join(name)).collect();
        files.iter().for_each(|(name, bytes)| write_files(folder.path(), &[(name.as_str(), bytes.clone())]));
        for loader in loaders() {
            let last = paths.last().unwrap();
            for asked in [vec![folder.path()], vec![last.as_path()], paths.iter().map(PathBuf::as_path).collect()] {
                for options in [loader.load_options(), loader.load_options().tensors(["*"])] {
                    let loaded = loader.load(&asked).options(options.clone()).await;
                    match loaded {
                        Ok(image) => {
                            let notes = image.report().notes.join("\n");
                            let noted = says.strip_prefix("note: ");
                            assert!(says.is_empty() || noted.is_some(), "{says}: {} tensors", image.tensors().count());
                            assert!(notes.contains(noted.unwrap_or_default()), "{says:?}: {notes}");
                            assert_eq!(notes.contains("split.tensors.count"), noted.is_some(), "{says:?}: {notes}");
                        }
                        // The model has no tensors, so the pattern matches nothing.
                        Err(Error::NoSuchTensor(_)) if options != loader.load_options() => {}
                        Err(error) => assert!(!says.is_empty() && error.to_string().contains(says), "{says:?}: {error}"),
                    }
                }
            }
            let raw = loader.load(&paths).options(loader.load_options().format(Format::Raw)).await.unwrap();
            assert_eq!(raw.files().len(), parts.len());
        }
    }
}

/// A model that is embedded in another file is not judged by the name of that file.
#[tokio::test]
async fn model_embedded_in_a_file_must_be_whole() {
    let folder = folder();
    let inner = part(0, 2, 2, &[("a", 1)]);
    let whole = gguf(&[], &[("a", 1)]);
    let container = |bytes: &[u8]| [&[9; 5000][..], bytes, &[7; 3000]].concat();
    write_files(folder.path(), &[("app.apk", container(&inner)), ("m-00001-of-00002.gguf", container(&whole))]);
    for loader in loaders() {
        for shard in
            [None, Some(Shard { rank: 0, world_size: 2, dim: None }), Some(Shard { rank: 0, world_size: 2, dim: Some(0) })]
        {
            let options = |format| {
                let options = loader.load_options().format(format);
                shard.map_or(options.clone(), |shard| options.shard(shard))
            };
            let inside = |name: &str, bytes: &[u8], options| {
                loader.load(Source::from(folder.path().join(name)).range(5000..5000 + bytes.len() as u64)).options(options)
            };
            let error = inside("app.apk", &inner, options(Format::Auto)).await.unwrap_err();
            assert!(matches!(error, Error::Incomplete { .. }), "{shard:?}: {error}");
            assert!(error.to_string().contains("part 1 of 2"), "{shard:?}: {error}");
            inside("app.apk", &inner, options(Format::Auto).allow_missing(true)).await.unwrap();
            inside("m-00001-of-00002.gguf", &whole, options(Format::Auto)).await.unwrap();
        }
        let raw = loader
            .load(Source::from(folder.path().join("app.apk")).range(0..100))
            .options(loader.load_options().format(Format::Raw))
            .await
            .unwrap();
        assert_eq!(raw.report().wanted_bytes, 100);
    }
}

/// llama.cpp numbers parts with five digits. Parts with other names are recognized by their
/// metadata.
#[tokio::test]
async fn unusually_numbered_part_is_never_loaded_as_a_whole_model() {
    for end in ["1-of-2", "0001-of-0002", "1_of_2", "00001-of-2"] {
        let second = end.replacen('1', "2", 1);
        let (first, second) = (format!("m-{end}.gguf"), format!("m-{second}.gguf"));
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        write_files(
            folder.path(),
            &[(first.as_str(), part(0, 2, 2, &[("a", 1)])), (second.as_str(), part(1, 2, 2, &[("b", 1)]))],
        );
        for loader in loaders() {
            let error = loader.load(folder.path()).await.unwrap_err();
            assert!(matches!(error, Error::NoModel { .. }), "{error}");
            assert!(error.to_string().contains("NAME-00001-of-00002.gguf"), "{error}");
            for name in [&first, &second] {
                let (error, allowed) = load_refusing_and_allowing_missing(&loader, &at(name)).await;
                assert!(matches!(error.unwrap_err(), Error::Incomplete { .. }));
                assert_eq!(allowed.unwrap().tensors().count(), 1);
            }
            let both = loader.load([at(&second), at(&first)]).await.unwrap();
            assert_eq!(names(&both), ["a", "b"]);
        }
        fs::remove_file(at(&second)).unwrap();
        for loader in loaders() {
            let (error, _) = load_refusing_and_allowing_missing(&loader, folder.path()).await;
            assert!(matches!(error.unwrap_err(), Error::Incomplete { .. }));
        }
        // A file whose metadata mentions no other parts is loaded, and the report has a note about
        // its name.
        write_files(folder.path(), &[(first.as_str(), gguf(&[], &[("a", 1)]))]);
        for loader in loaders() {
            for path in [folder.path().to_owned(), at(&first)] {
                let notes = loader.load(path).await.unwrap().report().notes.join("\n");
                assert!(notes.contains("is named like part 1 of 2, but claims to be a whole model"), "{notes}");
            }
        }
    }
}

#[tokio::test]
async fn part_is_recognized_regardless_of_its_name() {
    let folder = folder();
    let both = [part(0, 2, 2, &[("a", 1)]), part(1, 2, 2, &[("b", 1)])];
    write_files(folder.path(), &[("blobs/b0", both[0].clone()), ("blobs/b1", both[1].clone()), ("two.gguf", both.concat())]);
    write_files(folder.path(), &[("three.gguf", part(0, 3, 3, &[("a", 1)])), ("m.safetensors", st(&[("s", 1)]))]);
    let whole = [
        ("zero.gguf", gguf(&[("split.count", 0)], &[("a", 1)])),
        ("one.gguf", part(0, 1, 1, &[("a", 1)])),
        ("vocabulary.gguf", gguf(&[("k", 1)], &[])),
    ];
    write_files(folder.path(), &whole);
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
            let (error, allowed) = load_refusing_and_allowing_missing(&loader, &at(name)).await;
            let error = error.unwrap_err();
            assert!(matches!(error, Error::Incomplete { .. }) && error.to_string().contains(says), "{error}");
            let allowed = allowed.unwrap();
            assert_eq!(allowed.tensors().count(), 1);
            assert!(allowed.report().notes.join("\n").contains(says), "{:?}", allowed.report().notes);
        }
        // The parts can be listed one by one, in any order, with other files between them.
        let paths = [at("blobs/b1"), at("m.safetensors"), at("blobs/b0")];
        assert_eq!(names(&loader.load(&paths).await.unwrap()), ["a", "b", "s"]);
        let twice = loader.load([at("blobs/b1"), at("blobs/b1")]).await.unwrap_err();
        assert!(twice.to_string().contains("and so does"), "{twice}");
        assert_eq!(names(&loader.load(at("snapshot")).await.unwrap()), ["a", "b"]);
        assert_eq!(names(&loader.load(at("snapshot/m-00002-of-00002.gguf")).await.unwrap()), ["a", "b"]);
        for (name, _) in &whole {
            loader.load(at(name)).await.unwrap();
        }
    }
}

#[tokio::test]
async fn rank_that_loads_a_byte_range_checks_the_whole_model() {
    let (g1, g2) = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf");
    let [first, second] = [part(0, 2, 2, &[("a", 1)]), part(1, 2, 2, &[("b", 2)])];
    let cases: [(&str, Vec<(&str, Vec<u8>)>); 4] = [
        ("missing parts: 2", vec![("x.gguf", first.clone())]),
        ("its name says", vec![(g1, second.clone()), (g2, first.clone())]),
        ("\"w\"", vec![(A, st(&[("a", 1), ("w", 1)])), (B, st(&[("b", 2), ("w", 2)]))]),
        ("", vec![(g1, first), (g2, second)]),
    ];
    for (says, files) in cases {
        let folder = folder();
        write_files(folder.path(), &files);
        for loader in loaders() {
            for rank in [0, 1] {
                let options = loader.load_options().shard(Shard { rank, world_size: 2, dim: None });
                let loaded = loader.load(folder.path()).options(options).await.map_err(|error| error.to_string());
                match loaded {
                    Ok(_) => assert_eq!(says, ""),
                    Err(error) => assert!(!says.is_empty() && error.contains(says), "{says}: {error}"),
                }
            }
        }
    }
}

#[tokio::test]
async fn names_of_a_series_are_recognized_in_any_form() {
    for name in [
        "00001-of-00002.safetensors",
        "1-of-2.safetensors",
        "model00001-of-00002.safetensors",
        "MODEL-00001-OF-00002.safetensors",
        "model-00001-of-00002-one-of-many.safetensors",
        "model-00001-of-4294967295.safetensors",
    ] {
        let folder = folder();
        write_files(folder.path(), &[(name, st(&[("a", 1)]))]);
        for loader in loaders() {
            let error = loader.load(folder.path()).await.unwrap_err();
            assert!(matches!(error, Error::Incomplete { loadable: 1, .. }), "{name}: {error}");
        }
    }
    // These names only resemble those of a series.
    for name in ["v2-of-3.safetensors", "one-of-2.safetensors", "model-3-of-2.safetensors", "lora1-of-many.safetensors"] {
        let folder = folder();
        write_files(folder.path(), &[(name, st(&[("a", 1)]))]);
        assert_eq!(names(&loaders()[0].load(folder.path()).await.unwrap()), ["a"], "{name}");
    }
}

#[tokio::test]
async fn hints_for_incomplete_models_can_be_followed() {
    for (files, says, hints) in [
        (vec![(INDEX, index(&[("a", A)]))], "1 is missing", "download the model again"),
        (vec![(A, st(&[("a", 1)])), (INDEX, index(&[("a", A), ("b", B)]))], "1 is missing", "allow_missing"),
        (
            vec![(INDEX, br#"{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}"#.to_vec())],
            "tensor \"a\" is in the index twice",
            "the index is damaged",
        ),
    ] {
        let folder = folder();
        write_files(folder.path(), &files);
        for loader in loaders() {
            let error = loader.load(folder.path()).await.unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
            let hint = error.hint().unwrap();
            assert!(hint.contains(hints) && hint.contains("allow_missing") == (hints == "allow_missing"), "{hint}");
        }
    }
    let folder = folder();
    let pickle = [&b"PK\x03\x04"[..], &[0; 200]].concat();
    write_files(folder.path(), &[("pytorch_model.bin", pickle), (INDEX, index(&[("a", "pytorch_model.bin")]))]);
    for loader in loaders() {
        let error = loader.load(folder.path()).await.unwrap_err().to_string();
        assert!(error.contains("pytorch_model.bin") && error.contains("pickled weights"), "{error}");
    }
}

#[tokio::test]
async fn one_part_among_other_paths_stands_for_all_parts() {
    let folder = folder();
    let (g1, g2) = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf");
    let other = "other.gguf";
    write_files(folder.path(), &[(g1, part(0, 2, 2, &[("a", 1)])), (g2, part(1, 2, 2, &[("b", 2)]))]);
    write_files(folder.path(), &[(other, gguf(&[], &[("o", 3)]))]);
    let dotted = |name: &str| folder.path().join(".").join(name);
    let plain = |name: &str| folder.path().join(name);
    // `Path::components` keeps a leading `.` and drops one in the middle.
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
            let image = loader.load(&paths).await.unwrap();
            assert_eq!((names(&image), image.files().len()), (all.iter().map(|&n| n.to_owned()).collect(), all.len()));
        }
    }
    fs::remove_file(plain(g2)).unwrap();
    for loader in loaders() {
        let error = loader.load([plain(g1), plain(other)]).await.unwrap_err();
        assert!(matches!(error, Error::Incomplete { loadable: 1, .. }) && error.to_string().contains(g2), "{error}");
    }
}
