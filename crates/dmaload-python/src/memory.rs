//! Memory that Python may write to: private memory from the library, or a copy.
//!
//! The memory is represented by its address. Once Python can access it, no Rust reference to its
//! bytes exists.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use dmaload::PrivateMemory;

use crate::errors::Failure;

/// The alignment that DLPack recommends, in bytes. No element type requires more.
const ALIGNMENT: usize = 256;

/// The memory of a tensor.
#[derive(Debug)]
pub(crate) enum Memory {
    /// Private memory of a loaded or attached image, without a copy.
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

    /// Copies the memory. If Python writes to it at the same time, the copy may mix old and new
    /// bytes.
    pub(crate) fn copy(&self) -> Result<Memory, Failure> {
        let copy = Copied::new(self.len())?;
        // SAFETY: both regions are mapped and `self.len()` bytes long, only this function has the
        // copy's address, and no reference to the bytes of either exists.
        unsafe { copy.address.as_ptr().copy_from_nonoverlapping(self.address().as_ptr(), self.len()) };
        Ok(Memory::Copied(copy))
    }
}

/// Memory from the global allocator.
#[derive(Debug)]
pub(crate) struct Copied {
    address: NonNull<u8>,
    layout: Layout,
}

// SAFETY: `Copied` owns its memory, which is not tied to a thread.
unsafe impl Send for Copied {}
// SAFETY: `&Copied` gives access only to the address and the length, which do not change.
unsafe impl Sync for Copied {}

impl Copied {
    fn new(bytes: usize) -> Result<Self, Failure> {
        let refused = || Failure::new("OutOfMemoryError", format!("cannot allocate {bytes} bytes for a tensor"));
        let layout = Layout::from_size_align(bytes, ALIGNMENT).map_err(|_| refused())?;
        if bytes == 0 {
            return Ok(Copied { address: NonNull::dangling(), layout });
        }
        // SAFETY: the layout's size is not 0.
        let address = unsafe { alloc_zeroed(layout) };
        NonNull::new(address).map(|address| Copied { address, layout }).ok_or_else(refused)
    }

    /// Allocates memory, and passes it to `fill`, which writes its bytes.
    pub(crate) fn filled(bytes: usize, fill: impl FnOnce(&mut [u8]) -> Result<(), Failure>) -> Result<Self, Failure> {
        let copy = Copied::new(bytes)?;
        // SAFETY: the memory consists of `bytes` zeroed bytes, and only this function has its
        // address.
        fill(unsafe { std::slice::from_raw_parts_mut(copy.address.as_ptr(), bytes) })?;
        Ok(copy)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: the memory was allocated with this layout, and is freed once.
            unsafe { dealloc(self.address.as_ptr(), self.layout) };
        }
    }
}
