//! A heap of memfds that are exported as dma-bufs through `/dev/udmabuf`.

use std::borrow::Cow;
use std::ops::Range;
use std::os::fd::OwnedFd;

use dmabuf::{Errno, Part, Udmabuf};

use super::{DmaBuf, Heap, HeapError, Mapping, Memfd, Memory, Pages, Populated, private};
use crate::error::{Error, Result, SizeLimit};
use crate::support::errno;

/// A heap of memfds that are exported as dma-bufs once they are full. Storage devices write
/// straight into the pages that later form the dma-buf. Requires `/dev/udmabuf`.
///
/// Reads go through the mapping of the memfd, because newer kernels can't pin mappings of the
/// dma-buf. On Linux 6.11 to 6.15 the heap uses only small pages, unless it is opened with
/// [`UdmabufHeap::open_despite_bug`]: on these kernels, drivers that map 2 MiB pages into the
/// kernel see wrong bytes (see [`Udmabuf::huge_pages_show_wrong_bytes`]).
#[derive(Debug)]
pub struct UdmabufHeap {
    device: Udmabuf,
    pages: Pages,
    /// A note for the report; `None` unless this kernel has the bug with 2 MiB pages.
    note: Option<String>,
}

impl UdmabufHeap {
    /// The name of this heap.
    pub const NAME: &str = "udmabuf";

    /// Opens the device, and creates one small dma-buf to check that it works.
    ///
    /// # Errors
    /// [`Error::Device`] if the device can't be opened, [`Error::Memory`] if no dma-buf can be
    /// created, and [`Error::Config`] for [`Pages::Huge`] on kernels with the bug.
    pub fn open(pages: Pages) -> Result<Self> {
        Self::with_device(Udmabuf::open()?, pages)
    }

    /// Creates a heap from an open descriptor of `/dev/udmabuf`, for processes that are not
    /// allowed to open the device themselves.
    ///
    /// # Errors
    /// Those of [`UdmabufHeap::open`].
    pub fn from_fd(device: OwnedFd, pages: Pages) -> Result<Self> {
        Self::with_device(Udmabuf::from_fd(device)?, pages)
    }

    fn with_device(device: Udmabuf, pages: Pages) -> Result<Self> {
        let wrong = Udmabuf::huge_pages_show_wrong_bytes();
        match pages {
            Pages::Huge if wrong => Err(Error::Config(
                "on this kernel (Linux 6.11 to 6.15) drivers see wrong bytes in a udmabuf on 2 MiB pages: see docs/kernels.md, and \
                 use UdmabufHeap::open_despite_bug only if no importer maps it into the kernel"
                    .to_owned(),
            )),
            Pages::Auto if wrong => {
                let note = "small pages: on this kernel (Linux 6.11 to 6.15) drivers see wrong bytes in a udmabuf on 2 MiB pages";
                Self::with(device, Pages::Small, Some(note.to_owned()))
            }
            pages => Self::with(device, pages, None),
        }
    }

    /// Like [`UdmabufHeap::open`], but permits 2 MiB pages even on kernels with the bug, where
    /// importers that map the dma-buf into the kernel see wrong bytes. Use this only if no
    /// importer maps the dma-buf that way. An importer that only uses its DMA addresses is not
    /// affected.
    ///
    /// # Errors
    /// [`Error::Device`] if the device can't be opened, and [`Error::Memory`] if no dma-buf can be
    /// created.
    pub fn open_despite_bug(pages: Pages) -> Result<Self> {
        let wrong = Udmabuf::huge_pages_show_wrong_bytes() && pages != Pages::Small;
        let note = "2 MiB pages are used despite this kernel's bug: drivers that map the udmabuf see wrong bytes";
        Self::with(Udmabuf::open()?, pages, wrong.then(|| note.to_owned()))
    }

    fn with(device: Udmabuf, pages: Pages, note: Option<String>) -> Result<Self> {
        let heap = UdmabufHeap { device, pages, note };
        let refused = |refusal| Error::Memory { heap: Self::NAME.to_owned(), refusal, loaded_bytes: 0, planned_bytes: 0 };
        let memory = heap.allocate(dmabuf::page_bytes()).map_err(refused)?;
        heap.make_dma_buf(&memory).map_err(refused)?;
        Ok(heap)
    }

    /// Whether to avoid huge pages, because drivers would see wrong bytes in them.
    fn avoids_bug(&self) -> bool {
        self.pages == Pages::Small && Udmabuf::huge_pages_show_wrong_bytes()
    }

    fn make_dma_buf(&self, memory: &Memory) -> Result<DmaBuf, HeapError> {
        let failed = |errno| HeapError::new("make a udmabuf", 0, errno);
        let memfd = memory.memfd().ok_or(failed(Errno::EBADFD))?;
        self.device.create(Part { memfd, offset: 0, bytes: memfd.bytes() })
    }
}

/// Returns the number of bytes in the memfd that are not backed by pages.
fn missing_bytes(memfd: &Memfd) -> rustix::io::Result<u64> {
    let present_bytes = rustix::fs::fstat(memfd)?.st_blocks.cast_unsigned().saturating_mul(512);
    Ok((memfd.bytes() as u64).saturating_sub(present_bytes))
}

// SAFETY: memfds are created as in `MemfdHeap`, and `Mapping::populate` changes no bytes.
// `exports` returns true, and `export` returns a dma-buf of all of the memfd's pages. The returned
// value holds the dma-buf's only descriptor.
#[allow(unsafe_code)]
unsafe impl Heap for UdmabufHeap {
    fn name(&self) -> Cow<'_, str> {
        Self::NAME.into()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        Memfd::create("dmaload", bytes).map(Memory::Memfd)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, HeapError> {
        let bytes = part.len();
        let populated = mapping.populate(memory, part, self.pages)?;
        let huge = populated.pages.is_some_and(|pages| pages.huge_bytes > 0);
        if huge && self.avoids_bug() {
            // No kernel is known to ignore the advice against huge pages. If one does, fail rather
            // than let drivers see wrong bytes.
            return Err(HeapError::new("keep 2 MiB pages out of a udmabuf", bytes, Errno::EOPNOTSUPP));
        }
        Ok(populated)
    }

    fn exports(&self) -> bool {
        true
    }

    fn export(&self, memory: &Memory) -> Result<DmaBuf, HeapError> {
        if let Some(memfd) = memory.memfd().filter(|_| self.avoids_bug()) {
            let refused = |errno| HeapError::new("export memory that was not populated", memfd.bytes(), errno);
            // The udmabuf driver would allocate missing pages itself. It might choose huge ones,
            // because the mapping's advice does not apply to it.
            if missing_bytes(memfd).map_err(|errno| refused(errno::from_rustix(errno)))? > 0 {
                return Err(refused(Errno::EINVAL));
            }
        }
        self.make_dma_buf(memory)
    }

    fn size_limit(&self) -> Option<SizeLimit> {
        let setting = format!("{}/size_limit_mb", Udmabuf::PARAMETERS);
        Udmabuf::limits().size_bytes.map(|bytes| SizeLimit::new(bytes, setting, 1 << 20))
    }

    fn notes(&self) -> Vec<String> {
        self.note.iter().cloned().collect()
    }

    fn pages(&self) -> Pages {
        self.pages
    }

    fn is_own(&self, _: private::Key) -> bool {
        true
    }
}
