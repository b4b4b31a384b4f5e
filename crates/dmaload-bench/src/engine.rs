//! The engine that is measured.

use std::path::PathBuf;
use std::sync::Arc;

use dmabuf::Pages;
use dmaload::heap::Heap;
use dmaload::verify::{Manifest, Recorder};
use dmaload::{Loader, Route};

/// Makes the loaders that are measured, from the options of the program that runs the bench.
///
/// Each method is called in the process of the mode that needs it, and only then: a mode without a
/// heap must not fail because a heap can't be had.
pub trait Engine {
    /// A loader by these options.
    ///
    /// # Errors
    /// If this machine lacks what the options ask for, or they contradict each other.
    fn loader(&self) -> dmaload::Result<Loader>;

    /// A strict loader by this route: it fails rather than take a lower one.
    ///
    /// # Errors
    /// As [`Engine::loader`].
    fn loader_by(&self, route: Route) -> dmaload::Result<Loader>;

    /// A loader with a pool of any size.
    ///
    /// # Errors
    /// As [`Engine::loader`].
    fn loader_with_pool(&self) -> dmaload::Result<Loader>;

    /// The heap that these loaders allocate from.
    ///
    /// # Errors
    /// If this machine has no such heap.
    fn heap(&self) -> dmaload::Result<Arc<dyn Heap>>;

    /// The page size that the options ask for.
    fn pages(&self) -> Pages;

    /// Loads these files and returns what `recorder` records of them.
    ///
    /// # Errors
    /// The load's.
    fn manifest(&self, paths: &[PathBuf], recorder: Recorder) -> anyhow::Result<Manifest>;
}

/// Runs a future to its end: one thread is enough, the loader has its own.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(future))
}
