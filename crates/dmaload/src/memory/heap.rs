//! Sources of memory for segments.
//!
//! | heap | memory | a segment has |
//! |---|---|---|
//! | [`MemfdHeap`] | memfds | a memfd |
//! | [`AnonHeap`] | private pages | no descriptor |
//! | [`UdmabufHeap`] | memfds, exported by `/dev/udmabuf` | a dma-buf and a memfd |
//! | [`DmaHeap`] | a dma-heap, `/dev/dma_heap/NAME` | a dma-buf |
//! | [`FromDescriptors`] | dma-bufs from the caller's allocator | a dma-buf |
//!
//! [`Hooked`] wraps any of them, or a caller's own [`Heap`].

mod choose;
mod descriptors;
mod dma_heap;
mod hooks;
mod memfd;
mod udmabuf;

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use dmabuf::Errno;

use crate::error::Result;
pub use crate::error::SizeLimit;
pub use choose::HeapChoice;
pub use descriptors::FromDescriptors;
pub use dma_heap::DmaHeap;
#[doc(inline)]
pub use dmabuf::Error as HeapError;
#[doc(inline)]
pub use dmabuf::{
    Access, AddressRange, CpuAccess, DeviceError, DmaBuf, Mapping, Memfd, Memory, NotMoved, PageCount, Pages, Populated,
};
pub use hooks::{HeapHooks, Hooked};
pub use memfd::{AnonHeap, MemfdHeap};
pub use udmabuf::UdmabufHeap;

