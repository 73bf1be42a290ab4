import type { MappingRange } from './mapping.js';

/** Where a page is: nowhere; in the page cache but not mapped; not there but noted (swapped, poisoned); mapped. */
export type Residency = 'absent' | 'cached' | 'noted' | 'present';

/** @hidden By their numbers. */
export const RESIDENCIES = ['absent', 'cached', 'noted', 'present'] as const;

/** What {@link MemoryMapping.writtenPages} found. */
export interface WrittenPages {
  /** Ranges of written pages, in order. */
  ranges: MappingRange[];
  /** Offset to go on from, where `maxPages` was reached; the end of the range otherwise. */
  next: number;
}
