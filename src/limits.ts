import { validateSignal } from './exited.js';
import type { UffdError } from './errors.js';
import { validateInteger, validateOptions } from './validate.js';

/** Milliseconds: what a timer of Node takes. */
export const LONGEST_TIMEOUT: number = 2 ** 31 - 1;

/** How long something is waited for. */
export interface AcceptOptions {
  /** Milliseconds to wait. Default: for ever. */
  timeout?: number;
  /** Ends the wait. */
  signal?: AbortSignal;
}

/** @hidden As {@link AcceptOptions}, checked; a signal that has aborted already ends it here. */
export interface Limits {
  timeout: number | undefined;
  signal: AbortSignal | undefined;
}

/** @hidden */
export function readLimits(options: AcceptOptions): Limits {
  validateOptions('options', options, ['timeout', 'signal']);
  const { timeout } = options;
  if (timeout !== undefined) validateInteger('options.timeout', timeout, 0, LONGEST_TIMEOUT);
  const signal = validateSignal(options.signal);
  signal?.throwIfAborted();
  return { timeout, signal };
}

/** @hidden The promise, unless the signal aborts before. What it comes to then is heard by nobody. */
export async function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  const { promise: aborted, reject } = withResolvers<never>();
  const abort = (): void => reject(signal?.reason);
  signal?.addEventListener('abort', abort, { once: true });
  try {
    return await Promise.race([promise, aborted]);
  } finally {
    signal?.removeEventListener('abort', abort);
  }
}

/** @hidden The promise, unless time or patience end before. What it comes to then is heard by nobody. */
export async function within<T>(
  promise: Promise<T>,
  { timeout, signal }: Limits,
  late: (timeout: number) => UffdError,
): Promise<T> {
  const { promise: tooLate, reject } = withResolvers<never>();
  const timer = timeout === undefined ? undefined : setTimeout(() => reject(late(timeout)), timeout);
  try {
    return await unlessAborted(Promise.race([promise, tooLate]), signal);
  } finally {
    clearTimeout(timer);
  }
}

/** @hidden `Promise.withResolvers`, which Node 20 does not have. */
export function withResolvers<T>(): {
  promise: Promise<T>;
  resolve: (value: T) => void;
  reject: (reason: unknown) => void;
} {
  let resolve!: (value: T) => void;
  let reject!: (reason: unknown) => void;
  const promise = new Promise<T>((yes, no) => {
    resolve = yes;
    reject = no;
  });
  return { promise, resolve, reject };
}

/** @hidden How long a source may take for a read. */
export function readSourceTimeout(name: string, value: unknown = 30_000): number {
  return validateInteger(name, value, 1, LONGEST_TIMEOUT);
}
