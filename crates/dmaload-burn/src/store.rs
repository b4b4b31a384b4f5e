//! [`LoadStore`], which provides snapshots of the tensors in a load that is still running.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use burn_core::module::ParamId;
use burn_store::{ApplyResult, IdentityAdapter, ModuleAdapter, ModuleSnapshot, ModuleStore, TensorSnapshot, TensorSnapshotError};
use burn_tensor::backend::Backend;
use burn_tensor::{AllocationProperty, BoolStore, Bytes, DType, TensorData};
use dmaload::model::TensorInfo;
use dmaload::{Load, LoadOptions, Loader, Report, inspect_load_blocking};

/// Implements burn's `ModuleStore` for a model that is being loaded. Dropping the store cancels
/// the load, unless a clone of a snapshot still exists elsewhere. Tensors that were already
/// returned stay valid.
///
/// Do not use the store on a worker of an async runtime: filling a module blocks until the
/// module's tensors are loaded.
pub struct LoadStore {
    load: Arc<Load>,
    snapshots: BTreeMap<String, TensorSnapshot>,
    adapter: Box<dyn ModuleAdapter>,
    allows_partial: bool,
}

impl LoadStore {
    /// Starts loading a model from a file, a folder, or an index file. The model's headers are
    /// read before this function returns.
    ///
    /// # Errors
    /// Returns the errors of [`dmaload::inspect_load_blocking`]. Later errors are reported when a
    /// module is filled, and by [`Self::finish`].
    pub fn load(loader: &Loader, path: impl Into<PathBuf>) -> dmaload::Result<Self> {
        Self::load_with(loader, path, loader.load_options())
    }

    /// Like [`Self::load`], but takes options, such as an order for the tensors
    /// ([`LoadOptions::tensors`]).
    ///
    /// If [`LoadOptions::shard`] loads only part of a tensor, requesting that tensor is an error.
    /// If the model exceeds the loader's memory limit, requesting a tensor fails with the same
    /// message as [`dmaload::Error::OverLimit`], because the load holds the whole model.
    ///
    /// # Errors
    /// Returns the same errors as [`Self::load`].
    pub fn load_with(loader: &Loader, path: impl Into<PathBuf>, options: LoadOptions) -> dmaload::Result<Self> {
        let path = path.into();
        let files = inspect_load_blocking([&path], &options)?;
        let load = Arc::new(loader.load(path).options(options).start());
        let tensors = files.iter().flat_map(|file| file.tensors.iter().flatten());
        let snapshots = tensors.map(|tensor| (tensor.name.clone(), snapshot(&load, tensor))).collect();
        Ok(LoadStore { load, snapshots, adapter: Box::new(IdentityAdapter), allows_partial: false })
    }

    /// Converts the file's tensors for burn's modules, for example with `PyTorchToBurnAdapter`.
    /// Tensors that the adapter changes are copied.
    #[must_use]
    pub fn with_adapter(mut self, adapter: impl ModuleAdapter + 'static) -> Self {
        self.adapter = Box::new(adapter);
        self
    }

    /// If `true`, tensors of the module that are missing from the model stay unchanged. If
    /// `false`, which is the default, filling a module that has such tensors fails with
    /// [`Error::Missing`].
    #[must_use]
    pub fn allow_partial(mut self, allow: bool) -> Self {
        self.allows_partial = allow;
        self
    }

    /// Waits for the rest of the load, then releases it. Tensors that were already returned stay
    /// valid.
    ///
    /// A change to a file during its load is detected only when the whole file has been read. If a
    /// module uses only some of a file's tensors, this call is needed to detect a change.
    ///
    /// # Errors
    /// Returns the error of the load, or [`Error::InUse`] if a snapshot still exists elsewhere.
    pub fn finish(self) -> Result<Report, Error> {
        drop(self.snapshots);
        let load = Arc::into_inner(self.load).ok_or(Error::InUse)?;
        let image = block_on(load.finish())?;
        Ok(image.report().clone())
    }
}

impl ModuleStore for LoadStore {
    type Error = Error;

    /// Always fails, since a load cannot be written to.
    fn collect_from<B: Backend, M: ModuleSnapshot<B>>(&mut self, _module: &M) -> Result<(), Error> {
        Err(Error::ReadOnly)
    }

    fn apply_to<B: Backend, M: ModuleSnapshot<B>>(&mut self, module: &mut M) -> Result<ApplyResult, Error> {
        let snapshots = self.snapshots.values().cloned().collect();
        let result = module.apply(snapshots, None, Some(self.adapter.clone()), false);
        if !result.errors.is_empty() {
            return Err(Error::Refused(result.to_string()));
        }
        if !result.missing.is_empty() && !self.allows_partial {
            return Err(Error::Missing(result.to_string()));
        }
        Ok(result)
    }

