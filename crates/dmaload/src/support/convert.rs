//! Conversions that are known to fit.

/// Converts a length or an offset in memory that was planned, reserved or read.
///
/// # Panics
/// If it does not fit, which can happen only on a 32-bit machine. It fits if an address range of
/// that length was reserved.
pub(crate) fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a length in memory fits into the address space")
}
