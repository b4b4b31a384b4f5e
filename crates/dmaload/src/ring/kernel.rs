//! The kernel as the driver sees it: a small trait with two implementations, the real one ([`super::linux`]) and
//! the seeded simulator ([`super::sim`]).

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

/// One read.
#[derive(Debug, Clone)]
pub(crate) struct Read {
    pub(crate) token: Token,
    /// Whose it is.
    pub(crate) load: LoadId,
    pub(crate) route: Route,
    /// The registered buffer that `address` lies in; only for [`Route::UringFixedDirect`].
    pub(crate) buffer_slot: Option<u16>,
    pub(crate) address: NonNull<u8>,
    pub(crate) bytes: usize,
    pub(crate) offset: u64,
    /// What `address` is, where its memory is to be brought into being first; only for
    /// [`Route::Buffered`].
    pub(crate) place: Option<Place>,
}

/// A copy from a staging buffer to where its bytes belong.
#[derive(Debug, Clone)]
pub(crate) struct StagedCopy {
    pub(crate) token: Token,
    pub(crate) from: NonNull<u8>,
    pub(crate) to: Place,
    pub(crate) bytes: usize,
}

/// A copy of what the page cache has of a file.
#[derive(Debug, Clone)]
pub(crate) struct CachedRead {
    pub(crate) token: Token,
    pub(crate) to: Place,
    pub(crate) bytes: usize,
    pub(crate) offset: u64,
}

/// Bytes that are there, to be looked at.
#[derive(Debug, Clone)]
pub(crate) struct Look {
    pub(crate) token: Token,
    pub(crate) watch: Arc<Watch>,
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) address: NonNull<u8>,
    pub(crate) bytes: usize,
}

/// What became of a read, a copy or a look: the bytes that came, or the error.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completion {
    pub(crate) token: Token,
    pub(crate) result: Result<usize, Fault>,
}

pub(crate) trait Kernel {
    /// A file that can be read from, kept open by every clone.
    type File: Clone;
    /// Memory that any read can go into, for [`Route::Bounce`].
    type Staging: Buffer;

    /// Time since some fixed moment.
    fn now(&self) -> Duration;

    /// Why there is no io_uring; reads by its routes are not allowed then.
    fn ring(&self) -> Result<(), Errno>;

    /// How many buffers can be registered at once.
    fn buffer_slots(&self) -> u16;

    /// Pins memory for [`Route::UringFixedDirect`].
    fn register_buffer(&mut self, slot: u16, address: NonNull<u8>, bytes: usize) -> Result<(), Errno>;

    /// Unpins it. No read into it is in flight.
    fn unregister_buffer(&mut self, slot: u16);

    /// Reads from this file are about to come.
    fn attach(&mut self, file: &Self::File);

    /// No read from this file is in flight, and none comes before it is attached again.
    fn detach(&mut self, file: &Self::File);

    /// Queues a read.
    ///
    /// # Safety
    /// The memory at `read.address` must stay valid for writes until the read's completion was reaped, or for
    /// ever if that never comes.
    #[allow(unsafe_code)]
    unsafe fn read(&mut self, file: &Self::File, read: Read);

    /// Takes back those reads of this load that were not begun. Their completions come like those
    /// of others, with an error.
    fn cancel(&mut self, _: LoadId) {}

    /// Memory of `bytes` bytes that can be pinned, with its pages there.
    fn staging(&mut self, bytes: usize) -> Result<Self::Staging, Errno>;

    /// Has some other thread copy. Its completion comes like that of a read; its only error is
    /// [`Fault::Memory`].
    ///
    /// # Safety
    /// Until the completion was reaped, or for ever if that never comes: both places stay mapped for `bytes` bytes, they
    /// don't overlap, nobody writes to the first one, and nobody looks at the second one.
    #[allow(unsafe_code)]
    unsafe fn copy(&mut self, copy: StagedCopy);

    /// From now on at most so many threads copy at once.
    fn set_copiers(&mut self, threads: usize);

    /// Has some other thread copy what the page cache has, without waiting for storage. Its completion
    /// comes like that of a read. With fewer bytes than asked for, or [`Fault::Read`], the rest has gone
    /// from the cache.
    ///
    /// # Safety
    /// Until the completion was reaped, or for ever if that never comes: the place stays mapped for that
    /// many bytes, and nobody looks at it, or writes to it.
    #[allow(unsafe_code)]
    unsafe fn read_cached(&mut self, file: &Self::File, read: CachedRead);

    /// Has some other thread look, and never this one. Its completion comes like that of a read; after an error the
    /// watch has the verdict.
    ///
    /// # Safety
    /// Until the completion was reaped, or for ever if that never comes, the bytes stay mapped, and nobody writes to them. All
    /// of them are initialised.
    #[allow(unsafe_code)]
    unsafe fn look(&mut self, look: Look);

    /// Whether copies were done by this thread itself, because no other could be had: reads wait for them.
    fn is_alone(&self) -> bool;

    /// Threads of its own that are at something now.
    fn busy_threads(&self) -> usize {
        0
    }

    /// Hands what is queued to the kernel. With `wait`, returns when there is a completion, or somebody wakes the
    /// thread. An error means that this kernel can't be used any more; what was queued may be in flight.
    fn submit(&mut self, wait: bool) -> Result<(), Errno>;

    /// Takes the completions that have come.
    fn reap(&mut self, into: &mut Vec<Completion>);
}