/// A source of memory for segments.
///
/// To count, delay or fail the calls to a heap, wrap it in [`Hooked`], which needs no `unsafe`. To
/// use a vendor's allocator that returns dma-buf descriptors, see [`FromDescriptors`]. Implement
/// the trait yourself only if neither of these is sufficient.
///
/// During a load, several of the loader's threads may call the heap at the same time. These are
/// its workers and, for [`Heap::populate`], also the threads that copy or read. The calls may
/// block. If a call panics, its load fails with [`crate::Error::Panicked`].
///
/// # Safety
/// Finished segments are viewed as `&[u8]`, and devices write to unfinished ones. Both rely on the
/// guarantees below. For each [`Memory`] that [`Heap::allocate`] returns, the implementer must
/// guarantee the following until the memory's pages are freed, which may be after the heap and the
/// loader are dropped:
///
/// - **The memory is exclusive.** It shares no page with any other memory, file, mapping or
///   buffer. Only the returned value reads or writes it; no other thread, process or device does.
/// - **No second descriptor can change it.** A duplicate of its descriptor, a writable mapping of
///   it, or a dma-buf made from it is either not kept, or never used to write to the memory, to
///   resize it, to punch holes into it, or to import it into a device. This includes descriptors
///   that other processes or drivers hold.
/// - **A memfd can be sealed.** It is created with `MFD_ALLOW_SEALING` and without `F_SEAL_SEAL`.
///   dmaload seals it against writes before it delivers the first segment in it; if that fails,
///   the load fails.
/// - **Its pages stay.** It has at least the requested length, and neither shrinks nor loses
///   pages.
/// - **Its bytes stay.** [`Heap::populate`] and [`Heap::export`] change no byte that was written
///   before, and keep no pointer into the mapping after they return.
/// - **Its mapping stays.** No call unmaps, remaps, or changes the protection of the mapping's
///   addresses, or of any other address that it did not map itself.
/// - **An exported dma-buf is this memory.** The dma-buf that [`Heap::export`] returns consists of
///   all pages of `memory`, in order, and of no others. It has no second descriptor.
/// - **[`Heap::exports`] is correct.** It always returns the same value; it returns `true` if any
///   memory is a [`Memory::DmaBuf`], and `false` only if no dma-buf of this memory exists or will
///   exist.
///
/// The compiler can't check these guarantees, so an implementation without `unsafe` does not
/// compile:
///
/// ```compile_fail,E0200
/// use dmabuf::{Part, Udmabuf};
/// use dmaload::heap::{DmaBuf, Heap, HeapError, MemfdHeap, Memory};
///
/// /// Keeps a dma-buf of each allocation, and could write to a finished segment through it.
/// #[derive(Debug)]
/// struct Keeping(Udmabuf, std::sync::Mutex<Vec<DmaBuf>>);
///
/// impl Heap for Keeping {
///     fn name(&self) -> std::borrow::Cow<'_, str> {
///         "keeping".into()
///     }
///     fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
///         let memory = MemfdHeap::default().allocate(bytes)?;
///         let part = Part { memfd: memory.memfd().unwrap(), offset: 0, bytes };
///         self.1.lock().unwrap().push(self.0.create(part)?);
///         Ok(memory)
///     }
/// }
/// ```
#[allow(unsafe_code, reason = "the contract above")]
pub unsafe trait Heap: fmt::Debug + Send + Sync + 'static {
    /// The name used in reports and errors.
    fn name(&self) -> Cow<'_, str>;

    /// Allocates memory of at least `bytes` bytes, where `bytes` is a multiple of the page size.
    /// The caller maps and populates the memory.
    ///
    /// # Errors
    /// The error that the kernel returned, unchanged.
    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError>;

    /// Populates a part of the mapped memory: the range `part` of byte offsets in `mapping`. By
    /// default, this uses pages of the size that [`Heap::pages`] returns.
    ///
    /// # Errors
    /// The error that the kernel returned, unchanged.
    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, HeapError> {
        mapping.populate(memory, part, self.pages())
    }

    /// Whether segments from this heap have dma-bufs.
    fn exports(&self) -> bool {
        false
    }

    /// Exports filled memory as a dma-buf. This is called only if [`Heap::exports`] returns
    /// `true`, and only for memory that is not itself a dma-buf.
    ///
    /// # Errors
    /// The error that the kernel returned, unchanged.
    fn export(&self, memory: &Memory) -> Result<DmaBuf, HeapError> {
        Err(HeapError::new("export memory as a dma-buf", memory.memfd().map_or(0, Memfd::bytes), Errno::EOPNOTSUPP))
    }

    /// Whether [`Heap::allocate`] allocates all pages at once. If so, the whole allocation counts
    /// against the window from that call on.
    fn allocates_at_once(&self) -> bool {
        false
    }

    /// Whether the CPU reads this memory uncached, which is several times slower. If so, a
    /// [`crate::Observer`] sees the bytes in staging buffers rather than in the segments.
    fn is_uncached(&self) -> bool {
        false
    }

    /// The page size that [`Heap::populate`] uses. The size of the extents that are populated just
    /// before they are written depends on it. It also determines whether a load reads directly or
    /// into staging buffers until the speeds of both have been measured.
    fn pages(&self) -> Pages {
        Pages::Auto
    }

    /// The largest segment that the heap can allocate now; `None` if unlimited. Queried for every
    /// load.
    fn size_limit(&self) -> Option<SizeLimit> {
        None
    }

    /// Notes for the report about unexpected behavior of this heap.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether this crate provides the heap. If so, segments in its memfds may be delivered
    /// without the seal against writes on kernels that lack this seal, because the heap keeps no
    /// second descriptor. Callers can't name the argument's type, so they can't override this
    /// method.
    #[doc(hidden)]
    fn is_own(&self, _: private::Key) -> bool {
        false
    }
}

mod private {
    /// A type that only this crate can name.
    #[derive(Debug, Clone, Copy)]
    pub struct Key;
}

/// Whether a heap is provided by this crate.
pub(crate) fn is_own(heap: &dyn Heap) -> bool {
    heap.is_own(private::Key)
}

// SAFETY: every call is forwarded to the inner heap, whose implementer guarantees the contract.
#[allow(unsafe_code)]
unsafe impl<H: Heap + ?Sized> Heap for Arc<H> {
    fn name(&self) -> Cow<'_, str> {
        (**self).name()
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, HeapError> {
        (**self).allocate(bytes)
    }

    fn populate(&self, mapping: &Mapping, memory: &Memory, part: Range<usize>) -> Result<Populated, HeapError> {
        (**self).populate(mapping, memory, part)
    }

    fn exports(&self) -> bool {
        (**self).exports()
    }

    fn export(&self, memory: &Memory) -> Result<DmaBuf, HeapError> {
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
