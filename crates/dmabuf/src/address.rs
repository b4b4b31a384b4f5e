//! Reserved address ranges and the mappings placed in them.
//!
//! Separate memfds or dma-bufs can be mapped side by side in one reserved range, so data that
//! crosses a boundary between them is still contiguous in memory. The range tracks its mappings,
//! which therefore never overlap. When a mapping is dropped, its addresses are reserved again, so
//! no unrelated mapping can land there.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::{Error, HUGE_PAGE_BYTES, Memfd, Memory, page_bytes};

/// A reserved address range that starts at a multiple of 2 MiB. It uses no memory until something
/// is mapped into it.
#[derive(Debug)]
pub struct AddressRange {
    base: NonNull<u8>,
    bytes: usize,
    /// The places where nothing can be mapped: live mappings, mappings that could not be unmapped,
    /// and the places in [`Self::lost`]. Maps offsets to lengths, both in bytes.
    taken: Mutex<BTreeMap<usize, usize>>,
    /// The places where a mapping was refused and the addresses could not be reserved again. They
    /// may hold an unrelated mapping, so they are never unmapped or mapped again: see
    /// [`reserve_hole`]. Maps offsets to lengths, both in bytes.
    lost: Mutex<BTreeMap<usize, usize>>,
}

// SAFETY: an address range is not tied to a thread, and every change to it goes through the
// mutexes or the kernel.
unsafe impl Send for AddressRange {}
// SAFETY: shared methods synchronize through the mutexes, and never dereference the pointer.
unsafe impl Sync for AddressRange {}

impl AddressRange {
    /// Reserves `bytes` bytes of address space, rounded up to whole pages and starting at a
    /// multiple of 2 MiB.
    ///
    /// # Errors
    /// ENOMEM when the address space is exhausted or the process has too many mappings (RLIMIT_AS,
    /// `vm.max_map_count`); EINVAL when `bytes` is 0 or cannot be rounded up to whole pages.
    pub fn reserve(bytes: usize) -> Result<Arc<Self>, Error> {
        let failed = |errno| Error::from_call("reserve addresses", bytes, errno);
        let bytes = bytes.checked_next_multiple_of(page_bytes()).filter(|&b| b > 0).ok_or(failed(Errno::INVAL))?;
        let padded = bytes.checked_add(HUGE_PAGE_BYTES).ok_or(failed(Errno::NOMEM))?;
        // SAFETY: no address is requested, so no existing mapping is replaced.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), padded, ProtFlags::empty(), reserved_flags()) }.map_err(failed)?;
        let lead = start.addr().next_multiple_of(HUGE_PAGE_BYTES) - start.addr();
        let base = start.wrapping_byte_add(lead);
        trim(start, lead);
        trim(base.wrapping_byte_add(bytes), padded - lead - bytes);
        let base = NonNull::new(base.cast::<u8>()).ok_or(failed(Errno::NOMEM))?;
        Ok(Arc::new(AddressRange { base, bytes, taken: Mutex::default(), lost: Mutex::default() }))
    }

