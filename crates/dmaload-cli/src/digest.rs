//! Checksums of what was loaded.
//!
//! Four, because people compare with what they have: `sha256` is what model hubs publish, `blake3` is the fast
//! cryptographic one, `crc32c` is what storage keeps, `xxh3` is the cheapest that still catches a swapped page.

use std::fmt;
use std::hash::Hasher as _;

use clap::ValueEnum;
use sha2::Digest as _;

/// Which checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub(crate) enum Algorithm {
    /// SHA-256, as published by model hubs and printed by `sha256sum`
    Sha256,
    /// BLAKE3, as printed by `b3sum`
    Blake3,
    /// CRC-32C (Castagnoli), as used by iSCSI, ext4 and object stores
    Crc32c,
    /// XXH3 with 64 bits, as printed by `xxhsum -H3`
    Xxh3,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Sha256 => "sha256",
            Self::Blake3 => "blake3",
            Self::Crc32c => "crc32c",
            Self::Xxh3 => "xxh3",
        })
    }
}

/// A finished checksum. Shown as `sha256:ba7816bf…`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Digest {
    /// What it was made with.
    pub(crate) algorithm: Algorithm,
    /// The value, most significant digit first, in lower case.
    pub(crate) hex: String,
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, self.hex)
    }
}

/// The checksum of bytes that are all there.
#[must_use]
pub(crate) fn digest(algorithm: Algorithm, bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::new(algorithm);
    hasher.update(bytes);
    hasher.finish()
}

/// A checksum in the making, for bytes that arrive segment by segment.
#[derive(Clone)]
pub(crate) struct Hasher(State);

// Two of the states are large, and there is one hasher per file: the boxes cost nothing.
#[derive(Clone)]
enum State {
    Sha256(sha2::Sha256),
    Blake3(Box<blake3::Hasher>),
    Crc32c(u32),
    Xxh3(Box<twox_hash::XxHash3_64>),
}

impl Hasher {
    /// A hasher that has seen nothing yet.
    #[must_use]
    pub(crate) fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Sha256 => State::Sha256(sha2::Sha256::new()),
            Algorithm::Blake3 => State::Blake3(Box::default()),
            Algorithm::Crc32c => State::Crc32c(0),
            Algorithm::Xxh3 => State::Xxh3(Box::default()),
        })
    }

    /// What it computes.
    #[must_use]
    pub(crate) fn algorithm(&self) -> Algorithm {
        match self.0 {
            State::Sha256(_) => Algorithm::Sha256,
            State::Blake3(_) => Algorithm::Blake3,
            State::Crc32c(_) => Algorithm::Crc32c,
            State::Xxh3(_) => Algorithm::Xxh3,
        }
    }

    /// Takes the next bytes; how they are cut makes no difference.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha256(state) => state.update(bytes),
            State::Blake3(state) => {
                state.update(bytes);
            }
            State::Crc32c(crc) => *crc = crc32c::crc32c_append(*crc, bytes),
            State::Xxh3(state) => state.write(bytes),
        }
    }

    /// The checksum of everything taken.
    #[must_use]
    pub(crate) fn finish(self) -> Digest {
        let algorithm = self.algorithm();
        let hex = match self.0 {
            State::Sha256(state) => hex(&state.finalize()),
            State::Blake3(state) => state.finalize().to_hex().to_string(),
            State::Crc32c(crc) => format!("{crc:08x}"),
            State::Xxh3(state) => format!("{:016x}", state.finish()),
        };
        Digest { algorithm, hex }
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hasher").field("algorithm", &self.algorithm()).finish_non_exhaustive()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "the numbers of a test are small")]
mod tests {
    use super::*;

    const ALL: &[Algorithm] = &[Algorithm::Sha256, Algorithm::Blake3, Algorithm::Crc32c, Algorithm::Xxh3];

    /// FIPS 180-2, the BLAKE3 reference vectors, RFC 3720 B.4 and the xxHash sanity checks.
    #[test]
    fn the_published_vectors() {
        let cases: &[(Algorithm, &[u8], &str)] = &[
            (Algorithm::Sha256, b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            (Algorithm::Sha256, b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (Algorithm::Blake3, b"", "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
            (Algorithm::Blake3, b"\0", "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"),
            (Algorithm::Crc32c, b"", "00000000"),
            (Algorithm::Crc32c, b"123456789", "e3069283"),
            (Algorithm::Crc32c, &[0; 32], "8a9136aa"),
            (Algorithm::Xxh3, b"", "2d06800538d394c2"),
            (Algorithm::Xxh3, b"abc", "78af5f94892f3950"),
        ];
        for &(algorithm, bytes, expected) in cases {
            assert_eq!(digest(algorithm, bytes).hex, expected, "{algorithm} of {bytes:?}");
        }
    }

    #[test]
    fn cuts_make_no_difference() {
        let bytes: Vec<u8> = (0..10_000_u32).map(|i| ((i * i) >> 3) as u8).collect();
        for &algorithm in ALL {
            let mut hasher = Hasher::new(algorithm);
            for piece in bytes.chunks(1021) {
                hasher.update(piece);
                hasher.update(&[]);
            }
            assert_eq!(hasher.finish(), digest(algorithm, &bytes), "{algorithm}");
        }
    }

    #[test]
    fn leading_zeros_are_kept() {
        let (_, crc) = (0..10_000_u32)
            .map(|i| (i, digest(Algorithm::Crc32c, &i.to_le_bytes()).hex))
            .find(|(_, hex)| hex.starts_with("00"))
            .expect("one in 256 begins with two zeros");
        assert_eq!(crc.len(), 8);
    }

    #[test]
    fn shown_with_the_name_that_the_command_line_takes() {
        for &algorithm in ALL {
            let on_the_command_line = algorithm.to_possible_value().expect("no variant is hidden");
            assert_eq!(algorithm.to_string(), on_the_command_line.get_name());
        }
        assert_eq!(digest(Algorithm::Crc32c, b"123456789").to_string(), "crc32c:e3069283");
    }
}
