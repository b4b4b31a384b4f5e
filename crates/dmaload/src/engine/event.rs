//! Events for the consumer of a load.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Error;
use crate::memory::segment::Segment;
use crate::model::index::Index;
use crate::plan::tensors::FileTensors;
use crate::telemetry::report::Report;

/// An event for the consumer of a load. Events arrive in this order: the files, if the load keeps
/// its segments; segments; the end or an error.
#[derive(Debug)]
pub(crate) enum Event {
    /// The files were opened or inspected.
    Planned(Vec<LoadFile>),
    Segment(Segment),
    Done(Box<Finished>),
    Failed(Error),
}

/// The results of a finished load.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) report: Report,
    pub(crate) files: Vec<LoadFile>,
}

/// A file of a load.
#[derive(Debug, Clone)]
pub(crate) struct LoadFile {
    pub(crate) path: Arc<PathBuf>,
    pub(crate) bytes: u64,
    /// The byte range of the file that contains the model.
    pub(crate) part: Range<u64>,
    pub(crate) tensors: Option<Arc<FileTensors>>,
    /// Whether `tensors` is final. The headers of small files are read with their other bytes, so
    /// their tensors become known only with their first segment.
    pub(crate) is_known: bool,
    /// Whether any byte of the file is read.
    pub(crate) has_segments: bool,
    /// The index that named the file, with the folder of the index.
    pub(crate) index: Option<(PathBuf, Arc<Index>)>,
}

/// The progress of a load, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes to load; 0 until the load is planned.
    pub planned_bytes: u64,
    /// Bytes whose memory is allocated and populated.
    pub allocated_bytes: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
}
