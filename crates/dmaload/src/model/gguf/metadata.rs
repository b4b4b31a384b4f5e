//! The keys and values in a GGUF file. They stay encoded as in the file and are decoded on access,
//! so a hostile array occupies no more memory than its encoded form.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use super::cursor::{Cursor, Stop};
use crate::model::error::quote;
use crate::model::names::NameIndex;

/// The metadata of a GGUF file.
#[derive(Clone, PartialEq, Eq)]
pub struct GgufMetadata {
    version: u32,
    /// The part of the header that the ranges in `entries` refer to.
    bytes: Box<[u8]>,
    entries: Vec<KeyValue>,
    by_key: NameIndex,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct KeyValue {
    key: Range<u32>,
    kind: Kind,
    value: Range<u32>,
}

/// The type of a value: `gguf_metadata_value_type` in the specification, in the same order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    const ALL: [Kind; 13] = [
        Kind::U8,
        Kind::I8,
        Kind::U16,
        Kind::I16,
        Kind::U32,
        Kind::I32,
        Kind::F32,
        Kind::Bool,
        Kind::String,
        Kind::Array,
        Kind::U64,
        Kind::I64,
        Kind::F64,
    ];

    fn from_number(number: u32) -> Option<Kind> {
        Kind::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// Returns the size of a value in bytes, or `None` if it varies from value to value.
    fn bytes(self) -> Option<u64> {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => Some(1),
            Kind::U16 | Kind::I16 => Some(2),
            Kind::U32 | Kind::I32 | Kind::F32 => Some(4),
            Kind::U64 | Kind::I64 | Kind::F64 => Some(8),
            Kind::String | Kind::Array => None,
        }
    }
}

/// A decoded metadata value.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the names are self-explanatory")]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    /// A string, in which invalid UTF-8 is replaced with U+FFFD.
    String(Cow<'a, str>),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of values of one type.
#[derive(Clone, Copy, PartialEq)]
pub struct Array<'a> {
    kind: Kind,
    len: u64,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Returns the number of values.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether the array is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Iterates over the values, decoding each one.
    #[must_use = "iterators do nothing until they are consumed"]
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (kind, mut rest) = (self.kind, self.bytes);
        std::iter::from_fn(move || next_value(kind, &mut rest))
    }
}

impl fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:?}; {}]", self.kind, self.len)
    }
}

/// Formats the value. For an array of strings, of arrays, or of more than 8 values, only the
/// length and type are shown. Strings are not escaped.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: u64 = 8;
        match self {
            Value::U8(value) => write!(f, "{value}"),
            Value::I8(value) => write!(f, "{value}"),
            Value::U16(value) => write!(f, "{value}"),
            Value::I16(value) => write!(f, "{value}"),
            Value::U32(value) => write!(f, "{value}"),
            Value::I32(value) => write!(f, "{value}"),
            Value::F32(value) => write!(f, "{value}"),
            Value::Bool(value) => write!(f, "{value}"),
            Value::String(value) => f.write_str(value),
            Value::U64(value) => write!(f, "{value}"),
            Value::I64(value) => write!(f, "{value}"),
            Value::F64(value) => write!(f, "{value}"),
            Value::Array(array) if array.len <= SHOWN && array.kind.bytes().is_some() => {
                f.write_str("[")?;
                for (index, value) in array.iter().enumerate() {
                    write!(f, "{}{value}", if index == 0 { "" } else { ", " })?;
                }
                f.write_str("]")
            }
            Value::Array(array) => write!(f, "{} values of type {:?}", array.len, array.kind),
        }
    }
}

impl Value<'_> {
    /// Returns the value as an unsigned number if it is a non-negative integer. Accepts every
    /// integer type, because writers disagree on the types of counts.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(value) => Some(value.into()),
            Value::U16(value) => Some(value.into()),
            Value::U32(value) => Some(value.into()),
            Value::U64(value) => Some(value),
            Value::I8(value) => value.try_into().ok(),
            Value::I16(value) => value.try_into().ok(),
            Value::I32(value) => value.try_into().ok(),
            Value::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }
}

impl GgufMetadata {
    /// Returns the version of the format: 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Returns the value for a key, or `None` if the file does not contain the key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        let position = self.by_key.find(key, |i| self.key(i))?;
        self.value(self.entries.get(position)?)
    }

    /// Iterates over keys and values, in file order.
    #[must_use = "iterators do nothing until they are consumed"]
    pub fn iter(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.entries.iter().enumerate().filter_map(|(index, entry)| Some((self.key(index), self.value(entry)?)))
    }

    /// Returns the number of keys.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns whether the file has no keys.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn key(&self, index: usize) -> &str {
        let bytes = self.entries.get(index).and_then(|entry| self.part(&entry.key)).unwrap_or_default();
        str::from_utf8(bytes).unwrap_or_default()
    }

    fn value(&self, entry: &KeyValue) -> Option<Value<'_>> {
        next_value(entry.kind, &mut self.part(&entry.value)?)
    }

    fn part(&self, range: &Range<u32>) -> Option<&[u8]> {
        self.bytes.get(range.start as usize..range.end as usize)
    }
}

