#!/bin/sh
# Runs the tests of crates/uffd and crates/pager once under AddressSanitizer and once under ThreadSanitizer.
#
#   scripts/sanitize.sh [address|thread]
#
# Needs the nightly toolchain; ThreadSanitizer needs the sources of the standard library as well (`rustup component add
# rust-src --toolchain nightly`). Not part of `npm test`: it builds everything anew, twice.
set -eu
cd "$(dirname "$0")/.."

target=$(rustc +nightly -vV | sed -n 's/^host: //p')
std= mismatch=-Cunsafe-allow-abi-mismatch=sanitizer
if [ -d "$(rustc +nightly --print sysroot)/lib/rustlib/src" ]; then std=-Zbuild-std mismatch=; fi
# Both make mlock(2) do nothing, and need an address space that a limit would not leave them.
skip='--skip move_answers_as_recorded --skip limits_of_the_process_answer_as_recorded'

run() {
  sanitizer=$1
  if [ "$sanitizer" = thread ] && [ -z "$std" ]; then
    # It would not see what the locks, channels and reference counts of the library order, and call all of it races.
    echo "thread: not run, rust-src is missing: rustup component add rust-src --toolchain nightly"
    return 1
  fi
  started=$(date +%s)
  # Children that are killed or forked are part of the tests: what they still had is no leak. Tests expect SIGBUS.
  USERFAULTFD_SANITIZER=$sanitizer \
    RUSTFLAGS="-Zsanitizer=$sanitizer $mismatch" \
    ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_sigbus=0:use_sigaltstack=0 \
    TSAN_OPTIONS=report_signal_unsafe=0:die_after_fork=0:handle_segv=0:handle_sigbus=0 \
    cargo +nightly test $std --target "$target" --target-dir "target/$sanitizer" --no-fail-fast -p uffd -p pager \
    --lib --tests -- $skip
  echo "$sanitizer: ok, $(($(date +%s) - started)) s"
}

if [ $# -gt 0 ]; then run "$1"; else
  run address
  run thread
fi
