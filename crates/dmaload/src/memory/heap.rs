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

pub use crate::error::SizeLimit;
use crate::error::{Error, Result};

/// A source of memory for segments.
///
/// To count, delay or fail the calls of a heap, wrap it in [`Hooked`]: that is safe. To use a vendor's
/// allocator that returns descriptors of dma-bufs, see [`FromDescriptors`]. Implement the trait itself only
/// for memory that neither of them can describe.
///
/// All calls during a load come from the loader's own worker threads, from several at once, so they may
/// block. One that panics fails its load with [`Error::Panicked`].
///
/// # Safety
/// Finished segments are lent as `&[u8]`, and devices write to unfinished ones. Both rest on what follows.
/// For each [`Memory`] that [`Heap::allocate`] returns, the implementer must guarantee, from the call until
/// the memory's pages are freed (which may be later than the drop of the heap and of the loader):
///
/// - **The memory is exclusive.** It shares no page with any other memory, file, mapping or buffer. Nothing
///   but the returned value reads or writes it: no thread, no other process, no device.
/// - **No second descriptor can change it.** A duplicate of its descriptor, a writable mapping of it, or a
///   dma-buf made of it, is either not kept, or never used to write, to resize, to punch holes, or to import
///   it into a device. This includes descriptors that other processes or drivers hold.
/// - **A memory file can be sealed.** It is created with `MFD_ALLOW_SEALING` and without `F_SEAL_SEAL`.
///   dmaload seals it against writes before it shows a segment; where that fails, the load fails.
/// - **Its pages stay.** It has at least the length that was asked for, and neither shrinks nor loses pages.
/// - **Its bytes stay.** [`Heap::populate`] and [`Heap::export`] change no byte that was written before, and
///   keep no pointer into the mapping after they return.
/// - **Its mapping stays.** No call unmaps, remaps, or changes the protection of the mapping's addresses, or
///   of any other address that it did not map itself.
/// - **An exported dma-buf is this memory.** What [`Heap::export`] returns consists of exactly the pages of
///   `memory`, from its first byte on, all of them, and no second descriptor of it exists.
/// - **[`Heap::exports`] is honest.** It always returns the same; it returns `true` if any memory is a
///   [`Memory::DmaBuf`], and `false` only if no dma-buf of this memory exists or will exist.
///
/// Heaps of safe code can't keep these promises for others, so a safe implementation does not compile:
///
/// ```compile_fail,E0200
/// use dmaload::dmabuf::{self, Mapping, Memory, Populated, Udmabuf};
/// use dmaload::heap::{Heap, MemfdHeap};
///
/// /// Keeps a dma-buf of each memory, and could write to a finished segment through it.
/// #[derive(Debug)]
/// struct Keeping(Udmabuf, std::sync::Mutex<Vec<dmabuf::DmaBuf>>);
///
/// impl Heap for Keeping {
///     fn name(&self) -> std::borrow::Cow<'_, str> {
///         "keeping".into()
///     }
///     fn allocate(&self, bytes: usize) -> Result<Memory, dmabuf::Error> {
///         let memory = MemfdHeap::default().allocate(bytes)?;
///         let part = dmabuf::Part { memfd: memory.memfd().unwrap(), offset: 0, bytes };
///         self.1.lock().unwrap().push(self.0.create(part)?);
///         Ok(memory)
///     }
///     fn populate(
///         &self,
///         mapping: &Mapping,
///         memory: &Memory,
///         part: std::ops::Range<usize>,
///     ) -> Result<Populated, dmabuf::Error> {
///         MemfdHeap::default().populate(mapping, memory, part)
///     }
/// }
/// ```
#[allow(unsafe_code, reason = "the contract above")]
pub unsafe trait Heap: fmt::Debug + Send + Sync + 'static {
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

    /// The page size that [`Heap::populate`] populates with. It decides how much of a memory is populated
    /// at once where that is done just before it is written to, and which way to read a file is taken
    /// before one was measured.
    fn pages(&self) -> Pages {
        Pages::Auto
    }

    /// The largest segment that it gives now; looked at for every load.
    fn size_limit(&self) -> Option<SizeLimit> {
        None
    }

    /// What it does otherwise than one might expect, for the report.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether this crate made it: what its memory files lack on old kernels is known then. Callers can't
    /// name the argument, so they can't override this.
    #[doc(hidden)]
    fn is_own(&self, _: private::Key) -> bool {
        false
    }
}

