//! A load's plan for each file, and the data needed to allocate a batch.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use dmabuf::{AddressRange, Pages};

use crate::files::source::{Identity, OpenFile};
use crate::memory::backing::Backing;
use crate::plan::tensors::FileTensors;
use crate::plan::{Batch, Piece};
use crate::route::Route;
use crate::support::once_value::OnceValue;
use crate::telemetry::report::Way;

/// A file as it was when the load was planned, and how it will be read.
#[derive(Debug)]
pub(crate) struct FilePlan {
    pub(crate) identity: Identity,
    pub(crate) alignment_bytes: u64,
    /// The byte range of the file that contains the model.
    pub(crate) part: Range<u64>,
    pub(crate) tensors: Option<Arc<FileTensors>>,
    /// How many bytes will be read.
    pub(crate) read_bytes: u64,
    /// How many bytes of the file were requested. `read_bytes` is larger if reads have to cover
    /// whole blocks.
    pub(crate) wanted_bytes: u64,
    /// The initial route for reads of the file. A small file is not open yet, so for it, this is
    /// the first route to try.
    pub(crate) route: Route,
    /// Whether the file is small. A small file is opened only when its batch is allocated, and its
    /// header is parsed from the memory into which it was read.
    pub(crate) small: bool,
    /// The open file; `None` if the file will be opened later, for its first piece.
    pub(crate) open: Option<Arc<OpenFile>>,
}

/// The data needed to allocate a batch. All batches of an allocation share one `memory` cell, and
/// all pieces of a file share one `file` cell. The first batch or piece that needs the value of a
/// cell sets it.
#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) batch: Batch,
    pub(crate) way: Way,
    pub(crate) memory: Arc<OnceValue<Arc<Backing>>>,
    pub(crate) memory_bytes: u64,
    pub(crate) range: Arc<AddressRange>,
    pub(crate) range_offset: u64,
    pub(crate) parts: Vec<BatchPart>,
}

/// Describes a populated batch, or a populated extent of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allocated {
    /// The file of the batch's first byte.
    pub(crate) file_index: usize,
    /// The segment of the batch's first byte.
    pub(crate) segment: usize,
    /// How many of the populated bytes come from files.
    pub(crate) bytes: u64,
    pub(crate) memory_bytes: u64,
}

impl Allocation {
    /// Describes the whole batch.
    pub(crate) fn allocated(&self) -> Allocated {
        let first = self.parts.first().expect("a batch should have at least one piece");
        Allocated {
            file_index: first.file_index,
            segment: first.piece.segment,
            bytes: self.parts.iter().map(|part| part.piece.bytes).sum(),
            memory_bytes: self.batch.bytes,
        }
    }
}

/// A piece of a batch, and the file that it is read from.
#[derive(Debug)]
pub(crate) struct BatchPart {
    pub(crate) number: usize,
    pub(crate) piece: Piece,
    pub(crate) file_index: usize,
    pub(crate) path: Arc<PathBuf>,
    pub(crate) identity: Identity,
    pub(crate) alignment_bytes: u64,
    pub(crate) route: Route,
    pub(crate) small: bool,
    pub(crate) file: Arc<OnceValue<Arc<OpenFile>>>,
}

/// The heap's properties, queried once when the engine starts.
#[derive(Debug)]
pub(crate) struct HeapFacts {
    pub(crate) name: Arc<str>,
    pub(crate) notes: Arc<[String]>,
    pub(crate) exports: bool,
    pub(crate) allocates_at_once: bool,
    pub(crate) uncached: bool,
    /// The size of the pages with which the heap populates memory.
    pub(crate) pages: Pages,
    /// Whether this crate provides the heap.
    pub(crate) own: bool,
}
