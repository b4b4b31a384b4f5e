//! A load that was requested, but not started yet.

use std::sync::Arc;

use super::handle::Load;
use super::segments::Segments;
use super::source::Source;
use super::tensors::Tensors;
use crate::engine::Guard;
use crate::options::load::LoadOptions;

/// A requested load: what to load and how. Created by [`Loader::load`](crate::Loader::load).
///
/// Nothing is opened or read until the request is consumed in one of these ways:
///
/// - `.await` returns the [`Image`](crate::Image), with everything in memory at once.
/// - [`start`](Self::start) returns a [`Load`], which reports progress, returns single tensors by
///   name while the rest is being read, and finally returns the image. Here, too, everything is in
///   memory at once.
/// - [`segments`](Self::segments) yields each segment, in order, as soon as it is complete. Memory
///   holds what the consumer keeps plus what the load has read ahead.
/// - [`tensors`](Self::tensors) yields each tensor, in order, as soon as it is complete. Memory is
///   bounded in the same way.
///
/// ```no_run
/// # async fn example(loader: dmaload::Loader) -> dmaload::Result<()> {
/// use dmaload::LoadOptions;
///
/// let options = LoadOptions::new().strict(true);
/// let image = loader.load("model.safetensors").options(options).await?;
///
/// let mut tensors = loader.load("larger-than-memory.safetensors").tensors();
/// while let Some(tensor) = tensors.next().await {
///     println!("{}", tensor?.name());
/// }
/// # Ok(())
/// # }
/// ```
///
/// None of these ways blocks the caller's thread. Files are opened and read on the loader's
/// threads, and the load returns all errors. A load runs whether or not it is polled; only a
/// stream that has read far ahead waits for its consumer. Loads work on any runtime, and without
/// one.
#[derive(Debug)]
#[must_use = "nothing is loaded until the request is awaited, started or consumed"]
pub struct LoadRequest {
    guard: Arc<Guard>,
    source: Source,
    options: LoadOptions,
}

impl LoadRequest {
    pub(crate) fn new(guard: &Arc<Guard>, source: Source) -> Self {
        LoadRequest { guard: Arc::clone(guard), source, options: guard.settings().load.clone() }
    }

    /// Uses these options in place of the loader's
    /// ([`LoaderBuilder::load_options`](crate::LoaderBuilder::load_options)). They replace all of
    /// the loader's options; to change only some, start from
    /// [`Loader::load_options`](crate::Loader::load_options).
    pub fn options(mut self, options: LoadOptions) -> Self {
        self.options = options;
        self
    }

    /// Starts the load and keeps everything that it reads. The returned [`Load`] yields single
    /// tensors before the load is complete, and the image at the end.
    pub fn start(self) -> Load {
        let LoadRequest { guard, source, options } = self;
        Load::start(&guard, source.into_inputs(), options)
    }

    /// Starts the load and yields its segments as they complete. Keeps none of them.
    pub fn segments(self) -> Segments {
        let LoadRequest { guard, source, options } = self;
        Segments::start(&guard, source.into_inputs(), options, false)
    }

    /// Starts the load and yields its tensors as they complete. Keeps none of them.
    pub fn tensors(self) -> Tensors {
        Tensors::new(self.segments())
    }
}

/// Starts the load when `into_future` is called, and waits for all of it.
///
/// Dropping the future cancels the load.
impl IntoFuture for LoadRequest {
    type Output = <Load as IntoFuture>::Output;
    type IntoFuture = <Load as IntoFuture>::IntoFuture;

    fn into_future(self) -> Self::IntoFuture {
        self.start().into_future()
    }
}
