//! A stream of a load's segments.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_core::Stream;

use super::feed::Feed;
use crate::engine::Guard;
use crate::engine::event::{Event, Finished, LoadFile, Progress};
use crate::engine::outbox::{Interest, Waiter};
use crate::error::{Error, Result};
use crate::files::source::Input;
use crate::memory::segment::Segment;
use crate::options::load::LoadOptions;
use crate::telemetry::report::Report;

/// A stream of a load's segments. Each segment is delivered once and not kept, so a consumer that
/// drops segments after use can load files that are larger than memory. Created by
/// [`LoadRequest::segments`](crate::LoadRequest::segments).
///
/// The load runs ahead of its consumer by at most the loader's window plus one segment (less if
/// memory is short), and then waits until the next segment is taken. After the last segment, a
/// `Segments` holds only the report and the tensor maps, but no file, memory or address range.
///
/// Dropping the `Segments` cancels the load. Segments that were already returned stay valid.
///
/// ```no_run
/// # async fn upload(bytes: bytes::Bytes) {}
/// # async fn example() -> dmaload::Result<()> {
/// let loader = dmaload::Loader::builder().memory_limit_bytes(256 << 20).build()?;
/// let mut segments = loader.load("larger-than-memory.safetensors").segments();
/// while let Some(segment) = segments.next().await {
///     upload(segment?.bytes()?).await;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping a load cancels it"]
pub struct Segments {
    // Declared before the feed so that cancelling the load does not wake the task that drops it.
    waiter: Waiter,
    feed: Feed,
    finished: Option<Box<Finished>>,
    failed: bool,
}

impl Segments {
    /// Starts a load. `keep` says whether the load keeps all of its segments in memory at once.
    pub(crate) fn start(guard: &Arc<Guard>, inputs: Result<Vec<Input>>, options: LoadOptions, keep: bool) -> Self {
        let feed = Feed::start(guard, inputs, options, keep);
        Segments { waiter: feed.waiter(), feed, finished: None, failed: false }
    }

    /// Returns the next segment, in order; `None` after the last one.
    ///
    /// A change to a file during the load is detected only when the end of the file is reached. By
    /// then, all of the file's segments except the last may have been returned.
    ///
    /// Cancel-safe: dropping the future never loses a segment.
    ///
    /// # Errors
    /// Returns the error that made the load fail, and `None` after that. [`Error::Panicked`] if
    /// the waker that this future was polled with panicked; the next call returns the segment.
    pub async fn next(&mut self) -> Option<Result<Segment>> {
        self.begin_wait();
        std::future::poll_fn(|context| self.poll_segment(context)).await
    }

    /// The report, once [`Self::next`] has returned `None` after the last segment.
    pub fn report(&self) -> Option<&Report> {
        self.finished.as_ref().map(|finished| &finished.report)
    }

    /// How far the load has progressed.
    pub fn progress(&self) -> Progress {
        self.feed.progress()
    }

    /// Returns why this load's tensors can't be delivered one by one within the loader's memory
    /// limit, or `None` if they can.
    pub(super) fn tensor_over_limit(&self) -> Option<Error> {
        self.feed.tensor_over_limit()
    }

    /// Returns [`Error::HeldUp`] if the load can continue only after its consumer drops segments.
    pub(super) fn held_up(&self) -> Option<Error> {
        self.feed.held_up()
    }

    /// The files, once the last segment has been returned.
    pub(super) fn finished_files(&self) -> &[LoadFile] {
        self.finished.as_ref().map_or(&[], |finished| &finished.files)
    }

    /// Begins a wait on behalf of a new future. The new future must not report that an earlier
    /// future's waker panicked.
    pub(super) fn begin_wait(&mut self) {
        self.waiter.begin();
    }

    pub(super) fn poll_segment(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Segment>>> {
        while self.finished.is_none() && !self.failed {
            let next = ready!(self.waiter.poll(context, || self.feed.take().ok_or(Interest::AnyEvent)));
            let event = match next {
                Ok(event) => event,
                // Only this wait failed. The load continues.
                Err(panicked) => return Poll::Ready(Some(Err(panicked))),
            };
            match event {
                // Each segment names its file, so the list of files is not needed.
                Event::Planned(_) => {}
                Event::Segment(segment) => {
                    self.feed.consumed(&segment);
                    return Poll::Ready(Some(Ok(segment)));
                }
                Event::Done(finished) => self.finished = Some(finished),
                Event::Failed(error) => {
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
