//! Selects which bytes of its files a load reads: all bytes, a range, the bytes of some tensors,
//! or a rank's share.
//!
//! ```text
//!   tensors  |--a--|-------b-------|--c--|------------------- d -------------------|--e--|
//!   wanted         |-------b-------|     |- rank 0 of d -|                         |--e--|
//!   spans      |-------------------------------------------|                     |---------|
//! ```
//!
//! A span is contiguous: it joins wanted ranges with the small gaps between them, and is extended
//! to whole blocks, as direct reads require. Spans are in the order in which their ranges were
//! requested.
//!
//! Selecting is pure: it uses no clock and makes no system calls.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::model::{TensorInfo, TensorMap};
use crate::options::choices::{ImporterLimits, Shard};
use crate::options::load::Select;
use crate::plan::Span;
use crate::plan::glob::Pattern;
use crate::support::convert::to_usize;

/// A validated [`Select`], and what was learned while applying it to files.
#[derive(Debug, Default)]
pub(crate) struct Selector {
    patterns: Option<Vec<Pattern>>,
    range: Option<Range<u64>>,
    shard: Option<Shard>,
    /// Which patterns have matched a tensor.
    matched: Vec<bool>,
    /// Tensors that are divided among ranks in a way that may surprise the caller.
    affected: AffectedTensors,
    /// The number of files from which this rank gets no tensor bytes or, for files without
    /// tensors, no bytes at all.
    files_without: usize,
}

/// Tensors of which this rank gets only some bytes, or none.
#[derive(Debug, Default)]
struct AffectedTensors {
    count: usize,
    first: Option<String>,
}

impl AffectedTensors {
    fn add(&mut self, name: &str) {
        self.count += 1;
        self.first.get_or_insert_with(|| name.to_owned());
    }
}

/// The ranges of a file to read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Selected {
    /// Sorted by request class, then by position in the file.
    pub(crate) spans: Vec<Span>,
    /// The tensors to read. `None` if tensors are neither selected by name nor cut along a
    /// dimension.
    pub(crate) tensors: Option<Arc<ChosenTensors>>,
    /// The number of bytes that were requested, not counting the gaps and the rest of the blocks
    /// that are read with them.
    pub(crate) wanted_bytes: u64,
}

/// A tensor to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChosenTensor {
    /// Position in the tensor map.
    pub(crate) position: usize,
    /// Request class: the index of the first pattern that matches the tensor, or 0 if there are no
    /// patterns.
    pub(crate) class: usize,
    pub(crate) part: TensorSlice,
}

/// The tensors of a file to read, in the order in which they are read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ChosenTensors {
    list: Vec<ChosenTensor>,
    /// Indices into `list`, sorted by position.
    by_position: Vec<u32>,
}

impl ChosenTensors {
    pub(crate) fn new(list: Vec<ChosenTensor>) -> Self {
        let mut by_position: Vec<u32> = (0..).take(list.len()).collect();
        by_position.sort_unstable_by_key(|&number| list[number as usize].position);
        ChosenTensors { list, by_position }
    }

    pub(crate) fn list(&self) -> &[ChosenTensor] {
        &self.list
    }

    /// Chooses the tensors that the file owns, each in full. Returns `None` if the file owns all
    /// tensors in the map.
    pub(crate) fn owned(map: &TensorMap, owns: impl Fn(&str) -> bool) -> Option<Self> {
        let whole = |(position, info): (usize, &TensorInfo)| {
            let part = TensorSlice { shape: info.shape.clone(), rows: Rows::single(info.file_range.clone()) };
            owns(&info.name).then_some(ChosenTensor { position, class: 0, part })
        };
        if map.iter().all(|info| owns(&info.name)) {
            None
        } else {
            Some(Self::new(map.iter().enumerate().filter_map(whole).collect()))
        }
    }

    /// Returns the tensor at this position in the tensor map, if it is read.
    pub(crate) fn get(&self, position: usize) -> Option<&ChosenTensor> {
        let position_of = |number: &u32| self.list.get(*number as usize).map(|chosen| chosen.position);
        let found = self.by_position.binary_search_by(|number| position_of(number).cmp(&Some(position))).ok()?;
        self.list.get(*self.by_position.get(found)? as usize)
    }
}

/// The part of a tensor that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorSlice {
    /// The shape of the part, which is the tensor's shape if the whole tensor is wanted.
    pub(crate) shape: Vec<usize>,
    pub(crate) rows: Rows,
}

