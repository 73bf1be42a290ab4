/* The floor of the dirty scan: 512 MiB, one page in PART written to, PAGEMAP_SCAN that takes what was written and protects it
 * again. Prints nanoseconds of a scan, the median of ROUNDS, and how many pages each has found.
 *
 *     scan PART ROUNDS */
#include "common.h"

/* Older headers than the kernel's lack these (linux/fs.h, linux/userfaultfd.h of 6.7). */
struct scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct region {
    uint64_t start, end, categories;
};
#define SCAN _IOWR('f', 16, struct scan)
#define WP_MATCHING (1 << 0)
#define CHECK_WPASYNC (1 << 1)
#define IS_WRITTEN (1 << 1)
#define WP_UNPOPULATED (1 << 13)
#define WP_ASYNC (1 << 15)

#define SIZE (512UL << 20)
#define REGIONS 16384

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static struct region regions[REGIONS];

static unsigned long scan(int pagemap, char *memory) {
    unsigned long pages = 0;
    struct scan arg = {.size = sizeof arg,
                              .flags = WP_MATCHING | CHECK_WPASYNC,
                              .start = (uint64_t)memory,
                              .end = (uint64_t)memory + SIZE,
                              .vec = (uint64_t)regions,
                              .vec_len = REGIONS,
                              .category_mask = IS_WRITTEN,
                              .return_mask = IS_WRITTEN};
    for (arg.walk_end = arg.start; arg.walk_end < arg.end; arg.start = arg.walk_end) {
        int found = ioctl(pagemap, SCAN, &arg);
        check(found >= 0, "PAGEMAP_SCAN");
        for (int i = 0; i < found; i++) pages += (regions[i].end - regions[i].start) / PAGE;
    }
    return pages;
}

int main(int argc, char **argv) {
    unsigned long part = argc > 1 ? strtoul(argv[1], NULL, 10) : 64;
    int rounds = argc > 2 ? atoi(argv[2]) : 9;
    double *times = calloc(rounds, sizeof *times);
    int uffd = make_uffd(WP_ASYNC | WP_UNPOPULATED | UFFD_FEATURE_PAGEFAULT_FLAG_WP);
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(pagemap >= 0 && memory != MAP_FAILED && times != NULL, "memory");
    madvise(memory, SIZE, MADV_NOHUGEPAGE);
    memset(memory, 1, SIZE);
    struct uffdio_register reg = {.range = {(uint64_t)memory, SIZE}, .mode = UFFDIO_REGISTER_MODE_WP};
    check(ioctl(uffd, UFFDIO_REGISTER, &reg) == 0, "UFFDIO_REGISTER");
    struct uffdio_writeprotect on = {.range = reg.range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    check(ioctl(uffd, UFFDIO_WRITEPROTECT, &on) == 0, "UFFDIO_WRITEPROTECT");
    unsigned long pages = 0;
    for (int round = -1; round < rounds; round++) {
        for (size_t at = 0; at < SIZE; at += part * PAGE) memory[at] = (char)round;
        double start = now();
        pages = scan(pagemap, memory);
        if (round >= 0) times[round] = now() - start;
    }
    qsort(times, rounds, sizeof *times, ascending);
    printf("%.0f %lu\n", times[rounds / 2], pages);
    return 0;
}
