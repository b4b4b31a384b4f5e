//! Parses the headers of model files: which tensors a file contains, and where they are.
//!
//! Pure logic: nothing here makes a system call. The caller passes in the bytes of a header and
//! the length of the file, and gets a [`TensorMap`], or a [`ModelError`] that says what is wrong
//! and where.
//!
//! The tensors of a parsed header do not overlap, and each has exactly the bytes that its type and
//! shape require. In a safetensors file, the tensors cover all of the data. A GGUF file may also
//! contain padding between tensors, and any bytes after the last one.
//!
//! Memory and time are bounded by the actual length of the header, whatever counts and sizes it
//! declares.
//!
//! A safetensors file is parsed in two steps, because its first bytes contain the header's length:
//!
//! ```text
//! first 9 bytes ──► sniff ──► length of the header ──► parse ──► TensorMap
//!                     │                                  │
//!                     ├──► not safetensors: a raw file   └──► ModelError
//!                     └──► damaged: ModelError
//! ```

mod dtype;
mod error;
mod foreign;
pub mod gguf;
pub mod index;
mod limits;
mod map;
mod names;
pub(crate) mod parts;
pub mod safetensors;

pub use dtype::{DType, ParseDTypeError};
pub use error::ModelError;
pub use foreign::ForeignFile;
pub(crate) use foreign::{LOOKED_AT_BYTES, recognize};
pub use map::{SafetensorsMetadata, TensorInfo, TensorMap};
