//! A finished load: all segments, with the map of what is in them.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use super::names::{FolderIndex, Names, indices};
use crate::engine::event::LoadFile;
use crate::error::{Error, Result};
use crate::memory::segment::{Contiguous, Segment, holding};
use crate::model::{DType, TensorInfo, TensorMap};
use crate::plan::select::{Rows, TensorSlice};
use crate::plan::tensors::FileTensors;
use crate::support::convert::to_usize;
use crate::telemetry::report::Report;

/// All segments of a load, with its files, its tensors and its report. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Image {
    files: Arc<[ImageFile]>,
    segments: Arc<[Segment]>,
    report: Arc<Report>,
    /// The tensors of all files, made when one is first looked up.
    names: Arc<OnceLock<Names>>,
    indices: Arc<[FolderIndex]>,
}

/// One file of an image.
#[derive(Debug, Clone)]
pub struct ImageFile {
    path: Arc<PathBuf>,
    bytes: u64,
    /// The part of the file that is the model.
    part: Range<u64>,
    segments: Arc<[Segment]>,
    tensors: Option<Arc<FileTensors>>,
    /// Whether segments are missing that the load has, or will have: it belongs to a tensor that
    /// was given before the load ended.
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

    /// The tensor of this name: of two files of a model that have it, that of the file which the model's index maps it to.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`]; [`Error::NotLoaded`] or [`Error::NotSelected`] for one that was not asked for;
    /// [`Error::AmbiguousTensor`] where several files that the caller named one by one have it: [`ImageFile::tensor`] looks it
    /// up in one.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let names = self.names.get_or_init(|| {
            let files = self.files.iter().map(|file| (Arc::clone(&file.path), file.tensors.clone()));
            Names::new(files.collect(), self.indices.to_vec())
        });
        let (file, position) = names.find(name)?;
        let file = self.files.get(file).expect("a name is of one of the files");
        Ok(file.tensor_at(position).expect("a name is of a tensor that was loaded"))
    }

    /// All tensors that were loaded of all files, of a model with an index each name once: in file order, or in the order in which they were asked for.
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

    /// The length of the file that the model is in.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.bytes
    }

    /// The bytes of the file that are the model: all of them, unless it was loaded from inside of
    /// another file
    /// ([`crate::Source::range`]).
    pub fn file_range(&self) -> Range<u64> {
        self.part.clone()
    }

    /// The path, as it was given, or as it was found in the folder that was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The length of the file, or of the part of it that is the model, in bytes, also where only parts of it were loaded.
    pub fn len(&self) -> u64 {
        self.part.end - self.part.start
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.part.is_empty()
    }

    /// Its segments, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Its tensor map, with all tensors that it has; `None` for a file of raw bytes.
    pub fn tensor_map(&self) -> Option<&TensorMap> {
        self.tensors.as_deref().map(|tensors| &*tensors.map)
    }

    /// All its bytes, contiguous and without a copy, header included.
    ///
    /// # Errors
    /// As [`Segment::bytes`]; [`Error::NotLoaded`] where only parts of it were, or where they are not contiguous
    /// ([`crate::Layout::Tensors`]).
    pub fn bytes(&self) -> Result<Bytes> {
        self.slice(self.part.clone())
    }

    /// Its tensor of this name, if that was loaded, and if the model's index, where it has one, doesn't map the name to another
    /// file. The file of a tensor that was given before the load ended ([`Tensor::file`]) has those tensors only that lie in
    /// the segments of that tensor.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        let position = self.tensor_map()?.get_index_of(name)?;
        self.tensor_at(position)
    }

    /// Its tensors that were loaded, in file order, or in the order in which they were asked for.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor> {
        let tensors = self.tensors.as_deref();
        let count = tensors.map_or(0, FileTensors::len);
        let positions = (0..count).filter_map(move |number| tensors?.position_of(number));
        let positions = positions.filter(|&position| !self.is_partial || self.tensor_at(position).is_some());
        positions.map(|position| self.tensor_at(position).expect("a tensor that was chosen is in the map"))
    }

    /// The tensor at this position of the map, if it was loaded.
    pub(crate) fn tensor_at(&self, position: usize) -> Option<Tensor> {
        let tensors = self.tensors.as_ref()?;
        let part = tensors.part_at(position)?;
        if self.is_partial && !has_rows(&self.segments, &part.rows) {
            return None;
        }
        // A tensor's name and type are looked up there whenever they are asked for.
        tensors.map.get_index(position)?;
        Some(Tensor { position, part, tensors: Arc::clone(tensors), file: self.clone() })
    }

    fn slice(&self, range: Range<u64>) -> Result<Bytes> {
        Contiguous::bytes(&self.path, &self.segments, range)
    }
}

/// The tensor at this position of a file's map, if all its bytes are in these of the file's
/// segments.
pub(super) fn complete_tensor(file: &LoadFile, segments: &[Segment], position: usize) -> Option<Tensor> {
    let tensors = file.tensors.as_ref()?;
    let part = tensors.part_at(position)?;
    if !has_rows(segments, &part.rows) {
        return None;
    }
    let hull = part.rows.hull();
    let own = segments.iter().filter(|segment| {
        let held = segment.file_range();
        held.start < hull.end && hull.start < held.end
    });
    let tensors = Some(Arc::clone(tensors));
    let file = ImageFile::new(Arc::clone(&file.path), file.bytes, file.part.clone(), own.cloned().collect(), tensors);
    ImageFile { is_partial: true, ..file }.tensor_at(position)
}

