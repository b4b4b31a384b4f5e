//! The events that a load sends to its consumer.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Error;
use crate::memory::segment::Segment;
use crate::model::index::Index;
use crate::plan::tensors::FileTensors;
use crate::telemetry::report::Report;

/// An event that a load sends to its consumer. Events arrive in this order: the list of files, if
/// the load keeps its segments; the segments; and then the end of the load or an error.
#[derive(Debug)]
pub(crate) enum Event {
    /// The load was planned: its files were opened or inspected.
    Planned(Vec<LoadFile>),
    Segment(Segment),
    Done(Box<Finished>),
    Failed(Error),
}

#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) report: Report,
    pub(crate) files: Vec<LoadFile>,
}

/// Describes one of a load's files to the consumer.
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
    /// Whether the load reads any bytes of the file.
    pub(crate) has_segments: bool,
    /// If an index lists the file: the folder that contains the index, and the index itself.
    pub(crate) index: Option<(PathBuf, Arc<Index>)>,
}

/// The progress of a load, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// The number of bytes to load; 0 until the load is planned.
    pub planned_bytes: u64,
    /// The number of bytes for which memory has been allocated and populated so far.
    pub allocated_bytes: u64,
    /// The number of bytes read so far.
    pub read_bytes: u64,
}
