/* `hold THREAD`: stops one thread of another process, whose number is given, until this is killed. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv) {
    pid_t thread = argc > 1 ? atoi(argv[1]) : -1;
    int status;
    if (ptrace(PTRACE_SEIZE, thread, 0, 0) || ptrace(PTRACE_INTERRUPT, thread, 0, 0) ||
        waitpid(thread, &status, __WALL) != thread) {
        perror("ptrace");
        return 1;
    }
    puts("{\"event\":\"held\"}");
    fflush(stdout);
    for (;;) pause();
}
