//! A load from the caller's side: segments as they come ([`Load`], [`Segments`]), tensors as they come
//! ([`Tensors`]), or an [`Image`] when all of it is there.
//!
//! It turns the events of the engine into what a caller holds, and makes no system call. It needs no
//! runtime, only something that polls it. Dropping it cancels the load; the engine frees what the load
//! leaves.

pub(crate) mod image;
mod tensors;

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::sync::mpsc::UnboundedReceiver;

pub use tensors::Tensors;

use crate::engine::Guard;
use crate::engine::event::{Event, Finished, FinishedFile, Progress};
use crate::engine::state::LoadShared;
use crate::error::{Error, Result};
use crate::files::source::Input;
use crate::memory::segment::Segment;
use crate::options::load::LoadOptions;
use crate::telemetry::report::Report;
use image::Image;

/// A load that is under way. It runs by itself, on the loader's threads, whether it is polled or not.
///
/// - [`Load::next`] (it is a [`Stream`], too) gives the segments in order, each as soon as it is complete, while the rest
///   is still being read. The load keeps them as well, for the image.
/// - [`Load::finish`], or awaiting the load itself, gives the [`Image`].
///
/// For a stream that keeps nothing there is [`crate::Loader::stream`].
///
/// Dropping it cancels the load: nothing new is read, what is in flight is drained in the background, then its memory
/// is freed. Segments that were handed over stay. Until then it holds all segments, and nothing else once the last one is there:
/// its files are closed.
///
/// It needs no particular runtime, nor any: only something that polls it.
#[derive(Debug)]
#[must_use = "a load that is dropped is cancelled"]
pub struct Load {
    segments: Segments,
    kept: Vec<Segment>,
}

impl Load {
    pub(crate) fn new(segments: Segments) -> Self {
        Load { segments, kept: Vec::new() }
    }

    /// The next segment, in order; `None` after the last one. An error ends the load.
    ///
    /// A file that is changed while it is being read is found out at its end: before its last segment, not before
    /// its first ones.
    ///
    /// Cancel-safe: a segment is lost to a dropped future in no case.
    ///
    /// # Errors
    /// Whatever made the load fail; after that, `None`.
    pub async fn next(&mut self) -> Option<Result<Segment>> {
        std::future::poll_fn(|context| self.poll_segment(context)).await
    }

    /// Waits for the rest, and gives all of it.
    ///
    /// Not cancel-safe in the sense of going on: dropping the future drops the load, which cancels it.
    ///
    /// # Errors
    /// Whatever made the load fail, also if it was told before by [`Load::next`].
    pub async fn finish(mut self) -> Result<Image> {
        while let Some(segment) = self.next().await {
            segment?;
        }
        let Load { mut segments, kept } = self;
        match (segments.finished.take(), segments.failed.take()) {
            (Some(finished), _) => Ok(Image::new(finished.files, kept, finished.report)),
            (None, Some(error)) => Err(error),
            (None, None) => Err(Error::ShutDown),
        }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.segments.progress()
    }

    /// The files, once the last segment was given.
    fn finished_files(&self) -> &[FinishedFile] {
        self.segments.finished_files()
    }

    fn poll_segment(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Segment>>> {
        let polled = self.segments.poll_segment(context);
        if let Poll::Ready(Some(Ok(segment))) = &polled {
            self.kept.push(segment.clone());
        }
        polled
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

/// The segments of a load, each handed over once and not kept: a consumer that drops what it has used can stream a file
/// larger than memory. Dropping it cancels the load.
///
/// The load goes ahead of its consumer by the loader's window and a segment at most (by less where there is less memory), and waits
/// until the next segment is taken. Once the last one is taken, this holds no file, no memory and no addresses any more, only the
/// report and the maps of tensors.
#[derive(Debug)]
#[must_use = "a load that is dropped is cancelled"]
pub struct Segments {
    events: UnboundedReceiver<Event>,
    /// Only `None` inside `drop`.
    shared: Option<Arc<LoadShared>>,
    guard: Arc<Guard>,
    finished: Option<Box<Finished>>,
    failed: Option<Error>,
    /// How many segments were given.
    given: usize,
}

impl Segments {
    /// Starts a load. `keep` tells whether all of it will be in memory at once.
    pub(crate) fn start(guard: &Arc<Guard>, asked: Vec<Input>, options: LoadOptions, keep: bool) -> Self {
        let (events, shared) = guard.load(asked, options, keep);
        Segments { events, shared: Some(shared), guard: Arc::clone(guard), finished: None, failed: None, given: 0 }
    }

    /// The next segment, in order; `None` after the last one. Cancel-safe, like [`Load::next`].
    ///
    /// # Errors
    /// Whatever made the load fail; after that, `None`.
    pub async fn next(&mut self) -> Option<Result<Segment>> {
        std::future::poll_fn(|context| self.poll_segment(context)).await
    }

    /// The report, once the last segment was given.
    pub fn report(&self) -> Option<&Report> {
        self.finished.as_ref().map(|finished| &finished.report)
    }

    /// Why the tensors of this load can't be given one by one within its loader's limit of memory.
    fn tensor_over_limit(&self) -> Option<Error> {
        self.shared.as_ref().and_then(|shared| shared.tensor_over_limit.get().cloned())
    }

    /// The files, once the last segment was given.
    fn finished_files(&self) -> &[FinishedFile] {
        self.finished.as_ref().map_or(&[], |finished| &finished.files)
    }

    /// How far the load is.
    pub fn progress(&self) -> Progress {
        self.shared.as_ref().map(|shared| shared.progress()).unwrap_or_default()
    }

    fn poll_segment(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Segment>>> {
        if self.finished.is_some() || self.failed.is_some() {
            return Poll::Ready(None);
        }
        let event = std::task::ready!(self.events.poll_recv(context));
        Poll::Ready(match event.unwrap_or(Event::Failed(Error::ShutDown)) {
            Event::Segment(segment) => {
                self.given += 1;
                // A load that is kept is not held up.
                if let Some(load) = self.shared.as_ref().filter(|load| !load.keep) {
                    self.guard.consumed(load.id, segment.memory_bytes() as u64);
                }
                Some(Ok(segment))
            }
            Event::Done(finished) => {
                self.finished = Some(finished);
                None
            }
            Event::Failed(error) => {
                self.failed = Some(error.clone());
                Some(Err(error))
            }
        })
    }
}

impl Stream for Segments {
    type Item = Result<Segment>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_segment(context)
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            self.guard.abandon(shared);
        }
    }
}
