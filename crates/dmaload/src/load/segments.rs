//! The segments of a load, as they come.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;

use super::feed::Feed;
use crate::engine::Guard;
use crate::engine::event::{Event, Finished, LoadFile, Progress};
use crate::engine::outbox::Waiter;
use crate::error::{Error, Result};
use crate::files::source::Input;
use crate::memory::segment::Segment;
use crate::options::load::LoadOptions;
use crate::telemetry::report::Report;

/// The segments of a load, each handed over once and not kept: a consumer that drops what it has
/// used can load files larger than memory. Made by
/// [`LoadRequest::segments`](crate::LoadRequest::segments).
///
/// The load is ahead of its consumer by the loader's window and a segment at most (by less where
/// there is less memory), and waits until the next segment is taken. Once the last one is taken,
/// this holds no file, no memory and no addresses any more, only the report and the maps of
/// tensors.
///
/// Dropping it cancels the load. Segments that were given stay.
#[derive(Debug)]
#[must_use = "a load that is dropped is cancelled"]
pub struct Segments {
    // Before the feed: cancelling wakes no task for its own load.
    waiter: Waiter,
    feed: Feed,
    finished: Option<Box<Finished>>,
    failed: bool,
}

impl Segments {
    /// Starts a load. `keep` tells whether all of it will be in memory at once.
    pub(crate) fn start(guard: &Arc<Guard>, asked: Result<Vec<Input>>, options: LoadOptions, keep: bool) -> Self {
        let feed = Feed::start(guard, asked, options, keep);
        Segments { waiter: feed.waiter(), feed, finished: None, failed: false }
    }

    /// The next segment, in order; `None` after the last one.
    ///
    /// A file that is changed while it is being read is found out at its end: before its last
    /// segment, not before its first ones.
    ///
    /// Cancel-safe: dropping the future never loses a segment.
    ///
    /// # Errors
    /// Whatever made the load fail; after that, `None`.
    pub async fn next(&mut self) -> Option<Result<Segment>> {
        std::future::poll_fn(|context| self.poll_segment(context)).await
    }

    /// The report, once the last segment was given and [`Self::next`] has given `None`.
    pub fn report(&self) -> Option<&Report> {
        self.finished.as_ref().map(|finished| &finished.report)
    }

    /// How far the load is.
    pub fn progress(&self) -> Progress {
        self.feed.progress()
    }

    /// Why the tensors of this load can't be given one by one within its loader's limit of
    /// memory.
    pub(super) fn tensor_over_limit(&self) -> Option<Error> {
        self.feed.tensor_over_limit()
    }

    /// The files, once the last segment was given.
    pub(super) fn finished_files(&self) -> &[LoadFile] {
        self.finished.as_ref().map_or(&[], |finished| &finished.files)
    }

    pub(super) fn poll_segment(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Segment>>> {
        while self.finished.is_none() && !self.failed {
            let event = self.feed.take().or_else(|| {
                self.waiter.wait(context.waker());
                self.feed.take()
            });
            match event {
                None => return Poll::Pending,
                // A consumer of segments learns of files from these.
                Some(Event::Planned(_)) => {}
                Some(Event::Segment(segment)) => {
                    self.feed.consumed(&segment);
                    return Poll::Ready(Some(Ok(segment)));
                }
                Some(Event::Done(finished)) => self.finished = Some(finished),
                Some(Event::Failed(error)) => {
                    self.failed = true;
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
        Poll::Ready(None)
    }
}

impl Stream for Segments {
    type Item = Result<Segment>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_segment(context)
    }
}
