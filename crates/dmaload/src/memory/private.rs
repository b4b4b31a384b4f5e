//! A file's bytes in memory that only this process can read and write.
//!
//! ```text
//!   anonymous segment ── handed out; views are refused ──► its own memory
//!   memfd ────────────── mapped again, copy-on-write ────► pages of this process
//!   dma-buf ──────────── refused: others can write to it
//! ```
//!
//! This module does not load files. It only maps the memory of finished segments, or copies it if
//! the kernel can't map it copy-on-write. It exposes addresses and never references, because any
//! holder of an address may write to the memory. The memory is freed when the last
//! [`PrivateMemory`] and the last segment are dropped.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;

use dmabuf::{PrivateMapping, page_bytes};

use crate::error::{Error, Result};
use crate::memory::segment::{Segment, segments_of_range};
use crate::support::convert::to_usize;

/// Readable and writable memory that holds a file's bytes and that only this process can access.
/// Use it to pass bytes to code that may write to them, such as an interpreter that exposes them
/// as an array.
///
/// Created by [`Tensor::private_memory`](crate::Tensor::private_memory) and
/// [`ImageFile::private_memory`](crate::ImageFile::private_memory). The memory stays alive as long
/// as this value does.
///
/// - **Anonymous memory** ([`AnonHeap`](crate::heap::AnonHeap)) is handed out directly, without a
///   copy. Like handing out a dma-buf, this permanently revokes [`Segment::bytes`] for its
///   segments and for all segments that share memory with them. If several values of this type
///   cover the same bytes, they share the memory.
/// - **Memfds**, including those that are sealed, shared, or received from another process
///   ([`crate::share`]), are mapped again, copy-on-write. Views, other mappings and other
///   processes keep seeing the file's bytes. Each `PrivateMemory` sees only its own writes, and
///   uses a new page for each page that is written to. These pages do not count against any limit
///   of a loader. On Linux 5.1 to 5.4, the memory is copied in full instead, because a forked
///   child and its parent would see each other's writes.
/// - **Segments with a dma-buf** are refused with [`Error::NoDescriptor`], because any holder of
///   the dma-buf can write to them.
///
/// This type provides an address rather than a slice. Rust code that dereferences the address must
/// ensure that nothing writes to the bytes at the same time, as with any memory that foreign code
/// can access.
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

/// What keeps the memory alive.
#[expect(dead_code, reason = "owned only to keep the memory alive")]
enum Keeps {
    /// There are no bytes.
    Nothing,
    Segments(Vec<Segment>),
    /// The segments are kept, too. Otherwise their memory would return to the pool and no longer
    /// count against the loader's limit, and a later load would write to the pages that are mapped
    /// here.
    Mapping(PrivateMapping, Vec<Segment>),
}

// SAFETY: `address` points into memory that `keeps` owns and that is not bound to a thread. If
// there are no bytes, it dangles and is never dereferenced.
unsafe impl Send for PrivateMemory {}
// SAFETY: as above; nothing here dereferences the address.
unsafe impl Sync for PrivateMemory {}

impl PrivateMemory {
    /// Creates private memory for the byte range `range` of the file. `segments` must contain the
    /// file's segments in order.
    ///
    /// # Errors
    /// Those of [`crate::ImageFile::private_memory`].
    ///
    /// # Panics
    /// If the segments of a span are not adjacent in memory.
    pub(crate) fn from_segments(path: &Path, segments: &[Segment], range: Range<u64>) -> Result<Self> {
        if range.is_empty() {
            return Ok(PrivateMemory { address: NonNull::dangling(), bytes: 0, keeps: Keeps::Nothing });
        }
        let not_loaded = || Error::NotLoaded { path: path.to_owned(), range: range.clone() };
        let touched = segments_of_range(segments, &range).ok_or_else(not_loaded)?;
        let (first, last) = touched.first().zip(touched.last()).ok_or_else(not_loaded)?;
        assert!(
            first.file_range().start <= range.start && range.end <= last.file_range().end,
            "{range:?} is not within the segments that were found for it"
        );
        for (segment, next) in touched.iter().zip(touched.iter().skip(1)) {
            let end = (segment.file_range().end, segment.address() + segment.len());
            assert_eq!((next.file_range().start, next.address()), end, "the segments of a span must be adjacent");
        }
        if let Some(shared) = touched.iter().find(|segment| segment.has_dma_buf()) {
            return Err(not_private(shared));
        }
        let offset = to_usize(range.start - first.file_range().start);
        let bytes = to_usize(range.end - range.start);
        if touched.iter().all(Segment::is_anonymous) {
            touched.iter().try_for_each(Segment::hand_out_memory)?;
            // SAFETY: the range is not empty, and each of `touched` overlaps it, so the first one
            // contains the range's start: the offset is within its mapping.
            let address = unsafe { first.start().add(offset) };
            return Ok(PrivateMemory { address, bytes, keeps: Keeps::Segments(touched.to_vec()) });
        }
        Self::map_copy_on_write(touched, offset, bytes)
    }

    /// Maps `bytes` bytes of these segments' memfds copy-on-write, starting at `offset` in the
    /// first segment.
    fn map_copy_on_write(touched: &[Segment], offset: usize, bytes: usize) -> Result<Self> {
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
        assert_eq!(left, 0, "the segments must cover the whole range");
        let mapping = PrivateMapping::new(&parts).map_err(|refusal| Error::Memory {
            heap: touched.first().map_or("", Segment::heap).to_owned(),
            refusal,
            loaded_bytes: bytes as u64,
            planned_bytes: bytes as u64,
        })?;
        let lead = lead.unwrap_or(0);
        assert!(lead + bytes <= mapping.bytes(), "the mapping must contain all pages of the range");
        // SAFETY: the range is within the mapping, as asserted.
        let address = unsafe { mapping.address().add(lead) };
        Ok(PrivateMemory { address, bytes, keeps: Keeps::Mapping(mapping, touched.to_vec()) })
    }

    /// The address of the first byte. [`Self::len`] bytes are mapped there, readable and writable,
    /// while this value lives. If there are no bytes, the address is dangling.
    pub fn address(&self) -> NonNull<u8> {
        self.address
    }

    /// The length of the memory in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

fn not_private(segment: &Segment) -> Error {
    Error::NoDescriptor { heap: segment.heap().to_owned(), wanted: "private mapping" }
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
