//! Compares weights and quantized tensors from a load with those from candle's own loaders.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use candle_transformers::models::quantized_llama::ModelWeights;
use candle_transformers::quantized_var_builder;
use dmaload::{ErrorKind, Format, LoadOptions, Loader, Observer, Rejection, Shard};
use dmaload_candle::{GgufReader, QTensors, Weights};
use dmaload_testing::{file, random_bytes, safetensors};

const PATIENCE: Duration = Duration::from_secs(30);
const SEGMENT: usize = 2 << 20;
const CPU: Device = Device::Cpu;

/// Creates a folder on a disk, not on tmpfs.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Writes a safetensors file. For each tensor, takes the name, the type, the shape, and the number
/// of bits in an element.
fn write_model(folder: &Path, name: &str, tensors: &[(&str, &str, &[usize], usize)], seed: u64) -> PathBuf {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for ((name, dtype, shape, bits), seed) in tensors.iter().zip(seed..) {
        let bytes = shape.iter().product::<usize>() * bits / 8;
        let (start, end) = (data.len(), data.len() + bytes);
        entries.push(format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#));
        data.extend(random_bytes(bytes, seed));
    }
    file(folder, name, &safetensors(format!("{{{}}}", entries.join(",")).as_bytes(), &data))
}

/// Writes an F32 model of a few MiB, which is larger than a segment.
fn write_layers(folder: &Path) -> PathBuf {
    let names = ["a", "b", "c", "d", "e", "f"];
    let tensors = names.map(|name| (name, "F32", &[500usize, 600][..], 32));
    write_model(folder, "layers.safetensors", &tensors, 1)
}

/// Returns the type, shape and bytes of a tensor.
fn bits(tensor: &Tensor) -> (DType, Vec<usize>, Vec<u8>) {
    let flat = tensor.flatten_all().unwrap();
    let bytes = |values: Vec<Vec<u8>>| values.concat();
    macro_rules! of {
        ($type:ty) => {
            bytes(flat.to_vec1::<$type>().unwrap().iter().map(|value| value.to_le_bytes().to_vec()).collect())
        };
    }
    let values = match tensor.dtype() {
        DType::U8 => of!(u8),
        DType::U32 => of!(u32),
        DType::I16 => of!(i16),
        DType::I32 => of!(i32),
        DType::I64 => of!(i64),
        DType::BF16 => of!(half::bf16),
        DType::F16 => of!(half::f16),
        DType::F32 => of!(f32),
        DType::F64 => of!(f64),
        // F8 is compared by its values, each of which has only one bit pattern.
        DType::F8E4M3 => return bits(&tensor.to_dtype(DType::F32).unwrap()),
        other => panic!("candle cannot return {other:?} values on the CPU"),
    };
    (tensor.dtype(), tensor.dims().to_vec(), values)
}

/// Loads the tensors in a file with candle's own loader.
fn load_by_candle(path: &Path, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_buffered_safetensors(std::fs::read(path).unwrap(), dtype, &CPU).unwrap()
}

/// Returns the first line of an error's text. A backtrace may follow that line.
fn first_line(error: candle_core::Error) -> String {
    error.to_string().lines().next().unwrap().to_owned()
}

fn loader() -> Loader {
    let options = LoadOptions::new().segment_bytes(SEGMENT as u64);
    Loader::builder().load_options(options).build().unwrap()
}

/// An observer that holds back the bytes of a load from a given offset on, until [`Gate::open`].
#[derive(Debug)]
struct Gate {
    offset: u64,
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn new(offset: u64) -> Arc<Self> {
        Arc::new(Gate { offset, is_open: Mutex::new(false), opened: Condvar::new() })
    }

    fn open(&self) {
        *self.is_open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl Observer for Gate {
    fn bytes(&self, _file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        if offset + bytes.len() as u64 > self.offset {
            let _open = self.opened.wait_while(self.is_open.lock().unwrap(), |is_open| !*is_open).unwrap();
        }
        Ok(())
    }
}

/// Runs a closure on another thread. Panics if the closure takes longer than [`PATIENCE`].
fn in_time<T: Send + 'static>(what: &str, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(run()));
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{what}: {error}"))
}

#[test]
fn every_type_equals_that_of_candles_loader() {
    let folder = folder();
    let types = [
        ("u8", "U8", &[3, 5][..], 8),
        ("u16", "U16", &[7], 16),
        ("u32", "U32", &[2, 2, 2], 32),
        ("i16", "I16", &[9], 16),
        ("i32", "I32", &[4], 32),
        ("i64", "I64", &[6], 64),
        ("f8", "F8_E4M3", &[16, 16], 8),
        ("bf16", "BF16", &[5, 3], 16),
        ("f16", "F16", &[128, 3], 16),
        ("f32", "F32", &[1000], 32),
        ("f64", "F64", &[2, 3], 64),
        ("scalar", "F32", &[], 32),
        ("empty", "F32", &[0, 4], 32),
    ];
    // Tensors of odd lengths leave most later tensors misaligned for their type.
    let path = write_model(folder.path(), "types.safetensors", &types, 7);
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        let weights = Weights::load(&loader(), &path, dtype, &CPU).unwrap();
        let (ours, theirs) = (weights.var_builder(), load_by_candle(&path, dtype));
        // candle 0.11 recurses endlessly when it converts F8 to F64.
        for (name, _, shape, _) in types.into_iter().filter(|&(name, ..)| (name, dtype) != ("f8", DType::F64)) {
            // Conversions keep NaNs, but the bits of a NaN depend on the processor.
            let raw = |weights: &VarBuilder<'_>, as_type| bits(&weights.get_unchecked_dtype(name, as_type).unwrap());
            let is_float = name.starts_with('f') || name.starts_with("bf") || name == "scalar";
            let finite = |(dtype, shape, bytes): (DType, Vec<usize>, Vec<u8>)| {
                let tensor = Tensor::from_raw_buffer(&bytes, dtype, &shape, &CPU).unwrap().to_dtype(DType::F64).unwrap();
                let values: Vec<f64> = tensor.flatten_all().unwrap().to_vec1().unwrap();
                values.iter().map(|value| if value.is_nan() { u64::MAX } else { value.to_bits() }).collect::<Vec<_>>()
            };
            let (one, other) = (raw(&ours, dtype), raw(&theirs, dtype));
            assert_eq!((one.0, &one.1), (other.0, &other.1), "{name} as {dtype:?}");
            assert_eq!(one.1, shape, "{name}");
            match is_float {
                true => assert_eq!(finite(one), finite(other), "{name} as {dtype:?}"),
                false => assert_eq!(one, other, "{name} as {dtype:?}"),
            }
        }
        drop(ours);
        let report = weights.finish().unwrap();
        assert_eq!(report.bytes, std::fs::metadata(&path).unwrap().len());
    }
}

#[test]
fn tensor_requested_twice_is_the_same_memory() {
    let folder = folder();
    let path = write_layers(folder.path());
    let weights = Weights::load(&loader(), &path, DType::F32, &CPU).unwrap();
    let address = |tensor: &Tensor| {
        let (storage, _) = tensor.storage_and_layout();
        match &*storage {
            candle_core::Storage::Cpu(storage) => storage.as_slice::<f32>().unwrap().as_ptr().addr(),
            _ => panic!("the tensor is not on the CPU"),
        }
    };
    let get = || weights.var_builder().get((500, 600), "c").unwrap();
    assert_eq!(address(&get()), address(&get()));
}

#[test]
fn tensors_arrive_while_the_rest_is_read() {
    let folder = folder();
    let path = write_layers(folder.path());
    let loader = loader();
    let gate = Gate::new(3 * SEGMENT as u64 / 2);
    let options = loader.load_options().observer(gate.clone());
    let weights = Weights::load_with(&loader, [&path], options, DType::F32, &CPU).unwrap();
    let vb = weights.var_builder();
    // Requests for tensors that have arrived, and for unknown names, do not wait for the rest.
    let early = in_time("the first tensor", {
        let vb = vb.clone();
        move || {
            assert!(vb.contains_tensor("f") && !vb.contains_tensor("g"));
            let missing = first_line(vb.get((1, 1), "g").unwrap_err());
            assert_eq!(missing, "cannot find tensor g");
            vb.get((500, 600), "a").unwrap()
        }
    });
    assert_eq!(bits(&early), bits(&load_by_candle(&path, DType::F32).get((500, 600), "a").unwrap()));
    // A request for a tensor that is held back blocks the caller.
    let (sender, receiver) = mpsc::channel();
    let waiting = thread::spawn({
        let vb = vb.clone();
        move || {
            let last = vb.get((500, 600), "f").unwrap();
            sender.send(()).unwrap();
            last
        }
    });
    assert!(receiver.recv_timeout(Duration::from_millis(200)).is_err(), "the gate must hold back the tensor's bytes");
    gate.open();
    receiver.recv_timeout(PATIENCE).unwrap();
    let last = waiting.join().unwrap();
    assert_eq!(bits(&last), bits(&load_by_candle(&path, DType::F32).get((500, 600), "f").unwrap()));
}

#[test]
fn errors_name_the_requested_tensor() {
    let folder = folder();
    let types = [("mask", "BOOL", &[8][..], 8), ("w", "F32", &[2, 3], 32)];
    let path = write_model(folder.path(), "mask.safetensors", &types, 3);
    let weights = Weights::load(&loader(), &path, DType::F32, &CPU).unwrap();
    let vb = weights.var_builder();
    assert_eq!(vb.get((2, 3), "w").unwrap().dims(), [2, 3]);
    let wrong = first_line(vb.get((3, 2), "w").unwrap_err());
    assert_eq!(wrong, "shape mismatch for w, expected: [3, 2], got: [2, 3]");
    let wrong = first_line(vb.get(8, "mask").unwrap_err());
    assert_eq!(wrong, r#"cannot load tensor "mask": candle has no type BOOL"#);
    // A request for a tensor that the options leave out fails without waiting for the load.
    let loader = loader();
    let options = loader.load_options().tensors(["w"]);
    let some = Weights::load_with(&loader, [&path], options, DType::F32, &CPU).unwrap();
    assert!(!some.contains_tensor("mask") && some.var_builder().get((2, 3), "w").is_ok());
    assert_eq!(first_line(some.var_builder().get(8, "mask").unwrap_err()), "cannot find tensor mask");
}

/// Writes two of a model's three files, and an index that lists all three.
fn write_unfinished_download(folder: &Path) -> PathBuf {
    let mut map = HashMap::new();
    for part in 0..3 {
        let (name, tensor) = (format!("model-{part:05}-of-00003.safetensors"), format!("{part}.w"));
        if part < 2 {
            write_model(folder, &name, &[(&*tensor, "F32", &[700, 300], 32)], part);
        }
        map.insert(tensor, name);
    }
    let index = serde_json::json!({ "weight_map": map });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    folder.to_owned()
}

#[test]
fn headers_follow_the_load_options() {
    let folder = folder();
    let path = write_unfinished_download(folder.path());
    let loader = loader();
    let load = |options| Weights::load_with(&loader, [&path], options, DType::F32, &CPU);
    assert_eq!(load(loader.load_options()).unwrap_err().kind(), ErrorKind::Incomplete);
    for (options, expected) in
        [(loader.load_options().allow_missing(true), vec!["0.w", "1.w"]), (loader.load_options().tensors(["1.*"]), vec!["1.w"])]
    {
        let weights = load(options).unwrap();
        let mut names: Vec<_> = weights.names().collect();
        names.sort_unstable();
        assert_eq!(names, expected);
        weights.var_builder().get((700, 300), "1.w").unwrap();
    }
    // The options specify a format that does not match the name of this file.
    let quantized = write_quantized(folder.path(), &[GgmlDType::Q4_0]);
    let options = loader.load_options().format(Format::Safetensors);
    let refused = QTensors::load_with(&loader, &quantized, options, &CPU).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidModel);
}

#[test]
fn failed_load_fails_waiting_callers() {
    let folder = folder();
    let path = write_layers(folder.path());
    let loader = loader();
    let gate = Gate::new(3 * SEGMENT as u64 / 2);
    let options = loader.load_options().observer(gate.clone());
    let weights = Weights::load_with(&loader, [&path], options, DType::F32, &CPU).unwrap();
    let vb = weights.var_builder();
    vb.get((500, 600), "a").unwrap();
    // Appends to the file, like a process that rewrites it.
    let longer = [std::fs::read(&path).unwrap(), vec![1; 4096]].concat();
    std::fs::write(&path, longer).unwrap();
    gate.open();
    let failed = in_time("the failure", move || vb.get((500, 600), "f").unwrap_err().to_string());
    assert!(failed.starts_with(r#"cannot load tensor "f": "#) && failed.contains("layers.safetensors"), "{failed}");
    assert_eq!(weights.finish().unwrap_err().kind(), ErrorKind::Changed);
    // If the file cannot be opened, the call itself fails.
    let missing = Weights::load(&loader, folder.path().join("none"), DType::F32, &CPU).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

#[test]
fn dropped_weights_cancel_the_load_and_free_its_memory() {
    let folder = folder();
    let path = write_layers(folder.path());
    let loader = loader();
    let gate = Gate::new(3 * SEGMENT as u64 / 2);
    let options = loader.load_options().observer(gate.clone());
    let weights = Weights::load_with(&loader, [&path], options, DType::F32, &CPU).unwrap();
    let vb = weights.var_builder();
    vb.get((500, 600), "a").unwrap();
    drop(weights);
    thread::sleep(Duration::from_millis(50));
    assert_eq!(loader.metrics().loads_dropped, 0, "the VarBuilder must keep the load alive");
    drop(vb);
    let wait_until = |is_reached: &dyn Fn() -> bool| {
        let begin = Instant::now();
        while !is_reached() {
            assert!(begin.elapsed() < PATIENCE, "{:?}", loader.metrics());
            thread::sleep(Duration::from_millis(5));
        }
    };
    // The rest is held back until the gate opens, so the load cannot finish first.
    wait_until(&|| loader.metrics().loads_dropped == 1);
    gate.open();
    wait_until(&|| loader.memory_bytes() == 0);
}

#[test]
fn files_form_one_model_and_duplicate_names_are_refused() {
    let folder = folder();
    let parts: Vec<PathBuf> = (0..3)
        .map(|part| {
            let names = [format!("{part}.a"), format!("{part}.b")];
            let tensors = [(&*names[0], "F32", &[700, 300][..], 32), (&*names[1], "F32", &[10], 32)];
            write_model(folder.path(), &format!("model-{:05}-of-00003.safetensors", part + 1), &tensors, part)
        })
        .collect();
    let map: HashMap<String, String> = (0..3)
        .flat_map(|part| ["a", "b"].map(|name| (format!("{part}.{name}"), format!("model-{:05}-of-00003.safetensors", part + 1))))
        .collect();
    let index = serde_json::json!({ "weight_map": map });
    std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let loader = loader();
    let by_folder = Weights::load(&loader, folder.path(), DType::F32, &CPU).unwrap();
    let by_files = Weights::load_with(&loader, &parts, loader.load_options(), DType::F32, &CPU).unwrap();
    for (part, path) in parts.iter().enumerate() {
        for (name, shape) in [("a", vec![700, 300]), ("b", vec![10])] {
            let name = format!("{part}.{name}");
            let expected = bits(&load_by_candle(path, DType::F32).get(&*shape, &name).unwrap());
            for weights in [&by_folder, &by_files] {
                assert_eq!(bits(&weights.var_builder().get(&*shape, &name).unwrap()), expected, "{name}");
            }
        }
    }
    let twice = [&parts[0], &write_model(folder.path(), "lora.safetensors", &[("0.a", "F32", &[1], 32)], 9)];
    let refused = Weights::load_with(&loader, twice, loader.load_options(), DType::F32, &CPU).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Ambiguous);
}

#[test]
fn rank_gets_its_shard_along_any_dimension() {
    let folder = folder();
    let path = write_layers(folder.path());
    let loader = loader();
    let all = load_by_candle(&path, DType::F32).get((500, 600), "d").unwrap();
    for (dim, expected) in [(0, all.narrow(0, 250, 250).unwrap()), (1, all.narrow(1, 300, 300).unwrap())] {
        let shard = Shard { rank: 1, world_size: 2, dim: Some(dim) };
        let options = loader.load_options().shard(shard);
        let weights = Weights::load_with(&loader, [&path], options, DType::F32, &CPU).unwrap();
        let part = weights.var_builder().get_unchecked("d").unwrap();
        assert_eq!(bits(&part), bits(&expected.contiguous().unwrap()), "along {dim}");
    }
}

/// Uses candle to write a GGUF file with a tensor for each type in `types`, named after the type.
fn write_quantized(folder: &Path, types: &[GgmlDType]) -> PathBuf {
    let source = Tensor::from_raw_buffer(&random_bytes(512 * 1024, 5), DType::U32, &[256, 512], &CPU).unwrap();
    let source = (source.to_dtype(DType::F32).unwrap() / f64::from(u32::MAX)).unwrap();
    let tensors: Vec<(String, QTensor)> =
        types.iter().map(|&dtype| (format!("{dtype:?}"), QTensor::quantize(&source, dtype).unwrap())).collect();
    let named: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (&**name, tensor)).collect();
    let mut bytes = Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &[("general.name", &Value::String("test".to_owned()))], &named).unwrap();
    file(folder, "quantized.gguf", bytes.get_ref())
}

const BLOCKS: [GgmlDType; 13] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

#[test]
fn quantized_tensors_equal_those_of_candles_reader() {
    let folder = folder();
    let path = write_quantized(folder.path(), &BLOCKS);
    let loader = loader();
    let tensors = QTensors::load(&loader, &path, &CPU).unwrap();
    let mut reader = GgufReader::open(&loader, &path, loader.load_options()).unwrap();
    let mut file = File::open(&path).unwrap();
    let content = Content::read(&mut file).unwrap();
    let through = Content::read(&mut reader).unwrap();
    assert_eq!(content.tensor_data_offset, through.tensor_data_offset);
    assert_eq!(tensors.names().count(), BLOCKS.len());
    for dtype in BLOCKS {
        let name = format!("{dtype:?}");
        let expected = content.tensor(&mut file, &name, &CPU).unwrap();
        // The reader serves the second read from the file.
        let read = [(), ()].map(|()| through.tensor(&mut reader, &name, &CPU).unwrap());
        let by_name = tensors.get(&name).unwrap();
        for tensor in read.iter().chain([&*by_name]) {
            assert_eq!((tensor.dtype(), tensor.shape()), (dtype, expected.shape()), "{name}");
            assert!(tensor.data().unwrap() == expected.data().unwrap(), "{name} has different bytes");
        }
    }
    assert_eq!(first_line(tensors.get("none").unwrap_err()), "cannot find tensor none");
    tensors.finish().unwrap();
    reader.finish().unwrap();
}

#[test]
fn candles_quantized_var_builder_accepts_an_image() {
    let folder = folder();
    let path = write_quantized(folder.path(), &[GgmlDType::Q4_0, GgmlDType::Q6K]);
    let load = loader().load(&path).start();
    let mut load = pin!(load.finish());
    let image = loop {
        match load.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(image) => break image.unwrap(),
            Poll::Pending => thread::sleep(Duration::from_millis(1)),
        }
    };
    let ours = quantized_var_builder::VarBuilder::from_gguf_buffer(&image.files()[0].bytes().unwrap(), &CPU).unwrap();
    drop(image);
    let theirs = quantized_var_builder::VarBuilder::from_gguf(&path, &CPU).unwrap();
    for name in ["Q4_0", "Q6K"] {
        let [one, other] = [&ours, &theirs].map(|vb| vb.get((256, 512), name).unwrap());
        assert!(one.data().unwrap() == other.data().unwrap(), "{name} has different bytes");
    }
}

