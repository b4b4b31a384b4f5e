//! Receives a load's events on behalf of its consumer.

use std::sync::Arc;

use crate::engine::Guard;
use crate::engine::event::{Event, Progress};
use crate::engine::outbox::{Outbox, Waiter};
use crate::engine::state::LoadShared;
use crate::error::{Error, Result};
use crate::files::source::{Input, SourceFile};
use crate::memory::segment::Segment;
use crate::options::load::LoadOptions;

/// Receives the events of a load. Dropping it cancels the load.
#[derive(Debug)]
pub(super) struct Feed {
    outbox: Arc<Outbox>,
    /// `None` only inside `drop`.
    shared: Option<Arc<LoadShared>>,
    guard: Arc<Guard>,
}

impl Feed {
    /// Starts a load. `keep` says whether the load keeps all of its segments in memory at once.
    pub(super) fn start(guard: &Arc<Guard>, inputs: Result<Vec<Input>>, options: LoadOptions, keep: bool) -> Self {
        let (outbox, shared) = guard.load(inputs, options, keep);
        Feed { outbox, shared: Some(shared), guard: Arc::clone(guard) }
    }

    pub(super) fn waiter(&self) -> Waiter {
        Waiter::new(&self.outbox)
    }

    pub(super) fn take(&self) -> Option<Event> {
        self.outbox.take()
    }

    /// Tells the engine that a stream's consumer has taken a segment, so the load may continue.
    pub(super) fn consumed(&self, segment: &Segment) {
        // A load that keeps all its segments never waits for its consumer.
        if let Some(load) = self.shared.as_ref().filter(|load| !load.keep) {
            self.guard.consumed(load.id, segment.memory_bytes() as u64);
        }
    }

    /// Returns why this load's tensors can't be delivered one by one within the loader's memory
    /// limit, or `None` if they can.
    pub(super) fn tensor_over_limit(&self) -> Option<Error> {
        self.shared.as_ref().and_then(|shared| shared.tensor_over_limit.get().cloned())
    }

    /// Returns [`Error::HeldUp`] if this stream can continue only after its consumer drops
    /// segments.
    pub(super) fn held_up(&self) -> Option<Error> {
        self.shared.as_ref().and_then(|load| self.guard.held_up(load.id))
    }

    /// Returns the load's files, or an empty list until the files are known.
    pub(super) fn sources(&self) -> &[SourceFile] {
        self.shared.as_ref().map_or(&[], |shared| shared.sources())
    }

    pub(super) fn progress(&self) -> Progress {
        self.shared.as_ref().map(|shared| shared.progress()).unwrap_or_default()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            self.guard.abandon(shared);
        }
    }
}
