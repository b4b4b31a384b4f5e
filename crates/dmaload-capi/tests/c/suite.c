/*
 * Tests correct and incorrect uses of libdmaload from C. Usage: suite FOLDER, an existing folder
 * on a file system that supports O_DIRECT.
 *
 * Exits with 0 if all checks pass. `just capi` also runs it under valgrind.
 */
#define _GNU_SOURCE
#include <dmaload.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB (1u << 20)
#define BYTES (9 * MIB + 777)
#define SEGMENT (2 * MIB)

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: check failed: %s; last error: %s\n", __FILE__, __LINE__, #condition,               \
                    dmaload_last_error());                                                                             \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static char folder[4096], path[4200];
static unsigned char *original;

static int open_file(void)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

static int count_entries(const char *path)
{
    DIR *list = opendir(path);
    int count = 0;
    CHECK(list);
    while (readdir(list))
        count++;
    closedir(list);
    return count;
}

/*
 * Waits for the library's threads, which exit shortly after the load or loader that they served.
 * Then three entries are left: ".", ".." and the thread that runs this test.
 */
static void wait_for_threads(void)
{
    for (int tries = 0; count_entries("/proc/self/task") > 3; tries++) {
        CHECK(tries < 2000);
        usleep(5000);
    }
}

static struct dmaload_options small_segments(void)
{
    struct dmaload_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.segment_bytes = SEGMENT;
    options.window_bytes = 4 * SEGMENT;
    return options;
}

/* Checks that the segment contains its bytes of the file, followed by zeros. */
static void check_segment(const struct dmaload_segment *segment)
{
    size_t all = segment->memory_offset + segment->memory_bytes;
    const unsigned char *memory = mmap(NULL, all, PROT_READ, MAP_SHARED, segment->fd, 0);
    CHECK(memory != MAP_FAILED);
    CHECK(segment->file_offset + segment->bytes <= BYTES && segment->bytes <= segment->memory_bytes);
    CHECK(memcmp(memory + segment->memory_offset, original + segment->file_offset, segment->bytes) == 0);
    /* If only a range was loaded, the last block also contains the bytes after the range. */
    uint64_t end = segment->file_offset + segment->bytes, rest = BYTES - end < 4096 ? BYTES - end : 4096;
    for (uint64_t at = segment->bytes + rest; at < segment->memory_bytes; at++)
        CHECK(memory[segment->memory_offset + at] == 0);
    munmap((void *)memory, all);
}

static void check_load(const struct dmaload_options *options, uint64_t from, uint64_t bytes, size_t expected)
{
    struct dmaload_segment *segments = NULL;
    size_t count = 0;
    int fd = open_file();
    CHECK(dmaload_load_file(fd, options, &segments, &count) == 0);
    CHECK(fcntl(fd, F_GETFD) >= 0 && lseek(fd, 0, SEEK_CUR) == 0);
    close(fd);
    CHECK(count == expected);
    uint64_t at = from;
    for (size_t number = 0; number < count; number++) {
        CHECK(segments[number].index == number && segments[number].file_offset == at);
        CHECK(segments[number].kind == DMALOAD_MEMFD && fcntl(segments[number].fd, F_GETFD) == FD_CLOEXEC);
        check_segment(&segments[number]);
        at += segments[number].bytes;
    }
    CHECK(at == from + bytes);
    /* A descriptor that the caller has taken over stays open. */
    int taken = segments[0].fd;
    segments[0].fd = -1;
    dmaload_segments_free(segments, count);
    CHECK(fcntl(taken, F_GETFD) >= 0);
    close(taken);
}

static void loads_return_the_files_bytes(void)
{
    struct dmaload_options options = small_segments();
    check_load(&options, 0, BYTES, 5);
    check_load(NULL, 0, BYTES, 1);
    options.layout = DMALOAD_SINGLE;
    options.queue_depth = 3;
    options.heap = "memfd";
    check_load(&options, 0, BYTES, 1);
    options = small_segments();
    options.file_offset = 1234567;
    check_load(&options, 1234567, BYTES - 1234567, 4);
    options.file_bytes = 1;
    check_load(&options, 1234567, 1, 1);
    options.file_offset = 0;
    options.file_bytes = BYTES;
    check_load(&options, 0, BYTES, 5);
}

