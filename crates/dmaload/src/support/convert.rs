//! Numbers that are known to fit.

/// A length or an offset in memory that was planned, reserved or read.
///
/// # Panics
/// On a machine of 32 bits when it does not fit: an address range of that length was reserved, so it does.
pub(crate) fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a length in memory fits into the address space")
}