    fn get_snapshot(&mut self, name: &str) -> Result<Option<&TensorSnapshot>, Error> {
        Ok(self.snapshots.get(name))
    }

    fn get_all_snapshots(&mut self) -> Result<&BTreeMap<String, TensorSnapshot>, Error> {
        Ok(&self.snapshots)
    }

    fn keys(&mut self) -> Result<Vec<String>, Error> {
        Ok(self.snapshots.keys().cloned().collect())
    }
}

impl fmt::Debug for LoadStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadStore").field("load", &self.load).field("tensors", &self.snapshots.len()).finish_non_exhaustive()
    }
}

/// An error from a [`LoadStore`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The load failed.
    Load(dmaload::Error),
    /// Some tensors could not be loaded, or burn refused them. Contains burn's message.
    Refused(String),
    /// The module has tensors that the model does not have. Contains burn's message.
    Missing(String),
    /// A snapshot of the load still exists elsewhere.
    InUse,
    /// A load cannot be written to.
    ReadOnly,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Load(error) => error.fmt(f),
            Error::Refused(text) => write!(f, "cannot fill the module: {text}"),
            Error::Missing(text) => write!(f, "cannot fill the whole module: {text}"),
            Error::InUse => f.write_str("cannot finish the load: a snapshot of it is kept elsewhere"),
            Error::ReadOnly => f.write_str("cannot save into a load: use burn's SafetensorsStore"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Load(error) => std::error::Error::source(error),
            _ => None,
        }
    }
}

impl From<dmaload::Error> for Error {
    fn from(error: dmaload::Error) -> Self {
        Error::Load(error)
    }
}

/// Returns a snapshot of a tensor. The snapshot waits for the bytes when burn requests its data.
fn snapshot(load: &Arc<Load>, tensor: &TensorInfo) -> TensorSnapshot {
    let (load, name, shape) = (Arc::clone(load), tensor.name.clone(), tensor.shape.clone());
    let dtype = burn_type(tensor.dtype);
    let unknown = format!("cannot load tensor {name:?}: burn has no type {}", tensor.dtype);
    let data = {
        let shape = shape.clone();
        move || {
            let dtype = dtype.ok_or_else(|| TensorSnapshotError::DataError(unknown.clone()))?;
            let io_error = |error: dmaload::Error| TensorSnapshotError::IoError(error.to_string());
            let tensor = load.tensor_blocking(&name).map_err(io_error)?;
            // burn trusts the snapshot's shape and type. Without this check, it would read past
            // the end of a rank's shard, or of a smaller tensor if another file has replaced the
            // inspected one.
            if tensor.shape() != &shape[..] || burn_type(tensor.dtype()) != Some(dtype) {
                let message = format!(
                    "cannot load tensor {name:?}: {:?} of {} was loaded, but the file's header has {shape:?} of {dtype:?}",
                    tensor.shape(),
                    tensor.dtype()
                );
                return Err(TensorSnapshotError::DataError(message));
            }
            let bytes = tensor.bytes().map_err(io_error)?;
            // A `bool` with a value other than 0 or 1 is undefined behavior.
            if matches!(dtype, DType::Bool(_)) && bytes.iter().any(|&byte| byte > 1) {
                let message = format!("cannot load tensor {name:?}: it has values other than 0 and 1");
                return Err(TensorSnapshotError::DataError(message));
            }
            let shared = Bytes::from_shared(bytes, AllocationProperty::Other);
            Ok(TensorData::from_bytes(shared, shape.clone(), dtype))
        }
    };
    let path = tensor.name.split('.').map(str::to_owned).collect();
    // burn needs a type before it requests the data. If burn lacks the tensor's type, `U8` serves
    // as a placeholder, and the closure returns an error.
    TensorSnapshot::from_closure(Rc::new(data), dtype.unwrap_or(DType::U8), shape.into(), path, Vec::new(), ParamId::new())
}

fn burn_type(dtype: dmaload::model::DType) -> Option<DType> {
    Some(match dtype {
        dmaload::model::DType::F64 => DType::F64,
        dmaload::model::DType::F32 => DType::F32,
        dmaload::model::DType::F16 => DType::F16,
        dmaload::model::DType::BF16 => DType::BF16,
        dmaload::model::DType::I64 => DType::I64,
        dmaload::model::DType::I32 => DType::I32,
        dmaload::model::DType::I16 => DType::I16,
        dmaload::model::DType::I8 => DType::I8,
        dmaload::model::DType::U64 => DType::U64,
        dmaload::model::DType::U32 => DType::U32,
        dmaload::model::DType::U16 => DType::U16,
        dmaload::model::DType::U8 => DType::U8,
        dmaload::model::DType::Bool => DType::Bool(BoolStore::Native),
        _ => return None,
    })
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Blocks this thread until the future is ready.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}
