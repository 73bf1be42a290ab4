import type { NativeJob } from '#native';

import { fromNative } from './errors.js';
import { native } from './native.js';
import type { PageSource } from './sources.js';
import { validateInteger, validatePathOrUrl, wrongType } from './validate.js';

/** A stretch of the memory image. */
export interface TraceRange {
  /** Where its first byte is in the image. */
  readonly offset: number;
  /** Bytes. */
  readonly length: number;
}

/** A fault, as it was answered. */
export interface TraceFault {
  /** Milliseconds from the session's start to the moment its message was read. */
  readonly time: number;
  /** What was the matter with the page: not there, in the page cache and not mapped, or protected. */
  readonly kind: 'missing' | 'minor' | 'write-protect';
  /** Whether somebody wanted to write. */
  readonly write: boolean;
  /** Where the page is in the image. */
  readonly offset: number;
  /**
   * What its answer brought from the image, the page itself included. Of no length where nothing had to be brought: another
   * fault's answer had, or the page was discarded or protected.
   */
  readonly brought: TraceRange;
  /** Milliseconds from there to the moment its page was there. */
  readonly latency: number;
}

/**
 * How a recording ends: with its session, or because it was told to; it was full; in the middle, because its writer ended
 * or its end is damaged. What could be read of it is good in each case.
 */
export type TraceEnd = 'complete' | 'full' | 'torn';

const KINDS = ['missing', 'minor', 'write-protect'] as const;
/** Words of a fault, and faults that are asked for at a time. */
const ROW = 7;
const ROWS = 4096;
const MOST_TRACES = 1024;

/** Recordings that nobody has any more are forgotten. */
const forgotten = new FinalizationRegistry<number>(handle => native().forgetTrace(handle));

/**
 * A recording of what a session's faults wanted (`record`), to be replayed by another (`replay`), looked into, or put
 * together with others. It names places in the memory image, so that it fits every session that is served from a copy of that.
 *
 * @example
 * ```ts
 * const runs = await Promise.all(['one.trace', 'other.trace'].map(path => Trace.read(path)));
 * const common = await Trace.intersect(runs);
 * await common.write('golden.trace');
 * ```
 */
export class Trace implements Iterable<TraceFault> {
  readonly #handle: number;
  /** Bytes of a page of the session that was recorded. */
  readonly pageSize: number;
  /** Bytes of the memory image. */
  readonly imageSize: number;
  /** What tells the image from others: a SHA-256 of its size and 16 of its pages. */
  readonly identity: string;
  /** When the session started; of one made of others, the first of them. */
  readonly startedAt: Date;
  /** How many faults there are in it. */
  readonly length: number;
  /** Faults that are not in it: it was full, or they came faster than they could be written. */
  readonly dropped: number;
  /** How it ends. */
  readonly end: TraceEnd;

  private constructor(handle: number) {
    const told = native().describeTrace(handle);
    if (told === null) throw fromNative(NO_ANSWER);
    this.#handle = handle;
    this.pageSize = told.pageSize;
    this.imageSize = told.imageSize;
    this.identity = told.identity;
    this.startedAt = new Date(told.started);
    this.length = told.faults;
    this.dropped = told.dropped;
    this.end = told.end;
    forgotten.register(this, handle);
  }

  /**
   * Reads a recording, on another thread. What lies behind the first damage is left out: it is `'torn'` then.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_TRACE`: it cannot be read, is none, or its very head is damaged.
   */
  static async read(path: string | URL): Promise<Trace> {
    return Trace.#made(native().readTrace(validatePathOrUrl('path', path)));
  }

  /**
   * What any of them wanted, each page once, in the order in which they wanted it on average.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_TRACE_IMAGE` (they are of different images), `ERR_UFFD_EXHAUSTED` (more than
   *   16,777,216 pages together)
   */
  static async merge(traces: readonly Trace[]): Promise<Trace> {
    return Trace.#made(native().combineTraces(handlesOf(traces), true));
  }

  /**
   * What all of them wanted, each page once, in the order in which they wanted it on average.
   *
   * @throws {@linkcode UffdError} as {@link Trace.merge}
   */
  static async intersect(traces: readonly Trace[]): Promise<Trace> {
    return Trace.#made(native().combineTraces(handlesOf(traces), false));
  }

  /** The faults, in their order. They are made as they are asked for. */
  *[Symbol.iterator](): Generator<TraceFault, void, undefined> {
    for (let from = 0; from < this.length; from += ROWS) {
      const rows = native().traceFaults(this.#handle, from, ROWS);
      for (let row = 0; row < rows.length; row += ROW) yield faultOf(rows.subarray(row, row + ROW));
    }
  }

  /** The working set: every page that was brought, once, in the order in which it was first wanted; neighbours together. */
  ranges(): TraceRange[] {
    const words = native().traceRanges(this.#handle);
    const ranges: TraceRange[] = [];
    for (let at = 0; at < words.length; at += 2) {
      ranges.push({ offset: words[at] ?? 0, length: words[at + 1] ?? 0 });
    }
    return ranges;
  }

  /**
   * Writes it to a file, on another thread. What was there before stays until all of it is written.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_TRACE`; nothing is left behind.
   */
  async write(path: string | URL): Promise<void> {
    const { error } = await native().writeTrace(this.#handle, validatePathOrUrl('path', path));
    if (error) throw fromNative(error);
  }

  /**
   * Refuses a source that is not the image that was recorded, or a copy of it; overlays do not count. Reads 16 of its pages.
   * `replay` does this by itself.
   *
   * @throws {@linkcode UffdError} `ERR_UFFD_TRACE_IMAGE`; `ERR_UFFD_SOURCE` when it cannot be read.
   */
  async check(source: PageSource): Promise<void> {
    const { error } = await native().checkTrace(this.#handle, await source.handle());
    if (error) throw fromNative(error);
  }

  /** @hidden The native number. */
  static handleOf(trace: Trace): number {
    return trace.#handle;
  }

  static async #made(job: Promise<NativeJob>): Promise<Trace> {
    const { error, handle } = await job;
    if (error || handle === undefined) throw fromNative(error ?? NO_ANSWER);
    return new Trace(handle);
  }
}

function handlesOf(traces: readonly Trace[]): number[] {
  if (!Array.isArray(traces)) throw wrongType('traces', 'an array of Trace', traces);
  validateInteger('traces.length', traces.length, 1, MOST_TRACES);
  return traces.map((trace: unknown, index) => {
    if (trace instanceof Trace) return Trace.handleOf(trace);
    throw wrongType(`traces[${index}]`, 'a Trace', trace);
  });
}

function faultOf([
  time = 0,
  kind = 0,
  write,
  offset = 0,
  from = 0,
  length = 0,
  latency = 0,
]: Float64Array): TraceFault {
  return {
    time: time / 1e6,
    kind: KINDS[kind] ?? 'missing',
    write: write === 1,
    offset,
    brought: { offset: from, length },
    latency: latency / 1e6,
  };
}

const NO_ANSWER = { code: 'ERR_UFFD_TRACE', message: 'the recording is gone: its thread has ended' };
