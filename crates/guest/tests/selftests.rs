//! Repeats the kernel's own selftests for dma-heaps and udmabuf, through our API where possible.
//! They cover allocation, zeroed memory on reuse, older and newer versions of the ioctl's
//! structure, bad flags and sizes, coherence, and leaks. Another test checks which mappings refuse
//! direct reads.
#![allow(clippy::unwrap_used, reason = "a failure here should fail the test")]
#![allow(unsafe_code, reason = "writes to mappings, and makes requests that our API rules out")]

mod common;

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use common::{MIB, SizeLimit, assert_same, file, open_descriptors, original};
use dmabuf::{
    Access, AddressRange, DmaBuf, DmaHeap, HUGE_PAGE_BYTES, Mapping, Memfd, Memory, Pages, Part, Udmabuf, UdmabufLimits,
    page_bytes,
};
use dmaload_guest::record_row;
use rustix::io::Errno;

fn system_heap() -> DmaHeap {
    DmaHeap::open("system").unwrap()
}

fn map(memory: &Memory, bytes: usize) -> Mapping {
    AddressRange::reserve(bytes).unwrap().map(memory, 0, bytes).unwrap()
}

fn fill_mapping(mapping: &Mapping, byte: u8) {
    // SAFETY: the mapping is writable and has that many bytes, and only this test uses it.
    unsafe { mapping.address().as_ptr().write_bytes(byte, mapping.bytes()) };
}

fn bytes_of(mapping: &Mapping) -> &[u8] {
    // SAFETY: the mapping has that many bytes, and nothing writes to it while the slice is alive.
    unsafe { std::slice::from_raw_parts(mapping.address().as_ptr(), mapping.bytes()) }
}

#[test]
fn heap_allocates_whole_pages_for_reading_and_writing() {
    for (requested, allocated) in [(1, 4096), (4096, 4096), (4097, 8192), (4 * MIB, 4 * MIB)] {
        let memory = Memory::DmaBuf(system_heap().allocate(requested).unwrap());
        let dma_buf = memory.dma_buf().unwrap();
        assert_eq!(dma_buf.bytes(), allocated);
        assert_eq!(rustix::fs::seek(dma_buf, rustix::fs::SeekFrom::End(0)), Ok(allocated as u64));
        let mapping = map(&memory, allocated);
        let access = dma_buf.cpu_access(Access::ReadWrite).unwrap();
        fill_mapping(&mapping, 0xA5);
        assert!(bytes_of(&mapping).iter().all(|&byte| byte == 0xA5));
        access.end().unwrap();
    }
}

#[test]
fn reused_memory_is_zeroed() {
    for _ in 0..64 {
        let memory = Memory::DmaBuf(system_heap().allocate(MIB).unwrap());
        let mapping = map(&memory, MIB);
        assert!(bytes_of(&mapping).iter().all(|&byte| byte == 0));
        fill_mapping(&mapping, 0xFF);
    }
}

#[test]
fn bad_sizes_and_flags_are_refused() {
    let heap = system_heap();
    let cloexec = rustix::fs::OFlags::CLOEXEC.bits();
    let read_write = rustix::fs::OFlags::RDWR.bits();
    assert_eq!(heap.allocate(0).unwrap_err().errno, dmabuf::Errno::EINVAL);
    assert_eq!(heap.allocate_with(4096, !0, 0).unwrap_err().errno, dmabuf::Errno::EINVAL);
    assert_eq!(
        heap.allocate_with(4096, read_write | rustix::fs::OFlags::NONBLOCK.bits(), 0).unwrap_err().errno,
        dmabuf::Errno::EINVAL
    );
    assert_eq!(heap.allocate_with(4096, read_write | cloexec, !0).unwrap_err().errno, dmabuf::Errno::EINVAL);
    // A read-only descriptor is allowed, but it cannot be mapped for writing.
    let memory = Memory::DmaBuf(heap.allocate_with(4096, cloexec, 0).unwrap());
    assert_eq!(AddressRange::reserve(4096).unwrap().map(&memory, 0, 4096).unwrap_err().errno, dmabuf::Errno::EACCES);
}

