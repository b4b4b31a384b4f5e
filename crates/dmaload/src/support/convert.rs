//! Conversions between integer types, for values that are known to fit.

/// Converts a length or an offset that is known to fit into memory, for example because an address
/// range of that length was reserved.
///
/// # Panics
/// If `bytes` does not fit into `usize`, which can happen only on a 32-bit machine.
pub(crate) fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("the length or offset should fit into the address space")
}
