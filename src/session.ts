import type {
  NativeDirty,
  NativeNotice,
  NativePopulated,
  NativePopulateOptions,
  NativeSession,
  NativeStats,
} from '#native';

import { tellEnded } from './diagnostics.js';
import { fromNative, UffdError } from './errors.js';
import { validateSignal } from './exited.js';
import type { RestoreMode } from './fill-options.js';
import { holdOpen } from './hold-open.js';
import { unlessAborted } from './limits.js';
import { type Rest, RESTS } from './policy.js';
import { type MemoryRange, startOf } from './range.js';
import type { PageSource } from './sources.js';
import { type SessionStats, statsOf } from './stats.js';
import { validateBoolean, validateInteger, validateOneOf, validateOptions, wrongType } from './validate.js';

/** The process that is served, as the kernel told when it connected. */
export interface Peer {
  /** 0 for a forked child, which the kernel names by its memory only. */
  readonly pid: number;
  /** Its user. */
  readonly uid: number;
  /** Its group. */
  readonly gid: number;
}

/** A stretch of the served process's memory. */
export interface SessionRegion {
  /** Its first address in that process. */
  readonly address: bigint;
  /** Bytes. */
  readonly length: number;
  /** Where its first byte is in the memory image. */
  readonly sourceOffset: number;
}

/**
 * Why a session is over:
 *
 * - `'closed'`: by {@link Session.close}, or with its server.
 * - `'detached'`: by {@link Session.detach}: all of its memory is there, and its process goes on without a pager.
 * - `'peer-exited'`: the served process is gone.
 * - `'source-failed'`: the memory image could not be read any more; the failure policy was applied.
 * - `'stalled'`: the source did not answer in time; the failure policy was applied.
 * - `'protocol'`: the served process did something that cannot be followed; the failure policy was applied.
 * - `'exhausted'`: a limit of the machine was reached; the failure policy was applied.
 * - `'pager-lost'`: the pager itself ended; the failure policy was applied.
 */
export type SessionEndReason =
  | 'closed'
  | 'detached'
  | 'peer-exited'
  | 'source-failed'
  | 'stalled'
  | 'protocol'
  | 'exhausted'
  | 'pager-lost';

/** How a session ended. */
export interface SessionEnd {
  /** Why. */
  readonly reason: SessionEndReason;
  /** What went wrong; absent when nothing did. */
  readonly error?: UffdError;
  /** When. */
  readonly at: Date;
}

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

/** What a session belongs to, natively. */
interface SessionOwner {
  stats(session: number): NativeStats | null;
  forget(session: number): NativeStats | null;
  closeSession(session: number, rest: Rest): void;
  populate(session: number, options: NativePopulateOptions): Promise<NativePopulated>;
  cancelPopulate(session: number, request: number): void;
  detach(session: number): Promise<NativePopulated>;
  stopRecording(session: number): Promise<NativePopulated>;
  replayed(session: number): Promise<NativePopulated>;
  /** Absent where writes are never tracked. */
  takeDirty?(session: number, most: number): Promise<NativeDirty>;
}

/**
 * The memory of one process being served. Its faults are answered by a native thread; whatever JavaScript does or does
 * not do meanwhile delays none of them.
 */
export class Session {
  readonly #native: SessionOwner;
  #source: PageSource | undefined;
  #end: ((end: SessionEnd) => void) | undefined;
  #last: SessionStats | undefined;
  #closing = false;
  #requests = 0;

  /** Unique in this process. */
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
   * @throws {@linkcode UffdError} `ERR_UFFD_UNSUPPORTED` (it is not recorded), `ERR_UFFD_TRACE` (it cannot be written),
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
    this.#end?.(end);
    tellEnded(this, end);
  }

  /** @hidden */
  fedBy(source: PageSource): void {
    this.#source = source;
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
