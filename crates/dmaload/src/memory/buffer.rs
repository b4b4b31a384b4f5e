//! The contract between memory and its writers. The kernel may write to a [`Buffer`]. Threads
//! write to a [`Sink`], which populates its memory as the bytes arrive.

use std::fmt::Debug;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::io::Errno;

/// Memory that the kernel may write to while reads are in flight.
///
/// # Safety
/// `address()` must not change and must be valid for writes of `bytes()` bytes until the value is
/// dropped. Until then, only the value's owner, and those to whom the owner passes its address or
/// its [`Place`], may access these bytes.
#[allow(unsafe_code)]
pub(crate) unsafe trait Buffer {
    fn address(&self) -> NonNull<u8>;
    fn bytes(&self) -> usize;

    /// Leaks the memory, because reads in flight may still write to it; drops everything else.
    fn leak(self);
}

/// The memory of a piece. Unlike staging, it keeps the file's bytes.
pub(crate) trait PieceMemory: Buffer {
    /// Whether all pages are present, so a device can write to the memory. If not, threads write
    /// the bytes through [`Self::place`].
    fn is_populated(&self) -> bool;

    /// Returns the place for threads to write to, starting at `offset`.
    fn place(&self, offset: usize) -> Place;
}

/// Receives bytes from threads. The bytes are copied from staging or from the page cache, or are
/// read without a ring.
///
/// If the piece is not populated yet, its sink populates each extent on request, or at the latest
/// just before bytes are written there, so the new pages are still in the CPU cache.
pub(crate) trait Sink: Debug + Send + Sync {
    /// Calls `write` for consecutive parts of the `bytes` bytes at `offset`, and returns how many
    /// bytes were written. If `write` returns less than a part's length, no further parts are
    /// written.
    ///
    /// # Errors
    /// [`Fault::Memory`] if memory can't be allocated; the sink keeps the details. [`Fault::Read`]
    /// with the error of `write`, if nothing was written before the error.
    ///
    /// # Safety
    /// This sink and `offset` must come from [`PieceMemory::place`], and the piece must have room
    /// for `bytes` bytes there. Nothing else may read or write these bytes during the call, except
    /// through [`Self::populate`].
    #[allow(unsafe_code)]
    unsafe fn fill_with(&self, offset: usize, bytes: usize, write: &mut Write<'_>) -> Result<usize, Fault>;

    /// Populates the extents that contain the `bytes` bytes at `offset`, unless they are populated
    /// already, or another thread is populating them. May be called while others write to the same
    /// place.
    ///
    /// # Errors
    /// [`Fault::Memory`] if memory can't be allocated; the sink keeps the details.
    fn populate(&self, offset: usize, bytes: usize) -> Result<(), Fault>;

    /// Whether writing runs code of the library's caller, such as a heap.
    fn runs_foreign_code(&self) -> bool;
}

/// Writes bytes to a part of a place, and returns how many it wrote.
pub(crate) type Write<'a> = dyn FnMut(&mut [MaybeUninit<u8>]) -> Result<usize, Errno> + 'a;

/// A position in a sink to write to.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) sink: Arc<dyn Sink>,
    pub(crate) offset: usize,
}

/// Why bytes could not be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The bytes could not be read.
    Read(Errno),
    /// Memory could not be allocated.
    Memory(Errno),
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Fault::Read(errno)
    }
}
