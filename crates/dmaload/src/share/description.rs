//! Describes an image to another process: its files, its tensors, and the allocation and offset of
//! each segment.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use dmabuf::PageCount;
use serde_json::{Value, json};

use crate::load::image::{Image, Tensor};
use crate::model::{DType, TensorInfo, TensorMap};
use crate::plan::select::{ChosenTensor, ChosenTensors, Rows, TensorSlice};
use crate::plan::tensors::FileTensors;

/// A parsed description of an image. It is internally consistent, but it comes from another
/// process: the caller must compare it with the sizes of the allocations.
#[derive(Debug)]
pub(super) struct Description {
    pub(super) process: u32,
    pub(super) route: String,
    /// The page sizes that the loader found. A process that maps the memory sees smaller pages
    /// until it has touched all of it.
    pub(super) pages: PageCount,
    pub(super) dma_bufs: bool,
    pub(super) files: Vec<DescribedFile>,
    pub(super) segments: Vec<SegmentPlace>,
    /// The number of allocations.
    pub(super) memories: usize,
}

#[derive(Debug)]
pub(super) struct DescribedFile {
    pub(super) path: Arc<PathBuf>,
    pub(super) bytes: u64,
    pub(super) part: Range<u64>,
    pub(super) tensors: Option<Arc<FileTensors>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SegmentPlace {
    pub(super) file: usize,
    pub(super) span: usize,
    pub(super) memory: usize,
    pub(super) memory_offset: u64,
    pub(super) memory_bytes: u64,
    pub(super) file_range: Range<u64>,
}

/// Describes an image as JSON.
pub(super) fn describe(image: &Image, dma_bufs: bool) -> String {
    let files = image.files().iter().map(|file| {
        let tensors = file.tensor_map().map(|_| {
            let tensor = |tensor: Tensor| {
                let (info, rows) = (tensor.info(), tensor.rows());
                json!({
                    "name": tensor.name(), "dtype": tensor.dtype().name(),
                    "of": [info.shape, info.file_range.start, info.file_range.end],
                    "shape": tensor.shape(),
                    "rows": [rows.first.start, rows.first.end, rows.stride_bytes, rows.count],
                })
            };
            file.tensors().map(tensor).collect::<Vec<_>>()
        });
        let part = file.file_range();
        json!({
            "path": file.path().to_string_lossy(), "bytes": file.file_bytes(), "part": [part.start, part.end],
            "format": file.tensor_map().map(TensorMap::format), "tensors": tensors,
        })
    });
    let mut memory = 0;
    let mut segments = Vec::new();
    for (index, segment) in image.segments().iter().enumerate() {
        let before = index.checked_sub(1).and_then(|before| image.segments().get(before));
        memory += usize::from(before.is_some_and(|before| !segment.shares_memory_with(before)));
        let range = segment.file_range();
        let (offset, bytes) = (segment.memory_offset(), segment.memory_bytes());
        segments.push(json!([segment.file_index(), segment.span(), memory, offset, bytes, range.start, range.end]));
    }
    let memories = if segments.is_empty() { 0 } else { memory + 1 };
    json!({
        "process": std::process::id(), "route": image.report().route.name(), "dma_bufs": dma_bufs,
        "seen_bytes": image.report().pages.seen_bytes, "huge_bytes": image.report().pages.huge_bytes,
        "memories": memories, "files": files.collect::<Vec<_>>(), "segments": segments,
    })
    .to_string()
}

impl Description {
    /// Parses a description from another process.
    ///
    /// # Errors
    /// A message that says what is wrong with the description.
    pub(super) fn parse(json: &[u8]) -> Result<Self, String> {
        let value: Value =
            serde_json::from_slice(json).map_err(|error| format!("the image's description is not JSON: {error}"))?;
        let wrong = |what: &str| format!("invalid description: {what}");
        let malformed = |key: &str| wrong(&format!("{key:?} is missing or malformed"));
        let number = |key: &str| value.get(key).and_then(Value::as_u64).ok_or_else(|| malformed(key));
        let array = |key: &str| value.get(key).and_then(Value::as_array).ok_or_else(|| malformed(key));
        let files = array("files")?.iter().map(parse_file).collect::<Option<Vec<_>>>().ok_or_else(|| malformed("files"))?;
        let memories = usize::try_from(number("memories")?).map_err(|_| malformed("memories"))?;
        let mut segments: Vec<SegmentPlace> = Vec::new();
        for value in array("segments")? {
            let place = parse_segment(value).ok_or_else(|| malformed("segments"))?;
            let before = segments.last().map_or(0, |before| before.memory + 1);
            let in_order = place.memory == before || segments.last().is_some_and(|before| before.memory == place.memory);
            let bytes = files.get(place.file).map_or(0, |file: &DescribedFile| file.bytes);
            let fits = place.file_range.end <= bytes && place.file_range.end - place.file_range.start <= place.memory_bytes;
            if !in_order || !fits || segments.last().is_some_and(|before| !can_follow(before, &place)) {
                return Err(wrong("a segment is misplaced"));
            }
            segments.push(place);
        }
        if segments.last().map_or(0, |last| last.memory + 1) != memories {
            return Err(wrong("the number of allocations is wrong"));
        }
        Ok(Description {
            process: u32::try_from(number("process")?).map_err(|_| malformed("process"))?,
            pages: {
                // Only displayed, so a missing number is harmless.
                let number_or_zero = |name: &str| value.get(name).and_then(Value::as_u64).unwrap_or(0);
                let seen_bytes = number_or_zero("seen_bytes");
                PageCount { seen_bytes, huge_bytes: number_or_zero("huge_bytes").min(seen_bytes) }
            },
            route: value.get("route").and_then(Value::as_str).ok_or_else(|| malformed("route"))?.to_owned(),
            dma_bufs: value.get("dma_bufs").and_then(Value::as_bool).ok_or_else(|| malformed("dma_bufs"))?,
            files,
            segments,
            memories,
        })
    }
}

/// Whether segment `after` can follow `before`. In the same span, it must continue the range of
/// the file, at the start of another allocation. In a later span, it can share the allocation,
/// past the end of `before`.
fn can_follow(before: &SegmentPlace, after: &SegmentPlace) -> bool {
    let end = before.memory_offset.checked_add(before.memory_bytes);
    let continues = before.span == after.span;
    let in_file = before.file == after.file && before.file_range.end == after.file_range.start;
    let in_memory = before.memory != after.memory || end.is_some_and(|end| end <= after.memory_offset) && !continues;
    let at_start = before.memory == after.memory || !continues || after.memory_offset == 0;
    (!continues || in_file) && in_memory && at_start && (continues || after.span > before.span)
}

fn parse_numbers(value: &Value) -> Option<Vec<u64>> {
    value.as_array()?.iter().map(Value::as_u64).collect()
}

fn parse_dimensions(value: &Value) -> Option<Vec<usize>> {
    value.as_array()?.iter().map(|dim| usize::try_from(dim.as_u64()?).ok()).collect()
}

fn parse_segment(value: &Value) -> Option<SegmentPlace> {
    let [file, span, memory, memory_offset, memory_bytes, start, end] = *parse_numbers(value)? else { return None };
    let index = |number: u64| usize::try_from(number).ok();
    let page = dmabuf::page_bytes() as u64;
    let aligned = memory_offset.is_multiple_of(page) && memory_bytes.is_multiple_of(page);
    (aligned && start < end && memory_offset.checked_add(memory_bytes).is_some()).then_some(SegmentPlace {
        file: index(file)?,
        span: index(span)?,
        memory: index(memory)?,
        memory_offset,
        memory_bytes,
        file_range: start..end,
    })
}

fn parse_file(value: &Value) -> Option<DescribedFile> {
    let (path, bytes) = (value.get("path")?.as_str()?, value.get("bytes")?.as_u64()?);
    let tensors = match value.get("tensors")? {
        Value::Null => None,
        tensors => Some(Arc::new(parse_tensors(tensors.as_array()?, bytes, parse_is_gguf(value)?)?)),
    };
    let [start, end] = *parse_numbers(value.get("part")?)? else { return None };
    (start <= end && end <= bytes).then_some(DescribedFile { path: Arc::new(path.into()), bytes, part: start..end, tensors })
}

fn parse_is_gguf(file: &Value) -> Option<bool> {
    match file.get("format") {
        // Earlier servers of this version of the protocol do not send the format.
        None => Some(false),
        Some(format) => match format.as_str()? {
            "gguf" => Some(true),
            "safetensors" => Some(false),
            _ => None,
        },
    }
}

fn parse_tensors(values: &[Value], file_bytes: u64, is_gguf: bool) -> Option<FileTensors> {
    let read = values.iter().map(|value| parse_tensor(value, file_bytes)).collect::<Option<Vec<_>>>()?;
    let infos = read.iter().map(|(info, _)| info.clone()).collect();
    let map = TensorMap::from_tensors(infos, is_gguf).ok()?;
    // Keep the order in which the tensors were received. It can differ from that of the map.
    let list = read.into_iter().enumerate().map(|(class, (info, part))| {
        let position = map.get_index_of(&info.name)?;
        Some(ChosenTensor { position, class, part })
    });
    let chosen = ChosenTensors::new(list.collect::<Option<_>>()?);
    Some(FileTensors { map: Arc::new(map), chosen: Some(Arc::new(chosen)) })
}

fn parse_tensor(value: &Value, file_bytes: u64) -> Option<(TensorInfo, TensorSlice)> {
    let name = value.get("name")?.as_str()?.to_owned();
    let dtype: DType = value.get("dtype")?.as_str()?.parse().ok()?;
    let [whole, start, end] = value.get("of")?.as_array()?.as_slice() else { return None };
    let (whole, start, end) = (parse_dimensions(whole)?, start.as_u64()?, end.as_u64()?);
    let shape = parse_dimensions(value.get("shape")?)?;
    let [first, first_end, stride_bytes, count] = *parse_numbers(value.get("rows")?)? else { return None };
    let bytes_of = |shape: &[usize]| {
        let elements = shape.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim as u64))?;
        dtype.bytes_of(elements)
    };
    let is_whole = start <= end && end <= file_bytes && bytes_of(&whole)? == end - start;
    // The last row ends within the tensor, and rows don't overlap.
    let row = first_end.checked_sub(first)?;
    let last_end = count.saturating_sub(1).checked_mul(stride_bytes)?.checked_add(first_end)?;
    let is_part = start <= first
        && last_end <= end
        && (count <= 1 || row > 0 && stride_bytes >= row)
        && row.checked_mul(count)? == bytes_of(&shape)?;
    let rows = Rows { first: first..first_end, stride_bytes, count };
    let info = TensorInfo { name, dtype, shape: whole, file_range: start..end };
    (is_whole && is_part && count > 0).then_some((info, TensorSlice { shape, rows }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe_segments(segments: &str) -> String {
        format!(
            r#"{{"process":1,"route":"buffered","dma_bufs":false,"memories":2,"segments":{segments},
            "files":[{{"path":"a","bytes":12000,"part":[0,12000],"tensors":[{{"name":"t","dtype":"BF16","of":[[2,4],8,24],"shape":[2,2],"rows":[8,12,8,2]}}]}}]}}"#
        )
    }

    const GOOD: &str = "[[0,0,0,0,8192,0,8192],[0,0,1,0,4096,8192,12000]]";

    #[test]
    fn valid_description_parses() {
        let description = Description::parse(describe_segments(GOOD).as_bytes()).unwrap();
        assert_eq!((description.memories, description.segments.len(), description.process), (2, 2, 1));
        let tensors = description.files[0].tensors.as_ref().unwrap();
        assert_eq!(tensors.part_at(0).unwrap().rows, Rows { first: 8..12, stride_bytes: 8, count: 2 });
    }

    #[test]
    fn inconsistent_description_is_refused() {
        for segments in [
            "[]",
            "[[0,0,0,0,8192,0,8193],[0,0,1,0,4096,8192,12000]]",
            "[[0,0,0,0,8192,0,8192],[0,0,1,0,4096,8192,12001]]",
            "[[0,0,0,0,8192,0,8192],[0,0,1,0,4096,8193,12000]]",
            "[[0,0,0,0,8192,0,8192],[0,0,2,0,4096,8192,12000]]",
            "[[0,0,1,0,8192,0,8192],[0,0,0,0,4096,8192,12000]]",
            "[[0,0,0,0,8192,0,8192],[0,0,1,4096,4096,8192,12000]]",
            "[[0,0,0,0,8192,0,8192],[0,1,0,4096,4096,8192,12000],[0,2,1,0,4096,0,1]]",
            "[[0,0,0,18446744073709547520,8192,0,8192],[0,0,1,0,4096,8192,12000]]",
            "[[1,0,0,0,8192,0,8192],[1,0,1,0,4096,8192,12000]]",
            "[[0,0,0,0,8191,0,8191],[0,0,1,0,4096,8191,12000]]",
            // Allocations that are skipped or repeated.
            "[[0,0,1,0,8192,0,8192]]",
            "[[0,0,0,0,4096,0,99],[0,1,1,0,4096,0,99],[0,2,0,4096,4096,0,99],[0,3,1,4096,4096,0,99]]",
            // File ranges that are longer than their memory, empty, or reversed.
            "[[0,0,0,0,4096,0,8192],[0,0,1,0,4096,8192,12000]]",
            "[[0,0,0,0,8192,0,8192],[0,0,1,0,4096,8192,8192]]",
            "[[0,0,0,0,8192,0,8192],[0,0,1,0,4096,8192,8000]]",
            // Spans out of order, and a span with two segments in one allocation.
            "[[0,1,0,0,8192,0,8192],[0,0,1,0,4096,8192,12000]]",
            "[[0,0,0,0,4096,0,4096],[0,0,0,4096,4096,4096,8192],[0,1,1,0,4096,0,99]]",
            // A segment that is not page-aligned.
            "[[0,0,0,100,8192,0,8192],[0,0,1,0,4096,8192,12000]]",
        ] {
            assert!(Description::parse(describe_segments(segments).as_bytes()).is_err(), "{segments}");
        }
        for (from, to) in [
            ("[8,12,8,2]", "[8,12,9223372036854775807,3]"),
            ("[8,12,8,2]", "[8,12,2,2]"),
            ("[8,12,8,2]", "[4,8,8,2]"),
            ("[8,12,8,2]", "[12,16,16,2]"),
            ("[8,12,8,2]", "[8,16,8,2]"),
            ("\"shape\":[2,2],\"rows\":[8,12,8,2]", "\"shape\":[0,2],\"rows\":[8,8,0,9223372036854775808]"),
            ("[2,4],8,24", "[2,4],8,25"),
            ("[2,4],8,24", "[2,4],11990,12006"),
            ("\"BF16\"", "\"BF17\""),
            ("\"bytes\":12000", "\"bytes\":-1"),
            ("\"memories\":2", "\"memories\":3"),
            ("\"part\":[0,12000]", "\"part\":[2,1]"),
            ("\"part\":[0,12000]", "\"part\":[0,12001]"),
            ("[2,4],8,24", "[2,4],24,8"),
            (
                "[[2,4],8,24],\"shape\":[2,2],\"rows\":[8,12,8,2]",
                "[[2,4],11990,12006],\"shape\":[2,2],\"rows\":[11990,11994,8,2]",
            ),
            ("\"shape\":[2,2],\"rows\":[8,12,8,2]", "\"shape\":[0,2],\"rows\":[8,8,0,0]"),
        ] {
            let text = describe_segments(GOOD).replace(from, to);
            assert!(text != describe_segments(GOOD) && Description::parse(text.as_bytes()).is_err(), "{to}");
        }
        // A span that continues in another file.
        let two_files = |segments: &str| {
            let other = r#""files":[{"path":"b","bytes":12000,"part":[0,12000],"tensors":null},"#;
            describe_segments(segments).replace("\"files\":[", other)
        };
        Description::parse(two_files(GOOD).as_bytes()).unwrap();
        let segments = "[[0,0,0,0,8192,0,8192],[1,0,1,0,4096,8192,12000]]";
        assert!(Description::parse(two_files(segments).as_bytes()).is_err());
    }
}
