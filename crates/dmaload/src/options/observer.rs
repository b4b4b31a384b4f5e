//! Looking at the bytes of a load as they land: checksums, verification.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::choices::Format;
use crate::error::Result;
use crate::support::foreign::Foreign;

/// Sees every byte of a load before anybody is shown it; see [`crate::LoadOptions::observer`].
///
/// The files of a load come one after the other, each from its beginning to its end: every byte once, without gaps, one call at a
/// time, on threads of the loader's own. How the bytes are cut means nothing. The bytes before a file's end that a load never
/// gets to, because it failed or was dropped, are not seen.
///
/// Bytes are looked at in the memory of their segment, or, on a heap that the CPU reads without its caches
/// ([`crate::heap::Heap::is_uncached`]), in the staging buffer that they came in. Reading goes on meanwhile, and waits when the
/// observer is slower: what it has not seen counts as not filled.
///
/// It must not wait for a load of its loader, or for the end of a shutdown: either may need the thread that it runs on.
///
/// One that panics fails its load with [`crate::Error::Panicked`]; no other load notices.
pub trait Observer: Send + Sync + 'static {
    /// The next bytes: of file number `file_index` (in the order given to the load), from `offset` on.
    ///
    /// # Errors
    /// Why these bytes can't be right. The load fails with [`crate::Error::Rejected`] or [`crate::Error::Corrupt`], which say so.
    fn bytes(&self, file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Rejection>;
}

/// Why an [`Observer`] takes bytes to be wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rejection {
    /// In its own words.
    Reason(String),
    /// A checksum differs: see [`crate::Error::Corrupt`].
    Corrupt {
        /// Where in the file the bytes begin that it is of.
        offset: u64,
        /// How many they are.
        bytes: u64,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
        /// The tensors that have bytes among them.
        tensors: Vec<String>,
    },
}

impl<T: Into<String>> From<T> for Rejection {
    fn from(reason: T) -> Self {
        Rejection::Reason(reason.into())
    }
}

/// Knows what the files of loads are to be; see [`crate::LoadOptions::verify`]. Manifests and checksums do, with the feature
/// `verify` (module `verify`).
///
/// All calls come from threads of the loader's own, once for each load. One that panics fails its load with
/// [`crate::Error::Panicked`]; no other load notices.
pub trait Verify: Send + Sync + 'static {
    /// A load of these files, with their lengths, has been planned; gives what is to see their bytes.
    ///
    /// # Errors
    /// Why they can't be what they should be. The load fails with this error before it reads anything.
    fn begin(&self, files: &[(&Path, u64)], format: Format) -> Result<Arc<dyn Observer>>;

    /// The same for a load whose caller named one of these files, a part of a model, and got the others with it. What is said of
    /// "the file" is about that one: number `named`. Default: [`Self::begin`].
    ///
    /// # Errors
    /// As [`Self::begin`].
    fn begin_for(&self, files: &[(&Path, u64)], named: usize, format: Format) -> Result<Arc<dyn Observer>> {
        let _ = named;
        self.begin(files, format)
    }

    /// Whether it looks at one file only: the one that the caller named, where that has come with others. Default: false.
    fn is_of_one_file(&self) -> bool {
        false
    }

    /// What it compares, for the report: `crc32c of each 1048576 bytes`.
    fn describe(&self) -> String;
}

/// An observer as an option. Two are equal when they are the same one.
#[derive(Clone)]
pub(crate) struct ObserverOption(pub(crate) Foreign<Arc<dyn Observer>>);

impl ObserverOption {
    pub(crate) fn new(observer: Arc<dyn Observer>) -> Self {
        ObserverOption(Foreign::new(observer))
    }
}

/// The same of what knows what files are to be.
#[derive(Clone)]
pub(crate) struct VerifyOption(pub(crate) Foreign<Arc<dyn Verify>>);

/// How errors name a verifier, and what it has begun.
pub(crate) const VERIFIER: &str = "the verifier";
/// How errors name an observer.
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
