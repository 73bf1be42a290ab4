import { EventEmitter } from 'node:events';

import type {
  NativeDirty,
  NativeNotice,
  NativePopulated,
  NativePopulateOptions,
  NativeSession,
  NativeStats,
} from '#native';

import { tellEnded, tellHeld } from './diagnostics.js';
import { emitting } from './emitting.js';
import { fromNative, UffdError } from './errors.js';
import { validateSignal } from './exited.js';
import type { RestoreMode } from './fill-options.js';
import { holdOpen } from './hold-open.js';
import { unlessAborted, withResolvers } from './limits.js';
import { type Rest, RESTS } from './policy.js';
import { type MemoryRange, startOf } from './range.js';
import { PageSource } from './sources.js';
import {
  isSameHold,
  type Peer,
  type SessionEnd,
  type SessionEndReason,
  type SessionHold,
  type SessionRegion,
} from './session-end.js';
import { type SessionStats, statsOf } from './stats.js';
import { validateBoolean, validateInteger, validateOneOf, validateOptions, wrongType } from './validate.js';

/** Events of a {@link Session}. */
export interface SessionEvents {
  /** Its faults are kept from now on, without an answer. */
  held: [hold: SessionHold];
}

/** Options of {@link Session.resume}. */
export interface ResumeOptions {
  /**
   * Where the bytes come from, from now on; at least as long as the session's memory needs. Overlays that the session had are
   * not laid over it ({@link overlaySource}). Default: the same source as before.
   */
  source?: PageSource;
}

export type { Peer, SessionEnd, SessionEndReason, SessionHold, SessionRegion } from './session-end.js';

/** Options of {@link Session.close} and {@link FirecrackerServer.close}. */
export interface CloseOptions {
  /** What becomes of pages still missing. Default: `'poison'`. */
  rest?: Rest;
}

/** Reads {@link CloseOptions}. */
export function restOf(options: CloseOptions): Rest {
  validateOptions('options', options, ['rest']);
  return options.rest === undefined ? 'poison' : validateOneOf('options.rest', options.rest, RESTS);
}

/** Memory that was written to. */
export interface DirtyRange {
  /** Where it is now, in its process. */
  readonly address: bigint;
  /** Bytes, whole pages. */
  readonly length: number;
  /**
   * Where its first byte belongs in the source: for a mapping of this process, its offset in the mapping. Absent for memory
   * that has no place there (grown, or left behind by a move): such memory is not tracked and always reported.
   */
  readonly sourceOffset?: number;
}

/** What was written to since the last time. */
export interface DirtyPages {
  /** In the order of the source's pages, then what has none there. */
  readonly ranges: readonly DirtyRange[];
  /** There were more than were asked for; the next call goes on behind them. */
  readonly more: boolean;
}

/** Options of {@link Session.populate}. */
export interface PopulateOptions {
  /**
   * What to bring, in this order: parts of the mapping that is served ({@link MemoryMapping.range}), or addresses of the served
   * process. What the session does not serve of them is left alone. At most 65,536. Default: everything.
   */
  ranges?: readonly MemoryRange[];
  /** Bytes a second at most. Default: as fast as it goes. */
  rate?: number;
  /** Gives up with its reason. What has come until then stays. */
  signal?: AbortSignal;
}

/** Options of {@link Session.detach}. */
export interface DetachOptions {
  /** Bring what is missing first ({@link Session.populate}). Default: `false`. */
  populate?: boolean;
  /** Gives up bringing it, with its reason. */
  signal?: AbortSignal;
}

/** Options of {@link Session.takeDirty}. */
export interface TakeDirtyOptions {
  /** Ranges at most. Default: 65,536. */
  maxRanges?: number;
}

const MOST_RANGES = 65_536;

/** What a session belongs to. @hidden */
export interface SessionOwner {
  stats(session: number): NativeStats | null;
  forget(session: number): NativeStats | null;
  closeSession(session: number, rest: Rest): void;
  populate(session: number, options: NativePopulateOptions): Promise<NativePopulated>;
  cancelPopulate(session: number, request: number): void;
  detach(session: number): Promise<NativePopulated>;
  stopRecording(session: number): Promise<NativePopulated>;
  hold(session: number): Promise<NativePopulated>;
  resume(session: number, source?: number): Promise<NativePopulated>;
  /** The number of a source where it is not this process that serves. */
  open?(source: PageSource): Promise<number>;
  replayed(session: number): Promise<NativePopulated>;
  /** Absent where writes are never tracked. */
  takeDirty?(session: number, most: number): Promise<NativeDirty>;
}

