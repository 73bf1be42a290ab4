import type { UffdError } from './errors.js';
import type { FaultKind } from './events.js';
import type { FaultArea } from './fault-areas.js';
import type { MemoryMapping } from './mapping.js';
import { native } from './native.js';
import { errno, errorOf } from './outcome.js';
import { type MemoryRange, ORDINARY_PAGE, sourceOf } from './range.js';
import { argumentError, validateBoolean, validateOptions, validateView } from './validate.js';

/** How the page of a fault is installed. */
export interface AnswerOptions {
  /** Install it write-protected; the memory is registered for that. Default: `false`. */
  writeProtect?: boolean;
}

/** @hidden What a fault belongs to. */
export interface FaultOwner {
  readonly handle: number;
  /** Whether its memory is this process's own. */
  readonly own: boolean;
  areaAt(address: number): FaultArea | undefined;
  /** It will be delivered again. */
  putOff(): void;
  /** An answer came after its callback had returned. */
  settled(): void;
}

/** @hidden How a fault is answered without bytes. */
export const ZERO = 0;
/** @hidden */
export const CONTINUE = 1;
/** @hidden */
export const POISON = 2;
/** @hidden */
export const UNPROTECT = 3;
/** @hidden */
export const WAKE = 4;

const PROTECT = 2;
const WRITE = 16;
const REMOVED = 32;
const KINDS = ['missing', 'write-protect', 'minor'] as const;
const SYSCALLS = [
  'UFFDIO_ZEROPAGE',
  'UFFDIO_CONTINUE',
  'UFFDIO_POISON',
  'UFFDIO_WRITEPROTECT',
  'UFFDIO_WAKE',
] as const;
/** @hidden */
export const NO_OPTIONS: AnswerOptions = Object.freeze({});

/** @hidden */
export function modeOf(options: AnswerOptions): number {
  if (options === NO_OPTIONS) return 0;
  validateOptions('options', options, ['writeProtect']);
  return validateBoolean('options.writeProtect', options.writeProtect, false) ? PROTECT : 0;
}

/** @hidden */
export const syscallOf = (how: number): string => SYSCALLS[how] ?? 'ioctl';
/** @hidden */
export const kindOf = (flags: number): FaultKind => KINDS[flags & 3] ?? 'missing';
/** @hidden */
export const isWrite = (flags: number): boolean => (flags & WRITE) !== 0;
/** @hidden */
export const isRemoved = (flags: number): boolean => (flags & REMOVED) !== 0;

const OPEN = 0;
const ANSWERED = 1;
const PUT_OFF = 2;
const OVER = 3;

/**
 * Threads that wait for a page, and the ways to answer them. One of a {@link FaultHandler}; good until it was answered or put
 * off, on the thread of the handler. Several threads that wait for one page are one fault.
 *
 * Each answer returns `true` (the page is there, by this or before) or `false` (the address space is changing: the fault will
 * be delivered again), and throws {@linkcode UffdError} otherwise: `ERR_UFFD_STALE` (it was answered, its memory was removed,
 * unmapped or moved, or its time is up), `ERR_UFFD_NOT_REGISTERED`, `ERR_UFFD_CLOSED`, `ERR_UFFD_SYSTEM`. Where it throws,
 * the fault is still to be answered, unless it is stale.
 */
export class Fault {
  readonly #owner: FaultOwner;
  readonly #id: number;
  readonly #address: number;
  readonly #flags: number;
  readonly #thread: number;
  #state = OPEN;
  #over: AbortController | undefined;

  /** @hidden */
  constructor(owner: FaultOwner, id: number, address: number, flags: number, thread: number) {
    this.#owner = owner;
    this.#id = id;
    this.#address = address;
    this.#flags = flags;
    this.#thread = thread;
  }

