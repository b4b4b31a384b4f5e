//! Compares the checksums of loaded bytes with the expected ones.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::chunks::Chunks;
use super::digest::{Digest, Hasher};
use super::manifest::Manifest;
use crate::error::{Error, Result};
use crate::files::header::read_header;
use crate::files::source::OpenFile;
use crate::options::choices::Format;
use crate::options::observer::{Observer, Rejection, Verify};

impl Verify for Manifest {
    fn begin(&self, files: &[(&Path, u64)], format: Format) -> Result<Arc<dyn Observer>> {
        Arc::new(self.clone()).begin(files, format)
    }

    fn describe(&self) -> String {
        format!("{} of each {} bytes", self.algorithm, self.chunk_bytes)
    }
}

impl Verify for Arc<Manifest> {
    fn begin(&self, files: &[(&Path, u64)], format: Format) -> Result<Arc<dyn Observer>> {
        let alone = files.len() == 1;
        let expected = |&(path, bytes): &(&Path, u64)| {
            let entry = self.find(path, alone).ok_or_else(|| Error::NotInManifest { path: path.to_owned() })?;
            let expected_bytes = self.files.get(entry).map_or(0, |file| file.bytes);
            if bytes != expected_bytes {
                return Err(Error::WrongLength { path: path.to_owned(), bytes, expected_bytes });
            }
            Ok(VerifiedFile { path: path.to_owned(), bytes, entry })
        };
        let files = files.iter().map(expected).collect::<Result<_>>()?;
        let chunks = Chunks::new(self.algorithm, self.chunk_bytes);
        Ok(Arc::new(ByChunks { manifest: Arc::clone(self), format, files, at: Mutex::new((0, chunks)) }))
    }

    fn describe(&self) -> String {
        self.as_ref().describe()
    }
}

impl Verify for Digest {
    fn begin(&self, files: &[(&Path, u64)], _format: Format) -> Result<Arc<dyn Observer>> {
        let [(path, bytes)] = *files else {
            return Err(Error::Config(format!("a single checksum ({self}) can verify one file, not {}", files.len())));
        };
        let found = Hasher::new(self.algorithm()).finish();
        if bytes == 0 && found != *self {
            let (expected, found) = (self.to_string(), found.to_string());
            return Err(Error::Corrupt { path: path.to_owned(), offset: 0, bytes, expected, found, tensors: Vec::new() });
        }
        Ok(Arc::new(AsAWhole { expected: *self, bytes, hasher: Mutex::new(Hasher::new(self.algorithm())) }))
    }

    fn begin_for(&self, files: &[(&Path, u64)], named: usize, format: Format) -> Result<Arc<dyn Observer>> {
        let own = files.get(named).expect("`named` should be the index of a file in the load");
        Ok(Arc::new(OnlyFile { file_index: named, observer: self.begin(&[*own], format)? }))
    }

    fn is_of_one_file(&self) -> bool {
        true
    }

    fn describe(&self) -> String {
        format!("{} of the file", self.algorithm())
    }
}

/// Passes the bytes of one file in a load to another observer, and ignores all other files.
struct OnlyFile {
    file_index: usize,
    observer: Arc<dyn Observer>,
}

impl Observer for OnlyFile {
    fn bytes(&self, file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        if file_index == self.file_index { self.observer.bytes(0, offset, bytes) } else { Ok(()) }
    }
}

#[derive(Debug)]
struct VerifiedFile {
    path: PathBuf,
    bytes: u64,
    entry: usize,
}

/// Verifies files chunk by chunk.
#[derive(Debug)]
struct ByChunks {
    manifest: Arc<Manifest>,
    format: Format,
    files: Vec<VerifiedFile>,
    /// The number of the current file, and the state of its checksums.
    at: Mutex<(usize, Chunks)>,
}

impl Observer for ByChunks {
    fn bytes(&self, file_index: usize, _offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        let (current, chunks) = &mut *at;
        if *current != file_index {
            (*current, *chunks) = (file_index, Chunks::new(self.manifest.algorithm, self.manifest.chunk_bytes));
        }
        let file = self.files.get(file_index).ok_or("unexpected file")?;
        chunks.update(bytes, |number, found| self.compare(file, number, found))?;
        if chunks.seen_bytes() < file.bytes {
            return Ok(());
        }
        chunks.finish().map_or(Ok(()), |(number, found)| self.compare(file, number, found))
    }
}

impl ByChunks {
    fn compare(&self, file: &VerifiedFile, number: u64, found: Digest) -> Result<(), Rejection> {
        let expected = self.manifest.files.get(file.entry).and_then(|entry| self.manifest.chunk_digest(entry, number));
        let expected = expected.ok_or("the manifest does not contain this chunk")?;
        if found == expected {
            return Ok(());
        }
        let offset = number * self.manifest.chunk_bytes;
        let bytes = self.manifest.chunk_bytes.min(file.bytes - offset);
        let tensors = tensors_in(&file.path, self.format, offset, offset + bytes);
        Err(Rejection::Corrupt { offset, bytes, expected: expected.to_string(), found: found.to_string(), tensors })
    }
}

/// The tensors that overlap this range, according to the file's own header; empty if the header
/// can't be read.
fn tensors_in(path: &Path, format: Format, start: u64, end: u64) -> Vec<String> {
    let header = OpenFile::open(path).and_then(|file| read_header(&file, 0..file.identity.bytes, format));
    let Ok(Some(map)) = header else { return Vec::new() };
    let overlapping = map.iter().filter(|tensor| tensor.file_range.start.max(start) < tensor.file_range.end.min(end));
    overlapping.map(|tensor| tensor.name.to_string()).collect()
}

/// Verifies the checksum of a whole file when its last bytes have arrived.
#[derive(Debug)]
struct AsAWhole {
    expected: Digest,
    bytes: u64,
    hasher: Mutex<Hasher>,
}

impl Observer for AsAWhole {
    fn bytes(&self, _file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        let mut hasher = self.hasher.lock().unwrap_or_else(PoisonError::into_inner);
        hasher.update(bytes);
        if offset + (bytes.len() as u64) < self.bytes {
            return Ok(());
        }
        let found = hasher.clone().finish();
        if found == self.expected {
            return Ok(());
        }
        let (expected, found) = (self.expected.to_string(), found.to_string());
        Err(Rejection::Corrupt { offset: 0, bytes: self.bytes, expected, found, tensors: Vec::new() })
    }
}