#[test]
fn reader_returns_every_byte_in_any_order() {
    let folder = folder();
    let path = write_quantized(folder.path(), &[GgmlDType::Q4_0, GgmlDType::F32]);
    let expected = std::fs::read(&path).unwrap();
    let loader = loader();
    let mut reader = GgufReader::open(&loader, &path, loader.load_options()).unwrap();
    let mut all = Vec::new();
    // Read the file from start to end twice, then backward, then beyond its end.
    for _ in 0..2 {
        all.clear();
        reader.rewind().unwrap();
        reader.read_to_end(&mut all).unwrap();
        assert!(all == expected, "the bytes differ from the file's");
    }
    for start in (0..expected.len()).rev().step_by(77_777) {
        let mut some = vec![0; 1000.min(expected.len() - start)];
        reader.seek(SeekFrom::Start(start as u64)).unwrap();
        reader.read_exact(&mut some).unwrap();
        assert!(some == expected[start..start + some.len()], "at {start}");
    }
    assert_eq!(reader.seek(SeekFrom::End(7)).unwrap(), expected.len() as u64 + 7);
    assert_eq!(reader.read(&mut [0; 9]).unwrap(), 0);
    assert!(reader.seek(SeekFrom::Current(i64::MIN)).is_err());
    // Tensors that were already read are read again from the file. This fails if it has changed.
    std::fs::write(&path, [&expected[..], &[0]].concat()).unwrap();
    reader.seek(SeekFrom::End(-9)).unwrap();
    let changed = reader.read(&mut [0; 9]).unwrap_err().to_string();
    assert!(changed.contains("it has changed since it was opened"), "{changed}");
}

