//! Bytes of a file in memory that only this process can see, and may write to.
//!
//! ```text
//!   anonymous segment ── handed out: no views any more ──► its own memory
//!   memory file ──────── mapped again, copied on write ──► pages of this process
//!   dma-buf ──────────── refused: others can write to it
//! ```
//!
//! Touches only mappings. It exposes addresses and never references, because any holder of an
//! address may write. The memory goes with the last [`PrivateMemory`] and the last segment.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;

use dmabuf::{PrivateMapping, page_bytes};

use crate::error::{Error, Result};
use crate::memory::segment::{Segment, segments_of_range};
use crate::support::convert::to_usize;

/// Bytes of a file in memory that this process alone has, readable and writable: for callers that
/// hand memory to code which may write to it, such as an interpreter's arrays.
///
/// Made by [`Tensor::private_memory`](crate::Tensor::private_memory) and
/// [`ImageFile::private_memory`](crate::ImageFile::private_memory). It keeps the memory.
///
/// - **Anonymous memory** ([`AnonHeap`](crate::heap::AnonHeap)) is given itself, without a copy.
///   This revokes [`Segment::bytes`] for good, of its segments and those that share memory with
///   them, as handing out a dma-buf does. All private memory of the same bytes is the same memory.
/// - **Memory files**, sealed, shared or of another process ([`crate::share`]), are mapped once
///   more, copied on write. Views, other mappings and other processes keep the bytes of the file.
///   Each private memory has its own writes, and costs a page for each page that is written to;
///   these pages count against no limit of a loader. From Linux 5.1 to 5.12 it is a copy from the
///   beginning, because there a forked child and its parent would see each other's writes.
/// - **Dma-bufs** are refused with [`Error::NoDescriptor`], because any holder of the descriptor
///   can write.
///
/// It gives an address and no slice. Rust code that dereferences it must make sure that nothing
/// writes to the bytes meanwhile, as with any memory that foreign code has.
///
/// ```no_run
/// # async fn example(loader: dmaload::Loader) -> dmaload::Result<()> {
/// use dmaload::heap::AnonHeap;
///
/// let loader = dmaload::Loader::builder().heap(AnonHeap::default()).build()?;
/// let image = loader.load("model.safetensors").await?;
/// let memory = image.tensor("lm_head.weight")?.private_memory()?;
/// println!("{} writable bytes at {:?}", memory.len(), memory.address());
/// # Ok(())
/// # }
/// ```
pub struct PrivateMemory {
    address: NonNull<u8>,
    bytes: usize,
    keeps: Keeps,
}

/// What keeps the memory.
#[expect(dead_code, reason = "owning it is its use")]
enum Keeps {
    /// It is empty.
    Nothing,
    Segments(Vec<Segment>),
    /// The segments too: otherwise their memory would go back to the pool, whose next load writes
    /// into the pages that are mapped here, and would no longer count against the loader's limit.
    Mapping(PrivateMapping, Vec<Segment>),
}

// SAFETY: the address is of memory that `keeps` owns, which belongs to no thread.
unsafe impl Send for PrivateMemory {}
// SAFETY: as above; nothing here dereferences the address.
unsafe impl Sync for PrivateMemory {}

impl PrivateMemory {
    /// The bytes `range` of the file that these segments hold.
    ///
    /// # Errors
    /// As [`crate::ImageFile::private_memory`].
    ///
    /// # Panics
    /// When the segments of a span do not lie in memory as they do in the file.
    pub(crate) fn of(path: &Path, segments: &[Segment], range: Range<u64>) -> Result<Self> {
        if range.is_empty() {
            return Ok(PrivateMemory { address: NonNull::dangling(), bytes: 0, keeps: Keeps::Nothing });
        }
        let not_loaded = || Error::NotLoaded { path: path.to_owned(), range: range.clone() };
        let touched = segments_of_range(segments, &range).ok_or_else(not_loaded)?;
        let (first, last) = touched.first().zip(touched.last()).ok_or_else(not_loaded)?;
        assert!(
            first.file_range().start <= range.start && range.end <= last.file_range().end,
            "{range:?} is within the segments that hold it"
        );
        for (segment, next) in touched.iter().zip(touched.iter().skip(1)) {
            let end = (segment.file_range().end, segment.address() + segment.len());
            assert_eq!((next.file_range().start, next.address()), end, "segments lie side by side");
        }
        if let Some(shared) = touched.iter().find(|segment| segment.has_dma_buf()) {
            return Err(not_private(shared));
        }
        let offset = to_usize(range.start - first.file_range().start);
        let bytes = to_usize(range.end - range.start);
        if touched.iter().all(Segment::is_anonymous) {
            touched.iter().try_for_each(Segment::hand_out_memory)?;
            // SAFETY: `segments_of_range` gave segments that hold the range, and these lie side by
            // side, as asserted: the offset is within the first one's mapping.
            let address = unsafe { first.start().add(offset) };
            return Ok(PrivateMemory { address, bytes, keeps: Keeps::Segments(touched.to_vec()) });
        }
        Self::copied_on_write(touched, offset, bytes)
    }

    /// `bytes` bytes of these segments' memory files, from `offset` bytes into the first one.
    fn copied_on_write(touched: &[Segment], offset: usize, bytes: usize) -> Result<Self> {
        let page = page_bytes();
        let mut parts = Vec::new();
        let (mut skip, mut left) = (offset, bytes);
        let mut lead = None;
        for segment in touched {
            let memfd = segment.memfd().ok_or_else(|| not_private(segment))?;
            let start = segment.memory_offset() + skip;
            let length = left.min(segment.len() - skip);
            let pages = start / page * page..(start + length).next_multiple_of(page);
            lead.get_or_insert(start - pages.start);
            parts.push((memfd, pages));
            left -= length;
            skip = 0;
        }
        assert_eq!(left, 0, "the segments hold the range");
        let mapping = PrivateMapping::new(&parts).map_err(|refusal| Error::Memory {
            heap: touched.first().map_or("", Segment::heap).to_owned(),
            refusal,
            loaded_bytes: bytes as u64,
            planned_bytes: bytes as u64,
        })?;
        let lead = lead.unwrap_or(0);
        assert!(lead + bytes <= mapping.bytes(), "the mapping has all pages of the range");
        // SAFETY: within the mapping, by the assertion.
        let address = unsafe { mapping.address().add(lead) };
        Ok(PrivateMemory { address, bytes, keeps: Keeps::Mapping(mapping, touched.to_vec()) })
    }

    /// Where the bytes begin: [`Self::len`] of them are mapped, readable and writable as long as
    /// this lives. Dangling where there are none.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

fn not_private(segment: &Segment) -> Error {
    Error::NoDescriptor { heap: segment.heap().to_owned(), wanted: "memory of this process alone" }
}

impl fmt::Debug for PrivateMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.keeps {
            Keeps::Nothing => "empty",
            Keeps::Segments(_) => "anonymous",
            Keeps::Mapping(..) => "copied on write",
        };
        f.debug_struct("PrivateMemory").field("bytes", &self.bytes).field("kind", &kind).finish_non_exhaustive()
    }
}
