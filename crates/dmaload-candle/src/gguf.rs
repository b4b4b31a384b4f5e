//! Provides the tensors of GGUF models by name, and a reader for candle's quantized models.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, Metadata};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{Device, Error};
use dmaload::{Format, LoadOptions, Loader, Report, Tensor, Tensors, inspect_blocking};

use crate::arrivals::{Arrivals, Missing};
use crate::headers::{self, Named};
use crate::weights::unavailable;

/// Provides the tensors of a GGUF model by name, as candle's `QTensor`s, while the model is still
/// being read. Cheap to clone.
///
/// Each tensor is copied once, and is available as soon as its last byte is loaded. Requesting a
/// tensor blocks the thread until then. The files of a split model are loaded as one model.
/// Dropping the last clone cancels the load.
///
/// ```no_run
/// # fn load(loader: &dmaload::Loader) -> anyhow::Result<()> {
/// use candle_core::Device;
/// use candle_core::quantized::QMatMul;
/// use dmaload_candle::QTensors;
///
/// let tensors = QTensors::load(loader, "model.gguf", &Device::Cpu)?;
/// let query = QMatMul::from_arc(tensors.get("blk.0.attn_q.weight")?)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct QTensors(Arc<GgufState>);

#[derive(Debug)]
struct GgufState {
    named: Named,
    arrivals: Arrivals<Arc<QTensor>>,
}

impl QTensors {
    /// Starts loading a GGUF model. The model's headers are read before this function returns.
    ///
    /// # Errors
    /// Returns the errors of [`dmaload::inspect_load_blocking`], and [`dmaload::Error::Start`] if
    /// no thread can be started. Later errors are returned by requests for tensors and by
    /// [`Self::finish`].
    pub fn load(loader: &Loader, path: impl Into<PathBuf>, device: &Device) -> dmaload::Result<Self> {
        Self::load_with(loader, path, loader.load_options(), device)
    }

    /// Like [`Self::load`], but takes options, such as an order for the tensors
    /// ([`LoadOptions::tensors`]).
    ///
    /// # Errors
    /// Returns the same errors as [`Self::load`].
    pub fn load_with(loader: &Loader, path: impl Into<PathBuf>, options: LoadOptions, device: &Device) -> dmaload::Result<Self> {
        let paths = [path.into()];
        let named = headers::read(&paths, &options)?;
        let target = device.clone();
        let arrivals = Arrivals::start(loader.load(paths).options(options), move |tensor| {
            convert(tensor, &target).map(Arc::new).map_err(|error| error.to_string())
        })?;
        Ok(QTensors(Arc::new(GgufState { named, arrivals })))
    }

    /// Returns the tensor with this name. Blocks the caller's thread until the tensor's bytes are
    /// loaded.
    ///
    /// # Errors
    /// Returns `CannotFindTensor`, without waiting, if the model does not have the tensor or if
    /// the load's options leave it out. Returns `Msg` if candle does not have the tensor's type,
    /// if the tensor has no elements, or if the load failed.
    pub fn get(&self, name: &str) -> candle_core::Result<Arc<QTensor>> {
        if !self.contains(name) {
            return Err(Error::CannotFindTensor { path: name.to_owned() }.bt());
        }
        self.0.arrivals.wait(name).map_err(|missing| unavailable(name, &missing))
    }

    /// Returns whether the model's headers list the tensor. Does not wait for the tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.0.named.contains_key(name)
    }

    /// Iterates over the names of all tensors in the model, in arbitrary order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.named.keys().map(String::as_str)
    }

    /// Waits for the rest of the load, and drops this clone: see
    /// [`Weights::finish`](crate::Weights::finish).
    ///
    /// # Errors
    /// Returns the error of the load.
    pub fn finish(self) -> dmaload::Result<Report> {
        self.0.arrivals.finish()
    }
}

/// Copies a tensor's blocks to the device. This is the only copy.
fn convert(tensor: &Tensor, device: &Device) -> candle_core::Result<QTensor> {
    let dtype = block_type(tensor.dtype())?;
    let bytes = tensor.bytes().map_err(Error::wrap)?;
    // candle asserts that the address is aligned (see below), even for a tensor without elements.
    if bytes.is_empty() {
        candle_core::bail!("it has no elements")
    }
    // candle asserts that the address has this alignment. In memory, files begin at multiples of
    // the page size, and GGUF aligns tensors to 32 bytes by default, and to at least 8.
    if !bytes.as_ptr().addr().is_multiple_of(align_of::<f32>()) {
        candle_core::bail!("its bytes, at offset {} of the file, are not aligned to 4 bytes in memory", tensor.file_range().start)
    }
    QTensor::new(QStorage::from_data(Cow::Borrowed(&bytes), device, dtype)?, tensor.shape())
}

