import process from 'node:process';

import { emitting } from './emitting.js';
import { fromNative, UffdError } from './errors.js';
import { Fault, type FaultOwner } from './fault.js';
import { type FaultArea, FaultAreas } from './fault-areas.js';
import { FailingFaults } from './fault-failing.js';
import { FaultBatch } from './fault-batch.js';
import {
  BATCH,
  EXPIRED,
  FORKED,
  OTHERS,
  REMAPPED,
  REMOVED,
  ROW,
  SELF_FAULT,
  STALE,
  UNKNOWN,
  UNMAPPED,
} from './handler-rows.js';
import {
  type FaultCallbacks,
  type FaultHandlerOptions,
  type HandlerCloseOptions,
  type HandlerEnd,
  type HandlerEndReason,
  readCallbacks,
  readHandlerOptions,
} from './handler-options.js';
import { holdOpen } from './hold-open.js';
import { LONGEST_TIMEOUT, withResolvers } from './limits.js';
import { native } from './native.js';
import { errno, errorOf } from './outcome.js';
import type { MemoryRange } from './range.js';
import type { Userfaultfd } from './userfaultfd.js';
import { validateOneOf, validateOptions } from './validate.js';

/** @hidden The userfaultfd of a handler, as the handler needs it. */
export interface Handled {
  readonly uffd: Userfaultfd;
  readonly own: boolean;
  readonly followsForks: boolean;
  areas(): FaultArea[];
  /** A child's, by its native handle. */
  child(handle: number): Userfaultfd;
  /** The handler is over, and so is the userfaultfd. */
  ended(): void;
}

/** Milliseconds of handling before the event loop gets its turn, and faults between two looks at the clock. */
const TURN = 2;
const UNTIMED = 8;

/**
 * Faults of a userfaultfd, answered by callbacks on the thread that made it ({@link Userfaultfd.createHandler}). While it
 * lives, the messages are its to read. It keeps the program alive unless told otherwise ({@link FaultHandler.unref}).
 *
 * What does not depend on this thread is done natively: deadlines; messages that stay unread while the thread is inside a
 * call that waits for them (fork(2), madvise(2), munmap(2)); and faults of this very thread, which nobody could answer.
 */
export class FaultHandler {
  readonly #handled: Handled;
  readonly #callbacks: FaultCallbacks;
  readonly #handle: number;
  readonly #owner: FaultOwner;
  readonly #rows = new Float64Array(BATCH * ROW);
  readonly #bytes = new Uint8Array(this.#rows.buffer);
  readonly #needsArming: boolean;
  /** Faults whose callback has not been settled, by name. */
  readonly #pending = new Map<number, Fault>();
  readonly #end = withResolvers<HandlerEnd>();
  readonly #signal: AbortSignal | undefined;
  readonly #areas = new FaultAreas();
  readonly #failing: FailingFaults;
  #batch: FaultBatch;
  #dispatching = false;
  #putOff = false;
  #timer: NodeJS.Timeout | undefined;
  #soon: NodeJS.Immediate | undefined;
  #keepAlive: NodeJS.Timeout | undefined;
  #closing: { poison: boolean; reason: HandlerEndReason; error?: unknown } | undefined;
  #refusal: ((error: Error) => void)[] = [];
  #isOver = false;

  /** Resolves when it is over. Never rejects. */
  readonly closed: Promise<HandlerEnd> = this.#end.promise;