mod private {
    /// Known to this crate alone.
    #[derive(Debug, Clone, Copy)]
    pub struct Key;
}

/// Whether a heap is one of this crate's.
pub(crate) fn is_own(heap: &dyn Heap) -> bool {
    heap.is_own(private::Key)
}

// SAFETY: each call is that of the heap inside, whose implementer has promised all of it.
#[allow(unsafe_code)]
unsafe impl<H: Heap + ?Sized> Heap for Arc<H> {
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

    fn pages(&self) -> Pages {
        (**self).pages()
    }

    fn size_limit(&self) -> Option<SizeLimit> {
        (**self).size_limit()
    }

    fn notes(&self) -> Vec<String> {
        (**self).notes()
    }

    fn is_own(&self, key: private::Key) -> bool {
        (**self).is_own(key)
    }
}

/// Memory files: each segment has a file descriptor that other processes can map. Needs no device and no
/// privilege, so it is what [`auto`] gives.
#[derive(Debug, Clone, Copy, Default)]
pub struct MemfdHeap {
    /// The page size to populate with.
    pub pages: Pages,
}

// SAFETY: each memory file is new, its one descriptor is in the returned value, and `Memfd` creates it without
// F_SEAL_SEAL and sealed against shrinking. Populating changes no byte. It exports nothing.
#[allow(unsafe_code)]
unsafe impl Heap for MemfdHeap {
    fn name(&self) -> Cow<'_, str> {
        "memfd".into()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, dmabuf::Error> {
        Memfd::create("dmaload", bytes).map(Memory::Memfd)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error> {
        mapping.populate(memory, part, self.pages)
    }

    fn pages(&self) -> Pages {
        self.pages
    }

    fn is_own(&self, _: private::Key) -> bool {
        true
    }
}

/// Private memory with transparent huge pages, for callers that need no file descriptor.
#[derive(Debug, Clone, Copy, Default)]
pub struct AnonHeap {
    /// The page size to populate with.
    pub pages: Pages,
}

impl AnonHeap {
    pub(crate) const NAME: &str = "anon";
}

// SAFETY: anonymous memory comes into being with its mapping, which dmaload makes, and has no descriptor.
// Populating changes no byte. It exports nothing.
#[allow(unsafe_code)]
unsafe impl Heap for AnonHeap {
    fn name(&self) -> Cow<'_, str> {
        Self::NAME.into()
    }