static void expect(int answer, int errno_, const char *words)
{
    if (answer != -errno_ || !strstr(dmaload_last_error(), words)) {
        fprintf(stderr, "returned %d, expected %d with \"%s\" in: %s\n", answer, -errno_, words, dmaload_last_error());
        exit(1);
    }
}

static int try_load(int fd, const struct dmaload_options *options)
{
    struct dmaload_segment *segments = NULL;
    size_t count = 0;
    int answer = dmaload_load_file(fd, options, &segments, &count);
    CHECK(answer != 0 ? segments == NULL && count == 0 : segments != NULL);
    dmaload_segments_free(segments, count);
    return answer;
}

static void null_pointers_are_refused(void)
{
    struct dmaload_segment *segments;
    struct dmaload_segment segment;
    struct dmaload_load *load;
    size_t count;
    int fd = open_file();
    expect(dmaload_load_file(fd, NULL, NULL, &count), EFAULT, "segments is NULL");
    expect(dmaload_load_file(fd, NULL, &segments, NULL), EFAULT, "count is NULL");
    expect(dmaload_alloc_and_read(0, fd, 0, 0, 0, NULL), EFAULT, "dmabuf_fd is NULL");
    expect(dmaload_loader_new(NULL, NULL), EFAULT, "loader is NULL");
    expect(dmaload_start(fd, NULL, NULL), EFAULT, "load is NULL");
    expect(dmaload_event_fd(NULL), EFAULT, "load is NULL");
    expect(dmaload_poll(NULL, &segment), EFAULT, "load is NULL");
    expect(dmaload_load_progress(NULL, NULL), EFAULT, "load is NULL");
    expect(dmaload_load_report(NULL, NULL), EFAULT, "load is NULL");
    dmaload_cancel(NULL);
    dmaload_free(NULL);
    dmaload_loader_free(NULL);
    dmaload_segments_free(NULL, 7);
    CHECK(dmaload_start(fd, NULL, &load) == 0);
    expect(dmaload_poll(load, NULL), EFAULT, "segment is NULL");
    expect(dmaload_load_progress(load, NULL), EFAULT, "progress is NULL");
    expect(dmaload_load_report(load, NULL), EFAULT, "report is NULL");
    dmaload_free(load);
    close(fd);
}

