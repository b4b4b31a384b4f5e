//! What a load tells its consumer.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Error;
use crate::memory::segment::Segment;
use crate::model::index::Index;
use crate::plan::tensors::FileTensors;
use crate::telemetry::report::Report;

/// What a load tells its consumer, in this order: its files, if it is kept; segments; the end or
/// an error.
#[derive(Debug)]
pub(crate) enum Event {
    /// The files were opened or looked at.
    Planned(Vec<LoadFile>),
    Segment(Segment),
    Done(Box<Finished>),
    Failed(Error),
}

/// What is known at the end.
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
    /// The part of it that is the model.
    pub(crate) part: Range<u64>,
    pub(crate) tensors: Option<Arc<FileTensors>>,
    /// Whether `tensors` is final. The headers of small files are read with their bytes, so what
    /// these have is known with their first segment.
    pub(crate) is_known: bool,
    /// Whether any byte of it is read.
    pub(crate) has_segments: bool,
    /// The index that named it, with that index's folder.
    pub(crate) index: Option<(PathBuf, Arc<Index>)>,
}

/// How far a load is, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// What is to be loaded; 0 until the files are opened.
    pub planned_bytes: u64,
    /// What has memory.
    pub allocated_bytes: u64,
    /// What is read.
    pub read_bytes: u64,
}
