import type { FaultKind } from './events.js';
import { BATCH, ROW } from './handler-rows.js';
import {
  type AnswerOptions,
  CONTINUE,
  Fault,
  type FaultOwner,
  isRemoved,
  isWrite,
  kindOf,
  modeOf,
  NO_OPTIONS,
  syscallOf,
  UNPROTECT,
  ZERO,
} from './fault.js';
import type { UffdError } from './errors.js';
import { native } from './native.js';
import { errno, errorOf } from './outcome.js';
import { ORDINARY_PAGE } from './range.js';
import { argumentError, validateInteger, validateView } from './validate.js';

/**
 * The faults of one delivery, without an object for each: for the callback `faults`, and good until it returns (or the promise
 * that it returns is settled). One call can answer all of them.
 */
export class FaultBatch implements Iterable<Fault> {
  readonly #owner: FaultOwner;
  readonly #rows = new Float64Array(BATCH * ROW + BATCH);
  /** What an operation on all came to, for each: bytes, or -errno. */
  readonly #results = this.#rows.subarray(BATCH * ROW);
  readonly #bytes = new Uint8Array(this.#rows.buffer);
  readonly #faults: (Fault | undefined)[] = [];
  #length = 0;
  /** Whether an operation has answered the whole batch. */
  #answered = false;
  #count = 0;
  #syscall = '';

  /** @hidden */
  constructor(owner: FaultOwner) {
    this.#owner = owner;
  }

  /** How many there are. */
  get length(): number {
    return this.#length;
  }

  /** What was touched: the start of a page; the exact address where `exact-address` is in use. */
  address(index: number): bigint {
    return BigInt(this.#word(index, 2));
  }

  /** Bytes from the start of the mapping to the page; absent where there is no mapping. */
  offset(index: number): number | undefined {
    const address = this.#word(index, 2);
    const area = this.#owner.areaAt(address);
    if (!area) return undefined;
    const offset = address - area.start;
    return offset - (offset % area.pageSize);
  }

  /** What it is about. */
  kind(index: number): FaultKind {
    return kindOf(this.#word(index, 0));
  }

  /** Whether the access writes. */
  write(index: number): boolean {
    return isWrite(this.#word(index, 0));
  }

  /** Whether its memory went after it was touched; see {@link Fault.removed}. */
  removed(index: number): boolean {
    return isRemoved(this.#word(index, 0));
  }

  /** The thread that waits, where `thread-id` is in use. */
  threadId(index: number): number | undefined {
    const thread = this.#word(index, 3);
    return thread > 0 ? thread : undefined;
  }

  /** One of them, to be answered by itself; the same object each time. */
  at(index: number): Fault {
    const known = this.#faults[index];
    if (known) return known;
    const [flags, id] = [this.#word(index, 0), this.#word(index, 1)];
    const fault = new Fault(this.#owner, id, this.#word(index, 2), flags, this.#word(index, 3));
    if (this.#answered) fault.tell(this.#results[index] ?? -errno.ESTALE);
    this.#faults[index] = fault;
    return fault;
  }

  /** The faults, in the order in which they were delivered. They are made as they are asked for. */
  *[Symbol.iterator](): Generator<Fault, void, undefined> {
    for (let index = 0; index < this.#length; index += 1) yield this.at(index);
  }

  /**
   * Fills the pages of all that are not answered (`UFFDIO_COPY`), in one call. Threads that wait for pages next to each other go
   * on together, after 128 KiB at most.
   *
   * @param source One page for all, or one for each, in their order.
   * @returns How many were answered; the others will be delivered again, or meet the failure policy (their pages cannot be
   *   filled, which the callback `failed` is told).
   */
  copy(source: ArrayBufferView, options: AnswerOptions = NO_OPTIONS): number {
    const view = validateView('source', source);
    const mode = modeOf(options);
    const page = this.#pageSize();
    if (view.byteLength !== page && view.byteLength !== page * this.#length) {
      throw argumentError(
        RangeError,
        'ERR_OUT_OF_RANGE',
        `Expected \`source\` to be a page of ${page} bytes, or one for each of ${this.#length} faults, got ${view.byteLength} bytes`,
      );
    }
    const { handle } = this.#owner;
    const count = native().answerAllCopy(handle, this.#bytes, this.#length, view, mode);
    return this.#told('UFFDIO_COPY', count);
  }

  /** {@link Fault.zero} of all that are not answered, in one call. */
  zero(): number {
    return this.#resolve(ZERO, 0);
  }

  /** {@link Fault.continue} of all that are not answered, in one call. */
  continue(options: AnswerOptions = NO_OPTIONS): number {
    return this.#resolve(CONTINUE, modeOf(options));
  }

  /** {@link Fault.unprotect} of all that are not answered, in one call. */
  unprotect(): number {
    return this.#resolve(UNPROTECT, 0);
  }

  /** @hidden Takes a row over. */
  add(id: number, address: number, flags: number, thread: number): void {
    const at = this.#length * ROW;
    this.#rows[at] = flags;
    this.#rows[at + 1] = id;
    this.#rows[at + 2] = address;
    this.#rows[at + 3] = thread;
    this.#length += 1;
  }

  /** @hidden Whether one call has answered all of them. */
  isDone(): boolean {
    return this.#answered && this.#count === this.#length;
  }

  /** @hidden Those that are still to be answered. */
  *open(): Generator<Fault, void, undefined> {
    for (let index = 0; index < this.#length; index += 1) {
      if (this.#answered && (this.#results[index] ?? 0) >= 0) continue;
      const fault = this.at(index);
      if (!fault.settled) yield fault;
    }
  }

  /** @hidden Why an operation on all has left one as it was. */
  errorOf(fault: Fault): UffdError | undefined {
    const result = this.#results[this.#faults.indexOf(fault)] ?? 0;
    return this.#answered && result < 0 ? errorOf(this.#syscall, -result, 0) : undefined;
  }

  /** @hidden */
  clear(): void {
    this.#length = 0;
    this.#answered = false;
    if (this.#faults.length > 0) this.#faults.length = 0;
  }

  #resolve(how: number, mode: number): number {
    const { handle } = this.#owner;
    const count = native().answerAll(handle, this.#bytes, this.#length, how, mode);
    return this.#told(syscallOf(how), count);
  }

  #told(syscall: string, count: number): number {
    this.#syscall = syscall;
    this.#count = count;
    this.#answered = true;
    if (count < this.#length) {
      for (let index = 0; index < this.#length; index += 1) {
        if (this.#results[index] === -errno.EAGAIN) this.#owner.putOff();
      }
    }
    if (this.#faults.length > 0) {
      this.#faults.forEach((fault, index) => fault?.tell(this.#results[index] ?? 0));
    }
    this.#owner.settled();
    return Math.max(0, count);
  }

  #pageSize(): number {
    return this.#length === 0
      ? ORDINARY_PAGE
      : (this.#owner.areaAt(this.#word(0, 2))?.pageSize ?? ORDINARY_PAGE);
  }

  #word(index: number, word: number): number {
    if (!(index >= 0 && index < this.#length)) validateInteger('index', index, 0, this.#length - 1);
    return this.#rows[index * ROW + word] ?? 0;
  }
}