/// An ioctl with arguments that our API cannot produce.
struct Raw<'a> {
    opcode: rustix::ioctl::Opcode,
    words: &'a mut [u64],
}

// SAFETY: the opcodes in the tests below encode the size of `words`.
unsafe impl rustix::ioctl::Ioctl for Raw<'_> {
    type Output = i32;
    const IS_MUTATING: bool = true;
    fn opcode(&self) -> rustix::ioctl::Opcode {
        self.opcode
    }
    fn as_ptr(&mut self) -> *mut c_void {
        self.words.as_mut_ptr().cast()
    }
    unsafe fn output_from_ptr(output: rustix::ioctl::IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(output)
    }
}

fn call_ioctl(fd: impl AsFd, opcode: u32, words: &mut [u64]) -> Result<i32, Errno> {
    // SAFETY: callers pass an opcode that encodes the size of `words`, as `Raw` requires.
    unsafe { rustix::ioctl::ioctl(fd, Raw { opcode, words }) }
}

/// Computes `_IOWR('H', 0, …)` for a structure of `bytes` bytes.
fn allocate_opcode(bytes: u32) -> u32 {
    0xC000_4800 | bytes << 16
}

#[test]
fn older_and_newer_structures_are_accepted() {
    let heap = rustix::fs::open("/dev/dma_heap/system", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty()).unwrap();
    let flags = u64::from((rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC).bits());
    let mut older = [4096, flags << 32];
    let mut ours = [4096, flags << 32, 0];
    let mut newer = [4096, flags << 32, 0, 0, 0];
    for words in [older.as_mut_slice(), ours.as_mut_slice(), newer.as_mut_slice()] {
        let opcode = allocate_opcode(u32::try_from(words.len() * 8).unwrap());
        call_ioctl(&heap, opcode, words).unwrap();
        let fd = i32::try_from(words[1] & u64::from(u32::MAX)).unwrap();
        // SAFETY: the kernel has just made this descriptor, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        assert_eq!(DmaBuf::from_fd(fd).unwrap().bytes(), 4096);
    }
    assert_eq!(call_ioctl(&heap, 0xC018_48FF, &mut [4096, 0, 0]), Err(Errno::INVAL), "an unknown request");
}

#[test]
fn descriptor_of_another_device_is_refused() {
    let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty()).unwrap();
    assert_eq!(call_ioctl(&null, allocate_opcode(24), &mut [4096, 0, 0]), Err(Errno::NOTTY));
}

#[test]
fn udmabuf_refuses_bad_ranges_and_other_files() {
    let _limited = SizeLimit::set_mib(64);
    let device = Udmabuf::open().unwrap();
    let memfd = Memfd::create("test", 80 * MIB).unwrap();
    let refused = |offset, bytes| device.create(Part { memfd: &memfd, offset, bytes }).unwrap_err().errno;
    assert_eq!(refused(1, 4096), dmabuf::Errno::EINVAL, "offset");
    assert_eq!(refused(0, 4095), dmabuf::Errno::EINVAL, "size");
    assert_eq!(refused(0, 0), dmabuf::Errno::EINVAL, "no bytes");
    assert_eq!(refused(0, 65 * MIB), dmabuf::Errno::EINVAL, "above size_limit_mb");
    assert_eq!(refused(79 * MIB as u64, 2 * MIB), dmabuf::Errno::EINVAL, "past the memfd's end");
    device.create(Part { memfd: &memfd, offset: 0, bytes: 64 * MIB }).unwrap();
    let fd = rustix::fs::open("/dev/udmabuf", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty()).unwrap();
    for path in ["/dev/null", "/dev/zero"] {
        let other = rustix::fs::open(path, rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty()).unwrap();
        let other = u64::from(other.as_raw_fd().cast_unsigned());
        let answer = call_ioctl(&fd, 0x4018_7542, &mut [other, 0, 4096]);
        assert!(matches!(answer, Err(Errno::BADFD | Errno::INVAL)), "{path}: {answer:?}");
    }
}