fn block_type(dtype: dmaload::model::DType) -> candle_core::Result<GgmlDType> {
    Ok(match dtype {
        dmaload::model::DType::F32 => GgmlDType::F32,
        dmaload::model::DType::F16 => GgmlDType::F16,
        dmaload::model::DType::BF16 => GgmlDType::BF16,
        dmaload::model::DType::Q4_0 => GgmlDType::Q4_0,
        dmaload::model::DType::Q4_1 => GgmlDType::Q4_1,
        dmaload::model::DType::Q5_0 => GgmlDType::Q5_0,
        dmaload::model::DType::Q5_1 => GgmlDType::Q5_1,
        dmaload::model::DType::Q8_0 => GgmlDType::Q8_0,
        dmaload::model::DType::Q8_1 => GgmlDType::Q8_1,
        dmaload::model::DType::Q2_K => GgmlDType::Q2K,
        dmaload::model::DType::Q3_K => GgmlDType::Q3K,
        dmaload::model::DType::Q4_K => GgmlDType::Q4K,
        dmaload::model::DType::Q5_K => GgmlDType::Q5K,
        dmaload::model::DType::Q6_K => GgmlDType::Q6K,
        dmaload::model::DType::Q8_K => GgmlDType::Q8K,
        other => candle_core::bail!("candle has no block type {other}"),
    })
}

/// Reads a GGUF file for candle's quantized models. The tensors' bytes are loaded by dmaload.
///
/// ```no_run
/// # fn load(loader: &dmaload::Loader) -> anyhow::Result<()> {
/// use candle_core::Device;
/// use candle_core::quantized::gguf_file::Content;
/// use candle_transformers::models::quantized_llama::ModelWeights;
/// use dmaload_candle::GgufReader;
///
/// // The order in which candle's models request tensors.
/// let wanted = ["token_embd.*", "output*", "*"];
/// let options = loader.load_options().tensors(wanted);
/// let mut reader = GgufReader::open(loader, "model.gguf", options)?;
/// let model = ModelWeights::from_gguf(Content::read(&mut reader)?, &mut reader, &Device::Cpu)?;
/// # Ok(())
/// # }
/// ```
///
/// Reading from a tensor blocks until the tensor's last byte is loaded. Once the tensor has been
/// read to its end, the reader drops the tensor's memory. candle makes two copies of each tensor,
/// and keeps one of them. The load reads ahead of the model by at most the window and one segment.
///
/// If the model requests a tensor before its turn, the reader keeps all tensors that arrive before
/// that tensor. If these tensors use up the loader's memory limit, the read fails with the message
/// of [`dmaload::Error::HeldUp`]. To prevent this, raise the limit, or load the tensors in the
/// model's order ([`LoadOptions::tensors`]). If [`LoadOptions::shard`] loads only a part of a
/// tensor, reading this tensor is an error.
///
/// The header is read when the reader is opened, and kept in memory. Tensors that are read a
/// second time, and the bytes between tensors, are read from the file through the page cache. Such
/// a read fails if the file has changed.
#[derive(Debug)]
pub struct GgufReader {
    file: File,
    path: PathBuf,
    identity: Identity,
    header: Vec<u8>,
    /// The tensors that have not been read to their end yet, by their offset in the file.
    tensors: BTreeMap<u64, Unread>,
    load: Tensors,
    /// The tensors that have arrived but have not been read to their end yet.
    held: HashMap<String, Tensor>,
    failed: Option<dmaload::Error>,
    position: u64,
}

/// A tensor that has not been read to its end yet.
#[derive(Debug, Clone)]
struct Unread {
    name: String,
    end: u64,
}

