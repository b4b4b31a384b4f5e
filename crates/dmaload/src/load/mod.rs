//! A load from the caller's side. [`Source`] and [`LoadRequest`] say what to load. There are three
//! ways to consume it: as a whole, with single tensors on the way ([`Load`], [`image::Image`]),
//! segment by segment ([`Segments`]), or tensor by tensor ([`Tensors`]).
//!
//! ```text
//!   request ─┬─► handle (Load) ──► arrived ─► names, image
//!            ├─► segments ◄── tensors            │
//!            └─► source         └────────────────┴─► feed: the engine's events and waiters
//! ```
//!
//! This module turns the engine's events into the values that a caller holds, and makes no system
//! calls. It needs no runtime, only something that polls its futures. Dropping a [`Load`],
//! [`Segments`] or [`Tensors`] cancels its load; the engine then frees what the load leaves
//! behind.

mod arrived;
mod feed;
mod handle;
pub(crate) mod image;
mod names;
mod request;
mod segments;
mod source;
mod tensors;

pub use handle::Load;
pub use request::LoadRequest;
pub use segments::Segments;
pub use source::Source;
pub use tensors::Tensors;