#[test]
fn write_seal_must_follow_the_udmabuf() {
    let device = Udmabuf::open().unwrap();
    let memfd = Memfd::create("test", MIB).unwrap();
    let part = Part { memfd: &memfd, offset: 0, bytes: MIB };
    let dma_buf = device.create(part).unwrap();
    assert_eq!(rustix::fs::fcntl_add_seals(&memfd, rustix::fs::SealFlags::WRITE), Err(Errno::BUSY));
    memfd.seal_against_writes().unwrap();
    assert_eq!(rustix::io::pwrite(&memfd, b"x", 0), Err(Errno::PERM));
    assert_eq!(device.create(part).unwrap_err().errno, dmabuf::Errno::EINVAL);
    let memory = Memory::DmaBuf(dma_buf);
    assert!(bytes_of(&map(&memory, MIB)).iter().all(|&byte| byte == 0));
}

#[test]
fn udmabuf_refuses_the_end_of_an_access_without_begin() {
    let device = Udmabuf::open().unwrap();
    let memfd = Memfd::create("test", MIB).unwrap();
    let dma_buf = device.create(Part { memfd: &memfd, offset: 0, bytes: MIB }).unwrap();
    assert_eq!(dma_buf.end_cpu_access(Access::Read).unwrap_err().errno, dmabuf::Errno::EINVAL);
    dma_buf.cpu_access(Access::ReadWrite).unwrap().end().unwrap();
}

/// Creates dma-bufs from parts of a memfd. Asserts that writes through the memfd's mapping are
/// visible in each dma-buf's mapping, and vice versa.
fn assert_part_is_coherent(pages: Pages) {
    let device = Udmabuf::open().unwrap();
    let bytes = 3 * HUGE_PAGE_BYTES;
    let memory = Memory::Memfd(Memfd::create("test", bytes).unwrap());
    let memfd = memory.memfd().unwrap();
    let below = map(&memory, bytes);
    below.populate(&memory, 0..bytes, pages).unwrap();
    let start = below.address().addr().get();
    let huge = dmabuf::huge_bytes_in(start..start + bytes).huge_bytes;
    assert_eq!(huge, if pages == Pages::Small { 0 } else { bytes as u64 }, "the page size must be the requested one");
    let page = page_bytes();
    for (number, at) in (0..bytes).step_by(page).enumerate() {
        // SAFETY: `at` is within the mapping.
        let page = unsafe { below.address().add(at) };
        // SAFETY: the address is aligned, a whole page is mapped there, and only this function
        // uses the mapping.
        unsafe { page.cast::<u64>().write(number as u64) };
    }
    // A whole huge page, small pages within a huge page, and small pages across the boundary
    // between two huge pages.
    let parts = [(2 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES), (5 * page, 3 * page), (HUGE_PAGE_BYTES - page, 2 * page)];
    for (offset, len) in parts {
        let dma_buf = Memory::DmaBuf(device.create(Part { memfd, offset: offset as u64, bytes: len }).unwrap());
        let above = map(&dma_buf, len);
        for at in (0..len).step_by(page) {
            let word: [u8; 8] = bytes_of(&above)[at..][..8].try_into().unwrap();
            assert_eq!(u64::from_ne_bytes(word), ((offset + at) / page) as u64, "{pages:?}");
        }
        fill_mapping(&above, 0x5A);
        assert!(bytes_of(&below)[offset..offset + len].iter().all(|&byte| byte == 0x5A), "{pages:?}");
    }
    assert_eq!(bytes_of(&below)[0], 0, "bytes outside of the parts must be unchanged");
}

#[test]
fn part_of_small_pages_is_coherent() {
    assert_part_is_coherent(Pages::Small);
}

