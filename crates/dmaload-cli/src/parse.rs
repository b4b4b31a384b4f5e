//! Parsers shared by several arguments.

use bytesize::ByteSize;

/// Parses `START..END`. Both are parsed by [`bytes`].
pub(crate) fn range(text: &str) -> Result<(u64, u64), String> {
    let parsed = text.split_once("..").and_then(|(start, end)| Some((bytes(start).ok()?, bytes(end).ok()?)));
    parsed.filter(|(start, end)| start < end).ok_or_else(|| format!("invalid byte range {text:?}: write it like 1MiB..2MiB"))
}

/// Parses a size: a number with a unit, or a number of bytes.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    text.parse::<ByteSize>().map(|size| size.as_u64()).map_err(|_| format!("invalid size {text:?}: write it like 64MiB or 1GiB"))
}
