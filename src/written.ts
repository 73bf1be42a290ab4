import { fromNative } from './errors.js';
import type { MappingRange, MemoryMapping } from './mapping.js';
import type { WrittenPages } from './mapping-state.js';
import { native } from './native.js';
import { validateBoolean, validateInteger, validateOptions, wrongType } from './validate.js';

/** Which part of a mapping, and whether to protect what was found. */
interface Scan {
  offset: number;
  length: number;
  protect: boolean;
}

/** Options of {@link MemoryMapping.writtenPages}. */
export interface WrittenPagesOptions {
  /** Default: 0. */
  offset?: number;
  /** Bytes. Default: to the end. */
  length?: number;
  /** Protect what was found again in the same step, so that no write is lost. Default: `false`. */
  protect?: boolean;
  /** Stop after so many. Default: no limit. */
  maxPages?: number;
}

/** @hidden */
export function readScan(mapping: MemoryMapping, options: WrittenPagesOptions): Scan & { most: number } {
  validateOptions('options', options, ['offset', 'length', 'protect', 'maxPages']);
  const { offset = 0, length = mapping.length - offset, maxPages } = options;
  const protect = validateBoolean('options.protect', options.protect, false);
  const most =
    maxPages === undefined ? 0 : validateInteger('options.maxPages', maxPages, 1, Number.MAX_SAFE_INTEGER);
  return { offset, length, protect, most };
}

/** @hidden */
export function writtenPages(
  mapping: MemoryMapping,
  handle: number,
  { offset, length, protect, most }: Scan & { most: number },
): WrittenPages {
  const scan = native().scanWritten(handle, offset, length, protect, most);
  if (scan.error) throw fromNative(scan.error);
  const ranges: MappingRange[] = [];
  const flat = scan.ranges ?? new Float64Array();
  for (let at = 0; at < flat.length; at += 2) {
    ranges.push({ mapping, offset: flat[at] ?? 0, length: flat[at + 1] ?? 0 });
  }
  return { ranges, next: scan.next };
}

/** @hidden */
export function tryWrittenPages(
  handle: number,
  into: Float64Array,
  { offset, length, protect }: Scan,
): number {
  if (!(into instanceof Float64Array) || into.length < 3) {
    throw wrongType('into', 'a Float64Array of three numbers at least', into);
  }
  return native().scanWrittenInto(handle, offset, length, protect ? 1 : 0, into);
}
