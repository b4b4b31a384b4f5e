//! Checks which features a kernel offers. Each answer becomes a row in docs/kernels.md. Each test
//! also asserts the expected answer, so it fails on a kernel that answers differently.
#![allow(clippy::disallowed_methods, reason = "prints only names that this code created")]
#![allow(clippy::unwrap_used, reason = "a failure here should fail the test")]
#![allow(unsafe_code, reason = "makes requests and mappings that our API does not offer")]

mod common;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;

use common::{Folios, MIB, PAGE, SIZE_LIMIT, ThpSettings, create_udmabuf, fault_in, file, original};
use dmaload::Errno;
use dmaload_guest::{Line, kernel_line, makes_dma_bufs, record_row};
use io_uring::{IoUring, opcode, types};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create};

const HUGE: usize = 2 * MIB;

/// Records an answer, and asserts that it is the known one. The known answer is `after` for the
/// release line `since` and later ones, and `before` for earlier ones.
#[track_caller]
fn assert_answer(what: &str, answer: &str, since: Line, before: &str, after: &str) {
    assert_known(what, answer, if kernel_line() >= since { after } else { before });
}

/// Records an answer, and asserts that it is the expected one.
#[track_caller]
fn assert_known(what: &str, answer: &str, expected: &str) {
    record_row("offers", &[what, answer]);
    assert_eq!(answer, expected, "{what}: this kernel answers differently");
}

fn errno_name(error: &io::Error) -> String {
    let errno = Errno::from_raw_os_error(error.raw_os_error().unwrap());
    errno.name().map_or_else(|| errno.raw_os_error().to_string(), str::to_owned)
}

/// Formats the result of a call as `ok` or as the errno's name.
fn describe<T>(result: io::Result<T>) -> String {
    result.map_or_else(|error| errno_name(&error), |_| "ok".to_owned())
}

/// A reserved range of addresses. Dropping this value unmaps the range.
struct Mapped {
    start: *mut u8,
    bytes: usize,
}

impl Mapped {
    fn reserve(bytes: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: no address is requested, so the kernel chooses a free range and replaces no
        // mapping.
        let start = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Mapped { start: start.cast(), bytes }
    }

    /// Maps the first `bytes` bytes of a memfd at `offset` in the reserved range.
    fn map_at(&self, memfd: &OwnedFd, offset: usize, bytes: usize) {
        assert!(offset + bytes <= self.bytes);
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE);
        // SAFETY: the range is within the reserved range (asserted above), and nothing else uses
        // it.
        let start = unsafe { libc::mmap(self.start.wrapping_add(offset).cast(), bytes, access, flags, memfd.as_raw_fd(), 0) };
        assert_ne!(start, libc::MAP_FAILED);
    }

    fn iovec(&self, offset: usize, bytes: usize) -> libc::iovec {
        assert!(offset + bytes <= self.bytes);
        libc::iovec { iov_base: self.start.wrapping_add(offset).cast(), iov_len: bytes }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: this value owns the range, and nothing uses it afterwards.
        assert_eq!(unsafe { libc::munmap(self.start.cast(), self.bytes) }, 0);
    }
}

fn memfd(bytes: usize, flags: MemfdFlags) -> io::Result<OwnedFd> {
    let memfd = memfd_create("offers", flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&memfd, bytes as u64)?;
    Ok(memfd)
}

/// Opens a file on the disk for direct reads.
fn open_direct() -> fs::File {
    fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(file(MIB)).unwrap()
}

#[test]
fn default_size_limit_of_udmabuf_is_the_known_one() {
    if !makes_dma_bufs() {
        assert!(fs::metadata(SIZE_LIMIT).is_err());
        return;
    }
    let limit = fs::read_to_string(SIZE_LIMIT).unwrap();
    assert_answer("size_limit_mb of udmabuf, by default", limit.trim(), (7, 3), "64", &i32::MAX.to_string());
}

/// Maps the same 2 MiB repeatedly, so that the test does not need 1 GiB of memory.
#[test]
fn registered_buffers_may_exceed_1_gib_since_7_2() {
    let (count, bytes) = (513, (1 << 30) + PAGE);
    let memory = memfd(HUGE, MemfdFlags::empty()).unwrap();
    let mapped = Mapped::reserve(count * HUGE);
    (0..count).for_each(|index| mapped.map_at(&memory, index * HUGE, HUGE));
    let ring = IoUring::new(8).unwrap();
    // SAFETY: the mapping outlives the ring, and the ring performs no reads.
    let register = |bytes| unsafe { ring.submitter().register_buffers(&[mapped.iovec(0, bytes)]) };
    register(1 << 30).unwrap();
    ring.submitter().unregister_buffers().unwrap();
    assert_answer("a registered buffer larger than 1 GiB", &describe(register(bytes)), (7, 2), "EFAULT", "ok");
    drop(ring);
}

