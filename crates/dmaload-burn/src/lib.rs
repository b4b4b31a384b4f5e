//! A store for [burn](burn_core) modules of what [`dmaload`] reads, without a copy.
//!
//! ```no_run
//! use burn_core::module::Module;
//! use burn_store::ModuleSnapshot;
//! use burn_tensor::backend::Backend;
//! use dmaload::Loader;
//! use dmaload_burn::{Error, LoadStore};
//!
//! fn fill<B: Backend, M: Module<B>>(loader: &Loader, model: &mut M) -> Result<(), Error> {
//!     let mut store = LoadStore::load(loader, "model.safetensors")?;
//!     model.load_from(&mut store)?;
//!     store.finish()?;
//!     Ok(())
//! }
//! ```
//!
//! The load runs while the module is filled: each tensor is given as soon as its last byte is
//! there.
//!
//! # What burn allows
//!
//! - **No copy while a module is filled** with burn-ndarray: `Bytes::from_shared` takes the loaded
//!   memory, which is freed with the last tensor in its segment. Nothing writes to it: most
//!   operations of burn-ndarray 0.21 copy such a tensor first, each time. A model that runs many
//!   times may be faster as burn's own `SafetensorsStore` fills it.
//! - Any backend: other backends copy from the loaded memory to their own.
//!
//! # What burn does not allow
//!
//! - Without a copy where data must change: a file of PyTorch's layout needs
//!   `PyTorchToBurnAdapter` ([`LoadStore::with_adapter`]), which transposes the weights of linear
//!   layers; a tensor that does not begin
//!   at a multiple of its element's size in memory is copied.
//! - Files of another type than the module's: burn 0.21 keeps the file's, and panics when its
//!   backend lacks it (F16 with burn-ndarray) or meets another. `HalfPrecisionAdapter` converts.
//! - Memory of about one model where another backend copies: burn asks for tensors by closures
//!   that may be called twice, so the load holds the file until [`LoadStore::finish`].
//! - Types that burn does not have: F8, F6 and F4, complex numbers, and GGUF's blocks, which burn
//!   quantizes otherwise. They are an error when a module asks for them.
//! - Saving: [`burn_store::ModuleStore::collect_from`] is an error. Use burn's `SafetensorsStore`.

mod store;

pub use store::{Error, LoadStore};
