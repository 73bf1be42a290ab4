import type { NativeMappingOptions } from '#native';

import { validateInteger, validateOneOf, validatePowerOfTwo } from './validate.js';

/**
 * The pages memory is made of: the system's ordinary ones; ordinary ones that are never joined to huge pages (`'small'`,
 * so that writes are tracked page by page); ordinary ones that may be joined (`'transparent'`); or huge pages of so many
 * bytes (2 MiB, 1 GiB) from the system's pool.
 */
export type PageKind = 'ordinary' | 'small' | 'transparent' | number;

/** How {@link MemoryMapping.anonymous} maps. */
export interface AnonymousOptions {
  /** Shared with processes that this one forks. Default: `false`. */
  shared?: boolean;
  /** Default: `'ordinary'`. */
  pages?: PageKind;
}

/** How {@link MemoryMapping.memfd} maps. */
export interface MemfdOptions {
  /** Shown in /proc; at most 249 bytes. Default: empty. */
  name?: string;
  /** Default: `'ordinary'`. */
  pages?: PageKind;
  /** Writes reach the memfd and whoever else has it. Default: `true`. */
  shared?: boolean;
  /** Its size can never change (`F_SEAL_SHRINK`, `F_SEAL_GROW`). Default: `true`. */
  sealed?: boolean;
}

/** How {@link MemoryMapping.file} maps. */
export interface FileMappingOptions {
  /** What writing does: it is refused, stays in this mapping, or reaches the file. Default: `'read-only'`. */
  access?: 'read-only' | 'copy-on-write' | 'shared';
  /** Byte of the file that the mapping starts with; a multiple of the page size. Default: 0. */
  offset?: number;
  /** Bytes. Default: to the end of the file. */
  length?: number;
}

/** @hidden */
export const DEFAULTS: NativeMappingOptions = {
  kind: 'anonymous',
  shared: false,
  pages: 0,
  name: '',
  sealed: true,
  path: '',
  offset: 0,
  access: 0,
};

/** @hidden */
export function validateLength(length: unknown): number {
  return validateInteger('length', length, 1, Number.MAX_SAFE_INTEGER);
}

/** @hidden */
export function validatePages(pages: unknown): number {
  if (pages === undefined) return 0;
  if (typeof pages === 'number') return validatePowerOfTwo('options.pages', pages, 64 * 1024, 2 ** 30);
  const kinds = ['ordinary', 'small', 'transparent'] as const;
  return kinds.indexOf(validateOneOf('options.pages', pages, kinds));
}
