/*
 * dmaload: files straight into dma-bufs and memory files, on Linux as it is.
 *
 * Link with -ldmaload (pkg-config dmaload). All functions are thread-safe, never throw or unwind, and take descriptors without
 * keeping them: what a load needs it duplicates. A negative answer is an errno; dmaload_last_error() has the words.
 *
 * Made by cbindgen; change the sources in crates/dmaload-capi/src instead.
 */

#ifndef DMALOAD_H
#define DMALOAD_H

#include <stddef.h>
#include <stdint.h>

/*
 `dmaload_options.flags`: `heap_fd` names the heap.
 */
#define DMALOAD_HEAP_FD 1

/*
 `dmaload_options.flags`: fail where the best way is refused, instead of taking the next one and telling it.
 */
#define DMALOAD_STRICT 2

/*
 `dmaload_options.layout`: segments of `segment_bytes`, each of which is complete, and can be used, as soon as it is read.
 */
#define DMALOAD_SEGMENTED 0

/*
 `dmaload_options.layout`: all of the file in one segment.
 */
#define DMALOAD_SINGLE 1

/*
 `dmaload_segment.kind`: a memory file, sealed: whoever has it can map it, for reading.
 */
#define DMALOAD_MEMFD 0

/*
 `dmaload_segment.kind`: a dma-buf. Whoever has it can write to it.
 */
#define DMALOAD_DMA_BUF 1

/*
 `dmaload_poll`: the load goes on. Wait until its eventfd is readable.
 */
#define DMALOAD_PENDING 0

/*
 `dmaload_poll`: a segment.
 */
#define DMALOAD_SEGMENT 1

/*
 `dmaload_poll`: all segments were given.
 */
#define DMALOAD_FINISHED 2

/*
 A load that is under way, or over and not freed.
 */
struct dmaload_load;

/*
 Threads, memory and limits that loads share.
 */
struct dmaload_loader;

/*
 How far a load is, in bytes.
 */
struct dmaload_progress {
    /*
     What is to be loaded; 0 until the file was looked at.
     */
    uint64_t planned_bytes;
    /*
     What has memory.
     */
    uint64_t allocated_bytes;
    /*
     What was read.
     */
    uint64_t read_bytes;
};

/*
 Is told how far a load is: on the calling thread, every 20 ms or so, and at its end. What it answers other than 0 cancels the
 load. It must not throw.
 */
typedef int (*dmaload_progress_fn)(void *user, const struct dmaload_progress *progress);

/*
 How a load went. Set `size` before it is asked for; no more than that is written, and fields of a newer version become 0.
 */
struct dmaload_report {
    /*
     `sizeof(struct dmaload_report)`.
     */
    uint64_t size;
    /*
     Bytes of the file that were loaded.
     */
    uint64_t bytes;
    /*
     From the call to the last segment.
     */
    uint64_t total_ns;
    /*
     From the call to the first segment.
     */
    uint64_t first_segment_ns;
    /*
     While memory was allocated, by any thread; it overlaps with reading.
     */
    uint64_t allocating_ns;
    /*
     While reads were in flight.
     */
    uint64_t reading_ns;
    /*
     While bytes were copied from staging.
     */
    uint64_t copying_ns;
    /*
     CPU time of the process during the load.
     */
    uint64_t cpu_ns;
    /*
     How much of the memory is in 2 MiB pages.
     */
    uint64_t huge_page_bytes;
    /*
     How many segments there were.
     */
    uint64_t segments;
    /*
     How many steps were taken down from the best way of reading, each of which `text` tells.
     */
    uint64_t fallbacks;
    /*
     The heap, the way of reading, each step down with its reason, and what else is to be told: a line each. Cut off where it is
     longer.
     */
    char text[1024];
};

/*
 How to load. All zero but `size` is the default; so are fields of a newer version that this one's caller does not know.
 */
