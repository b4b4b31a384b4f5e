//! Replaces mistral.rs's function for loading weights with one that uses dmaload.
//!
//! mistral.rs (in `utils/varbuilder_utils.rs`) starts a thread for each file, copies every tensor
//! out of a mapping, and waits in a loop until all threads have exited. The function in this
//! example has the same signature, but returns once the headers are read. The tensors then arrive
//! while mistral.rs builds its model.
//!
//! This example replaces types that belong to mistral.rs, not to candle: it uses `VarBuilder`
//! where mistral.rs uses `ShardedVarBuilder`, which `ShardedSafeTensors::wrap` creates from the
//! same backend.
//!
//! `cargo run --example mistralrs_loader -- FILE…` loads all tensors of these files.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use dmaload::{Format, Loader, inspect_blocking};
use dmaload_candle::Weights;
use regex::Regex;

type ShardedVarBuilder = VarBuilder<'static>;

/// The device on which mistral.rs wants a tensor. This example ignores it, because mistral.rs
/// passes the device again when it requests the tensor, which is then moved there.
enum DeviceForLoadTensor {
    Base,
    #[allow(dead_code, reason = "mistral.rs has it for models on several devices")]
    Idx(usize),
}

#[allow(clippy::too_many_arguments, reason = "the signature is that of mistral.rs")]
fn from_mmaped_safetensors(
    paths: Vec<PathBuf>,
    xlora_paths: Vec<PathBuf>,
    dtype: Option<DType>,
    base_device: &Device,
    _layer_devices: Vec<Option<Device>>,
    _silent: bool,
    make_dummy_regexes: Option<Arc<Vec<Regex>>>,
    predicate: impl Fn(String) -> bool + Send + Sync + Clone + 'static,
    _get_device_for_tensor: Arc<dyn Fn(String) -> DeviceForLoadTensor + Send + Sync + 'static>,
) -> Result<ShardedVarBuilder> {
    let dtype = dtype.unwrap_or(DType::F16);
    let mut renamed = Renamed::default();
    let adapters = xlora_paths.into_iter().zip(1..).map(|(path, number)| (path, Some(number)));
    for (path, adapter) in paths.into_iter().map(|path| (path, None)).chain(adapters) {
        let inspected = inspect_blocking(&path, Format::Auto).map_err(Error::wrap)?;
        let is_dummy = |name: &str| make_dummy_regexes.iter().any(|regexes| regexes.iter().any(|regex| regex.is_match(name)));
        let wanted = inspected.tensors.iter().flatten().map(|tensor| &tensor.name);
        let wanted = wanted.filter(|name| predicate((*name).clone()) && !is_dummy(name));
        let names: Vec<(String, String)> = wanted.filter_map(|name| Some((key(name, adapter)?, name.clone()))).collect();
        if !names.is_empty() {
            renamed.add(path, names, dtype, base_device)?;
        }
    }
    Ok(VarBuilder::from_backend(Box::new(renamed), dtype, base_device.clone()))
}

/// Returns the name by which mistral.rs requests a tensor, or `None` for a tensor that it does not
/// use.
fn key(name: &str, adapter: Option<usize>) -> Option<String> {
    let mut key = name.replace("base_model.model.model", "model");
    if let Some(number) = adapter {
        if name.contains("internal_xlora_classifier") {
            return None;
        }
        // With the first adapter, `.lora_A` becomes `.lora_A.1`.
        let after = key.find(".lora")? + ".lora_A".len();
        key.insert_str(after, &format!(".{number}"));
    }
    Some(key)
}

/// Returns the process's only loader, so that all models share its memory limit, threads and
/// queue.
fn loader() -> Result<&'static Loader> {
    static LOADER: OnceLock<dmaload::Result<Loader>> = OnceLock::new();
    LOADER.get_or_init(Loader::new).as_ref().map_err(|error| Error::wrap(error.clone()))
}

/// Tensors from several loads, under the names by which mistral.rs requests them.
#[derive(Default)]
struct Renamed {
    loads: Vec<Weights>,
    /// The index of each tensor's load, and the tensor's name in the file.
    tensors: HashMap<String, (usize, String)>,
}

impl Renamed {
    /// Starts to load these tensors, and no others, from a file.
    fn add(&mut self, path: PathBuf, names: Vec<(String, String)>, dtype: DType, device: &Device) -> Result<()> {
        let loader = loader()?;
        let options = loader.load_options().tensor_names(names.iter().map(|(_, name)| name));
        let weights = Weights::load_with(loader, [path], options, dtype, device).map_err(Error::wrap)?;
        let number = self.loads.len();
        self.loads.push(weights);
        self.tensors.extend(names.into_iter().map(|(key, name)| (key, (number, name))));
        Ok(())
    }

    fn find(&self, key: &str) -> Result<(&Weights, &str)> {
        let (number, name) = self.tensors.get(key).ok_or_else(|| Error::CannotFindTensor { path: key.to_owned() }.bt())?;
        Ok((&self.loads[*number], name))
    }
}

impl SimpleBackend for Renamed {
    fn get(&self, shape: Shape, key: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let (weights, name) = self.find(key)?;
        weights.get(shape, name, init, dtype, device)
    }

    fn get_unchecked(&self, key: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let (weights, name) = self.find(key)?;
        weights.get_unchecked(name, dtype, device)
    }

    fn contains_tensor(&self, key: &str) -> bool {
        self.tensors.contains_key(key)
    }
}

fn main() -> Result<()> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let headers = paths.iter().map(|path| inspect_blocking(path, Format::Auto));
    let headers = headers.collect::<dmaload::Result<Vec<_>>>().map_err(Error::wrap)?;
    let base = Arc::new(|_| DeviceForLoadTensor::Base);
    let vb = from_mmaped_safetensors(paths, Vec::new(), Some(DType::F32), &Device::Cpu, Vec::new(), true, None, |_| true, base)?;
    for tensor in headers.iter().flat_map(|header| header.tensors.iter().flatten()) {
        let key = key(&tensor.name, None).expect("only an adapter's tensors can be skipped");
        vb.get(&*tensor.shape, &key)?;
    }
    println!("{} tensors", headers.iter().flat_map(|header| &header.tensors).map(|map| map.len()).sum::<usize>());
    Ok(())
}
