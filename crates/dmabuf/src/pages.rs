//! Determines which page sizes back a range of memory.
//!
//! Requesting 2 MiB pages does not guarantee them: the outcome depends on the sysfs switches,
//! fragmentation and the kernel version. Two interfaces show which pages back a range. The
//! `PAGEMAP_SCAN` ioctl (Linux 6.7 or later, fs/proc/task_mmu.c) walks only that range.
//! `/proc/self/smaps` covers every mapping of the process, so reading it is slow.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::ops::Range;

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

/// The size of a huge page. On x86-64, and on arm64 with 4 KiB pages, one entry of the page middle
/// directory maps this many bytes.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Returns the size of a small page on this machine.
pub fn page_bytes() -> usize {
    rustix::param::page_size()
}

/// How much of a populated range was inspected, and how much of that part is on huge pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageCount {
    /// Number of bytes inspected; 0 if the kernel offers no way to inspect them.
    pub seen_bytes: u64,
    /// Number of these bytes that are on 2 MiB pages.
    pub huge_bytes: u64,
}

impl PageCount {
    /// Adds another count to this one.
    pub fn add(&mut self, other: PageCount) {
        self.seen_bytes += other.seen_bytes;
        self.huge_bytes += other.huge_bytes;
    }
}

const PAGE_IS_HUGE: u64 = 1 << 6;

/// `struct page_region` from include/uapi/linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` from include/uapi/linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArgument>() == 96 && size_of::<PageRegion>() == 24);

struct Scan<'a>(&'a mut ScanArgument);

// SAFETY: the opcode is PAGEMAP_SCAN (_IOWR('f', 16, struct pm_scan_arg)), the pointer points to
// such a struct, and the kernel writes only to the struct and to the regions that its `vec` and
// `vec_len` describe.
unsafe impl Ioctl for Scan<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<ScanArgument>(b'f', 16)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<usize> {
        usize::try_from(output).map_err(|_| Errno::INVAL)
    }
}

/// Measures how much of a mapped range is on huge pages, by walking only its page tables. Returns
/// `None` if `PAGEMAP_SCAN` is missing or fails.
pub(crate) fn scan(addresses: Range<usize>) -> Option<PageCount> {
    let pagemap = File::open("/proc/self/pagemap").ok()?;
    let mut regions = [PageRegion::default(); 32];
    let mut count = PageCount { seen_bytes: addresses.len() as u64, huge_bytes: 0 };
    let mut start = addresses.start as u64;
    while start < addresses.end as u64 {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            start,
            end: addresses.end as u64,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: regions.len() as u64,
            category_mask: PAGE_IS_HUGE,
            return_mask: PAGE_IS_HUGE,
            ..Default::default()
        };
        // SAFETY: `vec` and `vec_len` describe `regions`, which outlives the call, as `argument`
        // does.
        let found = unsafe { ioctl(&pagemap, Scan(&mut argument)) }.ok()?;
        count.huge_bytes += regions.iter().take(found).map(|region| region.end - region.start).sum::<u64>();
        if argument.walk_end <= start {
            return None;
        }
        start = argument.walk_end;
    }
    Some(count)
}

/// Measures how much of a mapped range is on huge pages, using only `PAGEMAP_SCAN`, which takes
/// microseconds. Returns `None` before Linux 6.7 or without `/proc/self/pagemap`.
pub fn count_pages(addresses: Range<usize>) -> Option<PageCount> {
    scan(addresses)
}

/// Measures how much of a mapped range is on huge pages, using whichever interface this kernel
/// has.
///
/// With `PAGEMAP_SCAN`, the call takes microseconds. Otherwise it reads all of `/proc/self/smaps`.
/// If neither works, [`PageCount::seen_bytes`] is 0.
pub fn huge_bytes_in(addresses: Range<usize>) -> PageCount {
    scan(addresses.clone())
        .or_else(|| std::fs::read_to_string("/proc/self/smaps").ok().map(|smaps| parse_smaps(&smaps, &addresses)))
        .unwrap_or_default()
}

/// Adds up the smaps entries that overlap the range. An entry may extend beyond the range, because
/// the kernel merges adjacent mappings of a file into one entry. Each number in an entry is
/// therefore capped at the length of the overlap.
fn parse_smaps(smaps: &str, addresses: &Range<usize>) -> PageCount {
    let mut count = PageCount::default();
    let mut inside = 0;
    for line in smaps.lines() {
        let Some((key, rest)) = line.split_once(' ') else { continue };
        if let Some((start, end)) = key.split_once('-').and_then(|(start, end)| Some((parse_hex(start)?, parse_hex(end)?))) {
            inside = addresses.end.min(end).saturating_sub(addresses.start.max(start)) as u64;
        } else if inside > 0 {
            let bytes =
                || rest.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024);
            let add = |sum: &mut u64, bytes: u64| *sum = sum.saturating_add(bytes.min(inside));
            match key {
                "Rss:" => add(&mut count.seen_bytes, bytes()),
                "AnonHugePages:" | "ShmemPmdMapped:" | "FilePmdMapped:" => add(&mut count.huge_bytes, bytes()),
                _ => {}
            }
        }
    }
    count
}

fn parse_hex(digits: &str) -> Option<usize> {
    usize::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AddressRange, Memory};

    proptest::proptest! {
        #[test]
        fn arbitrary_smaps_text_never_panics(
            text in "([0-9a-f]{1,16}-[0-9a-f]{1,16} rw\n|(Rss|AnonHugePages): {1,3}[0-9]{1,21} kB\n|[0-9a-f]{1,18}-[0-9a-f]{1,18} rw|Rss: |AnonHugePages: |FilePmdMapped: |[0-9]{1,25}| kB|\n|\\PC){0,60}",
            start: usize,
            end: usize,
        ) {
            let _ = parse_smaps(&text, &(start..end));
        }
    }

    const SMAPS: &str = "\
7f0000000000-7f0000400000 rw-s 00000000 00:01 1 /memfd:a (deleted)
Size:               4096 kB
Rss:                4096 kB
ShmemPmdMapped:     2048 kB
7f0000400000-7f0000600000 rw-p 00000000 00:00 0
Rss:                2048 kB
AnonHugePages:      2048 kB
7f0000800000-7f0000a00000 rw-p 00000000 00:00 0
Rss:                2048 kB
AnonHugePages:      2048 kB
";

    #[test]
    fn smaps_counts_only_pages_inside_the_range() {
        let count = parse_smaps(SMAPS, &(0x7f00_0000_0000..0x7f00_0060_0000));
        assert_eq!(count, PageCount { seen_bytes: 6 << 20, huge_bytes: 4 << 20 });
        assert_eq!(parse_smaps(SMAPS, &(0x7f00_0060_0000..0x7f00_0080_0000)), PageCount::default());
    }

    #[test]
    fn small_pages_are_counted_as_small_by_both_methods() {
        let range = AddressRange::reserve(HUGE_PAGE_BYTES).unwrap();
        let mapping = range.map(&Memory::Anonymous, 0, 16 * page_bytes()).unwrap();
        // SAFETY: the mapping has this length, is writable, and is used only by this test.
        unsafe { mapping.address().as_ptr().write_bytes(1, mapping.bytes()) };
        let start = mapping.address().addr().get();
        let addresses = start..start + mapping.bytes();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let expected = PageCount { seen_bytes: mapping.bytes() as u64, huge_bytes: 0 };
        assert_eq!(parse_smaps(&smaps, &addresses), expected);
        if let Some(count) = scan(addresses) {
            assert_eq!(count, expected);
        }
    }
}
