//! From the command line to a loader.

use dmaload::heap::{AnonHeap, MemfdHeap};
use dmaload::{Error, LoadOptions, Loader, Result};

use crate::args::{Engine, HeapName};

/// The loader that the command line asks for.
pub(crate) fn loader(arguments: &Engine) -> Result<Loader> {
    if arguments.dma_buf {
        return Err(no_dma_buf(arguments.heap));
    }
    let options = LoadOptions::default()
        .layout(arguments.layout)
        .segment_bytes(arguments.segment_size)
        .chunk_bytes(arguments.chunk_size)
        .route(arguments.route.0)
        .strict(arguments.strict)
        .format(arguments.format);
    let builder = Loader::builder().window_bytes(arguments.window).queue_depth(arguments.queue_depth).options(options);
    let pages = arguments.pages.into();
    match arguments.heap {
        HeapName::Auto | HeapName::Memfd => builder.heap(MemfdHeap { pages }),
        HeapName::Anon => builder.heap(AnonHeap { pages }),
    }
    .build()
}

/// A dma-buf was required: something else is never given quietly instead.
fn no_dma_buf(heap: HeapName) -> Error {
    match heap {
        HeapName::Memfd | HeapName::Anon => Error::Config("--dma-buf: neither memfd nor anon memory is a dma-buf".to_owned()),
        HeapName::Auto => Error::NoDescriptor { heap: "auto (memfd)".to_owned(), wanted: "dma-buf" },
    }
}
