//! Tracks how much of a load that keeps all its segments has arrived: the list of files, the
//! segments, and the load's end.

use std::sync::Arc;

use super::image::{Tensor, complete_tensor, missing_byte};
use super::names::{Names, indices};
use crate::engine::event::{Event, Finished, LoadFile};
use crate::engine::outbox::Interest;
use crate::error::{Error, Result};
use crate::files::source::SourceFile;
use crate::memory::segment::Segment;

/// What has arrived of a load so far: its list of files, its segments, and its end.
#[derive(Debug, Default)]
pub(super) struct Arrived {
    segments: Vec<Segment>,
    /// `None` until the load is planned.
    files: Option<Files>,
    end: Option<End>,
}

#[derive(Debug)]
pub(super) enum End {
    Finished(Box<Finished>),
    Failed(Error),
}

/// The files of a load, in load order.
#[derive(Debug)]
struct Files {
    list: Vec<ArrivingFile>,
    /// Number of files whose tensors are not known yet.
    unknown: usize,
    /// Built by the first lookup after the tensors of all files are known.
    names: Option<Names>,
}

/// A file and those of its segments that have arrived.
#[derive(Debug)]
struct ArrivingFile {
    about: LoadFile,
    segments: Vec<Segment>,
}

impl Arrived {
    /// Records an event of the load.
    pub(super) fn add(&mut self, event: Event) {
        match event {
            Event::Planned(files) => self.files = Some(Files::new(files)),
            Event::Segment(segment) => {
                self.segments.push(segment.clone());
                let files = self.files.as_mut().expect("the list of files must arrive before the first segment");
                files.add(&segment);
            }
            Event::Done(finished) => self.end = Some(End::Finished(finished)),
            Event::Failed(error) => self.end = Some(End::Failed(error)),
        }
    }

    /// Returns the segments that have arrived, in order.
    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    pub(super) fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    pub(super) fn into_parts(self) -> (Vec<Segment>, Option<End>) {
        (self.segments, self.end)
    }

    /// Returns the tensor with this name if it has arrived, or an error if it never will.
    /// `sources` are the files in the load.
    ///
    /// # Errors
    /// The event to wait for before trying again.
    pub(super) fn tensor(&mut self, name: &str, sources: &[SourceFile]) -> Result<Result<Tensor>, Interest> {
        if let Some(End::Failed(error)) = &self.end {
            return Ok(Err(error.clone()));
        }
        // The load's first event lists its files.
        let files = self.files.as_mut().ok_or(Interest::AnyEvent)?;
        let (file_index, position) = match files.find(name, sources)? {
            Ok(place) => place,
            Err(error) => return Ok(Err(error)),
        };
        let ArrivingFile { about, segments } = files.list.get(file_index).expect("a tensor must belong to a file in its load");
        match missing_byte(about, segments, position) {
            Some(offset) => Err(Interest::Byte { file_index, offset }),
            None => Ok(Ok(complete_tensor(about, segments, position).expect("a tensor without missing bytes must be complete"))),
        }
    }
}

impl Files {
    fn new(files: Vec<LoadFile>) -> Self {
        let unknown = files.iter().filter(|file| !file.is_known).count();
        let list = files.into_iter().map(|about| ArrivingFile { about, segments: Vec::new() }).collect();
        Files { list, unknown, names: None }
    }

    fn add(&mut self, segment: &Segment) {
        let file = self.list.get_mut(segment.file_index()).expect("a segment must belong to a file in its load");
        if !file.about.is_known {
            // Only the tensors of small files can be unknown here, and a small file is a single
            // segment. A file is checked before its last segment is delivered, and this check
            // reads the header of a small file.
            file.about.tensors = segment.file_tensors().cloned();
            file.about.is_known = true;
            self.unknown -= 1;
        }
        file.segments.push(segment.clone());
    }

    /// Returns the number of the file that contains this tensor, and the tensor's position in that
    /// file's map. If the lookup is certain to fail, returns the error that the caller should see.
    ///
    /// # Errors
    /// The event to wait for before the lookup can be decided.
    fn find(&mut self, name: &str, sources: &[SourceFile]) -> Result<Result<(usize, usize)>, Interest> {
        if self.unknown == 0 {
            let list = &self.list;
            let names = self.names.get_or_insert_with(|| {
                let files = list.iter().map(|file| (Arc::clone(&file.about.path), file.about.tensors.clone()));
                Names::new(files.collect(), indices(list.iter().map(|file| &file.about)))
            });
            return Ok(names.find(name));
        }
        // Starts with the last file. Segments arrive in file order unless tensors were selected in
        // another order, so the last unknown file is likely to become known last.
        let files = || self.list.iter().zip(sources).enumerate().rev();
        // A model's index rules out most of its files for a given tensor. The tensors of the other
        // files, including those that have no index, must be known first.
        let mut found = Vec::new();
        for (file_index, (file, _)) in files().filter(|(_, (_, source))| source.owns(name)) {
            if !file.about.is_known {
                return Err(file.header_interest(file_index));
            }
            found.extend(file.position_of(name).map(|position| (file_index, position)));
        }
        match *found {
            [place] => Ok(Ok(place)),
            // If none of these files contains the tensor, it may not exist or may not be selected.
            // That is certain only when the tensors of all files are known. If several files
            // contain it, the lookup will fail. It still waits, so that the load's error is
            // returned instead if the load fails first.
            _ => {
                let unknown = files().find(|(_, (file, _))| !file.about.is_known);
                let (file_index, (file, _)) = unknown.expect("at least one file must be unknown if `self.unknown` is not 0");
                Err(file.header_interest(file_index))
            }
        }
    }
}

impl ArrivingFile {
    /// The event after which the file's tensors are known. Only the tensors of small files can be
    /// unknown, and a small file is a single segment, so any of its bytes will do.
    fn header_interest(&self, file_index: usize) -> Interest {
        Interest::Byte { file_index, offset: self.about.part.start }
    }

    /// Returns the position of this tensor in the file's map, if the tensor is being loaded.
    fn position_of(&self, name: &str) -> Option<usize> {
        let tensors = self.about.tensors.as_ref()?;
        tensors.map.get_index_of(name).filter(|&position| tensors.part_at(position).is_some())
    }
}
