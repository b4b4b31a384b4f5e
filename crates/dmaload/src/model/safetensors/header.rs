//! Parses the JSON in a safetensors header.
//!
//! `serde_json` does the tokenizing. The visitors here see each key as it is read, so a duplicate
//! cannot silently replace an earlier key. They check each tensor as soon as its entry ends. A
//! visitor that stops parsing calls [`Reader::refuse`] to store the fault, because a `serde` error
//! carries only text.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;

use super::values::{Number, Skipped, Text};
use crate::model::limits::RANK_LIMIT;
use crate::model::{
    dtype::DType,
    error::{ModelError, shorten},
    map::{SafetensorsMetadata, StringPairs, TensorInfo},
};

/// The only key in a header that does not name a tensor.
const METADATA_KEY: &str = "__metadata__";

/// The whitespace characters of JSON.
pub(super) const WHITESPACE: [char; 4] = [' ', '\t', '\n', '\r'];

/// The contents of a header. Each tensor has been checked on its own, but not against the others.
#[derive(Debug)]
pub(super) struct Contents {
    /// In header order.
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) metadata: SafetensorsMetadata,
}

/// Parses a header. The tensors' data is `data_bytes` long and begins at offset `data_begin` of
/// the file.
pub(super) fn read(json: &str, data_begin: u64, data_bytes: u64) -> Result<Contents, ModelError> {
    let unpadded = json.trim_end_matches(WHITESPACE);
    let mut reader = Reader::new(data_begin, data_bytes);
    let mut tokens = serde_json::Deserializer::from_str(unpadded);

    if let Err(error) = reader.deserialize(&mut tokens) {
        return Err(reader.explain(&error, unpadded));
    }
    if let Some((tensor, end, last)) = reader.past_end {
        return Err(ModelError::PastEnd { tensor, end, data_bytes, missing_bytes: last - data_bytes });
    }
    if let Err(error) = tokens.end() {
        let offset = offset(&error, unpadded).saturating_sub(1);
        let found = unpadded.as_bytes()[offset];
        return Err(ModelError::BytesAfterJson { offset, found });
    }

    let metadata = reader.metadata.flatten().map(SafetensorsMetadata::new).transpose();
    let metadata = metadata.map_err(|key| ModelError::DuplicateMetadataKey { key })?.unwrap_or_default();
    Ok(Contents { tensors: reader.tensors, metadata })
}

/// The visitor for a header's outermost object. It also holds the parser's state.
struct Reader {
    data_begin: u64,
    data_bytes: u64,
    tensors: Vec<TensorInfo>,
    /// `Some` once `__metadata__` has been read, and `Some(None)` if its value was null.
    metadata: Option<Option<StringPairs>>,
    /// The numbers in the list that is being read. This buffer is reused for all lists, so each
    /// shape is allocated only once, at its final size.
    numbers: Vec<u64>,
    /// The part of the header that an error would refer to.
    place: ValuePlace,
    fault: Option<ModelError>,
    /// The name and the end of the first tensor that extends past the end of the file, and the
    /// highest end of any such tensor. Parsing continues after such a tensor, so that the error
    /// can say how many bytes are missing.
    past_end: Option<(String, u64, u64)>,
}

/// The part of the header that a `serde_json` error refers to.
enum ValuePlace {
    Header,
    Tensor { tensor: String, key: Option<&'static str> },
    Metadata,
    MetadataValue { key: String },
}

impl Reader {
    fn new(data_begin: u64, data_bytes: u64) -> Self {
        Self {
            data_begin,
            data_bytes,
            tensors: Vec::new(),
            metadata: None,
            numbers: Vec::new(),
            place: ValuePlace::Header,
            fault: None,
            past_end: None,
        }
    }

    fn deserialize<'de, D: Deserializer<'de>>(&mut self, json: D) -> Result<(), D::Error> {
        json.deserialize_map(self)
    }

    /// Stores a fault that `serde` cannot express, and returns an error that stops parsing.
    fn refuse<E: Error>(&mut self, fault: ModelError) -> E {
        self.fault = Some(fault);
        E::custom("refused")
    }

