//! The loader, which a service creates once and shares among its tasks.

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

/// Loads files. A loader is cheap to clone, and all tasks of a service should share one: its loads
/// share one memory window, one ring and a few threads.
///
/// After the last clone and the last load are dropped, the threads drain the reads in flight and
/// exit. (The thread that frees segments stays until the last segment is dropped.) Dropping does
/// not wait for that; [`Loader::shutdown`] does.
///
/// Code that runs on the loader's threads (wakers, `tracing` subscribers, heaps, verifiers,
/// observers) may call the loader, but must not wait for its loads or its shutdown: either may
/// need the thread that this code runs on.
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
    /// Creates a loader with the default settings.
    ///
    /// # Errors
    /// The same as for [`LoaderBuilder::build`].
    pub fn new() -> Result<Self> {
        Loader::builder().build()
    }

    /// Configures a loader.
    pub fn builder() -> LoaderBuilder {
        LoaderBuilder { settings: Settings::default(), heap: None, dma_buf: false, notes: Vec::new() }
    }

    /// Prepares a load of a file, a folder, several files, or an open file (see [`Source`]). Await
    /// the returned request to load everything; [`LoadRequest`] lists the other ways to consume
    /// it. The load uses the loader's options unless [`LoadRequest::options`] sets others.
    ///
    /// Nothing happens until the request is consumed. Consuming it does not block: files are
    /// opened and read on the loader's threads, and the load returns all errors.
    pub fn load(&self, source: impl Into<Source>) -> LoadRequest {
        LoadRequest::new(&self.guard, source.into())
    }

    /// Returns the options of loads that don't set their own. Use them as a starting point for the
    /// options of one load.
    pub fn load_options(&self) -> LoadOptions {
        self.guard.settings().load.clone()
    }

    /// Returns the heap that allocates segments.
    pub fn heap(&self) -> &dyn Heap {
        self.guard.heap()
    }

    /// Frees pooled memory, oldest first, until at most `keep_bytes` remain. Returns the number of
    /// bytes removed from the pool; a background thread frees them.
    pub fn trim_pool(&self, keep_bytes: u64) -> u64 {
        self.guard.trim_pool(keep_bytes)
    }

    /// Returns what the loader has done so far and what it holds now.
    pub fn metrics(&self) -> Metrics {
        self.guard.metrics()
    }

    /// Returns how many bytes of memory are currently occupied by segments, whether these are
    /// being filled, held by consumers, waiting to be freed, or kept in the pool. This is what
    /// [`LoaderBuilder::memory_limit_bytes`] limits.
    pub fn memory_bytes(&self) -> u64 {
        self.guard.memory_bytes()
    }

    /// Returns how many bytes of memory the pool keeps now.
    pub fn pooled_bytes(&self) -> u64 {
        self.guard.pooled_bytes()
    }

    /// Shuts down the loader: unfinished loads fail with [`crate::Error::ShutDown`], reads in
    /// flight are drained, and the threads exit.
    ///
    /// Other clones stay valid, but every load on them fails. Shutdown begins with the call;
    /// dropping the future does not stop it.
    ///
    /// # Errors
    /// [`Leaked`] if reads are still in flight at the deadline
    /// ([`LoaderBuilder::shutdown_timeout`]), in which case the memory they may write to is never
    /// freed. Also [`Leaked`] if a thread has not exited shortly after the deadline. A new thread
    /// waits for the deadline; if that thread can't be started, the deadline is treated as passed.
    pub fn shutdown(self) -> impl Future<Output = Result<(), Leaked>> + Send + 'static {
        self.guard.shutdown()
    }
}

