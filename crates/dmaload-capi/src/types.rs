//! Types shared by C and Rust. The C header is generated from this file, so these comments are
//! also its documentation.
#![allow(non_camel_case_types, reason = "the header uses these names")]

use std::ffi::{c_char, c_int, c_void};

/// For `dmaload_options.flags`: allocate from the heap that `heap_fd` refers to.
pub const DMALOAD_HEAP_FD: u64 = 1;
/// For `dmaload_options.flags`: fail if the best way to read the file is refused, instead of
/// falling back to a slower one and recording that in the report.
pub const DMALOAD_STRICT: u64 = 2;

/// For `dmaload_options.layout`: divide the file into segments of `segment_bytes`, each of which
/// can be used as soon as it is complete.
pub const DMALOAD_SEGMENTED: u32 = 0;
/// For `dmaload_options.layout`: load the whole file into one segment.
pub const DMALOAD_SINGLE: u32 = 1;

/// In `dmaload_segment.kind`: a memfd, which is sealed against writing and can be mapped for
/// reading.
pub const DMALOAD_MEMFD: u32 = 0;
/// In `dmaload_segment.kind`: a dma-buf. Every process that has its descriptor can write to it.
pub const DMALOAD_DMA_BUF: u32 = 1;

/// Returned by `dmaload_poll`: no segment is available yet. Wait until the load's eventfd is
/// readable.
pub const DMALOAD_PENDING: c_int = 0;
/// Returned by `dmaload_poll`: the next segment has been stored in `segment`.
pub const DMALOAD_SEGMENT: c_int = 1;
/// Returned by `dmaload_poll`: the load has finished, and all segments have been returned.
pub const DMALOAD_FINISHED: c_int = 2;

/// Progress of a load, in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct dmaload_progress {
    /// Bytes to load; 0 until the file has been inspected.
    pub planned_bytes: u64,
    /// Bytes allocated so far.
    pub allocated_bytes: u64,
    /// Bytes read so far.
    pub read_bytes: u64,
}

/// A function that receives the progress of a load. It is called on the thread that called
/// `dmaload_load_file`, about every 20 ms and after the last segment. Any return value other than
/// 0 cancels the load. It must not throw.
pub type dmaload_progress_fn = Option<unsafe extern "C" fn(user: *mut c_void, progress: *const dmaload_progress) -> c_int>;

/// A range of the file's bytes, loaded into memory. The bytes begin at offset `memory_offset` in
/// the memory that `fd` refers to. If the whole file was requested, the memory after the last byte
/// is zero. If only a range of the file was requested, the first and last blocks also contain
/// neighboring bytes of the file.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dmaload_segment {
    /// A descriptor of the memory. It is close-on-exec, and the caller owns it and must close it.
    /// The memory lives as long as any descriptor, mapping or import of it exists.
    pub fd: c_int,
    /// `DMALOAD_MEMFD` or `DMALOAD_DMA_BUF`.
    pub kind: u32,
    /// The segment's number, counted from 0.
    pub index: u64,
    /// Offset of the segment's bytes in the file.
    pub file_offset: u64,
    /// Number of the file's bytes in the segment.
    pub bytes: u64,
    /// Offset of the segment's bytes in the memory: 0 unless only a range of the file was
    /// loaded.
    pub memory_offset: u64,
    /// Length of the memory from `memory_offset` on. The memory ends at a multiple of the page
    /// size and of the file system's block size.
    pub memory_bytes: u64,
}

