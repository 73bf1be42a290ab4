import { inspect } from 'node:util';

import pRetry, { AbortError } from 'p-retry';

import { fromNative } from './errors.js';
import { LONGEST_TIMEOUT } from './limits.js';
import { native } from './native.js';
import { type OpenSource, PageSource } from './sources.js';
import { KiB, MiB } from './units.js';
import { got, validateInteger, validateOptions, validatePowerOfTwo, wrongType } from './validate.js';

/**
 * Brings bytes of an image: exactly `length` of them from `offset` on, in any view. `signal` aborts when no session waits for them
 * any more, the time is up, or the source is closed.
 */
export type FetchPages = (
  offset: number,
  length: number,
  context: { signal: AbortSignal },
) => ArrayBufferView | Promise<ArrayBufferView>;

/** How a source in JavaScript is asked. */
export interface CallbackSourceOptions {
  /** Bytes of the image. */
  size: number;
  /** Bytes asked for at once, a power of two from 4 KiB to 256 MiB; the last chunk may be shorter. Default: 256 KiB. */
  chunk?: number;
  /** Chunks on the way at one time; those that a thread waits for go first. Default: 8. */
  concurrency?: number;
  /** Bytes of chunks kept for other faults and sessions. Default: 16 MiB. */
  cacheBytes?: number;
  /** How often a chunk is tried again when the callback fails, with growing pauses; a TypeError, which is a mistake and no
   * failure, is not. Default: 2. */
  retries?: number;
  /** Milliseconds for a chunk, all tries together. Default: 10,000. */
  timeout?: number;
}

/** {@link CallbackSourceOptions}, checked. @hidden */
export type CallbackSettings = Required<CallbackSourceOptions>;

const KNOWN = ['size', 'chunk', 'concurrency', 'cacheBytes', 'retries', 'timeout'] as const;
/** Before the first retry; doubled for each. */
const FIRST_PAUSE = 50;

/** @hidden */
export function readCallbackOptions(options: CallbackSourceOptions): CallbackSettings {
  validateOptions('options', options, KNOWN);
  const {
    size,
    chunk = 256 * KiB,
    concurrency = 8,
    cacheBytes = 16 * MiB,
    retries = 2,
    timeout = 10_000,
  } = options;
  return {
    size: validateInteger('options.size', size, 1, Number.MAX_SAFE_INTEGER),
    chunk: validatePowerOfTwo('options.chunk', chunk, 4 * KiB, 256 * MiB),
    concurrency: validateInteger('options.concurrency', concurrency, 1, 1024),
    cacheBytes: validateInteger('options.cacheBytes', cacheBytes, 0, Number.MAX_SAFE_INTEGER),
    retries: validateInteger('options.retries', retries, 0, 100),
    timeout: validateInteger('options.timeout', timeout, 1, LONGEST_TIMEOUT),
  };
}

/**
 * A source in JavaScript: a callback that brings bytes from wherever they are. Each chunk is asked for once, however many
 * faults and sessions wait for it. It runs on this thread, so memory that is served from it must not be touched here:
 * `mapping.read()` waits elsewhere; views throw `ERR_UFFD_WOULD_DEADLOCK`. {@link workerSource} has no such limit.
 *
 * A callback that fails is tried again; one that goes on failing, takes too long or brings the wrong number of bytes ends the
 * sessions that want those bytes (`'source-failed'`), by their failure policy.
 *
 * @example
 * ```ts
 * const source = callbackSource(async (offset, length, { signal }) => {
 *   const headers = { range: `bytes=${offset}-${offset + length - 1}` };
 *   return new Uint8Array(await (await fetch(url, { headers, signal })).arrayBuffer());
 * }, { size: 1 * GiB });
 * ```
 */
export function callbackSource(fetch: FetchPages, options: CallbackSourceOptions): PageSource {
  if (typeof fetch !== 'function') {
    throw wrongType('fetch', 'a function', fetch);
  }
  const settings = readCallbackOptions(options);
  return new PageSource(async () => openCallback(fetch, settings), true);
}

