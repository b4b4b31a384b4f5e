//! The interface through which the bench creates the loaders to measure.

use std::path::PathBuf;
use std::sync::Arc;

use dmabuf::Pages;
use dmaload::heap::Heap;
use dmaload::verify::{Manifest, Recorder};
use dmaload::{Loader, Route};

/// Creates the loaders to measure, from the options of the program that runs the bench.
///
/// Each method is called only in the process of a mode that needs it. A mode that does not use the
/// heap therefore runs even if the heap is not available.
pub trait Engine {
    /// Creates a loader with the program's options.
    ///
    /// # Errors
    /// If this machine lacks something that the options require, or the options contradict each
    /// other.
    fn loader(&self) -> dmaload::Result<Loader>;

    /// Creates a strict loader that starts with this route, and fails instead of falling back to a
    /// slower one.
    ///
    /// # Errors
    /// Those of [`Engine::loader`].
    fn loader_by(&self, route: Route) -> dmaload::Result<Loader>;

    /// Creates a loader with an unlimited pool.
    ///
    /// # Errors
    /// Those of [`Engine::loader`].
    fn loader_with_pool(&self) -> dmaload::Result<Loader>;

    /// Returns the heap that the loaders allocate from.
    ///
    /// # Errors
    /// If this machine has no such heap.
    fn heap(&self) -> dmaload::Result<Arc<dyn Heap>>;

    /// Returns the page size that the options select.
    fn pages(&self) -> Pages;

    /// Loads these files, and returns the manifest that `recorder` creates for them.
    ///
    /// # Errors
    /// Those of the load.
    fn manifest(&self, paths: &[PathBuf], recorder: Recorder) -> anyhow::Result<Manifest>;
}

/// Runs a future to completion. One thread is enough, because files are read on other threads:
/// those of the loader, or tokio's threads for blocking calls.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(future))
}
