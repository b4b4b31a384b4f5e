//! The loader: what a service makes once, and shares.

use std::sync::Arc;
use std::time::Duration;

use dmabuf::Pages;

use crate::engine::settings::{self, Settings};
use crate::engine::{Guard, Leaked};
use crate::error::{Error, Result};
use crate::load::{LoadRequest, Source};
use crate::memory::heap::{Heap, HeapChoice};
use crate::options::load::LoadOptions;
use crate::telemetry::metrics::Metrics;

/// Loads files. Cheap to clone, shared by every task of a service; all its loads share one window of memory, one ring and a
/// handful of threads.
///
/// When the last clone and the last load are gone, the threads drain what is in flight and end by themselves; no drop
/// waits for that. [`Loader::shutdown`] does wait.
///
/// Code that runs on the loader's threads (wakers, subscribers of `tracing`, heaps, verifiers, observers) may call the loader, but
/// must not wait for its loads or its shutdown: either may need the thread that runs this code.
///
/// ```no_run
/// # async fn example() -> dmaload::Result<()> {
/// let loader = dmaload::Loader::builder().window_bytes(128 << 20).build()?;
/// let image = loader.load("model.safetensors").await?;
/// let q = image.tensor("model.layers.0.self_attn.q_proj.weight")?;
/// println!("{} {:?} {} bytes", q.dtype(), q.shape(), q.bytes()?.len());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Loader {
    guard: Arc<Guard>,
}

impl Loader {
    /// A loader with the defaults.
    ///
    /// # Errors
    /// As [`LoaderBuilder::build`].
    pub fn new() -> Result<Self> {
        Loader::builder().build()
    }

    /// Configures a loader.
    pub fn builder() -> LoaderBuilder {
        LoaderBuilder { settings: Settings::default(), heap: None, dma_buf: false, notes: Vec::new() }
    }

    /// Asks for a load of a file, a folder, several files, or a file that is open (see [`Source`]). Await it
    /// for all of it, or consume it in another way: see [`LoadRequest`]. It takes the loader's options
    /// unless it is given its own ([`LoadRequest::options`]).
    ///
    /// Nothing happens before it is consumed, and nothing blocks then: opening and reading happen on the
    /// loader's threads, and every error comes from the load.
    pub fn load(&self, source: impl Into<Source>) -> LoadRequest {
        LoadRequest::new(&self.guard, source.into())
    }

    /// The options of loads that are given none, to be changed for one load.
    pub fn load_options(&self) -> LoadOptions {
        self.guard.settings().load.clone()
    }

    /// Where segments' memory comes from.
    pub fn heap(&self) -> &dyn Heap {
        self.guard.heap()
    }

    /// Frees memory that the pool keeps, the oldest first, until it has at most `keep_bytes`; returns how much that is. The
    /// freeing itself is done by a thread.
    pub fn trim_pool(&self, keep_bytes: u64) -> u64 {
        self.guard.trim_pool(keep_bytes)
    }

    /// What the loader has done so far, and holds now.
    pub fn metrics(&self) -> Metrics {
        self.guard.metrics()
    }

    /// How much memory segments have now: those that are being filled, those that are not dropped, or not freed yet, and what the
    /// pool keeps. What [`LoaderBuilder::memory_limit_bytes`] limits.
    pub fn memory_bytes(&self) -> u64 {
        self.guard.memory_bytes()
    }

    /// How much memory the pool keeps now.
    pub fn pooled_bytes(&self) -> u64 {
        self.guard.pooled_bytes()
    }

    /// Stops: loads that are not finished fail with [`crate::Error::ShutDown`], reads in flight are drained, the threads end.
    ///
    /// Other clones stay valid, but every load on them fails. It begins with the call, and dropping the future does not stop it.
    ///
    /// # Errors
    /// [`Leaked`] when reads are still in flight past the deadline
    /// ([`LoaderBuilder::shutdown_timeout`]): the memory that they may write to is never freed; or
    /// when another thread has not ended by then. If no thread can be started to wait for that,
    /// the deadline is the first poll of the future.
    pub fn shutdown(self) -> impl Future<Output = Result<(), Leaked>> + Send + 'static {
        self.guard.shut_down()
    }
}

/// Configures a [`Loader`]. Made by [`Loader::builder`].
///
/// Worst-case memory that is allocated and not filled is window + staging, over all loads: with
/// the defaults 128 MiB ([`Self::window_bytes`]) and 16 to 72 MiB ([`Self::staging_bytes`]). On a
/// dma-heap, [`Layout::Single`](crate::Layout::Single) adds the one allocation of each such load.
/// Memory that is filled belongs to those who load: it is limited only by
/// [`Self::memory_limit_bytes`] (default: no limit), and kept for later loads only by
/// [`Self::pool_bytes`] (default: none is).
///
/// - A larger window lets more loads go on at full speed side by side, and bounds the size of a
///   segment.
/// - More staging lets more staged reads be in flight, and takes more of the processor's cache.
/// - A deeper queue keeps storage with more latency busy, and other users of the disk wait longer.
/// - A pool spares the next model the allocating, and keeps memory from others until it is short.
/// - Under a limit of memory, loads wait for each other, and segments are smaller.
#[derive(Debug, Clone)]
#[must_use]
pub struct LoaderBuilder {
    settings: Settings,
    heap: Option<Arc<dyn Heap>>,
    dma_buf: bool,
    notes: Vec<String>,
}

