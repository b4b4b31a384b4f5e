//! Checksums of loaded bytes.
//!
//! Four algorithms are supported, so users can verify against checksums that they already have:
//! `sha256`, which model hubs publish; `blake3`, which is also cryptographic and usually faster;
//! `crc32c`, which storage systems keep; and `xxh3`, which is fast and, like `crc32c`, detects
//! only accidental changes.

use std::fmt;
use std::hash::Hasher as _;
use std::str::FromStr;

use sha2::Digest as _;

/// A checksum algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Algorithm {
    /// SHA-256, as published by model hubs and printed by `sha256sum`.
    Sha256,
    /// BLAKE3, as printed by `b3sum`.
    Blake3,
    /// CRC-32C (Castagnoli), as used by iSCSI, ext4 and object stores.
    Crc32c,
    /// 64-bit XXH3, as printed by `xxhsum -H3`.
    Xxh3,
}

impl Algorithm {
    /// All algorithms.
    pub const ALL: [Algorithm; 4] = [Algorithm::Sha256, Algorithm::Blake3, Algorithm::Crc32c, Algorithm::Xxh3];

    /// The name used on the command line and in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Blake3 => "blake3",
            Self::Crc32c => "crc32c",
            Self::Xxh3 => "xxh3",
        }
    }

    /// The length of the algorithm's checksums, in bytes.
    pub fn digest_bytes(self) -> usize {
        match self {
            Self::Sha256 | Self::Blake3 => LONGEST,
            Self::Crc32c => 4,
            Self::Xxh3 => 8,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|algorithm| algorithm.name() == name);
        known.ok_or_else(|| {
            let [others @ .., last] = Self::ALL.map(Algorithm::name);
            format!("unknown checksum {name:?}: use {} or {last}", others.join(", "))
        })
    }
}

/// The length of the longest checksums, in bytes.
const LONGEST: usize = 32;

/// A finished checksum. It is displayed and parsed as `sha256:ba7816bf…`: the value in
/// hexadecimal, most significant digit first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest {
    algorithm: Algorithm,
    /// Zero beyond [`Algorithm::digest_bytes`].
    bytes: [u8; LONGEST],
}

impl Digest {
    /// Creates a digest from a value computed with this algorithm; `None` if the value has the
    /// wrong length.
    pub fn new(algorithm: Algorithm, value: &[u8]) -> Option<Self> {
        let mut bytes = [0; LONGEST];
        let used = bytes.get_mut(..algorithm.digest_bytes()).filter(|used| used.len() == value.len())?;
        used.copy_from_slice(value);
        Some(Digest { algorithm, bytes })
    }

    /// Creates a digest from hexadecimal digits in upper or lower case; `None` if `hex` is not a
    /// valid value for this algorithm.
    pub fn from_hex(algorithm: Algorithm, hex: &str) -> Option<Self> {
        let digit = |at: usize| hex.as_bytes().get(at).and_then(|&byte| char::from(byte).to_digit(16));
        let byte = |at: usize| u8::try_from(digit(2 * at)? << 4 | digit(2 * at + 1)?).ok();
        let value: Option<Vec<u8>> = (0..algorithm.digest_bytes()).map(byte).collect();
        value.filter(|value| hex.len() == 2 * value.len()).and_then(|value| Digest::new(algorithm, &value))
    }

    /// Returns the algorithm that the checksum was computed with.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Returns the checksum's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.algorithm.digest_bytes()).unwrap_or_default()
    }

    /// Returns the checksum in lower-case hexadecimal digits.
    pub fn hex(&self) -> String {
        self.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, hex) = text.split_once(':').ok_or_else(|| format!("invalid checksum {text:?}: write it like sha256:HEX"))?;
        let algorithm: Algorithm = name.parse()?;
        let digits = 2 * algorithm.digest_bytes();
        Digest::from_hex(algorithm, hex)
            .ok_or_else(|| format!("invalid checksum {hex:?}: a {algorithm} checksum has {digits} hexadecimal digits"))
    }
}

/// Computes the checksum of these bytes.
#[must_use]
pub fn digest(algorithm: Algorithm, bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::new(algorithm);
    hasher.update(bytes);
    hasher.finish()
}