    /// Returns the [`ModelError`] that explains why parsing stopped with `error`.
    fn explain(self, error: &serde_json::Error, json: &str) -> ModelError {
        if let Some(fault) = self.fault {
            return fault;
        }
        let (offset, reason) = (offset(error, json), reason(error));
        match (error.classify(), self.place) {
            (Category::Data, ValuePlace::Tensor { tensor, key }) => ModelError::WrongType { tensor, key, offset, reason },
            (Category::Data, ValuePlace::Metadata) => ModelError::MetadataNotObject { offset, reason },
            (Category::Data, ValuePlace::MetadataValue { key }) => ModelError::MetadataNotString { key, offset, reason },
            _ => ModelError::NotJson { offset, reason },
        }
    }

    fn read_metadata<'de, A: MapAccess<'de>>(&mut self, header: &mut A) -> Result<(), A::Error> {
        if self.metadata.is_some() {
            return Err(self.refuse(ModelError::DuplicateMetadata));
        }
        self.place = ValuePlace::Metadata;
        let pairs = header.next_value_seed(MetadataSeed { place: &mut self.place })?;
        self.place = ValuePlace::Header;
        self.metadata = Some(pairs);
        Ok(())
    }

    fn read_tensor<'de, A: MapAccess<'de>>(&mut self, name: String, header: &mut A) -> Result<(), A::Error> {
        let mut key = None;
        let seed = EntrySeed { reader: self, tensor: &name, key: &mut key };
        let entry = match header.next_value_seed(seed) {
            Ok(entry) => entry,
            Err(error) => {
                self.place = ValuePlace::Tensor { tensor: name, key };
                return Err(error);
            }
        };
        match entry.place(name, self.data_begin, self.data_bytes) {
            Ok(tensor) => self.tensors.push(tensor),
            Err(ModelError::PastEnd { tensor, end, .. }) => {
                let (_, _, last) = self.past_end.get_or_insert((tensor, end, end));
                *last = end.max(*last);
            }
            Err(fault) => return Err(self.refuse(fault)),
        }
        Ok(())
    }
}

impl<'de> Visitor<'de> for &mut Reader {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut header: A) -> Result<(), A::Error> {
        while let Some(key) = header.next_key::<String>()? {
            if key == METADATA_KEY {
                self.read_metadata(&mut header)?;
            } else {
                self.read_tensor(key, &mut header)?;
            }
        }
        Ok(())
    }
}

/// Returns how many bytes of `json` had been read when `error` occurred.
fn offset(error: &serde_json::Error, json: &str) -> usize {
    let lines_before = json.split_inclusive('\n').take(error.line().saturating_sub(1));
    let read = lines_before.map(str::len).sum::<usize>() + error.column();
    read.min(json.len())
}

/// Returns the text of `error` without its line and column, which don't help in a header that is
/// one long line.
fn reason(error: &serde_json::Error) -> String {
    let mut text = error.to_string();
    if let Some(at) = text.rfind(" at line ") {
        text.truncate(at);
    }
    shorten(text)
}

/// Reads `__metadata__`: an object whose values are strings, or null if there is no metadata.
struct MetadataSeed<'a> {
    place: &'a mut ValuePlace,
}

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = Option<StringPairs>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Option<StringPairs>, D::Error> {
        json.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = Option<StringPairs>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_none<E: Error>(self) -> Result<Option<StringPairs>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, json: D) -> Result<Option<StringPairs>, D::Error> {
        json.deserialize_map(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<StringPairs>, A::Error> {
        let mut pairs = StringPairs::default();
        while map.next_key_seed(PushString(&mut pairs))?.is_some() {
            if let Err(error) = map.next_value_seed(PushString(&mut pairs)) {
                *self.place = ValuePlace::MetadataValue { key: pairs.last().to_owned() };
                return Err(error);
            }
        }
        Ok(Some(pairs))
    }
}

/// Appends a string to the pairs as it is read, without a temporary `String`.
struct PushString<'a>(&'a mut StringPairs);

impl<'de> DeserializeSeed<'de> for PushString<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for PushString<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: Error>(self, string: &str) -> Result<(), E> {
        self.0.push(string);
        Ok(())
    }
}

