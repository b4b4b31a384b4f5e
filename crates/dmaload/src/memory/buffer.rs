//! The contract between memory and its writers: a [`Buffer`] that the kernel may write to, and a
//! [`Sink`] that takes bytes from threads and populates its memory as they arrive.

use std::fmt::Debug;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::io::Errno;

/// Memory that the kernel may write into while reads are in flight.
///
/// # Safety
/// `address()` must not change and must be valid for writes of `bytes()` bytes until the value is
/// dropped, and nothing may access these bytes during that time.
#[allow(unsafe_code)]
pub(crate) unsafe trait Buffer {
    fn address(&self) -> NonNull<u8>;
    fn bytes(&self) -> usize;

    /// Never frees the memory, since reads may still write to it; drops everything else.
    fn leak(self);
}

/// Memory of a piece, where bytes of a file stay, unlike in staging.
pub(crate) trait PieceMemory: Buffer {
    /// Whether all its pages are present, so that a device can write to it. Otherwise bytes are
    /// written through [`Self::place`].
    fn is_populated(&self) -> bool;

    /// Where threads write bytes, starting at `offset`.
    fn place(&self, offset: usize) -> Place;
}

/// Where threads write bytes: those read into staging, those found in the page cache, and those
/// read without a ring.
///
/// The sink of a piece that is not populated yet populates it part by part, each just before it is
/// written, while both are in the processor's cache.
pub(crate) trait Sink: Debug + Send + Sync {
    /// Has `write` produce up to `bytes` bytes at `offset`. It is called for consecutive parts of
    /// the place, and returns how many bytes it has written; returning less than the part's length
    /// ends the call.
    ///
    /// # Errors
    /// [`Fault::Memory`] when there is no memory; the sink keeps the details. [`Fault::Read`] with
    /// the error of `write`, if nothing was written before.
    ///
    /// # Safety
    /// The place must come from [`PieceMemory::place`] and have room for `bytes` bytes. Nothing
    /// else may read or write that part of the buffer during the call.
    #[allow(unsafe_code)]
    unsafe fn fill_with(&self, offset: usize, bytes: usize, write: &mut Write<'_>) -> Result<usize, Fault>;

    /// Whether writing runs the caller's code, such as a heap.
    fn runs_foreign_code(&self) -> bool;
}

/// Writes bytes to a part of a place, and returns how many.
pub(crate) type Write<'a> = dyn FnMut(&mut [MaybeUninit<u8>]) -> Result<usize, Errno> + 'a;

/// A place in a sink.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) sink: Arc<dyn Sink>,
    pub(crate) offset: usize,
}

/// Why bytes could not be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The errno of the read.
    Read(Errno),
    /// There is no memory for them.
    Memory(Errno),
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Fault::Read(errno)
    }
}
