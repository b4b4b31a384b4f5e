//! Checks that must pass at the end of every world, whichever faults it had.

use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::World;
use super::load::SimLoad;
use crate::ring::message::Failure;
use crate::ring::sim::disk::BLOCK;
use crate::ring::sim::faults::Faults;
use crate::ring::watch::Verdict;
use crate::route::{Attempt, Route};

impl World {
    pub(super) fn check_end(&mut self) {
        self.sync_window();
        assert_eq!(self.driver.staging_taken(), 0, "staging slots are still held");
        for (id, load) in &self.loads {
            let complete = load.full.iter().all(|&full| full);
            match load.failure {
                None if load.abandoned => {}
                None => {
                    assert!(complete, "{id:?} ended without a failure, but is not complete");
                    assert!(!load.must_fail(), "{id:?} should have failed");
                    // Cached chunks that were not evicted must have been copied from the page
                    // cache.
                    let taken = load.cached_bytes;
                    assert!(
                        taken <= load.cacheable_bytes,
                        "{id:?} copied {taken} bytes from the page cache, which contained fewer"
                    );
                    let threads = !self.faults.no_threads && self.faults.evicted_per_mille == 0;
                    assert!(!threads || taken == load.cacheable_bytes, "{id:?}: cached chunks were read from storage");
                    self.check_staging_report(load);
                    let uses_threads = (load.bounced || load.observed.is_some()) && !load.plan.pieces.is_empty();
                    assert!(
                        !load.no_thread || self.faults.no_threads,
                        "{id:?}: a missing thread was reported even though threads could be started"
                    );
                    assert!(
                        load.no_thread || !(uses_threads && self.faults.no_threads),
                        "{id:?}: the missing thread was not reported"
                    );
                    if let Some((observer, _)) = &load.observed {
                        assert!(observer.has_seen_all(), "the observer of {id:?} should have seen all bytes");
                        assert!(observer.rejects.is_none(), "{id:?} completed even though it contains the rejected byte");
                    }
                }
                Some(failure) => {
                    assert!(!complete, "{id:?} failed even though it was complete");
                    self.check_failure(load, failure);
                }
            }
        }
        let memory = self.memory.borrow();
        let observed = |staged: bool| self.loads.values().any(|load| load.observed.is_some() && load.is_staged() == staged);
        assert!(memory.observed_in_staging == 0 || observed(true), "bytes must be observed in staging only if requested");
        assert!(memory.observed_in_pieces == 0 || observed(false), "bytes must be observed in pieces only if requested");
        assert_eq!(memory.unfilled_bytes(), 0, "all memory must be freed except what was leaked on purpose");
        assert_eq!(memory.leaked_bytes, self.leaked_bytes, "every leaked byte must be reported");
        let counted = self.counters.leaked_bytes.load(Ordering::Relaxed);
        assert_eq!(counted, self.leaked_bytes, "every leaked byte must be counted");
        assert_eq!(self.scheduler.window_taken_bytes(), 0, "all permits must be returned");
        drop(memory);
        assert!(self.broken || self.driver.kernel().is_clean(), "all pieces must be unregistered and all files detached");
    }

    /// Checks that reads into staging report why they do not use the best route.
    fn check_staging_report(&self, load: &SimLoad) {
        if !load.bounced || self.broken {
            return;
        }
        let Faults { ring, register, register_per_mille, buffer_slots, .. } = self.faults;
        if ring.is_some() && load.staged_by() < Route::PreadDirect {
            assert!(load.refused.contains(&Attempt::SetUpRing), "staging without a ring was not reported");
        } else if register.is_some() && register_per_mille == 1000 && buffer_slots > 1 && load.staged_by() < Route::UringDirect {
            assert!(load.refused.contains(&Attempt::RegisterStaging), "unregistered staging was not reported");
        }
    }

    /// Checks that a failure was caused by one of this world's faults, and that it reports where
    /// the fault is.
    fn check_failure(&self, load: &SimLoad, failure: Failure) {
        let file = |index: usize| &load.files[index];
        match failure {
            Failure::Ended { file: index, offset, .. } => {
                let (file, planned) = file(index);
                // A strict load that reads directly can't fall back to buffered reads, so it can't
                // find where in the last block the file ends.
                let end = if load.strict { file.bytes / BLOCK * BLOCK } else { file.bytes };
                let nothing_came = self.faults.nothing_per_mille > 0 && offset < *planned;
                let ended = file.bytes < *planned && end <= offset && offset < *planned;
                assert!(ended || nothing_came, "{failure:?} has no cause in {file:?}");
            }
            Failure::Read { file: index, offset, bytes, errno, .. } => {
                let (file, _) = file(index);
                match &file.faults.bad {
                    Some((bad, expected)) => {
                        assert_eq!(errno, *expected);
                        assert!(bad.start < offset.next_multiple_of(BLOCK) + bytes.next_multiple_of(BLOCK) && offset < bad.end);
                    }
                    None => assert!(self.faults.interrupted_per_mille > 0 && errno == Errno::AGAIN),
                }
            }
            Failure::Refused { file: index, route, .. } => {
                let (file, _) = file(index);
                let refused = self.faults.ring.is_some() || self.faults.register.is_some() || self.faults.unpinnable;
                let refused = refused || file.faults.no_direct.is_some() || file.faults.no_ring.is_some();
                assert!(load.strict && refused, "{route} was not refused, or the load is not strict");
            }
            Failure::Rejected { file: index, offset, bytes } => {
                let (observer, observation) = load.observed.as_ref().expect("a rejection should come from an observer");
                assert_eq!(observation.watch.verdict(), Verdict::Rejected("this byte".into()));
                let (file, at) = observer.rejects.expect("this observer should reject a byte");
                assert!(file == index && (offset..offset + bytes).contains(&at), "{failure:?}, but the rejected byte is at {at}");
            }
            Failure::Kernel { .. } => assert!(self.broken),
            Failure::Staging { .. } => assert_eq!(self.faults.staging, 0),
            Failure::Memory { errno, .. } => assert!(self.faults.no_memory_per_mille > 0 && errno == Errno::NOMEM),
        }
    }
}
