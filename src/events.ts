import { native } from './native.js';
import type { AddressRange } from './range.js';
import type { Userfaultfd } from './userfaultfd.js';
import { argumentError, validateInteger } from './validate.js';

/** What a fault is about: the page is not there; it is write-protected; it is in the page cache, but not mapped. */
export type FaultKind = 'missing' | 'write-protect' | 'minor';

/** A thread waits for a page. */
export interface FaultEvent {
  /** Tells it from the others. */
  readonly type: 'fault';
  /** What was touched: the start of the page; the exact address where `exact-address` is in use. */
  readonly address: bigint;
  /** Why it waits. */
  readonly kind: FaultKind;
  /** Whether the access writes. */
  readonly write: boolean;
  /** The thread, where `thread-id` is in use; absent otherwise. */
  readonly threadId?: number;
}

/** The process forked; its child's memory is registered like its parent's. */
export interface ForkEvent {
  /** Tells it from the others. */
  readonly type: 'fork';
  /** The child's userfaultfd. Whoever reads this owns and closes it. */
  readonly child: Userfaultfd;
}

/** Memory was moved (mremap(2)), and its registration with it. */
export interface RemapEvent {
  /** Tells it from the others. */
  readonly type: 'remap';
  /** Where it was. */
  readonly from: bigint;
  /** Where it is. */
  readonly to: bigint;
  /** Bytes at the old address. */
  readonly length: number;
}

/** Memory is being discarded (madvise(2)), or was unmapped; `[start, end)`. */
export interface RemoveEvent {
  /** Discarded: it reads zero from now on. Unmapped: there is no memory any more. */
  readonly type: 'remove' | 'unmap';
  /** Its first address. */
  readonly start: bigint;
  /** The address after its last. */
  readonly end: bigint;
}

/** A message of a kernel that is newer than this package. */
export interface UnknownEvent {
  /** Tells it from the others. */
  readonly type: 'unknown';
  /** Its number, `UFFD_EVENT_*`. */
  readonly event: number;
}

/** One message of a userfaultfd. */
export type UffdEvent = FaultEvent | ForkEvent | RemapEvent | RemoveEvent | UnknownEvent;

/** @hidden Words of a message: kind and flags, then three of its own. */
export const WORDS = 4;
const KINDS = ['missing', 'write-protect', 'minor'] as const;
const TYPES = ['fault', 'fault', 'fault', 'fork', 'remap', 'remove', 'unmap', 'unknown'] as const;
const FORK = 3;
const WRITE = 16;
const PAGE = 4096;
const LOW = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1 ? 0 : 1;

/**
 * Room for the messages of one read, used again and again: reading makes no object per message.
 *
 * @example
 * ```ts
 * const batch = new EventBatch(64);
 * const count = uffd.readEvents(batch);
 * for (let i = 0; i < count; i++) if (batch.type(i) === 'fault') uffd.tryCopy(batch.page(i), page);
 * ```
 */
export class EventBatch implements Iterable<UffdEvent> {
  /** Messages it has room for. */
  readonly capacity: number;
  readonly #words: BigUint64Array;
  /** The same, by halves: looking at one makes no bigint. */
  readonly #halves: Uint32Array;
  readonly #bytes: Uint8Array;
  readonly #children = new Map<number, Userfaultfd>();
  #length = 0;
  #adopt: ((handle: number) => Userfaultfd) | undefined;

  /** @param capacity Messages, 1 to 4096. Default: 64. */
  constructor(capacity = 64) {
    this.capacity = validateInteger('capacity', capacity, 1, 4096);
    this.#words = new BigUint64Array(this.capacity * WORDS);
    this.#halves = new Uint32Array(this.#words.buffer);
    this.#bytes = new Uint8Array(this.#words.buffer);
  }

  /** Messages that the last read gave. */
  get length(): number {
    return this.#length;
  }

