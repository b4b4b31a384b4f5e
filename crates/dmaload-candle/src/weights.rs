//! Provides safetensors through candle's `VarBuilder`.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use dmaload::{LoadOptions, Loader, Report};

use crate::arrivals::{Arrivals, Missing};
use crate::headers::{self, Named};

/// Provides the weights of a model, as candle's tensors, while the model is still being read.
/// Cheap to clone.
///
/// Each tensor is available as soon as its last byte is loaded. Requesting a tensor blocks the
/// thread until then. Requests that need no conversion return the same memory each time. Tensors
/// are kept until the last clone and the last `VarBuilder` are dropped, which also cancels the
/// load.
///
/// Do not request tensors on a worker of an async runtime: build the model in `spawn_blocking`.
#[derive(Debug, Clone)]
pub struct Weights(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    named: Named,
    arrivals: Arrivals<Tensor>,
    dtype: DType,
    device: Device,
}

impl Weights {
    /// Starts loading a model from a file, a folder, or an index file.
    ///
    /// The model's headers are read on the caller's thread before this function returns. `dtype`
    /// and `device` are the type and the device of the `VarBuilder` that [`Self::var_builder`]
    /// returns.
    ///
    /// # Errors
    /// Returns the errors of [`dmaload::inspect_load_blocking`], and [`dmaload::Error::Start`] if
    /// no thread can be started. Later errors are returned by requests for tensors and by
    /// [`Self::finish`].
    pub fn load(loader: &Loader, path: impl Into<PathBuf>, dtype: DType, device: &Device) -> dmaload::Result<Self> {
        Self::load_with(loader, [path], loader.load_options(), dtype, device)
    }

    /// Like [`Self::load`], but takes options, and accepts several files that form one model.
    ///
    /// A tensor that the options leave out ([`LoadOptions::tensors`]) is treated as absent from
    /// the model.
    ///
    /// # Errors
    /// Returns the errors of [`Self::load`], and [`dmaload::Error::AmbiguousTensor`] if two of the
    /// files have a tensor with the same name.
    pub fn load_with<P: Into<PathBuf>>(
        loader: &Loader,
        paths: impl IntoIterator<Item = P>,
        options: LoadOptions,
        dtype: DType,
        device: &Device,
    ) -> dmaload::Result<Self> {
        let paths: Vec<PathBuf> = paths.into_iter().map(Into::into).collect();
        let named = headers::read(&paths, &options)?;
        let target = device.clone();
        let load = loader.load(paths).options(options);
        let arrivals = Arrivals::start(load, move |tensor| convert(tensor, dtype, &target).map_err(|error| error.to_string()))?;
        Ok(Weights(Arc::new(Inner { named, arrivals, dtype, device: device.clone() })))
    }

    /// Returns a `VarBuilder` that provides these weights.
    pub fn var_builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), self.0.dtype, self.0.device.clone())
    }

    /// Iterates over the names of all tensors in the model, in arbitrary order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.named.keys().map(String::as_str)
    }

    /// Waits for the rest of the load, and drops this clone.
    ///
    /// A change to a file during its load is detected only when the whole file has been read. If a
    /// model uses only some of a file's tensors, this call is needed to detect a change.
    ///
    /// # Errors
    /// Returns the error of the load.
    pub fn finish(self) -> dmaload::Result<Report> {
        self.0.arrivals.finish()
    }
}

impl SimpleBackend for Weights {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() == &shape {
            return Ok(tensor);
        }
        let got = tensor.shape().clone();
        Err(Error::UnexpectedShape { msg: format!("shape mismatch for {name}"), expected: shape, got }.bt())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        if !self.0.named.contains_key(name) {
            return Err(Error::CannotFindTensor { path: name.to_owned() }.bt());
        }
        let tensor = self.0.arrivals.wait(name).map_err(|missing| unavailable(name, &missing))?;
        tensor.to_device(device)?.to_dtype(dtype)
    }

    /// Returns whether the model's headers list the tensor. Does not wait for the tensor.
    fn contains_tensor(&self, name: &str) -> bool {
        self.0.named.contains_key(name)
    }
}

pub(crate) fn unavailable(name: &str, missing: &Missing) -> Error {
    Error::Msg(format!("cannot load tensor {name:?}: {missing}")).bt()
}

/// Copies a tensor to the device.
///
/// If `dtype` can represent all values of the tensor's type, the tensor is converted immediately,
/// so it is not kept in two types. Otherwise the original type is kept, because a conversion could
/// lose information that the model needs if it requests the tensor in a third type.
fn convert(tensor: &dmaload::Tensor, dtype: DType, device: &Device) -> Result<Tensor> {
    // A rank's shard along a dimension other than the first is not contiguous.
    let bytes =
        if tensor.is_contiguous() { tensor.bytes().map_err(Error::wrap)? } else { tensor.to_vec().map_err(Error::wrap)?.into() };
    let own = match tensor.dtype() {
        // candle has no 16-bit unsigned integers; its own loader converts them to U32, too.
        dmaload::model::DType::U16 => {
            let wide: Vec<u32> = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_le_bytes([pair[0], pair[1]]))).collect();
            return Tensor::from_vec(wide, tensor.shape(), device);
        }
        dmaload::model::DType::U8 => DType::U8,
        dmaload::model::DType::U32 => DType::U32,
        dmaload::model::DType::I16 => DType::I16,
        dmaload::model::DType::I32 => DType::I32,
        dmaload::model::DType::I64 => DType::I64,
        dmaload::model::DType::BF16 => DType::BF16,
        dmaload::model::DType::F16 => DType::F16,
        dmaload::model::DType::F32 => DType::F32,
        dmaload::model::DType::F64 => DType::F64,
        dmaload::model::DType::F8E4M3 => DType::F8E4M3,
        dmaload::model::DType::F6E2M3 => DType::F6E2M3,
        dmaload::model::DType::F6E3M2 => DType::F6E3M2,
        dmaload::model::DType::F4 => DType::F4,
        dmaload::model::DType::F8E8M0 => DType::F8E8M0,
        other if other.element_bits().is_none() => {
            return Err(Error::Msg(format!("it has the quantized type {other}: load it as QTensors")));
        }
        other => return Err(Error::Msg(format!("candle has no type {other}"))),
    };
    let copy = Tensor::from_raw_buffer(&bytes, own, tensor.shape(), device)?;
    if is_widened(own, dtype) { copy.to_dtype(dtype) } else { Ok(copy) }
}

/// Returns whether `to` is a larger type that can represent every value of `from`.
fn is_widened(from: DType, to: DType) -> bool {
    match from {
        // candle 0.11 recurses endlessly when it converts this type to F64, so the conversion is
        // left to models that request F64.
        DType::F8E4M3 => matches!(to, DType::F16 | DType::BF16 | DType::F32),
        DType::F16 | DType::BF16 => matches!(to, DType::F32 | DType::F64),
        DType::F32 => to == DType::F64,
        _ => false,
    }
}