/// Ranges of equal length at equal distances in a file. Together, they hold the wanted part of a
/// tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) first: Range<u64>,
    pub(crate) stride_bytes: u64,
    pub(crate) count: u64,
}

impl Rows {
    pub(crate) fn single(range: Range<u64>) -> Self {
        Rows { first: range, stride_bytes: 0, count: 1 }
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + use<> {
        let Rows { first, stride_bytes, count } = self.clone();
        (0..count).map(move |row| first.start + row * stride_bytes..first.end + row * stride_bytes)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.count * (self.first.end - self.first.start)
    }

    /// Returns the range from the start of the first row to the end of the last row.
    pub(crate) fn hull(&self) -> Range<u64> {
        self.first.start..self.first.end + self.count.saturating_sub(1) * self.stride_bytes
    }
}

/// Maximum size of a gap between two wanted ranges that is read along with them rather than
/// skipped, because a separate read would take at least as long.
const GAP_BYTES: u64 = 128 << 10;

impl Selected {
    /// Selects a range of a file.
    pub(crate) fn of_range(range: Range<u64>, file_bytes: u64, alignment: u64) -> Self {
        let mut spans = Vec::new();
        let wanted_bytes = range.end - range.start;
        coalesce(std::iter::once(range), file_bytes, alignment, 0, &mut spans);
        Selected { spans, tensors: None, wanted_bytes }
    }

    /// Selects a whole file.
    pub(crate) fn whole(file_bytes: u64) -> Self {
        Selected { spans: vec![Span::whole(0, file_bytes)], tensors: None, wanted_bytes: file_bytes }
    }
}

impl Selector {
    /// Validates the selection and compiles its patterns.
    ///
    /// # Errors
    /// [`Error::Config`] for an invalid selection.
    pub(crate) fn new(select: &Select) -> Result<Self> {
        let invalid = |text: String| Err(Error::Config(text));
        let patterns = select.tensors.as_ref().map(|tensors| {
            tensors.iter().map(|text| if select.by_name { Ok(Pattern::literal(text)) } else { Pattern::new(text) }).collect()
        });
        let patterns: Option<Vec<_>> = patterns.transpose().map_err(Error::Config)?;
        if patterns.as_ref().is_some_and(Vec::is_empty) {
            return invalid("the list of tensors is empty".to_owned());
        }
        if let Some(shard) = select.shard
            && shard.rank >= shard.world_size
        {
            return invalid(format!("invalid rank {} of {}: ranks are counted from 0", shard.rank, shard.world_size));
        }
        let cuts_tensors = select.shard.is_some_and(|shard| shard.dim.is_some());
        if select.range.is_some() && (patterns.is_some() || select.shard.is_some()) {
            return invalid("a byte range can't be combined with tensors or a rank's share".to_owned());
        }
        if patterns.is_some() && select.shard.is_some() && !cuts_tensors {
            return invalid("a rank's share of selected tensors needs the dimension to cut along".to_owned());
        }
        if select.range.as_ref().is_some_and(Range::is_empty) {
            return invalid("the byte range is empty".to_owned());
        }
        let matched = vec![false; patterns.as_ref().map_or(0, Vec::len)];
        Ok(Selector {
            patterns,
            range: select.range.clone(),
            shard: select.shard,
            matched,
            affected: AffectedTensors::default(),
            files_without: 0,
        })
    }

    /// Returns whether the selection depends on the tensors in a file.
    pub(crate) fn needs_tensors(&self) -> bool {
        self.patterns.is_some() || self.shard.is_some_and(|shard| shard.dim.is_some())
    }

    /// Returns whether each file's bytes are divided among ranks, regardless of where tensors
    /// begin and end.
    pub(crate) fn cuts_bytes(&self) -> bool {
        self.shard.is_some_and(|shard| shard.dim.is_none())
    }

