//! A stream of a load's tensors.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_core::Stream;

use super::image::{ImageFile, Tensor, complete_tensor};
use super::segments::Segments;
use crate::engine::event::{LoadFile, Progress};
use crate::error::Result;
use crate::memory::segment::Segment;
use crate::plan::tensors::FileTensors;
use crate::support::park;
use crate::telemetry::report::Report;

/// How often a waiting consumer checks whether the load, in turn, is waiting for the consumer to
/// drop tensors. The arrival of a tensor ends the wait immediately.
const HELD_UP_CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// A stream of a load's tensors, in file order or in the order in which they were requested
/// ([`crate::LoadOptions::tensors`]). Each tensor is returned as soon as its last byte has
/// arrived, while later ones are still being read. Created by
/// [`LoadRequest::tensors`](crate::LoadRequest::tensors).
///
/// The stream keeps only the segments of tensors that it has not returned yet. Once all returned
/// tensors of a segment are dropped as well, the segment's memory is freed.
///
/// Dropping the stream cancels the load. Tensors already returned stay valid and keep their
/// segments.
#[derive(Debug)]
#[must_use = "dropping a load cancels it"]
pub struct Tensors {
    segments: Segments,
    ready: VecDeque<Tensor>,
    files: Vec<Pending>,
    /// Indices of the files whose tensors have all been queued or returned.
    done: Vec<usize>,
    ended: bool,
}

/// A file that still has tensors to queue.
#[derive(Debug)]
struct Pending {
    index: usize,
    about: LoadFile,
    tensors: Arc<FileTensors>,
    next: usize,
    /// Segments that may hold part of a tensor that is not queued yet.
    segments: Vec<Segment>,
}

impl Tensors {
    pub(super) fn new(segments: Segments) -> Self {
        Tensors { segments, ready: VecDeque::new(), files: Vec::new(), done: Vec::new(), ended: false }
    }

    /// Returns the next tensor; `None` after the last one. Files of raw bytes have no tensors and
    /// are skipped. Cancel-safe: dropping the future never loses a tensor.
    ///
    /// # Errors
    /// Returns the error that made the load fail, and `None` after that.
    /// [`crate::Error::Panicked`] if the waker that this future was polled with panicked; the next
    /// call returns the tensor.
    pub async fn next(&mut self) -> Option<Result<Tensor>> {
        self.segments.begin_wait();
        std::future::poll_fn(|context| self.poll_tensor(context)).await
    }

    /// Like [`Self::next`], but blocks the caller's thread, and is meant for consumers that don't
    /// drop tensors while they wait, such as one that keeps tensors until they are requested by
    /// name.
    ///
    /// If the returned tensors use up the loader's memory limit, [`Self::next`] waits, because
    /// another task can drop them. This method returns [`crate::Error::HeldUp`] instead, because
    /// the wait would never end. The load does not fail: once some tensors have been dropped,
    /// another call returns the next one. Without a memory limit, this error never occurs.
    ///
    /// Do not call this where [`Load::tensor_blocking`](crate::Load::tensor_blocking) must not be
    /// called.
    ///
    /// ```no_run
    /// # fn example(loader: dmaload::Loader) -> dmaload::Result<()> {
    /// use std::collections::HashMap;
    ///
    /// let mut tensors = loader.load("model.safetensors").tensors();
    /// let mut kept = HashMap::new();
    /// while !kept.contains_key("lm_head.weight") {
    ///     let Some(tensor) = tensors.next_while_holding_blocking() else { break };
    ///     let tensor = tensor?;
    ///     kept.insert(tensor.name().to_owned(), tensor);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`Self::next`], and [`crate::Error::HeldUp`].
    pub fn next_while_holding_blocking(&mut self) -> Option<Result<Tensor>> {
        loop {
            if let Some(next) = park::block_on_for(HELD_UP_CHECK_INTERVAL, self.next()) {
                return next;
            }
            if let Some(error) = self.segments.held_up() {
                return Some(Err(error));
            }
        }
    }

    /// The report, once [`Self::next`] has returned `None` after the last tensor.
    pub fn report(&self) -> Option<&Report> {
        self.segments.report()
    }

    /// How far the load has progressed.
    pub fn progress(&self) -> Progress {
        self.segments.progress()
    }

    fn poll_tensor(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Tensor>>> {
        loop {
            if let Some(tensor) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(tensor)));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            if let Some(error) = self.segments.tensor_over_limit() {
                self.ended = true;
                return Poll::Ready(Some(Err(error)));
            }
            match std::task::ready!(self.segments.poll_segment(context)) {
                Some(Ok(segment)) => self.add(segment),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => self.finish(),
            }
        }
    }

    /// Adds a segment and queues the tensors that it completes.
    fn add(&mut self, segment: Segment) {
        // A file of raw bytes has no tensors, so its segments are skipped.
        let Some(tensors) = segment.file_tensors().cloned() else { return };
        let index = segment.file_index();
        if self.done.contains(&index) {
            return;
        }
        let at = self.files.iter().position(|file| file.index == index).unwrap_or_else(|| {
            let about = LoadFile {
                path: segment.shared_path(),
                bytes: segment.file_bytes(),
                part: segment.file_part(),
                tensors: Some(Arc::clone(&tensors)),
                is_known: true,
                has_segments: true,
                index: None,
            };
            self.files.push(Pending { index, about, tensors, next: 0, segments: Vec::new() });
            self.files.len() - 1
        });
        let file = self.files.get_mut(at).expect("the file must have been found or pushed above");
        file.segments.push(segment);
        file.queue_complete(&mut self.ready);
        if file.is_done() {
            self.done.push(index);
            self.files.swap_remove(at);
        }
    }

    /// Handles the end of the load. Only tensors without bytes can be left, and they are queued
    /// now.
    fn finish(&mut self) {
        self.ended = true;
        for file in &mut self.files {
            file.queue_complete(&mut self.ready);
        }
        // Files without segments were not read. Any tensors selected from them are empty.
        for file in self.segments.finished_files().iter().filter(|file| !file.has_segments) {
            let Some(tensors) = &file.tensors else { continue };
            let image =
                ImageFile::new(Arc::clone(&file.path), file.bytes, file.part.clone(), Vec::new(), Some(Arc::clone(tensors)));
            self.ready.extend(image.tensors());
        }
        self.files.clear();
    }
}

impl Pending {
    fn is_done(&self) -> bool {
        self.next == self.tensors.len()
    }

    /// Queues the complete tensors, in order.
    fn queue_complete(&mut self, ready: &mut VecDeque<Tensor>) {
        let before = self.next;
        while let Some(position) = self.tensors.position_of(self.next) {
            let Some(tensor) = complete_tensor(&self.about, &self.segments, position) else { break };
            ready.push_back(tensor);
            self.next += 1;
        }
        // Within a request class (see `FileTensors::class_of`), tensors are in file order, so a
        // segment that ends before the next tensor begins holds no part of a later one. Tensors in
        // other classes are in separate spans, which are read later.
        let class = |number: usize| self.tensors.class_of(number);
        let goes_on = self.next == before || class(self.next - 1) == class(self.next);
        let next = self.next_start().filter(|_| goes_on);
        self.segments.retain(|segment| next.is_some_and(|start| segment.file_range().end > start));
    }

    /// Where the next tensor begins.
    fn next_start(&self) -> Option<u64> {
        let position = self.tensors.position_of(self.next)?;
        self.tensors.part_at(position).map(|part| part.rows.hull().start)
    }
}

impl Stream for Tensors {
    type Item = Result<Tensor>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_tensor(context)
    }
}
