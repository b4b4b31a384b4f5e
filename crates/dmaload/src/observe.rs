//! Looking at the bytes of a load as they land: checksums, verification.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

/// Sees every byte of a load before anybody is shown it; see [`crate::LoadOptions::observer`].
///
/// The files of a load come one after the other, each from its beginning to its end: every byte once, without gaps, one call at a
/// time, on threads of the loader's own. How the bytes are cut means nothing. The bytes before a file's end that a load never
/// gets to, because it failed or was dropped, are not seen.
///
/// Bytes are looked at in the memory of their segment, or, on a heap that the CPU reads without its caches
/// ([`crate::heap::Heap::is_uncached`]), in the staging buffer that they came in. Reading goes on meanwhile, and waits when the
/// observer is slower: what it has not seen counts as not filled.
pub trait Observer: Send + Sync + 'static {
    /// The next bytes: of file number `file_index` (in the order given to the load), from `offset` on.
    ///
    /// # Errors
    /// Why these bytes can't be right. The load fails with [`crate::Error::Rejected`], which says so.
    fn bytes(&self, file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), String>;
}

/// An observer as an option. Two are equal when they are the same one.
#[derive(Clone)]
pub(crate) struct ObserverOption(pub(crate) Arc<dyn Observer>);

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

/// An observer at work for one load.
#[derive(Debug)]
pub(crate) struct Watch {
    observer: ObserverOption,
    rejected: Mutex<Option<String>>,
}

impl Watch {
    pub(crate) fn new(observer: ObserverOption) -> Self {
        Watch { observer, rejected: Mutex::new(None) }
    }

    /// Shows it some bytes.
    ///
    /// # Errors
    /// EBADMSG when it rejects them; [`Self::reason`] has its words.
    pub(crate) fn look(&self, file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let seen = catch_unwind(AssertUnwindSafe(|| self.observer.0.bytes(file_index, offset, bytes)));
        seen.unwrap_or_else(|_| Err("the observer panicked".to_owned())).map_err(|reason| {
            *self.rejected.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
            Errno::BADMSG
        })
    }

    /// Why it rejected bytes.
    pub(crate) fn reason(&self) -> String {
        self.rejected.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
    }
}

/// How the driver has a load's bytes looked at.
#[derive(Debug, Clone)]
pub(crate) struct Observation {
    pub(crate) watch: Arc<Watch>,
    /// In staging, which every read goes into then; else in the pieces' memory.
    pub(crate) staged: bool,
}
