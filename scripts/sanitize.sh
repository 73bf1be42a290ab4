#!/bin/sh
# Runs the tests of crates/uffd and crates/pager once under AddressSanitizer and once under ThreadSanitizer.
#
#   scripts/sanitize.sh [address|thread]
#
# Needs the nightly toolchain. Where its sources are there (`rustup component add rust-src`), the standard library is
# instrumented too; else ThreadSanitizer does not see the synchronisation inside it, and what it says of that is
# suppressed below. Not part of `npm test`: it builds everything anew, twice.
set -eu
cd "$(dirname "$0")/.."

target=$(rustc +nightly -vV | sed -n 's/^host: //p')
std=
if [ -d "$(rustc +nightly --print sysroot)/lib/rustlib/src" ]; then std=-Zbuild-std; fi

# Both make mlock(2) do nothing, and need an address space that a limit would not leave them.
skip='--skip move_answers_as_recorded --skip limits_of_the_process_answer_as_recorded'

run() {
  sanitizer=$1
  started=$(date +%s)
  echo "$sanitizer${std:+, with the standard library}"
  # Children that are killed or forked are part of the tests: what they still had is no leak of ours.
  USERFAULTFD_SANITIZER=$sanitizer \
    RUSTFLAGS="-Zsanitizer=$sanitizer ${std:--Cunsafe-allow-abi-mismatch=sanitizer}" \
    ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_sigbus=0:use_sigaltstack=0 \
    TSAN_OPTIONS=report_signal_unsafe=0:die_after_fork=0:handle_segv=0:handle_sigbus=0:suppressions=$PWD/scripts/sanitize.supp \
    cargo +nightly test $std --target "$target" --target-dir "target/$sanitizer" --no-fail-fast -p uffd -p pager \
    --lib --tests -- $skip
  echo "$sanitizer: ok, $(($(date +%s) - started)) s"
}

if [ $# -gt 0 ]; then run "$1"; else
  run address
  run thread
fi
