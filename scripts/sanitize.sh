#!/bin/sh
# Runs the tests of crates/uffd and crates/pager once under AddressSanitizer, and those of crates/pager, which has all the
# threads, once under ThreadSanitizer.
#
#   scripts/sanitize.sh [address|thread] [TEST PROGRAM]...
#
# Needs the nightly toolchain. With the sources of the standard library (`rustup component add rust-src --toolchain
# nightly`) the library is compiled with the sanitizer; without them, ThreadSanitizer is told by scripts/sanitize/seen.rs
# what the library's locks order. Not part of `npm test`: it builds everything anew, twice.
set -eu
cd "$(dirname "$0")/.."

target=$(rustc +nightly -vV | sed -n 's/^host: //p')
sysroot=$(rustc +nightly --print sysroot)
std= mismatch=-Cunsafe-allow-abi-mismatch=sanitizer
if [ -d "$sysroot/lib/rustlib/src" ]; then std=-Zbuild-std mismatch=; fi
# Both make mlock(2) do nothing, and need an address space that a limit would not leave them.
skip='--skip move_answers_as_recorded --skip limits_of_the_process_answer_as_recorded'

# Compiles seen.rs with the names that this compiler's library has; prints what the linker has to be told.
seen() {
  out=$PWD/target/seen
  mkdir -p "$out"
  cp scripts/sanitize/seen.rs "$out/seen.rs"
  # The archive that is linked may be bitcode, which not every nm reads; the dynamic library has the same names.
  nm -D --defined-only "$sysroot/lib/rustlib/$target/lib/"libstd-*.so | sed 's/.* //' > "$out/names"
  wrapped=__tsan_atomic64_fetch_sub
  while read -r word pattern; do
    symbol=$(grep -E "$pattern" "$out/names") && [ "$(echo "$symbol" | wc -l)" = 1 ] || {
      echo "thread: no one function of the standard library is $pattern: '$symbol'" >&2
      return 1
    }
    sed -i "s/_$word\"/_$symbol\"/" "$out/seen.rs"
    wrapped="$wrapped $symbol"
  done << 'END'
MUTEX_LOCK 4sync5mutex5futex.*5Mutex14lock_contended$
RWLOCK_READ 4sync6rwlock5futex.*6RwLock14read_contended$
RWLOCK_WRITE 4sync6rwlock5futex.*6RwLock15write_contended$
CONDVAR_WAIT 4sync7condvar5futex.*7Condvar4wait$
CONDVAR_WAIT_TIMEOUT 4sync7condvar5futex.*7Condvar12wait_timeout$
ONCE_CALL 4sync4once5futex.*4Once4call$
END
  rustc +nightly --target "$target" --edition 2024 --crate-type lib --crate-name seen -O -Cpanic=abort \
    --emit obj="$out/seen.o" "$out/seen.rs"
  for symbol in $wrapped; do printf -- '-Clink-arg=-Wl,--wrap=%s ' "$symbol"; done
  echo "-Clink-arg=$out/seen.o"
}

run() {
  sanitizer=$1
  shift
  if [ $# -gt 0 ]; then tests=$(printf -- '--test %s ' "$@"); else tests='--lib --tests'; fi
  flags= suppressions= threads= cannot= packages='-p uffd -p pager'
  if [ "$sanitizer" = thread ]; then
    # The tests of uffd let threads race for registered memory, and faults come in signal handlers.
    packages='-p pager'
    # fork(2) holds this one's own locks until the child exists, for which the thread that needs them has to read an event.
    cannot='--skip child --skip fork --skip events'
    # 8,000 pieces of memory take 17 s with it, which is longer than the test waits.
    cannot="$cannot --skip memory_scattered_into_too_many_pieces_ends"
  fi
  if [ "$sanitizer" = thread ] && [ -z "$std" ]; then
    flags=$(seen)
    suppressions=:suppressions=$PWD/scripts/sanitize/thread.supp
    # The harness was compiled without: one test at a time, so that it shares less with them.
    threads=--test-threads=1
  fi
  started=$(date +%s)
  # Children that are killed or forked are part of the tests: what they still had is no leak. Tests expect SIGBUS.
  USERFAULTFD_SANITIZER=$sanitizer \
    RUSTFLAGS="-Zsanitizer=$sanitizer $mismatch $flags" \
    ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_sigbus=0:use_sigaltstack=0 \
    TSAN_OPTIONS=report_signal_unsafe=0:die_after_fork=0:handle_segv=0:handle_sigbus=0:history_size=4$suppressions \
    cargo +nightly test $std --target "$target" --target-dir "target/$sanitizer" --no-fail-fast $packages \
    $tests -- $threads $skip $cannot
  echo "$sanitizer: ok, $(($(date +%s) - started)) s"
}

if [ $# -gt 0 ]; then
  run "$@"
else
  run address
  run thread
fi
