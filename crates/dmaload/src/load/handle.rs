//! A load that is kept as a whole: its progress, single tensors as soon as they are there, the
//! image.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use futures_core::Stream;

use super::arrived::{Arrived, End};
use super::feed::Feed;
use super::image::{Image, Tensor};
use crate::engine::Guard;
use crate::engine::event::Progress;
use crate::engine::outbox::Waiter;
use crate::error::Result;
use crate::files::source::Input;
use crate::memory::segment::Segment;
use crate::options::load::LoadOptions;
use crate::support::park;

/// A load that is under way and keeps all that it reads. It runs by itself, on the loader's
/// threads, whether it is polled or not. Made by
/// [`LoadRequest::start`](crate::LoadRequest::start).
///
/// - [`Load::tensor`] gives one tensor by its name, as soon as its bytes are there, while the
///   rest is read. Any number of tasks and threads may wait at once.
/// - [`Load::next`] (it is a [`Stream`], too) gives the segments in order, each as soon as it is
///   complete.
/// - [`Load::finish`], or awaiting the load itself, gives the [`Image`].
///
/// Dropping it cancels the load: nothing new is read, what is in flight is drained in the
/// background, then its memory is freed. Segments and tensors that were given stay. Until then it
/// holds all segments, and nothing else once the last one is there: its files are closed.
#[derive(Debug)]
#[must_use = "a load that is dropped is cancelled"]
pub struct Load {
    /// Of [`Load::next`] and [`Load::finish`]. Before the feed: cancelling wakes no task for its
    /// own load.
    waiter: Waiter,
    feed: Feed,
    /// No code of the caller's runs while this is locked.
    arrived: Mutex<Arrived>,
    /// How many segments [`Load::next`] has given.
    given: usize,
    /// Whether it has given the error.
    failure_given: bool,
}

impl Load {
    pub(super) fn start(guard: &Arc<Guard>, asked: Result<Vec<Input>>, options: LoadOptions) -> Self {
        let feed = Feed::start(guard, asked, options, true);
        let arrived = Mutex::new(Arrived::default());
        Load { waiter: feed.waiter(), feed, arrived, given: 0, failure_given: false }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.feed.progress()
    }

    /// Whether it has ended, well or not: awaiting it then gives the image, or the error, at once.
    pub fn is_finished(&self) -> bool {
        self.look(|arrived| arrived.end().map(|_| ())).is_some()
    }

    /// The tensor of this name, as soon as the segments up to its last byte are there (they come in
    /// order); that may be long before the load ends. Its bytes are contiguous, whether they are in one segment or in several (unless
    /// it is a rank's part in rows: [`Tensor::is_contiguous`]).
    ///
    /// The names of a file's tensors are known once its header is read: for a small file, which is
    /// read as a whole, with its bytes. Of several files, the index of their model decides which one
    /// has the tensor. A name that it does not list, or that has no index, is not given before the
    /// headers of all files are read, because another one may have a tensor of the same name.
    /// Whether a model of several files is whole is known by then, too, or at the latest when the
    /// load ends: then the load fails, although tensors were given.
    ///
    /// As with segments, a file that is changed while it is being read is found out at its end: a
    /// tensor may be given before that, and the load fails all the same. Once it has failed, so
    /// does this.
    ///
    /// Any number of tasks and threads may wait at once, also for the same tensor. One that is
    /// not polled holds up no other.
    ///
    /// Cancel-safe: dropping the future loses nothing, and cancels nothing.
    ///
    /// # Errors
    /// Those of [`Image::tensor`], as soon as the names of all tensors are known; whatever made
    /// the load fail.
    ///
    /// # Example
    /// ```no_run
    /// # async fn example(loader: dmaload::Loader) -> dmaload::Result<()> {
    /// let load = loader.load("model.safetensors").start();
    /// let embedding = load.tensor("model.embed_tokens.weight").await?;
    /// println!("{:?}", embedding.shape());
    /// let image = load.await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn tensor(&self, name: &str) -> Result<Tensor> {
        let waiter = self.feed.waiter();
        std::future::poll_fn(|context| self.poll(&waiter, context, |arrived| arrived.tensor(name, self.feed.sources()))).await
    }

    /// As [`Self::tensor`], for code that builds a model without `async`: this thread sleeps
    /// until the tensor is there.
    ///
    /// Not to be called on a thread that has other things to do: on an async runtime's worker it
    /// stops all tasks of that worker. Nor on one of the loader's own threads (in wakers,
    /// subscribers of `tracing`, heaps, verifiers and observers), where the load may need the
    /// very thread that waits.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    ///
    /// # Example
    /// ```no_run
    /// # fn example(loader: dmaload::Loader) -> dmaload::Result<()> {
    /// let load = loader.load("model.safetensors").start();
    /// for name in ["model.embed_tokens.weight", "model.norm.weight"] {
    ///     println!("{} bytes", load.tensor_blocking(name)?.bytes()?.len());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn tensor_blocking(&self, name: &str) -> Result<Tensor> {
        park::block_on(self.tensor(name))
    }

    /// The next segment, in order; `None` after the last one. An error ends the load.
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

    /// Waits for the rest, and gives all of it.
    ///
    /// Not cancel-safe: dropping the future drops the load, which cancels it.
    ///
    /// # Errors
    /// Whatever made the load fail, also if [`Load::next`] or [`Load::tensor`] has given it
    /// before.
    pub async fn finish(self) -> Result<Image> {
        std::future::poll_fn(|context| self.poll(&self.waiter, context, |arrived| arrived.end().map(|_| ()))).await;
        let arrived = self.arrived.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (segments, end) = arrived.into_parts();
        match end.expect("waited for above") {
            End::Finished(finished) => {
                assert_eq!(segments.len(), finished.report.segments, "a load gives all of its segments before its end");
                Ok(Image::new(finished.files, segments, finished.report))
            }
            End::Failed(error) => Err(error),
        }
    }

    /// Waits until `look` finds something in what has arrived.
    fn poll<T>(&self, waiter: &Waiter, context: &mut Context<'_>, mut look: impl FnMut(&mut Arrived) -> Option<T>) -> Poll<T> {
        let found = self.look(&mut look).or_else(|| {
            // What comes from now on wakes the task; what has come before is there.
            waiter.wait(context.waker());
            self.look(&mut look)
        });
        found.map_or(Poll::Pending, Poll::Ready)
    }

    /// Looks at what has arrived by now. Whoever looks takes the events for all that wait.
    fn look<T>(&self, look: impl FnOnce(&mut Arrived) -> Option<T>) -> Option<T> {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        while arrived.end().is_none()
            && let Some(event) = self.feed.take()
        {
            arrived.add(event);
        }
        look(&mut arrived)
    }

    fn poll_segment(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Segment>>> {
        let (given, failure_given) = (self.given, self.failure_given);
        let next = |arrived: &mut Arrived| match (arrived.segments().get(given), arrived.end()) {
            (Some(segment), _) => Some(Some(Ok(segment.clone()))),
            (None, Some(End::Failed(error))) if !failure_given => Some(Some(Err(error.clone()))),
            (None, Some(_)) => Some(None),
            (None, None) => None,
        };
        let next = self.poll(&self.waiter, context, next);
        match &next {
            Poll::Ready(Some(Ok(_))) => self.given += 1,
            Poll::Ready(Some(Err(_))) => self.failure_given = true,
            Poll::Ready(None) | Poll::Pending => {}
        }
        next
    }
}

impl Stream for Load {
    type Item = Result<Segment>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_segment(context)
    }
}

impl IntoFuture for Load {
    type Output = Result<Image>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<Image>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.finish())
    }
}