  /** What message `index` is. */
  type(index: number): UffdEvent['type'] {
    return TYPES[this.#kind(index)] ?? 'unknown';
  }

  /** The address of a fault: of its page, or exactly where `exact-address` is in use. */
  address(index: number): bigint {
    return this.#word(this.#faultAt(index), 1);
  }

  /** Whether the access of a fault writes. */
  write(index: number): boolean {
    return (this.#low(this.#faultAt(index), 0) & WRITE) !== 0;
  }

  /** What a fault is about. */
  kind(index: number): FaultKind {
    return KINDS[this.#kind(this.#faultAt(index))] ?? 'missing';
  }

  /**
   * The page of a fault, for the operations of a userfaultfd.
   *
   * @param size Bytes of a page there: 4096, or the size of the huge pages that the memory is made of. Default: 4096.
   */
  page(index: number, size: number = PAGE): AddressRange {
    const address = this.address(index);
    const within = this.#low(index, 1) % size;
    return { address: within === 0 ? address : address - BigInt(within), length: size };
  }

  /** Message `index` as an object. */
  at(index: number): UffdEvent {
    const type = this.type(index);
    switch (type) {
      case 'fault': {
        const threadId = Number(this.#word(index, 2));
        return {
          type,
          address: this.address(index),
          kind: this.kind(index),
          write: this.write(index),
          ...(threadId > 0 ? { threadId } : {}),
        };
      }
      case 'fork':
        return { type, child: this.#child(index) };
      case 'remap':
        return {
          type,
          from: this.#word(index, 1),
          to: this.#word(index, 2),
          length: Number(this.#word(index, 3)),
        };
      case 'remove':
      case 'unmap':
        return { type, start: this.#word(index, 1), end: this.#word(index, 2) };
      case 'unknown':
      default:
        return { type: 'unknown', event: Number(this.#word(index, 1)) };
    }
  }

  /** The messages as objects, in the order in which they were read. */
  *[Symbol.iterator](): Generator<UffdEvent, void, undefined> {
    for (let index = 0; index < this.#length; index += 1) yield this.at(index);
  }

  /**
   * @hidden Reads the next messages in the place of those it has, and waits for them if there are none; below 0 it is -errno.
   */
  fill(handle: number, adopt: (handle: number) => Userfaultfd, milliseconds: number): number {
    this.clear();
    this.#adopt = adopt;
    const count = native().uffdTakeEvents(handle, this.#bytes, milliseconds);
    this.#length = Math.max(0, count);
    return count;
  }

  /** Forgets the messages. Userfaultfds of children that nobody took are closed. */
  clear(): void {
    for (let index = 0; index < this.#length; index += 1) {
      if (this.#kind(index) === FORK && !this.#children.has(index)) {
        native().closeUserfaultfd(Number(this.#word(index, 1)), false);
      }
    }
    if (this.#children.size > 0) this.#children.clear();
    this.#length = 0;
  }

  #child(index: number): Userfaultfd {
    const known = this.#children.get(index);
    if (known) return known;
    // There are messages, so they were read.
    const child = (this.#adopt as (handle: number) => Userfaultfd)(Number(this.#word(index, 1)));
    this.#children.set(index, child);
    return child;
  }

  #faultAt(index: number): number {
    if (this.#kind(index) > 2) {
      throw argumentError(
        TypeError,
        'ERR_INVALID_ARG_VALUE',
        `Expected message ${index} to be a fault, it is a ${this.type(index)}`,
      );
    }
    return index;
  }

  #kind(index: number): number {
    if (!(index >= 0 && index < this.#length)) {
      validateInteger('index', index, 0, this.#length - 1);
    }
    return this.#low(index, 0) & ~WRITE;
  }

  /** The lower half of a word. */
  #low(index: number, word: number): number {
    return this.#halves[(index * WORDS + word) * 2 + LOW] ?? 0;
  }

  #word(index: number, word: number): bigint {
    return this.#words[index * WORDS + word] ?? 0n;
  }
}
