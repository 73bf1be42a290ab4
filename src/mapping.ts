import type { NativeJob, NativeMappingOptions } from '#native';

import { fromNative, UffdError } from './errors.js';
import { native } from './native.js';
import {
  validateBoolean,
  validateInteger,
  validateOneOf,
  validateOptions,
  validatePath,
  validatePowerOfTwo,
  validateView,
} from './validate.js';

/** A part of a {@link MemoryMapping}: whole pages of it. */
export interface MappingRange {
  readonly mapping: MemoryMapping;
  /** Bytes from the start of the mapping. */
  readonly offset: number;
  /** Bytes. */
  readonly length: number;
}

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

/** Where a page is: nowhere; in the page cache but not mapped; not there but noted (swapped, poisoned); mapped. */
export type Residency = 'absent' | 'cached' | 'noted' | 'present';

const RESIDENCIES = ['absent', 'cached', 'noted', 'present'] as const;

/** What {@link MemoryMapping.writtenPages} found. */
export interface WrittenPages {
  /** Ranges of written pages, in order. */
  ranges: MappingRange[];
  /** Offset to go on from, where `maxPages` was reached; the end of the range otherwise. */
  next: number;
}

const DEFAULTS: NativeMappingOptions = {
  kind: 'anonymous',
  shared: false,
  pages: 0,
  name: '',
  sealed: true,
  path: '',
  offset: 0,
  access: 0,
};

/** Who can keep a mapping from being closed: a userfaultfd that has a part of it registered. */
interface Registrar {
  leave(mapping: MemoryMapping): void;
}

/**
 * Memory of this process that can be registered with a userfaultfd. It lies outside of JavaScript's heap and is read and
 * written by copying. `read`, `write` and `discard` wait for missing pages on threads of the package's own (at most 16),
 * never on the calling one.
 *
 * @example
 * ```ts
 * using mapping = MemoryMapping.anonymous(64 * MiB);
 * uffd.register(mapping.range(), { modes: ['missing'] });
 * const bytes = await mapping.read(4096, 100); // waits until somebody fills the page
 * ```
 */
export class MemoryMapping {
  /** Bytes. */
  readonly length: number;
  /** Bytes of a page of it: what the kernel fills, protects and takes back. */
  readonly pageSize: number;
  /** First address. */
  readonly address: bigint;
  /** Descriptor of the memfd, owned by the mapping; to be sent to another process. `undefined` for other memory. */
  readonly fd: number | undefined;
  readonly #handle: number;
  readonly #number: number;
  readonly #registrars = new Set<Registrar>();
  #closed = false;

  private constructor(options: NativeMappingOptions) {
    const mapped = native().mapMemory(options);
    if (mapped.error) throw fromNative(mapped.error);
    this.length = mapped.length;
    this.pageSize = mapped.pageSize;
    this.address = BigInt(mapped.address);
    this.fd = mapped.fd;
    this.#number = mapped.address;
    this.#handle = mapped.handle;
  }

  /**
   * Maps memory without a file (mmap(2), `MAP_ANONYMOUS`). Nothing is resident.
   *
   * @param length Bytes, rounded up to whole pages.
   * @throws {@linkcode UffdError} `ERR_UFFD_EXHAUSTED` (not enough huge pages in the pool), `ERR_UFFD_UNSUPPORTED` (no such
   *   huge pages), `ERR_UFFD_SYSTEM`
   */
  static anonymous(length: number, options: AnonymousOptions = {}): MemoryMapping {
    validateOptions('options', options, ['shared', 'pages']);
    return new MemoryMapping({
      ...DEFAULTS,
      length: validateLength(length),
      shared: validateBoolean('options.shared', options.shared, false),
      pages: validatePages(options.pages),
    });
  }

  /**
   * Makes a memfd and maps it (memfd_create(2)): minor faults, and memory to share with other processes.
   *
   * @param length Bytes, rounded up to whole pages.
   * @throws {@linkcode UffdError} as {@link MemoryMapping.anonymous}
   */
  static memfd(length: number, options: MemfdOptions = {}): MemoryMapping {
    validateOptions('options', options, ['name', 'pages', 'shared', 'sealed']);
    const { name = '' } = options;
    return new MemoryMapping({
      ...DEFAULTS,
      kind: 'memfd',
      length: validateLength(length),
      shared: validateBoolean('options.shared', options.shared, true),
      sealed: validateBoolean('options.sealed', options.sealed, true),
      pages: validatePages(options.pages),
      name: name === '' ? '' : validatePath('options.name', name),
    });
  }

