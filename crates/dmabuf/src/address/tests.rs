use super::*;
use crate::Errno;
use crate::Memfd;
use dmaload_testing::seccomp::{Scope, install, instruction};

const PAGE: usize = 4096;

fn count_writable_mappings(range: &AddressRange) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let (from, to) = (range.base().addr().get(), range.base().addr().get() + range.bytes());
    let lines =
        maps.lines().filter_map(|line| line.split_once('-').map(|(start, rest)| (start, rest.split(' ').nth(1).unwrap())));
    lines
        .filter(|(start, access)| {
            let start = usize::from_str_radix(start, 16).unwrap();
            (from..to).contains(&start) && access.starts_with("rw")
        })
        .count()
}

fn flags(mapping: &Mapping) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", mapping.address().addr());
    let own = smaps.lines().skip_while(|line| !line.starts_with(&start));
    own.skip(1).find_map(|line| line.strip_prefix("VmFlags:")).unwrap().to_owned()
}

#[test]
fn forks_inherit_private_memory_only_once_allowed() {
    let range = AddressRange::reserve(4 * PAGE).unwrap();
    let mapping = range.map(&Memory::Anonymous, 0, PAGE).unwrap();
    assert!(flags(&mapping).contains(" dc"), "{}", flags(&mapping));
    mapping.allow_fork().unwrap();
    assert!(!flags(&mapping).contains(" dc"), "{}", flags(&mapping));
    let shared = range.map(&Memory::Memfd(Memfd::create("test", PAGE).unwrap()), 2 * PAGE, PAGE).unwrap();
    assert!(!flags(&shared).contains(" dc"), "{}", flags(&shared));
}

/// If the kernel unmapped the addresses before it refused the mapping, another thread may have
/// mapped memory there, which dropping the range must not unmap.
#[test]
fn drop_spares_addresses_that_may_hold_a_foreign_mapping() {
    let sealed = Memfd::create("test", PAGE).unwrap();
    sealed.seal_against_writes().unwrap();
    let memory = Memory::Memfd(sealed);
    assert_in_some_attempt(|| {
        let range = AddressRange::reserve(3 * PAGE).unwrap();
        let base = range.base().as_ptr().cast::<c_void>();
        let places = [0, 1, 2].map(|number| base.wrapping_byte_add(number * PAGE));
        assert_eq!(range.map(&memory, PAGE, PAGE).unwrap_err().errno, Errno::EPERM);
        let was_hole = range.lost().is_empty();
        let again = range.map(&Memory::Anonymous, PAGE, PAGE).map(drop).map_err(|error| error.errno);
        assert_eq!(again, if was_hole { Ok(()) } else { Err(Errno::EEXIST) });
        drop(range);
        (places.map(is_reserved), [false, !was_hole, false])
    });
}

/// Refuses `mremap` on this thread if one of its flags is in `flags`.
fn refuse_moves(flags: i32) {
    let (number, flags_offset) = (u32::try_from(libc::SYS_mremap).unwrap(), 16 + 3 * 8);
    let load = |offset| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let answer = |value| instruction(libc::BPF_RET | libc::BPF_K, 0, 0, value);
    let filter = vec![
        load(0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 3, number),
        load(flags_offset),
        instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, 1, flags.cast_unsigned()),
        answer(libc::SECCOMP_RET_ERRNO | libc::ENOMEM.cast_unsigned()),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    install(Scope::Thread, filter).unwrap();
}

/// The filter refuses the move and leaves the target reserved, which cannot be distinguished
/// from a target that was unmapped and then mapped by another thread.
#[test]
fn target_of_a_refused_move_is_given_up() {
    let old = AddressRange::reserve(PAGE).unwrap();
    let mapping = old.map(&Memory::Anonymous, 0, PAGE).unwrap();
    let target = AddressRange::reserve(3 * PAGE).unwrap();
    let places = [0, 1, 2].map(|number| target.base().as_ptr().cast::<c_void>().wrapping_byte_add(number * PAGE));
    let refused = std::thread::scope(|scope| {
        let move_refused = scope.spawn(|| {
            refuse_moves(libc::MREMAP_FIXED);
            mapping.move_to(&target, PAGE)
        });
        move_refused.join().unwrap().unwrap_err()
    });
    assert_eq!((refused.error.errno, refused.mapping.range().base()), (Errno::ENOMEM, old.base()));
    assert_eq!(target.map(&Memory::Anonymous, PAGE, PAGE).unwrap_err().errno, Errno::EEXIST);
    drop(target);
    assert!(is_reserved(places[1]), "an unrelated mapping could have been unmapped");
    trim(places[1], PAGE);
}

#[test]
fn target_stays_usable_if_no_mapping_can_be_moved() {
    let (old, target) = (AddressRange::reserve(PAGE).unwrap(), AddressRange::reserve(PAGE).unwrap());
    let mapping = old.map(&Memory::Anonymous, 0, PAGE).unwrap();
    std::thread::scope(|scope| {
        let move_refused = scope.spawn(|| {
            refuse_moves(libc::MREMAP_DONTUNMAP);
            mapping.move_to(&target, 0)
        });
        assert_eq!(move_refused.join().unwrap().unwrap_err().error.errno, Errno::ENOMEM);
    });
    target.map(&Memory::Anonymous, 0, PAGE).unwrap();
}