    /// Returns the first address.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Returns the length in bytes, a multiple of the page size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Maps the first `bytes` bytes of `memory` at offset `at` of the range.
    ///
    /// The mapping is writable, except for a memfd received from another process
    /// ([`Memfd::from_sealed`]), which is mapped read-only. Forked processes do not inherit
    /// anonymous memory (see [`Mapping::forbid_fork`]).
    ///
    /// # Errors
    /// EINVAL when `at` or `bytes` is not a multiple of the page size, when `bytes` is 0, or when
    /// the mapping would reach past the end of the range or of the memory; EEXIST when something
    /// is already mapped there; otherwise the errno of `mmap(2)` or `madvise(2)`.
    pub fn map(self: &Arc<Self>, memory: &Memory, at: usize, bytes: usize) -> Result<Mapping, Error> {
        let failed = |errno| Error::from_call("map memory", bytes, errno);
        let page = page_bytes();
        let end = at.checked_add(bytes).ok_or(failed(Errno::INVAL))?;
        let room = memory.bytes().unwrap_or(usize::MAX);
        if bytes == 0 || !at.is_multiple_of(page) || !bytes.is_multiple_of(page) || end > self.bytes || bytes > room {
            return Err(failed(Errno::INVAL));
        }
        let mut taken = self.taken();
        if taken.range(..end).next_back().is_some_and(|(start, length)| start + length > at) {
            return Err(failed(Errno::EXIST));
        }
        let address = self.base.as_ptr().wrapping_add(at).cast::<c_void>();
        let refused = |taken: &mut BTreeMap<usize, usize>, errno| {
            self.reserve_again(taken, at, bytes);
            failed(errno)
        };
        let read_only = memory.memfd().is_some_and(Memfd::is_foreign);
        let access = if read_only { ProtFlags::READ } else { ProtFlags::READ | ProtFlags::WRITE };
        match memory {
            // SAFETY: [at, end) lies in the range, which this value owns. It overlaps no entry of
            // `taken` (checked above, under the lock), and therefore neither a live mapping nor a
            // place that may hold an unrelated one. So MAP_FIXED only replaces reserved address
            // space.
            Memory::Memfd(memfd) => unsafe { mmap(address, bytes, access, MapFlags::SHARED | MapFlags::FIXED, memfd, 0) },
            // SAFETY: as above.
            Memory::DmaBuf(dma_buf) => unsafe { mmap(address, bytes, access, MapFlags::SHARED | MapFlags::FIXED, dma_buf, 0) },
            // SAFETY: as above.
            Memory::Anonymous => unsafe { mmap_anonymous(address, bytes, access, MapFlags::PRIVATE | MapFlags::FIXED) },
        }
        .map_err(|errno| refused(&mut taken, errno))?;
        taken.insert(at, bytes);
        drop(taken);
        let kind = match memory {
            Memory::Memfd(_) if read_only => Kind::ReadOnly,
            Memory::Memfd(_) => Kind::Memfd,
            Memory::Anonymous => Kind::Anonymous,
            Memory::DmaBuf(_) => Kind::DmaBuf,
        };
        let mapping = Mapping { range: Arc::clone(self), at, bytes, kind };
        if memory.is_private() {
            mapping.forbid_fork()?;
        }
        Ok(mapping)
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<usize, usize>> {
        // Each lock holder performs at most one insertion or removal, so the map is consistent
        // even if a holder panicked.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves the addresses of a refused mapping again. If that fails, gives them up, because
    /// they may belong to an unrelated mapping.
    fn reserve_again(&self, taken: &mut BTreeMap<usize, usize>, at: usize, bytes: usize) {
        if !reserve_hole(self.base.as_ptr().wrapping_add(at).cast(), bytes) {
            taken.insert(at, bytes);
            self.lost().insert(at, bytes);
        }
    }

    fn lost(&self) -> MutexGuard<'_, BTreeMap<usize, usize>> {
        // The map is consistent even if a lock holder panicked: see `taken`.
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for AddressRange {
    fn drop(&mut self) {
        let mut start = 0;
        let ends = self.lost().iter().map(|(&at, &bytes)| (at, at + bytes)).chain([(self.bytes, self.bytes)]).collect::<Vec<_>>();
        for (end, next) in ends {
            // Every `Mapping` holds a reference to this range, so no mapping is left. The places
            // in `lost` may hold unrelated mappings and are skipped.
            trim(self.base.as_ptr().wrapping_add(start).cast::<c_void>(), end - start);
            start = next;
        }
    }
}

/// Reserves addresses again after the kernel refused to map memory there. Returns `false` if the
/// addresses may belong to an unrelated mapping, in which case they must not be unmapped.
///
/// `MAP_FIXED` and `MREMAP_FIXED` can unmap the old mapping before the new one fails: up to Linux
/// 6.11, a driver can still refuse the new mapping at that point. Another thread can then map
/// memory into the hole, which a later `munmap` would destroy. If the addresses are in use, they
/// hold either the original reservation, which was never unmapped, or the other thread's mapping.
/// The kernel's error does not distinguish the two cases.
pub(crate) fn reserve_hole(address: *mut c_void, bytes: usize) -> bool {
    // SAFETY: MAP_FIXED_NOREPLACE never replaces a mapping. Kernels before Linux 4.17 ignore the
    // flag and treat the address as a hint, which does not replace a mapping either.
    let reserved = unsafe { mmap_anonymous(address, bytes, ProtFlags::empty(), reserved_flags() | MapFlags::FIXED_NOREPLACE) };
    match reserved {
        Ok(at) if at == address => true,
        Ok(elsewhere) => {
            trim(elsewhere, bytes);
            false
        }
        Err(_) => false,
    }
}

/// Moves a scratch page with `MREMAP_DONTUNMAP`. Fails if the kernel (before Linux 5.7) or a
/// sandbox does not allow that, or if the process has too many mappings.
fn try_to_move_a_page() -> Result<(), Errno> {
    let bytes = page_bytes();
    // SAFETY: no address is requested, so no existing mapping is replaced.
    let page = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ, MapFlags::PRIVATE) }?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
    // SAFETY: the page was just mapped, and nothing else uses it. No address is requested for the
    // copy, so no existing mapping is replaced.
    let moved = unsafe { libc::mremap(page, bytes, bytes, flags, std::ptr::null_mut::<c_void>()) };
    let refused = (moved == libc::MAP_FAILED).then(last_errno);
    trim(page, bytes);
    match refused {
        Some(errno) => Err(errno),
        None => {
            trim(moved, bytes);
            Ok(())
        }
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}

fn reserved_flags() -> MapFlags {
    MapFlags::PRIVATE | MapFlags::NORESERVE
}

/// Unmaps addresses that the caller reserved and that nothing uses.
pub(crate) fn trim(start: *mut c_void, bytes: usize) {
    if bytes > 0 {
        // SAFETY: the caller reserved these addresses, and nothing uses them.
        let _ = unsafe { munmap(start, bytes) };
    }
}

/// The error that [`Mapping::move_to`] returns. It gives the mapping back to the caller.
#[derive(Debug)]
pub struct NotMoved {
    /// The mapping, still in its old place.
    pub mapping: Mapping,
    /// Why it could not be moved.
    pub error: Error,
}

/// A part of an [`AddressRange`] that is backed by memory. Dropping a mapping unmaps it. For large
/// mappings on small pages, this takes milliseconds, so don't drop them on an async thread.
#[derive(Debug)]
pub struct Mapping {
    range: Arc<AddressRange>,
    at: usize,
    bytes: usize,
    kind: Kind,
}

/// What backs a mapping, which determines how it can be populated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Memfd,
    /// A memfd from another process; writing to the mapping raises SIGSEGV.
    ReadOnly,
    Anonymous,
    DmaBuf,
}

impl Kind {
    /// Returns whether a mapping of this kind can be backed by `memory`.
    pub(crate) fn fits(self, memory: &Memory) -> bool {
        match memory {
            Memory::Memfd(memfd) => self == if memfd.is_foreign() { Kind::ReadOnly } else { Kind::Memfd },
            Memory::Anonymous => self == Kind::Anonymous,
            Memory::DmaBuf(_) => self == Kind::DmaBuf,
        }
    }
}

impl Mapping {
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns the first address, which is page-aligned.
    pub fn address(&self) -> NonNull<u8> {
        // SAFETY: `AddressRange::map` and `Mapping::move_to` checked that the mapping lies in the
        // range, which is a single reservation.
        unsafe { self.range.base.add(self.at) }
    }