    /// Records the effects of dividing a file's bytes among ranks: which tensors are split between
    /// this rank and others, and whether this rank gets no tensor bytes or, from a file without
    /// tensors, no bytes at all.
    pub(crate) fn note_cut(&mut self, map: Option<&TensorMap>, selected: &Selected, part: &Range<u64>) {
        let own: Vec<&Range<u64>> = selected.spans.iter().map(|span| &span.range).collect();
        let (mut has_any, mut is_touched) = (false, false);
        for tensor in map.into_iter().flatten() {
            let Range { start, end } = tensor.file_range;
            let touched = own.iter().any(|own| own.start < end && start < own.end);
            (has_any, is_touched) = (has_any || start < end, is_touched || touched);
            if touched && !own.iter().any(|own| own.start <= start && end <= own.end) {
                self.affected.add(&tensor.name);
            }
        }
        let has_nothing = if has_any { !is_touched } else { selected.wanted_bytes == 0 && !part.is_empty() };
        self.files_without += usize::from(has_nothing);
    }

    /// Describes the effects of dividing tensors or bytes among ranks that may surprise the
    /// caller.
    pub(crate) fn notes(&self) -> Vec<String> {
        let Some(shard) = self.shard else { return Vec::new() };
        let Shard { rank, world_size, dim } = shard;
        let affected = self.affected.first.as_ref().map(|first| {
            let count = self.affected.count;
            let tensors = if count == 1 { format!("tensor {first:?}") } else { format!("{count} tensors (first: {first:?})") };
            match dim {
                None => format!(
                    "{tensors} {} split between ranks: rank {rank} of {world_size} gets only some bytes of {} (cut along a \
                     dimension to avoid that)",
                    if count == 1 { "is" } else { "are" },
                    if count == 1 { "it" } else { "each" }
                ),
                Some(dim) => {
                    format!("rank {rank} of {world_size} gets no part of {tensors}: dimension {dim} is too short")
                }
            }
        });
        let without = (self.files_without > 0).then(|| {
            let files = if self.files_without == 1 { "one file".to_owned() } else { format!("{} files", self.files_without) };
            format!(
                "rank {rank} of {world_size} gets no weights from {files}: files are cut at block boundaries, and there are too few blocks \
                 for all ranks"
            )
        });
        affected.into_iter().chain(without).collect()
    }

    /// Returns whether tensors are selected by name.
    pub(crate) fn has_patterns(&self) -> bool {
        self.patterns.is_some()
    }

    /// Returns whether a pattern can match names that the caller did not spell out.
    pub(crate) fn is_wild(&self) -> bool {
        self.patterns.iter().flatten().any(Pattern::is_wild)
    }

    /// Returns whether the tensor with this name is selected.
    pub(crate) fn selects(&self, name: &str) -> bool {
        self.patterns.as_ref().is_none_or(|patterns| patterns.iter().any(|pattern| pattern.matches(name)))
    }

    /// Calls `matched` with the second item of each pair in `names` whose first item, a name, is
    /// matched by a pattern. Returns whether every pattern has matched a name.
    pub(crate) fn select_names<'a>(
        &self,
        names: impl Iterator<Item = (&'a str, &'a str)>,
        mut matched: impl FnMut(&'a str),
    ) -> bool {
        let patterns = self.patterns.as_deref().unwrap_or_default();
        let mut seen = vec![false; patterns.len()];
        for (name, with) in names {
            let mut is_meant = false;
            for (pattern, seen) in patterns.iter().zip(&mut seen) {
                if pattern.matches(name) {
                    (*seen, is_meant) = (true, true);
                }
            }
            if is_meant {
                matched(with);
            }
        }
        seen.into_iter().all(|seen| seen)
    }

