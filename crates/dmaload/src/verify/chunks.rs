//! Computes a file's checksums chunk by chunk, however its bytes are split when they arrive.

use super::digest::{Algorithm, Digest, Hasher};
use crate::support::convert::to_usize;

/// Computes the checksums of one file's chunks.
#[derive(Debug, Clone)]
pub(super) struct Chunks {
    hasher: Hasher,
    chunk_bytes: u64,
    /// Number of bytes seen so far.
    seen_bytes: u64,
}

impl Chunks {
    pub(super) fn new(algorithm: Algorithm, chunk_bytes: u64) -> Self {
        Chunks { hasher: Hasher::new(algorithm), chunk_bytes, seen_bytes: 0 }
    }

    pub(super) fn seen_bytes(&self) -> u64 {
        self.seen_bytes
    }

    /// Adds the file's next bytes, and calls `each` with the number and checksum of every chunk
    /// that they complete.
    pub(super) fn update<E>(&mut self, mut bytes: &[u8], mut each: impl FnMut(u64, Digest) -> Result<(), E>) -> Result<(), E> {
        while !bytes.is_empty() {
            let number = self.seen_bytes / self.chunk_bytes;
            let left = self.chunk_bytes - self.seen_bytes % self.chunk_bytes;
            let (part, rest) = bytes.split_at(to_usize(left.min(bytes.len() as u64)));
            self.hasher.update(part);
            self.seen_bytes += part.len() as u64;
            bytes = rest;
            if part.len() as u64 == left {
                each(number, self.take())?;
            }
        }
        Ok(())
    }

    /// Returns the index and checksum of the file's last chunk if it is shorter than the others.
    pub(super) fn finish(&mut self) -> Option<(u64, Digest)> {
        let number = self.seen_bytes / self.chunk_bytes;
        (!self.seen_bytes.is_multiple_of(self.chunk_bytes)).then(|| (number, self.take()))
    }

    fn take(&mut self) -> Digest {
        let algorithm = self.hasher.algorithm();
        std::mem::replace(&mut self.hasher, Hasher::new(algorithm)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::super::digest::digest;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_have_their_checksums_however_bytes_arrive(
            bytes in proptest::collection::vec(any::<u8>(), 0..2000),
            chunk in 1_usize..300,
            cuts in proptest::collection::vec(0_usize..2000, 0..8),
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut chunks = Chunks::new(Algorithm::Crc32c, chunk as u64);
            let mut seen = Vec::new();
            for part in cuts.windows(2) {
                let each = |number, digest| { seen.push((number, digest)); Ok::<(), ()>(()) };
                chunks.update(&bytes[part[0]..part[1]], each).unwrap();
            }
            seen.extend(chunks.finish());
            let expected = bytes.chunks(chunk).map(|chunk| digest(Algorithm::Crc32c, chunk));
            prop_assert_eq!(seen, (0..).zip(expected).collect::<Vec<_>>());
            prop_assert_eq!(chunks.seen_bytes(), bytes.len() as u64);
        }
    }
}
