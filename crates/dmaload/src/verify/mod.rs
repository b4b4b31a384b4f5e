//! Checking that what is loaded is what it should be, while it is being loaded (feature `verify`).
//!
//! A [`Manifest`] has a checksum of each chunk of each file; a load that was given one ([`crate::LoadOptions::verify`]) looks at
//! each chunk when it has landed, on threads of the loader's own, and shows no segment with a byte that was not verified. A
//! single [`Digest`] of a whole file does, too: all segments but the last one are shown before it is known.
//!
//! It computes, and compares bytes that a load shows it. It reads no payload itself, only a file's
//! header, to name the tensors of a corrupt chunk. It has no threads and nothing to end: a
//! verifier lives as long as the load that uses it.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use dmaload::verify::Manifest;
//! let manifest = Manifest::parse(&std::fs::read("model.safetensors.json")?)?;
//! let loader = dmaload::Loader::new()?;
//! let image = loader.load("model.safetensors").options(loader.load_options().verify(manifest)).await?;
//! # Ok(())
//! # }
//! ```

mod chunks;
mod digest;
mod manifest;
mod recorder;
mod verifier;

pub use digest::{Algorithm, Digest, Hasher, digest};
pub use manifest::{Manifest, ManifestError, ManifestFile};
pub use recorder::Recorder;