/// Computes a checksum incrementally.
#[derive(Clone)]
pub struct Hasher(HasherState);

// Two of the states are large, so they are boxed. A new hasher costs at most one allocation.
#[derive(Clone)]
enum HasherState {
    Sha256(sha2::Sha256),
    Blake3(Box<blake3::Hasher>),
    Crc32c(u32),
    Xxh3(Box<twox_hash::XxHash3_64>),
}

impl Hasher {
    /// Creates a hasher that has seen no bytes.
    #[must_use]
    pub fn new(algorithm: Algorithm) -> Self {
        Self(match algorithm {
            Algorithm::Sha256 => HasherState::Sha256(sha2::Sha256::new()),
            Algorithm::Blake3 => HasherState::Blake3(Box::default()),
            Algorithm::Crc32c => HasherState::Crc32c(0),
            Algorithm::Xxh3 => HasherState::Xxh3(Box::default()),
        })
    }

    /// The algorithm.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        match self.0 {
            HasherState::Sha256(_) => Algorithm::Sha256,
            HasherState::Blake3(_) => Algorithm::Blake3,
            HasherState::Crc32c(_) => Algorithm::Crc32c,
            HasherState::Xxh3(_) => Algorithm::Xxh3,
        }
    }

    /// Adds the next bytes. It makes no difference how the bytes are split across calls.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            HasherState::Sha256(state) => state.update(bytes),
            HasherState::Blake3(state) => {
                state.update(bytes);
            }
            HasherState::Crc32c(crc) => *crc = crc32c::crc32c_append(*crc, bytes),
            HasherState::Xxh3(state) => state.write(bytes),
        }
    }

    /// Returns the checksum of all bytes that were added.
    #[must_use]
    pub fn finish(self) -> Digest {
        let algorithm = self.algorithm();
        let value = match self.0 {
            HasherState::Sha256(state) => Digest::new(algorithm, &state.finalize()),
            HasherState::Blake3(state) => Digest::new(algorithm, state.finalize().as_bytes()),
            HasherState::Crc32c(crc) => Digest::new(algorithm, &crc.to_be_bytes()),
            HasherState::Xxh3(state) => Digest::new(algorithm, &state.finish().to_be_bytes()),
        };
        value.expect("each value should have the length that its algorithm requires")
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hasher").field("algorithm", &self.algorithm()).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "test numbers are small")]
mod tests {
    use super::*;

    /// The vectors are from FIPS 180-2, the BLAKE3 reference vectors, RFC 3720 B.4 and the xxHash
    /// sanity checks.
    #[test]
    fn published_test_vectors_match() {
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
            assert_eq!(digest(algorithm, bytes).hex(), expected, "{algorithm} of {bytes:?}");
        }
    }

    #[test]
    fn call_boundaries_do_not_change_a_digest() {
        let bytes: Vec<u8> = (0..10_000_u32).map(|i| ((i * i) >> 3) as u8).collect();
        for &algorithm in &Algorithm::ALL {
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
            .map(|i| (i, digest(Algorithm::Crc32c, &i.to_le_bytes()).hex()))
            .find(|(_, hex)| hex.starts_with("00"))
            .expect("one in 256 checksums should begin with two zeros");
        assert_eq!(crc.len(), 8);
    }

    #[test]
    fn digest_round_trips_as_text() {
        for algorithm in Algorithm::ALL {
            assert_eq!(algorithm.to_string().parse(), Ok(algorithm));
            let value = digest(algorithm, b"123456789");
            assert_eq!(value.to_string().parse(), Ok(value));
            assert_eq!(Digest::from_hex(algorithm, &value.hex().to_uppercase()), Some(value));
        }
        assert_eq!(digest(Algorithm::Crc32c, b"123456789").to_string(), "crc32c:e3069283");
        for wrong in
            ["", "sha256", "sha256:", "crc32c:e306928", "crc32c:e30692833", "crc32c:+3069283", "crc32c:é306928", "md5:00"]
        {
            wrong.parse::<Digest>().unwrap_err();
        }
    }
}