/// Configures a [`Loader`]. Created by [`Loader::builder`].
///
/// In the worst case, the memory that is allocated but not filled is window + staging, over all
/// loads. With the defaults, that is 128 MiB ([`Self::window_bytes`]) plus 16 to 72 MiB
/// ([`Self::staging_bytes`]). On a dma-heap, [`Layout::Single`](crate::Layout::Single) adds the
/// size of the files that are being loaded, because the memory for each file is allocated at once.
///
/// Filled memory belongs to the consumers of the loads. [`Self::memory_limit_bytes`] limits it; by
/// default, there is no limit. [`Self::pool_bytes`] keeps dropped memory for later loads; by
/// default, none is kept.
///
/// - A larger window lets more loads run at full speed side by side. The size of a segment must
///   not exceed the window.
/// - More staging allows more staged reads in flight, but occupies more of the CPU cache.
/// - A deeper queue keeps high-latency storage busy, but makes other users of the disk wait
///   longer.
/// - A pool lets later loads reuse memory instead of allocating it, but withholds that memory from
///   other processes until memory runs short.
/// - Under a memory limit, loads may wait for each other, and segments are smaller by default.
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
    /// The default of [`Self::queue_depth`]. A load that runs alone may have 32 reads in flight:
    /// 64 MiB with the default chunk size.
    pub const QUEUE_DEPTH: usize = settings::QUEUE_DEPTH;
    /// The default amount of staging that a loader starts with. A load that runs alone may use 12
    /// MiB of it; the rest is left for loads from other file systems. Staging grows by 4 MiB for
    /// each copier thread after the first two: see [`Self::staging_bytes`].
    pub const STAGING_BYTES: u64 = settings::STAGING_BYTES;

    /// Sets the heap that allocates segments. Default: [`HeapChoice::Auto`].
    pub fn heap(mut self, heap: impl Heap) -> Self {
        self.heap = Some(Arc::new(heap));
        self
    }

    /// Requires dma-bufs. Unless [`LoaderBuilder::heap`] sets a heap, [`HeapChoice::DmaBuf`] is
    /// used. Default: false.
    pub fn dma_buf(mut self, required: bool) -> Self {
        self.dma_buf = required;
        self
    }

    /// Sets the maximum number of bytes that may be allocated but not yet filled, over all loads;
    /// at least one segment. If at least four pieces fit into the window, a single load uses at
    /// most three quarters of it. A piece is at most 16 MiB long or, on a dma-heap, as long as a
    /// segment. Default: [`Self::WINDOW_BYTES`], 128 MiB.
    pub fn window_bytes(mut self, bytes: u64) -> Self {
        self.settings.window_bytes = bytes;
        self
    }

    /// Sets the maximum number of reads in flight over all loads, from 1 to 4096. If the maximum
    /// is at least four, a single load uses at most three quarters of it. Default:
    /// [`Self::QUEUE_DEPTH`], 44.
    pub fn queue_depth(mut self, reads: usize) -> Self {
        self.settings.queue_depth = reads;
        self
    }

    /// Sets the maximum amount of memory for the staging buffers of
    /// [`Route::Bounce`](crate::Route::Bounce), from 2 MiB to 1 GiB. It is allocated as loads need
    /// it, and kept. If staging is at least 8 MiB, a single load uses at most three quarters of
    /// it. Default: [`Self::STAGING_BYTES`], 16 MiB, plus 4 MiB for each copier thread after the
    /// first two: up to 72 MiB on a machine with 16 or more CPUs, and 16 MiB on one with at most
    /// two. An explicit size stays fixed.
    ///
    /// The loader starts with two copier threads and adjusts their number. When all of them are
    /// busy almost all the time, it tries another one and keeps it if copying gets faster, up to
    /// one for each CPU and at most 16.
    pub fn staging_bytes(mut self, bytes: u64) -> Self {
        self.settings.staging_is_chosen = true;
        self.settings.staging_bytes = bytes;
        self
    }

    /// Sets the maximum number of bytes from dropped segments to keep for later loads. Reusing
    /// memory skips allocating, zeroing and populating it, which is most of the work on small
    /// pages.
    ///
    /// Memory is reused only for allocations of exactly the same size. As long as the segment size
    /// stays the same, that applies to most segments of any model. The last segment of a file is
    /// usually shorter, and its memory is reused only if a later allocation has the same length.
    /// Only complete segments that were never handed out are kept. On dma-heaps, none are.
    ///
    /// When memory runs short, an allocation frees pooled memory before it fails. Where the kernel
    /// reports memory pressure (PSI), the whole pool is freed as soon as processes have to wait
    /// for memory. Default: 0, nothing is kept.
    pub fn pool_bytes(mut self, bytes: u64) -> Self {
        self.settings.pool_bytes = bytes;
        self
    }

    /// Sets the maximum number of bytes that segments may occupy, over all loads: segments that
    /// are being filled, segments that consumers still hold, and what the pool keeps. A consumer
    /// that drops segments after use can stream a model larger than the limit.
    ///
    /// A load begins when there is room for its memory. A stream needs room for its largest
    /// segment, and for all segments of its largest tensor if these fit into the limit. An image
    /// needs room for all of its segments, and so does a load begun by [`LoadRequest::start`].
    /// Until then, loads wait in arrival order within their priority. A load that could never
    /// begin fails with [`crate::Error::OverLimit`].
    ///
    /// The images from one file system together reserve at most three quarters of the limit, so
    /// that a server that does not answer leaves room for loads from other file systems. An image
    /// that needs more than that begins only while no other image from its file system occupies or
    /// reserves memory. A consumer that keeps its segments holds up its own load and loads that
    /// have not begun, but no other loads.
    ///
    /// Segments without an explicit size are small enough for as many loads as may be open at once
    /// ([`Self::max_open_loads`]): with the default, a 64th of the limit, but at least 2 MiB.
    /// Default: no limit.
    pub fn memory_limit_bytes(mut self, bytes: u64) -> Self {
        self.settings.memory_limit_bytes = bytes;
        self
    }

    /// Adds a note to the reports of all loads, such as why the caller chose this heap.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// Sets the number of threads that open files and allocate memory; at least one. Default:
    /// initially two, or one on a machine with one CPU. When all of them are busy almost all the
    /// time, the loader tries another one and keeps it if memory is allocated faster, up to one
    /// for each CPU and at most eight. An explicit number stays fixed.
    ///
    /// If a thread waits more than a second for a file whose server does not answer, another
    /// thread takes its place. At most 64 threads are replaced in this way at the same time.
    pub fn allocator_threads(mut self, threads: usize) -> Self {
        self.settings.allocators_are_chosen = true;
        self.settings.allocator_threads = threads;
        self
    }

    /// Sets the maximum number of loads that have files open at once; at least one. Further loads
    /// wait in arrival order. The limit does not apply to a load that is still opening its files
    /// and waits for a server that does not answer. Nor does it apply to up to 64 loads from file
    /// systems that have delivered nothing for 5 to 10 s while other loads wait. Default: 64.
    pub fn max_open_loads(mut self, loads: usize) -> Self {
        self.settings.max_open_loads = loads.max(1);
        self
    }

    /// Sets how long [`Loader::shutdown`] waits for reads in flight before leaking their memory.
    /// Default: 10 s.
    pub fn shutdown_timeout(mut self, timeout: Duration) -> Self {
        self.settings.shutdown_timeout = timeout;
        self
    }

    /// Sets the options of loads that don't set their own with [`LoadRequest::options`]. Default:
    /// [`LoadOptions::new`].
    pub fn load_options(mut self, options: LoadOptions) -> Self {
        self.settings.load = options;
        self
    }

    /// Creates the loader and starts its threads.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for invalid settings; [`crate::Error::Start`] if a thread or
    /// descriptor can't be created; [`crate::Error::NoDmaBuf`] if dma-bufs are required but not
    /// available; [`crate::Error::Panicked`] if the heap panics. If the kernel refuses io_uring,
    /// that is not an error: loads fall back to a lower route and report it.
    pub fn build(self) -> Result<Loader> {
        let (heap, reason) = match self.heap {
            Some(heap) if self.dma_buf && !heap.exports() => {
                return Err(Error::Config(format!("dma-bufs are required, but the heap {} does not provide any", heap.name())));
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

    /// Creates a file that is long enough for its load to be measured and that pretends to be on
    /// NFS. Each MiB begins with its number, counted from 1.
    fn file_on_nfs() -> tempfile::NamedTempFile {
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
    async fn reads_through_the_page_cache_are_measured_on_nfs() {
        if !can_read_buffered() {
            return;
        }
        let file = file_on_nfs();
        // Without direct reads (as on tmpfs before Linux 6.6), there is nothing to choose from.
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT;
        if rustix::fs::open(file.path(), flags, rustix::fs::Mode::empty()).is_err() {
            return;
        }
        let loader = Loader::builder().heap(AnonHeap::default()).build().unwrap();
        let image = loader.load(file.path()).await.unwrap();
        assert!(has_its_bytes(&image));
        let report = image.report();
        let measured = report.measured.expect("a load of 512 MiB should be measured");
        assert!(measured.buffered_bytes_per_second.is_some(), "{measured:?}");
        // The load chose to read through the page cache, so that is not reported as a fallback.
        assert_eq!((report.route, report.cached_bytes), (Route::UringBuffered, 0));
        let steps: Vec<_> = report.fallbacks.iter().map(|step| (step.to, step.attempt)).collect();
        assert_eq!(steps, [(Route::PreadDirect, Attempt::RingOnOther)]);
        drop(image);
        let strict = loader.load_options().strict(true);
        let refused = loader.load(file.path()).options(strict.clone()).await.unwrap_err();
        assert!(matches!(refused, Error::Refused { attempt: Attempt::RingOnOther, .. }), "{refused}");
        // This load requests direct reads on threads, so it must not measure other ways.
        let image = loader.load(file.path()).options(strict.clone().route(Route::PreadDirect)).await.unwrap();
        assert_eq!((image.report().route, image.report().measured), (Route::PreadDirect, None));
        let image = loader.load(file.path()).options(strict.route(Route::UringBuffered)).await.unwrap();
        assert!(has_its_bytes(&image));
        assert_eq!((image.report().route, image.report().fallbacks.len()), (Route::UringBuffered, 0));
    }
}