    /// Selects what to read from a file. `part` is the range of the file that contains the model.
    /// Only tensors that the file owns are considered. `alignment` is the alignment that direct
    /// reads need, a power of two.
    ///
    /// # Errors
    /// The reason why the selection can't be read, to be appended to the path.
    pub(crate) fn select_file(
        &mut self,
        map: Option<&TensorMap>,
        owns: impl Fn(&str) -> bool,
        part: &Range<u64>,
        file_bytes: u64,
        alignment: u64,
    ) -> Result<Selected, String> {
        let bytes = part.end - part.start;
        if let Some(range) = &self.range {
            if range.end > bytes {
                return Err(format!("bytes {range:?} were requested, but it has {bytes} bytes"));
            }
            return Ok(Selected::of_range(part.start + range.start..part.start + range.end, file_bytes, alignment));
        }
        if let Some(Shard { rank, world_size, dim: None }) = self.shard {
            // The file is cut at block boundaries, so that no rank reads another rank's bytes.
            let cut = |rank: u32| match share_start(bytes, rank, world_size) {
                0 => part.start,
                at => (part.start + at).next_multiple_of(alignment).min(part.end),
            };
            return Ok(Selected::of_range(cut(rank)..cut(rank + 1), file_bytes, alignment));
        }
        let Some(map) = map else { return Err("it has no tensors to select".to_owned()) };
        let mut chosen = Vec::new();
        for (position, tensor) in map.iter().enumerate() {
            if owns(&tensor.name)
                && let Some(class) = self.match_tensor(&tensor.name)
            {
                let part = rank_slice(tensor, self.shard)?;
                if part.rows.bytes() == 0 && !tensor.file_range.is_empty() {
                    self.affected.add(&tensor.name);
                }
                chosen.push(ChosenTensor { position, class, part });
            }
        }
        chosen.sort_by_key(|chosen| chosen.class);
        let wanted_bytes = chosen.iter().map(|chosen| chosen.part.rows.bytes()).sum();
        let mut spans = Vec::new();
        for class in chosen.chunk_by(|a, b| a.class == b.class) {
            let rows = class.iter().flat_map(|chosen| chosen.part.rows.iter());
            coalesce(rows, file_bytes, alignment, class.first().map_or(0, |first| first.class), &mut spans);
        }
        Ok(Selected { spans, tensors: Some(Arc::new(ChosenTensors::new(chosen))), wanted_bytes })
    }

    /// Returns the index of the first pattern that matches this tensor, or 0 if there are no
    /// patterns. Records all patterns that match.
    fn match_tensor(&mut self, name: &str) -> Option<usize> {
        let Some(patterns) = &self.patterns else { return Some(0) };
        let mut first = None;
        for (index, (pattern, matched)) in patterns.iter().zip(&mut self.matched).enumerate() {
            if pattern.matches(name) {
                *matched = true;
                first = first.or(Some(index));
            }
        }
        first
    }

