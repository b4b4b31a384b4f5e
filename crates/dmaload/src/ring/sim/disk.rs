//! The files of the simulated disk, and their faults.

use std::ops::Range;
use std::rc::Rc;

use rustix::io::Errno;

/// The size of a block of the simulated disk, and the alignment of direct reads, in bytes.
pub(super) const BLOCK: u64 = 4096;
/// The byte that fills memory before anything is read into it. No file contains this byte.
pub(super) const POISON: u8 = 0xEE;
/// The byte that a device writes between the end of a file and the end of its last block.
pub(super) const BEYOND_END: u8 = 0xBB;

/// A file whose bytes are computed from its number.
#[derive(Debug, Clone)]
pub(super) struct SimFile {
    pub(super) number: u64,
    /// The length on disk, which may differ from the planned length.
    pub(super) bytes: u64,
    pub(super) faults: Rc<FileFaults>,
}

#[derive(Debug, Default)]
pub(super) struct FileFaults {
    /// A range that can't be read. Reads that overlap it fail with this error.
    pub(super) bad: Option<(Range<u64>, Errno)>,
    /// The error with which every direct read fails.
    pub(super) no_direct: Option<Errno>,
    /// The error with which every read through io_uring fails.
    pub(super) no_ring: Option<Errno>,
    /// Whether reads from the file never complete.
    pub(super) hangs: bool,
}

impl SimFile {
    pub(super) fn byte(&self, offset: u64) -> u8 {
        byte_of(self.number, offset)
    }
}

/// The byte at `offset` in the file with this number. It is neither zero nor poison, so zeroed
/// memory and memory that was never written to are not mistaken for a file's bytes.
pub(super) fn byte_of(number: u64, offset: u64) -> u8 {
    let mixed = (offset ^ number << 40).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    let byte = (mixed & 0xFF) as u8;
    if byte == POISON || byte == 0 { 0x11 } else { byte }
}
