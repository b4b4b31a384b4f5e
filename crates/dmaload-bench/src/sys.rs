//! Reads into a region with io_uring, and gives access to the region's bytes. This requires unsafe
//! code.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode, types};

use crate::memory::Region;

/// A read to submit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Read<'a> {
    pub(crate) file: &'a File,
    pub(crate) offset: u64,
    /// Offset in the region.
    pub(crate) at: usize,
    /// Length of the read, which must not cross a boundary between parts of the region.
    pub(crate) bytes: usize,
    /// A number that is returned with the completion.
    pub(crate) token: u64,
}

/// A ring and the memory that it reads into, which can't be accessed until
/// [`Reader::into_region`] returns it.
pub(crate) struct Reader {
    ring: ManuallyDrop<IoUring>,
    region: ManuallyDrop<Region>,
    /// Why the memory is not registered with the ring, or `None` if it is registered.
    refusal: Option<io::Error>,
    in_flight: usize,
}

impl Reader {
    /// Creates a ring for `depth` reads into this memory, and registers the memory with the ring
    /// unless the kernel refuses, for example because of the locked memory limit.
    ///
    /// # Errors
    /// If io_uring is not available.
    pub(crate) fn new(depth: u32, region: Region) -> io::Result<Self> {
        let ring = IoUring::new(depth)?;
        let vectors: Vec<libc::iovec> = region
            .parts()
            .map(|(mapping, _)| libc::iovec { iov_base: mapping.address().as_ptr().cast(), iov_len: mapping.bytes() })
            .collect();
        // SAFETY: the memory stays mapped as long as the ring exists: `finish` closes the ring
        // before it returns the region, or leaks both.
        let refusal = unsafe { ring.submitter().register_buffers(&vectors) }.err();
        Ok(Reader { ring: ManuallyDrop::new(ring), region: ManuallyDrop::new(region), refusal, in_flight: 0 })
    }

    /// Returns why the kernel refused to register the memory, or `None` if it is registered.
    pub(crate) fn registration_error(&self) -> Option<&io::Error> {
        self.refusal.as_ref()
    }

    /// Queues a read, which [`Reader::wait`] then submits.
    ///
    /// # Errors
    /// If the read is not within one part of the memory, or the queue is full.
    pub(crate) fn push(&mut self, read: Read<'_>) -> io::Result<()> {
        let place = self.region.place(read.at, read.bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let length = u32::try_from(read.bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        let (fd, address) = (types::Fd(read.file.as_raw_fd()), place.address.as_ptr());
        let entry = if self.refusal.is_none() {
            opcode::ReadFixed::new(fd, address, length, place.part).offset(read.offset).build()
        } else {
            opcode::Read::new(fd, address, length).offset(read.offset).build()
        };
        // SAFETY: `Region::place` has checked that the range is within a part of the region, which
        // is mapped and writable. `self` owns the region, accesses no bytes of it, and returns or
        // frees it only after every read has completed (`finish`). If the file is closed before
        // the read starts, another file's bytes may end up in the region, which is safe.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(read.token)) };
        pushed.map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
        self.in_flight += 1;
        Ok(())
    }

    /// Submits the queued reads, waits for at least one completion, and appends all available
    /// completions to `results`.
    ///
    /// # Errors
    /// If the ring can't be entered.
    pub(crate) fn wait(&mut self, results: &mut Vec<(u64, io::Result<usize>)>) -> io::Result<()> {
        match self.ring.submit_and_wait(usize::from(self.in_flight > 0)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        for entry in self.ring.completion() {
            let result = usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
            results.push((entry.user_data(), result));
            self.in_flight -= 1;
        }
        Ok(())
    }

    /// Waits for all reads, closes the ring and returns the memory. If waiting fails, leaks the
    /// ring and the memory, and returns `None`.
    pub(crate) fn into_region(self) -> Option<Region> {
        let mut this = ManuallyDrop::new(self);
        this.finish()
    }

    fn finish(&mut self) -> Option<Region> {
        let mut ignored = Vec::new();
        while self.in_flight > 0 {
            // Closing a ring does not end its reads, so the memory must stay mapped until they
            // have completed.
            self.wait(&mut ignored).ok()?;
            ignored.clear();
        }
        // SAFETY: `finish` is called once, by `drop` or by `into_region`, which prevents the drop.
        // The ring is not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.ring) };
        // SAFETY: `finish` is called once, and the region is not used afterwards.
        Some(unsafe { ManuallyDrop::take(&mut self.region) })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        drop(self.finish());
    }
}

/// Returns the region's bytes.
#[cfg(test)]
pub(crate) fn bytes(region: &Region) -> &[u8] {
    // SAFETY: the parts are adjacent, mapped and readable as long as the region exists. Nothing
    // writes to the region: a `Reader` owns the region that it reads into, and `bytes_mut` borrows
    // exclusively.
    unsafe { std::slice::from_raw_parts(region.address().as_ptr(), region.bytes()) }
}

/// Returns the region's bytes, mutably.
pub(crate) fn bytes_mut(region: &mut Region) -> &mut [u8] {
    // SAFETY: the parts are adjacent, mapped and writable as long as the region exists. The region
    // is borrowed exclusively, no `Reader` owns it, and its descriptors are never shared.
    unsafe { std::slice::from_raw_parts_mut(region.address().as_ptr(), region.bytes()) }
}