/**
 * The memory of one process being served. Its faults are answered by a native thread; whatever JavaScript does or does
 * not do meanwhile delays none of them.
 */
export class Session extends EventEmitter<SessionEvents> {
  readonly #native: SessionOwner;
  #source: PageSource | undefined;
  #end: ((end: SessionEnd) => void) | undefined;
  #last: SessionStats | undefined;
  #closing = false;
  #held: SessionHold | undefined;
  /** Who waits for being told that it is held; `answered` where only the telling is missing. */
  readonly #holding = new Set<{ told: () => void; answered: boolean }>();
  #refuseSource: ((source: PageSource) => void) | undefined;
  #requests = 0;

  /** Unique in its pager. */
  readonly id: number;
  /** The session of the process that this one was forked from (`event-fork`); `undefined` where it was not. */
  readonly parent: number | undefined;
  /** Who is served. */
  readonly peer: Peer;
  /** The memory served, in address order. */
  readonly regions: readonly SessionRegion[];
  /** Bytes of a page. */
  readonly pageSize: number;
  /** How its memory was brought before it was told of. */
  readonly mode: RestoreMode;
  /** Why that is not the mode that was wanted, or why nothing is joined (`collapse`); `undefined` where it is so. It was told as a warning, too. */
  readonly fallback: UffdError | undefined;
  /** @hidden Milliseconds that took. */
  readonly filledIn: number;
  /** Resolves when the session is over and its descriptors are closed. Never rejects. */
  readonly closed: Promise<SessionEnd>;

  /** @hidden */
  constructor(owner: SessionOwner, session: NativeSession) {
    super();
    this.#native = owner;
    this.id = session.id;
    this.parent = session.parent;
    this.peer = Object.freeze(session.peer);
    this.regions = Object.freeze(session.regions.map(region => Object.freeze(region)));
    this.pageSize = session.pageSize;
    this.mode = session.mode;
    this.fallback = session.fallback && fromNative(session.fallback);
    if (this.fallback) {
      const { message, code } = this.fallback;
      process.emitWarning(`session ${this.id} has no huge pages: ${message}`, {
        type: 'UffdWarning',
        code,
      });
    }
    this.filledIn = session.filledIn;
    this.closed = new Promise(resolve => {
      this.#end = resolve;
    });
  }

  /** Why it is held; `undefined` where its faults are answered. */
  get held(): SessionHold | undefined {
    return this.#held;
  }