static void unusable_descriptors_are_refused(void)
{
    char other[4300];
    /* A library thread that is still running could open a file and get the number of the closed
     * descriptor. */
    wait_for_threads();
    int closed = open_file(), dmabuf = -7;
    close(closed);
    expect(try_load(-1, NULL), EBADF, "file_fd -1");
    expect(try_load(INT32_MIN, NULL), EBADF, "not an open descriptor");
    expect(try_load(closed, NULL), EBADF, "not an open descriptor");
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    expect(try_load(fd, NULL), EBADF, "not open for reading");
    close(fd);
    fd = open(path, O_PATH | O_CLOEXEC);
    expect(try_load(fd, NULL), EBADF, "not open for reading");
    close(fd);
    fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    expect(try_load(fd, NULL), EISDIR, "is a directory");
    close(fd);
    fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    expect(try_load(fd, NULL), EINVAL, "not a regular file");
    close(fd);
    int pipes[2];
    CHECK(pipe2(pipes, O_CLOEXEC) == 0);
    expect(try_load(pipes[0], NULL), EINVAL, "not a regular file");
    close(pipes[0]);
    close(pipes[1]);
    snprintf(other, sizeof other, "%s/empty", folder);
    fd = open(other, O_RDONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    expect(try_load(fd, NULL), EINVAL, "the file has 0 bytes");
    close(fd);
    unlink(other);

    /* dmaload_alloc_and_read checks the heap before the file. */
    fd = open_file();
    expect(dmaload_alloc_and_read(-1, fd, 0, 0, 0, &dmabuf), EBADF, "heap_fd");
    expect(dmaload_alloc_and_read(closed + 100, fd, 0, 0, 0, &dmabuf), EBADF, "heap_fd");
    expect(dmaload_alloc_and_read(fd, fd, 0, 0, 0, &dmabuf), ENOTTY, "neither a dma-heap nor /dev/udmabuf");
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    expect(dmaload_alloc_and_read(null, fd, 0, 0, 0, &dmabuf), ENOTTY, "neither");
    expect(dmaload_alloc_and_read(null, fd, O_APPEND, 0, 0, &dmabuf), EINVAL, "fd_flags");
    expect(dmaload_alloc_and_read(null, fd, O_ACCMODE, 0, 0, &dmabuf), EINVAL, "fd_flags");
    CHECK(dmabuf == -7);
    close(null);
    close(fd);
}

/* The file may be open with O_DIRECT, unlinked, and at any position. */
static void unlinked_direct_file_at_an_offset_loads(void)
{
    char other[4300];
    struct dmaload_segment *segments;
    size_t count;
    snprintf(other, sizeof other, "%s/unlinked", folder);
    CHECK(link(path, other) == 0);
    int fd = open(other, O_RDWR | O_DIRECT | O_CLOEXEC);
    CHECK(fd >= 0 && unlink(other) == 0 && lseek(fd, 4096, SEEK_SET) == 4096);
    CHECK(dmaload_load_file(fd, NULL, &segments, &count) == 0 && count == 1);
    check_segment(&segments[0]);
    CHECK(lseek(fd, 0, SEEK_CUR) == 4096);
    dmaload_segments_free(segments, count);
    close(fd);
}

/* The options struct of a newer version, which has additional fields. */
struct newer {
    struct dmaload_options options;
    uint64_t unknown[3];
};

static void structs_of_other_versions_are_handled(void)
{
    struct dmaload_options options = small_segments();
    int fd = open_file();
    options.size = 0;
    expect(try_load(fd, &options), EINVAL, "set it to sizeof(struct dmaload_options)");
    options.size = 7;
    expect(try_load(fd, &options), EINVAL, "set it to sizeof");
    options.size = UINT64_MAX;
    expect(try_load(fd, &options), EINVAL, "set it to sizeof");
    /* An older caller's struct ends earlier; the bytes after it are not read. */
    options = small_segments();
    options.size = offsetof(struct dmaload_options, file_offset);
    options.file_offset = UINT64_MAX;
    options.loader = (const struct dmaload_loader *)1;
    CHECK(try_load(fd, &options) == 0);
    uint64_t only_size = 8;
    CHECK(try_load(fd, (const struct dmaload_options *)&only_size) == 0);
    struct newer newer;
    memset(&newer, 0, sizeof newer);
    newer.options.size = sizeof newer;
    CHECK(try_load(fd, &newer.options) == 0);
    newer.unknown[2] = 1;
    expect(try_load(fd, &newer.options), E2BIG, "newer version");

    /* Nothing is written beyond the size of a report, and its unknown fields are set to 0. */
    struct {
        struct dmaload_report report;
        uint64_t unknown;
    } later;
    memset(&later, 0x55, sizeof later);
    later.report.size = sizeof later;
    options = small_segments();
    options.report = &later.report;
    CHECK(try_load(fd, &options) == 0 && later.report.segments == 5 && later.unknown == 0);
    struct dmaload_report report;
    memset(&report, 0x55, sizeof report);
    report.size = offsetof(struct dmaload_report, first_segment_ns);
    options = small_segments();
    options.report = &report;
    CHECK(try_load(fd, &options) == 0);
    CHECK(report.size == offsetof(struct dmaload_report, first_segment_ns));
    CHECK(report.bytes == BYTES && report.total_ns > 0 && report.first_segment_ns == 0x5555555555555555);
    report.size = 3;
    expect(try_load(fd, &options), EINVAL, "struct dmaload_report");
    close(fd);
}

static void invalid_options_are_refused(void)
{
    struct dmaload_options options = small_segments();
    int fd = open_file();
    options.flags = 64;
    expect(try_load(fd, &options), EINVAL, "flags 0x40");
    options = small_segments();
    options.layout = 9;
    expect(try_load(fd, &options), EINVAL, "layout 9");
    options = small_segments();
    options.priority = 2;
    expect(try_load(fd, &options), EINVAL, "priority 2");
    options = small_segments();
    options.window_bytes = MIB;
    expect(try_load(fd, &options), EINVAL, "at least 2 MiB");
    options = small_segments();
    options.segment_bytes = MIB;
    expect(try_load(fd, &options), EINVAL, "multiple of 2 MiB");
    options = small_segments();
    options.heap = "memfb";
    expect(try_load(fd, &options), EINVAL, "memfd, udmabuf, dma-heap:NAME or dma-buf");
    options.heap = "dma-heap:no-such-heap";
    expect(try_load(fd, &options), ENOENT, "no-such-heap");
    options.heap = "memfd";
    options.flags = DMALOAD_HEAP_FD;
    expect(try_load(fd, &options), EINVAL, "can't both be set");
    options.heap = NULL;
    options.heap_fd = fd;
    expect(try_load(fd, &options), ENOTTY, "neither a dma-heap");
    options = small_segments();
    options.file_offset = BYTES;
    expect(try_load(fd, &options), EINVAL, "nothing to load from offset");
    options.file_offset = 1;
    options.file_bytes = BYTES;
    expect(try_load(fd, &options), EINVAL, "bytes at offset 1");
    options = small_segments();
    options.queue_depth = 1000000;
    expect(try_load(fd, &options), EINVAL, "queue depth");
    close(fd);
}

static void report_describes_the_load(void)
{
    struct dmaload_options options = small_segments();
    struct dmaload_report report = { .size = sizeof report };
    int fd = open_file();
    options.report = &report;
    options.flags = DMALOAD_STRICT;
    CHECK(try_load(fd, &options) == 0);
    CHECK(report.bytes == BYTES && report.segments == 5 && report.fallbacks == 0);
    CHECK(report.total_ns >= report.first_segment_ns && report.first_segment_ns > 0);
    CHECK(strncmp(report.text, "memfd by uring-fixed-direct", 27) == 0);
    close(fd);
}

struct reported {
    int times, cancels_at;
    uint64_t bytes;
    struct dmaload_progress last;
};

static int on_progress(void *user, const struct dmaload_progress *progress)
{
    struct reported *reported = user;
    CHECK(progress->read_bytes >= reported->last.read_bytes && progress->read_bytes <= reported->bytes);
    reported->last = *progress;
    return ++reported->times == reported->cancels_at ? 7 : 0;
}

static void progress_is_reported_and_loads_are_cancelled(void)
{
    struct dmaload_options options = small_segments();
    struct reported reported;
    int fd = open_file(), flag = 0;
    memset(&reported, 0, sizeof reported);
    reported.bytes = BYTES;
    options.progress = on_progress;
    options.user = &reported;
    options.cancel = &flag;
    CHECK(try_load(fd, &options) == 0);
    CHECK(reported.times >= 1 && reported.last.planned_bytes == BYTES && reported.last.read_bytes == BYTES);
    CHECK(reported.last.allocated_bytes >= BYTES);
    memset(&reported, 0, sizeof reported);
    reported.bytes = BYTES;
    reported.cancels_at = 1;
    expect(try_load(fd, &options), ECANCELED, "its progress function returned 7");
    CHECK(reported.times == 1);
    options.progress = NULL;
    flag = 1;
    expect(try_load(fd, &options), ECANCELED, "`cancel` flag was set");
    close(fd);

    /* A long load is cancelled before half of it is read, even while its segments arrive without
     * a pause. */
    char other[4300];
    snprintf(other, sizeof other, "%s/long", folder);
    fd = open(other, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, 2000ll * MIB) == 0);
    memset(&reported, 0, sizeof reported);
    reported.bytes = 2000ull * MIB;
    reported.cancels_at = 2;
    flag = 0;
    options.progress = on_progress;
    expect(try_load(fd, &options), ECANCELED, "its progress function returned 7");
    CHECK(reported.times == 2 && reported.last.read_bytes < reported.bytes / 2);
    close(fd);
    unlink(other);
}

