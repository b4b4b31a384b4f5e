//! Verifies files while they are being loaded (feature `verify`).
//!
//! A [`Manifest`] contains a checksum for each chunk of each file. A load with a manifest
//! ([`crate::LoadOptions::verify`]) checks the bytes as they arrive, on the loader's threads, and
//! never delivers a segment with unverified bytes to the caller. A single [`Digest`] of a whole
//! file also verifies it, but all segments except the last one are delivered to the caller before
//! the result is known.
//!
//! Verifiers compute checksums of the bytes that a load passes to them. The only thing that they
//! read themselves is a file's header, to name the tensors in a corrupt chunk. They have no
//! threads and need no shutdown. A verifier lives as long as the load that uses it.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use dmaload::verify::Manifest;
//! let manifest = Manifest::parse(&std::fs::read("model.safetensors.json")?)?;
//! let loader = dmaload::Loader::new()?;
//! let options = loader.load_options().verify(manifest);
//! let image = loader.load("model.safetensors").options(options).await?;
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