impl LoaderBuilder {
    /// The default of [`Self::window_bytes`].
    pub const WINDOW_BYTES: u64 = settings::WINDOW_BYTES;
    /// The default of [`Self::queue_depth`]. A load alone may have 32 of them, and reads its first 64 MiB with 32.
    pub const QUEUE_DEPTH: usize = settings::QUEUE_DEPTH;
    /// Staging at the start. A load alone may have 12 MiB of it: more does not stay in the processor's
    /// cache. It grows by 4 MiB for each thread that copies besides the first two: see
    /// [`Self::staging_bytes`].
    pub const STAGING_BYTES: u64 = settings::STAGING_BYTES;

    /// Where segments' memory comes from. Default: [`HeapChoice::Auto`].
    pub fn heap(mut self, heap: impl Heap) -> Self {
        self.heap = Some(Arc::new(heap));
        self
    }

    /// Requires dma-bufs: without [`LoaderBuilder::heap`], the heap is [`HeapChoice::DmaBuf`].
    /// Default: false.
    pub fn dma_buf(mut self, required: bool) -> Self {
        self.dma_buf = required;
        self
    }

    /// The most bytes that may be allocated and not yet filled, over all loads: at least a segment. One load alone takes three quarters of it
    /// at most, where at least four of its allocations have room. Default: [`Self::WINDOW_BYTES`], 128 MiB.
    pub fn window_bytes(mut self, bytes: u64) -> Self {
        self.settings.window_bytes = bytes;
        self
    }

    /// Reads in flight at once, over all loads, from 1 to 4096; one load alone has three quarters of them at most. Default: [`Self::QUEUE_DEPTH`].
    pub fn queue_depth(mut self, reads: usize) -> Self {
        self.settings.queue_depth = reads;
        self
    }

    /// The most memory that [`Route::Bounce`](crate::Route::Bounce) stages reads in, from 2 MiB to 1 GiB.
    /// It is taken when a load first needs it, and kept. One load alone has three quarters of it at most. Default: [`Self::STAGING_BYTES`], 16 MiB, and 4 MiB
    /// more for each thread that copies besides the first two: up to 72 MiB on a machine with 16 CPUs or more, and never more
    /// than 16 MiB on one with two.
    ///
    /// The threads that copy follow what is measured: where two are always busy, another one is tried, and kept if it
    /// makes loads faster; up to one for each CPU, and 16.
    pub fn staging_bytes(mut self, bytes: u64) -> Self {
        self.settings.staging_is_chosen = true;
        self.settings.staging_bytes = bytes;
        self
    }

    /// How much memory of dropped segments is kept for loads to come. Such memory needs no allocating, zeroing or populating,
    /// which is most of the work on small pages. It is used again for a segment of the same size, so for a model of the same
    /// size and layout. Only segments whose descriptors never left are kept; when memory gets short, an allocation
    /// takes it from the pool before it fails; and where the kernel tells of memory pressure (PSI), all of it is
    /// freed when others wait for memory. Default: 0, nothing is kept.
    pub fn pool_bytes(mut self, bytes: u64) -> Self {
        self.settings.pool_bytes = bytes;
        self
    }

    /// The most memory that segments may have, over all loads: those that are being filled, those whose consumers have not dropped
    /// them, and what the pool keeps. A consumer that drops what it has used can so stream a model larger than memory.
    ///
    /// A load begins when there is room for its largest segment, or, where all of it will be in
    /// memory (an image, or [`LoadRequest::start`]), for all of it; until then it waits, in the
    /// order they came. Images of one file system begin in three quarters of the limit together
    /// (or one that needs more, alone), so that a server which does not answer leaves room for
    /// loads of others. One that could never begin fails with [`crate::Error::OverLimit`]. A
    /// consumer that keeps what it was given holds up its own load, and no other. Segments whose
    /// size is left open are small enough for as many loads as may be open at once
    /// ([`Self::max_open_loads`]): a hundredth of the limit, more or less. Default: no limit.
    pub fn memory_limit_bytes(mut self, bytes: u64) -> Self {
        self.settings.memory_limit_bytes = bytes;
        self
    }

    /// Something that the reports of all loads are to say, such as why the caller chose this heap.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// Threads that open files and allocate memory; at least one. Default: two, or one on a machine with one CPU; where
    /// these are always busy, another one is tried, and kept if memory comes faster with it, up to one for each CPU, and
    /// eight. A number that is set stays.
    ///
    /// While one waits for a file whose server does not answer for a second, another thread
    /// takes its place (at most 64).
    pub fn allocator_threads(mut self, threads: usize) -> Self {
        self.settings.allocators_are_chosen = true;
        self.settings.allocator_threads = threads;
        self
    }

