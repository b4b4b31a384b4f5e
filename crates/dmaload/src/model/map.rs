//! The tensors of a file, in file order and by name.

use std::{fmt, ops::Range, slice};

use super::dtype::DType;
use super::gguf::GgufMetadata;
use super::names::NameIndex;

/// One tensor: its name, type and shape, and where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name, unique in its file. May be empty.
    pub name: String,
    /// The type of the elements.
    pub dtype: DType,
    /// The dimensions in row-major order: `[]` is a scalar, and a zero makes the tensor empty.
    pub shape: Vec<usize>,
    /// The absolute byte range of the tensor in the file. Its length is exactly what `dtype` and
    /// `shape` require.
    pub file_range: Range<u64>,
}

/// The tensors of one file, with its metadata.
///
/// Tensors are in file order: by start, then by end, then (for empty ones) by name. Lookup by name
/// is a binary search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorMap {
    tensors: Vec<TensorInfo>,
    by_name: NameIndex,
    metadata: SafetensorsMetadata,
    is_gguf: bool,
    gguf: Option<Box<GgufMetadata>>,
    header_bytes: u64,
}

impl TensorMap {
    /// Sorts tensors into file order. If two tensors have the same name, the error is that name.
    pub(super) fn new(mut tensors: Vec<TensorInfo>, metadata: SafetensorsMetadata, header_bytes: u64) -> Result<Self, String> {
        // An unstable sort makes no second copy of the list, which a hostile file can make very
        // long. The name makes the order total, so the result is deterministic.
        tensors.sort_unstable_by(|a, b| file_order(a).cmp(&file_order(b)));
        tensors.shrink_to_fit();
        let by_name = NameIndex::new(tensors.len(), |i| &tensors[i].name).map_err(|duplicate| tensors[duplicate].name.clone())?;
        Ok(Self { tensors, by_name, metadata, is_gguf: false, gguf: None, header_bytes })
    }

    /// Creates a map of tensors received from another process rather than read from a file's
    /// header. If two tensors have the same name, the error is that name.
    pub(crate) fn from_tensors(tensors: Vec<TensorInfo>, is_gguf: bool) -> Result<Self, String> {
        Ok(Self { is_gguf, ..Self::new(tensors, SafetensorsMetadata::default(), 0)? })
    }

    /// Shifts all ranges by `by`, the model's offset in its file. Returns `None` if a range
    /// overflows 64 bits.
    pub(crate) fn shifted(mut self, by: u64) -> Option<Self> {
        for TensorInfo { file_range, .. } in &mut self.tensors {
            *file_range = file_range.start.checked_add(by)?..file_range.end.checked_add(by)?;
        }
        Some(self)
    }

    /// Keeps only the tensors whose names `keeps` accepts.
    pub(crate) fn retain(mut self, keeps: impl Fn(&str) -> bool) -> Self {
        if !self.tensors.iter().all(|tensor| keeps(&tensor.name)) {
            self.tensors.retain(|tensor| keeps(&tensor.name));
            let by_name = NameIndex::new(self.tensors.len(), |i| &self.tensors[i].name);
            self.by_name = by_name.expect("a subset of unique names should be unique");
        }
        self
    }

    /// Adds the metadata of a GGUF file.
    pub(super) fn with_gguf(mut self, gguf: GgufMetadata) -> Self {
        self.is_gguf = true;
        self.gguf = Some(Box::new(gguf));
        self
    }

    /// Returns the tensor with this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.get_index(self.get_index_of(name)?)
    }

    /// Iterates over the tensors in file order.
    pub fn iter(&self) -> slice::Iter<'_, TensorInfo> {
        self.tensors.iter()
    }

    /// Returns the number of tensors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Returns whether there are no tensors. A file without tensors is valid.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Returns the tensor at this index in file order.
    #[must_use]
    pub fn get_index(&self, index: usize) -> Option<&TensorInfo> {
        self.tensors.get(index)
    }

    /// Returns the index in file order of the tensor with this name.
    #[must_use]
    pub fn get_index_of(&self, name: &str) -> Option<usize> {
        self.by_name.find(name, |i| &self.tensors[i].name)
    }

    /// Returns the metadata of a GGUF file. Returns `None` for a safetensors file, and for an
    /// image that another process shares ([`crate::share`]).
    #[must_use]
    pub fn gguf(&self) -> Option<&GgufMetadata> {
        self.gguf.as_deref()
    }

    /// Returns the name of the file's format: `gguf` or `safetensors`.
    #[must_use]
    pub fn format(&self) -> &'static str {
        if self.is_gguf { "gguf" } else { "safetensors" }
    }

    /// Returns the free-form metadata of a safetensors file. It is empty if the file has none, and
    /// for an image that another process shares ([`crate::share`]).
    #[must_use]
    pub fn metadata(&self) -> &SafetensorsMetadata {
        &self.metadata
    }

    /// Returns the length of the header in bytes.
    ///
    /// For safetensors, this is the length of the JSON with its padding, without the 8-byte length
    /// before it: data begins at `8 + header_bytes`. For GGUF, it is the length of everything
    /// before the data. It is 0 for an image that another process shares ([`crate::share`]).
    #[must_use]
    pub fn header_bytes(&self) -> u64 {
        self.header_bytes
    }
}

