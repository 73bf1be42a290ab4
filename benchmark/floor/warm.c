/* `warm BYTES [huge]`: has that much memory, in pages of that kind, and gives it back. A virtual machine's host takes free memory away, and first touches of
 * it then cost ten times as much; on which CPU it was touched matters, too. So does the kind: huge pages come from other memory than
 * what small ones have left. */
#include "common.h"

int main(int argc, char **argv) {
    size_t size = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(memory != MAP_FAILED, "mmap");
    int huge = argc > 2 && strcmp(argv[2], "huge") == 0;
    madvise(memory, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    for (size_t at = 0; at < size; at += PAGE) memory[at] = 1;
    return 0;
}
