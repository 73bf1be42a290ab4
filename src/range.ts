import { MemoryMapping, type MappingRange } from './mapping.js';
import { argumentError, got, validateInteger, validateOptions, wrongType } from './validate.js';

/** Addresses of a process, where there is no mapping to name them by: memory of another process, or of a forked child. */
export interface AddressRange {
  /** First address; a multiple of the page size. */
  readonly address: bigint;
  /** Bytes; a multiple of the page size. */
  readonly length: number;
}

/** Memory: a part of a mapping of this package ({@link MemoryMapping.range}), or addresses. */
export type MemoryRange = MappingRange | AddressRange;

/** @hidden What an address has no mapping to tell: the ordinary size on every machine this package runs on. */
export const ORDINARY_PAGE = 4096;
/** Above it, no address of user space exists; page-aligned numbers below it are exact. */
const END_OF_ADDRESSES = 1n << 63n;

/** @hidden Bytes of a page of a range that was checked. */
export function pageOf(range: MemoryRange): number {
  return 'mapping' in range ? range.mapping.pageSize : ORDINARY_PAGE;
}

/**
 * @hidden Checks a range before any ioctl is made and gives its first address. It stands in front of every operation, so
 * nothing is allocated unless something is wrong.
 */
export function startOf(name: string, range: MemoryRange): number {
  if (
    range !== null &&
    typeof range === 'object' &&
    'mapping' in range &&
    range.mapping instanceof MemoryMapping
  ) {
    const { mapping, offset, length } = range;
    const page = mapping.pageSize;
    if (offset % page === 0 && length % page === 0 && length > 0 && offset >= 0) {
      if (offset + length <= mapping.length) return mapping.addressNumber() + offset;
    }
  }
  return plainStart(range) ?? explainedStart(name, range);
}

/** The start of addresses that are as they should be. */
function plainStart(range: unknown): number | undefined {
  if (range === null || typeof range !== 'object') return undefined;
  let keys = 0;
  // No array is made of them.
  for (const key in range) {
    if (key !== 'address' && key !== 'length') return undefined;
    keys += 1;
  }
  const { address, length } = range as AddressRange;
  if (keys !== 2 || typeof address !== 'bigint' || typeof length !== 'number') return undefined;
  const start = Number(address);
  const isWhole = start % ORDINARY_PAGE === 0 && length % ORDINARY_PAGE === 0;
  return isWhole && start >= 0 && length > 0 && start + length <= Number.MAX_SAFE_INTEGER ? start : undefined;
}

function explainedStart(name: string, range: MemoryRange): number {
  if (range !== null && typeof range === 'object' && 'mapping' in range) {
    const { mapping, offset, length } = range;
    if (!(mapping instanceof MemoryMapping)) {
      throw wrongType(`${name}.mapping`, 'a MemoryMapping', mapping);
    }
    wholePages(`${name}.offset`, offset, mapping.pageSize, 0);
    wholePages(`${name}.length`, length, mapping.pageSize, mapping.pageSize);
    throw argumentError(
      RangeError,
      'ERR_OUT_OF_RANGE',
      `Expected \`${name}\` to lie in its mapping of ${mapping.length} bytes, got ${length} bytes at ${offset}`,
    );
  }
  const { address, length } = addresses(name, range);
  wholePages(`${name}.length`, length, ORDINARY_PAGE, ORDINARY_PAGE);
  if (address % BigInt(ORDINARY_PAGE) !== 0n || address + BigInt(length) > END_OF_ADDRESSES) {
    throw argumentError(
      RangeError,
      'ERR_OUT_OF_RANGE',
      `Expected \`${name}.address\` to be a multiple of ${ORDINARY_PAGE} in the address space, got ${address}n`,
    );
  }
  return Number(address);
}

/** @hidden Where bytes are read from: they need not be whole pages. */
export function sourceOf(name: string, range: MemoryRange): number {
  if (range !== null && typeof range === 'object' && 'mapping' in range) return startOf(name, range);
  const { address, length } = addresses(name, range);
  validateInteger(`${name}.length`, length, 1, Number.MAX_SAFE_INTEGER);
  if (address + BigInt(length) > BigInt(Number.MAX_SAFE_INTEGER)) {
    throw argumentError(
      RangeError,
      'ERR_OUT_OF_RANGE',
      `Expected \`${name}.address\` to be an address of this process, got ${address}n`,
    );
  }
  return Number(address);
}

function addresses(name: string, range: unknown): AddressRange {
  validateOptions(name, range, ['address', 'length']);
  const { address, length } = range as AddressRange;
  if (typeof address !== 'bigint') {
    throw wrongType(`${name}.address`, 'a bigint', address);
  }
  if (address < 0n) {
    throw argumentError(
      RangeError,
      'ERR_OUT_OF_RANGE',
      `Expected \`${name}.address\` to be an address, got ${address}n`,
    );
  }
  return { address, length };
}

function wholePages(name: string, value: unknown, page: number, least: number): void {
  const number = validateInteger(name, value, least, Number.MAX_SAFE_INTEGER);
  if (number % page !== 0) {
    throw argumentError(
      RangeError,
      'ERR_OUT_OF_RANGE',
      `Expected \`${name}\` to be a multiple of the page size, ${page}, ${got(value)}`,
    );
  }
}
