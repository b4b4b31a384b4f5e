//! Which heap a loader takes when the caller names none.

use std::sync::Arc;

use dmabuf::{Pages, Udmabuf};

use super::Heap;
use super::{DmaHeap, MemfdHeap, UdmabufHeap};
use crate::error::{Error, Result};

/// The heap for callers that require nothing of it: memfd.
pub fn auto() -> MemfdHeap {
    MemfdHeap::default()
}

/// The heap for callers that require dma-bufs, and why it is this one: udmabuf (no copy), else the dma-heap `system`.
///
/// # Errors
/// [`Error::NoDmaBuf`], with what each of them said.
pub fn for_dma_buf(pages: Pages) -> Result<(Arc<dyn Heap>, String)> {
    let udmabuf = match UdmabufHeap::open(pages) {
        Ok(heap) => {
            let reason = format!("udmabuf: dma-bufs are required, and {} makes them without a copy", Udmabuf::PATH);
            return Ok((Arc::new(heap), reason));
        }
        // A setting that makes no sense is not mended by another heap.
        Err(error @ Error::Config(_)) => return Err(error),
        Err(error) => format!("udmabuf: {error}"),
    };
    match DmaHeap::open("system") {
        Ok(heap) => Ok((Arc::new(heap), format!("dma-heap:system: dma-bufs are required, and {udmabuf}"))),
        Err(error) => Err(Error::NoDmaBuf { tried: vec![udmabuf, format!("dma-heap:system: {error}")] }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_heap_for_dma_bufs_exports_or_says_what_each_candidate_lacks() {
        match for_dma_buf(Pages::Auto) {
            Ok((heap, reason)) => {
                assert!(heap.exports());
                assert!(reason.starts_with(&*heap.name()), "{reason}");
            }
            Err(Error::NoDmaBuf { tried }) => {
                assert!(tried[0].contains("/dev/udmabuf") && tried[1].contains("/dev/dma_heap/system"), "{tried:?}");
            }
            Err(other) => panic!("{other}"),
        }
    }
}