/// A tensor's complete entry in the header.
struct TensorEntry {
    dtype: DType,
    shape: Vec<usize>,
    begin: u64,
    end: u64,
}

impl TensorEntry {
    /// Computes the tensor's range in the file, after checking that the range is within the data
    /// and has the length that type and shape require.
    fn place(self, name: String, data_begin: u64, data_bytes: u64) -> Result<TensorInfo, ModelError> {
        let Self { begin, end, .. } = self;
        if begin > end {
            return Err(ModelError::OffsetsReversed { tensor: name, begin, end });
        }
        if end > data_bytes {
            return Err(ModelError::PastEnd { tensor: name, end, data_bytes, missing_bytes: end - data_bytes });
        }
        let Self { dtype, shape, .. } = self;
        let Some(bits) = bits(dtype, &shape) else {
            return Err(ModelError::ShapeOverflow { tensor: name, dtype, shape });
        };
        if !bits.is_multiple_of(8) {
            return Err(ModelError::PartialByte { tensor: name, dtype, shape, bits });
        }
        let (expected, found) = (bits / 8, end - begin);
        if expected != found {
            return Err(ModelError::WrongLength { tensor: name, dtype, shape, expected, found });
        }
        let file_range = data_begin + begin..data_begin + end;
        Ok(TensorInfo { name, dtype, shape, file_range })
    }
}

/// Returns the size of a tensor in bits, or `None` if it overflows 64 bits. As in the
/// `safetensors` crate, it also overflows if the product of the dimensions before a zero does.
fn bits(dtype: DType, shape: &[usize]) -> Option<u64> {
    let elements = shape.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim as u64))?;
    let element_bits = dtype.element_bits().expect("a dtype from a safetensors header should not be quantized");
    elements.checked_mul(element_bits as u64)
}

/// Reads a tensor's entry.
struct EntrySeed<'a> {
    reader: &'a mut Reader,
    tensor: &'a str,
    /// The key whose value is being read, for the caller's error message.
    key: &'a mut Option<&'static str>,
}

/// The values of an entry that have been read so far.
#[derive(Default)]
struct Draft {
    dtype: Option<DType>,
    shape: Option<Vec<usize>>,
    offsets: Option<(u64, u64)>,
}

impl EntrySeed<'_> {
    fn read_value<'de, A: MapAccess<'de>>(&mut self, key: EntryKey, entry: &mut A, draft: &mut Draft) -> Result<(), A::Error> {
        if draft.has(key) {
            return Err(self.refuse(|tensor| ModelError::DuplicateKey { tensor, key: key.name() }));
        }
        *self.key = Some(key.name());
        match key {
            EntryKey::DType => draft.dtype = Some(self.read_dtype(entry)?),
            EntryKey::Shape => {
                self.read_numbers(key, entry)?;
                draft.shape = Some(self.shape()?);
            }
            EntryKey::DataOffsets => {
                self.read_numbers(key, entry)?;
                draft.offsets = Some(self.begin_and_end()?);
            }
        }
        *self.key = None;
        Ok(())
    }

    fn read_dtype<'de, A: MapAccess<'de>>(&mut self, entry: &mut A) -> Result<DType, A::Error> {
        let name = entry.next_value_seed(Text("the name of a dtype"))?;
        DType::from_safetensors_name(&name)
            .ok_or_else(|| self.refuse(|tensor| ModelError::UnknownDType { tensor, found: name.into_owned() }))
    }

    fn read_numbers<'de, A: MapAccess<'de>>(&mut self, key: EntryKey, entry: &mut A) -> Result<(), A::Error> {
        entry.next_value_seed(NumbersSeed { reader: self.reader, tensor: self.tensor, key })
    }

    /// Converts the numbers to dimensions. A number that does not fit into `usize` (on 32-bit
    /// machines) is refused, because truncating it would change the shape.
    fn shape<E: Error>(&mut self) -> Result<Vec<usize>, E> {
        let mut shape = Vec::with_capacity(self.reader.numbers.len());
        for &dim in &self.reader.numbers {
            let Ok(dim) = usize::try_from(dim) else {
                let (key, found) = (EntryKey::Shape.name(), dim.to_string());
                return Err(self.refuse(|tensor| ModelError::BadNumber { tensor, key, found }));
            };
            shape.push(dim);
        }
        Ok(shape)
    }

    fn begin_and_end<E: Error>(&mut self) -> Result<(u64, u64), E> {
        match self.reader.numbers[..] {
            [begin, end] => Ok((begin, end)),
            ref numbers => {
                let found = numbers.len();
                Err(self.refuse(|tensor| ModelError::OffsetCount { tensor, found }))
            }
        }
    }

    fn refuse<E: Error>(&mut self, fault: impl FnOnce(String) -> ModelError) -> E {
        self.reader.refuse(fault(self.tensor.to_owned()))
    }
}

