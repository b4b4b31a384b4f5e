//! The tensors of a load: which of a file are read, and a stream of them as they become complete.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;

use super::{Load, Segments};
use crate::error::{Error, Result};
use crate::load::image::{Image, ImageFile, Tensor};
use crate::memory::segment::{Segment, holding};
use crate::plan::tensors::FileTensors;
use crate::telemetry::report::Report;

/// The tensors of a load, each as soon as its last byte is there, while the rest is still being read: in file order, or in the
/// order in which they were asked for ([`crate::LoadOptions::tensors`]). Made by [`Load::tensors`] and [`Segments::tensors`].
///
/// Dropping it cancels the load. Tensors that were given stay, and keep the segments that they are in.
#[derive(Debug)]
#[must_use = "a load that is dropped is cancelled"]
pub struct Tensors {
    source: SegmentSource,
    ready: VecDeque<Tensor>,
    files: Vec<Pending>,
    /// Files whose tensors were all given.
    done: Vec<usize>,
    /// Why there can be none; told first.
    failed: Option<Error>,
    ended: bool,
}

#[derive(Debug)]
enum SegmentSource {
    Kept(Load),
    Streamed(Segments),
}

/// A file whose tensors are being given.
#[derive(Debug)]
struct Pending {
    index: usize,
    path: Arc<PathBuf>,
    bytes: u64,
    part: Range<u64>,
    tensors: Arc<FileTensors>,
    next: usize,
    /// Those that a tensor to come may have a part in.
    segments: Vec<Segment>,
}

impl Load {
    /// Gives the tensors one by one, and the image in the end ([`Tensors::finish`]).
    pub fn tensors(self) -> Tensors {
        // Those that were given as segments already count.
        let kept = self.kept.clone();
        let mut tensors = Tensors::of(SegmentSource::Kept(self), None);
        kept.into_iter().for_each(|segment| tensors.add(segment));
        tensors
    }
}

impl Segments {
    /// Gives the tensors one by one, and keeps nothing: the memory of a tensor that was dropped is freed, once no other is in it.
    /// To be called before [`Segments::next`]: segments that were given are gone, and the stream begins with an error.
    pub fn tensors(self) -> Tensors {
        let late = self.given > 0;
        let failed = late.then(|| Error::Config("tensors were asked for after segments were given".to_owned()));
        Tensors::of(SegmentSource::Streamed(self), failed)
    }
}

impl Tensors {
    fn of(source: SegmentSource, failed: Option<Error>) -> Self {
        Tensors { source, ready: VecDeque::new(), files: Vec::new(), done: Vec::new(), failed, ended: false }
    }

    /// The next tensor; `None` after the last one. Files of raw bytes have none, and are passed over. Cancel-safe, like
    /// [`Load::next`].
    ///
    /// # Errors
    /// Whatever made the load fail; after that, `None`.
    pub async fn next(&mut self) -> Option<Result<Tensor>> {
        std::future::poll_fn(|context| self.poll_tensor(context)).await
    }

    /// The report, once the last tensor was given by a stream that keeps nothing.
    pub fn report(&self) -> Option<&Report> {
        match &self.source {
            SegmentSource::Kept(_) => None,
            SegmentSource::Streamed(segments) => segments.report(),
        }
    }

    /// Waits for the rest, and gives the image; `None` for a stream that keeps nothing. Not cancel-safe, like [`Load::finish`].
    ///
    /// # Errors
    /// Whatever made the load fail.
    pub async fn finish(mut self) -> Result<Option<Image>> {
        // What is not given any more need not be kept.
        while let Some(tensor) = self.next().await {
            tensor?;
        }
        match self.source {
            SegmentSource::Kept(load) => load.finish().await.map(Some),
            SegmentSource::Streamed(_) => Ok(None),
        }
    }

    fn poll_tensor(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Tensor>>> {
        loop {
            if let Some(tensor) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(tensor)));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            let failed = self.failed.take().or_else(|| match &self.source {
                SegmentSource::Kept(_) => None,
                SegmentSource::Streamed(segments) => segments.tensor_over_limit(),
            });
            if let Some(error) = failed {
                self.ended = true;
                return Poll::Ready(Some(Err(error)));
            }
            let polled = match &mut self.source {
                SegmentSource::Kept(load) => load.poll_segment(context),
                SegmentSource::Streamed(segments) => segments.poll_segment(context),
            };
            match std::task::ready!(polled) {
                Some(Ok(segment)) => self.add(segment),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => self.end(),
            }
        }
    }

    /// A segment is there: what it completes is ready.
    fn add(&mut self, segment: Segment) {
        // A file of raw bytes has none.
        let Some(tensors) = segment.file_tensors().cloned() else { return };
        let index = segment.file_index();
        if self.done.contains(&index) {
            return;
        }
        let at = self.files.iter().position(|file| file.index == index).unwrap_or_else(|| {
            let (path, bytes, part) = (segment.shared_path(), segment.file_bytes(), segment.file_part());
            self.files.push(Pending { index, path, bytes, part, tensors, next: 0, segments: Vec::new() });
            self.files.len() - 1
        });
        let file = self.files.get_mut(at).expect("found or pushed above");
        file.segments.push(segment);
        file.give(&mut self.ready);
        if file.is_done() {
            self.done.push(index);
            self.files.swap_remove(at);
        }
    }

    /// All segments were given: what is left are tensors of no bytes.
    fn end(&mut self) {
        self.ended = true;
        for file in &mut self.files {
            file.give(&mut self.ready);
        }
        // Files of which no byte was read, because their tensors have none.
        let finished = match &self.source {
            SegmentSource::Kept(load) => load.finished_files(),
            SegmentSource::Streamed(segments) => segments.finished_files(),
        };
        for file in finished.iter().filter(|file| !file.has_segments) {
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

    /// Gives the tensors that are complete, in order.
    fn give(&mut self, ready: &mut VecDeque<Tensor>) {
        let before = self.next;
        while let Some(position) = self.tensors.position_of(self.next) {
            let part = self.tensors.part_at(position).expect("a tensor that was chosen is in the map");
            // Rows come in order: with the last one, all are there.
            let rows = [part.rows.iter().next(), part.rows.iter().last()];
            let is_there = |row: &Range<u64>| row.is_empty() || holding(&self.segments, row).is_some();
            if !rows.into_iter().flatten().all(|row| is_there(&row)) {
                break;
            }
            let hull = part.rows.hull();
            let own = self.segments.iter().filter(|segment| {
                let held = segment.file_range();
                held.start < hull.end && hull.start < held.end
            });
            let tensors = Some(Arc::clone(&self.tensors));
            let image = ImageFile::new(Arc::clone(&self.path), self.bytes, self.part.clone(), own.cloned().collect(), tensors);
            ready.extend(image.tensor_at(position));
            self.next += 1;
        }
        // The tensors of a class come in file order: what ends before the next one begins is of none to come. Those of another
        // class have spans of their own, which come later.
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
