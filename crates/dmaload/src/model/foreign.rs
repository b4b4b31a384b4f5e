//! Recognizes files found in place of a model: Git LFS pointers, error pages, archives, and other
//! formats.
//!
//! A file is examined here only after it has been refused as a model or as an index, so that the
//! error can tell the user what to do.

use std::fmt;

use dmabuf::printable;

use super::gguf::is_gguf;
use super::limits::HEADER_LIMIT_BYTES;

/// How many bytes from the beginning of a file to pass to [`recognize`]. A shorter file is passed
/// as a whole.
pub(crate) const LOOKED_AT_BYTES: usize = 4096;

/// Maximum number of characters to quote in a message.
const SHOWN_CHARS: usize = 60;

/// A kind of file found in place of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForeignFile {
    /// A Git LFS pointer, which stands in for a file until the file is downloaded.
    LfsPointer {
        /// The length of that file, if the pointer contains it.
        bytes: Option<u64>,
    },
    /// An HTML page.
    Html,
    /// XML text, such as an error message from an object store.
    Xml,
    /// JSON text.
    Json {
        /// The beginning of the text.
        start: String,
    },
    /// Other text.
    Text {
        /// The beginning of the text.
        start: String,
    },
    /// A zip archive, such as a PyTorch checkpoint.
    Zip,
    /// A Python pickle, such as an older PyTorch checkpoint.
    Pickle,
    /// A file whose examined bytes are all zero. Its space was probably preallocated for a
    /// download.
    Zeros,
    /// A GGUF file where another format was requested.
    Gguf,
    /// A safetensors file where another format was requested.
    Safetensors,
    /// A safetensors file whose header length was written in the wrong byte order.
    BigEndianSafetensors,
    /// A llama.cpp model in one of the formats that preceded GGUF.
    LegacyGgml,
    /// A compressed file or an archive.
    Archive {
        /// The name of the format with its article, such as `a gzip file`.
        format: &'static str,
    },
    /// A file of arrays in a format that is neither safetensors nor GGUF.
    OtherFormat {
        /// The name of the format with its article, such as `an HDF5 file`.
        format: &'static str,
    },
}

impl ForeignFile {
    /// Returns what the user can do about the file.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            ForeignFile::LfsPointer { .. } => "download the file that it points to: run `git lfs pull` in its repository",
            ForeignFile::Html | ForeignFile::Xml => {
                "an error page was saved in place of the model: download it again (the page says what went wrong)"
            }
            ForeignFile::Json { .. } | ForeignFile::Text { .. } => {
                "a message was saved in place of the model: download it again (the text says what went wrong)"
            }
            ForeignFile::Zip | ForeignFile::Pickle => {
                "this is probably a PyTorch checkpoint (.bin, .pt) with another name: convert it to safetensors, or download the model as safetensors"
            }
            ForeignFile::Zeros => {
                "the download is incomplete (its space was preallocated): finish it, or download the file again"
            }
            ForeignFile::Gguf => "load it as GGUF (format `gguf`); the `auto` format does this if the file's name ends in .gguf",
            ForeignFile::Safetensors => {
                "load it as safetensors (format `safetensors`); the `auto` format does this if the file's name ends in .safetensors"
            }
            ForeignFile::BigEndianSafetensors => {
                "it was written on a big-endian machine, which violates the format: write it again on a little-endian one"
            }
            ForeignFile::LegacyGgml => "convert it to GGUF with llama.cpp's tools",
            ForeignFile::Archive { .. } => "unpack it first",
            ForeignFile::OtherFormat { .. } => "convert it to safetensors",
        }
    }
}

impl fmt::Display for ForeignFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ForeignFile::LfsPointer { bytes: Some(bytes) } => write!(f, "a Git LFS pointer to a file of {bytes} bytes"),
            ForeignFile::LfsPointer { bytes: None } => f.write_str("a Git LFS pointer"),
            ForeignFile::Html => f.write_str("an HTML page"),
            ForeignFile::Xml => f.write_str("XML text"),
            ForeignFile::Json { start } => write!(f, "JSON text, \"{}\"", printable::text(start)),
            ForeignFile::Text { start } => write!(f, "text, \"{}\"", printable::text(start)),
            ForeignFile::Zip => f.write_str("a zip archive"),
            ForeignFile::Pickle => f.write_str("a Python pickle"),
            ForeignFile::Zeros => f.write_str("zeros"),
            ForeignFile::Gguf => f.write_str("a GGUF file"),
            ForeignFile::Safetensors => f.write_str("a safetensors file"),
            ForeignFile::BigEndianSafetensors => {
                f.write_str("a safetensors file with its header length in big-endian byte order")
            }
            ForeignFile::LegacyGgml => f.write_str("a ggml file in a format older than GGUF"),
            ForeignFile::Archive { format } => write!(f, "{format}"),
            ForeignFile::OtherFormat { format } => write!(f, "{format}"),
        }
    }
}

