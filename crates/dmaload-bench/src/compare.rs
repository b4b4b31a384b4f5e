//! Compares memory with a file, or with other memory.

use std::io::{self, Read};

/// How many bytes are read from the file at a time.
const BLOCK: usize = 1 << 20;

/// How memory differs from the file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Difference {
    /// The first byte that differs.
    #[error("byte {offset} is {found:#04x}, expected {expected:#04x}")]
    Byte {
        /// Offset in the file.
        offset: u64,
        /// The byte in the file.
        expected: u8,
        /// The byte in memory.
        found: u8,
    },
    /// The lengths differ.
    #[error("{found} bytes were loaded from a file that has {}", if *.more { "more" } else { "fewer" })]
    Length {
        /// Number of bytes in memory.
        found: u64,
        /// Whether the file is longer than the loaded data.
        more: bool,
    },
    /// The file could not be read again for the comparison.
    #[error("cannot read the file again: {0}")]
    Unreadable(#[from] io::Error),
}

/// Returns the index of the first byte that differs, up to the end of the shorter slice. Equal
/// bytes, the usual case, are compared at memory speed.
#[must_use]
pub fn first_difference(expected: &[u8], found: &[u8]) -> Option<usize> {
    let len = expected.len().min(found.len());
    if expected[..len] == found[..len] {
        return None;
    }
    expected.iter().zip(found).position(|(expected, found)| expected != found)
}

/// Compares a whole file with memory.
///
/// # Errors
/// The first difference, or the error from reading the file.
pub(crate) fn compare(mut file: impl Read, memory: &[u8]) -> Result<(), Difference> {
    let mut block = vec![0; BLOCK];
    let mut done = 0;
    loop {
        let count = match file.read(&mut block) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        let (read, rest) = (block.get(..count).unwrap_or_default(), memory.get(done..).unwrap_or_default());
        let found = rest.get(..count.min(rest.len())).unwrap_or_default();
        if let Some(at) = first_difference(read, found) {
            let byte = |bytes: &[u8]| bytes.get(at).copied().unwrap_or_default();
            return Err(Difference::Byte { offset: (done + at) as u64, expected: byte(read), found: byte(found) });
        }
        match (count, rest.len()) {
            (0, 0) => return Ok(()),
            (count, left) if count == 0 || count > left => {
                return Err(Difference::Length { found: memory.len() as u64, more: count > 0 });
            }
            _ => done += count,
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test values are small")]
mod tests {
    use super::*;

    fn content() -> Vec<u8> {
        (0..BLOCK as u32 * 2 + 77).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    #[test]
    fn equal_bytes_compare_equal() {
        compare(&*content(), &content()).unwrap();
        compare(&[][..], &[]).unwrap();
    }

    #[test]
    fn wrong_byte_is_found_at_any_offset() {
        for at in [0, BLOCK - 1, BLOCK, 2 * BLOCK + 76] {
            let mut memory = content();
            memory[at] ^= 0x10;
            let error = compare(&*content(), &memory).unwrap_err();
            assert!(
                matches!(error, Difference::Byte { offset, expected, found } if offset == at as u64 && expected ^ found == 0x10)
            );
        }
    }

    #[test]
    fn first_difference_lies_within_the_shorter_slice() {
        assert_eq!(first_difference(b"abcd", b"abXd"), Some(2));
        for (left, right) in [("abc", "abcX"), ("abcX", "abc"), ("", "abc"), ("", "")] {
            assert_eq!(first_difference(left.as_bytes(), right.as_bytes()), None, "{left:?}, {right:?}");
        }
    }

    #[test]
    fn difference_in_length_is_found() {
        let content = content();
        let error = compare(&*content, &content[..content.len() - 1]).unwrap_err();
        assert_eq!(error.to_string(), format!("{} bytes were loaded from a file that has more", content.len() - 1));
        let error = compare(&content[..BLOCK], &content).unwrap_err();
        assert!(matches!(error, Difference::Length { more: false, .. }));
    }
}