impl<'a> IntoIterator for &'a TensorMap {
    type Item = &'a TensorInfo;
    type IntoIter = slice::Iter<'a, TensorInfo>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

fn file_order(tensor: &TensorInfo) -> (u64, u64, &str) {
    (tensor.file_range.start, tensor.file_range.end, &tensor.name)
}

/// The free-form strings of a file's `__metadata__`, in header order.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SafetensorsMetadata {
    is_present: bool,
    pairs: StringPairs,
    by_key: NameIndex,
}

impl SafetensorsMetadata {
    /// Indexes the pairs of a `__metadata__` object by key. If a key occurs twice, the error is
    /// that key.
    pub(super) fn new(mut pairs: StringPairs) -> Result<Self, String> {
        pairs.text.shrink_to_fit();
        pairs.ends.shrink_to_fit();
        let by_key = NameIndex::new(pairs.len(), |i| pairs.key(i)).map_err(|duplicate| pairs.key(duplicate).to_owned())?;
        Ok(Self { is_present: true, pairs, by_key })
    }

    /// Returns whether the header contains `__metadata__` and it is not null. It may be empty.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.is_present
    }

    /// Returns the value for a key, or `None` if the metadata does not contain the key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        let position = self.by_key.find(key, |i| self.pairs.key(i))?;
        Some(self.pairs.value(position))
    }

    /// Iterates over keys and values, in header order.
    #[must_use = "iterators do nothing until they are consumed"]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        (0..self.len()).map(|i| (self.pairs.key(i), self.pairs.value(i)))
    }

    /// Returns the number of pairs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Returns whether there are no pairs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for SafetensorsMetadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// Pairs of strings in one buffer. A hostile header can contain ten million pairs, and two
/// allocations for each pair would use many times the header's length.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct StringPairs {
    text: String,
    /// Where each string ends in `text`: keys have even indices, values odd ones.
    ends: Vec<u32>,
}

impl StringPairs {
    /// Appends the next string. Call it alternately with a key and its value.
    pub(super) fn push(&mut self, string: &str) {
        self.text.push_str(string);
        let end = u32::try_from(self.text.len()).expect("decoded strings should be no longer than their header");
        self.ends.push(end);
    }

    /// Returns the last string that was pushed, or an empty string if there is none.
    pub(super) fn last(&self) -> &str {
        self.ends.len().checked_sub(1).map_or("", |last| self.string(last))
    }

    fn len(&self) -> usize {
        self.ends.len() / 2
    }

    fn key(&self, position: usize) -> &str {
        self.string(2 * position)
    }

    fn value(&self, position: usize) -> &str {
        self.string(2 * position + 1)
    }

    fn string(&self, position: usize) -> &str {
        let begin = position.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[begin as usize..self.ends[position] as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, file_range: Range<u64>) -> TensorInfo {
        let shape = vec![usize::try_from(file_range.end - file_range.start).unwrap()];
        TensorInfo { name: name.into(), dtype: DType::U8, shape, file_range }
    }

    #[test]
    fn tensors_are_in_file_order_and_found_by_name() {
        let tensors = vec![tensor("b", 4..4), tensor("c", 4..8), tensor("z", 0..4), tensor("a", 4..4)];
        let map = TensorMap::new(tensors, SafetensorsMetadata::default(), 2).unwrap();
        let names: Vec<_> = map.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["z", "a", "b", "c"]);
        assert_eq!(map.get("c").unwrap().file_range, 4..8);
        assert!(map.iter().all(|t| map.get(&t.name) == Some(t)));
        assert_eq!(map.get("d"), None);
        assert_eq!((map.len(), map.is_empty()), (4, false));
        assert_eq!((&map).into_iter().count(), 4);
    }

    #[test]
    fn error_names_the_duplicate() {
        let tensors = vec![tensor("b", 4..5), tensor("a", 0..4), tensor("b", 5..6)];
        assert_eq!(TensorMap::new(tensors, SafetensorsMetadata::default(), 2), Err("b".into()));
    }

    #[test]
    fn metadata_keeps_the_order_of_the_header() {
        let mut pairs = StringPairs::default();
        assert_eq!(pairs.last(), "");
        for string in ["z", "1", "", "ä", "a", ""] {
            pairs.push(string);
            assert_eq!(pairs.last(), string);
        }
        let metadata = SafetensorsMetadata::new(pairs).unwrap();
        assert_eq!(metadata.iter().collect::<Vec<_>>(), [("z", "1"), ("", "ä"), ("a", "")]);
        assert_eq!(metadata.get(""), Some("ä"));
        assert_eq!(metadata.get("a"), Some(""));
        assert_eq!(metadata.get("1"), None);
        assert_eq!(format!("{metadata:?}"), r#"{"z": "1", "": "ä", "a": ""}"#);
    }
}
