//! Tests that `dmaload inspect` shows the tensors that the `safetensors` crate wrote, and reads
//! only the header.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

mod common;

use std::fs;
use std::io::Write;

use common::{dmaload, file, folder, run};
use safetensors::tensor::{Dtype, TensorView, serialize};

fn model() -> Vec<u8> {
    let tensors =
        [("a.weight", Dtype::F32, vec![2, 3], 24), ("b", Dtype::BF16, vec![5], 10), ("empty", Dtype::I64, vec![0, 7], 0)];
    let data = [7; 64];
    let views = tensors.map(|(name, dtype, shape, len)| (name, TensorView::new(dtype, shape, &data[..len]).unwrap()));
    serialize(views, None).unwrap()
}

#[test]
fn json_has_every_tensor_with_its_range_in_the_file() {
    let folder = folder();
    let bytes = model();
    let path = file(folder.path(), "model.safetensors", &bytes);
    let json = run(dmaload(["inspect", "--json"]).arg(&path)).succeeds().json();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!((json["bytes"].as_u64(), json["format"].as_str()), (Some(bytes.len() as u64), Some("safetensors")));
    assert_eq!(json["header_bytes"].as_u64(), Some(header as u64));
    let tensors = json["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 3);
    for tensor in tensors {
        let expected = &metadata.tensors()[tensor["name"].as_str().unwrap()];
        let (start, end) = expected.data_offsets;
        assert_eq!(tensor["dtype"].as_str().unwrap(), expected.dtype.to_string());
        assert_eq!(tensor["shape"], serde_json::json!(expected.shape));
        assert_eq!(
            (tensor["offset"].as_u64(), tensor["bytes"].as_u64()),
            (Some((8 + header + start) as u64), Some((end - start) as u64))
        );
    }
}

#[test]
fn table_has_a_line_for_each_tensor_and_a_total() {
    let folder = folder();
    let path = file(folder.path(), "model.safetensors", &model());
    let text = run(dmaload(["inspect"]).arg(&path)).succeeds().text();
    let weight = text.lines().find(|line| line.starts_with("a.weight")).unwrap_or_else(|| panic!("{text}"));
    assert!(weight.contains("F32") && weight.contains("[2, 3]") && weight.contains("24"), "{text}");
    assert!(text.lines().last().unwrap().contains("3 tensors") && text.lines().last().unwrap().contains("34"), "{text}");
}

#[test]
fn metadata_of_a_safetensors_file_is_shown() {
    let folder = folder();
    let pairs =
        [("format", "pt"), ("ss_base_model", "x\ny"), ("", "empty")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    let view = TensorView::new(Dtype::U8, vec![4], &[1, 2, 3, 4]).unwrap();
    let bytes = serialize([("w", view)], Some(pairs.clone().into())).unwrap();
    let path = file(folder.path(), "model.safetensors", &bytes);
    let text = run(dmaload(["inspect"]).arg(&path)).succeeds().text();
    for (key, value) in &pairs {
        let shown = value.replace('\n', "\\n");
        assert!(text.lines().any(|line| line.starts_with(key) && line.ends_with(&shown)), "{key}: {text}");
    }
    let json = run(dmaload(["inspect", "--json"]).arg(&path)).succeeds().json();
    assert_eq!(json["metadata"]["ss_base_model"], "x\ny", "{json:#}");
    let none = run(dmaload(["inspect"]).arg(file(folder.path(), "none.safetensors", &model()))).succeeds().text();
    assert!(none.starts_with("name"), "{none}");
}

#[test]
fn raw_file_is_shown_as_raw() {
    let folder = folder();
    let path = file(folder.path(), "model.bin", &[3; 5000]);
    let json = run(dmaload(["inspect", "--json"]).arg(&path)).succeeds().json();
    assert_eq!((json["format"].as_str(), json["tensors"].as_array().map(Vec::len)), (Some("raw"), Some(0)));
    run(dmaload(["inspect", "--format", "safetensors"]).arg(&path)).fails(1, &["model.bin", "header"]);
}

/// Measuring the time would prove nothing, because a sparse file is read as fast as memory.
/// Instead, the process gets too little address space to hold or map the payload, and its reads
/// are counted.
#[test]
fn inspect_reads_only_the_header() {
    let folder = folder();
    let path = folder.path().join("large.safetensors");
    let data: u64 = 8 << 30;
    let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{data}],"data_offsets":[0,{data}]}}}}"#);
    let mut large = fs::File::create(&path).unwrap();
    large.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    large.write_all(header.as_bytes()).unwrap();
    large.set_len(8 + header.len() as u64 + data).unwrap();

    // The shell itself reads only a few KiB; `rchar` includes children that were waited for.
    let script = "ulimit -v 1048576; before=$(awk '/rchar/{print $2}' /proc/$$/io); \"$0\" inspect \"$1\" >/dev/null || exit 1; \
                  after=$(awk '/rchar/{print $2}' /proc/$$/io); echo $((after - before))";
    let mut shell = std::process::Command::new("sh");
    let done = run(shell.args(["-c", script, env!("CARGO_BIN_EXE_dmaload")]).arg(&path)).succeeds();
    let read: u64 = done.text().trim().parse().unwrap();
    println!("{read} bytes were read in total");
    assert!(read > header.len() as u64, "the reads were not counted");
    assert!(read < 1 << 20, "{read} bytes were read");
}
