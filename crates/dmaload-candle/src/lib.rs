//! Models for [candle](candle_core), built while [`dmaload`] reads them.
//!
//! candle's own loader maps the file and copies each tensor when the model asks for it, so
//! building waits for page faults. Here one thread takes each tensor as soon as its last byte is
//! there and makes a candle tensor of it, while the rest is read and the model is being built:
//!
//! ```no_run
//! use candle_core::{DType, Device};
//! use candle_transformers::models::llama::{Config, Llama};
//! use dmaload_candle::Weights;
//!
//! fn load(config: &Config) -> anyhow::Result<Llama> {
//!     let loader = dmaload::Loader::new()?;
//!     let weights = Weights::load(&loader, "model-folder", DType::BF16, &Device::Cpu)?;
//!     let model = Llama::load(weights.var_builder(), config)?;
//!     let report = weights.finish()?;
//!     eprintln!("{} bytes by {} in {:?}", report.bytes, report.route, report.total);
//!     Ok(model)
//! }
//! ```
//!
//! - [`Weights`] is safetensors (a file, a folder with an index, several files) behind candle's
//!   `VarBuilder`.
//! - [`QTensors`] is GGUF as `QTensor`s by name.
//! - [`GgufReader`] is a GGUF file to candle's quantized models, which take a reader.
//!
//! # Memory
//!
//! candle's CPU tensors own their memory, as a `Vec`, so one copy of each tensor stays. dmaload's
//! memory of a tensor is dropped right after that copy, and the load is ahead of the copies by
//! its window only: the peak is the model, the window ([`dmaload::LoaderBuilder::window_bytes`],
//! 128 MiB by default) and two segments of 64 MiB. A [`dmaload::Load`] would hold the whole file
//! beside the model until its end, so [`dmaload::Tensors`] is what this crate is made of.
//!
//! # Order
//!
//! Tensors arrive in file order. A model that first asks for what the file has last waits for all
//! of it. Where the order is known, ask for it: that costs nothing.
//!
//! ```no_run
//! # use candle_core::{DType, Device};
//! # use dmaload_candle::Weights;
//! # fn load(loader: &dmaload::Loader) -> dmaload::Result<Weights> {
//! let wanted = ["model.embed_tokens.*", "model.norm.*", "*"];
//! let options = loader.load_options().tensors(wanted);
//! Weights::load_with(loader, ["model.safetensors"], options, DType::F32, &Device::Cpu)
//! # }
//! ```
//!
//! # What candle does not allow
//!
//! - Tensors without a copy: `CpuStorage` is made of `Vec`s, which must come from Rust's
//!   allocator.
//! - A quantized `VarBuilder` that is filled while the file is read: the fields of
//!   `candle_transformers::quantized_var_builder::VarBuilder` (0.11) are private, and its two
//!   constructors take a path, or the bytes of the whole file. Of an image these are there
//!   without a copy, so `VarBuilder::from_gguf_buffer(&image.files()[0].bytes()?, &device)`
//!   works; it holds the file beside the model until it returns.
//! - Types that candle does not have, such as `BOOL` or `IQ4_XS`: an error, when such a tensor is
//!   asked for.

mod arrivals;
mod gguf;
mod headers;
mod weights;

pub use gguf::{GgufReader, QTensors};
pub use weights::Weights;

/// The snippets of docs/adopt.md that are about candle, as tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/adopt.md")]
mod adopt {}
