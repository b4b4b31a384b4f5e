//! Builds models for [candle](candle_core) while [`dmaload`] reads their files.
//!
//! candle's own loader maps the file and copies each tensor when the model requests it, so
//! building waits for page faults. In this crate, a thread converts each tensor to a candle tensor
//! as soon as its last byte is loaded, while the rest is being read and the model is being built:
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
//! - [`Weights`] provides safetensors (a file, a folder with an index, several files) through
//!   candle's `VarBuilder`.
//! - [`QTensors`] provides the tensors of a GGUF model as `QTensor`s by name.
//! - [`GgufReader`] reads a GGUF file for candle's quantized models.
//!
//! # Memory
//!
//! candle's CPU tensors own their memory as a `Vec`, so each tensor is copied once, and again if
//! it is converted to another type. After the copy, dmaload's memory for the tensor is dropped.
//! The load reads ahead of the copies by at most the window and one segment.
//!
//! The peak memory is the sum of the model, the window ([`dmaload::LoaderBuilder::window_bytes`],
//! 128 MiB by default), two segments of 64 MiB, and staging (16 to 72 MiB, depending on the number
//! of CPUs). This crate uses [`dmaload::Tensors`], since a [`dmaload::Load`] would hold the whole
//! file in memory until the load ends.
//!
//! # Order
//!
//! Tensors arrive in file order. A model whose first request is for the file's last tensor waits
//! for the whole file. If you know the order in which the model requests its tensors, set it:
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
//! # Limits
//!
//! - Tensors are copied: `CpuStorage` consists of `Vec`s, which must come from Rust's allocator.
//! - A quantized `VarBuilder` cannot be filled while the file is being read: the fields of
//!   `candle_transformers::quantized_var_builder::VarBuilder` (0.11) are private, and its two
//!   constructors take a path or the bytes of the whole file. A [`dmaload::Image`] provides these
//!   bytes without a copy, so `VarBuilder::from_gguf_buffer(&image.files()[0].bytes()?, &device)`
//!   works, but both the file and the model are in memory until it returns.
//! - Requesting a tensor whose type candle does not have, such as `BOOL` or `IQ4_XS`, is an error.

mod arrivals;
mod gguf;
mod headers;
mod weights;

pub use gguf::{GgufReader, QTensors};
pub use weights::Weights;

/// The candle programs in docs/adopt.md, compiled as doc tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/adopt.md")]
mod adopt {}
