import { fromNative } from './errors.js';
import type { MappingRange } from './mapping.js';
import { native } from './native.js';

/** Where a page is: nowhere; in the page cache but not mapped; not there but noted (swapped, poisoned); mapped. */
export type Residency = 'absent' | 'cached' | 'noted' | 'present';

/** By their numbers. */
const RESIDENCIES = ['absent', 'cached', 'noted', 'present'] as const;

/** @hidden */
export function residencyOf(handle: number, offset: number, length: number): Residency[] {
  const { error, pages } = native().memoryResidency(handle, offset, length);
  if (error || !pages) throw fromNative(error ?? { code: 'ERR_UFFD_SYSTEM', message: 'no answer' });
  return Array.from(pages, state => RESIDENCIES[state] ?? 'absent');
}

/** What {@link MemoryMapping.writtenPages} found. */
export interface WrittenPages {
  /** Ranges of written pages, in order. */
  ranges: MappingRange[];
  /** Offset to go on from, where `maxPages` was reached; the end of the range otherwise. */
  next: number;
}
