import { constants } from 'node:buffer';

import type { NativeJob, NativeMappingOptions } from '#native';

import { bufferOf, noBuffer } from './buffers.js';
import { fromNative, UffdError } from './errors.js';
import {
  type AnonymousOptions,
  DEFAULTS,
  type FileMappingOptions,
  type MemfdOptions,
  validateLength,
  validatePages,
} from './mapping-options.js';
import { type Residency, residencyOf, type WrittenPages } from './mapping-state.js';
import { native } from './native.js';
import { refuseWhileServed, wouldDeadlock } from './serving.js';
import type { Session } from './session.js';
import {
  validateBoolean,
  validateFd,
  validateInteger,
  validateOneOf,
  validateOptions,
  validatePart,
  validatePath,
  validateView,
} from './validate.js';
import { readScan, tryWrittenPages, writtenPages, type WrittenPagesOptions } from './written.js';

/** A part of a {@link MemoryMapping}: whole pages of it. */
export interface MappingRange {
  /** Of which it is a part. */
  readonly mapping: MemoryMapping;
  /** Bytes from the start of the mapping. */
  readonly offset: number;
  /** Bytes. */
  readonly length: number;
}

/** Who can keep a mapping from being closed: a userfaultfd that has a part of it registered. */
interface Registrar {
  leave(mapping: MemoryMapping): void;
  /** Forgets a registration, which ends by itself with the last buffer. */
  forget(mapping: MemoryMapping): void;
  nativeHandle(): number | undefined;
}

/** What is known of a mapping when it has been collected. */
interface Held {
  readonly handle: number;
  registered: boolean;
}

// Registered memory stays: the userfaultfd, which went with it, warns that it was not closed.
const collected = new FinalizationRegistry<Held>(({ handle, registered }) => {
  if (!registered) native().unmapMemory(handle);
});

