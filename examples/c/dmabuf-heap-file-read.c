/*
 * Reads a file into a dma-buf in one of the ways that a 2024 kernel patch series compared
 * (DMA_HEAP_IOCTL_ALLOC_AND_READ). Prints the time that allocating and reading take:
 *
 *     dmabuf-heap-file-read HEAP MODE FILE
 *
 * HEAP   system or another heap in /dev/dma_heap; udmabuf; memfd (no device, and no dma-buf)
 * MODE   normal           allocate, map the file, copy
 *        normal_io        allocate, read the file through the page cache
 *        direct_io        dmaload
 *        direct_io_check  dmaload, then compare every byte with the file
 *        bench            dmaload, when `dmaload bench --peer` runs this program
 *
 * All modes but bench first evict the file from the page cache.
 *
 *     cc dmabuf-heap-file-read.c -o dmabuf-heap-file-read $(pkg-config --cflags --libs dmaload)
 */
#define _GNU_SOURCE
#include <dmaload.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/dma-buf.h>
#include <linux/dma-heap.h>
#include <linux/udmabuf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *program = "dmabuf-heap-file-read";

static void fail(const char *what)
{
    fprintf(stderr, "%s: %s: %s\n", program, what, strerror(errno));
    exit(1);
}

/* Reports an error of dmaload, whose functions return negative errnos. */
static void fail_with(int error)
{
    fprintf(stderr, "%s: %s (%s)\n", program, dmaload_last_error(), strerror(-error));
    exit(1);
}

static uint64_t now_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static int is_memfd(const char *heap)
{
    return strcmp(heap, "memfd") == 0;
}

static int is_udmabuf(const char *heap)
{
    return strcmp(heap, "udmabuf") == 0;
}

static int open_heap(const char *heap)
{
    char path[256];
    if (is_udmabuf(heap))
        snprintf(path, sizeof path, "/dev/udmabuf");
    else
        snprintf(path, sizeof path, "/dev/dma_heap/%s", heap);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fail(path);
    return fd;
}

