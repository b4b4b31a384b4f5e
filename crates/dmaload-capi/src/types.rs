//! What C and Rust both see. The header is made of it: these comments are its documentation.
#![allow(non_camel_case_types, reason = "the names are those of the header")]

use std::ffi::{c_char, c_int, c_void};

/// `dmaload_options.flags`: `heap_fd` names the heap.
pub const DMALOAD_HEAP_FD: u64 = 1;
/// `dmaload_options.flags`: fail where the best way is refused, instead of taking the next one and telling it.
pub const DMALOAD_STRICT: u64 = 2;

/// `dmaload_options.layout`: segments of `segment_bytes`, each of which is complete, and can be used, as soon as it is read.
pub const DMALOAD_SEGMENTED: u32 = 0;
/// `dmaload_options.layout`: all of the file in one segment.
pub const DMALOAD_SINGLE: u32 = 1;

/// `dmaload_segment.kind`: a memory file, sealed: whoever has it can map it, for reading.
pub const DMALOAD_MEMFD: u32 = 0;
/// `dmaload_segment.kind`: a dma-buf. Whoever has it can write to it.
pub const DMALOAD_DMA_BUF: u32 = 1;

/// `dmaload_poll`: the load goes on. Wait until its eventfd is readable.
pub const DMALOAD_PENDING: c_int = 0;
/// `dmaload_poll`: a segment.
pub const DMALOAD_SEGMENT: c_int = 1;
/// `dmaload_poll`: all segments were given.
pub const DMALOAD_FINISHED: c_int = 2;

/// How far a load is, in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct dmaload_progress {
    /// What is to be loaded; 0 until the file was looked at.
    pub planned_bytes: u64,
    /// What has memory.
    pub allocated_bytes: u64,
    /// What was read.
    pub read_bytes: u64,
}

/// Is told how far a load is: on the calling thread, every 20 ms or so, and at its end. What it answers other than 0 cancels the
/// load. It must not throw.
pub type dmaload_progress_fn = Option<unsafe extern "C" fn(user: *mut c_void, progress: *const dmaload_progress) -> c_int>;

/// A part of the file in memory. The file's bytes begin at `memory_offset` of what `fd` is. What is behind them, up to `memory_bytes`,
/// is zero; where only a part of the file was asked for, its first and its last block hold what is around it, too.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dmaload_segment {
    /// The caller's own, close-on-exec: close it when it is not needed any more. The memory lives as long as anybody has a descriptor,
    /// a mapping or an import of it.
    pub fd: c_int,
    /// `DMALOAD_MEMFD` or `DMALOAD_DMA_BUF`.
    pub kind: u32,
    /// Its number, from 0.
    pub index: u64,
    /// Where in the file its bytes begin.
    pub file_offset: u64,
    /// How many bytes of the file it has.
    pub bytes: u64,
    /// Where in the memory they begin: 0, unless only a part of the file was asked for.
    pub memory_offset: u64,
    /// How much memory there is from there on, up to a whole block of the file system, a page at least.
    pub memory_bytes: u64,
}

/// How a load went. Set `size` before it is asked for; no more than that is written, and fields of a newer version become 0.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dmaload_report {
    /// `sizeof(struct dmaload_report)`.
    pub size: u64,
    /// Bytes of the file that were loaded.
    pub bytes: u64,
    /// From the call to the last segment.
    pub total_ns: u64,
    /// From the call to the first segment.
    pub first_segment_ns: u64,
    /// While memory was allocated, by any thread; it overlaps with reading.
    pub allocating_ns: u64,
    /// While reads were in flight.
    pub reading_ns: u64,
    /// While bytes were copied from staging.
    pub copying_ns: u64,
    /// CPU time of the process during the load.
    pub cpu_ns: u64,
    /// How much of the memory is in 2 MiB pages.
    pub huge_page_bytes: u64,
    /// How many segments there were.
    pub segments: u64,
    /// How many steps were taken down from the best way of reading, each of which `text` tells.
    pub fallbacks: u64,
    /// The heap, the way of reading, each step down with its reason, and what else is to be told: a line each. Cut off where it is
    /// longer.
    pub text: [c_char; 1024],
}

/// How to load. All zero but `size` is the default; so are fields of a newer version that this one's caller does not know.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct dmaload_options {
    /// `sizeof(struct dmaload_options)`. A smaller one is of an older version: what it has not is the default. A larger one is of a
    /// newer version: -E2BIG, unless what is unknown here is all zero.
    pub size: u64,
    /// `DMALOAD_HEAP_FD`, `DMALOAD_STRICT`, or both.
    pub flags: u64,
    /// Where memory comes from: "memfd" (also NULL), "udmabuf", "dma-heap:NAME", or "dma-buf": the best heap here that gives dma-bufs.
    pub heap: *const c_char,
    /// With `DMALOAD_HEAP_FD`: an open dma-heap or /dev/udmabuf, instead of a name. It stays the caller's.
    pub heap_fd: i32,
    /// `DMALOAD_SEGMENTED` or `DMALOAD_SINGLE`.
    pub layout: u32,
    /// The size of segments, a multiple of 2 MiB; 0 is 64 MiB, less where the window or the heap is small. Of `DMALOAD_SEGMENTED` only.
    pub segment_bytes: u64,
    /// At most so much memory is allocated and not yet filled; 0 is 128 MiB. At least 2 MiB.
    pub window_bytes: u64,
    /// Where in the file to begin.
    pub file_offset: u64,
    /// How many bytes to load; 0 is all from `file_offset` on.
    pub file_bytes: u64,
    /// Reads in flight at most; 0 is 44.
    pub queue_depth: u32,
    /// 0 normal, 1 before others of its loader, -1 after them.
    pub priority: i32,
    /// A loader to share memory, threads and limits with other loads; NULL is one for this load alone. With one, `heap`, `heap_fd`,
    /// `window_bytes` and `queue_depth` are its own and must be 0 here.
    pub loader: *const dmaload_loader,
    /// Is told how far the load is; NULL for nobody. Not of `dmaload_start`, see `dmaload_load_progress`.
    pub progress: dmaload_progress_fn,
    /// What `progress` gets.
    pub user: *mut c_void,
    /// Where another thread, or a signal handler, writes something other than 0 to cancel the load. It is looked at every 20 ms or
    /// so. Not of `dmaload_start`, see `dmaload_cancel`.
    pub cancel: *const c_int,
    /// Filled when the load succeeds. Not of `dmaload_start`, see `dmaload_load_report`.
    pub report: *mut dmaload_report,
}

/// Threads, memory and limits that loads share.
#[derive(Debug)]
pub struct dmaload_loader(pub(crate) dmaload::Loader);
