//! What has come of a load that is kept: its files, its segments, its end.

use std::sync::Arc;

use super::image::{Tensor, complete_tensor};
use super::names::{Names, indices};
use crate::engine::event::{Event, Finished, LoadFile};
use crate::error::{Error, Result};
use crate::files::source::SourceFile;
use crate::memory::segment::Segment;

/// See the module.
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

/// The files of a load, in its order.
#[derive(Debug)]
struct Files {
    list: Vec<ArrivingFile>,
    /// How many have tensors that are not known yet.
    unknown: usize,
    /// Made when a tensor is looked up and the tensors of all files are known.
    names: Option<Names>,
}

/// A file, and those of its segments that are there.
#[derive(Debug)]
struct ArrivingFile {
    about: LoadFile,
    segments: Vec<Segment>,
}

impl Arrived {
    /// Adds what the load tells.
    pub(super) fn add(&mut self, event: Event) {
        match event {
            Event::Planned(files) => self.files = Some(Files::new(files)),
            Event::Segment(segment) => {
                self.segments.push(segment.clone());
                let files = self.files.as_mut().expect("the files of a load are known before its first segment");
                files.add(&segment);
            }
            Event::Done(finished) => self.end = Some(End::Finished(finished)),
            Event::Failed(error) => self.end = Some(End::Failed(error)),
        }
    }

    /// The segments that are there, in order.
    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    pub(super) fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    pub(super) fn into_parts(self) -> (Vec<Segment>, Option<End>) {
        (self.segments, self.end)
    }

    /// The tensor of this name, if it is there, or why it never will be; `None` while that is
    /// open. `sources` are the files of the load.
    pub(super) fn tensor(&mut self, name: &str, sources: &[SourceFile]) -> Option<Result<Tensor>> {
        if let Some(End::Failed(error)) = &self.end {
            return Some(Err(error.clone()));
        }
        let files = self.files.as_mut()?;
        match files.find(name, sources)? {
            Ok((file, position)) => {
                let ArrivingFile { about, segments } = files.list.get(file)?;
                complete_tensor(about, segments, position).map(Ok)
            }
            Err(error) => Some(Err(error)),
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
        let file = self.list.get_mut(segment.file_index()).expect("a segment is of a file of its load");
        if !file.about.is_known {
            // The file was checked, and its header read, before its first segment was shown.
            file.about.tensors = segment.file_tensors().cloned();
            file.about.is_known = true;
            self.unknown -= 1;
        }
        file.segments.push(segment.clone());
    }

    /// The number of the file that has this tensor, and the tensor's position in that file's map,
    /// or why there is none; `None` while that is open.
    fn find(&mut self, name: &str, sources: &[SourceFile]) -> Option<Result<(usize, usize)>> {
        if self.unknown == 0 {
            let list = &self.list;
            let names = self.names.get_or_insert_with(|| {
                let files = list.iter().map(|file| (Arc::clone(&file.about.path), file.about.tensors.clone()));
                Names::new(files.collect(), indices(list.iter().map(|file| &file.about)))
            });
            return Some(names.find(name));
        }
        // The index of a model says of most of its files that they do not have this tensor. A
        // file of which it does not say so, or that has no index, has to be known. What can't be
        // found in these may be in none, or not wanted: only the names of all files tell.
        let mut found = None;
        for (number, (file, _)) in self.list.iter().zip(sources).enumerate().filter(|(_, (_, source))| source.owns(name)) {
            if !file.about.is_known {
                return None;
            }
            if let Some(position) = file.position_of(name) {
                // Two of this name are an error, unless the load fails before that is known.
                if found.replace((number, position)).is_some() {
                    return None;
                }
            }
        }
        found.map(Ok)
    }
}

impl ArrivingFile {
    /// The position of a tensor that is loaded in the file's map.
    fn position_of(&self, name: &str) -> Option<usize> {
        let tensors = self.about.tensors.as_ref()?;
        tensors.map.get_index_of(name).filter(|&position| tensors.part_at(position).is_some())
    }
}
