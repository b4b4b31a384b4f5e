//! Where segments' memory comes from.
//!
//! | heap | memory | a segment has |
//! |---|---|---|
//! | [`MemfdHeap`] | memory files | a memfd |
//! | [`AnonHeap`] | private pages | no descriptor |
//! | [`UdmabufHeap`] | memory files, exported by `/dev/udmabuf` | a dma-buf, and a memfd |
//! | [`DmaHeap`] | a dma-heap's, `/dev/dma_heap/NAME` | a dma-buf |

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use dmabuf::{DmaBuf, Mapping, Memfd, Memory, Pages, Part, Populated, Udmabuf};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::{Error, Result};

/// A source of memory for segments.
///
/// The loader alone may write to the memory that it was given, and reads may go on writing to it after a load was dropped:
/// an implementation keeps no descriptor and no mapping of it that it writes through. (A memfd is sealed against writes
/// before any segment of it is shown.)
///
/// Implement it to add a vendor's allocator, or around another heap to count, slow or fail its calls. All calls come
/// from the loader's own threads, so they may block.
pub trait Heap: fmt::Debug + Send + Sync + 'static {
    /// The name used in reports and errors.
    fn name(&self) -> Cow<'_, str>;

    /// Memory of at least `bytes` bytes, a multiple of the page size. It is mapped, and populated, by the caller.
    ///
    /// # Errors
    /// The kernel's refusal, as it came.
    fn allocate(&self, bytes: usize) -> Result<Memory, dmabuf::Error>;

    /// Puts pages under a part of such memory.
    ///
    /// # Errors
    /// The kernel's refusal, as it came.
    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error>;

    /// Whether its segments have dma-bufs.
    fn exports(&self) -> bool {
        false
    }

    /// Makes a dma-buf of memory that holds all its bytes. Asked only of heaps that export, and only for memory that is no
    /// dma-buf by itself.
    ///
    /// # Errors
    /// The kernel's refusal, as it came.
    fn export(&self, memory: &Memory) -> Result<DmaBuf, dmabuf::Error> {
        Err(dmabuf::Error::new("export memory as a dma-buf", memory.memfd().map_or(0, Memfd::bytes), Errno::OPNOTSUPP))
    }

    /// Whether [`Heap::allocate`] takes all pages at once, so that the window must count them from then on.
    fn allocates_at_once(&self) -> bool {
        false
    }

    /// Whether the CPU reads this memory without its caches, which takes a multiple of the time. Bytes are then observed in
    /// staging ([`crate::Observer`]), not in the segments.
    fn is_uncached(&self) -> bool {
        false
    }

    /// The largest segment that it gives now; looked at for every load.
    fn size_limit(&self) -> Option<SizeLimit> {
        None
    }

    /// What it does otherwise than one might expect, for the report.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

impl<H: Heap + ?Sized> Heap for Arc<H> {
    fn name(&self) -> Cow<'_, str> {
        (**self).name()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, dmabuf::Error> {
        (**self).allocate(bytes)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error> {
        (**self).populate(mapping, memory, part)
    }

    fn exports(&self) -> bool {
        (**self).exports()
    }

    fn export(&self, memory: &Memory) -> Result<DmaBuf, dmabuf::Error> {
        (**self).export(memory)
    }

    fn allocates_at_once(&self) -> bool {
        (**self).allocates_at_once()
    }

    fn is_uncached(&self) -> bool {
        (**self).is_uncached()
    }

    fn size_limit(&self) -> Option<SizeLimit> {
        (**self).size_limit()
    }

    fn notes(&self) -> Vec<String> {
        (**self).notes()
    }
}

/// The most that a heap gives as one segment, and the file in which that is set.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SizeLimit {
    /// The most bytes.
    pub bytes: u64,
    /// The file, in which the limit stands in units of `unit_bytes`.
    pub setting: String,
    /// The unit.
    pub unit_bytes: u64,
}

impl SizeLimit {
    /// A limit that is set in a file.
    pub fn new(bytes: u64, setting: impl Into<String>, unit_bytes: u64) -> Self {
        SizeLimit { bytes, setting: setting.into(), unit_bytes }
    }

    /// The command that raises it far enough.
    pub fn raise(&self, wanted_bytes: u64) -> String {
        format!("echo {} > {}", wanted_bytes.div_ceil(self.unit_bytes.max(1)), self.setting)
    }
}