/// Identifies a file, and the version of its contents.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Identity {
    fn new(metadata: &Metadata) -> Self {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

impl GgufReader {
    /// Opens a file and starts loading it. Loads only this file, even if it is a part of a split
    /// model, because candle reads a single file.
    ///
    /// # Errors
    /// Fails if the file cannot be opened or read, or is not in GGUF format. A [`dmaload::Error`]
    /// is wrapped in an [`io::Error`].
    pub fn open(loader: &Loader, path: impl AsRef<Path>, options: LoadOptions) -> io::Result<Self> {
        let path = path.as_ref().to_owned();
        let file = File::open(&path)?;
        let identity = Identity::new(&file.metadata()?);
        let inspected = inspect_blocking(&path, Format::Gguf).map_err(io::Error::other)?;
        let map = inspected.tensors.expect("a GGUF file should have a map of its tensors");
        let header_bytes = usize::try_from(map.header_bytes()).map_err(io::Error::other)?;
        let mut header = vec![0; header_bytes];
        file.read_exact_at(&mut header, 0)?;
        let held = map.iter().filter(|tensor| !tensor.file_range.is_empty());
        let tensors =
            held.map(|tensor| (tensor.file_range.start, Unread { name: tensor.name.clone(), end: tensor.file_range.end }));
        let tensors = tensors.collect();
        let load = loader.load(&path).options(options.format(Format::Gguf).as_one_file(true)).tensors();
        Ok(GgufReader { file, path, identity, header, tensors, load, held: HashMap::new(), failed: None, position: 0 })
    }

    /// Waits for the tensor with this name. Keeps the tensors that arrive before it.
    fn wait(&mut self, name: &str) -> Result<Tensor, Missing> {
        loop {
            if let Some(tensor) = self.held.get(name) {
                return Ok(tensor.clone());
            }
            if let Some(error) = &self.failed {
                return Err(Missing::Failed(error.clone()));
            }
            match self.load.next_while_holding_blocking() {
                Some(Ok(tensor)) => drop(self.held.insert(tensor.name().to_owned(), tensor)),
                // The load continues once held tensors have been read and dropped.
                Some(Err(error @ dmaload::Error::HeldUp { .. })) => return Err(Missing::HeldUp(error)),
                Some(Err(error)) => self.failed = Some(error),
                None => return Err(Missing::NotLoaded),
            }
        }
    }

    /// Waits for the rest of the load, and closes the file: see
    /// [`Weights::finish`](crate::Weights::finish).
    ///
    /// # Errors
    /// Returns the error of the load.
    pub fn finish(mut self) -> dmaload::Result<Report> {
        self.held.clear();
        if let Some(error) = self.failed {
            return Err(error);
        }
        // Each tensor is dropped immediately, so the memory limit cannot hold up the rest.
        while let Some(tensor) = self.load.next_while_holding_blocking() {
            tensor?;
        }
        Ok(self.load.report().expect("a stream that has ended should have a report").clone())
    }

    /// Finds the tensor at this position if it has not been read to its end yet. Also returns the
    /// tensor's start.
    fn unread_at(&self, position: u64) -> Option<(u64, Unread)> {
        let (&start, unread) = self.tensors.range(..=position).next_back()?;
        (position < unread.end).then(|| (start, unread.clone()))
    }

    /// Reads from the file itself, up to `end`.
    fn read_file(&self, buffer: &mut [u8], end: u64) -> io::Result<usize> {
        let bytes = limit_to_buffer(buffer, end - self.position);
        let read = self.file.read_at(&mut buffer[..bytes], self.position)?;
        let states = [self.file.metadata()?, std::fs::metadata(&self.path)?];
        if states.iter().any(|state| Identity::new(state) != self.identity) {
            let message = format!("cannot read {:?} again: it has changed since it was opened", self.path);
            return Err(io::Error::new(ErrorKind::InvalidData, message));
        }
        Ok(read)
    }
}

/// Limits a number of bytes to the length of a buffer.
fn limit_to_buffer(buffer: &[u8], bytes: u64) -> usize {
    usize::try_from(bytes).map_or(buffer.len(), |bytes| bytes.min(buffer.len()))
}

impl Read for GgufReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let position = self.position;
        let read = if let Some(rest) =
            usize::try_from(position).ok().and_then(|at| self.header.get(at..)).filter(|r| !r.is_empty())
        {
            let bytes = limit_to_buffer(buffer, rest.len() as u64);
            buffer[..bytes].copy_from_slice(&rest[..bytes]);
            bytes
        } else if let Some((start, Unread { name, end })) = self.unread_at(position) {
            let tensor = self.wait(&name).map_err(|missing| io::Error::other(unavailable(&name, &missing)))?;
            // A rank's shard, or a tensor from a replaced file, would shift all following bytes.
            if tensor.file_range() != (start..end) {
                let range = tensor.file_range();
                let message =
                    format!("cannot load tensor {name:?}: bytes {range:?} of the file were loaded, not all of {start}..{end}");
                return Err(io::Error::new(ErrorKind::InvalidData, message));
            }
            let held = tensor.bytes().map_err(io::Error::other)?;
            let rest = &held[usize::try_from(position - start).map_err(io::Error::other)?..];
            let bytes = limit_to_buffer(buffer, rest.len() as u64);
            buffer[..bytes].copy_from_slice(&rest[..bytes]);
            if bytes == rest.len() {
                self.tensors.remove(&start);
                self.held.remove(&name);
            }
            bytes
        } else {
            let next = self.tensors.range(position..).next().map_or(self.identity.bytes, |(&start, _)| start);
            self.read_file(buffer, next.max(position))?
        };
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for GgufReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, by) = match to {
            SeekFrom::Start(position) => (position, 0),
            SeekFrom::End(by) => (self.identity.bytes, by),
            SeekFrom::Current(by) => (self.position, by),
        };
        let position = base.checked_add_signed(by);
        self.position =
            position.ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "cannot seek to before the start of the file"))?;
        Ok(self.position)
    }
}
