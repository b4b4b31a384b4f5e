//! Fills [burn](burn_core) modules from a [`dmaload`] load. With burn-ndarray, this usually
//! requires no copy.
//!
//! ```no_run
//! use burn_core::module::Module;
//! use burn_store::ModuleSnapshot;
//! use burn_tensor::backend::Backend;
//! use dmaload::Loader;
//! use dmaload_burn::{Error, LoadStore};
//!
//! fn load_module<B: Backend, M: Module<B>>(loader: &Loader, model: &mut M) -> Result<(), Error> {
//!     let mut store = LoadStore::load(loader, "model.safetensors")?;
//!     model.load_from(&mut store)?;
//!     store.finish()?;
//!     Ok(())
//! }
//! ```
//!
//! The load runs while the module is being filled: each tensor is available as soon as its last
//! byte is loaded.
//!
//! # Copies
//!
//! - With burn-ndarray, **filling a module copies nothing**: the module's tensors use the loaded
//!   memory through `Bytes::from_shared`. A segment's memory is freed when the last tensor in it
//!   is dropped. burn-ndarray 0.21 does not write to this memory. Instead, most of its operations
//!   copy such a tensor first, every time they run. A model that runs many times may therefore be
//!   faster if burn's own `SafetensorsStore` fills it.
//! - All other backends copy from the loaded memory to their own.
//! - A model in PyTorch's layout needs `PyTorchToBurnAdapter` ([`LoadStore::with_adapter`]), which
//!   transposes, and therefore copies, the weights of linear layers.
//! - A tensor whose address in memory is not a multiple of its element's size is copied.
//!
//! # Limits
//!
//! - If the file's element type differs from the module's, burn 0.21 keeps the file's type, and
//!   panics if its backend lacks that type (F16 with burn-ndarray) or if an operation receives
//!   tensors of both types. `HalfPrecisionAdapter` only converts between F16 and F32.
//! - With a backend that copies, the file stays in memory alongside the model until
//!   [`LoadStore::finish`]: burn requests tensors through closures that may be called twice.
//! - burn does not support F8, F6, F4, complex numbers, or GGUF blocks; its own quantized types
//!   are different. Requesting a tensor of one of these types is an error.
//! - Saving with [`burn_store::ModuleStore::collect_from`] is an error. Use burn's
//!   `SafetensorsStore`.

mod store;

pub use store::{Error, LoadStore};
