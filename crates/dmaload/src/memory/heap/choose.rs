//! Chooses a heap by name.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use dmabuf::Udmabuf;

use super::{AnonHeap, DmaHeap, Heap, MemfdHeap, Pages, UdmabufHeap};
use crate::error::{Error, Result};

/// A heap to open, chosen by name.
///
/// | name | heap |
/// |---|---|
/// | `auto` | [`MemfdHeap`] |
/// | `dma-buf` | [`UdmabufHeap`], which makes dma-bufs without a copy, or else the dma-heap `system` |
/// | `memfd` | [`MemfdHeap`] |
/// | `anon` | [`AnonHeap`] |
/// | `udmabuf` | [`UdmabufHeap`] |
/// | `dma-heap:NAME` | [`DmaHeap`] |
///
/// ```
/// use dmaload::heap::HeapChoice;
///
/// let choice: HeapChoice = "dma-heap:system".parse()?;
/// assert_eq!(choice, HeapChoice::DmaHeap("system".to_owned()));
/// assert_eq!(choice.to_string(), "dma-heap:system");
/// # Ok::<_, String>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum HeapChoice {
    /// Any heap; currently memfd.
    #[default]
    Auto,
    /// A heap that provides dma-bufs: udmabuf, or the dma-heap `system` if udmabuf can't be
    /// opened.
    DmaBuf,
    /// Memfds.
    Memfd,
    /// Private pages.
    Anon,
    /// Memfds, exported by `/dev/udmabuf`.
    Udmabuf,
    /// The dma-heap with this name.
    DmaHeap(String),
}

impl HeapChoice {
    const DMA_HEAP: &str = "dma-heap:";

    /// Opens the heap. For [`HeapChoice::DmaBuf`], also returns why this heap was chosen.
    ///
    /// `pages` is the page size to populate with.
    ///
    /// # Errors
    /// - [`Error::NoDmaBuf`] for [`HeapChoice::DmaBuf`] if neither udmabuf nor the dma-heap
    ///   `system` can be opened. The dma-heap is not tried if `pages` is not [`Pages::Auto`].
    /// - [`Error::Config`] for [`HeapChoice::DmaHeap`] with `pages` other than [`Pages::Auto`],
    ///   because a dma-heap's driver chooses the page sizes.
    /// - The errors of [`UdmabufHeap::open`] and [`DmaHeap::open`].
    pub fn open(&self, pages: Pages) -> Result<(Arc<dyn Heap>, Option<String>)> {
        let heap: Arc<dyn Heap> = match self {
            HeapChoice::Auto | HeapChoice::Memfd => Arc::new(MemfdHeap { pages }),
            HeapChoice::DmaBuf => return open_for_dma_buf(pages).map(|(heap, reason)| (heap, Some(reason))),
            HeapChoice::Anon => Arc::new(AnonHeap { pages }),
            HeapChoice::Udmabuf => Arc::new(UdmabufHeap::open(pages)?),
            HeapChoice::DmaHeap(_) if pages != Pages::Auto => {
                return Err(Error::Config("pages: a dma-heap chooses its page sizes itself: request no page size".to_owned()));
            }
            HeapChoice::DmaHeap(name) => Arc::new(DmaHeap::open(name)?),
        };
        Ok((heap, None))
    }
}

impl FromStr for HeapChoice {
    type Err = String;

    /// # Errors
    /// A message with the unknown name and a list of the valid names.
    fn from_str(name: &str) -> Result<Self, String> {
        match (name, name.strip_prefix(Self::DMA_HEAP)) {
            ("auto", _) => Ok(HeapChoice::Auto),
            ("dma-buf", _) => Ok(HeapChoice::DmaBuf),
            (MemfdHeap::NAME, _) => Ok(HeapChoice::Memfd),
            (AnonHeap::NAME, _) => Ok(HeapChoice::Anon),
            (UdmabufHeap::NAME, _) => Ok(HeapChoice::Udmabuf),
            (_, Some(heap)) if !heap.is_empty() => Ok(HeapChoice::DmaHeap(heap.to_owned())),
            _ => Err(format!("no such heap: {name:?}; the heaps are auto, dma-buf, memfd, anon, udmabuf, dma-heap:NAME")),
        }
    }
}

