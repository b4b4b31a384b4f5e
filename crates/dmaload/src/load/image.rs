//! A finished load: all its segments and a map of their contents.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use super::names::{FolderIndex, Names, indices};
use crate::engine::event::LoadFile;
use crate::error::{Error, Result};
use crate::memory::private::PrivateMemory;
use crate::memory::segment::{Contiguous, Segment, segments_of_range};
use crate::model::{DType, TensorInfo, TensorMap};
use crate::plan::select::{Rows, TensorSlice};
use crate::plan::tensors::FileTensors;
use crate::support::convert::to_usize;
use crate::telemetry::report::Report;

/// All segments of a load, with its files, tensors and report. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Image {
    files: Arc<[ImageFile]>,
    segments: Arc<[Segment]>,
    report: Arc<Report>,
    /// Finds the tensors of all files by name. Built on the first lookup.
    names: Arc<OnceLock<Names>>,
    indices: Arc<[FolderIndex]>,
}

/// One file in an image.
#[derive(Debug, Clone)]
pub struct ImageFile {
    path: Arc<PathBuf>,
    bytes: u64,
    /// The byte range of the file that contains the model.
    part: Range<u64>,
    segments: Arc<[Segment]>,
    tensors: Option<Arc<FileTensors>>,
    /// Whether `segments` may lack some of the file's segments. This is the case if this value
    /// belongs to a tensor that was returned before the load ended, or that released the other
    /// segments.
    is_partial: bool,
}

impl Image {
    pub(crate) fn new(files: Vec<LoadFile>, segments: Vec<Segment>, report: Report) -> Self {
        let mut own: Vec<Vec<Segment>> = files.iter().map(|_| Vec::new()).collect();
        for segment in &segments {
            if let Some(own) = own.get_mut(segment.file_index()) {
                own.push(segment.clone());
            }
        }
        let indices = indices(files.iter());
        let files = files.into_iter().zip(own);
        let files = files.map(|(file, own)| ImageFile::new(file.path, file.bytes, file.part, own, file.tensors));
        Image {
            files: files.collect(),
            segments: segments.into(),
            report: Arc::new(report),
            names: Arc::default(),
            indices: indices.into(),
        }
    }

    /// The files, in load order.
    pub fn files(&self) -> &[ImageFile] {
        &self.files
    }

    /// The segments of all files, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The report of the load.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Returns the tensor with this name. If two files of a model contain it, returns the one from
    /// the file that the model's index maps it to.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`] for an unknown name; [`Error::NotLoaded`] or [`Error::NotSelected`]
    /// for a tensor that was not requested; [`Error::AmbiguousTensor`] if several files that the
    /// caller listed contain it: use [`ImageFile::tensor`] to look it up in one of them.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let names = self.names.get_or_init(|| {
            let files = self.files.iter().map(|file| (Arc::clone(&file.path), file.tensors.clone()));
            Names::new(files.collect(), self.indices.to_vec())
        });
        let (file, position) = names.find(name)?;
        let file = self.files.get(file).expect("a name must belong to one of the files");
        Ok(file.tensor_at(position).expect("a lookup by name must find only loaded tensors"))
    }

    /// All loaded tensors, file by file; within a file, in file order or in the order in which
    /// they were requested. For a model with an index, each name appears once.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor> {
        self.files.iter().flat_map(ImageFile::tensors)
    }
}

impl ImageFile {
    pub(crate) fn new(
        path: Arc<PathBuf>,
        bytes: u64,
        part: Range<u64>,
        segments: Vec<Segment>,
        tensors: Option<Arc<FileTensors>>,
    ) -> Self {
        ImageFile { path, bytes, part, segments: segments.into(), tensors, is_partial: false }
    }

