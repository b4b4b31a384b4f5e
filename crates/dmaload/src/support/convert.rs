//! Conversions of integers that are known to fit into the other type.

/// Converts a length or an offset that is known to fit into memory, for example because an address
/// range of that length was reserved.
///
/// # Panics
/// If `bytes` does not fit into `usize`, which can happen only on a 32-bit machine.
pub(crate) fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a length in memory fits into the address space")
}
