//! A load that keeps all its segments. It reports its progress, returns single tensors as they
//! arrive, and finally returns the image.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use futures_core::Stream;

use super::arrived::{Arrived, End};
use super::feed::Feed;
use super::image::{Image, Tensor};
use crate::engine::Guard;
use crate::engine::event::Progress;
use crate::engine::outbox::{Interest, Waiter};
use crate::error::Result;
use crate::files::source::Input;
use crate::memory::segment::Segment;
use crate::options::load::LoadOptions;
use crate::support::park;

/// A running load that keeps everything it reads. It runs on the loader's threads, whether or not
/// it is polled. Created by [`LoadRequest::start`](crate::LoadRequest::start).
///
/// - [`Load::tensor`] returns a tensor by name as soon as its bytes have arrived, while the rest
///   is being read. Any number of tasks and threads may wait at once.
/// - [`Load::next`] (also available as a [`Stream`]) yields the segments in order, each as soon as
///   it is complete.
/// - [`Load::finish`], or awaiting the load itself, returns the [`Image`].
///
/// Dropping a `Load` cancels it: no new reads start, reads in flight are drained in the
/// background, and then its memory is freed. Segments and tensors that were already returned stay
/// valid.
///
/// Until it is dropped, a `Load` holds all its segments. It closes each file once that file is
/// read and checked.
#[derive(Debug)]
#[must_use = "dropping a load cancels it"]
pub struct Load {
    /// Used by [`Load::next`] and [`Load::finish`]. Declared before the inbox so that cancelling
    /// the load does not wake the task that drops it.
    waiter: Waiter,
    inbox: Inbox,
    /// Number of segments that [`Load::next`] has returned.
    returned: usize,
    /// Whether [`Load::next`] has returned the error.
    failure_returned: bool,
}

/// A load's feed, and what has arrived from it. All waiters share the inbox.
#[derive(Debug)]
struct Inbox {
    feed: Feed,
    /// The caller's code never runs while this is locked.
    arrived: Mutex<Arrived>,
}

impl Inbox {
    /// Records the pending events, on behalf of all waiters, and runs `check` on what has arrived
    /// so far.
    fn check_arrived<T>(&self, check: impl FnOnce(&mut Arrived) -> T) -> T {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        while arrived.end().is_none()
            && let Some(event) = self.feed.take()
        {
            arrived.add(event);
        }
        check(&mut arrived)
    }
}

impl Load {
    pub(super) fn start(guard: &Arc<Guard>, inputs: Result<Vec<Input>>, options: LoadOptions) -> Self {
        let feed = Feed::start(guard, inputs, options, true);
        let waiter = feed.waiter();
        Load { waiter, inbox: Inbox { feed, arrived: Mutex::default() }, returned: 0, failure_returned: false }
    }

    /// How far the load has progressed.
    pub fn progress(&self) -> Progress {
        self.inbox.feed.progress()
    }

    /// Whether the load has ended, successfully or not. Awaiting it then returns at once.
    pub fn is_finished(&self) -> bool {
        self.inbox.check_arrived(|arrived| arrived.end().is_some())
    }