  /**
   * Maps a file. Files of a disk can be a source of bytes, but cannot be registered; memfds that came from elsewhere can.
   *
   * @param file A path, or a descriptor, which stays the caller's.
   * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM`: it cannot be opened, is shorter than asked for, or not whole pages.
   */
  static file(file: string | number, options: FileMappingOptions = {}): MemoryMapping {
    validateOptions('options', options, ['access', 'offset', 'length']);
    const { access = 'read-only', offset = 0, length } = options;
    const modes = ['read-only', 'copy-on-write', 'shared'] as const;
    return new MemoryMapping({
      ...DEFAULTS,
      kind: 'file',
      ...(typeof file === 'number'
        ? { fd: validateInteger('file', file, 0, 2 ** 31 - 1) }
        : { path: validatePath('file', file) }),
      offset: validateInteger('options.offset', offset, 0, Number.MAX_SAFE_INTEGER),
      access: modes.indexOf(validateOneOf('options.access', access, modes)),
      ...(length === undefined ? {} : { length: validateLength(length) }),
    });
  }

  /** Whether {@link MemoryMapping.close} was called. */
  get closed(): boolean {
    return this.#closed;
  }

  /**
   * A part of it, for the operations of a userfaultfd.
   *
   * @param offset Bytes; a multiple of `pageSize`. Default: 0.
   * @param length Bytes; a multiple of `pageSize`. Default: to the end.
   * @throws {RangeError} `ERR_OUT_OF_RANGE`: not whole pages, or outside of the mapping.
   */
  range(offset = 0, length: number = this.length - offset): MappingRange {
    this.#check('offset', offset, length, this.pageSize);
    return { mapping: this, offset, length };
  }

