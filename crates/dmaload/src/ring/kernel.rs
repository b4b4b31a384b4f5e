//! The kernel as the driver sees it: a small trait, implemented by the real kernel
//! ([`super::linux`]) and by simulated kernels in tests ([`super::sim`]).

use std::fmt::Debug;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::slots::Token;
use crate::memory::buffer::{Buffer, Fault, Place};
use crate::ring::watch::Watch;
use crate::route::Route;
use crate::support::id::LoadId;

/// A read from a file into memory.
#[derive(Debug, Clone)]
pub(crate) struct Read {
    pub(crate) token: Token,
    pub(crate) load: LoadId,
    pub(crate) route: Route,
    /// The entry of the registered buffer that contains `address`. Set only for
    /// [`Route::UringFixedDirect`].
    pub(crate) buffer_slot: Option<u16>,
    pub(crate) address: NonNull<u8>,
    pub(crate) bytes: usize,
    pub(crate) offset: u64,
    /// The place of `address`, if its memory has to be populated before it is written to. Set only
    /// for [`Route::Buffered`] and, if the file is in memory, for [`Route::PreadDirect`].
    pub(crate) place: Option<Place>,
}

/// A copy from a staging buffer to a place in a piece.
#[derive(Debug, Clone)]
pub(crate) struct StagedCopy {
    pub(crate) token: Token,
    pub(crate) from: NonNull<u8>,
    pub(crate) to: Place,
    pub(crate) bytes: usize,
}

/// Memory to populate while bytes for it are being read into staging.
#[derive(Debug, Clone)]
pub(crate) struct PopulateRequest {
    pub(crate) token: Token,
    pub(crate) place: Place,
    pub(crate) bytes: usize,
}

/// A copy of a file's bytes from the page cache to a place in a piece.
#[derive(Debug, Clone)]
pub(crate) struct CachedRead {
    pub(crate) token: Token,
    pub(crate) to: Place,
    pub(crate) bytes: usize,
    pub(crate) offset: u64,
}

/// A request to pass bytes to a load's observers.
#[derive(Debug, Clone)]
pub(crate) struct ObserveRequest {
    pub(crate) token: Token,
    pub(crate) watch: Arc<Watch>,
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) address: NonNull<u8>,
    pub(crate) bytes: usize,
}

/// The result of an operation: the number of bytes, or the error.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completion {
    pub(crate) token: Token,
    pub(crate) result: Result<usize, Fault>,
}

/// See the module documentation.
pub(crate) trait Kernel {
    /// A file to read from. Each clone keeps the file open.
    type File: Clone;
    /// The memory of a staging slot. It is populated.
    type Staging: Buffer;

    /// Returns the time since a fixed moment.
    fn now(&self) -> Duration;

    /// Returns the kernel's error if io_uring is not available. In that case, reads must not use
    /// routes that need a ring.
    fn ring(&self) -> Result<(), Errno>;

    /// Returns how many buffers can be registered at once.
    fn buffer_slots(&self) -> u16;

    /// Registers a buffer for [`Route::UringFixedDirect`], which pins its memory.
    fn register_buffer(&mut self, slot: u16, address: NonNull<u8>, bytes: usize) -> Result<(), Errno>;

    /// Unregisters a buffer, which unpins its memory. Must not be called while a read into it is
    /// in flight.
    fn unregister_buffer(&mut self, slot: u16);

    /// Announces reads from this file. Called once for each piece of the file.
    fn attach(&mut self, file: &Self::File);

    /// Undoes one call to [`Self::attach`]. Once all calls are undone, no read from this file is
    /// in flight, and none follows until the file is attached again.
    fn detach(&mut self, file: &Self::File);

    /// Queues a read.
    ///
    /// # Safety
    /// Until the read's completion is reaped, or forever if it never is: the `read.bytes` bytes at
    /// `read.address` stay valid for writes, and nothing else accesses them.
    #[allow(unsafe_code)]
    unsafe fn read(&mut self, file: &Self::File, read: Read);

    /// Cancels the reads of this load that have not started, if possible. Cancelled reads complete
    /// with an error.
    fn cancel(&mut self, _: LoadId) {}

    /// Allocates `bytes` bytes of populated memory that can be pinned.
    fn staging(&mut self, bytes: usize) -> Result<Self::Staging, Errno>;

    /// Copies on another thread, if one can be started (see [`Self::lacks_threads`]). Completes
    /// like a read. The only possible error is [`Fault::Memory`].
    ///
    /// # Safety
    /// Until the completion is reaped, or forever if it never is: source and target stay mapped
    /// for `copy.bytes` bytes and don't overlap, nothing writes to the source, and nothing else
    /// accesses the target.
    #[allow(unsafe_code)]
    unsafe fn copy(&mut self, copy: StagedCopy);

    /// Has another thread populate memory, usually once no copy is waiting for a thread. The
    /// place's buffer must stay allocated until the request completes. Other operations may use
    /// the same place in the meantime. Completes like a read; the only possible error is
    /// [`Fault::Memory`]. Once a copy to the same place is started, the request may complete
    /// without having populated anything, because the copy populates the memory, too.
    fn populate(&mut self, request: PopulateRequest);

    /// Sets how many threads may copy at the same time.
    fn set_copiers(&mut self, threads: usize);

    /// Copies from the page cache on another thread, without waiting for storage. Completes like a
    /// read. If the result is [`Fault::Read`] or fewer bytes than requested, the rest must be read
    /// from storage, usually because it was evicted.
    ///
    /// # Safety
    /// Until the completion is reaped, or forever if it never is: the place stays mapped for
    /// `read.bytes` bytes, and nothing else reads or writes it.
    #[allow(unsafe_code)]
    unsafe fn read_cached(&mut self, file: &Self::File, read: CachedRead);

    /// Runs the load's observers on another thread, never on this one. Completes like a read.
    /// After an error, [`Watch::verdict`] returns the reason.
    ///
    /// # Safety
    /// Until the completion is reaped, or forever if it never is, the bytes stay mapped and
    /// nothing writes to them. All of them are initialized.
    #[allow(unsafe_code)]
    unsafe fn observe(&mut self, request: ObserveRequest);

    /// Whether any copy was done or refused on this thread because no other thread could be
    /// started. No reads are issued while this thread copies.
    fn lacks_threads(&self) -> bool;

    /// Returns how many of the implementation's own threads are busy.
    fn busy_threads(&self) -> usize {
        0
    }

    /// Submits queued operations. With `wait`, blocks until a completion is available or the
    /// thread is woken. After an error, this kernel is unusable, and any queued operation may be
    /// in flight.
    fn submit(&mut self, wait: bool) -> Result<(), Errno>;

    /// Takes the completions that are available.
    fn reap(&mut self, into: &mut Vec<Completion>);
}