    fn allocate(&self, _bytes: usize) -> Result<Memory, dmabuf::Error> {
        Ok(Memory::Anonymous)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error> {
        mapping.populate(memory, part, self.pages)
    }

    fn pages(&self) -> Pages {
        self.pages
    }

    fn is_own(&self, _: private::Key) -> bool {
        true
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
                 use UdmabufHeap::open_despite_bug only if no importer maps it into the kernel"
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
        heap.make_dma_buf(&memory).map_err(refused)?;
        Ok(heap)
    }

    /// Whether huge pages are to be kept out, since drivers would see wrong bytes on them.
    fn avoids_bug(&self) -> bool {
        self.pages == Pages::Small && Udmabuf::huge_pages_show_wrong_bytes()
    }

    fn make_dma_buf(&self, memory: &Memory) -> Result<DmaBuf, dmabuf::Error> {
        let failed = |errno| dmabuf::Error::new("make a udmabuf", 0, errno);
        let memfd = memory.memfd().ok_or(failed(Errno::BADFD))?;
        self.device.create(Part { memfd, offset: 0, bytes: memfd.bytes() })
    }
}

/// How many bytes of a memory file have no page.
fn missing_bytes(memfd: &Memfd) -> Result<u64, Errno> {
    let present_bytes = rustix::fs::fstat(memfd)?.st_blocks.cast_unsigned().saturating_mul(512);
    Ok((memfd.bytes() as u64).saturating_sub(present_bytes))
}

// SAFETY: memory files as in `MemfdHeap`. The dma-buf that `export` returns is of all pages of the file, and its
// one descriptor is in the returned value.
#[allow(unsafe_code)]
unsafe impl Heap for UdmabufHeap {
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
        if huge && self.avoids_bug() {
            // Nothing is known to give huge pages here against the advice; should something do, its bytes are not shown.
            return Err(dmabuf::Error::new("keep 2 MiB pages out of a udmabuf", bytes, Errno::OPNOTSUPP));
        }
        Ok(populated)
    }

    fn exports(&self) -> bool {
        true
    }

    fn export(&self, memory: &Memory) -> Result<DmaBuf, dmabuf::Error> {
        if let Some(memfd) = memory.memfd().filter(|_| self.avoids_bug()) {
            let refused = |errno| dmabuf::Error::new("export memory that was not populated", memfd.bytes(), errno);
            // The driver would allocate them, with pages of any size: it knows nothing of the mapping's advice.
            if missing_bytes(memfd).map_err(refused)? > 0 {
                return Err(refused(Errno::INVAL));
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

// SAFETY: the kernel's heaps give new memory with each call, and its one descriptor is in the returned value.
// Nothing is populated or exported here. (A vendor's driver is trusted as the kernel is.)
#[allow(unsafe_code)]
unsafe impl Heap for DmaHeap {
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

    fn is_own(&self, _: private::Key) -> bool {
        true
    }
}

/// Code of the caller's around the calls of a heap; see [`Hooked`]. Each method does nothing by default.
///
/// The calls come from the loader's worker threads, from several at once, so they may block. One that panics
/// fails its load with [`Error::Panicked`].
pub trait HeapHooks: fmt::Debug + Send + Sync + 'static {
    /// The name used in reports and errors, in place of that of the heap.
    fn name(&self) -> Option<Cow<'_, str>> {
        None
    }

    /// Before [`Heap::allocate`].
    ///
    /// # Errors
    /// In place of the call: the allocation fails with it.
    fn before_allocate(&self, bytes: usize) -> Result<(), dmabuf::Error> {
        let _ = bytes;
        Ok(())
    }

    /// After [`Heap::allocate`], with what it answered.
    fn after_allocate(&self, bytes: usize, result: Result<(), &dmabuf::Error>) {
        let _ = (bytes, result);
    }

    /// Before [`Heap::populate`]: `mapped` are the addresses of the whole mapping, `part` the byte offsets in
    /// it that are to be populated.
    ///
    /// # Errors
    /// In place of the call: populating fails with it.
    fn before_populate(&self, mapped: Range<usize>, part: Range<usize>) -> Result<(), dmabuf::Error> {
        let _ = (mapped, part);
        Ok(())
    }

    /// After [`Heap::populate`], with what it answered.
    fn after_populate(&self, part: Range<usize>, result: Result<&Populated, &dmabuf::Error>) {
        let _ = (part, result);
    }

    /// Before [`Heap::export`] of memory of this length.
    ///
    /// # Errors
    /// In place of the call: the export fails with it.
    fn before_export(&self, bytes: usize) -> Result<(), dmabuf::Error> {
        let _ = bytes;
        Ok(())
    }

    /// In place of what [`Heap::is_uncached`] answers.
    fn is_uncached(&self, of_the_heap: bool) -> bool {
        of_the_heap
    }

    /// In place of what [`Heap::size_limit`] answers.
    fn size_limit(&self, of_the_heap: Option<SizeLimit>) -> Option<SizeLimit> {
        of_the_heap
    }

    /// In place of what [`Heap::notes`] answers.
    fn notes(&self, of_the_heap: Vec<String>) -> Vec<String> {
        of_the_heap
    }
}

/// A heap with code of the caller's around its calls: to count, delay or fail them.
///
/// The hooks get numbers and never the memory, so this needs no `unsafe`.
///
/// ```
/// use dmaload::dmabuf;
/// use dmaload::heap::{HeapHooks, Hooked, MemfdHeap};
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicUsize, Ordering};
///
/// #[derive(Debug, Default)]
/// struct Counting(AtomicUsize);
///
/// impl HeapHooks for Counting {
///     fn before_allocate(&self, bytes: usize) -> Result<(), dmabuf::Error> {
///         self.0.fetch_add(bytes, Ordering::Relaxed);
///         Ok(())
///     }
/// }
///
/// let hooks = Arc::new(Counting::default());
/// let loader = dmaload::Loader::builder().heap(Hooked::new(MemfdHeap::default(), Arc::clone(&hooks)));
/// # drop(loader);
/// ```
#[derive(Debug, Clone)]
pub struct Hooked<H, K> {
    heap: H,
    hooks: K,
}

impl<H: Heap, K: HeapHooks> Hooked<H, K> {
    /// Puts `hooks` around `heap`.
    pub fn new(heap: H, hooks: K) -> Self {
        Hooked { heap, hooks }
    }