#[test]
fn part_of_huge_pages_is_coherent_in_its_mapping() {
    assert_part_is_coherent(Pages::Huge);
}

#[test]
fn limits_are_read_from_sysfs() {
    for mib in [64, 256] {
        let _limited = SizeLimit::set_mib(mib);
        let expected = UdmabufLimits { size_bytes: Some(u64::from(mib) << 20), list_entries: Some(1024) };
        assert_eq!(Udmabuf::limits(), expected);
    }
}

#[test]
fn no_operation_leaks_descriptors() {
    let device = Udmabuf::open().unwrap();
    let (heap, before) = (system_heap(), open_descriptors());
    for _ in 0..200 {
        let memfd = Memfd::create("test", 4096).unwrap();
        let memory = Memory::DmaBuf(device.create(Part { memfd: &memfd, offset: 0, bytes: 4096 }).unwrap());
        drop(map(&memory, 4096));
        drop(heap.allocate(4096).unwrap());
        let _ = heap.allocate(0);
        let _ = device.create(Part { memfd: &memfd, offset: 1, bytes: 1 });
        let _ = DmaBuf::from_fd(memfd.as_fd().try_clone_to_owned().unwrap());
    }
    assert_eq!(open_descriptors(), before);
}

fn describe(answer: Result<(), Errno>) -> String {
    let name = |errno: Errno| dmabuf::Errno::from_raw_os_error(errno.raw_os_error()).name();
    answer.map_or_else(|errno| name(errno).map_or_else(|| errno.to_string(), str::to_owned), |()| "ok".to_owned())
}

/// Registers a mapping with io_uring, and reads into it with `O_DIRECT`. Returns the results of
/// both calls.
fn try_mapping(mapping: &Mapping) -> (Result<(), Errno>, Result<(), Errno>) {
    let ring = io_uring::IoUring::new(8).unwrap();
    ring.submitter().register_buffers_sparse(1).unwrap();
    let vector = libc::iovec { iov_base: mapping.address().as_ptr().cast(), iov_len: mapping.bytes() };
    // SAFETY: the mapping outlives the ring, and the ring performs no reads.
    let registered = unsafe { ring.submitter().register_buffers_update(0, &[vector], None) };
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT;
    let source = rustix::fs::open(file(MIB), flags, rustix::fs::Mode::empty()).unwrap();
    // SAFETY: the mapping is writable and has that many bytes, and nothing else uses it.
    let buffer = unsafe { std::slice::from_raw_parts_mut(mapping.address().as_ptr(), mapping.bytes()) };
    let read = rustix::io::pread(&source, &mut *buffer, 0);
    if read.is_ok() {
        assert_same(&buffer[..4096], &original()[..4096], "the bytes read");
    }
    (registered.map_err(|error| Errno::from_io_error(&error).unwrap()), read.map(|_| ()))
}

/// The order in which routes are tried depends on these answers, so this test fails on a kernel
/// that answers differently.
#[test]
fn refusals_of_each_mapping_are_the_known_ones() {
    let memfd = Memory::Memfd(Memfd::create("test", MIB).unwrap());
    let device = Udmabuf::open().unwrap();
    let part = Part { memfd: memfd.memfd().unwrap(), offset: 0, bytes: MIB };
    let own = Memory::DmaBuf(device.create(part).unwrap());
    let heap = Memory::DmaBuf(system_heap().allocate(MIB).unwrap());
    let fault = Err(Errno::FAULT);
    for (name, memory, expected) in [
        ("memfd under a udmabuf", memfd, (Ok(()), Ok(()))),
        ("udmabuf's own", own, (fault, fault)),
        ("system heap's", heap, (fault, fault)),
    ] {
        let mapping = map(&memory, MIB);
        let seen = try_mapping(&mapping);
        record_row("refusals", &[name, &describe(seen.0), &describe(seen.1)]);
        assert_eq!(seen, expected, "{name}");
    }
}