/// Writes a Llama model with two small layers in Q4_0.
fn write_llama(folder: &Path) -> PathBuf {
    let (embedding, heads, feed, vocabulary) = (64_usize, 4_u32, 128, 96);
    let norm = |name: String| (name, vec![embedding], GgmlDType::F32);
    let matrix = |name: String, rows: usize, columns: usize| (name, vec![rows, columns], GgmlDType::Q4_0);
    let mut tensors = vec![matrix("token_embd.weight".to_owned(), vocabulary, embedding)];
    for layer in 0..2 {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        tensors.extend(["attn_q", "attn_k", "attn_v", "attn_output"].map(|part| matrix(name(part), embedding, embedding)));
        tensors.extend([matrix(name("ffn_gate"), feed, embedding), matrix(name("ffn_up"), feed, embedding)]);
        tensors.push(matrix(name("ffn_down"), embedding, feed));
        tensors.extend(["attn_norm", "ffn_norm"].map(|part| norm(name(part))));
    }
    tensors.push(norm("output_norm.weight".to_owned()));
    let tensors: Vec<(String, QTensor)> = tensors
        .into_iter()
        .zip(0..)
        .map(|((name, shape, dtype), seed)| {
            let bytes = random_bytes(shape.iter().product::<usize>() * 4, seed);
            let values = Tensor::from_raw_buffer(&bytes, DType::U32, &shape, &CPU).unwrap().to_dtype(DType::F32).unwrap();
            let values = ((values / f64::from(u32::MAX)).unwrap() - 0.5).unwrap();
            (name, QTensor::quantize(&values, dtype).unwrap())
        })
        .collect();
    let metadata = [
        ("general.architecture", Value::String("llama".to_owned())),
        ("llama.attention.head_count", Value::U32(heads)),
        ("llama.attention.head_count_kv", Value::U32(heads)),
        ("llama.block_count", Value::U32(2)),
        ("llama.embedding_length", Value::U32(u32::try_from(embedding).unwrap())),
        ("llama.rope.dimension_count", Value::U32(u32::try_from(embedding).unwrap() / heads)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let named: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (&**name, tensor)).collect();
    let mut bytes = Cursor::new(Vec::new());
    gguf_file::write(&mut bytes, &metadata, &named).unwrap();
    file(folder, "llama.gguf", bytes.get_ref())
}

#[test]
fn quantized_llama_from_the_reader_has_the_same_logits() {
    let folder = folder();
    let path = write_llama(folder.path());
    let loader = loader();
    let options = loader.load_options().tensors(["token_embd.*", "output*", "*"]);
    let mut reader = GgufReader::open(&loader, &path, options).unwrap();
    let mut file = File::open(&path).unwrap();
    let content = Content::read(&mut reader).unwrap();
    let mut ours = ModelWeights::from_gguf(content, &mut reader, &CPU).unwrap();
    let mut theirs = ModelWeights::from_gguf(Content::read(&mut file).unwrap(), &mut file, &CPU).unwrap();
    reader.finish().unwrap();
    let tokens = Tensor::new(&[[3_u32, 1, 4, 1, 5, 9, 2, 6]], &CPU).unwrap();
    let logits = |model: &mut ModelWeights| bits(&model.forward(&tokens, 0).unwrap());
    let (ours, theirs) = (logits(&mut ours), logits(&mut theirs));
    assert_eq!(ours, theirs);
    assert!(ours.2.iter().any(|&byte| byte != 0), "all logits are zero");
}

/// The reader's offsets refer to the whole file, so a shard would shift all following bytes.
#[test]
fn reader_refuses_a_ranks_shard() {
    let folder = folder();
    let path = write_quantized(folder.path(), &[GgmlDType::F32]);
    let options = LoadOptions::new().shard(Shard { rank: 1, world_size: 2, dim: Some(0) });
    let mut reader = GgufReader::open(&loader(), &path, options).unwrap();
    let content = Content::read(&mut reader).unwrap();
    let name = content.tensor_infos.keys().next().unwrap().clone();
    let error = content.tensor(&mut reader, &name, &CPU).unwrap_err().to_string();
    assert!(error.contains("were loaded, not all of"), "{error}");
}
