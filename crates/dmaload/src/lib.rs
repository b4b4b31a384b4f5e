//! Loads multi-gigabyte model files from storage straight into shareable memory, bypassing the
//! page cache.
//!
//! ```text
//!   path ── open O_DIRECT ──► Plan: segments, pieces, chunks ───────────┐
//!   Window ── permit ──► allocator threads: 2 MiB pages ──► piece ──► ring thread ──► storage
//!      ▲                                                                    │ last byte
//!      └────────── permit is released ◄─────────────────────────────────────┴──► Segment
//!                                                                                   │
//!                                                     Image ◄── Load (a Stream) ◄───┘
//! ```
//!
//! A load is planned before anything but headers is read. One thread owns everything in flight.
//! Other threads allocate memory ahead of that thread, and a window between them bounds the bytes
//! that are allocated but not yet filled. Segments can be used while the rest is being read.
//!
//! ```no_run
//! # async fn example() -> dmaload::Result<()> {
//! let loader = dmaload::Loader::new()?;
//! let image = loader.load("model.safetensors").await?;
//! let head = image.tensor("lm_head.weight")?;
//! println!("{:?}: {} bytes", head.shape(), head.bytes()?.len());
//! println!("by {}, in {:?}", image.report().route, image.report().total);
//! # Ok(())
//! # }
//! ```
//!
//! # Which type do I need?
//!
//! | to | use |
//! |---|---|
//! | set a service's memory limit, heap and pool | [`Loader::builder`] |
//! | name files, folders, open files, or part of a file | [`Source`] |
//! | choose tensors, a shard, a layout or a route | [`LoadOptions`] |
//! | get the whole model | [`Image`], by awaiting what [`Loader::load`] returns |
//! | get single tensors by name while the rest is being read | [`Load`] |
//! | stream a model, even one larger than memory | [`Segments`] or [`Tensors`] |
//! | read only the headers | [`inspect()`], [`inspect_model`] |
//! | get dma-bufs | [`LoaderBuilder::dma_buf`], [`Segment::hand_out_dma_buf`] |
//! | allocate from your own heap | [`heap`] |
//! | share loaded memory with other processes | [`share`] |
//! | verify checksums while bytes are read | the `verify` module (feature `verify`) |
//! | decide what to do about an error | [`Error::kind`] |
//! | see how a load went, and every fallback to a lower [`Route`] | [`Report`] |
//! | export metrics | [`Loader::metrics`] |
//! | find out what this machine offers | [`probe`] |
//!
//! # Features
//!
//! - `verify` (off by default): manifests and checksums for [`LoadOptions::verify`].
//!
//! # Requirements
//!
//! Linux only. io_uring, `O_DIRECT` and huge pages are used where available. If the kernel refuses
//! one of them, the load continues without it and the report says so, unless the caller required
//! it ([`LoadOptions::strict`], [`heap::Pages::Huge`]).

#[cfg(not(target_os = "linux"))]
compile_error!("dmaload requires Linux: it uses io_uring, memfds and dma-bufs");

mod engine;
mod error;
mod files;
mod inspect;
#[cfg(test)]
mod instructions;
mod load;
mod loader;
mod memory;
pub mod model;
mod options;
mod plan;
pub mod probe;
mod ring;
mod route;
pub mod share;
mod support;
mod telemetry;
#[cfg(feature = "verify")]
pub mod verify;

/// The programs in docs/programs.md, compiled as doc tests.
#[cfg(all(doctest, feature = "verify"))]
#[doc = include_str!("../../../docs/programs.md")]
mod programs {}

pub use engine::Leaked;
pub use engine::event::Progress;
pub use error::{Errno, Error, ErrorKind, Result};
pub use inspect::{Inspected, inspect, inspect_blocking, inspect_load_blocking, inspect_model, inspect_model_blocking};
pub use load::image::{Image, ImageFile, Tensor, TensorPart};
pub use load::{Load, LoadRequest, Segments, Source, Tensors};
pub use loader::{Loader, LoaderBuilder};
pub use memory::heap;
pub use memory::private::PrivateMemory;
pub use memory::segment::{Segment, SegmentAccess};
pub use options::choices::{Cache, Format, ImporterLimits, Layout, Prefer, Priority, Shard};
pub use options::load::LoadOptions;
pub use options::observer::{Observer, Rejection, Verify};
pub use route::{Attempt, Fallback, Route};
pub use telemetry::metrics::{Latency, Metrics};
pub use telemetry::report::{FileReport, Measured, Report, Way};
pub use telemetry::trace::{TraceEvent, TraceKind};