    /// The length of the whole file, even if the model occupies only a range of it.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.bytes
    }

    /// The byte range of the file that contains the model: all of it, unless a range of a larger
    /// file was loaded ([`crate::Source::range`]).
    pub fn file_range(&self) -> Range<u64> {
        self.part.clone()
    }

    /// The path, as given or as found in the given folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The length in bytes of the file, or of the part of it that contains the model. This
    /// includes bytes that were not loaded.
    pub fn len(&self) -> u64 {
        self.part.end - self.part.start
    }

    /// Whether [`Self::len`] is 0.
    pub fn is_empty(&self) -> bool {
        self.part.is_empty()
    }

    /// The file's segments, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The map of all tensors in the file; `None` for a file of raw bytes.
    pub fn tensor_map(&self) -> Option<&TensorMap> {
        self.tensors.as_deref().map(|tensors| &*tensors.map)
    }

    /// Returns all bytes of the file, or of the part of it that contains the model, including the
    /// header. The bytes are contiguous and not copied.
    ///
    /// # Errors
    /// Those of [`Segment::bytes`]; [`Error::NotLoaded`] if only parts of the file were loaded, or
    /// if they are not contiguous ([`crate::Layout::Tensors`]).
    pub fn bytes(&self) -> Result<Bytes> {
        self.slice(self.part.clone())
    }

    /// Returns these bytes of the file, contiguous, in memory that only this process can access
    /// and may write to. See [`PrivateMemory`], which also explains what this revokes. `range` is
    /// relative to the beginning of the file, like [`Self::file_range`].
    ///
    /// # Errors
    /// [`Error::NotLoaded`] under the same conditions as [`Self::bytes`]; [`Error::Viewed`] while
    /// there are views of anonymous memory; [`Error::NoDescriptor`] for a dma-buf;
    /// [`Error::Memory`] if a memfd cannot be mapped again. If the range spans several segments,
    /// [`Error::Viewed`] can be returned after some of these segments were handed out: they can
    /// never be viewed again, but nothing is written to them. Once all views are dropped, another
    /// call succeeds.
    pub fn private_memory(&self, range: Range<u64>) -> Result<PrivateMemory> {
        PrivateMemory::from_segments(&self.path, &self.segments, range)
    }

    /// Returns the tensor with this name if it was loaded and the model's index, if any, does not
    /// map the name to another file. If this is the [file](Tensor::file) of a tensor that was
    /// returned before the load ended, it contains only the tensors that lie in that tensor's
    /// segments.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let position = self.tensor_map()?.get_index_of(name)?;
        self.tensor_at(position)
    }

    /// The file's loaded tensors, in file order or in the order in which they were requested.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor> {
        let tensors = self.tensors.as_deref();
        let count = tensors.map_or(0, FileTensors::len);
        let positions = (0..count).filter_map(move |number| tensors?.position_of(number));
        let positions = positions.filter(|&position| !self.is_partial || self.tensor_at(position).is_some());
        positions.map(|position| self.tensor_at(position).expect("a selected tensor must be in the file's map"))
    }

    /// The tensor at this position of the map, if it was loaded.
    pub(crate) fn tensor_at(&self, position: usize) -> Option<Tensor> {
        let tensors = self.tensors.as_ref()?;
        let part = tensors.part_at(position)?;
        if self.is_partial && last_missing_row(&self.segments, &part.rows).is_some() {
            return None;
        }
        // Accesses to the tensor's name and type look them up in the map, so the entry must exist.
        tensors.map.get_index(position)?;
        Some(Tensor { position, part, tensors: Arc::clone(tensors), file: self.clone() })
    }

    fn slice(&self, range: Range<u64>) -> Result<Bytes> {
        Contiguous::bytes(&self.path, &self.segments, range)
    }
}

/// Returns the tensor at this position in a file's map, if these segments of the file hold all of
/// its bytes.
pub(super) fn complete_tensor(file: &LoadFile, segments: &[Segment], position: usize) -> Option<Tensor> {
    let tensors = file.tensors.as_ref()?;
    let part = tensors.part_at(position)?;
    if last_missing_row(segments, &part.rows).is_some() {
        return None;
    }
    let tensors = Some(Arc::clone(tensors));
    let own = overlapping(segments, &part.rows.hull());
    let file = ImageFile::new(Arc::clone(&file.path), file.bytes, file.part.clone(), own, tensors);
    ImageFile { is_partial: true, ..file }.tensor_at(position)
}