/** @hidden Makes the native source on this thread. */
export function openCallback(fetch: FetchPages, settings: CallbackSettings): OpenSource {
  const ended = new AbortController();
  let failure: unknown;
  /** By which each chunk that is on the way is given up. */
  const onTheWay = new Map<number, AbortController>();
  const answer = async (id: number, offset: number, length: number): Promise<void> => {
    const unwanted = new AbortController();
    onTheWay.set(id, unwanted);
    try {
      const until = AbortSignal.any([ended.signal, unwanted.signal]);
      const bytes = await bring(fetch, settings, { offset, length, ended: until });
      native().answerRequest(handle, id, bytes);
    } catch (error) {
      if (unwanted.signal.aborted) return;
      failure = error;
      native().failRequest(handle, id, reasonOf(error, offset, length));
    } finally {
      onTheWay.delete(id);
    }
  };
  const { size, chunk, concurrency, cacheBytes } = settings;
  const { error, handle } = native().callbackSource({ size, chunk, concurrency, cacheBytes }, () => {
    const asked = native().takeRequests(handle);
    for (let at = 0; at < asked.length; at += 3) {
      const id = asked[at] ?? 0;
      if (id < 0) onTheWay.get(-id)?.abort(new Error('nobody waits for these bytes any more'));
      else void answer(id, asked[at + 1] ?? 0, asked[at + 2] ?? 0);
    }
  });
  if (error) throw fromNative(error);
  return { handle, failure: () => failure, close: () => ended.abort(new Error('the source was closed')) };
}

/** Asks until the bytes are there, the tries are used up, or the time is. */
async function bring(
  fetch: FetchPages,
  settings: CallbackSettings,
  wanted: { offset: number; length: number; ended: AbortSignal },
): Promise<Uint8Array> {
  const { offset, length, ended } = wanted;
  const late = AbortSignal.timeout(settings.timeout);
  const signal = AbortSignal.any([late, ended]);
  const attempt = async (): Promise<Uint8Array> => {
    const bytes: unknown = await abortable(signal, async () => fetch(offset, length, { signal })).catch(
      wrapped,
    );
    if (!ArrayBuffer.isView(bytes)) throw new AbortError(`it brought no view of bytes but ${got(bytes)}`);
    if (bytes.byteLength !== length) throw new AbortError(`it brought ${bytes.byteLength} bytes`);
    return new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  };
  try {
    return await pRetry(attempt, {
      retries: settings.retries,
      minTimeout: FIRST_PAUSE,
      randomize: true,
      signal,
    });
  } catch (error) {
    if (late.aborted) throw new Error(`it took longer than ${settings.timeout} ms`, { cause: error });
    throw error instanceof Thrown ? error.value : error;
  }
}

/** What a callback threw that is no `Error`: p-retry takes nothing else. */
class Thrown extends Error {
  readonly value: unknown;

  constructor(value: unknown) {
    super(typeof value === 'string' ? value : inspect(value));
    this.value = value;
  }
}

function wrapped(error: unknown): never {
  throw error instanceof Error ? error : new Thrown(error);
}

/** A callback that does not heed its signal is left behind. */
async function abortable<T>(signal: AbortSignal, act: () => Promise<T>): Promise<T> {
  signal.throwIfAborted();
  let abort: (() => void) | undefined;
  const aborted = new Promise<never>((_, reject) => {
    abort = () => reject(signal.reason as Error);
    signal.addEventListener('abort', abort, { once: true });
  });
  try {
    return await Promise.race([act(), aborted]);
  } finally {
    if (abort) signal.removeEventListener('abort', abort);
  }
}

function reasonOf(error: unknown, offset: number, length: number): string {
  const reason = error instanceof Error ? error.message : new Thrown(error).message;
  return `the source was asked for ${length} bytes from ${offset} and failed: ${reason}`;
}