    /// Loads that have files open at once; others wait in the order they came. At least one. One
    /// whose opening waits for a server that does not answer does not count. Nor do up to 64 loads
    /// of file systems of which nothing has come for 5 to 10 s while others wait. Default: 64.
    pub fn max_open_loads(mut self, loads: usize) -> Self {
        self.settings.max_open_loads = loads.max(1);
        self
    }

    /// How long [`Loader::shutdown`] waits for reads in flight before it leaks their memory. Default: 10 s.
    pub fn shutdown_timeout(mut self, timeout: Duration) -> Self {
        self.settings.shutdown_timeout = timeout;
        self
    }

    /// The options of loads that are given none of their own ([`LoadRequest::options`]). Default:
    /// [`LoadOptions::new`].
    pub fn load_options(mut self, options: LoadOptions) -> Self {
        self.settings.load = options;
        self
    }

    /// Starts the loader's threads.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for settings that make no sense; [`crate::Error::Start`] when no thread or descriptor can be
    /// had; [`crate::Error::NoDmaBuf`] where dma-bufs are required and can't be had. That io_uring is refused is no error here:
    /// loads take the next route, and say so.
    pub fn build(self) -> Result<Loader> {
        let (heap, reason) = match self.heap {
            Some(heap) if self.dma_buf && !heap.exports() => {
                return Err(Error::Config(format!("dma-bufs are required, and the heap {} gives none", heap.name())));
            }
            Some(heap) => (heap, None),
            None if self.dma_buf => HeapChoice::DmaBuf.open(Pages::Auto)?,
            None => HeapChoice::Auto.open(Pages::Auto)?,
        };
        tracing::debug!(heap = %heap.name(), reason, "heap");
        let notes = self.notes.into_iter().chain(reason).chain(heap.notes()).collect();
        Ok(Loader { guard: Guard::start(self.settings, heap, notes)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Image;
    use crate::error::Error;
    use crate::files::file_system::tests::ON_NFS;
    use crate::memory::heap::AnonHeap;
    use crate::ring::can_read_buffered;
    use crate::route::{Attempt, Route};

    /// A file of the length that is measured, each MiB of which begins with its number, taken for one on NFS.
    fn on_nfs() -> tempfile::NamedTempFile {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(512 << 20).unwrap();
        for number in 0..512_u64 {
            file.as_file().write_all_at(&(number + 1).to_le_bytes(), number << 20).unwrap();
        }
        file.as_file().sync_all().unwrap();
        ON_NFS.lock().unwrap().push(file.as_file().metadata().unwrap().ino());
        file
    }

    fn has_its_bytes(image: &Image) -> bool {
        let bytes = image.files()[0].bytes().unwrap();
        let number = |block: &[u8]| u64::from_le_bytes(*block.first_chunk().unwrap());
        bytes.len() == 512 << 20 && bytes.chunks(1 << 20).map(number).eq(1..=512)
    }

    #[tokio::test]
    async fn on_nfs_reads_through_the_page_cache_are_measured_beside_the_others() {
        if !can_read_buffered() {
            return;
        }
        let file = on_nfs();
        // What has no direct reads (tmpfs before Linux 6.6) leaves nothing to choose from.
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT;
        if rustix::fs::open(file.path(), flags, rustix::fs::Mode::empty()).is_err() {
            return;
        }
        let loader = Loader::builder().heap(AnonHeap::default()).build().unwrap();
        let image = loader.load(file.path()).await.unwrap();
        assert!(has_its_bytes(&image));
        let report = image.report();
        let measured = report.measured.expect("512 MiB are enough");
        assert!(measured.buffered_bytes_per_second.is_some(), "{measured:?}");
        // Some of it went that way, which nothing has refused.
        assert_eq!((report.route, report.cached_bytes), (Route::UringBuffered, 0));
        let steps: Vec<_> = report.fallbacks.iter().map(|step| (step.to, step.attempt)).collect();
        assert_eq!(steps, [(Route::PreadDirect, Attempt::RingOnOther)]);
        drop(image);
        let strict = loader.load_options().strict(true);
        let refused = loader.load(file.path()).options(strict.clone()).await.unwrap_err();
        assert!(matches!(refused, Error::Refused { attempt: Attempt::RingOnOther, .. }), "{refused}");
        // Direct reads by threads are what this one asks for, and it takes no others.
        let image = loader.load(file.path()).options(strict.clone().route(Route::PreadDirect)).await.unwrap();
        assert_eq!((image.report().route, image.report().measured), (Route::PreadDirect, None));
        let image = loader.load(file.path()).options(strict.route(Route::UringBuffered)).await.unwrap();
        assert!(has_its_bytes(&image));
        assert_eq!((image.report().route, image.report().fallbacks.len()), (Route::UringBuffered, 0));
    }
}