  /** What was touched: the start of the page; the exact address where `exact-address` is in use. */
  get address(): bigint {
    return BigInt(this.#address);
  }

  /** Its page: a range of its mapping, or addresses where there is none. */
  get range(): MemoryRange {
    const area = this.#owner.areaAt(this.#address);
    const length = area?.pageSize ?? ORDINARY_PAGE;
    const page = this.#address - (this.#address % length);
    if (!area || !this.#owner.own) return { address: BigInt(page), length };
    return { mapping: area.mapping, offset: page - area.start, length };
  }

  /** The mapping that was touched; of a forked child's memory, its parent's. */
  get mapping(): MemoryMapping | undefined {
    return this.#owner.areaAt(this.#address)?.mapping;
  }

  /** Bytes from the start of the mapping to the page; absent where there is no mapping. */
  get offset(): number | undefined {
    const area = this.#owner.areaAt(this.#address);
    if (!area) return undefined;
    const offset = this.#address - area.start;
    return offset - (offset % area.pageSize);
  }

  /** What it is about. */
  get kind(): FaultKind {
    return kindOf(this.#flags);
  }

  /** Whether the access writes. */
  get write(): boolean {
    return isWrite(this.#flags);
  }

  /** The thread that waits (the last one, of several), where `thread-id` is in use. */
  get threadId(): number | undefined {
    return this.#thread > 0 ? this.#thread : undefined;
  }

  /**
   * Whether its memory was removed, unmapped or moved away after it was touched: what is removed has to read zero from then
   * on. Memory that is not there any more can be answered in any way.
   */
  get removed(): boolean {
    return isRemoved(this.#flags);
  }

  /** Aborts when an answer would come too late. */
  get signal(): AbortSignal {
    this.#over ??= new AbortController();
    if (this.#state === OVER) this.#over.abort(errorOf('fault', errno.ESTALE, 0));
    return this.#over.signal;
  }

  /** Whether it was answered or put off, or cannot be answered any more. */
  get settled(): boolean {
    return this.#state !== OPEN;
  }

  /**
   * Fills the page (`UFFDIO_COPY`), and those behind it if there are more bytes. Where the kernel stops on the way behind the
   * page, the rest is left to faults of their own.
   *
   * @param source Bytes: whole pages; any view, a range of a mapping, or addresses of this process.
   */
  copy(source: ArrayBufferView | MemoryRange, options: AnswerOptions = NO_OPTIONS): boolean {
    const mode = modeOf(options);
    if (ArrayBuffer.isView(source)) {
      const view = validateView('source', source);
      this.#checkLength(view.byteLength);
      return this.#answer(native().answerCopy(this.#owner.handle, this.#id, view, mode), 'UFFDIO_COPY');
    }
    const from = sourceOf('source', source);
    this.#checkLength(source.length);
    const result = native().answerCopyFrom(this.#owner.handle, this.#id, from, source.length, mode);
    return this.#answer(result, 'UFFDIO_COPY');
  }

  /** Fills the page with zeros (`UFFDIO_ZEROPAGE`; on huge pages by copying zeros). */
  zero(): boolean {
    return this.#resolve(ZERO, 0);
  }

  /** Maps the page that is in the page cache (`UFFDIO_CONTINUE`): the answer to a minor fault. */
  continue(options: AnswerOptions = NO_OPTIONS): boolean {
    return this.#resolve(CONTINUE, modeOf(options));
  }

  /** Makes touching the page a SIGBUS (`UFFDIO_POISON`, Linux 6.6), also for who waits now. */
  poison(): boolean {
    return this.#resolve(POISON, 0);
  }

  /** Takes the write protection off the page (`UFFDIO_WRITEPROTECT`): the answer to a fault of that kind. */
  unprotect(): boolean {
    return this.#resolve(UNPROTECT, 0);
  }

  /**
   * Makes who waits look again (`UFFDIO_WAKE`): where the page was filled by other means. Where it was not, it is a fault
   * again.
   */
  wake(): boolean {
    return this.#resolve(WAKE, 0);
  }

  /** Puts it off: it will be delivered again, at once the first time, then after pauses that grow to 50 ms. */
  defer(): void {
    this.#refuseSettled('defer');
    if (native().deferFault(this.#owner.handle, this.#id) === 0) throw errorOf('defer', errno.ESTALE, 0);
    this.#state = PUT_OFF;
    this.#owner.putOff();
    this.#owner.settled();
  }

  /** @hidden */
  id(): number {
    return this.#id;
  }

  /** @hidden It cannot be answered any more. */
  expire(error: UffdError): void {
    if (this.#state !== OPEN) return;
    this.#state = OVER;
    this.#over?.abort(error);
  }

  /** @hidden Applies the failure policy; whether it was to be answered. */
  fail(why: string, kill: boolean): boolean {
    if (this.#state !== OPEN) return false;
    this.#state = OVER;
    return native().failFault(this.#owner.handle, this.#id, why, kill);
  }

  /** @hidden What an operation on its whole batch came to. */
  tell(result: number): void {
    if (this.#state !== OPEN) return;
    if (result >= 0) this.#state = ANSWERED;
    else if (result === -errno.EAGAIN) this.#state = PUT_OFF;
    else if (result === -errno.ESTALE) this.#state = OVER;
  }

  #resolve(how: number, mode: number): boolean {
    return this.#answer(native().answerFault(this.#owner.handle, this.#id, how, mode), syscallOf(how));
  }

  #answer(result: number, syscall: string): boolean {
    if (result >= 0) {
      this.#state = ANSWERED;
      this.#owner.settled();
      return true;
    }
    if (result === -errno.EAGAIN) {
      this.#state = PUT_OFF;
      this.#owner.putOff();
      this.#owner.settled();
      return false;
    }
    if (result === -errno.ESTALE && this.#state === OPEN) this.#state = OVER;
    throw errorOf(syscall, -result, 0);
  }

  #refuseSettled(syscall: string): void {
    if (this.#state !== OPEN) throw errorOf(syscall, errno.ESTALE, 0);
  }

  #checkLength(length: number): void {
    const page = this.#owner.areaAt(this.#address)?.pageSize ?? ORDINARY_PAGE;
    if (length > 0 && length % page === 0) return;
    throw argumentError(
      RangeError,
      'ERR_OUT_OF_RANGE',
      `Expected \`source\` to have whole pages of ${page} bytes, got ${length} bytes`,
    );
  }
}
