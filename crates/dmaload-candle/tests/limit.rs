//! Loaders with a memory limit that a model's order of asking may exceed.
#![allow(clippy::unwrap_used, reason = "a test that can't go on has failed")]

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

/// Runs something that must not wait for ever, on a thread of its own.
fn in_time<T: Send + 'static>(what: &str, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(run()));
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{what}: {error}"))
}

/// A GGUF file of 40 tensors of half a MiB, `t0`, `t1`, …
fn many(folder: &Path) -> PathBuf {
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

/// Twenty MiB are read within twelve.
fn limited() -> Loader {
    let options = LoadOptions::new().segment_bytes(2 << 20);
    Loader::builder().memory_limit_bytes(12 << 20).window_bytes(4 << 20).load_options(options).build().unwrap()
}

#[test]
fn reader_that_needs_more_than_the_limit_says_so() {
    let folder = folder();
    let path = many(folder.path());
    let texts = in_time("reads in any order", move || {
        let mut file = File::open(&path).unwrap();
        let content = Content::read(&mut file).unwrap();
        let loader = limited();
        let mut names: Vec<String> = (0..40).map(|number| format!("t{number}")).collect();
        names.sort_by_key(|name| content.tensor_infos[name].offset);
        let mut texts = Vec::new();
        // In the file's order, and in that of the options.
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
            // What was held is dropped as it is read, so there is room for the rest.
            for name in &names {
                same(name).unwrap();
            }
            reader.finish().unwrap();
        }
        // What is held does not hold up the end.
        let mut reader = GgufReader::open(&loader, &path, loader.load_options()).unwrap();
        content.tensor(&mut reader, names.last().unwrap(), &CPU).unwrap_err();
        reader.finish().unwrap();
        texts
    });
    assert_eq!(texts.len(), 2, "a second time, too");
    for text in texts {
        assert!(text.contains("cannot give tensor") && text.contains("the loader's limit of 12582912"), "{text}");
        assert!(text.contains("raise the limit, or ask for tensors in the order"), "{text}");
    }
}

/// candle owns what it was given, so no order of a model's makes the load wait.
#[test]
fn weights_of_any_order_fit_a_limit() {
    let folder = folder();
    let path = file(folder.path(), "model.safetensors", &safetensors_of(12, 1_000_000, 1));
    let quantized = many(folder.path());
    in_time("the last tensor first", move || {
        let loader = limited();
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
