//! Observers of a load's bytes as they arrive, for checksums and verification.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::choices::Format;
use crate::error::Result;
use crate::support::foreign::Foreign;

/// Sees every byte of a load before its segment is delivered to the caller; see
/// [`crate::LoadOptions::observer`].
///
/// An observer sees the files of a load one after another, and each file from beginning to end:
/// every byte once, without gaps. It is called on the loader's threads, with one call at a time
/// for each load. How the bytes are divided among the calls has no meaning. If a load fails or is
/// dropped, the observer does not see the rest of the bytes.
///
/// The bytes are in the memory of their segment or, on a heap that the CPU reads uncached
/// ([`crate::heap::Heap::is_uncached`]), in the staging buffer that they were read into. Reading
/// continues while the observer runs. If the observer is slower than the reads, reading waits:
/// until bytes have been observed, they keep occupying the window or a staging buffer.
///
/// An observer must not wait for a load by the same loader, nor for the loader's shutdown: either
/// may need the thread that the observer runs on.
///
/// A panic fails the observer's load with [`crate::Error::Panicked`]; other loads are not
/// affected.
///
/// ```no_run
/// # async fn example() -> dmaload::Result<()> {
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// use dmaload::{LoadOptions, Loader, Observer, Rejection};
///
/// /// Counts the zero bytes of a model.
/// #[derive(Default)]
/// struct Zeros(AtomicU64);
///
/// impl Observer for Zeros {
///     fn bytes(&self, _file_index: usize, _offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
///         let zeros = bytes.iter().filter(|&&byte| byte == 0).count();
///         self.0.fetch_add(zeros as u64, Ordering::Relaxed);
///         Ok(())
///     }
/// }
///
/// let zeros = Arc::new(Zeros::default());
/// let options = LoadOptions::new().observer(zeros.clone());
/// let image = Loader::new()?.load("model.safetensors").options(options).await?;
/// println!("{} of {} bytes are zero", zeros.0.load(Ordering::Relaxed), image.report().bytes);
/// # Ok(())
/// # }
/// ```
pub trait Observer: Send + Sync + 'static {
    /// Receives the next bytes of file number `file_index` (in load order), starting at `offset`.
    ///
    /// # Errors
    /// The reason why these bytes can't be right. The load fails with [`crate::Error::Rejected`]
    /// or [`crate::Error::Corrupt`], which contain the reason.
    fn bytes(&self, file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection>;
}

impl<O: Observer + ?Sized> Observer for Arc<O> {
    fn bytes(&self, file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection> {
        (**self).bytes(file_index, offset, bytes)
    }
}

/// Why an [`Observer`] rejects bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rejection {
    /// The reason in the observer's own words.
    Reason(String),
    /// A checksum differs: see [`crate::Error::Corrupt`].
    Corrupt {
        /// Where in the file the checked bytes begin.
        offset: u64,
        /// Number of checked bytes.
        bytes: u64,
        /// The expected checksum.
        expected: String,
        /// The computed checksum.
        found: String,
        /// The tensors that overlap these bytes.
        tensors: Vec<String>,
    },
}

impl<T: Into<String>> From<T> for Rejection {
    fn from(reason: T) -> Self {
        Rejection::Reason(reason.into())
    }
}

/// Knows the expected contents of a load's files; see [`crate::LoadOptions::verify`]. Implemented
/// by manifests and checksums in the `verify` module (feature `verify`).
///
/// Called on one of the loader's threads while the load is being planned. A panic fails the load
/// with [`crate::Error::Panicked`]; other loads are not affected.
pub trait Verify: Send + Sync + 'static {
    /// Begins to verify a load of these files with these lengths. Returns the observer that checks
    /// their bytes.
    ///
    /// # Errors
    /// The reason why the files can't have the expected contents. The load fails with this error
    /// before it reads anything but headers.
    fn begin(&self, files: &[(&Path, u64)], format: Format) -> Result<Arc<dyn Observer>>;

    /// Like [`Self::begin`], but called if the caller named only one part of a split model, and
    /// all of its parts are loaded. `named` is the index of the named part in `files`. If only the
    /// checksum of a single file is expected, it is the checksum of the named part. The default
    /// implementation calls [`Self::begin`].
    ///
    /// # Errors
    /// Those of [`Self::begin`].
    fn begin_for(&self, files: &[(&Path, u64)], named: usize, format: Format) -> Result<Arc<dyn Observer>> {
        let _ = named;
        self.begin(files, format)
    }

    /// Returns whether only the file that the caller named is verified, even if other files are
    /// loaded with it. If so, the report says that the others were not verified. The default
    /// implementation returns false.
    fn is_of_one_file(&self) -> bool {
        false
    }

    /// Describes what is compared, such as `crc32c of each 1048576 bytes`. The report contains
    /// this text.
    fn describe(&self) -> String;
}

/// An observer as an option. Two options are equal if their observers are the same object.
#[derive(Clone)]
pub(crate) struct ObserverOption(pub(crate) Foreign<Arc<dyn Observer>>);

impl ObserverOption {
    pub(crate) fn new(observer: Arc<dyn Observer>) -> Self {
        ObserverOption(Foreign::new(observer))
    }
}

/// A verifier as an option. Two options are equal if their verifiers are the same object.
#[derive(Clone)]
pub(crate) struct VerifyOption(pub(crate) Foreign<Arc<dyn Verify>>);

/// The name that errors use for a verifier and for the observer that it returns.
pub(crate) const VERIFIER: &str = "the verifier";
/// The name that errors use for an observer.
pub(crate) const OBSERVER: &str = "the observer";

impl fmt::Debug for VerifyOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.describe())
    }
}

impl PartialEq for VerifyOption {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for VerifyOption {}

impl fmt::Debug for ObserverOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

impl PartialEq for ObserverOption {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for ObserverOption {}