/**
 * Memory of this process that can be registered with a userfaultfd. It lies outside of JavaScript's heap. `read`, `write`
 * and `discard` wait for missing pages on threads of the package's own (at most 16), never on the calling one. Buffers
 * over it are for threads that may wait: touching a missing page stops the thread until another one fills it.
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
  readonly #held: Held;
  readonly #registrars = new Set<Registrar>();
  readonly #readOnly: boolean;
  #buffer: ArrayBuffer | SharedArrayBuffer | undefined;
  #closed = false;
  #served: Session | undefined;

  private constructor(options: NativeMappingOptions) {
    const mapped = native().mapMemory(options);
    if (mapped.error) throw fromNative(mapped.error);
    this.length = mapped.length;
    this.pageSize = mapped.pageSize;
    this.address = BigInt(mapped.address);
    this.fd = mapped.fd;
    this.#number = mapped.address;
    this.#handle = mapped.handle;
    this.#held = { handle: mapped.handle, registered: false };
    collected.register(this, this.#held, this);
    this.#readOnly = options.kind === 'file' && options.access === 0;
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
      ...(typeof file === 'number' ? { fd: validateFd('file', file) } : { path: validatePath('file', file) }),
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
   * All of it as an `ArrayBuffer`, without copying; the same one each time. Touching a missing page stops this thread: never
   * where only this thread could fill it. Passing a view to `structuredClone` or `postMessage` copies, and so touches, the
   * whole of it. A poisoned page, or a file that was cut short, ends the process with SIGBUS. {@link MemoryMapping.close}
   * empties it and every view of it; no other thread (`fs`, `zlib`) may be using one then.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_UNSUPPORTED`: more than 4 GiB on Node 20; a runtime without external buffers; a
   *   mapping that is for reading only, or has a shared buffer. `read` and `write` take offsets and have no such limits.
   */
  arrayBuffer(): ArrayBuffer {
    return this.#wrap(false) as ArrayBuffer;
  }

  /**
   * A part of {@link MemoryMapping.arrayBuffer}.
   *
   * @param offset Bytes from the start.
   * @param length Bytes. Default: to the end.
   * @throws {@linkcode UffdError} as {@link MemoryMapping.arrayBuffer}; `ERR_UFFD_WOULD_DEADLOCK`: the mapping is served by a
   *   source that needs this very thread.
   */
  view(offset = 0, length: number = this.length - offset): Uint8Array {
    this.#check('offset', offset, length, 1);
    return new Uint8Array(this.arrayBuffer(), offset, length);
  }

  /**
   * All of it as a `SharedArrayBuffer`, without copying, to be sent to workers; the same one each time. See
   * {@link MemoryMapping.arrayBuffer} for what touching it does. It cannot be emptied: after {@link MemoryMapping.close} the
   * memory and its registrations stay until no thread has the buffer any more.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_UNSUPPORTED`: the runtime cannot (Node 20), or as {@link MemoryMapping.arrayBuffer}
   */
  sharedArrayBuffer(): SharedArrayBuffer {
    return this.#wrap(true) as SharedArrayBuffer;
  }

  /**
   * Reads bytes, on another thread: it may wait for a missing page without holding up the event loop.
   *
   * @param offset Bytes from the start.
   * @param length Bytes, at most `buffer.constants.MAX_LENGTH` (4 GiB with Node 20).
   * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM` with EFAULT at a poisoned page or behind the end of a file, with ENOMEM.
   */
  async read(offset: number, length: number): Promise<Buffer> {
    this.#check('offset', offset, length, 1);
    validateInteger('length', length, 0, constants.MAX_LENGTH);
    return (await finished(native().readMemory(this.#open(), offset, length))) ?? Buffer.alloc(0);
  }

  /**
   * Writes bytes, on another thread. They are copied before this returns.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM` with EACCES where the mapping is for reading only, with EFAULT as
   *   {@link MemoryMapping.read}.
   */
  async write(offset: number, bytes: ArrayBufferView): Promise<void> {
    const view = validateView('bytes', bytes);
    this.#check('offset', offset, view.byteLength, 1);
    await finished(native().writeMemory(this.#open(), offset, view));
  }

  /**
   * Reads into `into` on this thread, which sleeps where a page is missing: for workers, and for memory that is present.
   */
  readSync(offset: number, into: ArrayBufferView): void {
    const view = validateView('into', into);
    this.#check('offset', offset, view.byteLength, 1);
    this.#refuseToWait();
    done(native().readMemorySync(this.#open(), offset, view));
  }

  /** Writes on this thread; see {@link MemoryMapping.readSync}. */
  writeSync(offset: number, bytes: ArrayBufferView): void {
    const view = validateView('bytes', bytes);
    this.#check('offset', offset, view.byteLength, 1);
    this.#refuseToWait();
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
    return residencyOf(this.#open(), offset, length);
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
  writtenPages(options: WrittenPagesOptions = {}): WrittenPages {
    const scan = readScan(this, options);
    this.#check('options.offset', scan.offset, scan.length, this.pageSize);
    return writtenPages(this, this.#open(), scan);
  }

  /**
   * {@link MemoryMapping.writtenPages} without an object for each range: the fastest form. `into[0]` becomes the offset to go on
   * from (the end, unless `into` is full), and pairs of offset and length follow.
   *
   * @param protect Protect them again in the same step. Default: `false`.
   * @returns How many pairs, or `-errno`: `-EPERM` where writes are not tracked in a part of the range, `-ENOTTY` before Linux 6.7.
   *   Then `into` has what was found in front of that, up to a length of 0.
   */
  tryWrittenPages(
    into: Float64Array,
    offset = 0,
    length: number = this.length - offset,
    protect = false,
  ): number {
    this.#check('offset', offset, length, this.pageSize);
    return tryWrittenPages(this.#open(), into, { offset, length, protect });
  }

  /**
   * Unregisters it wherever it is registered, empties its buffer, then unmaps it (after reads and writes that still run).
   * Idempotent. Where a shared buffer can still be reached, only the calls end: memory and registrations stay until no
   * thread has the buffer any more.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_FAULTS_WAITING`: threads wait for pages of it and would get zeros.
   */
  close(): void {
    if (this.#closed) return;
    if (this.#buffer instanceof SharedArrayBuffer) {
      const registered = Array.from(this.#registrars, registrar => registrar.nativeHandle() ?? -1);
      if (native().memoryOutlives(this.#handle, registered)) {
        for (const registrar of this.#registrars) registrar.forget(this);
        return this.#unmap();
      }
    }
    for (const registrar of this.#registrars) registrar.leave(this);
    if (this.#buffer instanceof ArrayBuffer) native().detachMemory(this.#handle, this.#buffer);
    this.#unmap();
  }

  /** {@link MemoryMapping.close} with its defaults. */
  [Symbol.dispose](): void {
    this.close();
  }

  /** @hidden A session serves it until it has ended. */
  servedBy(session: Session): void {
    this.#served = session;
    const registrar: Registrar = {
      leave: refuseWhileServed,
      forget: () => undefined,
      nativeHandle: () => undefined,
    };
    this.registeredBy(registrar);
    void session.closed.then(() => {
      this.#served = undefined;
      this.leftBy(registrar);
    });
  }

  /** @hidden A buffer could be touched by this thread, which then could not bring the bytes it waits for. */
  refuseDeadlock(needsThisThread: boolean): void {
    if (needsThisThread && this.#buffer) throw wouldDeadlock('the mapping has a buffer');
  }

  /** @hidden */
  nativeHandle(): number {
    return this.#open();
  }

  #refuseToWait(): void {
    if (this.#served?.source?.needsThisThread) throw wouldDeadlock('this thread would wait for itself');
  }

  /** @hidden */
  addressNumber(): number {
    this.#open();
    return this.#number;
  }

  /** @hidden */
  registeredBy(registrar: Registrar): void {
    this.#registrars.add(registrar);
    this.#held.registered = true;
  }

  /** @hidden */
  leftBy(registrar: Registrar): void {
    this.#registrars.delete(registrar);
    this.#held.registered = this.#registrars.size > 0;
  }

  #unmap(): void {
    this.#buffer = undefined;
    this.#registrars.clear();
    this.#closed = true;
    collected.unregister(this);
    native().unmapMemory(this.#handle);
  }

  #wrap(shared: boolean): ArrayBuffer | SharedArrayBuffer {
    const handle = this.#open();
    this.#refuseToWait();
    const known = this.#buffer;
    if (known) {
      if (known instanceof SharedArrayBuffer === shared) return known;
      const other = shared ? 'an ArrayBuffer' : 'a SharedArrayBuffer';
      throw noBuffer(shared, `the mapping has ${other} already`, 'Use one kind of buffer for a mapping.');
    }
    if (this.#readOnly) {
      const hint = "Map the file with `access: 'copy-on-write'`.";
      throw noBuffer(shared, 'the mapping is for reading only, a buffer can be written to', hint);
    }
    this.#buffer = bufferOf(handle, shared);
    return this.#buffer;
  }

  #open(): number {
    if (this.#closed) throw new UffdError('ERR_UFFD_USE_AFTER_CLOSE', 'the mapping is closed');
    return this.#handle;
  }

  #check(name: string, offset: number, length: number, unit: number): void {
    this.#open();
    validatePart(name, offset, length, unit, this.length);
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
