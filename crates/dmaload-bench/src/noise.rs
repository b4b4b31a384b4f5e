//! Bytes that lower layers of storage can neither compress nor deduplicate.

/// Fills memory with the output of a xorshift64 generator. The last bytes, fewer than eight, stay
/// unchanged. An even seed gives the same bytes as the odd seed after it.
pub fn fill_with_noise(bytes: &mut [u8], seed: u64) {
    // The state must not be 0.
    let mut state = seed | 1;
    for word in bytes.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn words_do_not_repeat_and_depend_on_the_seed() {
        let [mut zero, mut two] = [vec![0; 1 << 16], vec![0; 1 << 16]];
        fill_with_noise(&mut zero, 0);
        fill_with_noise(&mut two, 2);
        let words = zero.chunks(8).chain(two.chunks(8)).collect::<HashSet<_>>();
        assert_eq!(words.len(), 2 * (1 << 16) / 8);
    }
}
