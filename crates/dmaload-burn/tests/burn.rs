//! Compares modules that are filled from a load with modules that burn's own safetensors store
//! fills.
#![allow(clippy::unwrap_used, reason = "a setup error should fail the test")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use burn_core as burn;
use burn_core::module::{Module, Param};
use burn_ndarray::{NdArray, NdArrayDevice, NdArrayTensor};
use burn_nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn_store::{ModuleSnapshot, ModuleStore, PyTorchToBurnAdapter, SafetensorsStore};
use burn_tensor::Tensor;
use burn_tensor::backend::Backend;
use dmaload::{ErrorKind, Format, LoadOptions, Loader, Observer, Rejection, Shard};
use dmaload_burn::{Error, LoadStore};
use dmaload_testing::{file, random_bytes, safetensors};

type Cpu = NdArray<f32>;

const PATIENCE: Duration = Duration::from_secs(30);
const SEGMENT: u64 = 2 << 20;
const DEVICE: NdArrayDevice = NdArrayDevice::Cpu;

#[derive(Module, Debug)]
struct Model<B: Backend> {
    embedding: Embedding<B>,
    layers: Vec<Linear<B>>,
    norm: LayerNorm<B>,
}

impl<B: Backend> Model<B> {
    fn new(device: &B::Device) -> Self {
        let layer = || LinearConfig::new(600, 600).init(device);
        Model {
            embedding: EmbeddingConfig::new(1000, 600).init(device),
            layers: vec![layer(), layer(), layer()],
            norm: LayerNormConfig::new(600).init(device),
        }
    }