static int is_readable(const struct dmaload_load *load, int timeout_ms)
{
    struct pollfd wanted = { .fd = dmaload_event_fd(load), .events = POLLIN };
    CHECK(wanted.fd >= 0);
    return poll(&wanted, 1, timeout_ms) == 1;
}

static void eventfd_signals_each_event(void)
{
    struct dmaload_options options = small_segments();
    struct dmaload_load *load;
    struct dmaload_segment segment;
    struct dmaload_progress progress;
    struct dmaload_report report = { .size = sizeof report };
    int fd = open_file(), answer;
    uint64_t at = 0;
    CHECK(dmaload_start(fd, &options, &load) == 0);
    /* The load has duplicated the descriptor. */
    close(fd);
    do {
        CHECK(is_readable(load, 60000));
        answer = dmaload_poll(load, &segment);
        if (answer == DMALOAD_SEGMENT) {
            CHECK(segment.file_offset == at);
            check_segment(&segment);
            at += segment.bytes;
            close(segment.fd);
            CHECK(dmaload_load_progress(load, &progress) == 0 && progress.read_bytes >= at);
            answer = DMALOAD_PENDING;
        }
    } while (answer == DMALOAD_PENDING);
    CHECK(answer == DMALOAD_FINISHED && at == BYTES);
    CHECK(is_readable(load, 0) && dmaload_poll(load, &segment) == DMALOAD_FINISHED);
    CHECK(dmaload_load_report(load, &report) == 0 && report.bytes == BYTES && report.segments == 5);
    /* Cancelling a finished load does nothing. */
    dmaload_cancel(load);
    CHECK(dmaload_poll(load, &segment) == DMALOAD_FINISHED);
    dmaload_free(load);

    /* The eventfd of a cancelled load is readable, and polling the load fails. */
    fd = open_file();
    CHECK(dmaload_start(fd, &options, &load) == 0);
    CHECK(dmaload_load_report(load, &report) == -EINPROGRESS);
    dmaload_cancel(load);
    CHECK(is_readable(load, 0));
    expect(dmaload_poll(load, &segment), ECANCELED, "cancelled");
    expect(dmaload_poll(load, &segment), ECANCELED, "cancelled");
    expect(dmaload_load_report(load, &report), ECANCELED, "cancelled");
    CHECK(dmaload_load_progress(load, &progress) == 0 && progress.planned_bytes == 0);
    dmaload_free(load);
    /* A load can be freed while it runs, after one segment has been returned. */
    CHECK(dmaload_start(fd, &options, &load) == 0);
    CHECK(is_readable(load, 60000) && dmaload_poll(load, &segment) == DMALOAD_SEGMENT);
    dmaload_free(load);
    check_segment(&segment);
    close(segment.fd);
    CHECK(dmaload_start(fd, &options, &load) == 0);
    dmaload_free(load);
    options.cancel = &fd;
    expect(dmaload_start(fd, &options, &load), EINVAL, "dmaload_load_progress");
    close(fd);
    expect(dmaload_start(fd, NULL, &load), EBADF, "file_fd");
}

