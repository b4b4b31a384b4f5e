//! A load from the caller's side: what is asked for ([`Source`], [`LoadRequest`]), and the three
//! ways to consume it: as a whole, with single tensors before that ([`Load`], [`image::Image`]),
//! segments as they come ([`Segments`]), tensors as they come ([`Tensors`]).
//!
//! ```text
//!   request ─┬─► handle (Load) ──► arrived ─► names, image
//!            ├─► segments ◄── tensors            │
//!            └─► source         └────────────────┴─► feed: the engine's events, and who waits for them
//! ```
//!
//! It turns the events of the engine into what a caller holds, and makes no system call. It needs
//! no runtime, only something that polls it. Dropping it cancels the load; the engine frees what
//! the load leaves.

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
