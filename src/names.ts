/**
 * Names of features (`UFFD_FEATURE_*`), as ioctl_userfaultfd(2) describes them. Bits of newer kernels that have no name
 * here are told as `bit-N`.
 *
 * @useDeclaredType
 */
export type Feature = (typeof FEATURES)[number];

/** @hidden */
export const FEATURES = [
  'pagefault-flag-wp',
  'event-fork',
  'event-remap',
  'event-remove',
  'missing-hugetlbfs',
  'missing-shmem',
  'event-unmap',
  'sigbus',
  'thread-id',
  'minor-hugetlbfs',
  'minor-shmem',
  'exact-address',
  'wp-hugetlbfs-shmem',
  'wp-unpopulated',
  'poison',
  'wp-async',
  'move',
] as const;

/**
 * Names of ioctls (`UFFDIO_*`).
 *
 * @useDeclaredType
 */
export type Ioctl = (typeof IOCTLS)[number];

/** @hidden */
export const IOCTLS = [
  'register',
  'unregister',
  'wake',
  'copy',
  'zeropage',
  'move',
  'writeprotect',
  'continue',
  'poison',
  'api',
] as const;

/** A name, or `bit-N` for what this version has none for. */
export type OrBit<T extends string> = T | `bit-${number}`;

/**
 * Which faults a range reports: the page is not there; it is write-protected; it is in the page cache, but not mapped.
 *
 * @useDeclaredType
 */
export type RegisterMode = (typeof MODES)[number];

/** @hidden */
export const MODES = ['missing', 'write-protect', 'minor'] as const;
