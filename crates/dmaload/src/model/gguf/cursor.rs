//! A cursor over the beginning of a file. An attempt to read past the end of the available bytes
//! reports how many bytes are needed.

use std::ops::Range;

use crate::model::error::ModelError;
use crate::model::limits::HEADER_LIMIT_BYTES;
use crate::support::convert::to_usize;

/// Why reading stopped.
#[derive(Debug)]
pub(super) enum Stop {
    /// More of the file is needed: at least this many bytes from its beginning.
    More(u64),
    Fault(ModelError),
}

#[derive(Debug)]
pub(super) struct Cursor<'a> {
    start: &'a [u8],
    position: usize,
    file_bytes: u64,
}

/// Maximum length of a key or a tensor's name in bytes. The GGUF specification sets this limit for
/// keys.
const TEXT_LIMIT_BYTES: u64 = (1 << 16) - 1;

impl<'a> Cursor<'a> {
    pub(super) fn new(start: &'a [u8], file_bytes: u64) -> Self {
        Cursor { start, position: 0, file_bytes }
    }

    /// Returns the offset of the next byte to read.
    pub(super) fn position(&self) -> u64 {
        self.position as u64
    }

    pub(super) fn already_read(&self, range: Range<u64>) -> &'a [u8] {
        self.start.get(to_usize(range.start)..to_usize(range.end)).expect("the cursor must have passed this range")
    }

    pub(super) fn fault(&self, offset: u64, reason: impl Into<String>) -> Stop {
        Stop::Fault(ModelError::Gguf { offset, reason: reason.into() })
    }

    /// Reads the next `bytes` bytes. Error messages refer to them as `what`.
    pub(super) fn bytes(&mut self, bytes: u64, what: &'static str) -> Result<&'a [u8], Stop> {
        let at = self.position();
        let Some(end) = at.checked_add(bytes) else {
            return Err(self.fault(at, format!("{what} has a declared length of {bytes} bytes, which is larger than any file")));
        };
        if let Some(missing) = end.checked_sub(self.file_bytes).filter(|&missing| missing > 0) {
            let file_bytes = self.file_bytes;
            return Err(Stop::Fault(ModelError::GgufCutShort { offset: at, part: what, missing, file_bytes }));
        }
        if end > HEADER_LIMIT_BYTES {
            return Err(Stop::Fault(ModelError::GgufHeaderTooLarge { limit_bytes: HEADER_LIMIT_BYTES }));
        }
        let end = to_usize(end);
        let found = self.start.get(self.position..end).ok_or(Stop::More(end as u64))?;
        self.position = end;
        Ok(found)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Stop> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N as u64, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, Stop> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, Stop> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// Reads a string, which must be UTF-8 and at most [`TEXT_LIMIT_BYTES`] long.
    pub(super) fn text(&mut self, what: &'static str) -> Result<&'a str, Stop> {
        let at = self.position();
        let bytes = self.u64(what)?;
        if bytes > TEXT_LIMIT_BYTES {
            return Err(self.fault(at, format!("{what} has {bytes} bytes, more than the limit of {TEXT_LIMIT_BYTES}")));
        }
        let found = self.bytes(bytes, what)?;
        str::from_utf8(found).map_err(|_| self.fault(at, format!("{what} is not UTF-8")))
    }
}