/// One read fills two separate ranges of a registered buffer.
#[test]
fn fixed_reads_take_vectors_since_6_15() {
    let memory = memfd(HUGE, MemfdFlags::empty()).unwrap();
    let mapped = Mapped::reserve(HUGE);
    mapped.map_at(&memory, 0, HUGE);
    let mut ring = IoUring::new(8).unwrap();
    // SAFETY: the mapping outlives the ring.
    unsafe { ring.submitter().register_buffers(&[mapped.iovec(0, HUGE)]) }.unwrap();
    let (source, parts) = (open_direct(), [mapped.iovec(0, PAGE), mapped.iovec(8 * PAGE, PAGE)]);
    let request = opcode::ReadvFixed::new(types::Fd(source.as_raw_fd()), parts.as_ptr(), 2, 0).build();
    // SAFETY: the file, the parts and the memory outlive the read, whose completion is awaited
    // below.
    unsafe { ring.submission().push(&request) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    let result = ring.completion().next().unwrap().result();
    let answer = if result < 0 { errno_name(&io::Error::from_raw_os_error(-result)) } else { "ok".to_owned() };
    if result >= 0 {
        assert_eq!(usize::try_from(result), Ok(2 * PAGE));
        // SAFETY: the read is complete, and nothing else writes to this memory.
        let second = unsafe { std::slice::from_raw_parts(mapped.start.wrapping_add(8 * PAGE), PAGE) };
        assert!(second == &original()[PAGE..2 * PAGE], "the second part differs from the file");
    }
    drop(ring);
    assert_answer("READV_FIXED: one read into parts of a registered buffer", &answer, (6, 15), "EINVAL", "ok");
}

/// `struct io_uring_params`. All fields except the requested numbers of entries are zero.
#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    rest: [u32; 28],
}

#[test]
fn rings_can_be_resized_since_6_13() {
    const RESIZE_RINGS: u32 = 33;
    const _: () = assert!(size_of::<Params>() == 120);
    let ring: IoUring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(8).unwrap();
    let mut params = Params { sq_entries: 32, cq_entries: 64, ..Params::default() };
    // SAFETY: the kernel accesses only this structure. Resizing invalidates the ring's mappings of
    // its queues, and the ring is not used afterwards.
    let resized = unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), RESIZE_RINGS, &raw mut params, 1) };
    let resized = if resized < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    assert_answer("resizing the rings of io_uring", &describe(resized), (6, 13), "EINVAL", "ok");
}

#[test]
fn buffered_reads_can_bypass_the_cache_since_6_14() {
    const RWF_DONTCACHE: libc::c_int = 0x80;
    let source = fs::File::open(file(MIB)).unwrap();
    let mut seen = vec![0_u8; PAGE];
    let part = libc::iovec { iov_base: seen.as_mut_ptr().cast(), iov_len: PAGE };
    // SAFETY: `seen` is `PAGE` bytes long, and outlives the call.
    let read = unsafe { libc::preadv2(source.as_raw_fd(), &raw const part, 1, 0, RWF_DONTCACHE) };
    let read = if read < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    assert_answer("RWF_DONTCACHE on ext4", &describe(read), (6, 14), "EOPNOTSUPP", "ok");
}

/// Compares how much memory a cgroup is charged before and after an allocation.
#[test]
fn memory_of_a_dma_heap_is_not_charged_to_the_cgroup() {
    if !makes_dma_bufs() {
        assert!(fs::metadata("/dev/dma_heap").is_err());
        return;
    }
    const BYTES: usize = 32 * MIB;
    let group = "/sys/fs/cgroup/offers";
    fs::create_dir(group).unwrap();
    let charged = || fs::read_to_string(format!("{group}/memory.current")).unwrap().trim().parse::<usize>().unwrap();
    fs::write(format!("{group}/cgroup.procs"), std::process::id().to_string()).unwrap();
    let before = charged();
    let dma_buf = dmabuf::DmaHeap::open("system").unwrap().allocate(BYTES).unwrap();
    let taken = charged().saturating_sub(before);
    drop(dma_buf);
    fs::write("/sys/fs/cgroup/cgroup.procs", std::process::id().to_string()).unwrap();
    fs::remove_dir(group).unwrap();
    let answer = if taken >= BYTES / 10 * 9 { "yes" } else { "no" };
    assert_known("the system heap's memory is charged to the cgroup", answer, "no");
    let setting = fs::read_to_string("/sys/module/dma_heap/parameters/mem_accounting");
    let answer = setting.as_deref().map_or("missing", str::trim);
    assert_answer("the switch dma_heap.mem_accounting", answer, (7, 0), "missing", "N");
}

