// The targets, and what a binary of each must be.

/** The oldest glibc that the gnu binaries load on. */
export const GLIBC_FLOOR = '2.17';

/** The pager in a process of its own, by the same name in every platform package. */
export const DAEMON = 'userfaultfd-pagerd';

/** What a platform package has of its own: the addon, then the executable. */
export const binariesOf = platform => [`userfaultfd.${platform}.node`, DAEMON];

/** By Rust's name. `zig`: the same in zig's words. `machine`: as readelf has it. `needed`: the libraries it may ask for. */
export const TARGETS = {
  'x86_64-unknown-linux-gnu': {
    platform: 'linux-x64-gnu',
    libc: 'gnu',
    zig: `x86_64-linux-gnu.${GLIBC_FLOOR}`,
    machine: 'Advanced Micro Devices X86-64',
    needed: /^(?:lib(?:c|m|dl|rt|pthread|util)\.so\.\d|ld-linux-x86-64\.so\.2)$/,
  },
  'x86_64-unknown-linux-musl': {
    platform: 'linux-x64-musl',
    libc: 'musl',
    zig: 'x86_64-linux-musl',
    machine: 'Advanced Micro Devices X86-64',
    needed: /^libc\.so$/,
  },
  'aarch64-unknown-linux-gnu': {
    platform: 'linux-arm64-gnu',
    libc: 'gnu',
    zig: `aarch64-linux-gnu.${GLIBC_FLOOR}`,
    machine: 'AArch64',
    needed: /^(?:lib(?:c|m|dl|rt|pthread|util)\.so\.\d|ld-linux-aarch64\.so\.1)$/,
  },
  'aarch64-unknown-linux-musl': {
    platform: 'linux-arm64-musl',
    libc: 'musl',
    zig: 'aarch64-linux-musl',
    machine: 'AArch64',
    needed: /^libc\.so$/,
  },
};
