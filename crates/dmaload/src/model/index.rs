//! Parses the index that model hubs provide for a model that is split into several safetensors
//! files: `model.safetensors.index.json`.
//!
//! ```json
//! { "metadata": { "total_size": 123 },
//!   "weight_map": { "a.weight": "model-00001-of-00002.safetensors" } }
//! ```

use std::collections::HashMap;
use std::fmt;
use std::path::{Component, Path};

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::error::{ModelError, shorten};
use super::map::TensorMap;

/// The end of an index's file name. Variants have other names: see [`Named::Safetensors`].
pub const SUFFIX: &str = ".safetensors.index.json";

/// The format of the indexed files, according to the name of the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Named {
    /// An index of safetensors files: `model.safetensors.index.json`, or a variant such as
    /// `model.safetensors.index.fp16.json` or `model.safetensors.fp16.index.json`.
    Safetensors,
    /// An index of files in another format, such as `pytorch_model.bin.index.json`.
    Other,
    /// An index with a generic name, such as `model.index.fp16.json`. The name does not reveal the
    /// format of the indexed files.
    Unsaid,
}

/// Classifies an index by its file name. Returns `None` if this is not the name of an index.
#[must_use]
pub fn named(name: &str) -> Option<Named> {
    let parts: Vec<String> = name.split('.').map(str::to_ascii_lowercase).collect();
    let [_, words @ .., end] = parts.as_slice() else { return None };
    let has = |word: &str| words.iter().any(|own| own == word);
    if end != "json" || !has("index") {
        None
    } else if has("safetensors") {
        Some(Named::Safetensors)
    } else if ["bin", "pt", "pth", "ckpt", "h5", "msgpack"].into_iter().any(has) {
        Some(Named::Other)
    } else {
        Some(Named::Unsaid)
    }
}

/// The maximum length of an index in bytes, the same as for headers.
pub const LIMIT_BYTES: u64 = super::limits::HEADER_LIMIT_BYTES;

/// A parsed index, which maps tensors to files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// The files with their tensors, sorted by file name.
    shards: Vec<IndexShard>,
    /// One entry for each tensor, sorted by the tensor's name: the position in `shards` of the
    /// file that contains the tensor, and the tensor's position in that file's `tensors`.
    by_tensor: Vec<(u32, u32)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct IndexShard {
    name: String,
    tensors: Vec<String>,
}

impl Index {
    /// Parses an index. File names are normalized: `./a`, `b/../a` and `a` are the same file.
    ///
    /// # Errors
    /// [`ModelError::Index`] if the JSON is invalid or lists a tensor twice.
    /// [`ModelError::IndexLeavesFolder`] if a file name leads out of the index's folder or can't
    /// be the name of a file. Symbolic links are not checked and may lead anywhere, because model
    /// caches rely on this.
    pub fn parse(json: &[u8]) -> Result<Self, ModelError> {
        let WeightMap(pairs) = serde_json::from_slice::<Document>(json)
            .map_err(|error| ModelError::Index { offset: offset_of(json, &error), reason: shorten(error.to_string()) })?
            .weight_map;
        // Keyed by the name as spelled in the index, so that each spelling is normalized only
        // once.
        let mut places: HashMap<String, usize> = HashMap::new();
        let mut by_file: HashMap<String, usize> = HashMap::new();
        let mut shards: Vec<IndexShard> = Vec::new();
        for (tensor, name) in pairs {
            let place = match places.get(&name) {
                Some(&place) => place,
                None => {
                    let Some(file) = normalize_name(&name) else { return Err(ModelError::IndexLeavesFolder { name }) };
                    let place = *by_file.entry(file).or_insert_with_key(|file| {
                        shards.push(IndexShard { name: file.clone(), tensors: Vec::new() });
                        shards.len() - 1
                    });
                    places.insert(name, place);
                    place
                }
            };
            shards[place].tensors.push(tensor);
        }
        shards.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut by_tensor: Vec<(u32, u32)> = Vec::new();
        for (shard, number) in shards.iter().zip(0..) {
            by_tensor.extend((0..).take(shard.tensors.len()).map(|tensor| (number, tensor)));
        }
        let name = |&(shard, tensor): &(u32, u32)| shards[shard as usize].tensors[tensor as usize].as_str();
        by_tensor.sort_unstable_by(|a, b| name(a).cmp(name(b)));
        if let Some(twice) = by_tensor.windows(2).find(|pair| name(&pair[0]) == name(&pair[1])) {
            let reason = format!("tensor {:?} is in the index twice", shorten(name(&twice[0]).to_owned()));
            return Err(ModelError::Index { offset: 0, reason });
        }
        Ok(Index { shards, by_tensor })
    }