/// Returns the segments that hold bytes of this range.
fn overlapping(segments: &[Segment], range: &Range<u64>) -> Vec<Segment> {
    let holds = |segment: &&Segment| {
        let held = segment.file_range();
        held.start < range.end && range.start < held.end
    };
    segments.iter().filter(holds).cloned().collect()
}

/// Of the tensor's bytes that are missing from these segments of its file, finds the one that is
/// expected to arrive last, and returns its offset in the file. Returns `None` if all bytes of the
/// tensor have arrived, or if the tensor was not selected.
pub(super) fn missing_byte(file: &LoadFile, segments: &[Segment], position: usize) -> Option<u64> {
    let part = file.tensors.as_ref()?.part_at(position)?;
    // A row's segments arrive in order, so the segment with its last byte completes the row.
    last_missing_row(segments, &part.rows).map(|row| row.end - 1)
}

/// Returns the last of these rows that is not entirely in these segments of a file.
fn last_missing_row(segments: &[Segment], rows: &Rows) -> Option<Range<u64>> {
    let is_missing = |row: &Range<u64>| !row.is_empty() && segments_of_range(segments, row).is_none();
    // If the segments hold the whole hull of the rows, they hold every row. Otherwise, each row is
    // checked, because some may lie in blocks that were read earlier, with other tensors.
    if is_missing(&rows.hull()) { rows.iter().rev().find(is_missing) } else { None }
}

/// A tensor in an image, or one rank's part of a tensor: its name, type and shape, and where its
/// bytes are.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// The tensor's position in the map of `tensors`. [`ImageFile::tensor_at`] checks that the
    /// entry exists.
    position: usize,
    part: TensorSlice,
    tensors: Arc<FileTensors>,
    file: ImageFile,
}

/// The contiguous bytes of a tensor within one segment.
#[derive(Debug, Clone)]
pub struct TensorPart {
    /// The segment.
    pub segment: Segment,
    /// Offset of the bytes in the segment.
    pub offset: usize,
    /// Number of bytes.
    pub len: usize,
}

impl TensorPart {
    /// Offset of the bytes in the segment's dma-buf or memfd. It may differ from `offset` if the
    /// segment shares the dma-buf or memfd with other segments.
    pub fn memory_offset(&self) -> usize {
        self.segment.memory_offset() + self.offset
    }
}

impl Tensor {
    /// Releases those of the file's segments that hold none of this tensor's bytes. Without this
    /// call, a tensor from an image keeps its whole file in memory.
    #[must_use]
    pub fn without_other_segments(self) -> Tensor {
        let segments = overlapping(&self.file.segments, &self.part.rows.hull()).into();
        Tensor { file: ImageFile { segments, is_partial: true, ..self.file }, ..self }
    }

    /// The tensor's name.
    pub fn name(&self) -> &str {
        &self.info().name
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.info().dtype
    }

    /// The dimensions, outermost first: `[]` is a scalar. For a rank's part, the dimensions of
    /// that part.
    pub fn shape(&self) -> &[usize] {
        &self.part.shape
    }

    /// The tensor's byte range in its file. For a part that consists of rows, the range extends
    /// from the first row to the last.
    pub fn file_range(&self) -> Range<u64> {
        self.part.rows.hull()
    }

    /// The file that contains the tensor.
    pub fn file(&self) -> &ImageFile {
        &self.file
    }

    /// Whether the bytes are contiguous in the file, and therefore in memory. The bytes of a whole
    /// tensor always are. The bytes of one rank's part usually are not, if the tensor is split
    /// along a dimension other than the first.
    pub fn is_contiguous(&self) -> bool {
        self.part.rows.count == 1
    }

    /// Returns the tensor's bytes, which are contiguous and not copied, even if they span
    /// segments.
    ///
    /// # Errors
    /// Those of [`Segment::bytes`]; [`Error::NotContiguous`] if the tensor is not contiguous.
    pub fn bytes(&self) -> Result<Bytes> {
        if !self.is_contiguous() {
            return Err(Error::NotContiguous { tensor: self.name().to_owned(), rows: self.part.rows.count });
        }
        self.file.slice(self.file_range())
    }