  /** @hidden */
  constructor(handled: Handled, callbacks: FaultCallbacks, options: FaultHandlerOptions) {
    this.#callbacks = readCallbacks(callbacks, handled.followsForks);
    const settings = readHandlerOptions(options, handled.own);
    settings.signal?.throwIfAborted();
    this.#handled = handled;
    const report = (error: UffdError, fault: Fault): void => this.#report(error, fault);
    this.#failing = new FailingFaults(settings.onFailure, report, () => this.#afterwards());
    const notify = (): void => this.#pump();
    const made = native().createHandler(handled.uffd.handle(), settings.native, notify);
    if (made.error) throw fromNative(made.error);
    this.#handle = made.handle;
    this.#needsArming = made.needsArming;
    this.#owner = {
      handle: made.handle,
      own: handled.own,
      areaAt: address => this.#areas.at(address),
      putOff: () => {
        this.#putOff = true;
      },
      settled: () => this.#afterwards(),
    };
    this.#batch = new FaultBatch(this.#owner);
    this.areasChanged();
    this.#signal = settings.signal;
    this.#signal?.addEventListener('abort', this.#abort, { once: true });
    this.ref();
    // What came before there was a handler.
    this.#runSoon();
  }

  /** Whether it is over. */
  get isClosed(): boolean {
    return this.#isOver;
  }

  /**
   * Ends it: faults that wait are answered first, or meet the failure policy by their deadline. What is still missing is
   * poisoned then (or reads zero, if told so), the memory is unregistered, and the userfaultfd closed. Idempotent: the first
   * call decides.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_SYSTEM`: this kernel cannot poison; it is as before.
   */
  async close(options: HandlerCloseOptions = {}): Promise<HandlerEnd> {
    validateOptions('options', options, ['rest']);
    const { rest = 'poison' } = options;
    const poison = validateOneOf('options.rest', rest, ['poison', 'zero'] as const) === 'poison';
    this.#close({ poison, reason: 'closed' });
    const { promise: refused, reject } = withResolvers<never>();
    this.#refusal.push(reject);
    return holdOpen(Promise.race([this.closed, refused]));
  }

  /** {@link FaultHandler.close} with its defaults. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  /** {@link FaultHandler.close} at once: faults whose callbacks have not been settled meet the failure policy. */
  [Symbol.dispose](): void {
    if (this.#isOver) return;
    this.#pump();
    this.#closing ??= { poison: true, reason: 'closed' };
    const error = this.#finish();
    if (error) throw error;
  }

  /** Keeps the program alive until it is over (the default). */
  ref(): this {
    // Does nothing but hold the event loop open.
    if (!this.#isOver) this.#keepAlive ??= setInterval(() => {}, LONGEST_TIMEOUT);
    return this;
  }

  /** Lets the program end although it is not over. */
  unref(): this {
    clearInterval(this.#keepAlive);
    this.#keepAlive = undefined;
    return this;
  }

  /** @hidden Mappings were registered or unregistered. */
  areasChanged(): void {
    native().setHandlerAreas(this.#handle, this.#areas.set(this.#handled.areas()));
  }

  readonly #abort = (): void => {
    this.#close({ poison: true, reason: 'aborted', error: this.#signal?.reason });
  };

  /** Reads and tells until nothing is left, or the event loop has waited long enough. */
  #pump(): void {
    if (this.#isOver || this.#dispatching) return;
    this.#dispatching = true;
    let count = 0;
    let handled = 0;
    let until = 0;
    let look = UNTIMED;
    try {
      for (;;) {
        count = native().handlerTake(this.#handle, this.#bytes);
        if (count <= 0) break;
        this.#dispatch(count);
        handled += count;
        if (handled < look) continue;
        look = handled + UNTIMED;
        const now = performance.now();
        if (until === 0) until = now + TURN;
        else if (now >= until) break;
      }
    } finally {
      this.#dispatching = false;
    }
    if (count < 0) this.#unreadable(-count);
    else if (handled === 0 && native().handlerGone(this.#handle)) this.#gone();
    // The event loop comes back by itself to what is unread, but not to what was read and not told.
    if (count > 0) this.#putOff = true;
    if (this.#needsArming) native().armHandler(this.#handle);
    this.#afterwards();
  }

  #dispatch(count: number): void {
    const rows = this.#rows;
    const { fault: callback } = this.#callbacks;
    for (let at = 0; at < count * ROW; at += ROW) {
      const what = rows[at] ?? UNKNOWN;
      const id = rows[at + 1] ?? 0;
      const address = rows[at + 2] ?? 0;
      const last = rows[at + 3] ?? 0;
      if (what >= OTHERS) this.#tell(what, id, address, last);
      else if (callback) this.#answer(callback, new Fault(this.#owner, id, address, what | 0, last | 0), id);
      else this.#batch.add(id, address, what, last);
    }
    if (this.#batch.length > 0) this.#answerBatch();
  }

  #answer(callback: (fault: Fault) => unknown, fault: Fault, id: number): void {
    let result: unknown;
    try {
      result = callback(fault);
    } catch (error) {
      this.#failing.add(fault, error);
      return;
    }
    if (isThenable(result)) {
      this.#pending.set(id, fault);
      void this.#wait(result, [fault], [id]);
    } else if (!fault.settled) {
      this.#failing.add(fault, undefined);
    }
  }

  #answerBatch(): void {
    const batch = this.#batch;
    let result: unknown;
    try {
      result = this.#callbacks.faults?.(batch);
    } catch (error) {
      for (const fault of batch.open()) this.#failing.add(fault, error);
      batch.clear();
      return;
    }
    if (isThenable(result)) {
      const open = [...batch.open()];
      const ids = open.map(fault => fault.id());
      open.forEach((fault, index) => this.#pending.set(ids[index] ?? 0, fault));
      this.#batch = new FaultBatch(this.#owner);
      void this.#wait(result, open, ids);
    } else {
      if (!batch.isDone()) {
        for (const fault of batch.open()) this.#failing.add(fault, batch.errorOf(fault));
      }
      batch.clear();
    }
  }

  async #wait(result: PromiseLike<unknown>, faults: Fault[], ids: number[]): Promise<void> {
    let thrown: { error: unknown } | undefined;
    try {
      await result;
    } catch (error) {
      thrown = { error };
    }
    ids.forEach(id => this.#pending.delete(id));
    for (const fault of faults) {
      // One that is stale by now may well have failed because of that.
      if (!fault.settled) this.#failing.add(fault, thrown?.error);
    }
    this.#afterwards();
  }

  #report(error: UffdError, fault: Fault): void {
    const { failed } = this.#callbacks;
    if (failed) emitting(() => failed(error, fault));
    else process.emitWarning(error);
  }

  /** Everything that is no fault to answer. */
  #tell(what: number, first: number, second: number, third: number): void {
    const { removed, unmapped, remapped, forked } = this.#callbacks;
    switch (what) {
      case FORKED:
        if (first >= 0 && forked) emitting(() => forked(this.#handled.child(first)));
        break;
      case REMAPPED:
        if (remapped) {
          emitting(() => remapped({ from: BigInt(first), to: BigInt(second), length: third }));
        }
        break;
      case REMOVED:
        if (removed) emitting(() => removed(this.#rangeOf(first, second)));
        break;
      case UNMAPPED:
        if (unmapped) emitting(() => unmapped(this.#rangeOf(first, second)));
        break;
      case STALE:
        this.#expire(first, errorOf('fault', errno.ESTALE, 0));
        break;
      case EXPIRED: {
        const error = new UffdError('ERR_UFFD_TIMEOUT', `nobody has answered the fault at ${hex(second)}`);
        const known = this.#expire(first, error);
        this.#report(error, known ?? this.#overFault(first, second, third, error));
        break;
      }
      case SELF_FAULT: {
        const error = new UffdError(
          'ERR_UFFD_WOULD_DEADLOCK',
          `the thread of this handler has touched ${hex(second)}, and was given zeros`,
        );
        this.#report(error, this.#overFault(first, second, third, error));
        break;
      }
      case UNKNOWN:
      default:
        break;
    }
  }

  #expire(id: number, error: UffdError): Fault | undefined {
    const fault = this.#failing.expire(id) ?? this.#pending.get(id);
    this.#pending.delete(id);
    fault?.expire(error);
    return fault;
  }

  #overFault(id: number, address: number, flags: number, error: UffdError): Fault {
    const fault = new Fault(this.#owner, id, address, flags, 0);
    fault.expire(error);
    return fault;
  }

  #rangeOf(start: number, end: number): MemoryRange {
    return this.#areas.rangeOf(start, end, this.#handled.own);
  }

  /** What may have become due by what was just done. */
  #afterwards(): void {
    if (this.#isOver || this.#dispatching) return;
    this.#failing.sweep();
    if (this.#closing) this.#finishIfIdle();
    if (this.#putOff && !this.#isOver) this.#schedule();
  }

  #schedule(): void {
    const due = native().handlerDue(this.#handle);
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (due < 0) this.#putOff = false;
    else if (due === 0) this.#runSoon();
    else this.#timer = setTimeout(() => this.#pump(), Math.ceil(due)).unref();
  }

  #runSoon(): void {
    // One without `unref`: the event loop would sleep in front of it.
    this.#soon ??= setImmediate(() => {
      this.#soon = undefined;
      this.#pump();
    });
  }

  #unreadable(number: number): void {
    const error = errorOf('read', number, 0);
    if (error.code === 'ERR_UFFD_PROTOCOL') {
      this.#closing = { poison: true, reason: 'protocol', error };
      this.#finish();
    } else {
      process.emitWarning(error);
    }
  }

  #gone(): void {
    this.#closing = { poison: false, reason: 'peer-exited' };
    this.#finish();
  }

  #close(closing: { poison: boolean; reason: HandlerEndReason; error?: unknown }): void {
    if (this.#isOver || this.#closing) return;
    this.#closing = closing;
    this.#runSoon();
  }

  /** Only when everything that was read is answered, and nothing is unread. */
  #finishIfIdle(): void {
    if (this.#pending.size > 0 || native().handlerOpen(this.#handle) > 0) return;
    const error = this.#finish();
    if (!error) return;
    this.#closing = undefined;
    this.#refusal.splice(0).forEach(reject => reject(error));
  }

  #finish(): UffdError | undefined {
    const { poison, reason, error } = this.#closing ?? { poison: true, reason: 'closed' };
    const refused = native().endHandler(this.#handle, poison);
    if (refused) return fromNative(refused);
    this.#isOver = true;
    this.unref();
    clearTimeout(this.#timer);
    clearImmediate(this.#soon);
    this.#signal?.removeEventListener('abort', this.#abort);
    const stale = errorOf('fault', errno.ESTALE, 0);
    for (const fault of this.#pending.values()) fault.expire(stale);
    this.#pending.clear();
    this.#failing.end(stale);
    this.#handled.ended();
    const end: HandlerEnd = Object.freeze({
      reason,
      ...(error === undefined ? {} : { error }),
      at: new Date(),
    });
    const { closed } = this.#callbacks;
    if (closed) emitting(() => closed(end));
    this.#end.resolve(end);
    return undefined;
  }
}

const hex = (address: number): string => `0x${address.toString(16)}`;

function isThenable(value: unknown): value is PromiseLike<unknown> {
  return (
    typeof value === 'object' && value !== null && typeof (value as PromiseLike<unknown>).then === 'function'
  );
}