struct dmaload_options {
    /*
     `sizeof(struct dmaload_options)`. A smaller one is of an older version: what it has not is the default. A larger one is of a
     newer version: -E2BIG, unless what is unknown here is all zero.
     */
    uint64_t size;
    /*
     `DMALOAD_HEAP_FD`, `DMALOAD_STRICT`, or both.
     */
    uint64_t flags;
    /*
     Where memory comes from: "memfd" (also NULL), "udmabuf", "dma-heap:NAME", or "dma-buf": the best heap here that gives dma-bufs.
     */
    const char *heap;
    /*
     With `DMALOAD_HEAP_FD`: an open dma-heap or /dev/udmabuf, instead of a name. It stays the caller's.
     */
    int32_t heap_fd;
    /*
     `DMALOAD_SEGMENTED` or `DMALOAD_SINGLE`.
     */
    uint32_t layout;
    /*
     The size of segments, a multiple of 2 MiB; 0 is 64 MiB, less where the window or the heap is small. Of `DMALOAD_SEGMENTED` only.
     */
    uint64_t segment_bytes;
    /*
     At most so much memory is allocated and not yet filled; 0 is 128 MiB. At least 2 MiB.
     */
    uint64_t window_bytes;
    /*
     Where in the file to begin.
     */
    uint64_t file_offset;
    /*
     How many bytes to load; 0 is all from `file_offset` on.
     */
    uint64_t file_bytes;
    /*
     Reads in flight at most; 0 is 44.
     */
    uint32_t queue_depth;
    /*
     0 normal, 1 before others of its loader, -1 after them.
     */
    int32_t priority;
    /*
     A loader to share memory, threads and limits with other loads; NULL is one for this load alone. With one, `heap`, `heap_fd`,
     `window_bytes` and `queue_depth` are its own and must be 0 here.
     */
    const struct dmaload_loader *loader;
    /*
     Is told how far the load is; NULL for nobody. Not of `dmaload_start`, see `dmaload_load_progress`.
     */
    dmaload_progress_fn progress;
    /*
     What `progress` gets.
     */
    void *user;
    /*
     Where another thread, or a signal handler, writes something other than 0 to cancel the load. It is looked at every 20 ms or
     so. Not of `dmaload_start`, see `dmaload_cancel`.
     */
    const int *cancel;
    /*
     Filled when the load succeeds. Not of `dmaload_start`, see `dmaload_load_report`.
     */
    struct dmaload_report *report;
};

/*
 A part of the file in memory. The file's bytes begin at `memory_offset` of what `fd` is. What is behind them, up to `memory_bytes`,
 is zero; where only a part of the file was asked for, its first and its last block hold what is around it, too.
 */