    /// Returns whether input that failed to parse as an index was probably meant to be one: it is
    /// an object with a `weight_map`, or it is not valid JSON, such as a truncated index.
    #[must_use]
    pub fn is_meant(json: &[u8]) -> bool {
        match serde_json::from_slice::<HashMap<String, IgnoredAny>>(json) {
            Ok(keys) => keys.contains_key("weight_map"),
            // A data error means that the JSON is valid but not an object.
            Err(error) => !error.is_data(),
        }
    }

    /// Returns the name of the file that contains this tensor, or `None` if the index does not
    /// list the tensor.
    #[must_use]
    pub fn file_of(&self, tensor: &str) -> Option<&str> {
        let name = |&(shard, tensor): &(u32, u32)| self.shards[shard as usize].tensors[tensor as usize].as_str();
        let found = self.by_tensor.binary_search_by(|place| name(place).cmp(tensor)).ok()?;
        Some(&self.shards[self.by_tensor[found].0 as usize].name)
    }

    /// Iterates over all tensors, each with the name of its file.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &str)> {
        self.shards.iter().flat_map(|shard| shard.tensors.iter().map(|tensor| (tensor.as_str(), shard.name.as_str())))
    }

    /// Iterates over the names of the files, sorted and relative to the index's folder.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.shards.iter().map(|shard| shard.name.as_str())
    }

    /// Checks that a file contains the tensors that the index lists for it. `found` holds the
    /// tensors of the file, or is `None` for a file of raw bytes.
    ///
    /// # Errors
    /// [`ModelError::IndexDisagrees`] if the file lacks one of these tensors.
    pub fn check(&self, file: &str, found: Option<&TensorMap>) -> Result<(), ModelError> {
        let shard = self.shards.iter().find(|shard| shard.name == file);
        let missing = shard
            .and_then(|shard| shard.tensors.iter().find(|name| found.is_none_or(|found| found.get_index_of(name).is_none())));
        missing.map_or(Ok(()), |tensor| Err(ModelError::IndexDisagrees { tensor: tensor.clone() }))
    }
}

