/* The floor of benchmark/handler.ts: takes a userfaultfd from a Unix socket and answers its faults with one page, as a plain
 * loop of poll, read until empty, and UFFDIO_COPY. Ends with its peer. */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096UL
#define BATCH 64

static int receive(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (bind(listening, (struct sockaddr *)&address, sizeof address) || listen(listening, 1)) return -1;
    puts("listening");
    fflush(stdout);
    int peer = accept(listening, NULL, NULL);
    char byte, control[CMSG_SPACE(sizeof(int))];
    struct iovec piece = {&byte, 1};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    if (peer < 0 || recvmsg(peer, &message, 0) != 1 || !CMSG_FIRSTHDR(&message)) return -1;
    int fd;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

int main(int argc, char **argv) {
    int uffd = argc > 1 ? receive(argv[1]) : -1;
    char *page = aligned_alloc(PAGE, PAGE);
    struct uffd_msg messages[BATCH];
    if (uffd < 0 || !page) {
        perror("handler");
        return 2;
    }
    memset(page, 1, PAGE);
    for (;;) {
        struct pollfd ready[2] = {{.fd = uffd, .events = POLLIN}, {.fd = 0, .events = POLLIN}};
        if (poll(ready, 2, -1) < 0 && errno != EINTR) return 1;
        if (ready[1].revents) return 0;
        for (;;) {
            ssize_t bytes = read(uffd, messages, sizeof messages);
            if (bytes <= 0) break;
            for (size_t i = 0; i < bytes / sizeof *messages; i++) {
                struct uffdio_copy copy = {.dst = messages[i].arg.pagefault.address & ~(PAGE - 1),
                                           .src = (unsigned long)page,
                                           .len = PAGE};
                if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST && errno != EAGAIN) return 1;
            }
        }
    }
}