impl fmt::Display for SizeLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {} ({} bytes)", self.setting, self.bytes / self.unit_bytes.max(1), self.bytes)
    }
}

/// Memory files: each segment has a file descriptor that other processes can map. Needs no device and no
/// privilege, so it is what [`auto`] gives.
#[derive(Debug, Clone, Copy, Default)]
pub struct MemfdHeap {
    /// The page size to populate with.
    pub pages: Pages,
}

impl Heap for MemfdHeap {
    fn name(&self) -> Cow<'_, str> {
        "memfd".into()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, dmabuf::Error> {
        Memfd::create("dmaload", bytes).map(Memory::Memfd)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error> {
        mapping.populate(memory, part, self.pages)
    }
}

/// Private memory with transparent huge pages, for callers that need no file descriptor.
#[derive(Debug, Clone, Copy, Default)]
pub struct AnonHeap {
    /// The page size to populate with.
    pub pages: Pages,
}

impl Heap for AnonHeap {
    fn name(&self) -> Cow<'_, str> {
        "anon".into()
    }

    fn allocate(&self, _bytes: usize) -> Result<Memory, dmabuf::Error> {
        Ok(Memory::Anonymous)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error> {
        mapping.populate(memory, part, self.pages)
    }
}

/// Memory files that become dma-bufs when they are full: the device reads straight into the pages that the dma-buf then
/// shows. Needs `/dev/udmabuf`.
///
/// Reads go through the mapping of the memfd, never through one of the dma-buf, which newer kernels can't pin. On Linux 6.11
/// to 6.15 it uses small pages only, since there drivers see wrong bytes on 2 MiB ones (see
/// [`Udmabuf::huge_pages_show_wrong_bytes`]).
#[derive(Debug)]
pub struct UdmabufHeap {
    device: Udmabuf,
    pages: Pages,
    /// Why pages are smaller than they could be.
    note: Option<String>,
}

impl UdmabufHeap {
    /// The name of this heap.
    pub const NAME: &str = "udmabuf";

    /// Opens the device, and makes one small dma-buf to see that it works.
    ///
    /// # Errors
    /// [`Error::Device`]; [`Error::Memory`] when no dma-buf can be made; [`Error::Config`] for [`Pages::Huge`] on kernels
    /// that show wrong bytes there.
    pub fn open(pages: Pages) -> Result<Self> {
        Self::with_device(Udmabuf::open()?, pages)
    }

    /// The same with the device open already: for a process that has no right to open it.
    ///
    /// # Errors
    /// As [`UdmabufHeap::open`].
    pub fn from_fd(device: OwnedFd, pages: Pages) -> Result<Self> {
        Self::with_device(Udmabuf::from_fd(device)?, pages)
    }

    fn with_device(device: Udmabuf, pages: Pages) -> Result<Self> {
        let wrong = Udmabuf::huge_pages_show_wrong_bytes();
        match pages {
            Pages::Huge if wrong => Err(Error::Config(
                "on this kernel (Linux 6.11 to 6.15) drivers see wrong bytes in a udmabuf on 2 MiB pages: see docs/kernels.md, and \
                 ask for them by --pages 2m --despite-udmabuf-bug only if no importer maps it into the kernel"
                    .to_owned(),
            )),
            Pages::Auto if wrong => {
                let note = "small pages: on this kernel (Linux 6.11 to 6.15) drivers see wrong bytes in a udmabuf on 2 MiB ones";
                Self::with(device, Pages::Small, Some(note.to_owned()))
            }
            pages => Self::with(device, pages, None),
        }
    }

    /// As [`UdmabufHeap::open`], with 2 MiB pages also where importers that map the dma-buf into the kernel see wrong bytes
    /// on them. For those who know that theirs do not: one that only takes its addresses for DMA does not.
    ///
    /// # Errors
    /// As [`UdmabufHeap::open`].
    pub fn open_despite_bug(pages: Pages) -> Result<Self> {
        let wrong = Udmabuf::huge_pages_show_wrong_bytes() && pages != Pages::Small;
        let note = "2 MiB pages despite the bug of this kernel: drivers that map the udmabuf see wrong bytes";
        Self::with(Udmabuf::open()?, pages, wrong.then(|| note.to_owned()))
    }

