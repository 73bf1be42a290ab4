/* The floor of what the pager does: takes a process's memory as Firecracker hands it over, and fills it from a mapping of the
 * image. The simplest loops there are, without states, limits or checks.
 *
 *     serve SOCKET IMAGE HOW [PAGES]
 *
 *     poll      poll, read one message, copy PAGES (1) around it: what everyone writes first
 *     spin      the same without poll: reads again and again
 *     batch     poll, read up to 64 messages, answer them in order
 *     drain     poll, read until nothing is left, answer each with the first page of the image: a handler's loop
 *     bulk      copies all of it, 2 MiB an ioctl, before any fault; then as poll
 *     halves    the same by two threads, a half each
 *     zero      the same with UFFDIO_ZEROPAGE
 *     protect   copies all of it write-protected; then each fault takes the protection off its page
 *     continue  the memory is a memfd: writes PAGES around the fault there, then UFFDIO_CONTINUE
 *
 * Says {"event":"listening"}, then {"event":"session","ns":N}: what the filling beforehand has taken. */
#include "common.h"

#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>

#define BULK (2UL << 20)

static uint64_t base, size;
static char *image;
static int uffd, memfd = -1;

static uint64_t member(const char *json, const char *name) {
    const char *at = strstr(json, name);
    at = at ? strchr(at, ':') : NULL;
    check(at != NULL, name);
    return strtoull(at + 1, NULL, 10);
}

/* The connection stays open: it tells the end of the process. */
static int receive(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    check(bind(listening, (struct sockaddr *)&address, sizeof address) == 0 && listen(listening, 1) == 0, path);
    tell("{\"event\":\"listening\"}");
    int peer = accept(listening, NULL, NULL), fds[2] = {-1, -1};
    char json[4096] = {0}, control[CMSG_SPACE(sizeof fds)];
    struct iovec piece = {json, sizeof json - 1};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    check(peer >= 0 && recvmsg(peer, &message, 0) > 0 && CMSG_FIRSTHDR(&message) != NULL, "recvmsg");
    memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&message)), CMSG_FIRSTHDR(&message)->cmsg_len - CMSG_LEN(0));
    uffd = fds[0];
    memfd = fds[1];
    base = member(json, "base_host_virt_addr");
    size = member(json, "\"size\"");
    return peer;
}

static void copy(uint64_t at, uint64_t offset, uint64_t len, uint64_t mode) {
    struct uffdio_copy copy = {.dst = at, .src = (uint64_t)image + offset, .len = len, .mode = mode};
    if (ioctl(uffd, UFFDIO_COPY, &copy) == 0 || errno == EAGAIN) return;
    check(errno == EEXIST, "UFFDIO_COPY");
    struct uffdio_range range = {at, len};
    check(ioctl(uffd, UFFDIO_WAKE, &range) == 0, "UFFDIO_WAKE");
}

static void zero(uint64_t at, uint64_t len) {
    struct uffdio_zeropage zero = {.range = {at, len}};
    check(ioctl(uffd, UFFDIO_ZEROPAGE, &zero) == 0, "UFFDIO_ZEROPAGE");
}

static void unprotect(uint64_t at) {
    struct uffdio_writeprotect off = {.range = {at, PAGE}};
    check(ioctl(uffd, UFFDIO_WRITEPROTECT, &off) == 0, "UFFDIO_WRITEPROTECT");
}

static void resume(uint64_t at, uint64_t len) {
    check(pwrite(memfd, image + (at - base), len, at - base) == (ssize_t)len, "pwrite of the memfd");
    struct uffdio_continue go = {.range = {at, len}};
    check(ioctl(uffd, UFFDIO_CONTINUE, &go) == 0 || errno == EEXIST, "UFFDIO_CONTINUE");
}

static void answer(const struct uffd_msg *message, const char *how, uint64_t pages) {
    uint64_t span = pages * PAGE, at = message->arg.pagefault.address - base;
    at = base + at / span * span;
    if (message->event != UFFD_EVENT_PAGEFAULT) return;
    if (strcmp(how, "protect") == 0) unprotect(at);
    else if (strcmp(how, "continue") == 0) resume(at, span);
    else copy(at, strcmp(how, "drain") == 0 ? 0 : at - base, span, 0);
}

static void *second_half(void *unused) {
    for (uint64_t at = base + size / 2; at < base + size; at += BULK) copy(at, at - base, BULK, 0);
    return unused;
}

/* Of a size that is a multiple of 4 MiB. */
static double fill_in_halves(void) {
    double start = now();
    pthread_t other;
    check(pthread_create(&other, NULL, second_half, NULL) == 0, "pthread_create");
    for (uint64_t at = base; at < base + size / 2; at += BULK) copy(at, at - base, BULK, 0);
    check(pthread_join(other, NULL) == 0, "pthread_join");
    return now() - start;
}

static double fill(const char *how) {
    double start = now();
    if (strcmp(how, "halves") == 0) return fill_in_halves();
    for (uint64_t at = base; at < base + size; at += BULK) {
        uint64_t len = base + size - at < BULK ? base + size - at : BULK;
        if (strcmp(how, "bulk") == 0) copy(at, at - base, len, 0);
        else if (strcmp(how, "zero") == 0) zero(at, len);
        else if (strcmp(how, "protect") == 0) copy(at, at - base, len, UFFDIO_COPY_MODE_WP);
        else return 0;
    }
    return now() - start;
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    const char *how = argv[3];
    uint64_t pages = argc > 4 ? strtoull(argv[4], NULL, 10) : 1;
    int drains = strcmp(how, "drain") == 0;
    size_t most = drains || strcmp(how, "batch") == 0 ? 64 : 1;
    struct uffd_msg messages[64];
    int file = open(argv[2], O_RDONLY | O_CLOEXEC);
    struct stat stat;
    check(file >= 0 && fstat(file, &stat) == 0, argv[2]);
    image = mmap(NULL, stat.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, file, 0);
    check(image != MAP_FAILED, "mmap");
    int peer = receive(argv[1]);
    printf("{\"event\":\"session\",\"ns\":%.0f}\n", fill(how));
    fflush(stdout);
    struct pollfd ready[2] = {{.fd = uffd, .events = POLLIN}, {.fd = peer, .events = POLLIN}};
    int spins = strcmp(how, "spin") == 0;
    for (uint64_t turn = 0;; turn++) {
        /* Who spins looks only now and then whether anybody is left. */
        if (!spins || turn % 65536 == 0) check(poll(ready, 2, spins ? 0 : -1) >= 0 || errno == EINTR, "poll");
        if (ready[1].revents) return 0;
        ssize_t bytes;
        do {
            bytes = read(uffd, messages, most * sizeof *messages);
            for (ssize_t i = 0; i < bytes / (ssize_t)sizeof *messages; i++) answer(&messages[i], how, pages);
        } while (drains && bytes > 0);
    }
}