  /** Counters up to now; after the end, the last ones. Cheap: no thread is waited for. */
  stats(): SessionStats {
    if (this.#last !== undefined) return this.#last;
    const stats = this.#native.stats(this.id);
    return statsOf(stats ?? undefined);
  }

  /**
   * Tells which pages were written to since the session began or since the last call, and protects them again
   * (`UFFDIO_WRITEPROTECT`). For sessions with the mode `'write-protect'`. Who reads the memory afterwards sees every write
   * that the answer stands for; a later write is in the next one. Discarded pages count as written to, in two answers. The
   * native thread gathers the answer between faults; nothing waits for it.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_UNSUPPORTED` (this session does not track writes), `ERR_UFFD_EXHAUSTED`
   *   (another answer is on its way), `ERR_UFFD_USE_AFTER_CLOSE` (the session is over), `ERR_UFFD_SYSTEM` (the kernel refuses;
   *   nothing is lost: the pages stay dirty)
   */
  async takeDirty(options: TakeDirtyOptions = {}): Promise<DirtyPages> {
    validateOptions('options', options, ['maxRanges']);
    const { maxRanges = MOST_RANGES } = options;
    validateInteger('options.maxRanges', maxRanges, 1, MOST_RANGES);
    if (this.#native.takeDirty === undefined) {
      throw new UffdError('ERR_UFFD_UNSUPPORTED', 'sessions of Firecracker do not track writes');
    }
    const { error, ranges, more } = await this.#native.takeDirty(this.id, maxRanges);
    if (error) throw fromNative(error);
    return Object.freeze({ ranges: Object.freeze(ranges.map(range => Object.freeze(range))), more });
  }

  /**
   * Brings pages that no fault has asked for yet, up to 256 KiB at a time (64 KiB while faults come), whenever no fault waits: a
   * fault never waits for more than one of these. Resolves when none is missing any more. What was discarded stays zero.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_REGION` (the session serves nothing of a range), `ERR_UFFD_USE_AFTER_CLOSE` (the
   *   session is over, or ends before), `ERR_UFFD_EXHAUSTED` (64 calls are under way); the signal's reason
   */
  async populate(options: PopulateOptions = {}): Promise<void> {
    validateOptions('options', options, ['ranges', 'rate', 'signal']);
    const { ranges, rate } = options;
    const given: NativePopulateOptions = { request: (this.#requests += 1) };
    if (ranges !== undefined) given.ranges = readRanges(ranges);
    if (rate !== undefined) given.rate = validateInteger('options.rate', rate, 1, Number.MAX_SAFE_INTEGER);
    const signal = validateSignal(options.signal);
    signal?.throwIfAborted();
    const populated = this.#native.populate(this.id, given);
    try {
      const { error } = await unlessAborted(populated, signal);
      if (error) throw fromNative(error);
    } catch (reason) {
      if (signal?.aborted) this.#native.cancelPopulate(this.id, given.request);
      throw reason;
    }
  }

  /**
   * Ends the session of memory that is all there: it is unregistered (`UFFDIO_UNREGISTER`), and its process needs no pager any
   * more. What it gives back from then on reads zero, as before. Resolves when everything of the session is closed.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_PAGES_MISSING` (the message says how many; the session goes on as it was),
   *   `ERR_UFFD_USE_AFTER_CLOSE` (the session is over); with `populate`, its errors and the signal's reason
   */
  async detach(options: DetachOptions = {}): Promise<SessionEnd> {
    validateOptions('options', options, ['populate', 'signal']);
    const populate = validateBoolean('options.populate', options.populate, false);
    const signal = validateSignal(options.signal);
    signal?.throwIfAborted();
    if (populate) await this.populate(signal === undefined ? {} : { signal });
    const { error } = await this.#native.detach(this.id);
    if (error?.code === 'ERR_UFFD_PAGES_MISSING') {
      const hint = 'Bring them first: `session.detach({ populate: true })`.';
      throw new UffdError('ERR_UFFD_PAGES_MISSING', error.message, { hint });
    }
    if (error) throw fromNative(error);
    return holdOpen(this.closed);
  }

  /**
   * Ends the recording of its faults (`record`); the session goes on. Resolves when the file is whole.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_UNSUPPORTED` (it is not recorded), `ERR_UFFD_TRACE` (it cannot be written, or is torn),
   *   `ERR_UFFD_TIMEOUT` (the disk has taken more than 5 seconds), `ERR_UFFD_USE_AFTER_CLOSE` (the session is over)
   */
  async stopRecording(): Promise<void> {
    const { error } = await holdOpen(this.#native.stopRecording(this.id));
    if (error) throw fromNative(error);
  }

  /**
   * Resolves when everything that `replay` is to bring is there, or on its way to a fault: the moment to let a process go on
   * that shall not wait for its memory.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_UNSUPPORTED` (it replays nothing), `ERR_UFFD_USE_AFTER_CLOSE` (it is over, or ends
   *   before)
   */
  async replayed(): Promise<void> {
    const { error } = await holdOpen(this.#native.replayed(this.id));
    if (error) throw fromNative(error);
  }

  /**
   * Keeps its faults from now on, without an answer: whoever touches what is missing waits until {@link Session.resume} or
   * {@link Session.close}. What its process does to its memory is followed all the same. Resolves when it is so, and
   * {@link Session.held} says it. A session that is held already because of a failure is held for as long as it takes from then on.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_USE_AFTER_CLOSE` (it is over, or ending)
   */
  async hold(): Promise<void> {
    const { promise, resolve } = withResolvers<void>();
    const waiting = { told: resolve, answered: false };
    this.#holding.add(waiting);
    try {
      const { error } = await holdOpen(this.#native.hold(this.id));
      if (error) throw fromNative(error);
      waiting.answered = true;
      // It is told by another way than the answer is.
      await holdOpen(promise);
    } finally {
      this.#holding.delete(waiting);
    }
  }

  /**
   * Goes on with a session that is held: every fault that was kept is answered, from another source where one is given. A
   * session that is not held goes on as it was; what it was reading is read again, so that no failure from before this counts. If
   * it fails again, its policy is applied again.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_PROTOCOL` (the source is too short, or its process has done what cannot be followed:
   *   it is held on), `ERR_UFFD_USE_AFTER_CLOSE` (it is over, or the source is), `ERR_UFFD_WOULD_DEADLOCK`, `ERR_UFFD_SOURCE`
   */
  async resume(options: ResumeOptions = {}): Promise<void> {
    validateOptions('options', options, ['source']);
    const { source } = options;
    if (source !== undefined && !(source instanceof PageSource)) {
      throw wrongType('options.source', 'a PageSource', source);
    }
    if (source) this.#refuseSource?.(source);
    const handle = source && (await (this.#native.open?.(source) ?? source.handle()));
    const before = this.#held;
    // Before it goes on: it may be held again before this hears of it.
    this.#held = undefined;
    const { error } = await holdOpen(this.#native.resume(this.id, handle));
    if (error) {
      this.#held ??= before;
      throw fromNative(error);
    }
    if (source) this.#source = source;
    this.#isHeldNoMore();
  }

  /** Who has had it held before that is told nothing any more, where it went on in the same moment. */
  #isHeldNoMore(): void {
    for (const { told, answered } of this.#holding) if (answered) told();
  }

  #heldIsKnown(): void {
    for (const { told } of this.#holding) told();
  }

  /**
   * Ends the session on purpose, without giving zeros to anybody who did not ask for them: threads that wait and pages
   * still missing are dealt with first (`rest`), then the memory is the process's own again. Other sessions are served
   * meanwhile. Idempotent: the first call decides.
   *
   * @throws `TypeError` for options that do not exist.
   */
  async close(options: CloseOptions = {}): Promise<SessionEnd> {
    const rest = restOf(options);
    if (!this.#closing) {
      this.#closing = true;
      this.#native.closeSession(this.id, rest);
    }
    return holdOpen(this.closed);
  }

  /** {@link Session.close} with its defaults. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  /** @hidden */
  ended(notice: NativeNotice): void {
    this.#last = statsOf(this.#native.forget(this.id) ?? undefined);
    // Nobody may ever look at the counters; a recording that was asked for is missed later.
    const lost = this.#last.recording?.error;
    if (lost) process.emitWarning(lost);
    const reason = notice.reason as SessionEndReason;
    const at = new Date(notice.at);
    const end = notice.error ? { reason, error: explained(notice.error, this.#source), at } : { reason, at };
    this.#held = undefined;
    this.#heldIsKnown();
    this.#end?.(end);
    tellEnded(this, end);
  }

  /** @hidden Takes the notice, and gives what is to be told of it; `undefined` where it was told before (by another daemon). */
  wasHeld({ reason, error, at, until }: NativeNotice): SessionHold | undefined {
    const hold = Object.freeze({
      reason: (reason ?? 'asked') as SessionHold['reason'],
      ...(error ? { error: explained(error, this.#source) } : {}),
      at: new Date(at),
      ...(until === undefined ? {} : { until: new Date(until) }),
    });
    const before = this.#held;
    const isKnown = before !== undefined && isSameHold(before, hold);
    if (!isKnown) this.#held = hold;
    this.#heldIsKnown();
    if (isKnown) return undefined;
    tellHeld(this, hold);
    emitting(() => this.emit('held', hold));
    return hold;
  }

  /** @hidden Somebody else has had it go on. */
  wasResumed(): void {
    this.#held = undefined;
    this.#isHeldNoMore();
  }

  /** @hidden */
  fedBy(source: PageSource, refuse?: (source: PageSource) => void): void {
    this.#source = source;
    this.#refuseSource = refuse;
  }

  /** @hidden */
  get source(): PageSource | undefined {
    return this.#source;
  }

  /** @hidden */
  hasForked(child: Session): void {
    child.#source = this.#source;
  }
}

/** @hidden An error of a source in JavaScript has what was thrown there as its cause. */
export function explained(
  error: NonNullable<NativeNotice['error']>,
  source: PageSource | undefined,
): UffdError {
  const cause = error.code === 'ERR_UFFD_SOURCE' ? source?.failure() : undefined;
  if (cause === undefined) return fromNative(error);
  return new UffdError('ERR_UFFD_SOURCE', error.message, { ...error, cause });
}

/** Address and bytes, one after the other. */
function readRanges(ranges: readonly MemoryRange[]): number[] {
  if (!Array.isArray(ranges)) throw wrongType('options.ranges', 'an array of ranges', ranges);
  validateInteger('options.ranges.length', ranges.length, 1, MOST_RANGES);
  return ranges.flatMap((range: MemoryRange, index) => [
    startOf(`options.ranges[${index}]`, range),
    range.length,
  ]);
}