/// Recognizes what kind of file was found in place of a model. Returns `None` if its kind is
/// unknown. `start` is the beginning of the file, up to [`LOOKED_AT_BYTES`] bytes, and
/// `file_bytes` is the length of the whole file.
#[must_use]
pub(crate) fn recognize(start: &[u8], file_bytes: u64) -> Option<ForeignFile> {
    if start.is_empty() {
        return None;
    }
    let prefix = start.split_first_chunk::<8>().filter(|_| start.get(8) == Some(&b'{')).map(|(prefix, _)| *prefix);
    if let Some(prefix) = prefix {
        // This is checked before the magic bytes, because a header length can look like the magic
        // of another format (35615 looks like gzip's).
        let header = u64::from_le_bytes(prefix);
        if (2..=HEADER_LIMIT_BYTES).contains(&header) {
            return (header <= file_bytes.saturating_sub(8)).then_some(ForeignFile::Safetensors);
        }
        if (2..=HEADER_LIMIT_BYTES.min(file_bytes.saturating_sub(8))).contains(&u64::from_be_bytes(prefix)) {
            return Some(ForeignFile::BigEndianSafetensors);
        }
    }
    if let Some(found) = recognize_magic(start) {
        return Some(found);
    }
    if start.iter().all(|&byte| byte == 0) {
        return Some(ForeignFile::Zeros);
    }
    recognize_text(start).or_else(|| recognize_markup(start))
}