/// Whether all of these rows are in these segments of a file.
fn has_rows(segments: &[Segment], rows: &Rows) -> bool {
    let is_there = |row: &Range<u64>| row.is_empty() || holding(segments, row).is_some();
    let ends = [rows.iter().next(), rows.iter().last()];
    // The ends say nothing about the rows between them, unless one span has all: the blocks of other
    // tensors, which were read before, may hold both.
    ends.into_iter().flatten().all(|row| is_there(&row)) && (is_there(&rows.hull()) || rows.iter().all(|row| is_there(&row)))
}

/// One tensor of an image, or one rank's part of it: what it is, and where its bytes are.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Its place in the map of `tensors`, which has one there: [`ImageFile::tensor_at`] checks it.
    position: usize,
    part: TensorSlice,
    tensors: Arc<FileTensors>,
    file: ImageFile,
}

/// The bytes of a tensor that lie in one segment, next to each other.
#[derive(Debug, Clone)]
pub struct TensorPart {
    /// The segment.
    pub segment: Segment,
    /// Where in the segment they begin, in bytes.
    pub offset: usize,
    /// How many bytes they are.
    pub len: usize,
}

impl TensorPart {
    /// Where in the segment's dma-buf or memfd they begin, in bytes: not at `offset` where small
    /// files share that.
    pub fn memory_offset(&self) -> usize {
        self.segment.memory_offset() + self.offset
    }
}

impl Tensor {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.info().name
    }

    /// The type of its elements.
    pub fn dtype(&self) -> DType {
        self.info().dtype
    }

    /// The lengths of its dimensions, outermost first: `[]` is a scalar. Of a rank's part, that
    /// part's.
    pub fn shape(&self) -> &[usize] {
        &self.part.shape
    }

    /// Where it is in its file, in bytes; of a part in rows, from the first to the last.
    pub fn file_range(&self) -> Range<u64> {
        self.part.rows.hull()
    }

    /// The file that it is in.
    pub fn file(&self) -> &ImageFile {
        &self.file
    }

    /// Whether its bytes are contiguous in the file, and so in memory: all whole tensors are, a
    /// rank's part along another than the first dimension is not.
    pub fn is_contiguous(&self) -> bool {
        self.part.rows.count == 1
    }

    /// Its bytes, contiguous and without a copy, even where it crosses segments.
    ///
    /// # Errors
    /// As [`Segment::bytes`]; [`Error::NotContiguous`] where it is not contiguous.
    pub fn bytes(&self) -> Result<Bytes> {
        if !self.is_contiguous() {
            return Err(Error::NotContiguous { tensor: self.name().to_owned(), rows: self.part.rows.count });
        }
        self.file.slice(self.file_range())
    }

    /// A copy of its bytes, also of those that are not contiguous.
    ///
    /// # Errors
    /// As [`Segment::bytes`].
    pub fn to_vec(&self) -> Result<Vec<u8>> {
        let mut copy = Vec::new();
        let hull = self.file_range();
        // One view where what is between the rows was read, too.
        let all = self.file.slice(hull.clone());
        for row in self.part.rows.iter() {
            let at = |offset: u64| to_usize(offset - hull.start);
            match &all {
                Ok(all) => {
                    copy.extend_from_slice(all.get(at(row.start)..at(row.end)).expect("a row is within the hull of all rows"));
                }
                Err(Error::NotLoaded { .. }) => copy.extend_from_slice(&self.file.slice(row)?),
                Err(error) => return Err(error.clone()),
            }
        }
        Ok(copy)
    }

    /// Hands out the dma-buf that holds all of it, which revokes views of its segment **for
    /// good**: see [`Segment::hand_out_dma_buf`]. Where in the dma-buf the tensor begins is in its
    /// parts ([`TensorPart::memory_offset`]).
    ///
    /// # Errors
    /// [`Error::Straddles`] when it lies in several segments, or in none because it is empty; else as
    /// [`Segment::hand_out_dma_buf`].
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

    /// Where it is in memory, in order: one part for each segment that holds some of it, or of
    /// each of its rows where it is not contiguous. An empty tensor has none.
    pub fn parts(&self) -> Vec<TensorPart> {
        self.part.rows.iter().flat_map(|row| self.parts_of(row)).collect()
    }

    fn parts_of(&self, wanted: Range<u64>) -> Vec<TensorPart> {
        if wanted.is_empty() {
            return Vec::new();
        }
        let touched = holding(&self.file.segments, &wanted).expect("a tensor is given with all its rows");
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

    /// Where its bytes are in the file.
    pub(crate) fn rows(&self) -> &Rows {
        &self.part.rows
    }

    /// What the file's header says of it: of a rank's part, of the whole tensor.
    pub(crate) fn info(&self) -> &TensorInfo {
        self.tensors.map.get_index(self.position).expect("a tensor is made of a position that its map has")
    }
}
