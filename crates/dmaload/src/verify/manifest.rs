//! Manifests: JSON documents that list the expected checksums of each file's chunks.
//!
//! ```json
//! { "format": "dmaload-manifest", "version": 1, "algorithm": "crc32c", "chunk_bytes": 1048576,
//!   "files": [ { "path": "model.safetensors", "bytes": 1500000, "sha256": "9f86d0…",
//!                "chunks": ["e3069283", "8a9136aa"] } ] }
//! ```

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value, json};

use super::digest::{Algorithm, Digest};

const FORMAT: &str = "dmaload-manifest";
const VERSION: u64 = 1;

/// The expected lengths and checksums of files; see the [module](super).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub(super) algorithm: Algorithm,
    pub(super) chunk_bytes: u64,
    pub(super) files: Vec<ManifestFile>,
}

/// The expected length and checksums of one file.
#[derive(Clone, PartialEq, Eq)]
pub struct ManifestFile {
    /// The path for display. It also identifies the file, unless `raw` is set.
    pub(super) path: String,
    /// The path, if it is not UTF-8.
    pub(super) raw: Option<PathBuf>,
    pub(super) bytes: u64,
    pub(super) sha256: Option<Digest>,
    /// The checksums of all chunks, concatenated.
    pub(super) sums: Vec<u8>,
}

/// The error for an invalid manifest. Its message says where the manifest is invalid, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid manifest: {}", dmabuf::printable::text(.0))]
pub struct ManifestError(String);

impl ManifestFile {
    /// Creates an entry with a path and a length, but without checksums.
    pub(super) fn new(path: &Path, bytes: u64) -> Self {
        let raw = path.to_str().is_none().then(|| path.to_owned());
        ManifestFile { path: path.to_string_lossy().into_owned(), raw, bytes, sha256: None, sums: Vec::new() }
    }

    /// The file's path, or enough of its end to identify it. Invalid UTF-8 is replaced.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Like [`Self::path`], but with exactly the bytes that the path has in the file system.
    pub fn raw_path(&self) -> &Path {
        self.raw.as_deref().unwrap_or(Path::new(&self.path))
    }

    /// The file's length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The SHA-256 checksum of the whole file, if present. It is meant for people and other tools;
    /// loads verify the chunks instead.
    pub fn sha256(&self) -> Option<Digest> {
        self.sha256
    }
}