struct dmaload_segment {
    /*
     The caller's own, close-on-exec: close it when it is not needed any more. The memory lives as long as anybody has a descriptor,
     a mapping or an import of it.
     */
    int fd;
    /*
     `DMALOAD_MEMFD` or `DMALOAD_DMA_BUF`.
     */
    uint32_t kind;
    /*
     Its number, from 0.
     */
    uint64_t index;
    /*
     Where in the file its bytes begin.
     */
    uint64_t file_offset;
    /*
     How many bytes of the file it has.
     */
    uint64_t bytes;
    /*
     Where in the memory they begin: 0, unless only a part of the file was asked for.
     */
    uint64_t memory_offset;
    /*
     How much memory there is from there on, up to a whole block of the file system, a page at least.
     */
    uint64_t memory_bytes;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 The version of the library: major in bits 16 and up, minor in bits 8 to 15, patch in bits 0 to 7.
 */
uint32_t dmaload_version(void);

/*
 Why the last call of this thread that failed did: what was tried, where, the errno by name, and what can be done. Valid until the
 next one fails. Never NULL.
 */
const char *dmaload_last_error(void);

/*
 Allocates a dma-buf as large as a file, rounded up to a block of its file system, a page at least, and reads the file into it: what `DMA_HEAP_IOCTL_ALLOC_AND_READ` would
 have done. Returns 0, and the dma-buf in `dmabuf_fd`, which is the caller's to close; or a negative errno, and leaves `dmabuf_fd`
 as it is.

 `heap_fd` is an open dma-heap or /dev/udmabuf, known by its device number. `file_fd` is a file opened for reading, with or without
 O_DIRECT; it is read from its beginning, wherever its position is, which stays. It is opened again by /proc/self/fd, so procfs and the
 right to open it are needed (-ENOENT, -EACCES). `fd_flags` is O_CLOEXEC or 0, together with any access
 mode. `heap_flags` are for the dma-heap, which today knows none. At most `batch_bytes` are allocated and not yet
 read; 0 is 128 MiB, and 2 MiB are the least.

 Errors: -EINVAL for a file of 0 bytes, what is no regular file, unknown flags, too small a batch; -EISDIR; -EBADF for a descriptor that
 is closed, or not open for reading; -ENOTTY for a `heap_fd` that is no heap; -EFAULT for NULL; -EFBIG where udmabuf's
 size_limit_mb is too small (raise it in /sys/module/udmabuf/parameters); -ENOMEM rather than waking the OOM killer; -ESTALE for a
 file that changed meanwhile; -EIO, and what else the kernel answers. `dmaload_last_error` has the words.

 Where this differs from the ioctl of the 2024 kernel series: its batch is what triggers a read, here it bounds what is
 allocated ahead. A dma-heap's memory comes in one allocation, which can't be overlapped with reading, and can't be pinned: there reads
 go through staging, side by side with the copies. A udmabuf is read into directly while it is being allocated. The
 dma-buf is always opened for reading and writing.

 Thread-safe. Blocks. Starts threads, which end by themselves, soon after it returns; until then they may have the descriptors duplicated.

 # Safety
 `dmabuf_fd` is null, or valid for a write.
 */
int dmaload_alloc_and_read(int heap_fd,
                           int file_fd,
                           uint32_t fd_flags,
                           uint64_t heap_flags,
                           uint64_t batch_bytes,
                           int *dmabuf_fd);

/*
 Loads a file, or a part of one, and gives its segments: an array of `count`, in `segments`, to be freed by
 `dmaload_segments_free`. `options` may be NULL. Returns 0, or a negative errno, and then gives nothing.

 Errors are those of `dmaload_alloc_and_read`; -ECANCELED where the progress function or the flag said so; -E2BIG for options of a
 newer version; -EINVAL for options that make no sense.

 Thread-safe. Blocks.

 # Safety
 The pointers, and those in `options`, are null or valid as the header says.
 */
int dmaload_load_file(int file_fd,
                      const struct dmaload_options *options,
                      struct dmaload_segment **segments,
                      size_t *count);

/*
 Closes the descriptors of an array of segments, but those that were set to -1 since somebody has taken them, and frees the array.
 NULL is nothing.

 # Safety
 It is null, or came from `dmaload_load_file` with this count, and was not freed.
 */
void dmaload_segments_free(struct dmaload_segment *segments,
                           size_t count);

/*
 Makes a loader, for loads that are to share memory, threads and limits. Of `options`, which may be NULL, the heap, `window_bytes` and
 `queue_depth` count. Returns 0, or a negative errno.

 # Safety
 The pointers, and those in `options`, are null or valid as the header says.
 */
int dmaload_loader_new(const struct dmaload_options *options,
                       struct dmaload_loader **loader);

/*
 Frees a loader. Loads that run go on; its threads end with the last of them. NULL is nothing.

 # Safety
 It is null, or came from `dmaload_loader_new`, and was not freed. No other call has it now.
 */
void dmaload_loader_free(struct dmaload_loader *loader);

/*
 Starts a load and returns at once: 0, and the load in `load`, to be freed by `dmaload_free`; or a negative errno. `file_fd` may be
 closed then. `options` may be NULL; its `progress`, `cancel` and `report` must be.

 # Safety
 The pointers, and those in `options`, are null or valid as the header says.
 */
int dmaload_start(int file_fd,
                  const struct dmaload_options *options,
                  struct dmaload_load **load);

/*
 The eventfd of a load, for poll(2) or epoll(7): readable while there is something for `dmaload_poll` to say, a segment, the end or a
 failure. It is the load's: do not close, read or write it. -EFAULT for NULL.

 # Safety
 It is null, or came from `dmaload_start`, and was not freed.
 */
int dmaload_event_fd(const struct dmaload_load *load);

/*
 Says what has become of a load, without waiting: `DMALOAD_PENDING`; `DMALOAD_SEGMENT`, the next segment in order, whose descriptor is
 the caller's to close; `DMALOAD_FINISHED`, after the last one; or a negative errno, as of `dmaload_load_file`, for good.

 Segments given before a failure were read from the file as it was then: one that changes is found out at its end.

 Thread-safe: each segment is given once.

 # Safety
 `load` came from `dmaload_start`, and was not freed; `segment` is valid for a write.
 */
int dmaload_poll(struct dmaload_load *load,
                 struct dmaload_segment *segment);

/*
 How far a load is; all 0 when it is over. Returns 0 or -EFAULT.

 # Safety
 `load` came from `dmaload_start`, and was not freed; `progress` is valid for a write.
 */
int dmaload_load_progress(const struct dmaload_load *load, struct dmaload_progress *progress);

/*
 How a load went, once it is finished: 0; -EINPROGRESS before that; of one that failed, what it failed with.

 # Safety
 `load` came from `dmaload_start`, and was not freed; `report` is valid, and has its size set.
 */
int dmaload_load_report(const struct dmaload_load *load, struct dmaload_report *report);

/*
 Cancels a load: `dmaload_poll` answers -ECANCELED from now on. Nothing new is read; what is in flight is drained in the
 background, then its memory is freed. Does not wait. Segments that were given stay. Nothing happens to a load that is over, or NULL.

 # Safety
 It is null, or came from `dmaload_start`, and was not freed.
 */
void dmaload_cancel(struct dmaload_load *load);

/*
 Frees a load, and cancels it where it is not over. NULL is nothing.

 # Safety
 It is null, or came from `dmaload_start`, and was not freed. No other call has it now.
 */
void dmaload_free(struct dmaload_load *load);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DMALOAD_H */