    /// Returns the tensor with this name as soon as the segments up to its last byte have arrived
    /// (segments arrive in order), which may be long before the load ends. The tensor's bytes are
    /// contiguous even if they span segments, except for a rank's part that consists of separate
    /// rows (see [`Tensor::is_contiguous`]).
    ///
    /// The names of a file's tensors are known once its header is read; a small file is read as a
    /// whole, so the names of its tensors arrive with its bytes.
    ///
    /// If there are several files, the model's index decides which one contains the tensor. If the
    /// model has no index, or its index does not list the name, the tensor is returned only after
    /// the headers of all files are read, because another file may contain a tensor with the same
    /// name. Whether a multi-file model is complete may be known only at the end of the load. If
    /// it is incomplete, the load fails, even if tensors were already returned.
    ///
    /// As with segments, a change to a file during the load is detected only once the file has
    /// been read. A tensor may be returned before that, and the load may fail afterwards. Once the
    /// load has failed, this method returns the load's error, too.
    ///
    /// Any number of tasks and threads may wait at once, even for the same tensor. A future that
    /// is not polled does not hold up the others.
    ///
    /// A [memory limit](crate::LoaderBuilder::memory_limit_bytes) never stops a load between two
    /// tensors, whatever order they are requested in, because all its memory is reserved before
    /// the first byte is read. Before that, a call may have to wait until memory from other loads
    /// is dropped, even if the caller itself holds that memory.
    ///
    /// Cancel-safe: dropping the future loses nothing and does not cancel the load.
    ///
    /// # Errors
    /// Those of [`Image::tensor`], as soon as the names of all tensors are known, and the error
    /// that made the load fail. [`crate::Error::Panicked`] if the waker that this future was
    /// polled with panicked; the load continues, and another request returns the tensor.
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
        let Inbox { feed, .. } = &self.inbox;
        let mut waiter = feed.waiter();
        let check = || self.inbox.check_arrived(|arrived| arrived.tensor(name, feed.sources()));
        std::future::poll_fn(|context| waiter.poll(context, check)).await.flatten()
    }

    /// Blocking version of [`Self::tensor`], for model builders without `async`. The thread sleeps
    /// until the tensor has arrived.
    ///
    /// Don't call this from a thread with other work to do: on a worker of an async runtime, the
    /// call stops all of that worker's tasks. Don't call it on the loader's own threads either (in
    /// wakers, `tracing` subscribers, heaps, verifiers or observers), because the load may need
    /// the thread that waits.
    ///
    /// # Errors
    /// Those of [`Self::tensor`].
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

    /// Returns the next segment, in order; `None` after the last one. An error ends the load.
    ///
    /// A change to a file during the load is detected only when the end of the file is reached. By
    /// then, all of the file's segments except the last may have been returned.
    ///
    /// Cancel-safe: dropping the future never loses a segment.
    ///
    /// # Errors
    /// Returns the error that made the load fail, and `None` after that.
    /// [`crate::Error::Panicked`] if the waker that this future was polled with panicked; the next
    /// call returns the segment.
    pub async fn next(&mut self) -> Option<Result<Segment>> {
        self.waiter.begin();
        std::future::poll_fn(|context| self.poll_segment(context)).await
    }

    /// Waits until the load is complete and returns its image.
    ///
    /// Not cancel-safe: dropping the future drops the load, which cancels it.
    ///
    /// # Errors
    /// The error that made the load fail, even if [`Load::next`] or [`Load::tensor`] has already
    /// returned it. A waker that panics does not end this wait, because the loaded bytes would be
    /// lost.
    pub async fn finish(mut self) -> Result<Image> {
        std::future::poll_fn(|context| {
            let mut check = || self.inbox.check_arrived(|arrived| arrived.end().map(drop).ok_or(Interest::End));
            // If the previous waker panicked, the panic hook has already reported it. Wait with
            // the current waker instead.
            while ready!(self.waiter.poll(context, &mut check)).is_err() {}
            Poll::Ready(())
        })
        .await;
        let arrived = self.inbox.arrived.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (segments, end) = arrived.into_parts();
        match end.expect("the wait above must not return before the load has ended") {
            End::Finished(finished) => {
                assert_eq!(segments.len(), finished.report.segments, "a load must deliver all of its segments before it ends");
                Ok(Image::new(finished.files, segments, finished.report))
            }
            End::Failed(error) => Err(error),
        }
    }

    fn poll_segment(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Segment>>> {
        if self.failure_returned {
            return Poll::Ready(None);
        }
        let returned = self.returned;
        let check = |arrived: &mut Arrived| match (arrived.segments().get(returned), arrived.end()) {
            (Some(segment), _) => Ok(Ok(Some(segment.clone()))),
            (None, Some(End::Failed(error))) => Ok(Err(error.clone())),
            (None, Some(End::Finished(_))) => Ok(Ok(None)),
            (None, None) => Err(Interest::AnyEvent),
        };
        let next = match ready!(self.waiter.poll(context, || self.inbox.check_arrived(check))) {
            Ok(next) => next,
            // Only this wait failed. The load continues.
            Err(panicked) => return Poll::Ready(Some(Err(panicked))),
        };
        match &next {
            Ok(Some(_)) => self.returned += 1,
            Err(_) => self.failure_returned = true,
            Ok(None) => {}
        }
        Poll::Ready(next.transpose())
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