  /**
   * Reads bytes, on another thread: it may wait for a missing page without holding up the event loop.
   *
   * @param offset Bytes from the start.
   * @param length Bytes.
   */
  async read(offset: number, length: number): Promise<Buffer> {
    this.#check('offset', offset, length, 1);
    return (await finished(native().readMemory(this.#open(), offset, length))) ?? Buffer.alloc(0);
  }

  /**
   * Writes bytes, on another thread. They are copied before this returns.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM` with EACCES where the mapping is for reading only.
   */
  async write(offset: number, bytes: ArrayBufferView): Promise<void> {
    const view = validateView('bytes', bytes);
    this.#check('offset', offset, view.byteLength, 1);
    await finished(native().writeMemory(this.#open(), offset, view));
  }

  /**
   * Reads into `into` on this thread: where a page is missing, it sleeps here until another thread or process fills it.
   * For workers, and for memory that is present.
   */
  readSync(offset: number, into: ArrayBufferView): void {
    const view = validateView('into', into);
    this.#check('offset', offset, view.byteLength, 1);
    done(native().readMemorySync(this.#open(), offset, view));
  }

  /** Writes on this thread; see {@link MemoryMapping.readSync}. */
  writeSync(offset: number, bytes: ArrayBufferView): void {
    const view = validateView('bytes', bytes);
    this.#check('offset', offset, view.byteLength, 1);
    done(native().writeMemorySync(this.#open(), offset, view));
  }

  /**
   * Gives pages back (madvise(2): `MADV_DONTNEED` of private, `MADV_REMOVE` of shared memory); they are missing afterwards.
   * On another thread, because it waits until the event is read where a userfaultfd has `event-remove` in use.
   */
  async discard(offset = 0, length: number = this.length - offset): Promise<void> {
    this.#check('offset', offset, length, this.pageSize);
    await finished(native().discardMemory(this.#open(), offset, length));
  }

  /**
   * {@link MemoryMapping.discard} on this thread. Never on the thread that reads the events of a userfaultfd that has
   * `event-remove` in use: it would wait for itself.
   */
  discardSync(offset = 0, length: number = this.length - offset): void {
    this.#check('offset', offset, length, this.pageSize);
    done(native().discardMemorySync(this.#open(), offset, length));
  }

  /**
   * Makes pages present (`MADV_POPULATE_READ` or `_WRITE`), on another thread: as if each had been touched.
   *
   * @param options `write`: as if written to. Default: `false`.
   * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM` with EFAULT at a poisoned page.
   */
  async populate(
    offset = 0,
    length: number = this.length - offset,
    options: { write?: boolean } = {},
  ): Promise<void> {
    validateOptions('options', options, ['write']);
    this.#check('offset', offset, length, this.pageSize);
    const write = validateBoolean('options.write', options.write, false);
    await finished(native().populateMemory(this.#open(), offset, length, write));
  }

  /** Where each page is, as of a moment during the call (/proc/self/pagemap, mincore(2)). Touches none. */
  residency(offset = 0, length: number = this.length - offset): Residency[] {
    this.#check('offset', offset, length, this.pageSize);
    const { error, pages } = native().memoryResidency(this.#open(), offset, length);
    if (error || !pages) throw fromNative(error ?? { code: 'ERR_UFFD_SYSTEM', message: 'no answer' });
    return Array.from(pages, state => RESIDENCIES[state] ?? 'absent');
  }

  /**
   * Pages written to since they were last write-protected (`PAGEMAP_SCAN`, Linux 6.7). The range is registered for
   * `'write-protect'` with a userfaultfd that has `wp-async` in use: then writes cause no message.
   *
   * @param options `protect`: protect them again in the same step, so that no write is lost (default: `false`);
   *   `maxPages`: stop after so many (default: no limit).
   * @throws {@linkcode UffdError} `ERR_UFFD_NOT_REGISTERED` (writes are not tracked in a part of the range),
   *   `ERR_UFFD_UNSUPPORTED` (the kernel is older)
   */
  writtenPages(
    options: { offset?: number; length?: number; protect?: boolean; maxPages?: number } = {},
  ): WrittenPages {
    validateOptions('options', options, ['offset', 'length', 'protect', 'maxPages']);
    const { offset = 0, length = this.length - offset, maxPages } = options;
    this.#check('options.offset', offset, length, this.pageSize);
    const protect = validateBoolean('options.protect', options.protect, false);
    const most =
      maxPages === undefined ? 0 : validateInteger('options.maxPages', maxPages, 1, Number.MAX_SAFE_INTEGER);
    const scan = native().scanWritten(this.#open(), offset, length, protect, most);
    if (scan.error) throw fromNative(scan.error);
    const ranges: MappingRange[] = [];
    const flat = scan.ranges ?? new Float64Array();
    for (let at = 0; at < flat.length; at += 2) {
      ranges.push({ mapping: this, offset: flat[at] ?? 0, length: flat[at + 1] ?? 0 });
    }
    return { ranges, next: scan.next };
  }

  /**
   * Unregisters it wherever it is registered, then unmaps it (after reads and writes that still run). Idempotent.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_FAULTS_WAITING`: threads wait for pages of it and would get zeros.
   */
  close(): void {
    if (this.#closed) return;
    for (const registrar of this.#registrars) registrar.leave(this);
    this.#registrars.clear();
    this.#closed = true;
    native().unmapMemory(this.#handle);
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** @hidden */
  addressNumber(): number {
    this.#open();
    return this.#number;
  }

  /** @hidden */
  registeredBy(registrar: Registrar): void {
    this.#registrars.add(registrar);
  }

  /** @hidden */
  leftBy(registrar: Registrar): void {
    this.#registrars.delete(registrar);
  }

  #open(): number {
    if (this.#closed) throw new UffdError('ERR_UFFD_USE_AFTER_CLOSE', 'the mapping is closed');
    return this.#handle;
  }

  #check(name: string, offset: number, length: number, unit: number): void {
    this.#open();
    const least = unit > 1 ? unit : 0;
    validateInteger(name, offset, 0, this.length - least);
    validateInteger('length', length, least, this.length - offset);
    for (const [part, value] of [
      [name, offset],
      ['length', length],
    ] as const) {
      if (value % unit !== 0) {
        throw Object.assign(
          new RangeError(`Expected \`${part}\` to be a multiple of the page size, ${unit}, got ${value}`),
          { code: 'ERR_OUT_OF_RANGE' },
        );
      }
    }
  }
}

async function finished(job: Promise<NativeJob>): Promise<Buffer | undefined> {
  const { error, bytes } = await job;
  if (error) throw fromNative(error);
  return bytes;
}

function done(error: Parameters<typeof fromNative>[0] | null): void {
  if (error) throw fromNative(error);
}

function validateLength(length: unknown): number {
  return validateInteger('length', length, 1, Number.MAX_SAFE_INTEGER);
}

function validatePages(pages: unknown): number {
  if (pages === undefined) return 0;
  if (typeof pages === 'number') return validatePowerOfTwo('options.pages', pages, 64 * 1024, 2 ** 30);
  const kinds = ['ordinary', 'small', 'transparent'] as const;
  return kinds.indexOf(validateOneOf('options.pages', pages, kinds));
}