    /// The hooks.
    pub fn hooks(&self) -> &K {
        &self.hooks
    }
}

// SAFETY: memory comes from the heap inside, whose implementer has promised all of it. The hooks see numbers only,
// and can't change what the heap answers about its memory.
#[allow(unsafe_code)]
unsafe impl<H: Heap, K: HeapHooks> Heap for Hooked<H, K> {
    fn name(&self) -> Cow<'_, str> {
        self.hooks.name().unwrap_or_else(|| self.heap.name())
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, dmabuf::Error> {
        self.hooks.before_allocate(bytes)?;
        let memory = self.heap.allocate(bytes);
        self.hooks.after_allocate(bytes, memory.as_ref().map(|_| ()));
        memory
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, dmabuf::Error> {
        let start = mapping.address().addr().get();
        self.hooks.before_populate(start..start + mapping.bytes(), part.clone())?;
        let populated = self.heap.populate(mapping, memory, part.clone());
        self.hooks.after_populate(part, populated.as_ref());
        populated
    }

    fn exports(&self) -> bool {
        self.heap.exports()
    }

    fn export(&self, memory: &Memory) -> Result<DmaBuf, dmabuf::Error> {
        self.hooks.before_export(memory.bytes().unwrap_or(0))?;
        self.heap.export(memory)
    }

    fn allocates_at_once(&self) -> bool {
        self.heap.allocates_at_once()
    }

    fn is_uncached(&self) -> bool {
        self.hooks.is_uncached(self.heap.is_uncached())
    }

    fn pages(&self) -> Pages {
        self.heap.pages()
    }

    fn size_limit(&self) -> Option<SizeLimit> {
        self.hooks.size_limit(self.heap.size_limit())
    }

    fn notes(&self) -> Vec<String> {
        self.hooks.notes(self.heap.notes())
    }

    fn is_own(&self, key: private::Key) -> bool {
        self.heap.is_own(key)
    }
}

impl<K: HeapHooks + ?Sized> HeapHooks for Arc<K> {
    fn name(&self) -> Option<Cow<'_, str>> {
        (**self).name()
    }

    fn before_allocate(&self, bytes: usize) -> Result<(), dmabuf::Error> {
        (**self).before_allocate(bytes)
    }

