//! A load that was asked for and has not started.

use std::sync::Arc;

use super::handle::Load;
use super::segments::Segments;
use super::source::Source;
use super::tensors::Tensors;
use crate::engine::Guard;
use crate::options::load::LoadOptions;

/// A load that was asked for: what to load, and how. Made by
/// [`Loader::load`](crate::Loader::load).
///
/// Nothing is opened or read before it is consumed, in one of these ways:
///
/// - `.await` gives the [`Image`](crate::Image): all of it. All of it is in memory at once.
/// - [`start`](Self::start) gives a [`Load`]: its progress, single tensors by their names while
///   the rest is read, and the image. All of it is in memory at once.
/// - [`segments`](Self::segments) gives each segment, in order, as soon as it is complete. In
///   memory is what the consumer keeps, and what the load is ahead of it.
/// - [`tensors`](Self::tensors) gives each tensor, in order, as soon as it is complete, and keeps
///   as little.
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
/// None of these blocks: opening and reading happen on the loader's threads, and every error
/// comes from the load. It runs by itself, whether it is polled or not. It needs no particular
/// runtime, nor any: only something that polls it.
#[derive(Debug)]
#[must_use = "nothing is loaded before it is awaited, started or consumed"]
pub struct LoadRequest {
    guard: Arc<Guard>,
    source: Source,
    options: LoadOptions,
}

impl LoadRequest {
    pub(crate) fn new(guard: &Arc<Guard>, source: Source) -> Self {
        LoadRequest { guard: Arc::clone(guard), source, options: guard.settings().load.clone() }
    }

    /// Takes these options in place of the loader's
    /// ([`LoaderBuilder::load_options`](crate::LoaderBuilder::load_options)): all of them. To
    /// change some of the loader's, begin with
    /// [`Loader::load_options`](crate::Loader::load_options).
    pub fn options(mut self, options: LoadOptions) -> Self {
        self.options = options;
        self
    }

    /// Starts it, to get all of it in the end, and single tensors before that.
    pub fn start(self) -> Load {
        let LoadRequest { guard, source, options } = self;
        Load::start(&guard, source.into_inputs(), options)
    }

    /// Starts it, and gives the segments as they come. It keeps none.
    pub fn segments(self) -> Segments {
        let LoadRequest { guard, source, options } = self;
        Segments::start(&guard, source.into_inputs(), options, false)
    }

    /// Starts it, and gives the tensors as they come. It keeps none.
    pub fn tensors(self) -> Tensors {
        Tensors::new(self.segments())
    }
}

/// Starts it, with the call of `into_future`, and waits for all of it.
///
/// Dropping the future cancels the load.
impl IntoFuture for LoadRequest {
    type Output = <Load as IntoFuture>::Output;
    type IntoFuture = <Load as IntoFuture>::IntoFuture;

    fn into_future(self) -> Self::IntoFuture {
        self.start().into_future()
    }
}