impl fmt::Debug for ManifestFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ManifestFile").field("path", &self.path).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Manifest {
    /// Maximum size of a chunk: 1 MiB.
    ///
    /// Every chunk size divides this size. When whole files are loaded, segments begin at
    /// multiples of it. No chunk therefore extends into another segment, so each segment can be
    /// verified before it is delivered to the caller.
    pub const LARGEST_CHUNK_BYTES: u64 = 1 << 20;
    /// Minimum size of a chunk: 4 KiB.
    pub const SMALLEST_CHUNK_BYTES: u64 = 4096;

    /// Whether this is a valid chunk size: a power of two from [`Self::SMALLEST_CHUNK_BYTES`] to
    /// [`Self::LARGEST_CHUNK_BYTES`].
    pub fn allows_chunk_bytes(bytes: u64) -> bool {
        bytes.is_power_of_two() && (Self::SMALLEST_CHUNK_BYTES..=Self::LARGEST_CHUNK_BYTES).contains(&bytes)
    }

    /// The checksum algorithm of the chunks.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The size of the chunks; a file's last chunk may be shorter.
    pub fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    /// Returns the files that the manifest lists.
    pub fn files(&self) -> &[ManifestFile] {
        &self.files
    }

    /// The checksum of one chunk; `None` if the file has no such chunk.
    pub(super) fn chunk_digest(&self, file: &ManifestFile, chunk: u64) -> Option<Digest> {
        let length = self.algorithm.digest_bytes();
        let start = usize::try_from(chunk).ok()?.checked_mul(length)?;
        Digest::new(self.algorithm, file.sums.get(start..start.checked_add(length)?)?)
    }

    /// Returns the index of the entry for this path: the entry whose own path is the longest
    /// suffix of it. If no entry matches, but only one file is loaded (`alone`) and the manifest
    /// has only one entry, returns that entry, because a copy of the file may have any name.
    pub(super) fn find(&self, path: &Path, alone: bool) -> Option<usize> {
        let named = self.files.iter().enumerate().filter(|(_, file)| path.ends_with(file.raw_path()));
        let longest = named.max_by_key(|(_, file)| file.raw_path().components().count());
        longest.map(|(index, _)| index).or((alone && self.files.len() == 1).then_some(0))
    }

    /// Returns the shortest suffixes that distinguish these paths from each other. All suffixes
    /// have the same number of components, except those of shorter paths. If even the longest
    /// suffixes are not all different, returns those.
    pub(super) fn shortest_names(paths: &[&Path]) -> Vec<PathBuf> {
        let ends = |depth: usize| -> Vec<PathBuf> {
            let end = |path: &&Path| {
                let named: Vec<_> = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
                named[named.len().saturating_sub(depth)..].iter().collect()
            };
            paths.iter().map(end).collect()
        };
        let longest = paths.iter().map(|path| path.components().count()).max().unwrap_or(1);
        let distinct = |names: &[PathBuf]| names.iter().collect::<BTreeSet<_>>().len() == names.len();
        (1..=longest).map(ends).find(|names| distinct(names)).unwrap_or_else(|| ends(longest))
    }

    /// Parses a manifest. Its memory use is a small multiple of the input's length. Never panics.
    ///
    /// # Errors
    /// If the manifest is invalid. The error says where, and why.
    pub fn parse(json: &[u8]) -> Result<Self, ManifestError> {
        let value: Value = serde_json::from_slice(json).map_err(|error| ManifestError(error.to_string()))?;
        let top = Object { at: String::new(), fields: value.as_object().ok_or_else(|| error_at("", "is not an object"))? };
        if top.text("format")? != FORMAT {
            return Err(error_at("format", &format!("is not {FORMAT:?}")));
        }
        let version = top.number("version")?;
        if version != VERSION {
            return Err(error_at("version", &format!("is {version}, but only {VERSION} is supported")));
        }
        let algorithm: Algorithm = top.text("algorithm")?.parse().map_err(|error: String| error_at("algorithm:", &error))?;
        let chunk_bytes = top.number("chunk_bytes")?;
        if !Self::allows_chunk_bytes(chunk_bytes) {
            return Err(error_at(
                "chunk_bytes",
                &format!("is {chunk_bytes}, but must be a power of two between 4096 and 1048576"),
            ));
        }
        let files = top.list("files")?.iter().enumerate();
        let files = files.map(|(index, file)| parse_file(file, &format!("files[{index}]"), algorithm, chunk_bytes));
        let files: Vec<_> = files.collect::<Result<_, _>>()?;
        let mut seen = BTreeSet::new();
        match files.iter().find(|file| !seen.insert(file.raw_path())) {
            Some(twice) => Err(error_at("files", &format!("lists {:?} twice", twice.path))),
            None => Ok(Manifest { algorithm, chunk_bytes, files }),
        }
    }

    /// Returns the manifest as JSON.
    pub fn to_json(&self) -> String {
        let file = |file: &ManifestFile| {
            let chunks = file.sums.chunks(self.algorithm.digest_bytes());
            let chunks = chunks.filter_map(|sum| Some(Digest::new(self.algorithm, sum)?.hex()));
            let mut object = json!({
                "path": file.path,
                "bytes": file.bytes,
                "sha256": file.sha256.map(|digest| digest.hex()),
                "chunks": chunks.collect::<Vec<_>>(),
            });
            if let Some(raw) = &file.raw {
                let bytes = raw.as_os_str().as_bytes().iter();
                object["path_hex"] = bytes.map(|byte| format!("{byte:02x}")).collect::<String>().into();
            }
            object
        };
        let json = json!({
            "format": FORMAT,
            "version": VERSION,
            "algorithm": self.algorithm.name(),
            "chunk_bytes": self.chunk_bytes,
            "files": self.files.iter().map(file).collect::<Vec<_>>(),
        });
        json.to_string()
    }
}