    /// Returns the length in bytes, a multiple of the page size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the range that contains this mapping.
    pub fn range(&self) -> &Arc<AddressRange> {
        &self.range
    }

    /// Prevents processes that are forked later from inheriting the mapping.
    ///
    /// After a fork, both processes share private pages copy-on-write. Whichever process writes
    /// first gets a copy, so data that a device writes later can land in the other process's page.
    /// According to open(2), `O_DIRECT` reads in a process that forks need this call or a shared
    /// mapping. Since Linux 5.9, a fork copies pinned pages, such as those of registered buffers;
    /// direct reads pin their pages since 6.5.
    ///
    /// # Errors
    /// ENOMEM or EAGAIN when the process has too many mappings or the kernel lacks memory.
    pub fn forbid_fork(&self) -> Result<(), Error> {
        self.advise(Advice::LinuxDontFork, "keep forked processes from inheriting memory")
    }

    /// Undoes [`Mapping::forbid_fork`]. Call it only once devices no longer write to the mapping.
    ///
    /// # Errors
    /// Those of [`Mapping::forbid_fork`].
    pub fn allow_fork(&self) -> Result<(), Error> {
        self.advise(Advice::LinuxDoFork, "let forked processes inherit memory")
    }

    fn advise(&self, advice: Advice, operation: &'static str) -> Result<(), Error> {
        // SAFETY: the range belongs to this mapping. MADV_DONTFORK and MADV_DOFORK, the only
        // advice passed here, change no bytes.
        unsafe { madvise(self.address().as_ptr().cast(), self.bytes, advice) }
            .map_err(|errno| Error::from_call(operation, self.bytes, errno))
    }

