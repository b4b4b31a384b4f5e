//! Passes the bytes of a load to its observers, and keeps their verdict.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::io::Errno;

use crate::options::observer::{OBSERVER, Observer, ObserverOption, Rejection, VERIFIER};
use crate::support::foreign;

/// Why observers did not accept some bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Rejected(Rejection),
    /// The verifier or the observer panicked; `code` says which.
    Panicked {
        code: &'static str,
        message: String,
    },
    /// No thread could be started for the observers, and the ring thread never runs the caller's
    /// code.
    NoThread,
}

/// The observers of one load. Bytes are passed to the verifier first, and then to the caller's
/// observer.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Set once the lengths of the files are known.
    verifier: OnceLock<ObserverOption>,
    observer: Option<ObserverOption>,
    verdict: Mutex<Option<Verdict>>,
}

impl Watch {
    pub(crate) fn new(observer: Option<ObserverOption>) -> Self {
        Watch { verifier: OnceLock::new(), observer, verdict: Mutex::new(None) }
    }

    /// Sets the verifier. Must be called before any bytes are observed.
    pub(crate) fn verify_by(&self, verifier: Arc<dyn Observer>) {
        let set = self.verifier.set(ObserverOption::new(verifier));
        assert!(set.is_ok(), "a verifier must be set only once");
    }

    /// Passes bytes to the observers.
    ///
    /// # Errors
    /// EBADMSG if an observer rejects them or panics; [`Self::verdict`] says why.
    pub(crate) fn observe(&self, file_index: usize, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let verifier = self.verifier.get().map(|verifier| (VERIFIER, verifier));
        let observer = self.observer.as_ref().map(|observer| (OBSERVER, observer));
        verifier.into_iter().chain(observer).try_for_each(|(code, observer)| {
            let seen = foreign::call(|| observer.0.bytes(file_index, offset, bytes));
            let verdict = match seen {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(rejection)) => Verdict::Rejected(rejection),
                Err(message) => Verdict::Panicked { code, message },
            };
            Err(self.refuse(verdict))
        })
    }

    /// Rejects bytes because no thread could be started to observe them. Returns EBADMSG, like
    /// [`Self::observe`].
    pub(crate) fn reject_unobserved(&self) -> Errno {
        self.refuse(Verdict::NoThread)
    }

    fn refuse(&self, verdict: Verdict) -> Errno {
        *self.verdict.lock().unwrap_or_else(PoisonError::into_inner) = Some(verdict);
        Errno::BADMSG
    }

    /// Returns why the observers did not accept some bytes.
    ///
    /// # Panics
    /// If no observation has failed.
    pub(crate) fn verdict(&self) -> Verdict {
        let verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner).clone();
        verdict.expect("a failed observation should have stored its verdict")
    }
}

/// How the driver observes a load's bytes.
#[derive(Debug, Clone)]
pub(crate) struct Observation {
    pub(crate) watch: Arc<Watch>,
    /// Whether bytes are observed in staging, so that every read must go through it. Otherwise,
    /// they are observed in the pieces' memory.
    pub(crate) staged: bool,
}