impl fmt::Debug for GgufMetadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// Decodes the value at the front of `bytes` and removes it. Returns `None` if no value is left.
fn next_value<'a>(kind: Kind, bytes: &mut &'a [u8]) -> Option<Value<'a>> {
    fn front<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
        let (front, rest) = bytes.split_first_chunk()?;
        *bytes = rest;
        Some(*front)
    }
    Some(match kind {
        Kind::U8 => Value::U8(u8::from_le_bytes(front(bytes)?)),
        Kind::I8 => Value::I8(i8::from_le_bytes(front(bytes)?)),
        Kind::U16 => Value::U16(u16::from_le_bytes(front(bytes)?)),
        Kind::I16 => Value::I16(i16::from_le_bytes(front(bytes)?)),
        Kind::U32 => Value::U32(u32::from_le_bytes(front(bytes)?)),
        Kind::I32 => Value::I32(i32::from_le_bytes(front(bytes)?)),
        Kind::F32 => Value::F32(f32::from_le_bytes(front(bytes)?)),
        Kind::Bool => Value::Bool(front::<1>(bytes)? != [0]),
        Kind::U64 => Value::U64(u64::from_le_bytes(front(bytes)?)),
        Kind::I64 => Value::I64(i64::from_le_bytes(front(bytes)?)),
        Kind::F64 => Value::F64(f64::from_le_bytes(front(bytes)?)),
        Kind::String => {
            let len = usize::try_from(u64::from_le_bytes(front(bytes)?)).ok()?;
            let (text, rest) = bytes.split_at_checked(len)?;
            *bytes = rest;
            Value::String(String::from_utf8_lossy(text))
        }
        Kind::Array => {
            let kind = Kind::from_number(u32::from_le_bytes(front(bytes)?))?;
            let len = u64::from_le_bytes(front(bytes)?);
            // The header has already been checked, so the cursor only has to find the array's end.
            let mut cursor = Cursor::new(bytes, bytes.len() as u64);
            skip_array(&mut cursor, kind, len, 0).ok()?;
            let (own, rest) = bytes.split_at_checked(usize::try_from(cursor.position()).ok()?)?;
            *bytes = rest;
            Value::Array(Array { kind, len, bytes: own })
        }
    })
}

/// Maximum number of arrays that may enclose an array. An array at that depth may contain anything
/// but arrays. ggml does not support nested arrays at all.
const DEPTH_LIMIT: u32 = 4;

/// Reads `pairs` key-value pairs.
pub(super) fn read(cursor: &mut Cursor<'_>, version: u32, pairs: u64) -> Result<GgufMetadata, Stop> {
    let begin = cursor.position();
    let mut entries = Vec::new();
    let mut text: Vec<&str> = Vec::new();
    for _ in 0..pairs {
        let at = cursor.position();
        let key = cursor.text("a key")?;
        let key_end = cursor.position() - begin;
        let number = cursor.u32("the type of a value")?;
        let Some(kind) = Kind::from_number(number) else {
            return Err(cursor.fault(at, format!("key {} has a value of unknown type {number}", quote(key))));
        };
        let value = cursor.position() - begin;
        skip(cursor, kind, 0)?;
        let narrow = |at: u64| u32::try_from(at).expect("a header should be shorter than 4 GiB");
        entries.push(KeyValue {
            key: narrow(key_end - key.len() as u64)..narrow(key_end),
            kind,
            value: narrow(value)..narrow(cursor.position() - begin),
        });
        text.push(key);
    }
    let end = cursor.position();
    let by_key = NameIndex::new(text.len(), |i| text.get(i).copied().unwrap_or_default());
    let by_key = by_key.map_err(|twice| {
        let key = text.get(twice).copied().unwrap_or_default();
        cursor.fault(begin, format!("duplicate key {}", quote(key)))
    })?;
    Ok(GgufMetadata { version, bytes: cursor.already_read(begin..end).into(), entries, by_key })
}

fn skip(cursor: &mut Cursor<'_>, kind: Kind, depth: u32) -> Result<(), Stop> {
    match (kind, kind.bytes()) {
        (_, Some(bytes)) => cursor.bytes(bytes, "a value").map(|_| ()),
        (Kind::String, _) => {
            let bytes = cursor.u64("the length of a string")?;
            cursor.bytes(bytes, "a string").map(|_| ())
        }
        _ => {
            let at = cursor.position();
            let number = cursor.u32("the type of an array")?;
            let len = cursor.u64("the length of an array")?;
            let element = Kind::from_number(number)
                .ok_or_else(|| cursor.fault(at, format!("an array has elements of unknown type {number}")))?;
            skip_array(cursor, element, len, depth)
        }
    }
}

fn skip_array(cursor: &mut Cursor<'_>, kind: Kind, len: u64, depth: u32) -> Result<(), Stop> {
    let at = cursor.position();
    if let Some(bytes) = kind.bytes() {
        let all = len
            .checked_mul(bytes)
            .ok_or_else(|| cursor.fault(at, format!("an array of {len} values is larger than any file")))?;
        return cursor.bytes(all, "an array").map(|_| ());
    }
    if kind == Kind::Array && depth >= DEPTH_LIMIT {
        return Err(cursor.fault(at, format!("arrays are nested more than {DEPTH_LIMIT} deep")));
    }
    // Each string or array takes up at least 8 bytes for its length, so an excessive count fails
    // at the end of the file.
    (0..len).try_for_each(|_| skip(cursor, kind, depth + 1))
}
