//! Tests that `dmaload doctor` and `dmaload load` agree on each file and folder.

use std::path::Path;

use crate::common::{self, dmaload, folder, run};
use crate::doctor;

/// Complete and damaged models, and other files that are named like models.
fn files_of_all_kinds() -> Vec<(&'static str, Vec<u8>)> {
    let safetensors = |header: &str, data: usize| {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &common::random_bytes(data, 1)].concat()
    };
    let entry = r#"{"w":{"dtype":"U8","shape":[16],"data_offsets":[0,16]}}"#;
    let gguf = |version: u32| [b"GGUF", &version.to_le_bytes()[..], &[0; 24]].concat();
    vec![
        ("whole.safetensors", safetensors(entry, 16)),
        ("whole.bin", safetensors(entry, 16)),
        ("cut.safetensors", safetensors(entry, 15)),
        ("cut.bin", safetensors(entry, 15)),
        ("long.safetensors", safetensors(entry, 17)),
        ("dtype.safetensors", safetensors(&entry.replace("U8", "U9"), 16)),
        ("header.safetensors", safetensors(entry, 0)[..40].to_vec()),
        ("none.safetensors", safetensors("{}", 0)),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n".to_vec()),
        ("lfs.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n".to_vec()),
        ("page.safetensors", b"<!DOCTYPE html><html>".to_vec()),
        ("page.gguf", b"<!DOCTYPE html><html>".to_vec()),
        ("zeros.safetensors", vec![0; 70_000]),
        ("zeros.gguf", vec![0; 70_000]),
        ("zeros.bin", vec![0; 70_000]),
        ("short.safetensors", b"ab".to_vec()),
        ("short.gguf", b"GG".to_vec()),
        ("short.bin", b"ab".to_vec()),
        ("empty.bin", Vec::new()),
        ("empty.safetensors", Vec::new()),
        ("empty.gguf", Vec::new()),
        ("v3.gguf", gguf(3)),
        ("v4.gguf", gguf(4)),
        ("v1.bin", gguf(1)),
        ("big.gguf", gguf(3_u32.swap_bytes())),
        ("cut.gguf", gguf(3)[..21].to_vec()),
        ("index.safetensors.index.json", br#"{"weight_map":{"w":"whole.safetensors"}}"#.to_vec()),
        ("stale.safetensors.index.json", br#"{"weight_map":{"x":"whole.safetensors"}}"#.to_vec()),
        ("missing.safetensors.index.json", br#"{"weight_map":{"x":"none-there.safetensors"}}"#.to_vec()),
        ("bad.safetensors.index.json", br#"{"weight_map":5}"#.to_vec()),
        ("m-00001-of-00002.gguf", gguf(3)),
    ]
}

#[test]
fn doctor_and_load_agree_on_every_file() {
    let folder = folder();
    let files = files_of_all_kinds();
    for (name, bytes) in &files {
        common::file(folder.path(), name, bytes);
    }
    let mut failed = 0;
    for (name, _) in &files {
        let path = folder.path().join(name);
        let loaded = run(dmaload(["load", "--json"]).arg(&path));
        let reported = run(&mut doctor(Some(&path)));
        assert_eq!(reported.code, loaded.code, "{reported}\n{loaded}");
        assert_eq!(reported.json()["load"]["works"], loaded.code == Some(0), "{reported}");
        if loaded.code != Some(0) {
            failed += 1;
            // Doctor reports the same error and the same hint.
            let (reported, loaded) = (reported.json(), loaded.json());
            let reason = reported["load"]["reason"].as_str().unwrap();
            for expected in [&loaded["error"], &loaded["hint"]] {
                assert!(reason.contains(expected.as_str().unwrap_or_default()), "{reason}\n{loaded:#}");
            }
        }
    }
    assert!(failed > 15, "only {failed} files failed to load");
    let screen = run(dmaload(["doctor"]).arg(folder.path().join("lfs.safetensors"))).exits(1).text();
    let screen: Vec<_> = screen.split_whitespace().collect();
    assert!(screen.join(" ").contains("would fail") && screen.join(" ").contains("git lfs pull"), "{screen:?}");
}

#[test]
fn doctor_and_load_agree_on_every_folder() {
    let whole = &files_of_all_kinds()[0].1;
    let folders: [&[(&str, &[u8])]; 8] = [
        &[],
        &[(".hidden.safetensors", whole)],
        &[("README.md", b"# a model")],
        &[("model.safetensors", whole)],
        &[("model-00001-of-00002.safetensors", whole)],
        &[("a.safetensors", whole), ("b.safetensors", whole)],
        &[("model.safetensors", b"")],
        &[("model.safetensors.index.json", b"{")],
    ];
    let mut works = 0;
    for files in folders {
        let folder = folder();
        files.iter().for_each(|(name, bytes)| drop(common::file(folder.path(), name, bytes)));
        let loaded = run(dmaload(["load", "--json"]).arg(folder.path()));
        let reported = run(&mut doctor(Some(folder.path())));
        assert_eq!(reported.code, loaded.code, "{reported}\n{loaded}");
        let (reported, loaded) = (reported.json(), loaded.json());
        assert_eq!(reported["load"]["works"], loaded["error"].is_null(), "{reported:#}");
        works += usize::from(loaded["error"].is_null());
        let reason = reported["load"]["reason"].as_str().unwrap_or_default();
        assert!(reason.contains(loaded["error"].as_str().unwrap_or_default()), "{reason}\n{loaded:#}");
    }
    assert_eq!(works, 1);
}

/// The file systems report wrong lengths for these files.
#[test]
fn doctor_inspect_and_load_agree_on_false_lengths() {
    let files = ["/sys/kernel/mm/transparent_hugepage/enabled", "/proc/self/status", "/proc/version"].map(Path::new);
    for path in files.into_iter().filter(|path| path.exists()) {
        let loaded = run(dmaload(["load", "--json"]).arg(path)).exits(1).json();
        let error = loaded["error"].as_str().unwrap();
        let inspected = run(dmaload(["inspect", "--json"]).arg(path)).exits(1).json();
        let doctor = run(&mut doctor(Some(path))).exits(1).json();
        let reported = doctor["load"]["reason"].as_str().or(doctor["error"].as_str()).unwrap();
        // `load` may find the end at another offset.
        let words = if error.contains("ends before offset") { "ends before offset" } else { error };
        assert!(
            reported.contains(words) && inspected["error"].as_str().unwrap().contains(words),
            "{reported}\n{inspected:#}\n{error}"
        );
        assert_eq!(inspected["hint"], loaded["hint"]);
    }
}
