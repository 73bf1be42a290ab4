/* What the programs here share. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL

static inline double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static inline void check(int right, const char *what) {
    if (right) return;
    perror(what);
    exit(2);
}

static inline void tell(const char *line) {
    puts(line);
    fflush(stdout);
}

static inline int make_uffd(uint64_t features) {
    int device = open("/dev/userfaultfd", O_RDONLY | O_CLOEXEC);
    int fd = device >= 0 ? ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK)
                         : (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    check(fd >= 0, "userfaultfd");
    check(ioctl(fd, UFFDIO_API, &api) == 0, "UFFDIO_API");
    return fd;
}