#[test]
fn range_starts_at_a_huge_page_boundary() {
    for bytes in [1, PAGE, HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + 1] {
        let range = AddressRange::reserve(bytes).unwrap();
        assert_eq!(range.base().addr().get() % HUGE_PAGE_BYTES, 0);
        assert!(range.bytes() >= bytes);
    }
    assert_eq!(AddressRange::reserve(0).unwrap_err().errno, Errno::EINVAL);
}

#[test]
fn mappings_never_overlap_and_dropped_ones_free_their_place() {
    let range = AddressRange::reserve(8 * PAGE).unwrap();
    let first = range.map(&Memory::Anonymous, PAGE, 2 * PAGE).unwrap();
    for (at, bytes) in [(0, 2 * PAGE), (PAGE, PAGE), (2 * PAGE, PAGE), (0, 8 * PAGE)] {
        assert_eq!(range.map(&Memory::Anonymous, at, bytes).unwrap_err().errno, Errno::EEXIST, "{at} {bytes}");
    }
    let _before = range.map(&Memory::Anonymous, 0, PAGE).unwrap();
    let _after = range.map(&Memory::Anonymous, 3 * PAGE, PAGE).unwrap();
    drop(first);
    range.map(&Memory::Anonymous, PAGE, 2 * PAGE).unwrap();
}

#[test]
fn moved_mapping_keeps_its_pages_and_frees_its_old_place() {
    for memory in [Memory::Memfd(Memfd::create("test", 4 * PAGE).unwrap()), Memory::Anonymous] {
        let (old, new) = (AddressRange::reserve(8 * PAGE).unwrap(), AddressRange::reserve(8 * PAGE).unwrap());
        let mapping = old.map(&memory, PAGE, 4 * PAGE).unwrap();
        // SAFETY: the mapping is 4 pages long, writable, and used only by this test.
        unsafe { mapping.address().as_ptr().write_bytes(0x5A, 4 * PAGE) };
        if let Some(memfd) = memory.memfd() {
            // Sealing does not make existing mappings read-only, even if they are moved.
            memfd.seal_against_writes().unwrap();
        }
        let mapping = mapping.move_to(&new, 2 * PAGE).unwrap();
        assert_eq!((count_writable_mappings(&old), count_writable_mappings(&new)), (0, 1));
        // SAFETY: as above; `mapping` is now the moved mapping.
        let seen = unsafe { std::slice::from_raw_parts(mapping.address().as_ptr(), 4 * PAGE) };
        assert!(seen.iter().all(|&byte| byte == 0x5A));
        // SAFETY: as above.
        unsafe { mapping.address().as_ptr().write_bytes(0xA5, 4 * PAGE) };
        old.map(&Memory::Anonymous, PAGE, 4 * PAGE).unwrap();
        assert_eq!(new.map(&Memory::Anonymous, 5 * PAGE, PAGE).unwrap_err().errno, Errno::EEXIST);
        let refused = mapping.move_to(&new, 3 * PAGE).unwrap_err();
        assert_eq!(refused.error.errno, Errno::EEXIST, "moving a mapping onto itself");
        let refused = refused.mapping.move_to(&old, 6 * PAGE).unwrap_err();
        assert_eq!(refused.error.errno, Errno::EINVAL, "moving a mapping past the end of the range");
    }
}

#[test]
fn unaligned_empty_or_out_of_range_mappings_are_refused() {
    let range = AddressRange::reserve(4 * PAGE).unwrap();
    let memory = Memory::Memfd(Memfd::create("test", PAGE).unwrap());
    for (at, bytes) in [(1, PAGE), (0, 100), (0, 0), (3 * PAGE, 2 * PAGE), (0, 2 * PAGE), (usize::MAX - PAGE + 1, PAGE)] {
        assert_eq!(range.map(&memory, at, bytes).unwrap_err().errno, Errno::EINVAL, "{at} {bytes}");
    }
}

#[test]
fn dropped_mapping_leaves_no_pages() {
    let range = AddressRange::reserve(4 * PAGE).unwrap();
    let memory = Memory::Memfd(Memfd::create("test", 4 * PAGE).unwrap());
    let mapping = range.map(&memory, 0, 4 * PAGE).unwrap();
    assert_eq!(count_writable_mappings(&range), 1);
    drop(mapping);
    assert_eq!(count_writable_mappings(&range), 0);
}

#[test]
fn writes_through_a_mapping_are_visible_in_the_memfd() {
    let memory = Memory::Memfd(Memfd::create("test", PAGE).unwrap());
    let range = AddressRange::reserve(PAGE).unwrap();
    let mapping = range.map(&memory, 0, PAGE).unwrap();
    // SAFETY: the mapping is PAGE bytes long and writable, and only this test uses it.
    unsafe { mapping.address().as_ptr().write_bytes(0xA5, PAGE) };
    let mut seen = [0; 16];
    rustix::io::pread(memory.memfd().unwrap(), &mut seen, 4080).unwrap();
    assert_eq!(seen, [0xA5; 16]);
}
