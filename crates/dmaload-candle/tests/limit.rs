//! Tests for memory limits that are too small for the order in which a model requests tensors.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use candle_core::quantized::gguf_file::{self, Content};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use dmaload::{LoadOptions, Loader};
use dmaload_candle::{GgufReader, QTensors, Weights};
use dmaload_testing::{file, random_bytes, safetensors_of};

const PATIENCE: Duration = Duration::from_secs(60);
const CPU: Device = Device::Cpu;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Runs a closure on another thread. Panics if the closure takes longer than [`PATIENCE`].
fn in_time<T: Send + 'static>(what: &str, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(run()));
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{what}: {error}"))
}

/// Writes a GGUF file with 40 tensors of 512 KiB each, named `t0`, `t1`, …
fn write_many_tensors(folder: &Path) -> PathBuf {
    let tensors: Vec<(String, QTensor)> = (0..40)
        .map(|number| {
            let values = Tensor::from_raw_buffer(&random_bytes(512 << 10, number), DType::F32, &[256, 512], &CPU).unwrap();
            (format!("t{number}"), QTensor::quantize(&values, GgmlDType::F32).unwrap())
        })
        .collect();
    let named: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (&**name, tensor)).collect();
    let mut bytes = Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &[], &named).unwrap();
    file(folder, "many.gguf", bytes.get_ref())
}

/// Makes a loader whose 12 MiB limit is smaller than the 20 MiB file.
fn limited_loader() -> Loader {
    let options = LoadOptions::new().segment_bytes(2 << 20);
    Loader::builder().memory_limit_bytes(12 << 20).window_bytes(4 << 20).load_options(options).build().unwrap()
}

#[test]
fn reader_that_exceeds_the_limit_gets_an_error() {
    let folder = folder();
    let path = write_many_tensors(folder.path());
    let texts = in_time("reads in two orders", move || {
        let mut file = File::open(&path).unwrap();
        let content = Content::read(&mut file).unwrap();
        let loader = limited_loader();
        let mut names: Vec<String> = (0..40).map(|number| format!("t{number}")).collect();
        names.sort_by_key(|name| content.tensor_infos[name].offset);
        let mut texts = Vec::new();
        // The first load delivers the tensors in file order, the second in the order that its
        // options specify.
        for options in [LoadOptions::new(), LoadOptions::new().tensors(["t39", "*"])] {
            let options = options.segment_bytes(2 << 20);
            let is_in_file_order = texts.is_empty();
            let mut reader = GgufReader::open(&loader, &path, options).unwrap();
            let mut same = |name: &str| {
                let expected = content.tensor(&mut file, name, &CPU).unwrap();
                content.tensor(&mut reader, name, &CPU).map(|read| assert!(read.data().unwrap() == expected.data().unwrap()))
            };
            if is_in_file_order {
                let last = names.last().unwrap();
                texts.extend([(); 2].map(|()| same(last).unwrap_err().to_string()));
            }
            if !is_in_file_order {
                same("t39").unwrap();
            }
            // The reader drops each tensor that it holds once it has been read, which frees memory
            // for the others.
            for name in &names {
                same(name).unwrap();
            }
            reader.finish().unwrap();
        }
        // Tensors that the reader still holds do not block `finish`.
        let mut reader = GgufReader::open(&loader, &path, loader.load_options()).unwrap();
        content.tensor(&mut reader, names.last().unwrap(), &CPU).unwrap_err();
        reader.finish().unwrap();
        texts
    });
    assert_eq!(texts.len(), 2, "each read should return an error");
    for text in texts {
        assert!(text.contains("cannot load tensor") && text.contains("the loader's limit of 12582912"), "{text}");
        assert!(text.contains("raise the limit, or request tensors in the order"), "{text}");
    }
}

/// candle copies the tensors, so the load never waits for the model, regardless of the order in
/// which the model requests them.
#[test]
fn weights_can_be_requested_in_any_order_within_the_limit() {
    let folder = folder();
    let path = file(folder.path(), "model.safetensors", &safetensors_of(12, 1_000_000, 1));
    let quantized = write_many_tensors(folder.path());
    in_time("requests for the last tensor first", move || {
        let loader = limited_loader();
        let weights = Weights::load(&loader, &path, DType::F32, &CPU).unwrap();
        let tensors = QTensors::load(&loader, &quantized, &CPU).unwrap();
        weights.var_builder().get_unchecked("t11").unwrap();
        for number in (0..40).rev() {
            tensors.get(&format!("t{number}")).unwrap();
        }
        weights.finish().unwrap();
        tensors.finish().unwrap();
    });
}
