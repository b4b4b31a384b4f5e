//! The contract between memory and whoever writes to it: a [`Buffer`] that the kernel may write into,
//! and a [`Sink`] that takes bytes from threads and brings its pages into being as they come.

use std::fmt::Debug;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::io::Errno;

/// Memory that the kernel may write into while reads are in flight.
///
/// # Safety
/// `address()` must stay the same and be valid for writes of `bytes()` bytes until the value is dropped, and
/// nobody may look at these bytes meanwhile.
#[allow(unsafe_code)]
pub(crate) unsafe trait Buffer {
    fn address(&self) -> NonNull<u8>;
    fn bytes(&self) -> usize;

    /// Whether all its pages are there, so that a device can write to it. What is not gets its bytes
    /// through [`Self::place`].
    fn is_populated(&self) -> bool;

    /// The way for threads to put bytes here, from `offset` on.
    fn place(&self, offset: usize) -> Place;

    /// Never frees the memory, since reads may write to it at any later time; lets go of everything else.
    fn leak(self);
}

/// Where threads put bytes: those that were read into staging, those in the page cache, and those of
/// reads without a ring.
///
/// A piece whose memory is not there yet has one that brings it into being, part by part, just before
/// it is written to, while both are in the processor's cache.
pub(crate) trait Sink: Debug + Send + Sync {
    /// Has `write` put bytes at `offset`, up to `bytes` of them. It gets parts of the place, in order,
    /// and says how many bytes it has written; with fewer than the part has, it is done.
    ///
    /// # Errors
    /// [`Fault::Memory`] when there is no memory; the sink keeps what is to be told of that.
    /// [`Fault::Read`] with what `write` answers, if nothing was written before.
    ///
    /// # Safety
    /// The place must be one that [`Buffer::place`] gave, and have room for that many bytes. Nobody
    /// else may look at that part of the buffer, or write to it, meanwhile.
    #[allow(unsafe_code)]
    unsafe fn fill(&self, offset: usize, bytes: usize, write: &mut Write<'_>) -> Result<usize, Fault>;

    /// Whether that runs code of the caller's, such as a heap.
    fn runs_foreign_code(&self) -> bool;
}

/// Puts bytes into a part of a place, and says how many.
pub(crate) type Write<'a> = dyn FnMut(&mut [MaybeUninit<u8>]) -> Result<usize, Errno> + 'a;

/// A place in a sink.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) sink: Arc<dyn Sink>,
    pub(crate) offset: usize,
}

/// Why bytes did not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The kernel's answer to the read.
    Read(Errno),
    /// There is no memory to put them into.
    Memory(Errno),
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Fault::Read(errno)
    }
}
