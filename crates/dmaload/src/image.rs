//! A finished load: all segments, with the map of what is in them.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{Error, Result};
use crate::model::{DType, TensorInfo, TensorMap};
use crate::report::Report;
use crate::segment::{Contiguous, Segment};

/// All segments of a load, with its files, its tensors and its report. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Image {
    files: Arc<[ImageFile]>,
    segments: Arc<[Segment]>,
    report: Arc<Report>,
}

/// One file of an image.
#[derive(Debug, Clone)]
pub struct ImageFile {
    path: Arc<PathBuf>,
    len: u64,
    segments: Arc<[Segment]>,
    tensors: Option<Arc<TensorMap>>,
}

impl Image {
    pub(crate) fn new(files: Vec<(Arc<PathBuf>, u64, Option<Arc<TensorMap>>)>, segments: Vec<Segment>, report: Report) -> Self {
        let mut own: Vec<Vec<Segment>> = files.iter().map(|_| Vec::new()).collect();
        for segment in &segments {
            if let Some(own) = own.get_mut(segment.file_index()) {
                own.push(segment.clone());
            }
        }
        let files = files.into_iter().zip(own);
        let files = files.map(|((path, len, tensors), own)| ImageFile { path, len, segments: own.into(), tensors });
        Image { files: files.collect(), segments: segments.into(), report: Arc::new(report) }
    }

    /// The files, in the order given.
    pub fn files(&self) -> &[ImageFile] {
        &self.files
    }

    /// The segments of all files, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// What happened during the load.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The tensor of this name; of several files that have it, the first.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let found = self.files.iter().find_map(|file| file.tensor(name));
        found.ok_or_else(|| Error::NoSuchTensor(name.to_owned()))
    }

    /// All tensors of all files, in file order.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor> {
        self.files.iter().flat_map(ImageFile::tensors)
    }
}

impl ImageFile {
    /// The path, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its segments, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Its tensor map; `None` for a file of raw bytes.
    pub fn tensor_map(&self) -> Option<&TensorMap> {
        self.tensors.as_deref()
    }

    /// All its bytes, contiguous and without a copy, header included.
    ///
    /// # Errors
    /// As [`Segment::bytes`].
    pub fn bytes(&self) -> Result<Bytes> {
        self.slice(0..self.len)
    }

    /// Its tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        self.tensor_map()?.get(name).map(|info| Tensor { info: info.clone(), file: self.clone() })
    }

    /// Its tensors, in file order.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor> {
        self.tensor_map().into_iter().flatten().map(|info| Tensor { info: info.clone(), file: self.clone() })
    }

    fn slice(&self, range: Range<u64>) -> Result<Bytes> {
        Contiguous::bytes(&self.segments, range)
    }
}

/// One tensor of an image: what it is, and where its bytes are.
#[derive(Debug, Clone)]
pub struct Tensor {
    info: TensorInfo,
    file: ImageFile,
}

/// A part of a tensor that lies in one segment.
#[derive(Debug, Clone)]
pub struct TensorPart {
    /// The segment.
    pub segment: Segment,
    /// Where in the segment the part begins, in bytes.
    pub offset: usize,
    /// Its length in bytes.
    pub len: usize,
}

impl TensorPart {
    /// Where in the segment's dma-buf or memfd the part begins, in bytes: not at `offset` where small files share that.
    pub fn memory_offset(&self) -> usize {
        self.segment.memory_offset() + self.offset
    }
}

impl Tensor {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        self.info.dtype
    }

    /// The lengths of its dimensions, outermost first.
    pub fn shape(&self) -> &[u64] {
        &self.info.shape
    }

    /// Where it is in its file, in bytes.
    pub fn file_range(&self) -> Range<u64> {
        self.info.file_range.clone()
    }

    /// The file that it is in.
    pub fn file(&self) -> &ImageFile {
        &self.file
    }

    /// Its bytes, contiguous and without a copy, even where it crosses segments.
    ///
    /// # Errors
    /// As [`Segment::bytes`].
    pub fn bytes(&self) -> Result<Bytes> {
        self.file.slice(self.file_range())
    }

    /// The dma-buf that holds all of it; where in that it begins, its only part tells ([`TensorPart::memory_offset`]).
    ///
    /// # Errors
    /// [`Error::Straddles`] when it lies in several segments, or in none because it is empty; else as
    /// [`Segment::dma_buf`].
    pub fn dma_buf(&self) -> Result<BorrowedFd<'_>> {
        let parts = self.parts();
        let segment = match &*parts {
            [part] => self.file.segments.iter().find(|segment| segment.index() == part.segment.index()),
            _ => None,
        };
        segment.ok_or_else(|| Error::Straddles { tensor: self.name().to_owned(), segments: parts.len() })?.dma_buf()
    }

    /// Where it is in memory: one part for each segment that holds some of it. An empty tensor has none.
    pub fn parts(&self) -> Vec<TensorPart> {
        let wanted = self.file_range();
        let segments = self.file.segments.iter().filter_map(|segment| {
            let held = segment.file_range();
            let range = wanted.start.max(held.start)..wanted.end.min(held.end);
            (range.start < range.end).then(|| TensorPart {
                segment: segment.clone(),
                offset: usize::try_from(range.start - held.start).unwrap_or(usize::MAX),
                len: usize::try_from(range.end - range.start).unwrap_or(usize::MAX),
            })
        });
        segments.collect()
    }
}
