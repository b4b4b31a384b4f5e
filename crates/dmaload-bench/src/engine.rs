//! The engine that is measured.

use std::path::PathBuf;
use std::sync::Arc;

use dmaload::dmabuf::Pages;
use dmaload::heap::Heap;
use dmaload::verify::{Manifest, Recorder};
use dmaload::{Loader, Route};

/// Makes the engine that is measured, by the options of the program that runs the bench.
///
/// Each method is called when its mode needs it, in the process of that mode: a mode that needs no heap must not fail
/// for want of one.
pub trait Engine {
    /// A loader.
    ///
    /// # Errors
    /// When this machine has no such thing, or the options contradict each other.
    fn loader(&self) -> dmaload::Result<Loader>;

    /// A loader by this route alone: it fails rather than take a lower one.
    ///
    /// # Errors
    /// As [`Engine::loader`].
    fn loader_by(&self, route: Route) -> dmaload::Result<Loader>;

    /// A loader with a pool of any size.
    ///
    /// # Errors
    /// As [`Engine::loader`].
    fn loader_with_pool(&self) -> dmaload::Result<Loader>;

    /// The heap of its loaders.
    ///
    /// # Errors
    /// When this machine has no such heap.
    fn heap(&self) -> dmaload::Result<Arc<dyn Heap>>;

    /// The page size that was asked for.
    fn pages(&self) -> Pages;

    /// What `recorder` records while these files are loaded.
    ///
    /// # Errors
    /// The load's.
    fn manifest(&self, paths: &[PathBuf], recorder: Recorder) -> anyhow::Result<Manifest>;
}

/// Runs a future to its end: one thread is enough, the loader has its own.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_time().build()?.block_on(future))
}