    /// Moves the mapping and its page tables to offset `at` of `range`, which can be the range
    /// that contains it.
    ///
    /// The pages stay present and are not touched, so the move takes microseconds; a new mapping
    /// would take milliseconds to populate. The call is `mremap(2)` with `MREMAP_DONTUNMAP`, which
    /// leaves no hole that an unrelated mapping could take. It requires Linux 5.7, or 5.13 for
    /// memfds.
    ///
    /// # Errors
    /// EINVAL when `at` is not a multiple of the page size, when the mapping would reach past the
    /// end of `range`, on older kernels than those above, and for mappings by page frame number
    /// (`VM_PFNMAP`), such as those of dma-heaps; EEXIST when something is already mapped there,
    /// such as the mapping itself; otherwise the errno of `mremap(2)`, such as ENOMEM. In rare
    /// cases, the kernel refuses a move although it has just moved a scratch page. The target may
    /// then be unusable: mapping something there fails with EEXIST.
    pub fn move_to(self, range: &Arc<AddressRange>, at: usize) -> Result<Mapping, NotMoved> {
        let failed = |errno| Error::from_call("move a mapping", self.bytes, errno);
        let end = at.checked_add(self.bytes).filter(|&end| at.is_multiple_of(page_bytes()) && end <= range.bytes);
        let Some(end) = end else {
            let error = failed(Errno::INVAL);
            return Err(NotMoved { mapping: self, error });
        };
        // If the kernel refuses a move, the target may be lost. So first find out, with a scratch
        // page, whether it would refuse.
        if let Err(errno) = try_to_move_a_page() {
            let error = failed(errno);
            return Err(NotMoved { mapping: self, error });
        }
        let mut taken = range.taken();
        if taken.range(..end).next_back().is_some_and(|(start, length)| start + length > at) {
            let error = failed(Errno::EXIST);
            drop(taken);
            return Err(NotMoved { mapping: self, error });
        }
        let (from, to) = (self.address().as_ptr().cast::<c_void>(), range.base.as_ptr().wrapping_add(at).cast::<c_void>());
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        // SAFETY: the old addresses belong to this mapping. The new ones lie in `range` and
        // overlap nothing in `taken` (checked above, under the lock), so only reserved address
        // space is replaced. This method consumes the mapping, so nothing uses the old addresses
        // afterwards.
        let moved = unsafe { libc::mremap(from, self.bytes, self.bytes, flags, to) };
        if moved == libc::MAP_FAILED {
            let error = failed(last_errno());
            // The kernel can unmap the target before it refuses.
            range.reserve_again(&mut taken, at, self.bytes);
            drop(taken);
            return Err(NotMoved { mapping: self, error });
        }
        taken.insert(at, self.bytes);
        drop(taken);
        // MREMAP_DONTUNMAP leaves the old addresses mapped, without pages. Dropping `self` on
        // return replaces that empty mapping with a reservation.
        Ok(Mapping { range: Arc::clone(range), at, bytes: self.bytes, kind: self.kind })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let mut taken = self.range.taken();
        let address = self.address().as_ptr().cast::<c_void>();
        // SAFETY: this mapping is the only owner of these addresses, and nothing uses them after
        // the drop. Reserving them again unmaps the pages, and keeps other mappings out until the
        // whole range is dropped.
        let reserved = unsafe { mmap_anonymous(address, self.bytes, ProtFlags::empty(), reserved_flags() | MapFlags::FIXED) };
        // If reserving fails (too many mappings), the pages stay mapped until the whole range is
        // dropped.
        if reserved.is_ok() {
            taken.remove(&self.at);
        }
    }
}

/// Returns whether this address is mapped without any access rights.
#[cfg(test)]
pub(crate) fn is_reserved(address: *mut c_void) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs is mounted");
    maps.lines().any(|line| {
        let parsed = line.split_once(' ').and_then(|(range, rest)| Some((range.split_once('-')?, rest)));
        let ((start, end), rest) = parsed.expect("a line of maps starts with an address range");
        let parse = |text| usize::from_str_radix(text, 16).expect("addresses are hexadecimal");
        (parse(start)..parse(end)).contains(&address.addr()) && rest.starts_with("---p")
    })
}

/// Calls `attempt`, which returns an observed value and the expected one, until both are equal.
/// Panics if they still differ in the tenth attempt. A single attempt can fail because another
/// thread reserves addresses that the attempt has just unmapped.
#[cfg(test)]
#[track_caller]
pub(crate) fn assert_in_some_attempt<T: PartialEq + std::fmt::Debug>(mut attempt: impl FnMut() -> (T, T)) {
    for _ in 1..10 {
        let (seen, expected) = attempt();
        if seen == expected {
            return;
        }
    }
    let (seen, expected) = attempt();
    assert_eq!(seen, expected);
}

#[cfg(test)]
mod tests;
