//! Copies that leave their destination out of the processor's cache.
//!
//! Nothing looks at what was copied until its segment is finished, by when it has left the cache
//! anyway. An ordinary store would push out the staging that the next read goes into.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

/// Copies all of `from` to the beginning of `to`.
///
/// # Panics
/// When `to` is shorter.
pub(super) fn copy(from: &[u8], to: &mut [MaybeUninit<u8>]) {
    assert!(from.len() <= to.len(), "{} bytes do not fit into {}", from.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx") {
        let streamed = from.len() / LINE_BYTES * LINE_BYTES;
        if to.as_ptr().addr().is_multiple_of(LINE_BYTES) && streamed > 0 {
            // SAFETY: the processor has AVX; both have `streamed` bytes, by the assertion, which is a
            // multiple of a line; the destination is aligned, and apart from the source, since it is
            // borrowed mutably.
            unsafe { stream(from.as_ptr(), to.as_mut_ptr().cast(), streamed) };
            return plain(from.get(streamed..).unwrap_or_default(), to.get_mut(streamed..).unwrap_or_default());
        }
    }
    plain(from, to);
}

fn plain(from: &[u8], to: &mut [MaybeUninit<u8>]) {
    to.get_mut(..from.len()).expect("there is room").write_copy_of_slice(from);
}

#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;

/// # Safety
/// The processor has AVX. Both pointers are valid for `bytes` bytes, a multiple of [`LINE_BYTES`],
/// which do not overlap; `to` is a multiple of it, too.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn stream(from: *const u8, to: *mut u8, bytes: usize) {
    use std::arch::x86_64::{__m256i, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};

    for at in (0..bytes).step_by(LINE_BYTES) {
        let (from, to) = (from.wrapping_add(at).cast::<__m256i>(), to.wrapping_add(at).cast::<__m256i>());
        // SAFETY: a line from `at` on is within the source.
        let first = unsafe { _mm256_loadu_si256(from) };
        // SAFETY: as above.
        let second = unsafe { _mm256_loadu_si256(from.wrapping_add(1)) };
        // SAFETY: a line from `at` on is within the destination, and aligned.
        unsafe { _mm256_stream_si256(to, first) };
        // SAFETY: as above.
        unsafe { _mm256_stream_si256(to.wrapping_add(1), second) };
    }
    // Streaming stores are ordered with nothing; whoever is told of this copy must see it.
    _mm_sfence();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_any_length_and_alignment_are_exact() {
        let from: Vec<u8> = (0..1000_u32).map(|at| (at * 7 % 251) as u8).collect();
        for (start, bytes) in (0..70).flat_map(|start| [0, 1, 63, 64, 65, 127, 128, 500, 900].map(|bytes| (start, bytes))) {
            let mut to = vec![MaybeUninit::new(0xEE_u8); 1100];
            copy(&from[start..start + bytes], &mut to[start..]);
            // SAFETY: all of it was initialised above.
            let to: Vec<u8> = to.iter().map(|byte| unsafe { byte.assume_init() }).collect();
            assert_eq!(to[start..start + bytes], from[start..start + bytes], "{bytes} bytes to {start}");
            assert!(to[..start].iter().chain(&to[start + bytes..]).all(|&byte| byte == 0xEE), "nothing beside them");
        }
    }
}