static size_t round_up_to_pages(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

/* Allocates a dma-buf or a memfd directly from the kernel, without dmaload. */
static int allocate(const char *heap, size_t bytes)
{
    if (!is_memfd(heap) && !is_udmabuf(heap)) {
        int heap_fd = open_heap(heap);
        struct dma_heap_allocation_data data = { .len = bytes, .fd_flags = O_RDWR | O_CLOEXEC };
        if (ioctl(heap_fd, DMA_HEAP_IOCTL_ALLOC, &data) < 0)
            fail("DMA_HEAP_IOCTL_ALLOC");
        close(heap_fd);
        return (int)data.fd;
    }
    int memfd = memfd_create("normal", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (memfd < 0 || ftruncate(memfd, (off_t)bytes) < 0)
        fail("memfd_create");
    if (is_memfd(heap))
        return memfd;
    int device = open_heap(heap);
    struct udmabuf_create create = { .memfd = (uint32_t)memfd, .flags = UDMABUF_FLAGS_CLOEXEC, .size = bytes };
    if (fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK) < 0)
        fail("F_ADD_SEALS");
    int fd = ioctl(device, UDMABUF_CREATE, &create);
    if (fd < 0)
        fail("UDMABUF_CREATE");
    close(device);
    close(memfd);
    return fd;
}

static void *map(int fd, size_t bytes, int protection)
{
    void *address = mmap(NULL, bytes, protection, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED)
        fail("mmap");
    return address;
}

/* Begins or ends CPU access to a dma-buf. For a memfd, which refuses the ioctl, does nothing. */
static void sync_cpu(int fd, uint64_t flags)
{
    struct dma_buf_sync sync = { .flags = flags };
    while (ioctl(fd, DMA_BUF_IOCTL_SYNC, &sync) < 0)
        if (errno == ENOTTY || errno == EINVAL)
            return;
        else if (errno != EINTR && errno != EAGAIN)
            fail("DMA_BUF_IOCTL_SYNC");
}

static int normal(const char *heap, int file, size_t bytes)
{
    int fd = allocate(heap, round_up_to_pages(bytes));
    char *to = map(fd, bytes, PROT_READ | PROT_WRITE);
    char *from = map(file, bytes, PROT_READ);
    sync_cpu(fd, DMA_BUF_SYNC_START | DMA_BUF_SYNC_WRITE);
    memcpy(to, from, bytes);
    sync_cpu(fd, DMA_BUF_SYNC_END | DMA_BUF_SYNC_WRITE);
    munmap(from, bytes);
    munmap(to, bytes);
    return fd;
}

static int normal_io(const char *heap, int file, size_t bytes)
{
    int fd = allocate(heap, round_up_to_pages(bytes));
    char *to = map(fd, bytes, PROT_READ | PROT_WRITE);
    sync_cpu(fd, DMA_BUF_SYNC_START | DMA_BUF_SYNC_WRITE);
    for (size_t at = 0; at < bytes;) {
        ssize_t got = pread(file, to + at, bytes - at, (off_t)at);
        if (got < 0 && errno != EINTR)
            fail("pread");
        if (got == 0) {
            fprintf(stderr, "%s: the file shrank while it was read\n", program);
            exit(1);
        }
        at += got > 0 ? (size_t)got : 0;
    }
    sync_cpu(fd, DMA_BUF_SYNC_END | DMA_BUF_SYNC_WRITE);
    munmap(to, bytes);
    return fd;
}

/* Loads with dmaload. Stores in `huge_bytes` how many bytes are on 2 MiB pages (0 if unknown). */
static int direct_io(const char *heap, int file, uint64_t *huge_bytes)
{
    int fd = -1;
    *huge_bytes = 0;
    if (is_memfd(heap)) {
        struct dmaload_report report = { .size = sizeof report };
        struct dmaload_options options = { .size = sizeof options, .layout = DMALOAD_SINGLE, .report = &report };
        struct dmaload_segment *segments;
        size_t count;
        int answer = dmaload_load_file(file, &options, &segments, &count);
        if (answer < 0)
            fail_with(answer);
        *huge_bytes = report.huge_page_bytes;
        fd = segments[0].fd;
        /* Keeps dmaload_segments_free from closing this descriptor. */
        segments[0].fd = -1;
        dmaload_segments_free(segments, count);
    } else {
        int heap_fd = open_heap(heap);
        int answer = dmaload_alloc_and_read(heap_fd, file, O_RDWR | O_CLOEXEC, 0, 0, &fd);
        if (answer < 0)
            fail_with(answer);
        close(heap_fd);
    }
    return fd;
}

/* Compares every byte with the file, and checks that the rest of the last page is zero. */
static void check(int fd, int file, size_t bytes)
{
    static char buffer[1 << 20];
    size_t all = round_up_to_pages(bytes);
    const char *seen = map(fd, all, PROT_READ);
    sync_cpu(fd, DMA_BUF_SYNC_START | DMA_BUF_SYNC_READ);
    for (size_t at = 0; at < all;) {
        size_t want = all - at < sizeof buffer ? all - at : sizeof buffer;
        ssize_t got = at < bytes ? pread(file, buffer, want, (off_t)at) : 0;
        if (got < 0)
            fail("pread");
        if (got == 0) {
            memset(buffer, 0, want);
            got = (ssize_t)want;
        }
        for (ssize_t byte = 0; byte < got; byte++)
            if (seen[at + (size_t)byte] != buffer[byte]) {
                fprintf(stderr, "%s: byte %zu differs\n", program, at + (size_t)byte);
                exit(1);
            }
        at += (size_t)got;
    }
    sync_cpu(fd, DMA_BUF_SYNC_END | DMA_BUF_SYNC_READ);
    munmap((void *)seen, all);
}

/* Implements the protocol of `dmaload bench --peer`, which docs/cli.md describes. */
static void bench(const char *heap, int file)
{
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        if (strncmp(line, "prepare", 7) == 0) {
            printf("{\"ready\": true}\n");
        } else if (strncmp(line, "go", 2) == 0) {
            uint64_t start = now_ns(CLOCK_MONOTONIC), cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID);
            uint64_t huge_bytes;
            int fd = direct_io(heap, file, &huge_bytes);
            double seconds = (double)(now_ns(CLOCK_MONOTONIC) - start) / 1e9;
            double cpu_seconds = (double)(now_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu) / 1e9;
            printf("{\"seconds\": %.9f, \"cpu_seconds\": %.9f, \"page_bytes\": %ld}\n", seconds, cpu_seconds,
                   huge_bytes > 0 ? 2097152 : sysconf(_SC_PAGESIZE));
            close(fd);
        }
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: %s HEAP normal|normal_io|direct_io|direct_io_check|bench FILE\n", argv[0]);
        return 2;
    }
    const char *heap = argv[1], *mode = argv[2];
    int file = open(argv[3], O_RDONLY | O_CLOEXEC);
    struct stat found;
    if (file < 0 || fstat(file, &found) < 0)
        fail(argv[3]);
    size_t bytes = (size_t)found.st_size;
    if (strcmp(mode, "bench") == 0) {
        bench(heap, file);
        return 0;
    }
    /* Dirty pages cannot be evicted from the page cache, so write them back first. */
    fsync(file);
    posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);

    uint64_t start = now_ns(CLOCK_MONOTONIC), huge_bytes;
    int fd;
    if (strcmp(mode, "normal") == 0) {
        fd = normal(heap, file, bytes);
    } else if (strcmp(mode, "normal_io") == 0) {
        fd = normal_io(heap, file, bytes);
    } else if (strcmp(mode, "direct_io") == 0 || strcmp(mode, "direct_io_check") == 0) {
        fd = direct_io(heap, file, &huge_bytes);
    } else {
        fprintf(stderr, "%s: unknown mode %s\n", program, mode);
        return 2;
    }
    uint64_t cost = now_ns(CLOCK_MONOTONIC) - start;
    printf("%s %s: total cost %llu ns for %zu bytes, %.0f MiB/s\n", heap, mode, (unsigned long long)cost, bytes,
           (double)bytes / (1 << 20) / ((double)cost / 1e9));
    if (strcmp(mode, "direct_io_check") == 0) {
        check(fd, file, bytes);
        printf("every byte matches the file\n");
    }
    close(fd);
    return 0;
}