fn parse_file(value: &Value, at: &str, algorithm: Algorithm, chunk_bytes: u64) -> Result<ManifestFile, ManifestError> {
    let fields = value.as_object().ok_or_else(|| error_at(at, "is not an object"))?;
    let file = Object { at: format!("{at}."), fields };
    let (path, bytes) = (file.text("path")?.to_owned(), file.number("bytes")?);
    let sha256 = match file.fields.get("sha256") {
        None | Some(Value::Null) => None,
        Some(value) => {
            let digest = value.as_str().and_then(|hex| Digest::from_hex(Algorithm::Sha256, hex));
            Some(digest.ok_or_else(|| error_at(&format!("{at}.sha256"), "is not a sha256 checksum"))?)
        }
    };
    let chunks = file.list("chunks")?;
    let expected = bytes.div_ceil(chunk_bytes);
    if chunks.len() as u64 != expected {
        return Err(error_at(
            &format!("{at}.chunks"),
            &format!("has length {}, but must have length {expected}, with one checksum for each chunk", chunks.len()),
        ));
    }
    let mut sums = Vec::with_capacity(chunks.len() * algorithm.digest_bytes());
    for (index, chunk) in chunks.iter().enumerate() {
        let digest = chunk.as_str().and_then(|hex| Digest::from_hex(algorithm, hex));
        sums.extend_from_slice(
            digest
                .ok_or_else(|| error_at(&format!("{at}.chunks[{index}]"), &format!("is not a {algorithm} checksum")))?
                .as_bytes(),
        );
    }
    let raw = match file.fields.get("path_hex") {
        None | Some(Value::Null) => None,
        Some(value) => Some(
            value
                .as_str()
                .and_then(unhex)
                .ok_or_else(|| error_at(&format!("{at}.path_hex"), "is not a path in hexadecimal digits"))?,
        ),
    };
    Ok(ManifestFile { path, raw, bytes, sha256, sums })
}

/// Decodes a path whose bytes are given as hexadecimal digits.
fn unhex(hex: &str) -> Option<PathBuf> {
    let pairs = hex.as_bytes().chunks(2);
    let bytes: Option<Vec<u8>> = pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect();
    let bytes =
        bytes.filter(|bytes| hex.len() == 2 * bytes.len() && !bytes.is_empty() && hex.bytes().all(|c| c.is_ascii_hexdigit()))?;
    Some(OsString::from_vec(bytes).into())
}

/// A JSON object, and where it is in the manifest.
struct Object<'a> {
    at: String,
    fields: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    fn field<T>(&self, name: &str, kind: &str, take: impl Fn(&'a Value) -> Option<T>) -> Result<T, ManifestError> {
        let value = self.fields.get(name).and_then(take);
        value.ok_or_else(|| error_at(&format!("{}{name}", self.at), &format!("is missing or not a {kind}")))
    }

    fn text(&self, name: &str) -> Result<&'a str, ManifestError> {
        self.field(name, "string", Value::as_str)
    }

    fn number(&self, name: &str) -> Result<u64, ManifestError> {
        self.field(name, "whole number", Value::as_u64)
    }

    fn list(&self, name: &str) -> Result<&'a Vec<Value>, ManifestError> {
        self.field(name, "list", Value::as_array)
    }
}

fn error_at(at: &str, what: &str) -> ManifestError {
    ManifestError(if at.is_empty() { format!("it {what}") } else { format!("{at} {what}") })
}

#[cfg(test)]
mod tests {
    use super::super::digest::digest;
    use super::*;

    fn manifest() -> Manifest {
        let file = |path: &str, bytes: u64| ManifestFile {
            path: path.to_owned(),
            raw: None,
            bytes,
            sha256: Some(digest(Algorithm::Sha256, path.as_bytes())),
            sums: (0..bytes.div_ceil(4096)).flat_map(|chunk| u32::try_from(chunk).unwrap().to_be_bytes()).collect(),
        };
        let files = vec![file("a/model.safetensors", 10_000), file("model.safetensors", 4096), file("empty", 0)];
        Manifest { algorithm: Algorithm::Crc32c, chunk_bytes: 4096, files }
    }

    #[test]
    fn manifest_round_trips() {
        let manifest = manifest();
        assert_eq!(Manifest::parse(manifest.to_json().as_bytes()), Ok(manifest.clone()));
        assert_eq!(manifest.chunk_digest(&manifest.files[0], 2).unwrap().hex(), "00000002");
        assert_eq!(manifest.chunk_digest(&manifest.files[0], 3), None);
        assert_eq!(manifest.chunk_digest(&manifest.files[0], u64::MAX), None);
    }