#[test]
fn udmabufs_need_memfds_without_write_seals() {
    if !makes_dma_bufs() {
        assert!(fs::metadata("/dev/udmabuf").is_err());
        return;
    }
    let create_sealed = |seals| {
        let memory = memfd(MIB, MemfdFlags::empty()).unwrap();
        fcntl_add_seals(memory.as_fd(), SealFlags::SHRINK | seals).unwrap();
        create_udmabuf(&memory, MIB).map_err(|errno| io::Error::from_raw_os_error(errno.raw_os_error()))
    };
    assert_known("a udmabuf of a memfd with F_SEAL_FUTURE_WRITE", &describe(create_sealed(SealFlags::FUTURE_WRITE)), "EINVAL");
    assert_known("a udmabuf of a memfd with F_SEAL_WRITE", &describe(create_sealed(SealFlags::WRITE)), "EINVAL");
    let memory = memfd(MIB, MemfdFlags::empty()).unwrap();
    fcntl_add_seals(memory.as_fd(), SealFlags::SHRINK).unwrap();
    let _dma_buf = create_udmabuf(&memory, MIB).unwrap();
    let add_seal = |seal| fcntl_add_seals(memory.as_fd(), seal).map_err(io::Error::from);
    assert_known("F_SEAL_WRITE on a memfd that backs a udmabuf", &describe(add_seal(SealFlags::WRITE)), "EBUSY");
    assert_known("F_SEAL_FUTURE_WRITE on such a memfd", &describe(add_seal(SealFlags::FUTURE_WRITE)), "ok");
}

#[test]
fn udmabufs_can_be_made_of_hugetlb() {
    if !makes_dma_bufs() {
        assert!(fs::metadata("/dev/udmabuf").is_err());
        return;
    }
    fs::write("/proc/sys/vm/nr_hugepages", "2").unwrap();
    let memory = memfd(2 * HUGE, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).unwrap();
    fcntl_add_seals(memory.as_fd(), SealFlags::SHRINK).unwrap();
    let made = create_udmabuf(&memory, 2 * HUGE).map_err(|errno| io::Error::from_raw_os_error(errno.raw_os_error()));
    assert_known("a udmabuf of a memfd on hugetlb", &describe(made), "ok");
    drop(memory);
    fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();
}

/// Fills a memfd of 4 MiB, and describes its folios.
fn describe_folios(fill: impl FnOnce(&OwnedFd)) -> String {
    let bytes = 2 * HUGE;
    let memory = memfd(bytes, MemfdFlags::empty()).unwrap();
    fill(&memory);
    let mapped = Mapped::reserve(bytes);
    mapped.map_at(&memory, 0, bytes);
    let mut folios = Folios::default();
    folios.add(mapped.start.addr(), bytes);
    match folios {
        Folios { compound: 0, .. } => "pages of 4 KiB".to_owned(),
        Folios { pages: 0, compound, .. } => format!("folios of {} KiB", bytes / compound / 1024),
        mixed => panic!("folios of several sizes: {mixed:?}"),
    }
}

fn folios_by_fallocate() -> String {
    describe_folios(|memory| fallocate(memory, FallocateFlags::empty(), 0, 2 * HUGE as u64).unwrap())
}

fn folios_by_write() -> String {
    describe_folios(|memory| {
        let written = rustix::io::pwrite(memory, &original()[..2 * HUGE], 0).unwrap();
        assert_eq!(written, 2 * HUGE);
    })
}

#[test]
fn fallocate_and_write_make_large_folios_as_configured() {
    for setting in ["never", "advise", "always"] {
        let _settings = ThpSettings::set(&[("shmem_enabled", setting)]);
        let small = "pages of 4 KiB";
        let large = if setting == "always" { "folios of 2048 KiB" } else { small };
        assert_answer(&format!("a memfd by fallocate, shmem_enabled={setting}"), &folios_by_fallocate(), (6, 1), small, large);
        assert_answer(&format!("a memfd by write, shmem_enabled={setting}"), &folios_by_write(), (6, 1), small, large);
    }
}

#[test]
fn multi_size_thp_makes_large_folios_by_faults_alone() {
    let switch = "/sys/kernel/mm/transparent_hugepage/hugepages-64kB/shmem_enabled";
    if fs::metadata(switch).is_err() {
        assert_answer("a memfd by faults, with 64 KiB folios switched on", "missing", (6, 11), "missing", "");
        return;
    }
    let _settings = ThpSettings::set(&[("hugepages-64kB/shmem_enabled", "always")]);
    let (small, large) = ("pages of 4 KiB", "folios of 64 KiB");
    let by_fault = describe_folios(|memory| {
        fault_in(memory, 2 * HUGE);
    });
    assert_answer("a memfd by faults, with 64 KiB folios switched on", &by_fault, (6, 11), "missing", large);
    assert_answer("a memfd by fallocate, with 64 KiB folios switched on", &folios_by_fallocate(), (6, 11), "missing", small);
    assert_answer("a memfd by write, with 64 KiB folios switched on", &folios_by_write(), (6, 11), "missing", small);
}