static void file_that_shrinks_fails_the_load(void)
{
    char other[4300];
    struct dmaload_options options = small_segments();
    struct dmaload_load *load;
    struct dmaload_segment segment;
    snprintf(other, sizeof other, "%s/shrinks", folder);
    int fd = open(other, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), answer;
    uint64_t got = 0;
    CHECK(fd >= 0 && ftruncate(fd, 64 * MIB) == 0);
    CHECK(dmaload_start(fd, &options, &load) == 0);
    CHECK(ftruncate(fd, 1) == 0);
    do {
        CHECK(is_readable(load, 60000));
        answer = dmaload_poll(load, &segment);
        if (answer == DMALOAD_SEGMENT) {
            got += segment.bytes;
            close(segment.fd);
        }
    } while (answer == DMALOAD_PENDING || answer == DMALOAD_SEGMENT);
    /* The load inspected the file either before or after it shrank. */
    CHECK(answer == -ESTALE || (answer == DMALOAD_FINISHED && got == 1));
    dmaload_free(load);
    close(fd);
    unlink(other);
}

static void *load_repeatedly(void *loader)
{
    struct dmaload_options options = small_segments();
    if (loader) {
        options.window_bytes = 0;
        options.loader = loader;
    }
    for (int times = 0; times < 3; times++)
        check_load(&options, 0, BYTES, 5);
    int fd = open_file();
    options.layout = 9;
    expect(try_load(fd, &options), EINVAL, "layout 9");
    close(fd);
    return NULL;
}