    /// Checks that every pattern has matched a tensor.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`] for the first pattern that has not.
    pub(crate) fn check_all_matched(&self) -> Result<()> {
        let patterns = self.patterns.iter().flatten().zip(&self.matched);
        let unmatched = patterns.filter(|(_, matched)| !**matched).map(|(pattern, _)| pattern.to_string()).next();
        unmatched.map_or(Ok(()), |unmatched| Err(Error::NoSuchTensor(unmatched)))
    }
}

/// Returns where `rank`'s share of `all` items starts.
fn share_start(all: u64, rank: u32, world_size: u32) -> u64 {
    let start = u128::from(all) * u128::from(rank) / u128::from(world_size.max(1));
    u64::try_from(start).expect("a share should start no later than the end of all items")
}

/// Returns a rank's share of a tensor. If the tensor lacks the dimension to cut along, every rank
/// gets the whole tensor.
///
/// # Errors
/// The reason, if the cut would split a block of a quantized type.
fn rank_slice(tensor: &TensorInfo, shard: Option<Shard>) -> Result<TensorSlice, String> {
    let TensorInfo { name, dtype, shape, file_range } = tensor;
    let whole = || TensorSlice { shape: shape.clone(), rows: Rows::single(file_range.clone()) };
    let Some(Shard { rank, world_size, dim: Some(dim) }) = shard else { return Ok(whole()) };
    let Some(&len) = shape.get(dim) else { return Ok(whole()) };
    let len = len as u64;
    let (start, end) = (share_start(len, rank, world_size), share_start(len, rank + 1, world_size));
    let mut own = shape.clone();
    own[dim] = to_usize(end - start);
    if file_range.is_empty() {
        // Don't multiply the other dimensions: their product may overflow.
        return Ok(TensorSlice { shape: own, rows: Rows::single(file_range.clone()) });
    }
    let product = |dims: &[usize]| dims.iter().map(|&dim| dim as u64).product::<u64>();
    let (outer, inner) = (product(&shape[..dim]), product(&shape[dim + 1..]));
    // The parsers refuse tensors whose number of elements or size overflows 64 bits, so neither
    // these products nor the sizes of parts overflow.
    let place = (dtype.bytes_of(start * inner), dtype.bytes_of(end * inner), dtype.bytes_of(len * inner));
    let (Some(from), Some(to), Some(stride_bytes)) = place else {
        return Err(format!(
            "tensor {name:?} can't be cut along dimension {dim}: the part {start}..{end} would split a block of {dtype}"
        ));
    };
    let first = file_range.start + from..file_range.start + to;
    let rows = if outer == 1 || from == to {
        Rows::single(first)
    } else if to - from == stride_bytes {
        Rows::single(file_range.clone())
    } else {
        Rows { first, stride_bytes, count: outer }
    };
    Ok(TensorSlice { shape: own, rows })
}

/// Extends sorted ranges to whole blocks, merges those that are close to each other, and appends
/// them to `into` as spans of this class. Skips empty ranges.
fn coalesce(ranges: impl Iterator<Item = Range<u64>>, file_bytes: u64, alignment: u64, class: usize, into: &mut Vec<Span>) {
    let first = into.len();
    for range in ranges.filter(|range| !range.is_empty()) {
        let (start, end) = (range.start / alignment * alignment, range.end.next_multiple_of(alignment).min(file_bytes));
        match into.get_mut(first..).and_then(<[_]>::last_mut) {
            // The ranges are sorted, and the parsers refuse tensors that overlap, so no range
            // begins before the last one ends; only their blocks may overlap.
            Some(last) if start <= last.range.end.saturating_add(GAP_BYTES) => last.range.end = last.range.end.max(end),
            _ => into.push(Span { file: 0, range: start..end, class, moved: None, single: false }),
        }
    }
}

/// Makes the spans for [`crate::Layout::Tensors`].
///
/// Each span holds whole tensors and is no longer than `most_bytes`, unless it holds only one
/// tensor. Such a longer span is a single segment if it is no longer than `single_bytes`.
///
/// Each tensor begins at a multiple of the importer's alignment, counted from the beginning of its
/// memory. Spans begin at multiples of `alignment` in the file, which has two consequences. If the
/// importer's alignment is larger than `alignment`, each tensor gets its own span. If a tensor's
/// offset in the file is not a multiple of the smaller of the two alignments, the tensor gets its
/// own span and is moved to the beginning of the span's memory.
///
/// # Errors
/// [`Error::Unaligned`] if a tensor has to be moved, but the importer does not allow copies or the
/// tensor, extended to whole blocks, is longer than `single_bytes`.
pub(crate) fn tensor_spans(
    selected: &Selected,
    map: &TensorMap,
    file_bytes: u64,
    alignment: u64,
    most_bytes: u64,
    single_bytes: u64,
    importer: ImporterLimits,
) -> Result<Vec<Span>> {
    let wanted = importer.alignment_bytes;
    // Spans begin at multiples of `alignment`, so a tensor's alignment in memory is at least the
    // smaller of `alignment` and its alignment in the file.
    let kept = wanted.min(alignment);
    let mut spans: Vec<Span> = Vec::new();
    let mut add = |info: &TensorInfo, range: Range<u64>, class: usize| {
        if range.is_empty() {
            return Ok(());
        }
        let (start, end) = (range.start / alignment * alignment, range.end.next_multiple_of(alignment).min(file_bytes));
        let is_moved = !range.start.is_multiple_of(kept);
        if is_moved && (!importer.may_copy || end - start > single_bytes) {
            let why = if importer.may_copy {
                "it is larger than a segment can be, so it can't be copied"
            } else {
                "copying is not allowed"
            };
            let (tensor, offset) = (info.name.clone(), range.start);
            return Err(Error::Unaligned { tensor, offset, alignment_bytes: wanted, why });
        }
        let joins = |last: &&mut Span| {
            last.class == class && last.moved.is_none() && last.range.start <= start && !is_moved && wanted <= alignment
        };
        match spans.last_mut().filter(joins) {
            Some(last) if start <= last.range.end.saturating_add(GAP_BYTES) && end - last.range.start <= most_bytes => {
                last.range.end = last.range.end.max(end);
            }
            _ => spans.push(Span {
                file: 0,
                range: start..end,
                class,
                moved: is_moved.then_some(range),
                single: end - start > most_bytes && end - start <= single_bytes,
            }),
        }
        Ok(())
    };
    match &selected.tensors {
        Some(chosen) => chosen.list().iter().try_for_each(|chosen| match map.get_index(chosen.position) {
            Some(info) => add(info, chosen.part.rows.hull(), chosen.class),
            None => Ok(()),
        })?,
        None => map.iter().try_for_each(|tensor| add(tensor, tensor.file_range.clone(), 0))?,
    }
    Ok(spans)
}

#[cfg(test)]
mod tests;