impl fmt::Display for HeapChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HeapChoice::Auto => f.write_str("auto"),
            HeapChoice::DmaBuf => f.write_str("dma-buf"),
            HeapChoice::Memfd => f.write_str(MemfdHeap::NAME),
            HeapChoice::Anon => f.write_str(AnonHeap::NAME),
            HeapChoice::Udmabuf => f.write_str(UdmabufHeap::NAME),
            HeapChoice::DmaHeap(name) => write!(f, "{}{name}", Self::DMA_HEAP),
        }
    }
}

fn open_for_dma_buf(pages: Pages) -> Result<(Arc<dyn Heap>, String)> {
    let udmabuf = match UdmabufHeap::open(pages) {
        Ok(heap) => {
            let reason = format!("udmabuf: dma-bufs are required, and {} makes them without a copy", Udmabuf::PATH);
            return Ok((Arc::new(heap), reason));
        }
        // An invalid setting must not be hidden by trying another heap.
        Err(error @ Error::Config(_)) => return Err(error),
        Err(error) => format!("udmabuf: {error}"),
    };
    if pages != Pages::Auto {
        return Err(Error::NoDmaBuf {
            tried: vec![udmabuf, "dma-heap:system: a dma-heap chooses its page sizes itself".to_owned()],
        });
    }
    match DmaHeap::open("system") {
        Ok(heap) => Ok((Arc::new(heap), format!("dma-heap:system: dma-bufs are required, and {udmabuf}"))),
        Err(error) => Err(Error::NoDmaBuf { tried: vec![udmabuf, format!("dma-heap:system: {error}")] }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heap_for_dma_bufs_exports_or_explains_each_candidate() {
        match HeapChoice::DmaBuf.open(Pages::Auto) {
            Ok((heap, reason)) => {
                assert!(heap.exports());
                let reason = reason.expect("`DmaBuf` should return a reason");
                assert!(reason.starts_with(&*heap.name()), "{reason}");
            }
            Err(Error::NoDmaBuf { tried }) => {
                assert!(tried[0].contains("/dev/udmabuf") && tried[1].contains("/dev/dma_heap/system"), "{tried:?}");
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn page_size_is_not_ignored_without_udmabuf() {
        match HeapChoice::DmaBuf.open(Pages::Small) {
            Ok((heap, _)) => assert_eq!(&*heap.name(), "udmabuf"),
            Err(Error::NoDmaBuf { tried }) => assert!(tried[1].contains("chooses its page sizes itself"), "{tried:?}"),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn heap_choice_round_trips_through_its_name() {
        for name in ["auto", "dma-buf", "memfd", "anon", "udmabuf", "dma-heap:system"] {
            assert_eq!(name.parse::<HeapChoice>().unwrap().to_string(), name);
        }
        for name in ["", "Memfd", "dma-heap", "dma-heap:", "system"] {
            let error = name.parse::<HeapChoice>().unwrap_err();
            assert!(error.contains(&format!("{name:?}")) && error.contains("dma-heap:NAME"), "{error}");
        }
    }

    #[test]
    fn heap_has_the_name_and_pages_of_its_choice() {
        for (choice, name) in [(HeapChoice::Auto, "memfd"), (HeapChoice::Memfd, "memfd"), (HeapChoice::Anon, "anon")] {
            let (heap, reason) = choice.open(Pages::Small).unwrap();
            assert_eq!((&*heap.name(), heap.pages(), reason), (name, Pages::Small, None));
        }
        let refused = HeapChoice::DmaHeap("system".to_owned()).open(Pages::Huge).unwrap_err();
        assert!(matches!(refused, Error::Config(_)), "{refused}");
    }
}