    fn forward(&self, tokens: Tensor<B, 2, burn_tensor::Int>) -> Tensor<B, 3> {
        let embedded = self.embedding.forward(tokens);
        self.norm.forward(self.layers.iter().fold(embedded, |values, layer| layer.forward(values)))
    }
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn loader() -> Loader {
    Loader::builder().load_options(LoadOptions::new().segment_bytes(SEGMENT)).build().unwrap()
}

/// Saves a model with random weights, using burn.
fn save_model(folder: &Path) -> PathBuf {
    let path = folder.join("model.safetensors");
    Model::<Cpu>::new(&DEVICE).save_into(&mut SafetensorsStore::from_file(&path)).unwrap();
    // `file` evicts what it writes from the page cache.
    file(folder, "model.safetensors", &std::fs::read(&path).unwrap())
}

fn outputs(model: &Model<Cpu>) -> Vec<u32> {
    let tokens = Tensor::from_ints([[3, 1, 4, 1, 5, 9, 2, 6]], &DEVICE);
    let values = model.forward(tokens).into_data().to_vec::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// Returns the address of a parameter's data.
fn address<const D: usize>(parameter: &Param<Tensor<Cpu, D>>) -> usize {
    match parameter.val().into_primitive().tensor() {
        NdArrayTensor::F32(storage) => storage.view().as_ptr().addr(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn module_equals_that_of_burns_own_store() {
    let folder = folder();
    let path = save_model(folder.path());
    let mut theirs = Model::<Cpu>::new(&DEVICE);
    theirs.load_from(&mut SafetensorsStore::from_file(&path)).unwrap();
    for from_pytorch in [false, true] {
        let mut ours = Model::<Cpu>::new(&DEVICE);
        assert_ne!(outputs(&ours), outputs(&theirs), "the models must start with different weights");
        let mut store = LoadStore::load(&loader(), &path).unwrap();
        if from_pytorch {
            // In PyTorch's layout, linear layers are transposed, and norms have different names.
            store = store.with_adapter(PyTorchToBurnAdapter).allow_partial(true);
            let mut own = SafetensorsStore::from_file(&path).with_from_adapter(PyTorchToBurnAdapter).allow_partial(true);
            theirs.load_from(&mut own).unwrap();
        }
        let result = ours.load_from(&mut store).unwrap();
        assert!(!result.applied.is_empty(), "{result}");
        if !from_pytorch {
            assert!(result.missing.is_empty() && result.unused.is_empty(), "{result}");
        }
        let report = store.finish().unwrap();
        assert_eq!(report.bytes, std::fs::metadata(&path).unwrap().len());
        let (one, other) = (ours.layers[0].weight.val().into_data(), theirs.layers[0].weight.val().into_data());
        assert_eq!(one, other);
        if !from_pytorch {
            assert_eq!(outputs(&ours), outputs(&theirs));
        }
    }
}

#[test]
fn parameters_are_the_loaded_memory_and_keep_it_alive() {
    let folder = folder();
    let path = save_model(folder.path());
    let loader = loader();
    let mut store = LoadStore::load(&loader, &path).unwrap();
    let snapshot = store.get_snapshot("layers.1.weight").unwrap().unwrap().clone();
    let loaded = snapshot.to_data().unwrap().bytes.as_ptr().addr();
    drop(snapshot);
    let mut model = Model::<Cpu>::new(&DEVICE);
    model.load_from(&mut store).unwrap();
    store.finish().unwrap();
    assert_eq!(address(&model.layers[1].weight), loaded, "the parameter was copied");
    assert!(loader.memory_bytes() > 0);
    // Changing a tensor copies it first, so the loaded memory stays unchanged.
    let before = outputs(&model);
    let changed = model.layers[1].weight.val().add_scalar(1.0);
    assert_ne!(changed.into_primitive().tensor().into_address(), loaded);
    assert_eq!(outputs(&model), before);
    drop(model);
    let mut waited = Duration::ZERO;
    while loader.memory_bytes() > 0 {
        assert!(waited < PATIENCE, "the loader still holds {} bytes", loader.memory_bytes());
        thread::sleep(Duration::from_millis(5));
        waited += Duration::from_millis(5);
    }
}

trait IntoAddress {
    fn into_address(self) -> usize;
}

impl IntoAddress for NdArrayTensor {
    fn into_address(self) -> usize {
        match self {
            NdArrayTensor::F32(storage) => storage.view().as_ptr().addr(),
            other => panic!("{other:?}"),
        }
    }
}

/// An observer that holds back the bytes of a load from a given offset on, until `is_open` is set.
#[derive(Debug)]
struct Gate {
    offset: u64,
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Observer for Gate {
    fn bytes(&self, _file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        if offset + bytes.len() as u64 > self.offset {
            let _open = self.opened.wait_while(self.is_open.lock().unwrap(), |is_open| !*is_open).unwrap();
        }
        Ok(())
    }
}

/// Writes a file with two tensors, `a` and `b`, of which `a` comes first.
fn write_two_tensors(folder: &Path) -> PathBuf {
    let bytes = 3 << 20;
    let header = format!(
        r#"{{"a":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{bytes}]}},"b":{{"dtype":"F32","shape":[{}],"data_offsets":[{bytes},{}]}}}}"#,
        bytes / 4,
        bytes / 4,
        2 * bytes
    );
    file(folder, "two.safetensors", &safetensors(header.as_bytes(), &random_bytes(2 * bytes, 1)))
}

#[test]
fn snapshots_return_data_while_the_rest_is_read() {
    let folder = folder();
    let path = write_two_tensors(folder.path());
    let loader = loader();
    let gate = Arc::new(Gate { offset: 2 * SEGMENT, is_open: Mutex::new(false), opened: Condvar::new() });
    let options = loader.load_options().observer(gate.clone());
    // Snapshots cannot be sent to another thread, so only their data is.
    let (sender, receiver) = mpsc::channel();
    let filling = thread::spawn(move || {
        let mut store = LoadStore::load_with(&loader, &path, options).unwrap();
        for name in ["a", "b"] {
            let data = store.get_snapshot(name).unwrap().unwrap().to_data().unwrap();
            sender.send((name, data.bytes.to_vec())).unwrap();
        }
        let kept = store.get_snapshot("a").unwrap().unwrap().clone();
        assert!(matches!(store.finish(), Err(Error::InUse)), "finishing must fail while a snapshot refers to the load");
        drop(kept);
    });
    let expected = std::fs::read(folder.path().join("two.safetensors")).unwrap();
    let data = expected.len() - (6 << 20);
    assert!(receiver.recv_timeout(PATIENCE).unwrap() == ("a", expected[data..data + (3 << 20)].to_vec()));
    assert!(receiver.recv_timeout(Duration::from_millis(200)).is_err(), "the gate must hold back the rest");
    *gate.is_open.lock().unwrap() = true;
    gate.opened.notify_all();
    assert!(receiver.recv_timeout(PATIENCE).unwrap() == ("b", expected[data + (3 << 20)..].to_vec()));
    filling.join().unwrap();
}

#[test]
fn errors_contain_the_message_of_burn_or_the_load() {
    let folder = folder();
    let header = r#"{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}"#;
    let path = file(folder.path(), "f8.safetensors", &safetensors(header.as_bytes(), &[0; 4]));
    let loader = loader();
    let mut store = LoadStore::load(&loader, &path).unwrap();
    assert_eq!(store.keys().unwrap(), ["w"]);
    let unknown = store.get_snapshot("w").unwrap().unwrap().to_data().unwrap_err().to_string();
    assert!(unknown.contains(r#"cannot load tensor "w": burn has no type F8_E4M3"#), "{unknown}");
    let mut model = Model::<Cpu>::new(&DEVICE);
    assert!(matches!(model.load_from(&mut store), Err(Error::Missing(_))));
    assert!(matches!(model.save_into(&mut store), Err(Error::ReadOnly)));
    let missing = LoadStore::load(&loader, folder.path().join("none")).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

#[test]
fn headers_follow_the_load_options() {
    let folder = folder();
    let path = write_two_tensors(folder.path());
    let load = |options| LoadStore::load_with(&loader(), &path, options);
    let mut some = load(LoadOptions::new().tensors(["b"])).unwrap();
    assert_eq!(some.keys().unwrap(), ["b"]);
    assert_eq!(load(LoadOptions::new().format(Format::Gguf)).unwrap_err().kind(), ErrorKind::InvalidModel);
    let index = r#"{"weight_map":{"a":"two.safetensors","b":"two.safetensors","c":"three.safetensors"}}"#;
    let path = folder.path().join("model.safetensors.index.json");
    std::fs::write(&path, index).unwrap();
    let load = |options| LoadStore::load_with(&loader(), &path, options);
    assert_eq!(load(LoadOptions::new()).unwrap_err().kind(), ErrorKind::Incomplete);
    let mut some = load(LoadOptions::new().allow_missing(true)).unwrap();
    assert_eq!(some.keys().unwrap(), ["a", "b"]);
    some.get_snapshot("b").unwrap().unwrap().to_data().unwrap();
}

/// A load that keeps all its segments reserves its memory before it starts, so it fails
/// immediately.
#[test]
fn model_that_exceeds_the_limit_is_an_error() {
    let folder = folder();
    let path = write_two_tensors(folder.path());
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let options = LoadOptions::new().segment_bytes(2 << 20);
        let builder = Loader::builder().memory_limit_bytes(4 << 20).window_bytes(2 << 20);
        let mut store = LoadStore::load(&builder.load_options(options).build().unwrap(), &path).unwrap();
        let refused = store.get_snapshot("b").unwrap().unwrap().to_data().unwrap_err().to_string();
        sender.send((refused, store.finish().unwrap_err().to_string())).unwrap();
    });
    let (refused, failed) = receiver.recv_timeout(PATIENCE).unwrap();
    for text in [refused, failed] {
        assert!(text.contains("more than the loader's limit of 4194304"), "{text}");
    }
}

/// Without a refusal, burn would read as many bytes as the shape in the header implies, even
/// though fewer were loaded.
#[test]
fn ranks_shard_is_refused() {
    let folder = folder();
    let options = LoadOptions::new().shard(Shard { rank: 1, world_size: 2, dim: Some(0) });
    let mut store = LoadStore::load_with(&loader(), write_two_tensors(folder.path()), options).unwrap();
    let refused = store.get_snapshot("a").unwrap().unwrap().to_data().unwrap_err().to_string();
    assert!(refused.contains("was loaded, but the file's header has"), "{refused}");
}

/// The program in docs/adopt.md equals the one in the crate's documentation, which is compiled as
/// a doc test.
#[test]
fn adopt_page_shows_the_crates_example() {
    let documented: String = include_str!("../src/lib.rs")
        .lines()
        .skip_while(|line| *line != "//! ```no_run")
        .skip(1)
        .take_while(|line| *line != "//! ```")
        .map(|line| format!("{}\n", line.strip_prefix("//!").unwrap().strip_prefix(' ').unwrap_or_default()))
        .collect();
    let (_, page) = include_str!("../../../docs/adopt.md").split_once("## A burn program").unwrap();
    let (_, block) = page.split_once("```rust,ignore\n").unwrap();
    let (block, _) = block.split_once("```").unwrap();
    assert_eq!(block, documented);
    assert!(block.contains("LoadStore::load"));
}
