//! Measures how much memory it takes to build a model. This test runs in a separate process, since
//! it measures the memory of the whole process.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

use candle_core::{DType, Device};
use dmaload::{LoadOptions, Loader};
use dmaload_candle::Weights;
use dmaload_testing::{file, random_bytes, safetensors};

const MIB: u64 = 1 << 20;
const TENSORS: usize = 32;
const ROWS: usize = 1024;

/// Returns a value from `/proc/self/status`, in bytes.
fn status(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn peak_memory_is_the_model_and_the_window() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let tensor_bytes = ROWS * ROWS * 4;
    let entry = |number: usize| {
        let (start, end) = (number * tensor_bytes, (number + 1) * tensor_bytes);
        format!(r#""t{number}":{{"dtype":"F32","shape":[{ROWS},{ROWS}],"data_offsets":[{start},{end}]}}"#)
    };
    let header = format!("{{{}}}", (0..TENSORS).map(entry).collect::<Vec<_>>().join(","));
    let path =
        file(folder.path(), "model.safetensors", &safetensors(header.as_bytes(), &random_bytes(TENSORS * tensor_bytes, 1)));
    let (window, segment) = (16 * MIB, 8 * MIB);
    let options = LoadOptions::new().segment_bytes(segment);
    let loader = Loader::builder().window_bytes(window).load_options(options).build().unwrap();
    // Resets `VmHWM`, the peak of `VmRSS`.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    let weights = Weights::load(&loader, &path, DType::F32, &Device::Cpu).unwrap();
    let vb = weights.var_builder();
    // Request the tensors in the worst order, last to first.
    let tensors: Vec<_> = (0..TENSORS).rev().map(|number| vb.get((ROWS, ROWS), &format!("t{number}")).unwrap()).collect();
    drop(vb);
    weights.finish().unwrap();
    let peak = status("VmHWM") - before;
    let model = (TENSORS * tensor_bytes) as u64;
    // The model, the window, the segments that hold a tensor, staging (16 MiB with at most two
    // CPUs), and 16 MiB for candle and the loader themselves.
    let allowed = model + window + 2 * segment + 16 * MIB + 16 * MIB;
    eprintln!("peak {} MiB for a model of {} MiB", peak / MIB, model / MIB);
    assert!(
        peak >= model && peak <= allowed,
        "the peak is {} MiB, but must be between {} and {} MiB",
        peak / MIB,
        model / MIB,
        allowed / MIB
    );
    assert_eq!(tensors.len(), TENSORS);
}
