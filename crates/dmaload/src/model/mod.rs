//! Headers of model files: which tensors a file contains, and where.
//!
//! Pure logic: nothing here opens, reads or maps a file. The caller passes in the bytes of a
//! header and the length of the file, and gets a [`TensorMap`], or a [`ModelError`] that says what
//! is wrong and where. A map is always complete and consistent: every byte of the data belongs to
//! exactly one tensor or is padding, and every tensor has exactly the bytes that its type and
//! shape require.
//!
//! Makes no system calls. Memory and time are bounded by the length of the header, whatever the
//! header claims.
//!
//! ```text
//! first bytes ──► sniff ──► parse_prefix ──► header bytes ──► parse ──► TensorMap
//!                   │                                           │
//!                   └──► not safetensors: a raw file            └──► ModelError
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
