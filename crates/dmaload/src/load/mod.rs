//! The caller's view of a load. [`Source`] and [`LoadRequest`] say what to load. The caller can
//! consume a load as a whole, with access to single tensors while it is running ([`Load`],
//! [`image::Image`]), segment by segment ([`Segments`]), or tensor by tensor ([`Tensors`]).
//!
//! ```text
//!   request ─┬─► handle (Load) ──► arrived ─► names, image
//!            ├─► segments ◄── tensors            │
//!            └─► source         └────────────────┴─► feed: the engine's events and waiters
//! ```
//!
//! This module turns the engine's events into the values that a caller holds, and makes no system
//! calls. It needs no async runtime, only something that polls its futures. Dropping a [`Load`],
//! [`Segments`] or [`Tensors`] cancels its load. The engine then frees the load's remaining
//! memory.

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
