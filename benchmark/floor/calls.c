/* The floor of benchmark/calls.ts: the same ioctls from C, nothing else. Prints nanoseconds per 4 KiB copy, and for one
 * copy of the whole range, both as medians of the rounds given. */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define SIZE (64UL << 20)

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

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

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 5;
    double *one = calloc(rounds, sizeof *one), *bulk = calloc(rounds, sizeof *bulk);
    int device = open("/dev/userfaultfd", O_RDONLY | O_CLOEXEC);
    int fd = device >= 0 ? ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK)
                         : (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API};
    char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char *source = malloc(SIZE);
    struct uffdio_register reg = {.range = {(unsigned long)memory, SIZE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (rounds < 1 || fd < 0 || ioctl(fd, UFFDIO_API, &api) || memory == MAP_FAILED || !source) return 2;
    madvise(memory, SIZE, MADV_NOHUGEPAGE);
    if (ioctl(fd, UFFDIO_REGISTER, &reg)) return 2;
    memset(source, 1, SIZE);
    for (int round = -1; round < rounds; round++) {
        double start = now();
        for (unsigned long at = 0; at < SIZE; at += PAGE) copy(fd, (unsigned long)memory + at, (unsigned long)source, PAGE);
        double middle = now();
        madvise(memory, SIZE, MADV_DONTNEED);
        double again = now();
        copy(fd, (unsigned long)memory, (unsigned long)source, SIZE);
        double end = now();
        madvise(memory, SIZE, MADV_DONTNEED);
        if (round < 0) continue; /* warms the memory on this CPU */
        one[round] = (middle - start) / (SIZE / PAGE);
        bulk[round] = end - again;
    }
    qsort(one, rounds, sizeof *one, ascending);
    qsort(bulk, rounds, sizeof *bulk, ascending);
    printf("%.1f %.0f\n", one[rounds / 2], bulk[rounds / 2]);
    return 0;
}
