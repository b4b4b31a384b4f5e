//! From the command line to a loader.

use std::sync::Arc;

use dmaload::dmabuf::Pages;
use dmaload::heap::{self, AnonHeap, DmaHeap, Heap, MemfdHeap, UdmabufHeap};
use dmaload::{Error, LoadOptions, Loader, LoaderBuilder, Result, Route};

use crate::args::{Engine, HeapName};

/// With a limit of memory, a segment is at most one of so many parts of it.
const MEMORY_PARTS: usize = 4;

/// The loader that the command line asks for.
pub(crate) fn loader(arguments: &Engine) -> Result<Loader> {
    builder(arguments, arguments.route.0, arguments.strict)?.build()
}

/// The same by another route.
pub(crate) fn loader_by(arguments: &Engine, route: Route, strict: bool) -> Result<Loader> {
    builder(arguments, Some(route), strict)?.build()
}

/// The same with a pool of any size.
pub(crate) fn loader_with_pool(arguments: &Engine) -> Result<Loader> {
    builder(arguments, arguments.route.0, arguments.strict)?.pool_bytes(u64::MAX).build()
}

fn builder(arguments: &Engine, route: Option<Route>, strict: bool) -> Result<LoaderBuilder> {
    let mut options = LoadOptions::default()
        .layout(arguments.layout)
        .packed(!arguments.no_pack)
        .chunk_bytes(arguments.chunk_size)
        .prefer(arguments.prefer)
        .strict(strict)
        .format(arguments.format)
        .allow_missing(arguments.allow_missing);
    if let Some(route) = route {
        options = options.route(route);
    }
    if let Some(cache) = arguments.cache {
        options = options.cache(cache);
    }
    if let Some(bytes) = arguments.segment_size {
        options = options.segment_bytes(bytes);
    }
    let mut builder = Loader::builder()
        .window_bytes(arguments.window)
        .queue_depth(arguments.queue_depth)
        .dma_buf(arguments.dma_buf)
        .options(options);
    if let Some(bytes) = arguments.staging {
        builder = builder.staging_bytes(bytes);
    }
    if let Some(bytes) = arguments.memory_limit {
        // The command loads one thing at a time: its segments need not leave room for sixty-four.
        builder = builder.memory_limit_bytes(bytes).max_open_loads(MEMORY_PARTS);
    }
    let (heap, reason) = heap(arguments)?;
    if let Some(reason) = reason {
        builder = builder.note(reason);
    }
    Ok(builder.heap(heap))
}

/// The heap, and why it is this one where that was left to us.
pub(crate) fn heap(arguments: &Engine) -> Result<(Arc<dyn Heap>, Option<String>)> {
    let pages: Pages = arguments.pages.into();
    let udmabuf = arguments.heap == HeapName::Udmabuf || (arguments.heap == HeapName::Auto && arguments.dma_buf);
    if arguments.despite_udmabuf_bug && !udmabuf {
        return Err(Error::Config("--despite-udmabuf-bug is about the heap udmabuf".to_owned()));
    }
    let chosen = |heap: Arc<dyn Heap>| Ok((heap, None));
    match &arguments.heap {
        HeapName::Auto if arguments.dma_buf && !arguments.despite_udmabuf_bug => {
            heap::for_dma_buf(pages).map(|(heap, reason)| (heap, Some(reason)))
        }
        HeapName::Auto if !arguments.dma_buf => chosen(Arc::new(MemfdHeap { pages })),
        HeapName::Memfd => chosen(Arc::new(MemfdHeap { pages })),
        HeapName::Anon => chosen(Arc::new(AnonHeap { pages })),
        HeapName::Auto | HeapName::Udmabuf if arguments.despite_udmabuf_bug => {
            chosen(Arc::new(UdmabufHeap::open_despite_bug(pages)?))
        }
        HeapName::Auto | HeapName::Udmabuf => chosen(Arc::new(UdmabufHeap::open(pages)?)),
        HeapName::DmaHeap(_) if pages != Pages::Auto => {
            Err(Error::Config("--pages: a dma-heap chooses its page sizes itself".to_owned()))
        }
        HeapName::DmaHeap(name) => chosen(Arc::new(DmaHeap::open(name)?)),
    }
}