/// Normalizes a file name: removes `.`, `..` and repeated slashes. Returns `None` if the name
/// leads out of the index's folder, contains a NUL, or has no components left.
fn normalize_name(name: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in Path::new(name).components() {
        match part {
            Component::Normal(part) => parts.push(part.to_str().expect("a component of a UTF-8 path should be UTF-8")),
            Component::CurDir => {}
            Component::ParentDir => _ = parts.pop()?,
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (!parts.is_empty() && !name.contains('\0')).then(|| parts.join("/"))
}

fn offset_of(json: &[u8], error: &serde_json::Error) -> usize {
    let lines = json.split_inclusive(|&byte| byte == b'\n').take(error.line().saturating_sub(1));
    lines.map(<[u8]>::len).sum::<usize>() + error.column()
}

/// The JSON of an index. Only `weight_map` is read; other keys are skipped.
struct Document {
    weight_map: WeightMap,
}

struct WeightMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DocumentVisitor;
        impl<'de> Visitor<'de> for DocumentVisitor {
            type Value = Document;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with \"weight_map\"")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
                let mut weight_map = None;
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "weight_map" if weight_map.is_some() => return Err(serde::de::Error::duplicate_field("weight_map")),
                        "weight_map" => weight_map = Some(map.next_value()?),
                        _ => _ = map.next_value::<IgnoredAny>()?,
                    }
                }
                weight_map.map(|weight_map| Document { weight_map }).ok_or_else(|| serde::de::Error::missing_field("weight_map"))
            }
        }
        deserializer.deserialize_map(DocumentVisitor)
    }
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WeightMapVisitor;
        impl<'de> Visitor<'de> for WeightMapVisitor {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object that maps tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(WeightMap(pairs))
            }
        }
        deserializer.deserialize_map(WeightMapVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(weights: &str) -> Result<Index, ModelError> {
        Index::parse(format!(r#"{{"metadata":{{"total_size":1,"x":[{{}}]}},"weight_map":{weights}}}"#).as_bytes())
    }

    #[test]
    fn files_are_listed_once_and_sorted_by_name() {
        let index = index(r#"{"b":"2.safetensors","a":"1.safetensors","c":"sub/3.safetensors","d":"1.safetensors"}"#).unwrap();
        assert_eq!(index.files().collect::<Vec<_>>(), ["1.safetensors", "2.safetensors", "sub/3.safetensors"]);
    }

    #[test]
    fn file_names_are_normalized() {
        for name in ["./s", "s", "a/../s", ".//s", "s/", "./a/b/../../s", "./././s"] {
            let index = index(&format!(r#"{{"a":"{name}","b":"s"}}"#)).unwrap();
            assert_eq!(index.files().collect::<Vec<_>>(), ["s"], "{name}");
            assert_eq!((index.file_of("a"), index.file_of("b"), index.file_of("c")), (Some("s"), Some("s"), None));
        }
    }

    #[test]
    fn index_names_and_their_variants_are_recognized() {
        for (name, expected) in [
            ("model.safetensors.index.json", Some(Named::Safetensors)),
            ("model.safetensors.index.fp16.json", Some(Named::Safetensors)),
            ("model.fp16.safetensors.index.json", Some(Named::Safetensors)),
            ("model.safetensors.fp16.index.json", Some(Named::Safetensors)),
            ("diffusion_pytorch_model.safetensors.index.non_ema.fp16.json", Some(Named::Safetensors)),
            ("MODEL.SAFETENSORS.INDEX.JSON", Some(Named::Safetensors)),
            ("pytorch_model.bin.index.json", Some(Named::Other)),
            ("pytorch_model.bin.index.fp16.json", Some(Named::Other)),
            ("model.index.fp16.json", Some(Named::Unsaid)),
            ("model_index.json", None),
            ("index.json", None),
            ("model.safetensors.json", None),
            ("model.safetensors", None),
            ("", None),
        ] {
            assert_eq!(named(name), expected, "{name}");
        }
    }

    #[test]
    fn file_outside_the_folder_is_refused() {
        for name in ["/etc/shadow", "../up", "a/../../up", "./../up", "..", "", ".", "./a/..", "a\\u0000b", "a/../../a/x"] {
            let error = index(&format!(r#"{{"a":"{name}"}}"#)).unwrap_err();
            assert!(matches!(error, ModelError::IndexLeavesFolder { .. }), "{name:?}: {error}");
        }
    }

    #[test]
    fn invalid_index_is_reported_with_a_reason() {
        for (json, expected) in [
            ("", "EOF"),
            ("[]", "an object with"),
            ("{}", "weight_map"),
            (r#"{"weight_map":[]}"#, "maps tensor names"),
            (r#"{"weight_map":{"a":1}}"#, "expected a string"),
            (r#"{"weight_map":{},"weight_map":{}}"#, "duplicate field"),
        ] {
            let Err(ModelError::Index { reason, .. }) = Index::parse(json.as_bytes()) else { panic!("{json}") };
            assert!(reason.contains(expected), "{json}: {reason}");
        }
        let Err(ModelError::Index { reason, .. }) = index(r#"{"a":"1","a":"2"}"#) else { panic!() };
        assert_eq!(reason, r#"tensor "a" is in the index twice"#);
    }

    #[test]
    fn damaged_index_is_distinguished_from_other_json() {
        for (json, expected) in [
            ("", true),
            ("{", true),
            (r#"{"weight_map":{"a":"b.safeten"#, true),
            (r#"{"weight_map":[]}"#, true),
            (r#"{"weight_map":{"a":"1","a":"2"}}"#, true),
            ("version https://git-lfs.github.com/spec/v1", true),
            ("{}", false),
            ("[1]", false),
            ("null", false),
            (r#"{"documents":{"weight_map":{}}}"#, false),
        ] {
            assert_eq!(Index::is_meant(json.as_bytes()), expected, "{json}");
        }
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in r#"(\{|\}|"weight_map"|"[a-z./]{0,6}"|:|,|\[|\]|[0-9]{1,3}|\PC){0,30}"#) {
            let _ = Index::parse(text.as_bytes());
            let _ = Index::is_meant(text.as_bytes());
        }
    }
}