impl Draft {
    fn has(&self, key: EntryKey) -> bool {
        match key {
            EntryKey::DType => self.dtype.is_some(),
            EntryKey::Shape => self.shape.is_some(),
            EntryKey::DataOffsets => self.offsets.is_some(),
        }
    }

    /// Returns the complete entry, or the first key that is missing.
    fn finish(self) -> Result<TensorEntry, EntryKey> {
        let dtype = self.dtype.ok_or(EntryKey::DType)?;
        let shape = self.shape.ok_or(EntryKey::Shape)?;
        let (begin, end) = self.offsets.ok_or(EntryKey::DataOffsets)?;
        Ok(TensorEntry { dtype, shape, begin, end })
    }
}

impl<'de> DeserializeSeed<'de> for EntrySeed<'_> {
    type Value = TensorEntry;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<TensorEntry, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_> {
    type Value = TensorEntry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with \"dtype\", \"shape\" and \"data_offsets\"")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entry: A) -> Result<TensorEntry, A::Error> {
        let mut draft = Draft::default();
        while let Some(name) = entry.next_key_seed(Text("a key"))? {
            let Some(key) = EntryKey::parse(&name) else {
                entry.next_value::<Skipped>()?;
                continue;
            };
            self.read_value(key, &mut entry, &mut draft)?;
        }
        draft.finish().map_err(|key| self.refuse(|tensor| ModelError::MissingKey { tensor, key: key.name() }))
    }
}

/// The keys that a tensor's entry must have.
#[derive(Clone, Copy)]
enum EntryKey {
    DType,
    Shape,
    DataOffsets,
}

impl EntryKey {
    fn parse(name: &str) -> Option<Self> {
        [Self::DType, Self::Shape, Self::DataOffsets].into_iter().find(|key| key.name() == name)
    }

    const fn name(self) -> &'static str {
        match self {
            Self::DType => "dtype",
            Self::Shape => "shape",
            Self::DataOffsets => "data_offsets",
        }
    }
}

/// Reads a list of numbers into [`Reader::numbers`].
struct NumbersSeed<'a> {
    reader: &'a mut Reader,
    tensor: &'a str,
    key: EntryKey,
}

impl NumbersSeed<'_> {
    /// Appends a number, unless it is invalid or the list would be too long.
    fn push_number<E: Error>(&mut self, number: Number) -> Result<(), E> {
        let tensor = || self.tensor.to_owned();
        let numbers = &mut self.reader.numbers;
        let fault = match (number, self.key) {
            (Number::Other(found), key) => ModelError::BadNumber { tensor: tensor(), key: key.name(), found },
            (_, EntryKey::Shape) if numbers.len() == RANK_LIMIT => ModelError::RankTooLarge { tensor: tensor() },
            (_, EntryKey::DataOffsets) if numbers.len() == 2 => ModelError::OffsetCount { tensor: tensor(), found: 3 },
            (Number::Count(count), _) => {
                numbers.push(count);
                return Ok(());
            }
        };
        Err(self.reader.refuse(fault))
    }
}

impl<'de> DeserializeSeed<'de> for NumbersSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for NumbersSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of integers")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<(), A::Error> {
        self.reader.numbers.clear();
        while let Some(number) = list.next_element()? {
            self.push_number(number)?;
        }
        Ok(())
    }
}