/// Recognizes formats by fixed bytes at fixed offsets.
fn recognize_magic(start: &[u8]) -> Option<ForeignFile> {
    let archive = |format| Some(ForeignFile::Archive { format });
    let other = |format| Some(ForeignFile::OtherFormat { format });
    match start {
        _ if is_gguf(start) => Some(ForeignFile::Gguf),
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => Some(ForeignFile::Zip),
        // The pickle opcode PROTO, followed by the protocol version.
        [0x80, 2..=5, ..] => Some(ForeignFile::Pickle),
        [b'l', b'm', b'g', b'g', ..] | [b't', b'j', b'g', b'g', ..] | [b'f', b'm', b'g', b'g', ..] => {
            Some(ForeignFile::LegacyGgml)
        }
        [0x1f, 0x8b, ..] => archive("a gzip file"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => archive("a zstd file"),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => archive("an xz file"),
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => archive("a bzip2 file"),
        [4, 0x22, 0x4d, 0x18, ..] => archive("an lz4 file"),
        [b'7', b'z', 0xbc, 0xaf, 0x27, 0x1c, ..] => archive("a 7z archive"),
        _ if start.get(257..262) == Some(b"ustar") => archive("a tar archive"),
        [0x89, b'H', b'D', b'F', ..] => other("an HDF5 file"),
        [0x93, b'N', b'U', b'M', b'P', b'Y', ..] => other("a NumPy array"),
        _ => None,
    }
}

/// Recognizes pages and messages by their first words, even if they are in Latin-1 or UTF-16 or
/// contain control characters. The first words are ASCII, so in UTF-16 they can be read from every
/// second byte.
fn recognize_markup(start: &[u8]) -> Option<ForeignFile> {
    let text: Vec<u8> = match start {
        [0xff, 0xfe, rest @ ..] | [0xfe, 0xff, 0, rest @ ..] | [0, rest @ ..] => rest.iter().step_by(2).copied().collect(),
        [_, 0, _, 0, ..] => start.iter().step_by(2).copied().collect(),
        _ => start.to_vec(),
    };
    let text = text.trim_ascii_start().to_ascii_lowercase();
    let begins = |words: &[&[u8]]| words.iter().any(|word| text.starts_with(word));
    if begins(&[b"<!doctype html", b"<html", b"<head", b"<body"]) {
        return Some(ForeignFile::Html);
    }
    if begins(&[b"<?xml", b"<!--", b"<!doctype", b"<error"]) {
        let is_html = text.windows(b"<html".len()).any(|word| word == b"<html");
        return Some(if is_html { ForeignFile::Html } else { ForeignFile::Xml });
    }
    if begins(&[b"{\"error", b"{\"message", b"{\"detail"]) {
        let start = text.iter().take_while(|byte| matches!(byte, b' '..=b'~')).take(SHOWN_CHARS);
        let start = start.map(|&byte| char::from(byte)).chain(['…']).collect();
        return Some(ForeignFile::Json { start });
    }
    None
}

fn recognize_text(start: &[u8]) -> Option<ForeignFile> {
    let text = match std::str::from_utf8(start) {
        Ok(text) => text,
        // The examined bytes may end within a character.
        Err(error) if start.len() == LOOKED_AT_BYTES && error.valid_up_to() + 4 > start.len() => {
            std::str::from_utf8(start.get(..error.valid_up_to())?).ok()?
        }
        Err(_) => return None,
    };
    let text = text.trim_start_matches('\u{feff}').trim_start();
    if text.contains(|c: char| c.is_control() && !c.is_whitespace() && c != '\x1b') {
        return None;
    }
    let begins = |word: &str| text.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word));
    if begins("version https://git-lfs.github.com/spec/") || begins("version https://hawser.github.com/spec/") {
        let size = text.lines().find_map(|line| line.strip_prefix("size "));
        return Some(ForeignFile::LfsPointer { bytes: size.and_then(|size| size.trim().parse().ok()) });
    }
    if begins("<!doctype html") || begins("<html") || text.starts_with('<') && text.to_ascii_lowercase().contains("<html") {
        return Some(ForeignFile::Html);
    }
    if begins("<?xml") || text.starts_with('<') {
        return Some(ForeignFile::Xml);
    }
    let mut start: String = text.lines().next().unwrap_or_default().chars().take(SHOWN_CHARS).collect();
    if start.len() < text.trim_end().len() {
        start.push('…');
    }
    Some(if text.starts_with(['{', '[']) { ForeignFile::Json { start } } else { ForeignFile::Text { start } })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe_kind(start: &[u8]) -> String {
        recognize(start, start.len() as u64).map_or("nothing".to_owned(), |found| found.to_string())
    }

    #[test]
    fn files_found_in_place_of_a_model_are_recognized() {
        let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345678901\n";
        let mut big_endian = 2_u64.to_be_bytes().to_vec();
        big_endian.extend(b"{}");
        let mut little_endian = 2_u64.to_le_bytes().to_vec();
        little_endian.extend(b"{}");
        let mut tar = vec![b'a'; 300];
        tar[257..262].copy_from_slice(b"ustar");
        for (start, expected) in [
            (&lfs[..], "a Git LFS pointer to a file of 12345678901 bytes"),
            (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
            (b"<!DOCTYPE html>\n<html>", "an HTML page"),
            (b"\n  <HTML><head>", "an HTML page"),
            (b"<!-- x --><html>", "an HTML page"),
            (b"<?xml version=\"1.0\"?><Error>", "XML text"),
            (b"<Error><Code>AccessDenied</Code></Error>", "XML text"),
            (b"{\"error\":\"Entry not found\"}", "JSON text, \"{\"error\":\"Entry not found\"}\""),
            (b"Entry not found", "text, \"Entry not found\""),
            (b"Invalid username\nor password.", "text, \"Invalid username…\""),
            (b"\x1b]0;gone\x1b\\", "text, \"\\u{1b}]0;gone\\u{1b}\\\""),
            (b"PK\x03\x04rest", "a zip archive"),
            (b"\x80\x02\x8a\x0al\xfc", "a Python pickle"),
            (&[0; 4096], "zeros"),
            (&[0; 3], "zeros"),
            (b"GGUF\x03\0\0\0", "a GGUF file"),
            (&big_endian, "a safetensors file with its header length in big-endian byte order"),
            (&little_endian, "a safetensors file"),
            (b"tjgg\x03\0\0\0", "a ggml file in a format older than GGUF"),
            (b"\x1f\x8b\x08", "a gzip file"),
            (&tar, "a tar archive"),
            (b"\x89HDF\r\n", "an HDF5 file"),
            (b"\x93NUMPY\x01", "a NumPy array"),
            (b"<!DOCTYPE HTML><html><title>gel\xf6scht", "an HTML page"),
            (b"\n<html>\0<body>", "an HTML page"),
            (b"\xff\xfe<\0h\0t\0m\0l\0>\0", "an HTML page"),
            (b"\xfe\xff\0<\0h\0t\0m\0l\0>", "an HTML page"),
            (b"<\0h\0t\0m\0l\0>\0", "an HTML page"),
            (b"\0<\0h\0t\0m\0l\0>", "an HTML page"),
            (b"<!-- \xe9 --><html>", "an HTML page"),
            (b"<?xml version=\"1.0\" encoding=\"latin1\"?><Error>\xe9", "XML text"),
            (b"{\"error\":\"gel\xf6scht\"}", "JSON text, \"{\"error\":\"gel…\""),
            (b"{\0\"\0e\0r\0r\0o\0r\0\"\0", "JSON text, \"{\"error\"…\""),
            (b"<\0\0\0\0\0\0\0x", "nothing"),
            (b"\xff\xfe\x01\x02\x03", "nothing"),
            // Magic bytes that form header lengths (35615 and 640) longer than the file.
            (b"\x1f\x8b\0\0\0\0\0\0{\"a\"", "nothing"),
            (b"\x80\x02\0\0\0\0\0\0{\"a\"", "nothing"),
            (b"\x01\0\0\0\0\0\0\0x", "nothing"),
            (b"", "nothing"),
        ] {
            assert_eq!(describe_kind(start), expected, "{start:?}");
        }
    }

    #[test]
    fn text_cut_inside_a_character_is_text() {
        let text = "ä".repeat(LOOKED_AT_BYTES);
        let shifted = format!("x{text}");
        assert!(describe_kind(&shifted.as_bytes()[..LOOKED_AT_BYTES]).starts_with("text, \"xää"));
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic_or_show_hidden_characters(start in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300), bytes in 0_u64..1000) {
            if let Some(found) = recognize(&start, bytes) {
                assert!(!found.to_string().contains(printable::is_hidden));
            }
        }
    }
}
