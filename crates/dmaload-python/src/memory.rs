//! Memory that Python may write to: the library's own, handed out, or a copy.
//!
//! It is known by its address alone. No reference to its bytes is made once Python can have it.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use dmaload::PrivateMemory;

use crate::errors::Failure;

/// What consumers of DLPack like best, and more than any element needs.
const ALIGNMENT: usize = 256;

/// See the module.
#[derive(Debug)]
pub(crate) enum Memory {
    /// Without a copy.
    Private(PrivateMemory),
    Copied(Copied),
}

impl Memory {
    pub(crate) fn address(&self) -> NonNull<u8> {
        match self {
            Memory::Private(memory) => memory.address(),
            Memory::Copied(memory) => memory.address,
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Memory::Private(memory) => memory.len(),
            Memory::Copied(memory) => memory.layout.size(),
        }
    }

    /// A copy of it. If Python writes to it meanwhile, bytes may be partly old and new.
    pub(crate) fn copy(&self) -> Result<Memory, Failure> {
        let copy = Copied::new(self.len())?;
        // SAFETY: both are mapped and have that many bytes, the copy is nobody else's, and no
        // reference to the bytes of either exists.
        unsafe { copy.address.as_ptr().copy_from_nonoverlapping(self.address().as_ptr(), self.len()) };
        Ok(Memory::Copied(copy))
    }
}

/// Memory of the allocator.
#[derive(Debug)]
pub(crate) struct Copied {
    address: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns its memory, which belongs to no thread.
unsafe impl Send for Copied {}
// SAFETY: as above; nothing shared is read or written through `&Copied`.
unsafe impl Sync for Copied {}

impl Copied {
    fn new(bytes: usize) -> Result<Self, Failure> {
        let refused = || Failure::new("OutOfMemoryError", format!("cannot allocate {bytes} bytes for a copy of a tensor"));
        let layout = Layout::from_size_align(bytes, ALIGNMENT).map_err(|_| refused())?;
        if bytes == 0 {
            return Ok(Copied { address: NonNull::dangling(), layout });
        }
        // SAFETY: the layout is not of size 0.
        let address = unsafe { alloc_zeroed(layout) };
        NonNull::new(address).map(|address| Copied { address, layout }).ok_or_else(refused)
    }

    /// Memory with the bytes that `fill` writes into it.
    pub(crate) fn filled(bytes: usize, fill: impl FnOnce(&mut [u8]) -> Result<(), Failure>) -> Result<Self, Failure> {
        let copy = Copied::new(bytes)?;
        // SAFETY: it is that long and zeroed, and known to this function alone until it returns.
        fill(unsafe { std::slice::from_raw_parts_mut(copy.address.as_ptr(), bytes) })?;
        Ok(copy)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: it was allocated with this layout, and is freed once.
            unsafe { dealloc(self.address.as_ptr(), self.layout) };
        }
    }
}