static void threads_can_share_a_loader(void)
{
    struct dmaload_options options = small_segments();
    struct dmaload_loader *loader;
    pthread_t both[2];
    CHECK(dmaload_loader_new(&options, &loader) == 0);
    void *loaders[] = { NULL, loader };
    for (int which = 0; which < 2; which++) {
        for (int thread = 0; thread < 2; thread++)
            CHECK(pthread_create(&both[thread], NULL, load_repeatedly, loaders[which]) == 0);
        for (int thread = 0; thread < 2; thread++)
            CHECK(pthread_join(both[thread], NULL) == 0);
    }
    int fd = open_file();
    options.loader = loader;
    expect(try_load(fd, &options), EINVAL, "if a loader is set");
    options.window_bytes = 0;
    struct dmaload_load *load;
    CHECK(dmaload_start(fd, &options, &load) == 0);
    /* A running load keeps its loader alive. */
    dmaload_loader_free(loader);
    struct dmaload_segment segment;
    CHECK(is_readable(load, 60000) && dmaload_poll(load, &segment) == DMALOAD_SEGMENT);
    close(segment.fd);
    dmaload_free(load);
    close(fd);
}

/* Skips each heap whose device can't be opened. */
static void heaps_are_used_by_descriptor(void)
{
    const char *const devices[] = { "/dev/udmabuf", "/dev/dma_heap/system" };
    for (int which = 0; which < 2; which++) {
        int heap = open(devices[which], O_RDWR | O_CLOEXEC), file = open_file(), dmabuf = -1;
        if (heap < 0) {
            printf("skipped: %s: %s\n", devices[which], strerror(errno));
            close(file);
            continue;
        }
        expect(dmaload_alloc_and_read(heap, file, 0, 0, MIB, &dmabuf), EINVAL, "too few");
        expect(dmaload_alloc_and_read(heap, file, 0, 1, 0, &dmabuf), EINVAL, "");
        for (int batch = 0; batch < 3; batch++) {
            uint32_t flags = batch == 1 ? 0 : O_RDWR | O_CLOEXEC;
            CHECK(dmaload_alloc_and_read(heap, file, flags, 0, batch * 2ull * MIB, &dmabuf) == 0);
            CHECK(fcntl(dmabuf, F_GETFD) == (flags & O_CLOEXEC ? FD_CLOEXEC : 0));
            struct dmaload_segment all = { .fd = dmabuf, .bytes = BYTES, .memory_bytes = (BYTES + 4095) / 4096 * 4096 };
            CHECK(lseek(dmabuf, 0, SEEK_END) >= (off_t)all.memory_bytes);
            check_segment(&all);
            close(dmabuf);
        }
        struct dmaload_options options = small_segments();
        struct dmaload_segment *segments;
        size_t count;
        options.flags = DMALOAD_HEAP_FD;
        options.heap_fd = heap;
        CHECK(dmaload_load_file(file, &options, &segments, &count) == 0 && count == 5);
        for (size_t number = 0; number < count; number++) {
            CHECK(segments[number].kind == DMALOAD_DMA_BUF);
            check_segment(&segments[number]);
        }
        dmaload_segments_free(segments, count);
        close(heap);
        close(file);
        printf("%s: ok\n", devices[which]);
    }
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: suite FOLDER\n");
        return 2;
    }
    snprintf(folder, sizeof folder, "%s", argv[1]);
    snprintf(path, sizeof path, "%s/suite.bin", folder);
    original = malloc(BYTES);
    CHECK(original && dmaload_version() > 0 && strlen(dmaload_last_error()) == 0);
    uint32_t random = 1;
    for (size_t at = 0; at < BYTES; at++) {
        random = random * 1664525 + 1013904223;
        original[at] = (unsigned char)(random >> 24);
    }
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && write(fd, original, BYTES) == BYTES && fsync(fd) == 0);
    close(fd);

    int before = count_entries("/proc/self/fd");
    loads_return_the_files_bytes();
    null_pointers_are_refused();
    unusable_descriptors_are_refused();
    unlinked_direct_file_at_an_offset_loads();
    structs_of_other_versions_are_handled();
    invalid_options_are_refused();
    report_describes_the_load();
    progress_is_reported_and_loads_are_cancelled();
    eventfd_signals_each_event();
    file_that_shrinks_fails_the_load();
    threads_can_share_a_loader();
    heaps_are_used_by_descriptor();
    wait_for_threads();
    CHECK(count_entries("/proc/self/fd") == before);
    unlink(path);
    free(original);
    printf("all checks passed\n");
    return 0;
}