    /// Returns the tensor's bytes, contiguous, in memory that only this process can access and may
    /// write to. See [`PrivateMemory`], which also explains what this revokes.
    ///
    /// # Errors
    /// Those of [`ImageFile::private_memory`]; [`Error::NotContiguous`] if the bytes are not
    /// contiguous.
    pub fn private_memory(&self) -> Result<PrivateMemory> {
        if !self.is_contiguous() {
            return Err(Error::NotContiguous { tensor: self.name().to_owned(), rows: self.part.rows.count });
        }
        self.file.private_memory(self.file_range())
    }

    /// Copies the tensor's bytes, even if they are not contiguous.
    ///
    /// # Errors
    /// Those of [`Segment::bytes`].
    pub fn to_vec(&self) -> Result<Vec<u8>> {
        let mut copy = Vec::new();
        let hull = self.file_range();
        // If the bytes between the rows were read as well, one view of the whole range is enough.
        let all = self.file.slice(hull.clone());
        for row in self.part.rows.iter() {
            let at = |offset: u64| to_usize(offset - hull.start);
            match &all {
                Ok(all) => {
                    copy.extend_from_slice(all.get(at(row.start)..at(row.end)).expect("a row must be within the hull"));
                }
                Err(Error::NotLoaded { .. }) => copy.extend_from_slice(&self.file.slice(row)?),
                Err(error) => return Err(error.clone()),
            }
        }
        Ok(copy)
    }

    /// Hands out the dma-buf that holds the whole tensor, which **permanently** revokes views of
    /// the tensor's segment: see [`Segment::hand_out_dma_buf`]. [`Self::parts`] says where in the
    /// dma-buf the tensor begins ([`TensorPart::memory_offset`]).
    ///
    /// # Errors
    /// [`Error::Straddles`] if the tensor spans several segments, or if it is empty and in no
    /// segment; otherwise those of [`Segment::hand_out_dma_buf`].
    pub fn hand_out_dma_buf(&self) -> Result<BorrowedFd<'_>> {
        let parts = self.parts();
        let mut numbers: Vec<_> = parts.iter().map(|part| part.segment.index()).collect();
        numbers.dedup();
        let segment = match *numbers {
            [only] => self.file.segments.iter().find(|segment| segment.index() == only),
            _ => None,
        };
        segment.ok_or_else(|| Error::Straddles { tensor: self.name().to_owned(), segments: numbers.len() })?.hand_out_dma_buf()
    }

    /// Returns where the tensor's bytes are in memory, in order: one part for each segment that
    /// holds some of them. If the tensor is not contiguous, each of its rows has its own parts. An
    /// empty tensor has no parts.
    pub fn parts(&self) -> Vec<TensorPart> {
        self.part.rows.iter().flat_map(|row| self.parts_of(row)).collect()
    }

    fn parts_of(&self, wanted: Range<u64>) -> Vec<TensorPart> {
        if wanted.is_empty() {
            return Vec::new();
        }
        let touched =
            segments_of_range(&self.file.segments, &wanted).expect("the segments of a returned tensor must hold all of its rows");
        let segments = touched.iter().filter_map(|segment| {
            let held = segment.file_range();
            let range = wanted.start.max(held.start)..wanted.end.min(held.end);
            (range.start < range.end).then(|| TensorPart {
                segment: segment.clone(),
                offset: to_usize(range.start - held.start),
                len: to_usize(range.end - range.start),
            })
        });
        segments.collect()
    }

    /// The byte ranges of the tensor in its file.
    pub(crate) fn rows(&self) -> &Rows {
        &self.part.rows
    }

    /// The tensor's entry in the file's header. For a rank's part, this is the whole tensor's
    /// entry.
    pub(crate) fn info(&self) -> &TensorInfo {
        self.tensors.map.get_index(self.position).expect("a tensor's position must be in its map")
    }
}
