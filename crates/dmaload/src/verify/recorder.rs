//! An observer that creates a manifest by computing checksums of the loaded files.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::chunks::Chunks;
use super::digest::{Algorithm, Digest, Hasher};
use super::manifest::{Manifest, ManifestFile};
use crate::options::observer::{Observer, Rejection};
use crate::telemetry::report::Report;

/// An [`Observer`] that creates a [`Manifest`] of a load's files. Use a new recorder for each
/// load.
///
/// ```no_run
/// # async fn example() -> dmaload::Result<()> {
/// use std::sync::Arc;
/// use dmaload::verify::{Algorithm, Recorder};
/// let loader = dmaload::Loader::new()?;
/// let recorder = Arc::new(Recorder::new(Algorithm::Crc32c, 1 << 20));
/// let options = loader.load_options().observer(recorder.clone());
/// let mut segments = loader.load("model.safetensors").options(options).segments();
/// while let Some(segment) = segments.next().await {
///     drop(segment?);
/// }
/// # let report = segments.report().unwrap();
/// println!("{}", recorder.manifest(&report).to_json());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Recorder {
    algorithm: Algorithm,
    chunk_bytes: u64,
    files: Mutex<Vec<Sums>>,
}

#[derive(Debug, Clone)]
struct Sums {
    chunks: Chunks,
    whole: Hasher,
    sums: Vec<u8>,
}

impl Recorder {
    /// Creates a recorder for chunks of this size.
    ///
    /// # Panics
    /// If the size is not valid: see [`Manifest::allows_chunk_bytes`].
    pub fn new(algorithm: Algorithm, chunk_bytes: u64) -> Self {
        assert!(Manifest::allows_chunk_bytes(chunk_bytes), "invalid chunk size {chunk_bytes}");
        Recorder { algorithm, chunk_bytes, files: Mutex::default() }
    }

    /// Returns the manifest of a load. The recorder must have seen all bytes of the load's files.
    ///
    /// # Panics
    /// If the recorder has not seen all bytes of the report's files, for example because the
    /// report is from another load, or because the load failed.
    pub fn manifest(&self, report: &Report) -> Manifest {
        let mut seen = self.files.lock().unwrap_or_else(PoisonError::into_inner).clone();
        seen.resize_with(report.files.len(), || self.empty_sums());
        let paths: Vec<&Path> = report.files.iter().map(|file| file.path.as_path()).collect();
        let files = report.files.iter().zip(seen).zip(Manifest::shortest_names(&paths)).map(|((file, mut seen), path)| {
            assert_eq!(seen.chunks.seen_bytes(), file.bytes, "the recorder should have seen all bytes of {path:?}");
            let last = seen.chunks.finish();
            seen.sums.extend_from_slice(last.as_ref().map_or(&[], |(_, digest)| digest.as_bytes()));
            ManifestFile { sha256: Some(seen.whole.finish()), sums: seen.sums, ..ManifestFile::new(&path, file.bytes) }
        });
        Manifest { algorithm: self.algorithm, chunk_bytes: self.chunk_bytes, files: files.collect() }
    }

    fn empty_sums(&self) -> Sums {
        let chunks = Chunks::new(self.algorithm, self.chunk_bytes);
        Sums { chunks, whole: Hasher::new(Algorithm::Sha256), sums: Vec::new() }
    }
}

impl Observer for Recorder {
    fn bytes(&self, file_index: usize, _offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if files.len() <= file_index {
            files.resize_with(file_index + 1, || self.empty_sums());
        }
        let file = files.get_mut(file_index).expect("`files` should have been resized above");
        let Sums { chunks, whole, sums } = file;
        whole.update(bytes);
        chunks.update(bytes, |_, digest: Digest| {
            sums.extend_from_slice(digest.as_bytes());
            Ok(())
        })
    }
}