/// The report of a load. Set `size` before the call: at most `size` bytes are written, and fields
/// that the library does not know are set to 0.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dmaload_report {
    /// `sizeof(struct dmaload_report)`.
    pub size: u64,
    /// Bytes of the file that were loaded, including neighboring bytes if only a range was
    /// requested.
    pub bytes: u64,
    /// Time from the call to the last segment.
    pub total_ns: u64,
    /// Time from the call to the first segment.
    pub first_segment_ns: u64,
    /// Time during which at least one thread was allocating memory; this overlaps with reading.
    pub allocating_ns: u64,
    /// Time during which reads were in flight.
    pub reading_ns: u64,
    /// Time during which bytes were being copied from staging.
    pub copying_ns: u64,
    /// CPU time of the process during the load.
    pub cpu_ns: u64,
    /// Amount of memory on 2 MiB pages, in bytes; 0 if the kernel does not report page sizes.
    pub huge_page_bytes: u64,
    /// Number of segments.
    pub segments: u64,
    /// Number of times that the load had to fall back to a slower way of reading; `text` describes
    /// each fallback.
    pub fallbacks: u64,
    /// A line with the heap and the route, a line for each fallback with its reason, and other
    /// notes. Truncated to 1023 bytes, and always NUL-terminated.
    pub text: [c_char; 1024],
}

/// The options of a load. In every field except `size`, zero selects the default. This also holds
/// for fields that newer versions add.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dmaload_options {
    /// `sizeof(struct dmaload_options)`. A smaller struct is from an older version: the fields
    /// that it lacks have their defaults. A larger struct is from a newer version: the call fails
    /// with -E2BIG unless all fields that the library does not know are zero.
    pub size: u64,
    /// A combination of `DMALOAD_HEAP_FD` and `DMALOAD_STRICT`, or 0.
    pub flags: u64,
    /// The heap to allocate from: "memfd" (the default if this is NULL), "udmabuf",
    /// "dma-heap:NAME", or "dma-buf" for the best available heap that provides dma-bufs.
    pub heap: *const c_char,
    /// With `DMALOAD_HEAP_FD`: the descriptor of an open dma-heap or /dev/udmabuf, used instead of
    /// a name. The caller keeps ownership of it.
    pub heap_fd: i32,
    /// `DMALOAD_SEGMENTED` or `DMALOAD_SINGLE`.
    pub layout: u32,
    /// Segment size, a multiple of 2 MiB. 0 means 64 MiB, but less if the window or the heap's
    /// maximum is small, and more if the limit on open files is low. Used for `DMALOAD_SEGMENTED`
    /// only.
    pub segment_bytes: u64,
    /// Maximum number of bytes that are allocated but not yet filled, across all of the loader's
    /// loads; at least 2 MiB. 0 means 128 MiB.
    pub window_bytes: u64,
    /// Offset in the file of the first byte to load.
    pub file_offset: u64,
    /// Number of bytes to load; 0 means everything from `file_offset` on.
    pub file_bytes: u64,
    /// Maximum number of reads in flight, across all of the loader's loads; 0 means 44.
    pub queue_depth: u32,
    /// Priority among the loader's loads: 1 is served first, then 0 (normal), then -1.
    pub priority: i32,
    /// A loader that shares memory, threads and limits among loads; NULL creates one for this load
    /// alone. If set, the loader determines `heap`, `heap_fd`, `window_bytes` and `queue_depth`,
    /// which must be 0 here.
    pub loader: *const dmaload_loader,
    /// Called with the load's progress; may be NULL. Must be NULL for `dmaload_start`, which has
    /// `dmaload_load_progress` instead.
    pub progress: dmaload_progress_fn,
    /// Passed to `progress`.
    pub user: *mut c_void,
    /// A flag that another thread or a signal handler sets to nonzero to cancel the load; may be
    /// NULL. Checked about every 20 ms. Must be NULL for `dmaload_start`, which has
    /// `dmaload_cancel` instead.
    pub cancel: *const c_int,
    /// Where to write the report if the load succeeds; may be NULL. Must be NULL for
    /// `dmaload_start`, which has `dmaload_load_report` instead.
    pub report: *mut dmaload_report,
}

/// A loader: threads, memory and limits that loads share.
#[derive(Debug)]
pub struct dmaload_loader(pub(crate) dmaload::Loader);
