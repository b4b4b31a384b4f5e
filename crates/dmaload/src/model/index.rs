//! The index of a model of several safetensors files, as model hubs have it: `model.safetensors.index.json`.
//!
//! ```json
//! { "metadata": { "total_size": 123 }, "weight_map": { "a.weight": "model-00001-of-00002.safetensors" } }
//! ```

use std::collections::HashMap;
use std::fmt;
use std::path::{Component, Path};

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::error::{ModelError, shorten};
use super::map::TensorMap;

/// The end of an index's name.
pub const SUFFIX: &str = ".safetensors.index.json";

/// The longest index that is read, in bytes: as for headers.
pub const LIMIT_BYTES: u64 = super::safetensors::HEADER_LIMIT_BYTES;

/// Which file has which tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// By name.
    shards: Vec<Shard>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Shard {
    name: String,
    tensors: Vec<String>,
}

impl Index {
    /// Reads an index.
    ///
    /// # Errors
    /// [`ModelError::Index`], also for a tensor that comes twice; [`ModelError::IndexLeavesFolder`] for the name of a file that is
    /// not within the index's folder (by its letters: symbolic links within it may lead anywhere, which is how model caches are
    /// made).
    pub fn parse(json: &[u8]) -> Result<Self, ModelError> {
        let WeightMap(pairs) = serde_json::from_slice::<Document>(json)
            .map_err(|error| ModelError::Index { offset: offset_of(json, &error), reason: shorten(error.to_string()) })?
            .weight_map;
        let mut places: HashMap<String, usize> = HashMap::new();
        let mut shards: Vec<Shard> = Vec::new();
        for (tensor, name) in pairs {
            let place = match places.get(&name) {
                Some(&place) => place,
                None => {
                    if !is_within(&name) {
                        return Err(ModelError::IndexLeavesFolder { name });
                    }
                    shards.push(Shard { name: name.clone(), tensors: Vec::new() });
                    places.insert(name, shards.len() - 1);
                    shards.len() - 1
                }
            };
            if let Some(shard) = shards.get_mut(place) {
                shard.tensors.push(tensor);
            }
        }
        shards.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut all: Vec<&String> = shards.iter().flat_map(|shard| &shard.tensors).collect();
        all.sort_unstable();
        if let Some(twice) = all.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ModelError::DuplicateTensor { tensor: twice[0].clone() });
        }
        Ok(Index { shards })
    }

    /// The names of the files, in their order, relative to the index's folder.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.shards.iter().map(|shard| shard.name.as_str())
    }

    /// Checks that a file has the tensors that it should have; one of raw bytes has none.
    ///
    /// # Errors
    /// [`ModelError::IndexDisagrees`].
    pub fn check(&self, file: &str, found: Option<&TensorMap>) -> Result<(), ModelError> {
        let shard = self.shards.iter().find(|shard| shard.name == file);
        let missing =
            shard.and_then(|shard| shard.tensors.iter().find(|name| found.is_none_or(|found| found.position(name).is_none())));
        missing.map_or(Ok(()), |tensor| Err(ModelError::IndexDisagrees { tensor: tensor.clone() }))
    }
}

/// Whether a name stays in its folder.
fn is_within(name: &str) -> bool {
    let mut parts = Path::new(name).components().peekable();
    // `components` passes over a dot at the end, and over double slashes, which change nothing.
    parts.peek().is_some() && !name.contains('\0') && parts.all(|part| matches!(part, Component::Normal(_)))
}

fn offset_of(json: &[u8], error: &serde_json::Error) -> usize {
    let lines = json.split_inclusive(|&byte| byte == b'\n').take(error.line().saturating_sub(1));
    lines.map(<[u8]>::len).sum::<usize>() + error.column()
}

/// The one key that matters; whatever else there is, is passed over.
struct Document {
    weight_map: WeightMap,
}

struct WeightMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
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
        deserializer.deserialize_map(Keys)
    }
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from names of tensors to names of files")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(WeightMap(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(weights: &str) -> Result<Index, ModelError> {
        Index::parse(format!(r#"{{"metadata":{{"total_size":1,"x":[{{}}]}},"weight_map":{weights}}}"#).as_bytes())
    }

    #[test]
    fn files_are_in_the_order_of_their_names_each_once() {
        let index = index(r#"{"b":"2.safetensors","a":"1.safetensors","c":"sub/3.safetensors","d":"1.safetensors"}"#).unwrap();
        assert_eq!(index.files().collect::<Vec<_>>(), ["1.safetensors", "2.safetensors", "sub/3.safetensors"]);
    }

    #[test]
    fn a_name_that_leaves_the_folder_is_refused() {
        for name in ["/etc/shadow", "../up", "a/../../up", "..", "", ".", "./a/..", "a\\u0000b"] {
            let error = index(&format!(r#"{{"a":"{name}"}}"#)).unwrap_err();
            assert!(matches!(error, ModelError::IndexLeavesFolder { .. }), "{name:?}: {error}");
        }
    }

    #[test]
    fn what_is_no_index_is_told_with_its_place() {
        for (json, expected) in [
            ("", "EOF"),
            ("[]", "an object with"),
            ("{}", "weight_map"),
            (r#"{"weight_map":[]}"#, "from names of tensors"),
            (r#"{"weight_map":{"a":1}}"#, "expected a string"),
            (r#"{"weight_map":{},"weight_map":{}}"#, "duplicate field"),
        ] {
            let Err(ModelError::Index { reason, .. }) = Index::parse(json.as_bytes()) else { panic!("{json}") };
            assert!(reason.contains(expected), "{json}: {reason}");
        }
        assert!(matches!(index(r#"{"a":"1","a":"2"}"#), Err(ModelError::DuplicateTensor { .. })));
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in r#"(\{|\}|"weight_map"|"[a-z./]{0,6}"|:|,|\[|\]|[0-9]{1,3}|\PC){0,30}"#) {
            let _ = Index::parse(text.as_bytes());
        }
    }
}