    fn with(device: Udmabuf, pages: Pages, note: Option<String>) -> Result<Self> {
        let heap = UdmabufHeap { device, pages, note };
        let refused = |refusal| Error::Memory { heap: Self::NAME.to_owned(), refusal, loaded_bytes: 0, planned_bytes: 0 };
        let memory = heap.allocate(dmabuf::page_bytes()).map_err(refused)?;
        heap.export(&memory).map_err(refused)?;
        Ok(heap)
    }
}

impl Heap for UdmabufHeap {
    fn name(&self) -> Cow<'_, str> {
        Self::NAME.into()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, dmabuf::Error> {
        Memfd::create("dmaload", bytes).map(Memory::Memfd)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error> {
        let bytes = part.len();
        let populated = mapping.populate(memory, part, self.pages)?;
        let huge = populated.pages.is_some_and(|pages| pages.huge_bytes > 0);
        if huge && self.pages == Pages::Small && Udmabuf::huge_pages_show_wrong_bytes() {
            // Nothing is known to give huge pages here against the advice; should something do, its bytes are not shown.
            return Err(dmabuf::Error::new("keep 2 MiB pages out of a udmabuf", bytes, Errno::OPNOTSUPP));
        }
        Ok(populated)
    }

    fn exports(&self) -> bool {
        true
    }

    fn export(&self, memory: &Memory) -> Result<DmaBuf, dmabuf::Error> {
        let failed = |errno| dmabuf::Error::new("make a udmabuf", 0, errno);
        let memfd = memory.memfd().ok_or(failed(Errno::BADFD))?;
        self.device.create(Part { memfd, offset: 0, bytes: memfd.bytes() })
    }

    fn size_limit(&self) -> Option<SizeLimit> {
        let setting = format!("{}/size_limit_mb", Udmabuf::PARAMETERS);
        Udmabuf::limits().size_bytes.map(|bytes| SizeLimit::new(bytes, setting, 1 << 20))
    }

    fn notes(&self) -> Vec<String> {
        self.note.iter().cloned().collect()
    }
}

/// A dma-heap of this machine: `system`, a CMA region, or what the vendor offers.
///
/// The kernel's own system heap gives mappings that can't be pinned, so reads are bounced ([`crate::Route::Bounce`]); where a
/// mapping can be pinned, they go straight into it. Which it is, the first load finds out.
#[derive(Debug)]
pub struct DmaHeap {
    device: dmabuf::DmaHeap,
    name: String,
    flags: u64,
}

impl DmaHeap {
    /// Opens the heap of this name.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn open(name: &str) -> Result<Self> {
        Ok(Self::with(dmabuf::DmaHeap::open(name)?))
    }

    /// Takes a heap that is open already: for a process that has no right to open it.
    ///
    /// # Errors
    /// As [`DmaHeap::open`].
    pub fn from_fd(device: OwnedFd) -> Result<Self> {
        Ok(Self::with(dmabuf::DmaHeap::from_fd(device)?))
    }

    fn with(device: dmabuf::DmaHeap) -> Self {
        let name = format!("dma-heap:{}", device.name());
        DmaHeap { device, name, flags: 0 }
    }

    /// Flags for its allocations (`heap_flags` of linux/dma-heap.h). The kernel's own heaps know none, and refuse them; a vendor's may.
    #[must_use]
    pub fn flags(mut self, flags: u64) -> Self {
        self.flags = flags;
        self
    }
}

impl Heap for DmaHeap {
    fn name(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, dmabuf::Error> {
        let fd_flags = OFlags::RDWR | OFlags::CLOEXEC;
        self.device.allocate_with(bytes, fd_flags.bits(), self.flags).map(Memory::DmaBuf)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error> {
        mapping.populate(memory, part, Pages::Auto)
    }

    fn exports(&self) -> bool {
        true
    }

    fn allocates_at_once(&self) -> bool {
        true
    }

    /// By its name, which is all that user space can see: vendors' heaps of such memory are called `system-uncached`,
    /// `mtk_mm-uncached`, and the like.
    fn is_uncached(&self) -> bool {
        self.name.contains("uncached")
    }
}

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
    fn a_limit_says_where_it_is_set_and_how_to_raise_it() {
        let limit = SizeLimit::new(64 << 20, "/sys/x", 1 << 20);
        assert_eq!(limit.to_string(), "/sys/x is 64 (67108864 bytes)");
        assert_eq!(limit.raise((200 << 20) + 777), "echo 201 > /sys/x");
    }

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
