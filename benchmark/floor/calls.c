/* The floor of benchmark/inside/calls.ts: the same calls from C, nothing else. Prints nanoseconds, the median of the rounds, of one
 * 4 KiB copy, of one copy of 64 MiB, or of one read of a page that is there as MemoryMapping.read does it.
 *
 *     calls ROUNDS one|bulk|read */
#include "common.h"

#include <sys/uio.h>

#define SIZE (64UL << 20)

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void copy(int fd, unsigned long dst, unsigned long src, unsigned long len) {
    struct uffdio_copy arg = {.dst = dst, .src = src, .len = len};
    if (ioctl(fd, UFFDIO_COPY, &arg) != 0) {
        perror("UFFDIO_COPY");
        exit(1);
    }
}

static void load(char *page, char *buffer) {
    struct iovec local = {buffer, PAGE}, remote = {page, PAGE};
    check(process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == PAGE, "process_vm_readv");
}

int main(int argc, char **argv) {
    if (argc < 3 || atoi(argv[1]) < 1) return 2;
    int rounds = atoi(argv[1]), bulk = strcmp(argv[2], "bulk") == 0, reading = strcmp(argv[2], "read") == 0;
    double *times = calloc(rounds, sizeof *times);
    int fd = make_uffd(0);
    char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *source = malloc(SIZE), buffer[PAGE];
    struct uffdio_register reg = {.range = {(unsigned long)memory, SIZE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    check(memory != MAP_FAILED && source && times, "memory");
    madvise(memory, SIZE, MADV_NOHUGEPAGE);
    check(ioctl(fd, UFFDIO_REGISTER, &reg) == 0, "UFFDIO_REGISTER");
    memset(source, 1, SIZE);
    for (int round = -1; round < rounds; round++) { /* the first warms the memory on this CPU */
        if (reading) copy(fd, (unsigned long)memory, (unsigned long)source, SIZE);
        unsigned long step = bulk ? SIZE : PAGE;
        double start = now();
        for (unsigned long at = 0; at < SIZE; at += step) {
            if (reading) load(memory + at, buffer);
            else copy(fd, (unsigned long)memory + at, (unsigned long)source, step);
        }
        if (round >= 0) times[round] = (now() - start) / (SIZE / step);
        madvise(memory, SIZE, MADV_DONTNEED);
    }
    qsort(times, rounds, sizeof *times, ascending);
    printf("%.1f\n", times[rounds / 2]);
    return 0;
}