    #[test]
    fn path_is_found_by_its_longest_suffix() {
        let manifest = manifest();
        let found = |path: &str| manifest.find(Path::new(path), true);
        assert_eq!(found("/models/a/model.safetensors"), Some(0));
        assert_eq!(found("/models/b/model.safetensors"), Some(1));
        assert_eq!(found("model.safetensors"), Some(1));
        assert_eq!(found("/models/my-model.safetensors"), None, "the end of a file name must not match as a path");
        let one = Manifest { files: manifest.files[..1].to_vec(), ..manifest.clone() };
        assert_eq!(one.find(Path::new("/blobs/1234"), true), Some(0));
        assert_eq!(one.find(Path::new("/blobs/1234"), false), None);
    }

    #[test]
    fn names_that_are_not_utf_8_are_distinguished() {
        let paths = [&b"m/\xff.bin"[..], b"m/\xfe.bin", "m/\u{fffd}.bin".as_bytes()];
        let paths = paths.map(|path| PathBuf::from(OsString::from_vec(path.to_vec())));
        let files =
            Manifest::shortest_names(&paths.each_ref().map(PathBuf::as_path)).into_iter().map(|name| ManifestFile::new(&name, 0));
        let manifest = Manifest { files: files.map(|file| ManifestFile { sums: Vec::new(), ..file }).collect(), ..manifest() };
        let read = Manifest::parse(manifest.to_json().as_bytes()).unwrap();
        assert_eq!(read, manifest);
        for (number, path) in paths.iter().enumerate() {
            assert_eq!(read.find(path, false), Some(number), "{path:?}");
        }
        for hex in ["f", "fg", "", "+f", "ff0"] {
            let json = manifest.to_json().replace("ff2e62696e", hex);
            assert!(Manifest::parse(json.as_bytes()).unwrap_err().to_string().contains("path_hex"), "{json}");
        }
    }

    #[test]
    fn names_are_as_short_as_possible() {
        let names = |paths: &[&str]| -> Vec<String> {
            let names = Manifest::shortest_names(&paths.iter().map(Path::new).collect::<Vec<_>>());
            names.into_iter().map(|name| name.into_os_string().into_string().unwrap()).collect()
        };
        assert_eq!(names(&["/m/a.bin", "../b.bin"]), ["a.bin", "b.bin"]);
        assert_eq!(names(&["/m/1/a.bin", "/m/2/a.bin", "b.bin"]), ["1/a.bin", "2/a.bin", "b.bin"]);
        assert_eq!(names(&["a.bin", "./a.bin"]), ["a.bin", "a.bin"]);
    }

    #[test]
    fn faults_are_reported_with_their_location() {
        let says = |json: &str| Manifest::parse(json.as_bytes()).unwrap_err().to_string();
        let good = manifest().to_json();
        let with = |from: &str, to: &str| {
            assert!(good.contains(from), "{from} is not in {good}");
            says(&good.replacen(from, to, 1))
        };
        assert!(says("{").contains("EOF"), "{}", says("{"));
        assert_eq!(says("[]"), "invalid manifest: it is not an object");
        assert!(with("dmaload-manifest", "other").contains("format is not"));
        assert!(with(r#""version":1"#, r#""version":2"#).contains("version is 2"));
        assert!(with("crc32c", "md5").contains("algorithm: unknown checksum"));
        assert!(with(r#""chunk_bytes":4096"#, r#""chunk_bytes":5000"#).contains("power of two"));
        assert!(with(r#""chunk_bytes":4096"#, r#""chunk_bytes":0"#).contains("power of two"));
        assert!(with(r#""chunk_bytes":4096"#, r#""chunk_bytes":8192"#).contains("files[0].chunks has length 3"));
        assert!(with(r#""bytes":10000"#, r#""bytes":-1"#).contains("files[0].bytes is missing or not a whole number"));
        assert!(with(r#""bytes":10000"#, r#""bytes":18446744073709551615"#).contains("length 4503599627370496"));
        assert!(with("00000001", "0000001").contains("files[0].chunks[1] is not a crc32c"));
        assert!(with("a/model", "model").contains("twice") || with("a/model.safetensors", "model.safetensors").contains("twice"));
        assert!(with(r#""sha256":""#, r#""sha256":"0"#).contains(".sha256 is not a sha256"));
    }
}
