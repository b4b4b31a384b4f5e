//! What a load plans for a file, and what it takes to allocate a batch.

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

/// A file as it was when the load began, and what is to be done with it.
#[derive(Debug)]
pub(crate) struct FilePlan {
    pub(crate) identity: Identity,
    pub(crate) alignment_bytes: u64,
    /// The part of it that is the model.
    pub(crate) part: Range<u64>,
    pub(crate) tensors: Option<Arc<FileTensors>>,
    /// What is to be read of it, and how much of that was asked for.
    pub(crate) read_bytes: u64,
    pub(crate) wanted_bytes: u64,
    /// The route its reads start at; of a small file, the one that it is to be opened for.
    pub(crate) route: Route,
    /// A small file: it is opened when its turn comes, and its header is taken from its memory.
    pub(crate) small: bool,
    /// Open already, or to be opened when its first piece is allocated.
    pub(crate) open: Option<Arc<OpenFile>>,
}

/// What it takes to allocate a batch. The cells are shared by the batches of a memory and the pieces of a file: whoever comes
/// first fills them.
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

/// What was populated: a batch, or a part of one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allocated {
    /// The file and the segment that it begins with.
    pub(crate) file_index: usize,
    pub(crate) segment: usize,
    /// Of the files.
    pub(crate) bytes: u64,
    pub(crate) memory_bytes: u64,
}

impl Allocation {
    /// What all of the batch is.
    pub(crate) fn allocated(&self) -> Allocated {
        let first = self.parts.first().expect("a batch has pieces");
        Allocated {
            file_index: first.file_index,
            segment: first.piece.segment,
            bytes: self.parts.iter().map(|part| part.piece.bytes).sum(),
            memory_bytes: self.batch.bytes,
        }
    }
}

/// A piece of a batch, and its file.
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

/// What a load has to know of the heap.
#[derive(Debug)]
pub(crate) struct HeapFacts {
    pub(crate) name: Arc<str>,
    pub(crate) notes: Arc<[String]>,
    pub(crate) exports: bool,
    pub(crate) allocates_at_once: bool,
    pub(crate) uncached: bool,
    /// The page size that it populates with.
    pub(crate) pages: Pages,
    /// Whether it is one of this crate's.
    pub(crate) own: bool,
}
