import type { NativeNotice, NativeSession, NativeStats } from '#native';

import { fromNative, UffdError } from './errors.js';
import { holdOpen } from './hold-open.js';
import { type Rest, RESTS } from './policy.js';
import type { PageSource } from './sources.js';
import { validateOneOf, validateOptions } from './validate.js';

/** The process that is served, as the kernel told when it connected. */
export interface Peer {
  readonly pid: number;
  readonly uid: number;
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

/** Counters of a session since it started. Each is exact; together they may be a few events apart. */
export interface SessionStats {
  /** Page-fault messages read. One fault may send several: duplicates are normal. */
  readonly faults: number;
  /** Pages copied in from the source. */
  readonly pagesInstalled: number;
  /** Pages installed as zeros, because their owner had discarded them. */
  readonly pagesZeroed: number;
  /** Pages installed as zeros, because the memory image has zeros there: nothing was copied. */
  readonly pagesZero: number;
  /** Pages poisoned, because they could not or would not be served. */
  readonly pagesPoisoned: number;
  /** Pages discarded by their owner. */
  readonly pagesRemoved: number;
  /** Bytes installed from the source. */
  readonly bytesInstalled: number;
  /** Stretches of pages installed by one answer. */
  readonly windows: number;
  /** Faults whose page another answer had brought already. */
  readonly alreadyPresent: number;
  /** Answers the kernel put off because the address space was changing; each was tried again. */
  readonly deferred: number;
  /** Reads of the source that could have waited for a disk, and were done by a worker thread. */
  readonly workerReads: number;
  /** Milliseconds spent answering faults, reading of the source included. */
  readonly busyMs: number;
}

/**
 * Why a session is over:
 *
 * - `'closed'`: by {@link Session.close}, or with its server.
 * - `'peer-exited'`: the served process is gone.
 * - `'source-failed'`: the memory image could not be read any more; the failure policy was applied.
 * - `'stalled'`: the source did not answer in time; the failure policy was applied.
 * - `'protocol'`: the served process did something that cannot be followed; the failure policy was applied.
 * - `'exhausted'`: a limit of the machine was reached; the failure policy was applied.
 * - `'pager-lost'`: the pager itself ended; the failure policy was applied.
 */
export type SessionEndReason =
  'closed' | 'peer-exited' | 'source-failed' | 'stalled' | 'protocol' | 'exhausted' | 'pager-lost';

/** How a session ended. */
export interface SessionEnd {
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

/** What a session belongs to, natively. */
interface SessionOwner {
  stats(session: number): NativeStats | null;
  forget(session: number): NativeStats | null;
  closeSession(session: number, rest: Rest): void;
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

  /** Unique in this process. */
  readonly id: number;
  /** Who is served. */
  readonly peer: Peer;
  /** The memory served, in address order. */
  readonly regions: readonly SessionRegion[];
  /** Bytes of a page. */
  readonly pageSize: number;
  /** Resolves when the session is over and its descriptors are closed. Never rejects. */
  readonly closed: Promise<SessionEnd>;

  /** @hidden */
  constructor(owner: SessionOwner, session: NativeSession) {
    this.#native = owner;
    this.id = session.id;
    this.peer = Object.freeze(session.peer);
    this.regions = Object.freeze(session.regions.map(region => Object.freeze(region)));
    this.pageSize = session.pageSize;
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
    const reason = notice.reason as SessionEndReason;
    const at = new Date(notice.at);
    this.#end?.(notice.error ? { reason, error: this.#explained(notice.error), at } : { reason, at });
  }

  /** @hidden */
  fedBy(source: PageSource): void {
    this.#source = source;
  }

  /** An error of a source in JavaScript has what was thrown there as its cause. */
  #explained(error: NonNullable<NativeNotice['error']>): UffdError {
    const cause = error.code === 'ERR_UFFD_SOURCE' ? this.#source?.failure() : undefined;
    if (cause === undefined) return fromNative(error);
    return new UffdError('ERR_UFFD_SOURCE', error.message, { ...error, cause });
  }
}

function statsOf(stats: NativeStats | undefined): SessionStats {
  const { busyNs, ...counters } = stats ?? NO_STATS;
  return Object.freeze({ ...counters, busyMs: busyNs / 1e6 });
}

const NO_STATS: NativeStats = {
  faults: 0,
  pagesInstalled: 0,
  pagesZeroed: 0,
  pagesZero: 0,
  pagesPoisoned: 0,
  pagesRemoved: 0,
  bytesInstalled: 0,
  windows: 0,
  alreadyPresent: 0,
  deferred: 0,
  workerReads: 0,
  busyNs: 0,
};