    fn after_allocate(&self, bytes: usize, result: Result<(), &dmabuf::Error>) {
        (**self).after_allocate(bytes, result);
    }

    fn before_populate(&self, mapped: Range<usize>, part: Range<usize>) -> Result<(), dmabuf::Error> {
        (**self).before_populate(mapped, part)
    }

    fn after_populate(&self, part: Range<usize>, result: Result<&Populated, &dmabuf::Error>) {
        (**self).after_populate(part, result);
    }

    fn before_export(&self, bytes: usize) -> Result<(), dmabuf::Error> {
        (**self).before_export(bytes)
    }

    fn is_uncached(&self, of_the_heap: bool) -> bool {
        (**self).is_uncached(of_the_heap)
    }

    fn size_limit(&self, of_the_heap: Option<SizeLimit>) -> Option<SizeLimit> {
        (**self).size_limit(of_the_heap)
    }

    fn notes(&self, of_the_heap: Vec<String>) -> Vec<String> {
        (**self).notes(of_the_heap)
    }
}

/// A vendor's allocator, or any other, that gives descriptors of dma-bufs.
///
/// Each descriptor is checked to be one of a dma-buf that is large enough; whether nothing else writes to it
/// can't be checked, so making one is `unsafe`. Its memory is taken to be allocated at once, and is mapped by
/// `mmap(2)` of the descriptor.
pub struct FromDescriptors {
    name: String,
    allocate: AllocateFn,
    is_uncached: bool,
}

type AllocateFn = Box<dyn Fn(usize) -> Result<OwnedFd, Errno> + Send + Sync>;

impl fmt::Debug for FromDescriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FromDescriptors")
            .field("name", &self.name)
            .field("is_uncached", &self.is_uncached)
            .finish_non_exhaustive()
    }
}

impl FromDescriptors {
    /// A heap of what `allocate` gives: for a length, a multiple of the page size, a dma-buf of at least that
    /// many bytes.
    ///
    /// # Safety
    /// For each descriptor that `allocate` returns, until its memory is freed:
    ///
    /// - It is a dma-buf of new memory, which shares no page with any other memory.
    /// - No duplicate of it, no mapping of it and no importer of it writes to that memory, except those that
    ///   got it from dmaload ([`crate::Segment::dma_buf`]).
    /// - Its pages stay: none is taken away, replaced, or moved under a mapping.
    #[allow(unsafe_code, reason = "the contract above")]
    pub unsafe fn new(
        name: impl Into<String>,
        allocate: impl Fn(usize) -> Result<OwnedFd, Errno> + Send + Sync + 'static,
    ) -> Self {
        FromDescriptors { name: name.into(), allocate: Box::new(allocate), is_uncached: false }
    }

    /// Says that the CPU reads this memory without its caches; see [`Heap::is_uncached`]. Default: false.
    #[must_use]
    pub fn uncached(mut self, is_uncached: bool) -> Self {
        self.is_uncached = is_uncached;
        self
    }
}

// SAFETY: who made this has promised for `allocate` what the trait demands of memory that is a dma-buf. Nothing is
// populated or exported here, and `exports` says that there are dma-bufs.
#[allow(unsafe_code)]
unsafe impl Heap for FromDescriptors {
    fn name(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.name)
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, dmabuf::Error> {
        let fd = (self.allocate)(bytes).map_err(|errno| dmabuf::Error::new("allocate a dma-buf", bytes, errno))?;
        let dma_buf = DmaBuf::from_fd(fd).map_err(|error| dmabuf::Error::new(error.operation, bytes, error.errno))?;
        if dma_buf.bytes() < bytes {
            // As the kernel answers where a dma-buf is too small for what is asked of it.
            return Err(dmabuf::Error::new("take a shorter dma-buf in place", bytes, Errno::INVAL));
        }
        Ok(Memory::DmaBuf(dma_buf))
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

    fn is_uncached(&self) -> bool {
        self.is_uncached
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
