//! Tests for errors about files that do not contain a valid model.

use std::path::Path;

use crate::common::{self, dmaload, file, folder, run, safetensors, sha256sum};
use crate::{every_command_fails, load, text};

#[test]
fn html_page_is_recognized_in_any_encoding() {
    let folder = folder();
    let utf16: Vec<u8> = "<html><body>gelöscht".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for page in [&b"<!DOCTYPE html><title>gel\xf6scht</title>"[..], b"<html>\0<body>", &utf16] {
        for name in ["m.safetensors", "m.gguf"] {
            every_command_fails(&file(folder.path(), name, page), &["an HTML page", "download it again"]);
        }
    }
}

#[test]
fn advice_on_a_wrong_format_names_another_format() {
    let folder = folder();
    let path = safetensors(folder.path(), "m.safetensors", br#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 4);
    let done = run(dmaload(["load", "--format", "gguf"]).arg(&path))
        .fails(1, &["a safetensors file", "(--format safetensors)", "--format auto does this if"]);
    assert!(!done.stderr.contains("give it a name"), "{done}");
}

/// Returns a header whose only tensor has this entry, which may be invalid.
pub(crate) fn header(entry: &str) -> Vec<u8> {
    format!(r#"{{"w":{entry}}}"#).into_bytes()
}

/// Invalid headers for 16 bytes of data. Each entry consists of a description, the header, and
/// words that the error contains.
fn invalid_headers() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let good = r#"{"dtype":"U8","shape":[16],"data_offsets":[0,16]}"#;
    let two = |second: &str| format!(r#"{{"a":{{"dtype":"U8","shape":[8],"data_offsets":[0,8]}},"b":{second}}}"#).into_bytes();
    let mut not_utf8 = header(good);
    not_utf8[2] = 0xFF;
    vec![
        ("past the end", header(r#"{"dtype":"U8","shape":[17],"data_offsets":[0,17]}"#), "cut short"),
        ("trailing bytes", header(r#"{"dtype":"U8","shape":[15],"data_offsets":[0,15]}"#), "belong to no tensor"),
        ("a hole at the start", header(r#"{"dtype":"U8","shape":[8],"data_offsets":[8,16]}"#), "belong to no tensor"),
        ("a wrong length", header(r#"{"dtype":"F32","shape":[16],"data_offsets":[0,16]}"#), "needs 64"),
        ("reversed offsets", header(r#"{"dtype":"U8","shape":[16],"data_offsets":[16,0]}"#), "end before they begin"),
        ("an unknown dtype", header(r#"{"dtype":"Q4","shape":[16],"data_offsets":[0,16]}"#), "unknown dtype"),
        ("negative offsets", header(r#"{"dtype":"U8","shape":[16],"data_offsets":[-16,0]}"#), "-16"),
        (
            "a shape beyond 64 bits",
            header(r#"{"dtype":"U8","shape":[4294967296,4294967296,16],"data_offsets":[0,16]}"#),
            "64 bits",
        ),
        ("overlapping tensors", two(r#"{"dtype":"U8","shape":[12],"data_offsets":[4,16]}"#), "before tensor"),
        ("a hole in the middle", two(r#"{"dtype":"U8","shape":[4],"data_offsets":[12,16]}"#), "belong to no tensor"),
        ("a tensor twice", format!(r#"{{"w":{good},"w":{good}}}"#).into_bytes(), "twice"),
        ("not UTF-8", not_utf8, "not UTF-8"),
        ("not JSON", b"{\"w\":}".to_vec(), "not valid JSON"),
        ("not an object", b"[1,2,3]".to_vec(), "expected '{'"),
        ("a missing key", header(r#"{"dtype":"U8","shape":[16]}"#), "data_offsets"),
    ]
}

#[test]
fn file_with_an_invalid_header_loads_only_as_raw_bytes() {
    let folder = folder();
    for (what, header, word) in invalid_headers() {
        println!("{what}");
        let path = safetensors(folder.path(), "invalid.safetensors", &header, 16);
        let advice = if word == "cut short" { "download the file again" } else { "--format raw" };
        every_command_fails(&path, &[word, advice]);
        assert_loads_as_raw(&path);
    }
}

#[track_caller]
fn assert_loads_as_raw(path: &Path) {
    let json = common::load_json(path, &["--format", "raw", "--digest", "sha256"]);
    assert_eq!(common::digest_of(&json), sha256sum(path), "{json:#}");
    assert_eq!(json["tensors"], 0, "{json:#}");
}

#[test]
fn file_with_an_invalid_header_length_loads_only_as_raw() {
    let folder = folder();
    for (length, word) in
        [(u64::MAX, "more than"), (200_000_000, "more than"), (1_000_000, "has only"), (1, "shortest"), (0, "shortest")]
    {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        bytes.resize(5000, b' ');
        let path = file(folder.path(), "length.safetensors", &bytes);
        every_command_fails(&path, &[word]);
        assert_loads_as_raw(&path);
    }
    let short = file(folder.path(), "short.safetensors", b"12345");
    every_command_fails(&short, &["5 bytes"]);
    assert_loads_as_raw(&short);
}

/// Files that are named like models but do not contain a valid model. Each entry consists of a
/// name, the contents, words from the diagnosis, and words from the advice.
fn files_named_like_models() -> Vec<(&'static str, Vec<u8>, &'static str, &'static str)> {
    let safetensors = |length: [u8; 8]| [&length[..], br#"{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}  ab"#].concat();
    let gguf = |version: u32, to_bytes: fn(u32) -> [u8; 4]| [b"GGUF", &to_bytes(version)[..], &[0; 64]].concat();
    let mut cut_gguf = gguf(3, u32::to_le_bytes);
    cut_gguf.truncate(20);
    let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345678901\n".to_vec();
    let text = |text: &str| text.as_bytes().to_vec();
    vec![
        ("lfs.safetensors", lfs.clone(), "12345678901 bytes", "git lfs pull"),
        ("lfs.gguf", lfs.clone(), "Git LFS pointer", "git lfs pull"),
        ("model.safetensors.index.json", lfs, "Git LFS pointer", "git lfs pull"),
        ("page.safetensors", text("<!DOCTYPE html>\n<html><title>Sign in</title></html>"), "HTML", "download it again"),
        ("page.gguf", text("  <html><body>429</body></html>"), "HTML", "download it again"),
        ("x.safetensors.index.json", text("<html>502</html>"), "HTML", "download it again"),
        ("denied.safetensors", text("<?xml version=\"1.0\"?><Error><Code>AccessDenied"), "XML", "download it again"),
        ("json.safetensors", text("{\"error\":\"Repository not found\"}"), "Repository not found", "download it again"),
        ("text.safetensors", text("Entry not found"), "Entry not found", "download it again"),
        ("text.gguf", text("Not Found"), "Not Found", "download it again"),
        ("zip.safetensors", [b"PK\x03\x04".as_slice(), &[7; 500]].concat(), "zip", "convert it to safetensors"),
        ("pickle.safetensors", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(), "pickle", "convert it to safetensors"),
        ("gzip.gguf", b"\x1f\x8b\x08\0\0\0\0\0\0\x03ab".to_vec(), "gzip", "unpack"),
        ("zeros.safetensors", vec![0; 100_000], "zeros", "download is incomplete"),
        ("zeros.gguf", vec![0; 5000], "zeros", "download is incomplete"),
        ("other.gguf", safetensors(53_u64.to_le_bytes()), "a safetensors file", "--format safetensors"),
        ("order.safetensors", safetensors(53_u64.to_be_bytes()), "big-endian", "big-endian machine"),
        ("order.gguf", gguf(3, u32::to_be_bytes), "big-endian", "convert it to little-endian"),
        ("new.gguf", gguf(4, u32::to_le_bytes), "version 4", "too new for this"),
        ("old.gguf", gguf(1, u32::to_le_bytes), "version 1", "too old"),
        ("cut.gguf", cut_gguf, "at least 4 bytes are missing", "download the file again"),
        (
            "cut.safetensors",
            safetensors(1_000_000_u64.to_le_bytes()),
            "at least 999943 bytes are missing",
            "download the file again",
        ),
        ("long.safetensors", safetensors(200_000_000_u64.to_le_bytes()), "100000000", "--format raw"),
    ]
}

#[test]
fn files_that_are_not_models_get_specific_advice() {
    let folder = folder();
    for (name, bytes, what, advice) in files_named_like_models() {
        let path = file(folder.path(), name, &bytes);
        // `cat` writes an index unchanged, so it does not fail.
        if name.ends_with(".index.json") {
            run(dmaload(["inspect", "--json"]).arg(&path)).fails(1, &[text(&path), what, advice]);
        } else {
            every_command_fails(&path, &[what, advice]);
        }
        let done = run(dmaload(["load", "--json", "--no-pack"]).arg(&path)).fails(1, &[what, advice]);
        let has_raw = done.stderr.contains("--format raw");
        assert!(!has_raw || ["too new", "too old", "raw"].iter().any(|word| advice.contains(word)), "{done}");
        assert!(!done.stderr.contains("--layout"), "{done}");
        assert_loads_as_raw(&path);
    }
}

/// The missing bytes of all tensors are counted, not only those of the first one.
#[test]
fn error_of_a_truncated_file_counts_the_missing_bytes() {
    let folder = folder();
    let entry = |from: u64, to: u64| format!(r#"{{"dtype":"U8","shape":[{}],"data_offsets":[{from},{to}]}}"#, to - from);
    let header = format!(r#"{{"a":{},"b":{},"c":{}}}"#, entry(0, 100), entry(100, 900), entry(900, 1000));
    let path = safetensors(folder.path(), "m.safetensors", header.as_bytes(), 40);
    every_command_fails(&path, &["at least 960 bytes are missing", "download the file again"]);
}

#[test]
fn control_characters_of_a_tensor_name_are_escaped() {
    let folder = folder();
    let header = br#"{"\u001b[2Jgone":{"dtype":"U8","shape":[17],"data_offsets":[0,17]}}"#;
    let path = safetensors(folder.path(), "hostile.safetensors", header, 16);
    let done = run(&mut load(&path)).fails(1, &[text(&path), "gone"]);
    assert!(!done.stderr.contains('\u{1b}'), "{done}");
}
